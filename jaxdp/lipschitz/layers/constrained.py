"""Layers whose parameters are held to a constraint by `project`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp.checks import check_choice, check_sizes
from jaxdp.lipschitz.operator_norm import convolution_norm, patch_multiplicity
from jaxdp.lipschitz.projections import onto_ball, onto_spectral_ball, orthogonal
from jaxdp.nn.convolution import conv2d as nn_conv2d
from jaxdp.nn.layer import Layer, Params, add_bias, check_input
from jaxdp.nn.linear import linear as nn_linear
from jaxdp.nn.sizes import Size, sizes
from jaxdp.schedules import check_number

KERNEL_CONSTRAINTS = ("orthogonal", "spectral", "frobenius")


def linear(
    in_features: int, out_features: int, *, bias: bool = False, constraint: str = "orthogonal"
) -> Layer:
    """`nn.linear` with a kernel that lengthens nothing.

    Args:
      in_features, out_features, bias: as for `nn.linear`. A bias adds √T·‖b‖ to the bound on T
        rows; see `bias` for one that is bounded.
      constraint: the constraint on the kernel that `project` enforces: "orthogonal" for singular
        values of one, "spectral" for singular values of at most one, "frobenius" for a Frobenius
        norm of at most one.

    Returns:
      A layer of `[..., in_features] -> [..., out_features]`, with `project`.

    Raises:
      ValueError: as `nn.linear`; an unknown constraint.

    Example:
      >>> layer = linear(8, 4)
      >>> params = layer.init(jax.random.key(0))
      >>> print(jnp.linalg.svd(params["kernel"], compute_uv=False).round(3))
      [1. 1. 1. 1.]

    Source: Anil et al. 2019, "Sorting Out Lipschitz Function Approximation".
    """
    return _constrained(nn_linear(in_features, out_features, bias), _matrix_projection(constraint))


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Any = 0,
    bias: bool = False,
    constraint: str = "orthogonal",
) -> Layer:
    """`nn.conv2d` with a kernel that lengthens nothing.

    Args:
      in_channels, out_channels, kernel_size, stride, padding, bias: as for `nn.conv2d`, padding
        with zeros.
      constraint: the constraint on the kernel that `project` enforces. "orthogonal" makes the
        matrix from all inputs of a window orthogonal, then divides it by the operator norm of the
        convolution. "spectral" divides the kernel by that norm where the norm exceeds one.
        "frobenius" holds the norm of its entries, times the root of the number of windows over a
        position, to at most one.

    Returns:
      A layer of `[H, W, in_channels] -> [H', W', out_channels]`, with `project`.

    Raises:
      ValueError: as `nn.conv2d`; an unknown constraint.

    Example:
      >>> layer = conv2d(1, 4, 3)
      >>> params = layer.init(jax.random.key(0))
      >>> layer.apply(params, jnp.ones((8, 8, 1))).shape
      (6, 6, 4)
    """
    steps = tuple(sizes("stride", stride, 2))

    def projection(kernel: jax.Array) -> jax.Array:
        if constraint == "frobenius":
            window = kernel.shape[:2]
            patches = patch_multiplicity(window, steps, (1, 1), positions=window)
            return onto_ball(kernel, patches**-0.5)
        if constraint == "orthogonal":
            kernel = orthogonal(kernel.reshape(-1, kernel.shape[-1])).reshape(kernel.shape)
        norm = convolution_norm(kernel, steps, (1, 1), 1)
        small = constraint == "spectral"
        return kernel / (jnp.maximum(norm, 1) if small else norm)

    _check_constraint(constraint)
    layer = nn_conv2d(
        in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias
    )
    return _constrained(layer, projection)


def bias(features: int, *, max_norm: float = 1.0) -> Layer:
    """x plus a learned vector along its last axis, of L2 norm at most `max_norm` by `project`.

    Args:
      features: length of the last axis.
      max_norm: the norm of the whole vector. On T positions the bias lengthens the output by at
        most √T times that.

    Returns:
      A layer, shape kept. Parameters: bias `[features]`, zeros.

    Raises:
      ValueError: a size below 1; a norm that is not positive and finite.

    Example:
      >>> layer = bias(3)
      >>> print(layer.project({"bias": jnp.array([3.0, 4.0, 0.0])}))
      {'bias': Array([0.6, 0.8, 0. ], dtype=float32)}
    """
    check_sizes(features=features)
    check_number("max_norm", max_norm)

    def apply(params: Params, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        check_input("bias", x, last=features)
        return add_bias(params, x)

    return Layer(
        init=lambda key: {"bias": jnp.zeros(features)},
        apply=apply,
        project=lambda params: {"bias": onto_ball(params["bias"], max_norm)},
    )


def _constrained(layer: Layer, projection: Callable[[jax.Array], jax.Array]) -> Layer:
    def project(params: Params) -> Params:
        return {**params, "kernel": projection(params["kernel"])}

    # One round leaves some singular values of random square matrices near zero.
    return layer._replace(init=lambda key: project(project(layer.init(key))), project=project)


def _check_constraint(constraint: str) -> None:
    check_choice("constraint", constraint, KERNEL_CONSTRAINTS)


def _matrix_projection(constraint: str) -> Callable[[jax.Array], jax.Array]:
    _check_constraint(constraint)
    return {"orthogonal": orthogonal, "spectral": onto_spectral_ball, "frobenius": onto_ball}[
        constraint
    ]
