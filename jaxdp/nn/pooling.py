"""Pooling over positions, channels last."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp.checks import check_flags, check_integer, shown
from jaxdp.nn.composition import function
from jaxdp.nn.layer import Layer, check_output
from jaxdp.nn.sizes import Size, sizes

# The largest output of an adaptive pooling along an axis: it keeps a row of weights for each.
_MOST_WINDOWS = 2**16


def max_pool(
    kernel_size: Size, *, stride: Size | None = None, padding: Size = 0, dilation: Size = 1
) -> Layer:
    """The largest entry of every window, for each channel.

    Args:
      kernel_size: size of the window, one number for all axes but the last, or one for each.
      stride: distance between windows; None for kernel_size.
      padding: positions of -inf added on both sides; at most half of kernel_size.
      dilation: distance of the positions in a window.

    Returns:
      A layer of `[*positions, C] -> [*fewer positions, C]`, without parameters.

    Raises:
      ValueError: a size below 1; another count of sizes than axes; too much padding; an input
        smaller than the window.

    Example:
      >>> max_pool(2).apply({}, jnp.arange(4.0)[:, None])[:, 0].tolist()
      [1.0, 3.0]
    """
    return function(lambda x: _reduce(x, -np.inf, lax.max, kernel_size, stride, padding, dilation))


def avg_pool(
    kernel_size: Size,
    *,
    stride: Size | None = None,
    padding: Size = 0,
    count_include_pad: bool = True,
) -> Layer:
    """The mean of every window, for each channel.

    Args:
      kernel_size, stride: as for `max_pool`.
      padding: positions of zero added on both sides; at most half of kernel_size.
      count_include_pad: whether these zeros count in the mean.

    Returns:
      A layer of `[*positions, C] -> [*fewer positions, C]`, without parameters.

    Raises:
      ValueError: as `max_pool`.

    Example:
      >>> avg_pool(2).apply({}, jnp.arange(4.0)[:, None])[:, 0].tolist()
      [0.5, 2.5]
    """

    check_flags(count_include_pad=count_include_pad)

    def pool(x: jax.Array) -> jax.Array:
        total = _reduce(x, 0, lax.add, kernel_size, stride, padding, 1)
        if count_include_pad:
            return total / math.prod(sizes("kernel_size", kernel_size, x.ndim - 1))
        ones = jnp.ones_like(x)
        return total / _reduce(ones, 0, lax.add, kernel_size, stride, padding, 1)

    return function(pool)


def adaptive_avg_pool(output_size: Size) -> Layer:
    """Means over a given number of windows, of sizes as equal as possible.

    Of n positions, window i of m runs from ⌊i·n/m⌋ to ⌈(i + 1)·n/m⌉. With m = 1 the output is the
    mean over all positions.

    Args:
      output_size: m: one number for all axes but the last, or one for each.

    Returns:
      A layer of `[*positions, C] -> [*output_size, C]`, without parameters.

    Raises:
      ValueError: a size below 1; another count of sizes than axes.

    Example:
      >>> adaptive_avg_pool(2).apply({}, jnp.arange(5.0)[:, None])[:, 0].tolist()
      [1.0, 3.0]
    """

    def pool(x: jax.Array) -> jax.Array:
        for axis, count in enumerate(sizes("output_size", output_size, x.ndim - 1)):
            advice = "An output of more windows than that repeats its input."
            check_integer("output_size", count, maximum=_MOST_WINDOWS, advice=advice)
            shares = _shares(x.shape[axis], count, x.dtype)
            x = jnp.moveaxis(jnp.tensordot(shares, x, (1, axis)), 0, axis)
        return x

    return function(pool)


def _reduce(
    x: jax.Array,
    start: float,
    combine: Callable[[Any, Any], Any],
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
) -> jax.Array:
    rank = x.ndim - 1
    window = sizes("kernel_size", kernel_size, rank)
    pads = sizes("padding", padding, rank, least=0)
    if any(2 * pad > size for pad, size in zip(pads, window, strict=True)):
        raise ValueError(
            f"padding must be at most half of kernel_size={window}, got {shown(padding)}. Pad by "
            "less, or take a larger window."
        )
    y = lax.reduce_window(
        x,
        np.asarray(start, x.dtype),
        combine,
        window_dimensions=(*window, 1),
        window_strides=(*(window if stride is None else sizes("stride", stride, rank)), 1),
        padding=[*((pad, pad) for pad in pads), (0, 0)],
        window_dilation=(*sizes("dilation", dilation, rank), 1),
    )
    check_output("pooling", x, y)
    return y


def _shares(length: int, count: int, dtype: Any) -> jax.Array:
    """The weights `[count, length]` of the positions in the mean of each window."""
    windows, positions = jnp.arange(count)[:, None], jnp.arange(length)[None]
    start, stop = windows * length // count, -(-(windows + 1) * length // count)
    inside = (positions >= start) & (positions < stop)
    return inside.astype(dtype) / (stop - start).astype(dtype)
