"""Losses of the distance between a prediction and a target of its shape."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdp.engine.numerics import once
from jaxdp.lipschitz.losses.arguments import (
    checked_scale,
    checked_target,
)
from jaxdp.lipschitz.losses.declared import declared
from jaxdp.lipschitz.rounding import divisor


def cosine_similarity(
    prediction: jax.Array, target: ArrayLike, *, least_norm: float = 1.0
) -> jax.Array:
    """-⟨z / max(‖z‖, ρ), t / max(‖t‖, ρ)⟩.

    Args:
      prediction: z, any shape.
      target: t, of the same shape.
      least_norm: ρ > 0, which keeps the slope finite at zero.

    Returns:
      The loss, a scalar in [-1, 1].

    Raises:
      TypeError: a prediction of no floating-point numbers.
      ValueError: targets of another shape; a norm outside of [1e-12, 1e12].

    Example:
      >>> print(cosine_similarity(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])).round(3))
      -0.707
    """
    target = checked_target("cosine_similarity", "prediction", prediction, "target", target)
    least = checked_scale("least_norm", least_norm)
    return _cosine(least, math.prod(prediction.shape))(prediction, target)


def mean_absolute_error(prediction: jax.Array, target: ArrayLike) -> jax.Array:
    """Σ_j |z_j - t_j| / n.

    Args:
      prediction: z, any shape with n entries.
      target: t, of the same shape.

    Returns:
      The loss, a scalar.

    Raises:
      TypeError: a prediction of no floating-point numbers.
      ValueError: targets of another shape.

    Example:
      >>> print(mean_absolute_error(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])))
      1.5
    """
    target = checked_target("mean_absolute_error", "prediction", prediction, "target", target)
    return _mean_absolute_error(math.prod(prediction.shape))(prediction, target)


@functools.cache
def _cosine(least_norm: float, count: int) -> Callable[..., jax.Array]:
    def shortened(vector: jax.Array) -> jax.Array:
        # Divided by its largest entry first: no square overflows, and the root, which has no
        # gradient at zero, is taken of one at least.
        vector = once(vector)
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vector), initial=0))
        scale = divisor(jnp.maximum(largest, least_norm))
        vector = vector / scale
        return vector * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(vector)), 1))

    def cosine_similarity(prediction: jax.Array, target: jax.Array) -> jax.Array:
        return -jnp.sum(shortened(prediction) * shortened(target))

    return declared(cosine_similarity, lambda _: 1 / least_norm, count=count, at_zero=0)


@functools.cache
def _mean_absolute_error(count: int) -> Callable[..., jax.Array]:
    def mean_absolute_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.abs(prediction - target))

    return declared(mean_absolute_error, lambda _: 1 / math.sqrt(max(count, 1)), count=count)
