"""Convolutions and transposed convolutions in one to three dimensions, channels last."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp.nn.layer import (
    Layer,
    Params,
    add_bias,
    check_input,
    check_sizes,
    deterministic,
    kernel_and_bias,
    kernel_from_torch,
)
from jaxdp.nn.linear import kernel_and_bias_names
from jaxdp.nn.sizes import Size, sizes

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

# Torch's names for what `jnp.pad` calls otherwise.
_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
_SPATIAL = ("W", "HW", "DHW")


def conv1d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: PaddingMode = "zeros",
) -> Layer:
    """Cross-correlation along one axis; see `conv2d`.

    Returns:
      A layer of `[W, in_channels] -> [W', out_channels]`. Parameters: kernel
      `[k, in_channels / groups, out_channels]`, bias `[out_channels]`.

    Raises:
      ValueError: as `conv2d`.

    Example:
      >>> layer = conv1d(3, 8, 5, padding="same")
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((10, 3))).shape
      (10, 8)
    """
    return _conv(
        1, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode,
    )  # fmt: skip


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: PaddingMode = "zeros",
) -> Layer:
    r"""Cross-correlation along two axes.

    $$ y[p, o] = b[o] + \sum_{q, c} x[s p + d q - l, c]\; W[q, c, o] $$

    for stride s, dilation d and l positions of padding in front; c runs through the channels of
    the group of o.

    Args:
      in_channels, out_channels: lengths of the last axis of x and of y.
      kernel_size, stride, dilation: one number, or one for each axis.
      padding: positions added on both sides of each axis, one number or one for each axis;
        "valid" for none; "same" for as many as keep the size (the odd one goes behind).
      groups: into how many groups the channels fall, each convolved with kernels of its own.
      bias: whether there is a b.
      padding_mode: what the added positions hold: "zeros", "reflect" (mirrored, without the
        edge), "replicate" (the edge) or "circular" (the other side).

    Returns:
      A layer of `[H, W, in_channels] -> [H', W', out_channels]`. Parameters: kernel
      `[kh, kw, in_channels / groups, out_channels]`, bias `[out_channels]`, of
      U(±1/√(kh·kw·in_channels/groups)).

    Raises:
      ValueError: a size below 1; channels that groups do not divide; an unknown padding or
        padding_mode; "same" with a stride; an input of another shape.

    Example:
      >>> layer = conv2d(3, 8, 3, stride=2, padding=1)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((9, 8, 3))).shape
      (5, 4, 8)
    """
    return _conv(
        2, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode,
    )  # fmt: skip


def conv3d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: PaddingMode = "zeros",
) -> Layer:
    """Cross-correlation along three axes; see `conv2d`.

    Returns:
      A layer of `[D, H, W, in_channels] -> [D', H', W', out_channels]`. Parameters: kernel
      `[kd, kh, kw, in_channels / groups, out_channels]`, bias `[out_channels]`.

    Raises:
      ValueError: as `conv2d`.

    Example:
      >>> layer = conv3d(2, 4, (1, 2, 3))
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((5, 5, 5, 2))).shape
      (5, 4, 3, 4)
    """
    return _conv(
        3, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode,
    )  # fmt: skip


def conv_transpose1d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
) -> Layer:
    """Transposed convolution along one axis; see `conv_transpose2d`.

    Returns:
      A layer of `[W, in_channels] -> [W', out_channels]`.

    Raises:
      ValueError: as `conv_transpose2d`.

    Example:
      >>> layer = conv_transpose1d(3, 8, 4, stride=2, padding=1)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((5, 3))).shape
      (10, 8)
    """
    return _conv_transpose(
        1, in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation,
        groups, bias,
    )  # fmt: skip


def conv_transpose2d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
) -> Layer:
    """Transposed convolution along two axes: `conv2d` on x with stride - 1 zeros between entries.

    Along each axis of length n the output has
    (n - 1)·stride - 2·padding + dilation·(kernel_size - 1) + output_padding + 1 entries.

    Args:
      in_channels, out_channels: lengths of the last axis of x and of y.
      kernel_size, stride, dilation: one number, or one for each axis.
      padding: positions that are cut from both sides of the full output.
      output_padding: positions added behind; below the stride or the dilation.
      groups, bias: as for `conv2d`.

    Returns:
      A layer of `[H, W, in_channels] -> [H', W', out_channels]`. Parameters: kernel
      `[kh, kw, in_channels / groups, out_channels]`, as it is correlated with the spread x (that
      of torch is turned around and transposed), bias `[out_channels]`, of
      U(±1/√(kh·kw·out_channels/groups)) as torch has them.

    Raises:
      ValueError: as `conv2d`; an output_padding that is too large.

    Example:
      >>> layer = conv_transpose2d(3, 8, 4, stride=2, padding=1)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((5, 4, 3))).shape
      (10, 8, 8)
    """
    return _conv_transpose(
        2, in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation,
        groups, bias,
    )  # fmt: skip


def conv_transpose3d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
) -> Layer:
    """Transposed convolution along three axes; see `conv_transpose2d`.

    Returns:
      A layer of `[D, H, W, in_channels] -> [D', H', W', out_channels]`.

    Raises:
      ValueError: as `conv_transpose2d`.

    Example:
      >>> layer = conv_transpose3d(3, 2, 2, stride=2)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((2, 3, 4, 3))).shape
      (4, 6, 8, 2)
    """
    return _conv_transpose(
        3, in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation,
        groups, bias,
    )  # fmt: skip


def _conv(
    rank: int,
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    bias: bool,
    padding_mode: str,
) -> Layer:
    _check_channels(in_channels, out_channels, groups)
    window = sizes("kernel_size", kernel_size, rank)
    steps, spread = sizes("stride", stride, rank), sizes("dilation", dilation, rank)
    pads = _pads(padding, window, steps, spread)
    if padding_mode != "zeros" and padding_mode not in _PAD_MODES:
        known = ", ".join(["zeros", *_PAD_MODES])
        raise ValueError(f"padding_mode must be one of {known}, got {padding_mode!r}")
    inputs = in_channels // groups

    def init(key: jax.Array) -> Params:
        fan_in = inputs * math.prod(window)
        return kernel_and_bias(key, (*window, inputs, out_channels), fan_in, bias)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        check_input(f"conv{rank}d", x, last=in_channels, rank=rank + 1)
        edges = pads
        if padding_mode in _PAD_MODES and any(map(any, pads)):
            x = jnp.pad(x, [*pads, (0, 0)], mode=_PAD_MODES[padding_mode])
            edges = [(0, 0)] * rank
        y = lax.conv_general_dilated(
            x[None],
            params["kernel"],
            steps,
            edges,
            rhs_dilation=spread,
            dimension_numbers=_layout(rank),
            feature_group_count=groups,
        )
        return add_bias(params, y[0])

    return deterministic(init, apply, kernel_and_bias_names(bias))


def _conv_transpose(
    rank: int,
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size,
    padding: Size,
    output_padding: Size,
    dilation: Size,
    groups: int,
    bias: bool,
) -> Layer:
    _check_channels(in_channels, out_channels, groups)
    window = sizes("kernel_size", kernel_size, rank)
    steps, spread = sizes("stride", stride, rank), sizes("dilation", dilation, rank)
    cut = sizes("padding", padding, rank, least=0)
    behind = sizes("output_padding", output_padding, rank, least=0)
    if any(extra >= max(s, d) for extra, s, d in zip(behind, steps, spread, strict=True)):
        raise ValueError(
            f"output_padding must be below the stride or the dilation, got {output_padding} with "
            f"stride {stride} and dilation {dilation}"
        )
    pads = [
        (d * (k - 1) - p, d * (k - 1) - p + extra)
        for k, d, p, extra in zip(window, spread, cut, behind, strict=True)
    ]
    inputs, outputs = in_channels // groups, out_channels // groups

    def init(key: jax.Array) -> Params:
        fan_in = outputs * math.prod(window)
        return kernel_and_bias(key, (*window, inputs, out_channels), fan_in, bias)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        check_input(f"conv_transpose{rank}d", x, last=in_channels, rank=rank + 1)
        y = lax.conv_general_dilated(
            x[None],
            params["kernel"],
            (1,) * rank,
            pads,
            lhs_dilation=steps,
            rhs_dilation=spread,
            dimension_numbers=_layout(rank),
            feature_group_count=groups,
        )
        return add_bias(params, y[0])

    def convert(weight: np.ndarray) -> np.ndarray:
        # [in, out / groups, *window], turned around.
        turned = np.flip(weight, tuple(range(2, 2 + rank)))
        split = turned.reshape(groups, inputs, outputs, *window)
        return kernel_from_torch(np.moveaxis(split, 1, 2).reshape(-1, inputs, *window))

    return deterministic(init, apply, kernel_and_bias_names(bias, convert))


def _pads(
    padding: Size | str, window: Sequence[int], steps: Sequence[int], spread: Sequence[int]
) -> list[tuple[int, int]]:
    """Positions added before and behind each axis."""
    if padding == "valid":
        return [(0, 0)] * len(window)
    if padding == "same":
        if set(steps) != {1}:
            raise ValueError(f"padding 'same' needs a stride of 1, got {steps}: give a number")
        totals = [d * (k - 1) for k, d in zip(window, spread, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
    return [(n, n) for n in sizes("padding", padding, len(window), least=0)]


def _check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    check_sizes(in_channels=in_channels, out_channels=out_channels, groups=groups)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(f"{name} must be a multiple of groups={groups}, got {channels}")


def _layout(rank: int) -> tuple[str, str, str]:
    spatial = _SPATIAL[rank - 1]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
