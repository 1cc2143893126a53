"""Sealed folders: whatever happens to one is named. Files are replaced whole or not at all."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxdp.training.files import check_seal, seal, write_file


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "sealed"
    (folder / "arrays" / "d").mkdir(parents=True)
    (folder / "run.json").write_text('{"steps": 168}')
    (folder / "arrays" / "d" / "one").write_bytes(bytes(range(256)))
    (folder / "arrays" / "two").write_bytes(b"")
    seal(folder)
    return folder


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


# What happens to a folder, and what is said of it.
MISHAPS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an edit": (lambda f: (f / "run.json").write_text('{"steps": 1}'), "run.json was altered"),
    "a longer file": (lambda f: (f / "arrays/two").write_bytes(b"\0"), "arrays/two was altered"),
    "an empty file": (lambda f: (f / "arrays/d/one").write_bytes(b""), "arrays/d/one was altered"),
    "a missing file": (lambda f: (f / "arrays/two").unlink(), "arrays/two is missing"),
    "a new file": (lambda f: (f / "arrays/three").touch(), "arrays/three was added"),
    "a hidden file": (lambda f: (f / ".three").touch(), ".three was added"),
    "another name": (lambda f: (f / "run.json").rename(f / "run"), "run was added"),
    "a missing folder": (lambda f: shutil.rmtree(f / "arrays/d"), "arrays/d/one is missing"),
    "a pipe": (lambda f: pipe(f / "run.json"), "run.json cannot be read"),
    "a pipe for the listing": (lambda f: pipe(f / "SHA256SUMS"), "listing SHA256SUMS is missing"),
    "no listing": (lambda f: (f / "SHA256SUMS").unlink(), "listing SHA256SUMS is missing"),
    "an empty listing": (lambda f: (f / "SHA256SUMS").write_bytes(b""), "was added"),
    "no text for a listing": (
        lambda f: (f / "SHA256SUMS").write_bytes(b"\xff"),
        "is missing or un",
    ),
}


@pytest.mark.parametrize(("mishap", "says"), MISHAPS.values(), ids=MISHAPS.keys())
def test_whatever_happens_to_a_sealed_folder_is_named(
    sealed: Path, mishap: Callable[[Path], Any], says: str
) -> None:
    check_seal(sealed)
    mishap(sealed)
    with pytest.raises(ValueError, match=says):
        check_seal(sealed)


def test_every_bit_of_a_sealed_folder_counts(sealed: Path) -> None:
    for path in sorted(path for path in sealed.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for place in range(0, len(content), 7):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(ValueError):
                check_seal(sealed)
        path.write_bytes(content)
    check_seal(sealed)


def test_one_file_can_be_looked_at_alone(sealed: Path) -> None:
    (sealed / "arrays" / "two").write_bytes(b"altered")
    check_seal(sealed, only=["run.json"])
    (sealed / "run.json").write_text("altered")
    with pytest.raises(ValueError, match="run.json was altered"):
        check_seal(sealed, only=["run.json"])
    with pytest.raises(ValueError, match="else is missing"):
        check_seal(sealed, only=["else"])


def test_the_listing_is_what_a_common_tool_reads(sealed: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("the tool is not installed")
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=sealed).returncode == 0


def test_a_folder_that_is_sealed_again_is_as_it_is_now(sealed: Path) -> None:
    (sealed / "run.json").write_text("new")
    seal(sealed)
    check_seal(sealed)


@pytest.mark.parametrize("fails", ["open", "fsync", "replace"])
def test_a_file_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    write_file(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os if fails == "fsync" else Path, fails, full)
        with pytest.raises(OSError, match="No space left"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]
