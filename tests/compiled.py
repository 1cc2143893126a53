"""Programs that were compiled by earlier test runs, kept in the user's cache directory.

JAX writes what it has compiled into a directory, and reads it from there instead of compiling it
again; the key is made of the program, the options and the version of jaxlib. It writes in place,
so that a run which is killed, or two at a time, could leave or meet half a file. Therefore a run
works in a directory of its own, into which the files of earlier runs are linked, and adds its own
at its end, whole. One that is killed adds nothing.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

# To write and read a program takes a few milliseconds: one that compiles at once is not kept.
SECONDS_TO_COMPILE = 0.05
SECONDS_KEPT = 14 * 24 * 3600


def directory() -> Path:
    """Where programs for this machine and this jaxlib are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # What is compiled uses the instructions of this processor.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    words = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    machine = (platform.machine(), platform.processor(), *sorted(set(words)))
    digest = hashlib.sha256("\n".join(machine).encode()).hexdigest()[:12]
    return root / "jaxdp" / "tests" / f"jaxlib-{importlib.metadata.version('jaxlib')}-{digest}"


class Cache:
    """The directory of one run. Where it cannot be made, the run compiles everything itself.

    Args:
      kept: directory of what earlier runs have compiled.
    """

    def __init__(self, kept: Path):
        self.kept = kept
        self.own: Path | None = None
        with contextlib.suppress(OSError):
            kept.mkdir(parents=True, exist_ok=True)
            _forget_what_is_old(kept)
            self.own = Path(tempfile.mkdtemp(prefix="run-", dir=kept))
            _link(kept, self.own)

    def use(self) -> None:
        """Has JAX read and write there from now on."""
        if self.own is not None:
            jax.config.update("jax_compilation_cache_dir", str(self.own))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS_TO_COMPILE)
            # Caches of XLA, of which CPUs have none, would make the key depend on the directory.
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
            # JAX decides at its first compilation, which may be over, whether it has a cache.
            compilation_cache.reset_cache()

    def close(self, keep: bool) -> None:
        """Removes the run's directory, and keeps what the run has compiled if asked to."""
        if self.own is not None:
            if keep:
                _link(self.own, self.kept)
            shutil.rmtree(self.own, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Every program of one directory into another, unless another run was faster."""
    for program in source.glob("*-cache"):
        with contextlib.suppress(OSError):
            os.link(program, target / program.name)


def _forget_what_is_old(kept: Path) -> None:
    """Programs, and directories of runs that were killed, of two weeks ago."""
    for entry in kept.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime < SECONDS_KEPT:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Everything inside is compiled, whatever is kept, and nothing of it is kept."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
