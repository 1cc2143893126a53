"""Activations that keep the norm of values and gradients."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxdp.checks import check_sizes
from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.declaration import declare
from jaxdp.lipschitz.rounding import gamma
from jaxdp.lipschitz.rules.registry import PullBack
from jaxdp.lipschitz.value import Range, Value, scaled
from jaxdp.nn.composition import function
from jaxdp.nn.layer import Layer, Params, check_input


def group_sort(group_size: int = 2) -> Layer:
    """Sorts the entries of every group of channels, which keeps the norm of values and gradients.

    Args:
      group_size: number of neighbouring channels in a group; with 2 the layer is called MaxMin.

    Returns:
      A layer, shape kept, without parameters. The last axis must be a multiple of `group_size`.

    Raises:
      ValueError: a size below 1, or one that does not divide the channels.

    Example:
      >>> print(group_sort().apply({}, jnp.array([2.0, 1.0, 3.0, 4.0])))
      [1. 2. 3. 4.]

    Source: Anil et al. 2019, "Sorting Out Lipschitz Function Approximation", section 4.1.
    """
    check_sizes(group_size=group_size)

    def apply(x: jax.Array) -> jax.Array:
        _check_groups("group_sort", x, group_size)
        return jnp.sort(x.reshape(*x.shape[:-1], -1, group_size), axis=-1).reshape(x.shape)

    return function(apply)


def householder(features: int) -> Layer:
    r"""Reflects pairs of channels by a learned angle where they lie on one side of its mirror:

    $$ z \mapsto \begin{cases} z & v^\top z > 0 \\ (I - 2vv^\top) z & \text{else} \end{cases},
       \qquad v = (\sin\tfrac\theta2, -\cos\tfrac\theta2) $$

    It keeps the norm of values and gradients. The gradient with respect to all angles is no longer
    than the input times the cotangent, since a reflection turns by as much as its angle.

    Args:
      features: length of the last axis, even; its first half pairs with its second.

    Returns:
      A layer, shape kept. Parameters: angle `[features / 2]`, π/2 (MaxMin).

    Raises:
      ValueError: a size that is not positive and even.

    Example:
      >>> layer = householder(2)
      >>> params = layer.init(jax.random.key(0))
      >>> print(layer.apply(params, jnp.array([1.0, 2.0])).round(3))
      [2. 1.]

    Source: Singla et al. 2022, "Improved Deterministic l2 Robustness on CIFAR-10 and CIFAR-100".
    """
    check_sizes(features=features)
    if features % 2:
        raise ValueError(
            f"features must be even, got {features}. The first half pairs with the second."
        )

    def apply(params: Params, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        check_input("householder", x, last=features)
        return _householder(x, params["angle"])

    return Layer(
        init=lambda key: {"angle": math.pi / 2 * jnp.ones(features // 2)},
        apply=apply,
    )


def gradient_norm_preserving(fun: Callable[[jax.Array], jax.Array]) -> Layer:
    """Declares that a function lengthens neither values nor gradients.

    It must have f(0) = 0 and a Jacobian of norm at most one everywhere. Nobody checks that when it
    is used: `jaxdp.lipschitz.falsify` tries to refute it.

    Args:
      fun: a function from one array to one array.

    Returns:
      A layer without parameters.

    Example:
      >>> from jaxdp import lipschitz
      >>> softened = gradient_norm_preserving(lambda x: x * jnp.abs(x) / (1 + jnp.abs(x)))
      >>> print(softened.apply({}, jnp.ones(2)))
      [0.5 0.5]
    """

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        return [Range(values[0].norm)], lambda bounds: bounds

    return function(declare(fun, rule, linear=True))


def _check_groups(layer: str, x: jax.Array, group_size: int) -> None:
    if x.ndim == 0 or x.shape[-1] % group_size:
        raise ValueError(
            f"{layer} needs a last axis that is a multiple of {group_size}, got {tuple(x.shape)}. "
            "Choose a group_size that divides the channels."
        )


def _reflected_pairs(x: jax.Array, angle: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    half = (angle / 2).reshape((1,) * (x.ndim - 1) + angle.shape)
    whole = 2 * half
    outside = first * jnp.sin(half) - second * jnp.cos(half) > 0
    mirrored = (
        first * jnp.cos(whole) + second * jnp.sin(whole),
        first * jnp.sin(whole) - second * jnp.cos(whole),
    )
    pairs = [
        jnp.where(outside, kept, image)
        for kept, image in zip((first, second), mirrored, strict=True)
    ]
    return jnp.concatenate(pairs, axis=-1)


def _householder_rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, angle = values
    positions = x.size // max(2 * angle.size, 1)
    summed = 1 + gamma(positions)
    return [Range(x.norm)], lambda bounds: [bounds[0], scaled(bounds[0], x.norm, summed)]


_householder = declare(_reflected_pairs, _householder_rule, linear=True)
