"""Branches that are added up."""

from collections.abc import Callable
from typing import Any

from jaxdp.checks import check_choice
from jaxdp.nn.composition import LayerLike, combined
from jaxdp.nn.layer import Layer


def residual(
    layer: LayerLike, shortcut: LayerLike = lambda x: x, *, merge: str = "1-lip-add"
) -> Layer:
    """Adds a branch to a shortcut, with weights that can keep the norm.

    Args:
      layer: the branch.
      shortcut: the other branch; by default x itself.
      merge: "1-lip-add" for half the sum, which lengthens nothing where neither branch does;
        "add" for the sum, as `nn.residual`.

    Returns:
      A layer. Parameters: "layer" and "shortcut", as far as they have any.

    Raises:
      ValueError: another merge.

    Example:
      >>> import jax.numpy as jnp
      >>> block = residual(lambda x: 3 * x)
      >>> print(block.apply({}, jnp.ones(2)))
      [2. 2.]
    """
    check_choice("merge", merge, ("add", "1-lip-add"))
    weight = 1.0 if merge == "add" else 0.5

    def merged(functions: list[Callable[[Any], Any]], x: Any) -> Any:
        branch, other = (each(x) for each in functions)
        return weight * (branch + other)

    return combined({"layer": layer, "shortcut": shortcut}, merged)
