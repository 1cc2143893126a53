"""The directory of a run's checkpoints: locked by the run that lives, a place for each of them.

    directory/
      .lock           held by the run that lives
      .saving/        what is being written; left behind by a kill, removed by the next save
      9/, 12/, 12.1/  checkpoints by step; a number behind it where a step was saved again

Example:
  >>> import tempfile
  >>> directory = Path(tempfile.mkdtemp())
  >>> (directory / "12.1").mkdir()
  >>> all_places(directory)
  [Place(step=12, again=1)]
"""

import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

SAVING = ".saving"
"""The folder in which a checkpoint lies until it is whole."""

_NAME = re.compile(r"(0|[1-9][0-9]*)(?:\.([1-9][0-9]*))?", re.ASCII)


class Place(NamedTuple):
    """Which checkpoint of a directory.

    Attributes:
      step: of its state.
      again: how often that step had been saved before.
    """

    step: int
    again: int

    def within(self, directory: Path) -> Path:
        """The folder of the checkpoint."""
        return directory / (f"{self.step}.{self.again}" if self.again else f"{self.step}")


def all_places(directory: Path) -> list[Place]:
    """The places of all checkpoints in a directory, the newest last."""
    if not directory.is_dir():  # which the first process makes
        return []
    names = (_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(Place(int(name[1]), int(name[2] or 0)) for name in names if name)


def newest_place(directory: Path) -> Place | None:
    """That of the newest checkpoint, or None where there is none."""
    found = all_places(directory)
    return found[-1] if found else None


def check_what_is_there(directory: Path) -> None:
    """Refuses a directory of other things: what was renamed, say, would be passed over, and the run
    would begin anew beside it."""
    if not directory.is_dir():
        raise ValueError(
            f"checkpoints must be in a directory, got the file {directory}. Move it away."
        )
    for path in directory.iterdir():
        known = path.name.startswith(".") or (_NAME.fullmatch(path.name) and path.is_dir())
        if not known:
            raise ValueError(
                f"{directory} must hold checkpoints alone, got {path.name!r}. Move it "
                "away, or choose another directory."
            )


def locked(directory: Path) -> int:
    """Makes the directory if need be and locks it: a file descriptor that holds the lock.

    The lock is the operating system's: it ends with the process, however that ends.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(directory, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A lock that was there before says nothing of what can be written now.
        shutil.rmtree(directory / SAVING, ignore_errors=True)
        (directory / SAVING).mkdir()
        (directory / SAVING).rmdir()
    except BlockingIOError as error:
        os.close(lock)
        raise OSError(
            f"another run has the checkpoints in {directory} open. End it (or close its "
            "Checkpoints), or choose another directory."
        ) from error
    except OSError as error:
        os.close(lock)
        raise _unwritable(directory, error) from error
    return lock


def _unwritable(directory: Path, error: OSError) -> OSError:
    reason = error.strerror or error
    return OSError(f"checkpoints cannot be written in {directory} ({reason}). Choose another one.")
