"""Inputs of bounded norm."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxdp.engine.numerics import once
from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.declaration import declare
from jaxdp.lipschitz.rounding import divisor, gamma
from jaxdp.lipschitz.rules.registry import PullBack
from jaxdp.lipschitz.value import Range, Value, through_entries
from jaxdp.nn.composition import function
from jaxdp.nn.layer import Layer
from jaxdp.schedules import check_number


def bounded_input(bound: float) -> Layer:
    """x scaled down to norm u where it is longer: x · min(1, u/‖x‖).

    `bounded_grads` does the same with examples, by its `input_bound`. The layer is for models that
    are also used without it.

    Args:
      bound: u > 0.

    Returns:
      A layer, shape kept, without parameters.

    Raises:
      ValueError: a bound that is not positive and finite.

    Example:
      >>> print(bounded_input(1.0).apply({}, jnp.array([3.0, 4.0])))
      [0.6 0.8]
    """
    check_number("bound", bound)
    return function(_bounded_input(float(bound)))


@functools.cache
def _bounded_input(bound: float) -> Callable[[jax.Array], jax.Array]:
    def bounded_input(x: jax.Array) -> jax.Array:
        # x is divided by its largest entry first: no square overflows, no root is taken of zero.
        x = once(x)
        most = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
        scale = divisor(jnp.maximum(most, bound))
        squared = jnp.sum(jnp.square(x / scale))
        return x * (bound / scale / jnp.sqrt(jnp.maximum(squared, 1)))

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        (x,) = values
        rounded = 1 + gamma(x.size + 8)
        norm = jnp.minimum(x.norm, bound) * rounded
        image = Range(norm, jnp.minimum(x.low, 0), jnp.maximum(x.high, 0))
        # The projection onto a ball, which is convex, lengthens no difference: it takes from a
        # cotangent what lies along x. Both parts are rounded.
        return [image], lambda bounds: [through_entries(bounds[0], x, 1 + 4 * gamma(x.size + 8))]

    return declare(bounded_input, rule, linear=True)
