"""The numbers that devices exchange in a step."""

import math
import re

from jax.stages import Compiled

from jaxdp.checks import check_instance

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def exchanged(compiled: Compiled) -> dict[str, int]:
    """Counts the numbers that devices exchange in one call, read off the compiled program.

    Args:
      compiled: `jax.jit(step).lower(...).compile()`.

    Returns:
      For each kind of communication ("all-reduce", "all-gather", …) the number of results on each
      device. The body of a loop counts once.

    Raises:
      TypeError: what is given is not compiled.
      ValueError: its backend does not say what it compiled.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> exchanged(jax.jit(jnp.sum).lower(jnp.ones(3)).compile())
      {}
    """
    advice = "Pass jax.jit(step).lower(...).compile()."
    check_instance("compiled", compiled, Compiled, advice=advice)
    text = compiled.as_text()
    if text is None:
        raise ValueError("compiled must have a text, got a program of a backend that gives none.")
    found: dict[str, int] = {}
    for line in text.splitlines():
        match = re.search(rf"= (.+?) ({_KINDS})(?:-start)?\(", line)
        if match is not None:
            # The shape of each result; the braces behind it hold its memory layout.
            shapes = re.findall(r"\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", match[1]))
            sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
            found[match[2]] = found.get(match[2], 0) + sum(sizes)
    return found
