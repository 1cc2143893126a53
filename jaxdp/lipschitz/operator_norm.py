r"""Certified operator norms: upper bounds that no iteration has to converge for.

Power iteration approaches a norm from below, and a bound that is too small is a leak. Everything
here is an upper bound at any number of iterations; more of them only make it tighter.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_SQUARINGS = 6
"""Of a Gram matrix. The bound is at most rank^(1/256) times the norm: 2.7 % for rank 1024."""

_POINTS_PER_DEGREE = 16
"""Frequencies per degree of a kernel: the bound is at most 1 % too large for each axis."""


@jax.jit
def matrix_norm(matrix: jax.Array) -> jax.Array:
    r"""An upper bound on the largest singular value.

    The least of four: the Frobenius norm, $\sqrt{\lVert W\rVert_1 \lVert W\rVert_\infty}$,
    $\sqrt{1 + \lVert W^*W - I\rVert_F}$ (tight where W is nearly orthogonal), and Gram iteration,

    $$ \lVert W \rVert_2 \le \lVert (W^*W)^{2^t} \rVert_F^{1/2^{t+1}}. $$

    Args:
      matrix: `[..., m, n]`, real or complex.

    Returns:
      float32 `[...]`, rounding included.

    Example:
      >>> float(matrix_norm(jnp.array([[3.0, 0.0], [0.0, 4.0]])).round(3))
      4.0

    Source: Delattre et al. 2023, "Efficient Bound of Lipschitz Constant for Convolutional Layers
    by Gram Iteration".
    """
    rows, columns = matrix.shape[-2:]
    if 0 in matrix.shape[-2:]:
        return jnp.zeros(matrix.shape[:-2], jnp.float32)
    # Entries of at most one: no square overflows, and none that counts is lost.
    sizes = jnp.abs(matrix)
    largest = jnp.max(sizes, (-2, -1), keepdims=True)
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    matrix, sizes, scale = matrix / scale.astype(matrix.dtype), sizes / scale, scale[..., 0, 0]
    ones = jnp.max(jnp.sum(sizes, -2), -1)
    infinity = jnp.max(jnp.sum(sizes, -1), -1)
    squared = jnp.minimum(jnp.sum(jnp.square(sizes), (-2, -1)), ones * infinity)
    least = min(rows, columns)
    if least > 1:
        gram = _gram(matrix)
        squared = jnp.minimum(squared, _gram_iteration(gram))
        squared = jnp.minimum(squared, (1 + _from_identity(gram, scale)) / jnp.square(scale))
    # A product over n entries is off by less than n roundings, which the roots only shrink.
    slack = 1 + 4 * max(rows, columns) * jnp.finfo(jnp.float32).eps
    return scale * jnp.sqrt(squared) * slack


@functools.partial(jax.jit, static_argnames=("stride", "dilation", "groups"))
def convolution_norm(
    kernel: jax.Array, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> jax.Array:
    r"""An upper bound on the operator norm of a convolution, with zero padding or none, on inputs
    of any size.

    The convolution with stride s equals one of stride 1 on an input whose s positions became
    channels. That is a part of the convolution on the infinite grid, whose norm is
    $\sup_\omega \lVert \hat K(\omega) \rVert_2$. With N frequencies along an axis on which the
    kernel has width k,

    $$ \sup_\omega \lVert \hat K(\omega) \rVert_2^2 \le
       \frac{\max_j \lVert \hat K(2\pi j/N) \rVert_2^2}{\cos(\pi (k-1)/N)} $$

    since $|u^* \hat K v|^2$ is a trigonometric polynomial of degree k - 1.

    Args:
      kernel: `[*window, in_channels / groups, out_channels]`.
      stride, dilation: one for each axis of the window.
      groups: of channels.

    Returns:
      float32 scalar.

    Example:
      >>> sums = jnp.ones((3, 1, 1))
      >>> norm = convolution_norm(sums, (1,), (1,), 1)
      >>> bool(3.0 <= norm < 3.04)
      True

    Source: Ehlich and Zeller 1964, "Schwankung von Polynomen zwischen Gitterpunkten", for the
    cosine.
    """
    kernel = _without_stride(_dilated_for(kernel, stride, dilation), stride)
    *window, channels, outputs = kernel.shape
    axes = tuple(axis for axis, width in enumerate(window) if width > 1)
    points = [_POINTS_PER_DEGREE * (window[axis] - 1) for axis in axes]
    spectrum = jnp.fft.rfftn(kernel, points, axes) if axes else kernel
    matrices = spectrum.reshape(-1, channels, groups, outputs // groups)
    norm = jnp.max(matrix_norm(jnp.moveaxis(matrices, 2, 1)))
    # All of N = 16 (k - 1): between the frequencies as much may be missed along every axis.
    between = math.cos(math.pi / _POINTS_PER_DEGREE) ** len(axes)
    slack = 1 + 64 * jnp.finfo(jnp.float32).eps * len(axes)  # of the Fourier transform
    return norm * slack / math.sqrt(between)


def patch_multiplicity(
    window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], positions: Sequence[int]
) -> int:
    """In how many windows an input position lies, at most.

    Args:
      window, stride, dilation: of a convolution or pooling, one for each axis.
      positions: of windows along each axis.

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
    """W*W or WW*, the smaller one."""
    adjoint = jnp.conj(jnp.swapaxes(matrix, -1, -2))
    tall = matrix.shape[-2] >= matrix.shape[-1]
    return _product(adjoint, matrix) if tall else _product(matrix, adjoint)


def _from_identity(gram: jax.Array, scale: jax.Array) -> jax.Array:
    """Frobenius norm of s²·gram - I."""
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    identity = identity.reshape((1,) * (gram.ndim - 2) + identity.shape)
    return _frobenius(gram * jnp.square(scale)[..., None, None].astype(gram.dtype) - identity)


def _gram_iteration(gram: jax.Array) -> jax.Array:
    """A bound on the largest eigenvalue: powers by squaring, their logarithms kept apart."""
    log_scale = jnp.zeros(gram.shape[:-2], jnp.float32)
    for power in range(_SQUARINGS):
        size = jnp.maximum(_frobenius(gram), jnp.finfo(jnp.float32).tiny)
        gram = gram / size[..., None, None].astype(gram.dtype)
        log_scale += jnp.log(size) / 2**power
        gram = _product(gram, gram)
    last = jnp.maximum(_frobenius(gram), jnp.finfo(jnp.float32).tiny)
    return jnp.exp(log_scale + jnp.log(last) / 2**_SQUARINGS)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # The default of accelerators rounds operands to eight bits.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _frobenius(matrix: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(matrix)), (-2, -1)))


def _dilated_for(kernel: jax.Array, stride: Sequence[int], dilation: Sequence[int]) -> jax.Array:
    """The kernel with its holes along axes with a stride; without one they change no norm: the
    spectrum is the same, at other frequencies."""
    for axis, (step, gap) in enumerate(zip(stride, dilation, strict=True)):
        if step > 1 and gap > 1:
            width = kernel.shape[axis]
            shape = list(kernel.shape)
            shape[axis] = (width - 1) * gap + 1
            spread = (slice(None),) * axis + (slice(None, None, gap),)
            kernel = jnp.zeros(shape, kernel.dtype).at[spread].set(kernel)
    return kernel


def _without_stride(kernel: jax.Array, stride: Sequence[int]) -> jax.Array:
    """`[*window / stride, channels · strides, outputs]`: of the same operator with stride 1, on
    an input whose positions within a stride became channels."""
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
