"""The numbers that devices exchange in a step."""

import math
import re
from typing import Any

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def exchanged(compiled: Any) -> dict[str, int]:
    """Counts the numbers that devices exchange in one call, read off the compiled program.

    Args:
      compiled: `jax.jit(step).lower(...).compile()`.

    Returns:
      For each kind of communication ("all-reduce", "all-gather", …) the number of results on each
      device. The body of a loop counts once.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> exchanged(jax.jit(jnp.sum).lower(jnp.ones(3)).compile())
      {}
    """
    found: dict[str, int] = {}
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.+?) ({_KINDS})(?:-start)?\(", line)
        if match is not None:
            # The shape of each result; the braces behind it hold its memory layout.
            shapes = re.findall(r"\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", match[1]))
            sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
            found[match[2]] = found.get(match[2], 0) + sum(sizes)
    return found
