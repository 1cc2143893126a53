"""The platform that is traced for: whose arithmetic is bounded, and whose costs are weighed."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import jax

# Part of the key of jit's caches: what was traced for one platform is not run for another.
_traced_for: Any = cast(Any, jax).make_user_context(default_value=None)


def platform() -> str:
    """ "cpu", "gpu", "tpu", or what else JAX calls the machine that programs run on."""
    return cast(str, _traced_for.value or jax.default_backend())


@contextmanager
def tracing_for(platform: str) -> Generator[None]:
    """The engine traces what it would trace on this platform, wherever it runs.

    For tests and benchmarks, and to lower a step for a machine that is not at hand. The arithmetic
    of a platform is emulated as far as operands go: products multiply what it would multiply.

    Args:
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: another platform.

    Example:
      >>> from jaxdp.engine.numerics import tracing_for
      >>> with tracing_for("tpu"):
      ...     step = jax.jit(lambda x: x + 1).lower(1.0)
    """
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"platform must be 'cpu', 'gpu' or 'tpu', got {platform!r}.")
    with _traced_for(platform):
        yield
