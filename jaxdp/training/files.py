"""Files that are whole or absent, and folders whose every byte is vouched for.

A folder is sealed by a listing of the SHA-256 digests of its files, in the format of the tool
`sha256sum`, so that `sha256sum -c SHA256SUMS` finds the same damage as `check_seal`. It holds
against accidents: disks, copies, editors. Whoever writes a new listing can forge a folder.

Example:
  >>> import tempfile
  >>> folder = Path(tempfile.mkdtemp())
  >>> write_file(folder / "run.json", b"{}")
  >>> seal(folder)
  >>> check_seal(folder)
  >>> (folder / "run.json").write_bytes(b"[]") and None
  >>> check_seal(folder)
  Traceback (most recent call last):
  ValueError: run.json was altered
"""

import hashlib
import os
from collections.abc import Collection
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

_LISTING = "SHA256SUMS"


def write_file(path: Path, content: bytes) -> None:
    """Writes a file so that at every moment the old content or the new one is there, whole.

    Raises:
      OSError: it cannot be written; what was there is untouched.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a loss of power, as fsync does for a file's content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_vouched(path: Path, content: bytes) -> None:
    """Writes a file that begins with the digest of what follows.

    Raises:
      OSError: it cannot be written; what was there is untouched.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "note"
      >>> write_vouched(path, b"told")
      >>> read_vouched(path)
      b'told'
    """
    write_file(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_vouched(path: Path) -> bytes | None:
    """What `write_vouched` wrote, or None where that is not there as it was written."""
    try:
        vouched, _, content = _read(path).partition(b"\n")
    except OSError:
        return None
    return content if vouched == hashlib.sha256(content).hexdigest().encode() else None


def seal(folder: Path) -> None:
    """Writes the listing of everything in a folder."""
    names = sorted(_files_in(folder) - {_LISTING})
    lines = [f"{digest(folder / name)}  {name}\n" for name in names]
    write_file(folder / _LISTING, "".join(lines).encode())


def check_seal(folder: Path, only: Collection[str] | None = None) -> None:
    """Raises ValueError, in some words to go on a sentence with, unless the folder is as sealed.

    Args:
      folder: what was sealed; what was added to it is damage as well.
      only: names of the files to look at; default all.
    """
    try:
        lines = _read(folder / _LISTING).decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"its listing {_LISTING} is missing or unreadable") from None
    listed = {name: vouched for vouched, _, name in (line.partition("  ") for line in lines)}
    present = _files_in(folder) - {_LISTING}
    for name in sorted(present ^ listed.keys() if only is None else set(only) - listed.keys()):
        raise ValueError(f"{name} was added" if name in present else f"{name} is missing")
    for name in sorted(listed if only is None else only):
        try:
            altered = digest(folder / name) != listed[name]
        except OSError:
            raise ValueError(f"{name} cannot be read") from None
        if altered:
            raise ValueError(f"{name} was altered")


def _files_in(folder: Path) -> set[str]:
    """All that is no folder, by its path below the folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def digest(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits.

    Raises:
      OSError: it cannot be read.
    """
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


def _opened(path: Path) -> BufferedReader:
    if not path.is_file():  # to open a pipe would wait for its writer
        raise OSError(f"{path} is no file")
    return path.open("rb")
