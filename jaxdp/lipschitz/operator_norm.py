"""Certified operator norms: upper bounds that hold before an iteration has converged.

Power iteration approaches a norm from below, and a bound that is too small is a leak. Everything
here is an upper bound at any number of iterations; more of them only make it tighter.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp.checks import (
    LARGEST_COUNT,
    check_array,
    check_integer,
    check_sequence,
    shown,
)
from jaxdp.engine.numerics import square_sums
from jaxdp.engine.rounding import roundings
from jaxdp.lipschitz import rounding
from jaxdp.lipschitz.rounding import (
    EQUATION,
    TINY,
    UNIT,
    divisor,
    gamma,
    product,
    up,
)

_SQUARINGS = 6
"""Squarings of a Gram matrix: the bound is at most rank^(1/256) ‖W‖, 1.027 ‖W‖ for rank 1024."""

_POINTS_PER_DEGREE = 16
"""Frequencies per degree of a kernel: the bound is at most 1 % too large for each axis."""


_MATRIX = "Pass a matrix, or a stack of matrices, of floats."
_KERNEL = "Pass an array [*window, in_channels / groups, out_channels] of floats."


def check_floats(name: str, value: jax.Array, *, minimum_axes: int, advice: str) -> jax.Array:
    """Returns `value` if it is an array of real or complex floats with enough axes.

    Args:
      name: of the argument, for the message.
      value: what the caller passed.
      minimum_axes: how many axes it has at least.
      advice: one sentence on what to do next.

    Returns:
      The value, as an array of JAX.

    Raises:
      TypeError: it is no array of floats.
      ValueError: it has fewer axes.

    Example:
      >>> check_floats("matrix", jnp.ones(3), minimum_axes=2, advice="Pass a matrix.")
      Traceback (most recent call last):
      ValueError: matrix must have at least 2 axes, got Array([1., 1., 1.], dtype=float32). Pass a
      matrix.
    """
    check_array(name, value, advice=advice)
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        raise TypeError(f"{name} must be of a float dtype, got {shown(value)}. {advice}")
    if jnp.ndim(value) < minimum_axes:
        raise ValueError(
            f"{name} must have at least {minimum_axes} axes, got {shown(value)}. {advice}"
        )
    return jnp.asarray(value)


def matrix_norm(matrix: jax.Array) -> jax.Array:
    r"""An upper bound on the largest singular value.

    It is the least of four: the Frobenius norm, √(‖W‖₁ ‖W‖_∞), √(1 + ‖W*W - I‖_F) (tight where W
    is nearly orthogonal), and Gram iteration,

    $$ \lVert W \rVert_2 \le \lVert (W^*W)^{2^t} \rVert_F^{1/2^{t+1}}. $$

    Args:
      matrix: `[..., m, n]`, real or complex.

    Returns:
      float32 `[...]`, rounding included.

    Raises:
      TypeError: the matrix is no array of floats.
      ValueError: it has fewer than two axes.

    Example:
      >>> float(matrix_norm(jnp.array([[3.0, 0.0], [0.0, 4.0]])).round(3))
      4.0

    Source: Delattre et al. 2023, "Efficient Bound of Lipschitz Constant for Convolutional Layers
    by Gram Iteration".
    """
    return _matrix_norm(check_floats("matrix", matrix, minimum_axes=2, advice=_MATRIX))


@jax.jit
def _matrix_norm(matrix: jax.Array) -> jax.Array:
    rows, columns = matrix.shape[-2:]
    if 0 in matrix.shape[-2:]:
        return jnp.zeros(matrix.shape[:-2], jnp.float32)
    # Entries are at most one: no square overflows, and no square that counts is lost.
    sizes = jnp.abs(matrix)
    largest = jnp.max(sizes, (-2, -1), keepdims=True)
    scale = divisor(largest)
    matrix, sizes, scale = matrix / scale.astype(matrix.dtype), sizes / scale, scale[..., 0, 0]
    ones = jnp.max(jnp.sum(sizes, -2), -1)
    infinity = jnp.max(jnp.sum(sizes, -1), -1)
    frobenius = jnp.square(_frobenius(sizes))
    squared = jnp.minimum(frobenius, ones * infinity * (1 + gamma(rows + columns)))
    if min(rows, columns) > 1:
        # Entry by entry the Gram matrix is off in proportion to that of absolute values, whose norm
        # is at most the sum of all squares.
        gram = _gram(matrix)
        off = _error(max(rows, columns), matrix.dtype) * frobenius
        squared = jnp.minimum(squared, _gram_iteration(gram) + off)
        # For a large matrix this is NaN, and not the least of the four.
        near = (1 + _from_identity(gram, scale)) / jnp.square(scale) + off
        squared = jnp.minimum(squared, jnp.where(jnp.isnan(near), jnp.inf, near))
    # The division by the scale, the root and the product are rounded.
    bound = scale * jnp.sqrt(squared) * (1 + EQUATION)
    return jnp.where(jnp.isfinite(largest[..., 0, 0]), bound, jnp.inf)


def convolution_norm(
    kernel: jax.Array, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> jax.Array:
    r"""An upper bound on the operator norm of a convolution, with zero padding or none, on inputs
    of any size.

    The convolution with stride s equals one of stride 1 on an input whose s positions became
    channels. That is a part of the convolution on the infinite grid, whose norm is sup_ω ‖K̂(ω)‖.
    With N frequencies along an axis on which the kernel has width k,

    $$ \sup_\omega \lVert \hat K(\omega) \rVert_2^2 \le
       \frac{\max_j \lVert \hat K(2\pi j/N) \rVert_2^2}{\cos(\pi (k-1)/N)} $$

    since |u* K̂ v|² is a trigonometric polynomial of degree k - 1.

    Args:
      kernel: `[*window, in_channels / groups, out_channels]`.
      stride, dilation: one number for each axis of the window.
      groups: number of groups of channels.

    Returns:
      float32 scalar.

    Raises:
      TypeError: the kernel is no array of floats, or a number is no integer.
      ValueError: the kernel has fewer than two axes; there is not one stride and dilation ≥ 1 for
        each axis of the window; groups do not divide the output channels.

    Example:
      >>> sums = jnp.ones((3, 1, 1))
      >>> norm = convolution_norm(sums, (1,), (1,), 1)
      >>> bool(3.0 <= norm < 3.04)
      True

    Source: Ehlich and Zeller 1964, "Schwankung von Polynomen zwischen Gitterpunkten", for the
    cosine; Higham 2002, "Accuracy and Stability of Numerical Algorithms", theorem 24.2, for the
    rounding of the transform.
    """
    kernel = check_floats("kernel", kernel, minimum_axes=2, advice=_KERNEL)
    rank, outputs = kernel.ndim - 2, kernel.shape[-1]
    advice = f"Pass one for each of the {rank} axes of the window."
    steps = _one_for_each_axis("stride", stride, rank, advice)
    gaps = _one_for_each_axis("dilation", dilation, rank, advice)
    advice = "Pass a divisor of the number of output channels."
    groups = check_integer("groups", groups, minimum=1, maximum=max(outputs, 1), advice=advice)
    if outputs % groups:
        raise ValueError(f"groups must divide {outputs} output channels, got {groups}. {advice}")
    return _convolution_norm(kernel, steps, gaps, groups)


def _one_for_each_axis(name: str, values: Sequence[int], rank: int, advice: str) -> tuple[int, ...]:
    entries = check_sequence(name, values, advice=advice)
    if len(entries) != rank:
        raise ValueError(f"{name} must hold {rank} integers, got {shown(values)}. {advice}")
    return tuple(
        check_integer(f"{name}[{axis}]", entry, minimum=1, maximum=LARGEST_COUNT, advice=advice)
        for axis, entry in enumerate(entries)
    )


@functools.partial(jax.jit, static_argnames=("stride", "dilation", "groups"))
def _convolution_norm(
    kernel: jax.Array, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> jax.Array:
    kernel = _without_stride(_dilated_for(kernel, stride, dilation), stride)
    *window, channels, outputs = kernel.shape
    axes = tuple(axis for axis, width in enumerate(window) if width > 1)
    points = [_POINTS_PER_DEGREE * (window[axis] - 1) for axis in axes]
    spectrum = jnp.fft.rfftn(kernel, points, axes) if axes else kernel
    matrices = spectrum.reshape(-1, channels, groups, outputs // groups)
    norm = jnp.max(_matrix_norm(jnp.moveaxis(matrices, 2, 1)))
    if axes:
        # A fast Fourier transform of N points is off by at most 8u log2(N) of the norm of all of
        # its results, which is √N times that of what is transformed.
        total = math.prod(points)
        off = 8 * UNIT * math.log2(total) * math.sqrt(total)
        norm += off * rounding.norm(kernel)
    # All of N = 16 (k - 1): between the frequencies as much may be missed along every axis.
    between = math.cos(math.pi / _POINTS_PER_DEGREE) ** len(axes)
    return up(norm / math.sqrt(between))


def patch_multiplicity(
    window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], positions: Sequence[int]
) -> int:
    """The largest number of windows that an input position lies in.

    Args:
      window, stride, dilation: those of a convolution or pooling, one number for each axis.
      positions: number of windows along each axis.

    Example:
      >>> patch_multiplicity((5, 5), (2, 2), (1, 1), (9, 9))
      9
    """
    counts = (
        min(-(-width // (step // math.gcd(step, gap))), count)
        for width, step, gap, count in zip(window, stride, dilation, positions, strict=True)
    )
    return math.prod(counts)


def _gram(matrix: jax.Array) -> jax.Array:
    """W*W or WW*, whichever is smaller."""
    adjoint = jnp.conj(jnp.swapaxes(matrix, -1, -2))
    tall = matrix.shape[-2] >= matrix.shape[-1]
    return _product(adjoint, matrix) if tall else _product(matrix, adjoint)


def _from_identity(gram: jax.Array, scale: jax.Array) -> jax.Array:
    """Frobenius norm of s²·gram - I, rounded up."""
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    identity = identity.reshape((1,) * (gram.ndim - 2) + identity.shape)
    scaled = gram * jnp.square(scale)[..., None, None].astype(gram.dtype)
    # Each entry is the difference of two numbers, of which the first was rounded.
    return _frobenius(scaled - identity) + 4 * UNIT * _frobenius(scaled)


def _gram_iteration(gram: jax.Array) -> jax.Array:
    """A bound on the spectral norm of a matrix.

    With A_0 = gram / f_0 and A_{t+1} = A_t* A_t / f_{t+1}, each divided by its Frobenius norm f,
    ‖A_t‖² ≤ f_{t+1} ‖A_{t+1}‖ + e, where e is what the product is off by: in proportion to
    the product of absolute values, whose norm is at most ‖A_t‖_F² = 1. So a bound of one on the
    last goes back to the first.
    """
    sizes = []
    for power in range(_SQUARINGS + 1):
        if power:
            gram = _product(jnp.conj(jnp.swapaxes(gram, -1, -2)), gram)
        size = jnp.maximum(_frobenius(gram), TINY)
        sizes.append(size)
        gram = gram / size[..., None, None].astype(gram.dtype)
    off = _error(gram.shape[-1], gram.dtype)
    bound = jnp.ones_like(sizes[0])
    for size in reversed(sizes[1:]):
        # The norms are rounded up by more than a division is rounded.
        bound = jnp.sqrt(size * bound + off) * (1 + EQUATION)
    return sizes[0] * bound


_CHUNK = 64


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product, summed in chunks, which keeps its rounding error small."""
    terms = a.shape[-1]
    if terms <= 2 * _CHUNK:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    chunks = -(-terms // _CHUNK)
    missing = (0, chunks * _CHUNK - terms)
    a = jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), missing])
    b = jnp.pad(b, [*[(0, 0)] * (b.ndim - 2), missing, (0, 0)])

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        left = jax.lax.dynamic_slice_in_dim(a, index * _CHUNK, _CHUNK, -1)
        right = jax.lax.dynamic_slice_in_dim(b, index * _CHUNK, _CHUNK, -2)
        return total + jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)

    shape = (*a.shape[:-1], b.shape[-1])
    return jax.lax.fori_loop(0, chunks, add, jnp.zeros(shape, a.dtype))


def _error(terms: int, dtype: Any) -> float:
    """The error of `_product`, relative to the product of absolute values.

    It is the error of a real or complex inner product (a complex product is two real ones, so that
    terms double) in chunks that are added.
    """
    added = terms if terms <= 2 * _CHUNK else _CHUNK - (-terms // _CHUNK)
    complex_valued = jnp.issubdtype(dtype, jnp.complexfloating)
    return 2 * product(2 * added + 2) if complex_valued else product(added)


def _frobenius(matrix: jax.Array) -> jax.Array:
    """The Frobenius norm, rounded up so that its square is an upper bound, too."""
    count = math.prod(matrix.shape[-2:])
    squares = square_sums(jnp.abs(matrix).reshape(-1, count)).reshape(matrix.shape[:-2])
    return jnp.sqrt(squares) * (1 + gamma(roundings(count) // 2 + 8))


def _dilated_for(kernel: jax.Array, stride: Sequence[int], dilation: Sequence[int]) -> jax.Array:
    """The kernel with the holes of its dilation along axes with a stride. Along other axes holes
    change no norm: the spectrum is the same, at other frequencies."""
    for axis, (step, gap) in enumerate(zip(stride, dilation, strict=True)):
        if step > 1 and gap > 1:
            width = kernel.shape[axis]
            shape = list(kernel.shape)
            shape[axis] = (width - 1) * gap + 1
            spread = (slice(None),) * axis + (slice(None, None, gap),)
            kernel = jnp.zeros(shape, kernel.dtype).at[spread].set(kernel)
    return kernel


def _without_stride(kernel: jax.Array, stride: Sequence[int]) -> jax.Array:
    """The kernel `[*window / stride, channels · strides, outputs]` of the same operator with stride
    1, on an input whose positions within a stride became channels."""
    *window, channels, outputs = kernel.shape
    rank = len(window)
    counts = [-(-width // step) for width, step in zip(window, stride, strict=True)]
    missing = [
        (0, count * step - width) for count, step, width in zip(counts, stride, window, strict=True)
    ]
    kernel = jnp.pad(kernel, [*missing, (0, 0), (0, 0)])
    split = itertools.chain.from_iterable(zip(counts, stride, strict=True))
    kernel = kernel.reshape(*split, channels, outputs)
    outer, inner = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
    kernel = kernel.transpose(*outer, *inner, 2 * rank, 2 * rank + 1)
    return kernel.reshape(*counts, math.prod(stride) * channels, outputs)
