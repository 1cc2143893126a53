"""A loss as one function with a bound of its own, instead of its primitives' bounds."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.declaration import declare
from jaxdp.lipschitz.rounding import gamma, times
from jaxdp.lipschitz.rules.registry import PullBack
from jaxdp.lipschitz.value import Range, Value, scaled


def declared(
    fun: Callable[[jax.Array, jax.Array], jax.Array],
    slope: Callable[[Value], ArrayLike],
    *,
    count: int,
    reach: float = 1.0,
    at_zero: float = math.inf,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Declares a loss with a bound on its gradient with respect to the prediction.

    Args:
      fun: the loss, `(prediction, target) -> loss`.
      slope: the bound for exact arithmetic; it is at least ½, or in proportion to the gradient.
      count: number of outputs.
      reach: the factor by which the loss multiplies the prediction.
      at_zero: a bound on the loss at a prediction of zero, for any target.

    Returns:
      The loss, which the bound rules take as one function.
    """

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        prediction, target = values
        if target.moves:
            raise NotImplementedError(
                f"no bound is known for a target that depends on parameters ({eqn.source}). Use "
                "jax.lax.stop_gradient on it."
            )
        # Sums over the outputs, of shares or of squares, are what is rounded; a margin between two
        # outputs must not overflow.
        rounded = 1 + 4 * gamma(count + 16)
        steepest = times(slope(prediction), rounded) + 0 * times(4 * reach, prediction.norm)
        size = at_zero + times(steepest, prediction.norm)
        return [Range(size)], lambda bounds: [scaled(bounds[0], steepest), None]

    return declare(fun, rule, linear=True)


def is_label(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Bool `[K]`, true at the label."""
    return jnp.arange(logits.shape[-1]) == label


def nan_without_class(loss: jax.Array, label: jax.Array) -> jax.Array:
    """The loss, or NaN for a label outside of 0..K-1; its gradient stays the same."""
    return loss + jnp.where(label >= 0, 0, jnp.nan).astype(loss.dtype)
