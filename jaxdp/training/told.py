"""Which report of a run was told: a note beside its checkpoints, so that it is not told again.

A checkpoint is written before anybody sees its parameters, and so before the report on them is
complete. The note says for which checkpoint that has happened since, by the digest of its file. One
that is missing, damaged or of another checkpoint says nothing: then the report is made again.

Example:
  >>> import tempfile
  >>> directory = Path(tempfile.mkdtemp())
  >>> saved = directory / "run.json"
  >>> saved.write_text("a state of step 3") and None
  >>> told_with(directory, saved) is None
  True
  >>> note_told(directory, saved, [{"step": 3}])
  >>> told_with(directory, saved)
  [{'step': 3}]
"""

import json
from pathlib import Path
from typing import Any

from jaxdp.training.files import digest, read_vouched, write_vouched

_NOTE = ".reports.json"


def note_told(directory: Path, saved: Path, history: list[dict[str, Any]]) -> None:
    """Notes that the report on a checkpoint was told.

    Args:
      directory: of the checkpoints.
      saved: the file of the checkpoint that tells of the run.
      history: all reports, that one last.

    Raises:
      OSError: it cannot be written; nothing else is touched.
    """
    content = json.dumps({"of": digest(saved), "history": history})
    write_vouched(directory / _NOTE, content.encode())


def told_with(directory: Path, saved: Path) -> list[dict[str, Any]] | None:
    """The history with the report on a checkpoint; None where nothing says that it was told.

    Args:
      directory: of the checkpoints.
      saved: the file of the checkpoint that tells of the run.
    """
    content = read_vouched(directory / _NOTE)
    note: Any = {} if content is None else json.loads(content)
    return note["history"] if note.get("of") == digest(saved) else None
