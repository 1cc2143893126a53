"""The scripts of `bench/`, which import each other by their bare names."""

import contextlib
import importlib
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax

BENCH = Path(__file__).parents[2] / "bench"


def script(name: str) -> Any:
    """The module `bench/<name>.py`, with those that it imports."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


@contextlib.contextmanager
def as_users_run_it() -> Generator[None]:
    """With the promotion of types and ranks that JAX has by default: models of flax rely on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
