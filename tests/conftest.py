"""What holds for every test: eight virtual CPU devices, strict promotion, repeatable examples,
programs that are compiled quickly.

The environment variables stand before the first import of jax, which reads them once.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Tests compile thousands of programs and run each once: without the optimisations of the backend
# that takes two thirds of the time, and the program that jaxdp has built is the same. What it
# rounds is not, which tests of rounding see; they are marked `optimized`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# When it reads a program that was compiled before, the XLA of JAX 0.10 takes two of its own
# preferences for instructions that the processor lacks, and logs an error of a page each time.
LOGGED = os.environ.get("TF_CPP_MIN_LOG_LEVEL")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib  # noqa: E402
import zlib  # noqa: E402
from collections.abc import Generator, Iterator  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from tests import compiled  # noqa: E402

if LOGGED is None:  # processes that tests start log everything
    os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example of a test slow, so time says nothing; a failure must be
# the same on every machine.
hypothesis.settings.register_profile("jaxdp", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("jaxdp")

# Needs torch, which no test does.
collect_ignore = ["golden/make.py"]


# What sees JAX through its public functions only, if at all: one version of it is enough. First
# the examples of the docstrings.
ONCE = (
    "jaxdp/",
    "tests/accounting",
    "tests/bench",
    "tests/distributed/test_fit",
    "tests/distributed/test_fully_sharded",
    "tests/distributed/test_processes",
    "tests/recipes",
    "tests/test_arguments",
    "tests/test_checks",
    "tests/test_cli",
    "tests/test_contributing",
    "tests/test_limits",
    "tests/test_notebooks",
    "tests/test_public_api",
    "tests/test_sampling",
    "tests/training",
)

# Sweeps of which each end runs a third: what searches for data that breaks a bound, what states ε,
# and the contracts of transformations.
IN_THIRDS = (
    "tests/accounting",
    "tests/distributed",
    "tests/engine/test_certificates",
    "tests/engine/test_norm_attacks",
    "tests/engine/test_precision",
    "tests/engine/test_shared",
    "tests/lipschitz",
    "tests/test_contracts",
)


CACHE = pytest.StashKey[compiled.Cache]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where tests run, what earlier runs have compiled is read."""
    if not session.config.option.collectonly:
        session.stash[CACHE] = compiled.Cache(compiled.directory())
        session.stash[CACHE].use()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that was not broken off adds what it has compiled."""
    if CACHE in session.stash:
        complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        jax.config.update("jax_enable_compilation_cache", False)
        session.stash[CACHE].close(keep=complete)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Examples are searched for in the docstrings of jaxdp, not in those of tests."""
    found = yield
    return [node for node in found if type(node) is pytest.Module]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Compiles what a test marked `optimized` runs as users do, and what one marked `anew` runs
    itself."""
    quickly = item.get_closest_marker("optimized") is None
    anew = item.get_closest_marker("anew") is not None
    jax.config.update("jax_disable_most_optimizations", quickly)
    try:
        with compiled.anew() if anew else contextlib.nullcontext():
            return (yield)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves some to the other end of the supported versions, where they are slow here: of the
    cases of a sweep one part runs with the oldest JAX and another with newer ones. A part is a
    third if IN_THIRDS, or a quarter; the others are slow with both. What needs to run ONCE runs
    with newer ones. Parts by name, so that a new case moves no other."""
    newer = jax.__version_info__ >= (0, 11)
    for item in items:
        sweep = item.get_closest_marker("sweep") is not None and hasattr(item, "callspec")
        parts = 3 if item.nodeid.startswith(IN_THIRDS) else 4
        elsewhere = sweep and zlib.crc32(item.name.encode()) % parts != newer
        if elsewhere or (item.nodeid.startswith(ONCE) and not newer):
            item.add_marker(pytest.mark.slow)
