r"""Layers whose bounds stay small, for use beside those of `jaxdp.nn`.

A network of them has an output that is as long as its input, and a cotangent that keeps its
length on the way down, so that no bound grows with depth:

    model = nn.sequential(
        lipschitz.bounded_input(1.0),
        lipschitz.linear(784, 128), lipschitz.group_sort(2),
        lipschitz.linear(128, 10),
    )
    tx = optax.chain(jaxdp.add_noise(...), optax.adam(1e-3), lipschitz.project(model.project))
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp.checks import check_choice, check_sizes
from jaxdp.engine.numerics import once
from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.declaration import declare
from jaxdp.lipschitz.operator_norm import convolution_norm, patch_multiplicity
from jaxdp.lipschitz.projections import onto_ball, onto_spectral_ball, orthogonal
from jaxdp.lipschitz.rounding import divisor, gamma, times
from jaxdp.lipschitz.rules.registry import PullBack
from jaxdp.lipschitz.value import Cotangent, Range, Value, scaled
from jaxdp.nn.composition import LayerLike, combined, function
from jaxdp.nn.convolution import conv2d as nn_conv2d
from jaxdp.nn.layer import Layer, Params, add_bias, check_input
from jaxdp.nn.linear import linear as nn_linear
from jaxdp.nn.sizes import Size, sizes
from jaxdp.schedules import check_number

KERNEL_CONSTRAINTS = ("orthogonal", "spectral", "frobenius")


def bounded_input(bound: float) -> Layer:
    r"""x scaled down to norm u where it is longer: $x \min(1, u/\lVert x \rVert_2)$.

    `bounded_grads` does so by itself with what it is given as `input_bound`; the layer does it
    anywhere, for models that are used elsewhere, too.

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


def linear(
    in_features: int, out_features: int, *, bias: bool = False, constraint: str = "orthogonal"
) -> Layer:
    """`nn.linear` with a kernel that lengthens nothing.

    Args:
      in_features, out_features, bias: as for `nn.linear`. A bias adds √T·‖b‖ to the bound on T
        rows; see `bias` for one that is bounded.
      constraint: of the kernel, by `project`: "orthogonal", singular values of one; "spectral",
        at most one; "frobenius", their root of squares at most one.

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
      constraint: of the kernel, by `project`: "orthogonal" makes it so as a matrix of all inputs
        of a window, then divides it by the operator norm of the convolution; "spectral" only
        divides where that exceeds one; "frobenius" bounds the norm of its entries times the root
        of the windows over a position.

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
      max_norm: of the whole vector. On T positions it lengthens the output by √T times that.

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


def residual(
    layer: LayerLike, shortcut: LayerLike = lambda x: x, *, merge: str = "1-lip-add"
) -> Layer:
    """A branch beside a shortcut.

    Args:
      layer: the branch.
      shortcut: the other one; nothing is done to x by default.
      merge: "1-lip-add" for half the sum, which lengthens nothing where neither branch does;
        "add" for the sum, as `nn.residual`.

    Returns:
      A layer. Parameters: "layer" and "shortcut", as far as they have any.

    Raises:
      ValueError: another merge.

    Example:
      >>> block = residual(lambda x: 3 * x)
      >>> print(block.apply({}, jnp.ones(2)))
      [2. 2.]
    """
    check_choice("merge", merge, ("add", "1-lip-add"))
    weight = 1.0 if merge == "add" else 0.5

    def merged(functions: list[Callable[[Any], Any]], x: Any) -> Any:
        branch, other = (each(x) for each in functions)
        return weight * (branch + other)

    return combined({"layer": layer, "shortcut": shortcut}, merged)


def group_sort(group_size: int = 2) -> Layer:
    """The entries of every group of channels in order: it keeps the norm of values and gradients.

    Args:
      group_size: of neighbouring channels; 2 is called MaxMin.

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
        raise ValueError(f"features must be even, got {features}")

    def apply(params: Params, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        check_input("householder", x, last=features)
        return _householder(x, params["angle"])

    return Layer(
        init=lambda key: {"angle": math.pi / 2 * jnp.ones(features // 2)},
        apply=apply,
    )


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


def gradient_norm_preserving(fun: Callable[[jax.Array], jax.Array]) -> Layer:
    """Declares that a function lengthens neither values nor gradients.

    It must have f(0) = 0 and a Jacobian of norm at most one everywhere. Nobody checks that when it
    is used: `jaxdp.lipschitz.falsify` tries to refute it.

    Args:
      fun: of one array, to one array.

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


def _constrained(layer: Layer, projection: Callable[[jax.Array], jax.Array]) -> Layer:
    def project(params: Params) -> Params:
        return {**params, "kernel": projection(params["kernel"])}

    # Of random square matrices one round leaves some singular values near zero.
    return layer._replace(init=lambda key: project(project(layer.init(key))), project=project)


def _check_constraint(constraint: str) -> None:
    check_choice("constraint", constraint, KERNEL_CONSTRAINTS)


def _matrix_projection(constraint: str) -> Callable[[jax.Array], jax.Array]:
    _check_constraint(constraint)
    return {"orthogonal": orthogonal, "spectral": onto_spectral_ball, "frobenius": onto_ball}[
        constraint
    ]


def _check_groups(layer: str, x: jax.Array, group_size: int) -> None:
    if x.ndim == 0 or x.shape[-1] % group_size:
        raise ValueError(
            f"{layer} needs a last axis that is a multiple of {group_size}, got {tuple(x.shape)}"
        )


def _blocks(x: jax.Array, window: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
    """x `[n1, w1, n2, w2, ..., C]`, and the axes of the positions in a window."""
    counts = [length // width for length, width in zip(x.shape, window, strict=False)]
    x = x[tuple(slice(count * width) for count, width in zip(counts, window, strict=True))]
    split = [size for pair in zip(counts, window, strict=True) for size in pair]
    return x.reshape(*split, x.shape[-1]), tuple(range(1, 2 * len(window), 2))


def _through(bound: Cotangent, x: Value, gain: float) -> Cotangent:
    """The cotangent behind a layer that multiplies it by entries of x on the way: infinite where
    that may overflow."""
    if bound is None:
        return None
    return times(bound, gain) + 0 * times(bound, x.norm)


@functools.cache
def _bounded_input(bound: float) -> Callable[[jax.Array], jax.Array]:
    def bounded_input(x: jax.Array) -> jax.Array:
        # Divided by its largest entry first: no square overflows, and no root is taken of zero.
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
        return [image], lambda bounds: [_through(bounds[0], x, 1 + 4 * gamma(x.size + 8))]

    return declare(bounded_input, rule, linear=True)


@functools.cache
def _l2_norm_pool(window: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    def l2_norm_pool(x: jax.Array) -> jax.Array:
        blocks, inner = _blocks(once(x), window)
        # Divided by the largest entry of the window first, since squares vanish and overflow.
        most = jax.lax.stop_gradient(jnp.max(jnp.abs(blocks), inner, keepdims=True))
        scale = divisor(most)
        squared = jnp.sum(jnp.square(blocks / scale), inner)
        positive = squared > 0
        root = jnp.sqrt(jnp.where(positive, squared, 1))
        return jnp.where(positive, root, 0) * scale.reshape(root.shape)

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        rounded = 1 + 2 * gamma(math.prod(window) + 8)
        (x,) = values
        return [Range(x.norm * rounded, low=0)], lambda bounds: [_through(bounds[0], x, rounded)]

    return declare(l2_norm_pool, rule, linear=True)


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
