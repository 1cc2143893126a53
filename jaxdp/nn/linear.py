"""Linear layers."""

import jax
import numpy as np
from jax import lax

from jaxdp.checks import check_flags, check_sizes
from jaxdp.nn.layer import (
    Layer,
    Params,
    TorchName,
    TorchNames,
    add_bias,
    affine,
    check_input,
    deterministic,
    kernel_and_bias,
    kernel_from_torch,
)


def linear(in_features: int, out_features: int, bias: bool = True) -> Layer:
    """y = x W + b, along the last axis.

    Args:
      in_features, out_features: lengths of the last axis of x and of y.
      bias: whether there is a b.

    Returns:
      A layer of `[..., in_features] -> [..., out_features]`. Parameters: kernel
      `[in_features, out_features]`, bias `[out_features]`, of U(±1/√in_features).

    Raises:
      ValueError: a size below 1; an input of another width.

    Example:
      >>> layer = linear(3, 2)
      >>> layer.apply(layer.init(jax.random.key(0)), jax.numpy.ones((5, 3))).shape
      (5, 2)
    """
    check_sizes(in_features=in_features, out_features=out_features)
    check_flags(bias=bias)

    def init(key: jax.Array) -> Params:
        return kernel_and_bias(key, (in_features, out_features), in_features, bias)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        check_input("linear", x, last=in_features)
        return affine(params, x)

    return deterministic(init, apply, kernel_and_bias_names(bias))


def conv_linear(in_features: int, out_features: int, bias: bool = True) -> Layer:
    """The function of `linear`, computed by a convolution of width 1.

    This is BastionLab's `ConvLinear`. It helps on devices that are faster at convolutions;
    otherwise prefer `linear`.

    Args:
      in_features, out_features, bias: as for `linear`.

    Returns:
      A layer of `[..., in_features] -> [..., out_features]`. Parameters: kernel
      `[1, in_features, out_features]`, bias `[out_features]`, of U(±1/√in_features).

    Raises:
      ValueError: as `linear`.

    Example:
      >>> layer = conv_linear(3, 2)
      >>> layer.apply(layer.init(jax.random.key(0)), jax.numpy.ones((5, 3))).shape
      (5, 2)
    """
    check_sizes(in_features=in_features, out_features=out_features)
    check_flags(bias=bias)

    def init(key: jax.Array) -> Params:
        return kernel_and_bias(key, (1, in_features, out_features), in_features, bias)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        check_input("conv_linear", x, last=in_features)
        rows = x.reshape(1, -1, in_features)
        y = lax.conv_general_dilated(
            rows, params["kernel"], (1,), [(0, 0)], dimension_numbers=("NWC", "WIO", "NWC")
        )
        return add_bias(params, y.reshape(*x.shape[:-1], out_features))

    def convert(weight: np.ndarray) -> np.ndarray:
        return kernel_from_torch(weight.reshape(out_features, in_features, 1))

    return deterministic(init, apply, kernel_and_bias_names(bias, convert))


def kernel_and_bias_names(bias: bool, convert=kernel_from_torch) -> TorchNames:
    """The torch names `weight` and `bias`."""
    names = {("kernel",): (TorchName("weight", convert),)}
    return names | ({("bias",): (TorchName("bias"),)} if bias else {})
