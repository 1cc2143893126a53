"""Convolutions along one to three axes, channels last."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp.checks import check_choice, check_flags, check_sizes
from jaxdp.nn.layer import (
    Layer,
    Params,
    add_bias,
    check_input,
    check_output,
    deterministic,
    kernel_and_bias,
)
from jaxdp.nn.linear import kernel_and_bias_names
from jaxdp.nn.sizes import Size, sizes

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

# Maps torch's names to those of `jnp.pad`.
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

    Args:
      in_channels, out_channels, kernel_size: as for `conv2d`.
      stride, padding, dilation, groups, bias, padding_mode: as for `conv2d`.

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
    options = checked_options(
        1, in_channels, out_channels, kernel_size, stride, dilation, groups, bias
    )
    return _conv(options, padding, padding_mode)


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
      groups: number of groups of channels, each convolved with kernels of its own.
      bias: whether there is a b.
      padding_mode: what the added positions hold: "zeros", "reflect" (mirrored, without the
        edge), "replicate" (the edge) or "circular" (the other side).

    Returns:
      A layer of `[H, W, in_channels] -> [H', W', out_channels]`. Parameters: kernel
      `[kh, kw, in_channels / groups, out_channels]`, bias `[out_channels]`, of
      U(±1/√(kh·kw·in_channels/groups)).

    Raises:
      ValueError: a size below 1; channels that groups do not divide; an unknown padding or
        padding_mode; "same" with a stride; an input of another shape, or smaller than the window.

    Example:
      >>> layer = conv2d(3, 8, 3, stride=2, padding=1)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((9, 8, 3))).shape
      (5, 4, 8)
    """
    options = checked_options(
        2, in_channels, out_channels, kernel_size, stride, dilation, groups, bias
    )
    return _conv(options, padding, padding_mode)


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

    Args:
      in_channels, out_channels, kernel_size: as for `conv2d`.
      stride, padding, dilation, groups, bias, padding_mode: as for `conv2d`.

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
    options = checked_options(
        3, in_channels, out_channels, kernel_size, stride, dilation, groups, bias
    )
    return _conv(options, padding, padding_mode)


class Options(NamedTuple):
    """The checked arguments of a convolution or its transpose; tuples have an entry for each axis.

    Attributes:
      in_channels: length of the last axis of x.
      out_channels: length of the last axis of y.
      window: size of the kernel.
      strides: positions between two windows, or between two entries of a transposed input.
      dilations: positions between two entries of the kernel.
      groups: number of groups of channels.
      bias: whether there is a bias.
    """

    in_channels: int
    out_channels: int
    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    bias: bool

    @property
    def rank(self) -> int:
        """Number of axes that the window moves along."""
        return len(self.window)


def checked_options(
    rank: int,
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size,
    dilation: Size,
    groups: int,
    bias: bool,
) -> Options:
    """Checks the arguments that `conv2d` and `conv_transpose2d` share, for `rank` axes.

    Raises:
      TypeError: a size that is no integer; a bias that is no bool.
      ValueError: a size below 1; channels that groups do not divide.
    """
    check_sizes(in_channels=in_channels, out_channels=out_channels, groups=groups)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(
                f"{name} must be a multiple of groups={groups}, got {channels}. Each group takes "
                "an equal part of the channels."
            )
    check_flags(bias=bias)
    window = sizes("kernel_size", kernel_size, rank)
    strides, dilations = sizes("stride", stride, rank), sizes("dilation", dilation, rank)
    return Options(in_channels, out_channels, window, strides, dilations, groups, bias)


def _conv(options: Options, padding: Size | str, padding_mode: str) -> Layer:
    check_choice("padding_mode", padding_mode, ["zeros", *_PAD_MODES])
    rank, window = options.rank, options.window
    pads = _pads(padding, options)
    inputs = options.in_channels // options.groups

    def init(key: jax.Array) -> Params:
        fan_in = inputs * math.prod(window)
        return kernel_and_bias(key, (*window, inputs, options.out_channels), fan_in, options.bias)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        check_input(f"conv{rank}d", x, last=options.in_channels, rank=rank + 1)
        edges = pads
        if padding_mode in _PAD_MODES and any(map(any, pads)):
            _check_room(padding_mode, pads, x)
            x = jnp.pad(x, [*pads, (0, 0)], mode=_PAD_MODES[padding_mode])
            edges = [(0, 0)] * rank
        y = lax.conv_general_dilated(
            x[None],
            params["kernel"],
            options.strides,
            edges,
            rhs_dilation=options.dilations,
            dimension_numbers=layout(rank),
            feature_group_count=options.groups,
        )
        check_output(f"conv{rank}d", x, y[0])
        return add_bias(params, y[0])

    return deterministic(init, apply, kernel_and_bias_names(options.bias))


def _pads(padding: Size | str, options: Options) -> list[tuple[int, int]]:
    """Positions added before and behind each axis."""
    window, strides = options.window, options.strides
    if isinstance(padding, str):
        check_choice("padding", padding, ["same", "valid"])
    if isinstance(padding, str) and padding == "valid":
        return [(0, 0)] * len(window)
    if isinstance(padding, str):
        if set(strides) != {1}:
            raise ValueError(f"padding 'same' needs a stride of 1, got {strides}. Give a number.")
        totals = [d * (k - 1) for k, d in zip(window, options.dilations, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(n, n) for n in sizes("padding", padding, len(window), least=0)]


def _check_room(padding_mode: str, pads: list[tuple[int, int]], x: jax.Array) -> None:
    """Raises where an axis is too short to fill its padding by mirroring or wrapping around."""
    for size, sides in zip(x.shape, pads, strict=False):
        room = {"reflect": size - 1, "circular": size}.get(padding_mode, max(sides))
        if max(sides) > room:
            raise ValueError(
                f"padding must be at most {room} with padding_mode {padding_mode!r} on an axis of "
                f"{size}, got {max(sides)}. Pad by less, or with zeros."
            )


def layout(rank: int) -> tuple[str, str, str]:
    """The dimension numbers of images, kernels and results for `lax.conv_general_dilated`."""
    spatial = _SPATIAL[rank - 1]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
