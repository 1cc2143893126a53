"""Checkpoints of a run: state, ledger, sampler, history and configuration, all or nothing.

    directory/
      .lock           held by the run that lives
      .saving/        what is being written; left behind by a kill, removed by the next save
      9/, 12/, 12.1/  checkpoints by step; a number behind it where a step was saved again
        state/        the arrays, written by Orbax
        run.json      all else
        SHA256SUMS    the digest of each file above, see `training.files`

A folder gets its name when everything in it is on the disk: a checkpoint is complete or absent.
"""

import fcntl
import json
import os
import re
import shutil
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxdp.accounting import Ledger
from jaxdp.accounting.strict_json import check_keys, parse
from jaxdp.checks import check_integer, shown
from jaxdp.sampling import Sampler, sampler_from_dict
from jaxdp.training.configuration import as_json, differences
from jaxdp.training.files import check_seal, seal, sync_folder, write_file
from jaxdp.training.step import TrainState

_FORMAT, _VERSION = "jaxdp.checkpoint", 1
_KEYS = (
    *("format", "version", "step", "ledger", "sampler"),
    *("history", "configuration", "structure", "data"),
)
_SAVING = ".saving"
_NAME = re.compile(r"(0|[1-9][0-9]*)(?:\.([1-9][0-9]*))?", re.ASCII)


class Saved(NamedTuple):
    """What a checkpoint holds beside the state."""

    state: TrainState
    ledger: Ledger
    history: list[dict[str, Any]]


class Checkpoints:
    """A directory of checkpoints of one run, which no other live run can open.

    A checkpoint is believed only if every byte of it is as it was written, and its name, state and
    ledger tell of the same step.

    A checkpoint holds the noise keys and the sampler's seed, which resuming needs: keep it as
    secret as the data, and release the parameters alone. Do not continue a copy of it beside the
    original: both would draw the same noise.

    Args:
      directory: made if missing; of checkpoints alone, but for names that begin with a dot. Where
        there are several processes, one that all of them share.
      keep: how many of the newest to keep, at least 1.
      configuration: what decides the run, for instance its hyperparameters: data for JSON, saved
        with every checkpoint. A checkpoint of another configuration is refused.

    Raises:
      TypeError: an argument of another type; a configuration that is no data for JSON.
      ValueError: keep is below 1; the directory is a file or holds something else.
      OSError: the directory cannot be written, or another run has it open.

    Example:
      >>> import tempfile
      >>> store = Checkpoints(tempfile.mkdtemp(), configuration={"threshold": 0.1})
      >>> store.configuration() is None  # nothing has been saved
      True
      >>> import jax.numpy as jnp, optax
      >>> from jaxdp import FixedSizeSampler, training
      >>> state = training.init({"w": jnp.zeros(2)}, optax.sgd(0.1))
      >>> sampler = FixedSizeSampler(10, batch_size=2, seed=1)
      >>> store.save(state, Ledger(), sampler, history=[])
      >>> store.sampler() == sampler, store.configuration()
      (True, {'threshold': 0.1})
      >>> int(store.restore(state, sampler).state.step)
      0
      >>> store.close()
    """

    def __init__(self, directory: str | Path, keep: int = 2, configuration: Any = None):
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(
                f"directory must be a path, got {shown(directory)}. Pass a str or a Path."
            )
        self.directory = Path(directory).absolute()
        self._keep = check_integer("keep", keep, minimum=1, advice="The newest is always kept.")
        self._configuration = as_json("configuration", configuration)
        if self.directory.exists():
            self._check_what_is_there()
        if jax.process_index() == 0:
            # Called by `close`, or when nobody holds this object any more.
            self._unlock = weakref.finalize(self, os.close, _locked(self.directory))
        # Synchronous: the next step reuses the buffers that are being written.
        self._arrays = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        self._closed = False

    def save(
        self,
        state: TrainState,
        ledger: Ledger,
        sampler: Sampler,
        history: list[dict[str, Any]],
        data: str | None = None,
    ) -> None:
        """Writes one checkpoint, named by the state's step, and removes the oldest.

        Args:
          state, ledger, sampler, history: of the run.
          data: a digest of what it trains on, where there is one.

        Raises:
          ValueError: the ledger misses steps of the state; the directory holds a later step;
            the checkpoints are closed.
          OSError: it cannot be written; the older checkpoints are untouched.
        """
        if self._closed:
            raise ValueError(
                "checkpoints must be open, got closed ones, which another run may have. Open "
                "new ones."
            )
        step = int(state.step)
        if ledger.steps < step:
            raise ValueError(
                f"ledger must hold every step that was executed, got {ledger.steps} steps for a "
                f"state after {step}. Charge the ledger with each step before it is saved."
            )
        run = {
            "format": _FORMAT,
            "version": _VERSION,
            "step": step,
            "ledger": ledger.to_json(),
            "sampler": sampler.to_dict(),
            "history": history,
            "configuration": self._configuration,
            "structure": _structure(state),
            "data": data,
        }
        newest = self._newest()
        if newest is not None and newest.step > step:
            raise ValueError(
                f"{self.directory} holds a checkpoint of step {newest.step}, so that one of step "
                f"{step} would never be found. Begin this run there, or use another directory."
            )
        again = 0 if newest is None or newest.step < step else newest.again + 1
        try:
            self._write(_Place(step, again), run, state)
        except jax.errors.JaxRuntimeError:  # another process has ended
            raise
        except Exception as error:  # of any kind: Orbax has no class of its own for what it raises
            shutil.rmtree(self.directory / _SAVING, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {step} cannot be written in {self.directory}: {error}. "
                "Free the disk or choose another directory; older checkpoints are untouched."
            ) from error

    def sampler(self) -> Sampler | None:
        """The sampler of the newest checkpoint, or None where there is none.

        A run whose seed came from the operating system can be resumed only with the sampler that
        was saved: its seed is written nowhere else.

        Returns:
          The sampler, or None.

        Raises:
          ValueError: the checkpoint is damaged.
        """
        newest = self._newest()
        if newest is None:
            return None
        try:
            return sampler_from_dict(self._run(newest)["sampler"])
        except TypeError as error:
            raise self._damaged(newest, error) from error

    def configuration(self) -> Any:
        """The configuration in the newest checkpoint, or None where there is none.

        Returns:
          What `Checkpoints` was given by the run that saved it, or None.

        Raises:
          ValueError: the checkpoint is damaged.
        """
        newest = self._newest()
        return None if newest is None else self._run(newest)["configuration"]

    def restore(self, like: TrainState, sampler: Sampler, data: str | None = None) -> Saved | None:
        """The newest checkpoint, or None where there is none.

        Args:
          like: a state with the structure, shapes and dtypes of the saved one.
          sampler: the sampler of the run, which must be the one that was saved.
          data: a digest of what it trains on, which must be the one that was saved, where both
            are known.

        Returns:
          State, ledger and history, or None.

        Raises:
          ValueError: an array of the state has no entries; the checkpoint belongs to another
            configuration, sampler, model, clip or optimizer, or to other data; it is damaged.
        """
        _check_can_be_saved(like)
        newest = self._newest()
        if newest is None:
            return None
        run = self._run(newest)
        different = differences(run["configuration"], self._configuration)
        if different:
            raise ValueError(
                f"the checkpoint in {self.directory} is of a run with another configuration: "
                f"{'; '.join(different)}. Use the same one, or another directory."
            )
        if run["structure"] != _structure(like):
            raise ValueError(
                f"the checkpoint in {self.directory} holds another model, clip or optimizer, or "
                "one that an earlier jaxdp wrote. Use the same ones, or another directory."
            )
        if run["sampler"] != sampler.to_dict():
            raise ValueError(
                f"the checkpoint in {self.directory} was drawn by another sampler, or by an "
                "earlier jaxdp with other batches, so that its ledger does not describe this run. "
                "Use the same sampler, seed and jaxdp, or another directory and a key of its own."
            )
        if data is not None and run["data"] not in (None, data):
            raise ValueError(
                f"the checkpoint in {self.directory} was trained on other data, to which its "
                "ledger says nothing. Use the same data, or another directory."
            )
        try:
            check_seal(self._folder(newest))
            state = self._read(newest, like)
            ledger = Ledger.from_json(run["ledger"])
            if not newest.step == int(state.step) <= ledger.steps:
                raise ValueError(
                    f"its state is of step {int(state.step)}, its ledger of {ledger.steps} steps"
                )
        except Exception as error:  # of any kind, as above
            raise self._damaged(newest, error) from error
        return Saved(state, ledger, run["history"])

    def close(self) -> None:
        """Lets another run open the directory."""
        self._arrays.close()
        self._closed = True
        if jax.process_index() == 0:
            self._unlock()

    def _write(self, place: "_Place", run: dict[str, Any], state: TrainState) -> None:
        """All processes write their arrays; the first one writes all else and names the folder."""
        first, saving = jax.process_index() == 0, self.directory / _SAVING
        if first:
            shutil.rmtree(saving, ignore_errors=True)
            saving.mkdir()
        _wait_for_all("jaxdp_checkpoint_begins")
        self._arrays.save(
            saving / "state",
            args=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
        )
        if first:
            write_file(saving / "run.json", json.dumps(run).encode())
            seal(saving)
            saving.rename(self._folder(place))
            sync_folder(self.directory)
            for old in self._places()[: -self._keep]:
                shutil.rmtree(self._folder(old))
        _wait_for_all("jaxdp_checkpoint_ends")

    def _read(self, place: "_Place", like: TrainState) -> TrainState:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._arrays.restore(
            self._folder(place) / "state",
            args=ocp.args.StandardRestore(abstract),  # pyright: ignore[reportCallIssue]
        )

    def _run(self, place: "_Place") -> dict[str, Any]:
        folder = self._folder(place)
        try:
            check_seal(folder, only=["run.json"])
            run = dict(check_keys("run.json", parse((folder / "run.json").read_text()), _KEYS))
            if (run["format"], run["version"], run["step"]) != (_FORMAT, _VERSION, place.step):
                raise ValueError(
                    f"run.json holds {run['format']} {run['version']} of step {run['step']}"
                )
        except (OSError, TypeError, ValueError) as error:
            raise self._damaged(place, error) from error
        return run

    def _damaged(self, place: "_Place", error: Exception) -> ValueError:
        older = [other for other in self._places() if other < place]
        go_on = "begin anew, which spends what it had spent once more"
        if older:
            go_on = f"resume from step {older[-1].step}"
        what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        return ValueError(
            f"the checkpoint {self._folder(place)} is damaged ({what}). Put an intact copy in its "
            f"place, or remove it to {go_on}."
        )

    def _check_what_is_there(self) -> None:
        """What was renamed, say, would be passed over, and the run would begin anew beside it."""
        if not self.directory.is_dir():
            raise ValueError(
                f"checkpoints must be in a directory, got the file {self.directory}. Move it away."
            )
        for path in self.directory.iterdir():
            known = path.name.startswith(".") or (_NAME.fullmatch(path.name) and path.is_dir())
            if not known:
                raise ValueError(
                    f"{self.directory} must hold checkpoints alone, got {path.name!r}. Move it "
                    "away, or choose another directory."
                )

    def _newest(self) -> "_Place | None":
        places = self._places()
        return places[-1] if places else None

    def _places(self) -> "list[_Place]":
        """The places of all checkpoints in the directory, the newest last."""
        if not self.directory.is_dir():  # which the first process makes
            return []
        names = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(_Place(int(name[1]), int(name[2] or 0)) for name in names if name)

    def _folder(self, place: "_Place") -> Path:
        step, again = place
        return self.directory / (f"{step}.{again}" if again else f"{step}")


class _Place(NamedTuple):
    """Which checkpoint of a directory."""

    step: int
    again: int


def _locked(directory: Path) -> int:
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
        shutil.rmtree(directory / _SAVING, ignore_errors=True)
        (directory / _SAVING).mkdir()
        (directory / _SAVING).rmdir()
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


def _wait_for_all(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _check_can_be_saved(state: TrainState) -> None:
    """Before anything is spent: Orbax saves no arrays without entries."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.size == 0:
            raise ValueError(
                f"a state with checkpoints must have entries in all of its arrays, got shape "
                f"{leaf.shape} for {jax.tree_util.keystr(path)}. Leave that parameter out."
            )


def _structure(state: TrainState) -> list[str]:
    """Path, dtype and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves]
