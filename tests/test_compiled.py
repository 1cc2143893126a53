"""What is kept of a test run is whole, whoever else runs and whatever ends it."""

import os
import time
from pathlib import Path

from tests import compiled


def names(directory: Path | None) -> set[str]:
    assert directory is not None
    return {path.name for path in directory.iterdir()}


def test_a_run_adds_what_it_compiled_and_reads_what_others_did(tmp_path: Path) -> None:
    first, second = compiled.Cache(tmp_path), compiled.Cache(tmp_path)
    for cache in (first, second):
        assert cache.own is not None
        (cache.own / "both-cache").write_text("program")
    assert first.own is not None
    (first.own / "one-cache").write_text("program")
    first.close(keep=True)
    second.close(keep=True)
    assert names(tmp_path) == {"both-cache", "one-cache"}
    assert names(compiled.Cache(tmp_path).own) == {"both-cache", "one-cache"}


def test_a_run_that_is_broken_off_or_killed_adds_nothing(tmp_path: Path) -> None:
    broken_off, killed = compiled.Cache(tmp_path), compiled.Cache(tmp_path)
    for cache in (broken_off, killed):
        assert cache.own is not None
        (cache.own / "half-cache").write_text("prog")
    broken_off.close(keep=False)
    assert not names(compiled.Cache(tmp_path).own)


def test_what_is_two_weeks_old_is_forgotten(tmp_path: Path) -> None:
    before = time.time() - compiled.SECONDS_KEPT - 1
    killed = compiled.Cache(tmp_path).own
    assert killed is not None
    (tmp_path / "old-cache").write_text("program")
    (tmp_path / "new-cache").write_text("program")
    for path in (killed, tmp_path / "old-cache"):
        os.utime(path, (before, before))
    fresh = compiled.Cache(tmp_path)
    assert names(fresh.own) == {"new-cache"}
    assert not killed.exists() and not (tmp_path / "old-cache").exists()


def test_where_nothing_can_be_kept_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = compiled.Cache(tmp_path / "file" / "below")
    cache.use()
    cache.close(keep=True)
    assert cache.own is None
