"""Pools over windows side by side that lengthen nothing."""

import functools
import math
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
from jaxdp.nn.sizes import Size, sizes


def l2_norm_pool(window: Size) -> Layer:
    """The L2 norm of every window, for each channel; windows side by side.

    Args:
      window: one number for all axes but the last, or one for each.

    Returns:
      A layer of `[*positions, C] -> [*fewer positions, C]`, without parameters; positions that
      fill no window are left out. At a window of zeros its gradient is zero.

    Raises:
      ValueError: a size below 1.

    Example:
      >>> print(l2_norm_pool(2).apply({}, jnp.array([[3.0], [4.0]])))
      [[5.]]

    Source: Boureau et al. 2010, "A Theoretical Analysis of Feature Pooling in Visual Recognition".
    """
    sizes("window", window, len(window) if isinstance(window, Sequence) else 1)
    return function(lambda x: _l2_norm_pool(sizes("window", window, x.ndim - 1))(x))


def scaled_avg_pool(window: Size) -> Layer:
    """The mean of every window times the root of its area, for each channel; windows side by side.

    Args:
      window: one number for all axes but the last, or one for each.

    Returns:
      A layer of `[*positions, C] -> [*fewer positions, C]`, without parameters; positions that
      fill no window are left out.

    Raises:
      ValueError: a size below 1.

    Example:
      >>> print(scaled_avg_pool(4).apply({}, jnp.ones((4, 1))))
      [[2.]]
    """
    sizes("window", window, len(window) if isinstance(window, Sequence) else 1)

    def apply(x: jax.Array) -> jax.Array:
        blocks, inner = _blocks(x, sizes("window", window, x.ndim - 1))
        area = math.prod(blocks.shape[axis] for axis in inner)
        return jnp.sum(blocks, inner) / math.sqrt(area)

    return function(apply)


def _blocks(x: jax.Array, window: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
    """x `[n1, w1, n2, w2, ..., C]`, and the axes of the positions in a window."""
    counts = [length // width for length, width in zip(x.shape, window, strict=False)]
    x = x[tuple(slice(count * width) for count, width in zip(counts, window, strict=True))]
    split = [size for pair in zip(counts, window, strict=True) for size in pair]
    return x.reshape(*split, x.shape[-1]), tuple(range(1, 2 * len(window), 2))


@functools.cache
def _l2_norm_pool(window: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    def l2_norm_pool(x: jax.Array) -> jax.Array:
        blocks, inner = _blocks(once(x), window)
        # Entries are divided by the largest one of the window first: squares vanish and overflow.
        most = jax.lax.stop_gradient(jnp.max(jnp.abs(blocks), inner, keepdims=True))
        scale = divisor(most)
        squared = jnp.sum(jnp.square(blocks / scale), inner)
        positive = squared > 0
        root = jnp.sqrt(jnp.where(positive, squared, 1))
        return jnp.where(positive, root, 0) * scale.reshape(root.shape)

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        rounded = 1 + 2 * gamma(math.prod(window) + 8)
        (x,) = values
        return [Range(x.norm * rounded, low=0)], lambda bounds: [
            through_entries(bounds[0], x, rounded)
        ]

    return declare(l2_norm_pool, rule, linear=True)
