"""Transposed convolutions along one to three axes, channels last."""

import math

import jax
import numpy as np
from jax import lax

from jaxdp.nn.convolution import Options, checked_options, layout
from jaxdp.nn.layer import (
    Layer,
    Params,
    add_bias,
    check_input,
    deterministic,
    kernel_and_bias,
    kernel_from_torch,
)
from jaxdp.nn.linear import kernel_and_bias_names
from jaxdp.nn.sizes import Size, sizes


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

    Args:
      in_channels, out_channels, kernel_size: as for `conv_transpose2d`.
      stride, padding, output_padding, dilation, groups, bias: as for `conv_transpose2d`.

    Returns:
      A layer of `[W, in_channels] -> [W', out_channels]`.

    Raises:
      ValueError: as `conv_transpose2d`.

    Example:
      >>> layer = conv_transpose1d(3, 8, 4, stride=2, padding=1)
      >>> layer.apply(layer.init(jax.random.key(0)), jax.numpy.ones((5, 3))).shape
      (10, 8)
    """
    options = checked_options(
        1, in_channels, out_channels, kernel_size, stride, dilation, groups, bias
    )
    return _conv_transpose(options, padding, output_padding)


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
      `[kh, kw, in_channels / groups, out_channels]`, as it is correlated with the dilated x (the
      kernel of torch is turned around and transposed), bias `[out_channels]`, both from
      U(±1/√(kh·kw·out_channels/groups)) as in torch.

    Raises:
      ValueError: as `conv2d`; an output_padding that is too large.

    Example:
      >>> layer = conv_transpose2d(3, 8, 4, stride=2, padding=1)
      >>> layer.apply(layer.init(jax.random.key(0)), jax.numpy.ones((5, 4, 3))).shape
      (10, 8, 8)
    """
    options = checked_options(
        2, in_channels, out_channels, kernel_size, stride, dilation, groups, bias
    )
    return _conv_transpose(options, padding, output_padding)


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

    Args:
      in_channels, out_channels, kernel_size: as for `conv_transpose2d`.
      stride, padding, output_padding, dilation, groups, bias: as for `conv_transpose2d`.

    Returns:
      A layer of `[D, H, W, in_channels] -> [D', H', W', out_channels]`.

    Raises:
      ValueError: as `conv_transpose2d`.

    Example:
      >>> layer = conv_transpose3d(3, 2, 2, stride=2)
      >>> layer.apply(layer.init(jax.random.key(0)), jax.numpy.ones((2, 3, 4, 3))).shape
      (4, 6, 8, 2)
    """
    options = checked_options(
        3, in_channels, out_channels, kernel_size, stride, dilation, groups, bias
    )
    return _conv_transpose(options, padding, output_padding)


def _conv_transpose(options: Options, padding: Size, output_padding: Size) -> Layer:
    rank, window, groups = options.rank, options.window, options.groups
    strides, dilations = options.strides, options.dilations
    cut = sizes("padding", padding, rank, least=0)
    behind = sizes("output_padding", output_padding, rank, least=0)
    if any(extra >= max(s, d) for extra, s, d in zip(behind, strides, dilations, strict=True)):
        raise ValueError(
            f"output_padding must be below the stride or the dilation, got {output_padding} with "
            f"stride {strides} and dilation {dilations}. Lower it, or raise the stride."
        )
    pads = [
        (d * (k - 1) - p, d * (k - 1) - p + extra)
        for k, d, p, extra in zip(window, dilations, cut, behind, strict=True)
    ]
    inputs, outputs = options.in_channels // groups, options.out_channels // groups

    def init(key: jax.Array) -> Params:
        fan_in = outputs * math.prod(window)
        return kernel_and_bias(key, (*window, inputs, options.out_channels), fan_in, options.bias)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        check_input(f"conv_transpose{rank}d", x, last=options.in_channels, rank=rank + 1)
        lengths = [
            (n - 1) * s + low + high - d * (k - 1) + 1
            for n, s, k, d, (low, high) in zip(
                x.shape, strides, window, dilations, pads, strict=False
            )
        ]
        if min(lengths) < 1:
            raise ValueError(
                f"conv_transpose{rank}d must have an output, got sizes {lengths} from an input of "
                f"{tuple(x.shape)}. Lower the padding."
            )
        y = lax.conv_general_dilated(
            x[None],
            params["kernel"],
            (1,) * rank,
            pads,
            lhs_dilation=strides,
            rhs_dilation=dilations,
            dimension_numbers=layout(rank),
            feature_group_count=groups,
        )
        return add_bias(params, y[0])

    def convert(weight: np.ndarray) -> np.ndarray:
        # [in, out / groups, *window], turned around.
        turned = np.flip(weight, tuple(range(2, 2 + rank)))
        split = turned.reshape(groups, inputs, outputs, *window)
        return kernel_from_torch(np.moveaxis(split, 1, 2).reshape(-1, inputs, *window))

    return deterministic(init, apply, kernel_and_bias_names(options.bias, convert))
