"""What rounding can do to sums, norms and products, as bounds with a proof.

The model of arithmetic, which is an assumption about the machine and the compiler:

    fl(a ∘ b) = (a ∘ b)(1 + δ) + η,   |δ| ≤ u,  |η| ≤ tiny,   ∘ one of + − ×

with the unit roundoff u of the table below and the smallest normal number `tiny`: results below it
may be flushed to zero. Products and sums may be fused and sums taken in any order. Square roots and
quotients are within `ROOT` · u. With γ_k = k·u / (1 − k·u), what k roundings make of a number lies
within a factor 1 ± γ_k, and (1 + γ_j)(1 + γ_k) ≤ 1 + γ_{j+k}. So bounds are counts of roundings.

Sources: Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 2.2 (the model),
lemma 3.1 and theorem 3.1 (γ_k, inner products in any order), section 4.2 (sums in blocks).
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.engine.platforms import platform

# −log2 u in float32 and float64 by platform, for products that ask for `Precision.HIGHEST`, and for
# operands that one pass multiplies exactly (`engine.precision`).
# - cpu: IEEE 754, rounded to nearest.
# - gpu: a matrix unit multiplies operands of 11 bits exactly, and truncates sums (Fasi, Higham,
#   Mikaitis, Pranesh 2021, "Numerical Behavior of NVIDIA Tensor Cores"); elsewhere, and in float64,
#   + × and fused ones are rounded to nearest (NVIDIA, "CUDA C++ Programming Guide").
# - elsewhere, so on TPUs, HIGHEST splits factors into three bfloat16 and adds six products (Henry,
#   Tang, Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype for
#   Higher-Precision Computations"), and sums are truncated, too; float64 is software.
_BITS = {"cpu": (24, 53), "gpu": (22, 53)}
_BITS_ELSEWHERE = (22, 40)

# Roundings that a square root or a quotient counts for. GPUs approximate both within 2 units in
# the last place (the same guide), and compilers make a quotient of a root out of two operations.
ROOT = 4

# Sums are taken in blocks of this many terms, so that few roundings follow each other.
_BLOCK = 64


def unit_roundoff(dtype: Any) -> float:
    """u of float32 or float64 on the platform that is traced for."""
    single, double = _BITS.get(platform(), _BITS_ELSEWHERE)
    return 2.0 ** -(double if jnp.finfo(dtype).bits > 32 else single)


def gamma(count: int, dtype: Any) -> float:
    """γ_k for k = `count` roundings; infinite where the bound does not hold."""
    product = count * unit_roundoff(dtype)
    return product / (1 - product) if product < 1 else math.inf


def rounded_up(value: jax.Array, roundings: int) -> jax.Array:
    """Not below what `value` >= 0 was before so many roundings took it down.

    The factor and its product are rounded, too: 1 + γ_{k+2} with two roundings is 1 + γ_k at least.
    """
    return value * (1 + gamma(roundings + 2, value.dtype))


def _smallest_normal(dtype: Any) -> float:
    """`tiny` of the model."""
    return float(cast(float, jnp.finfo(dtype).tiny))


def lost(count: int, dtype: Any) -> float:
    """What so many products or sums may lack because they underflowed to zero."""
    return count * _smallest_normal(dtype)


def total(terms: jax.Array) -> jax.Array:
    """Σ over the last axis, in blocks and blocks of blocks: see `roundings`."""
    while terms.shape[-1] > _BLOCK:
        # Behind a barrier, since XLA makes one sum out of two that follow each other.
        terms = jax.lax.optimization_barrier(_block_sums(terms))
    return jnp.sum(terms, axis=-1)


def _block_sums(terms: jax.Array) -> jax.Array:
    """Sums of `_BLOCK` neighbours along the last axis, the last of what is left."""
    length = terms.shape[-1]
    blocks = -(-length // _BLOCK)
    rest = blocks * _BLOCK - length
    if platform() == "cpu":
        # Here a reduction of reshaped terms writes them down first, ten times slower.
        window = (1,) * (terms.ndim - 1) + (_BLOCK,)
        padding = [(0, 0)] * (terms.ndim - 1) + [(0, rest)]
        zero = np.zeros((), terms.dtype)
        return jax.lax.reduce_window(terms, zero, jax.lax.add, window, window, padding)
    filled = jnp.pad(terms, [(0, 0)] * (terms.ndim - 1) + [(0, rest)])
    return jnp.sum(filled.reshape(*terms.shape[:-1], blocks, _BLOCK), axis=-1)


def roundings(length: int) -> int:
    """How many roundings a product goes through at most, its own included, in a `total` of so
    many products."""
    count = 1
    while length > _BLOCK:
        count += _BLOCK - 1
        length = -(-length // _BLOCK)
    return count + max(0, length - 1)


def norms(vectors: jax.Array) -> jax.Array:
    """L2 norms over the last axis, not below the true ones, of float32 or float64.

    A square or a sum below `tiny` may be lost: every entry counts for two.
    """
    length = vectors.shape[-1]
    squares = total(jnp.square(vectors)) + lost(2 * length, vectors.dtype)
    return rounded_up(jnp.sqrt(squares), roundings(length) // 2 + 1 + ROOT)


def joint_norm(parts: jax.Array) -> jax.Array:
    """√Σ n² over the last axis, not below the true one, for n >= 0 of any size.

    Relative to the largest, so that no square that matters is lost. Each ratio counts `ROOT`
    roundings, twice in the square, and half of it in the root.
    """
    count = parts.shape[-1]
    if count == 1:
        return parts[..., 0]
    largest = jnp.max(parts, axis=-1, keepdims=True)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    whole = unit[..., 0] * jnp.sqrt(total(jnp.square(parts / unit)))
    return rounded_up(whole, ROOT + roundings(count) // 2 + 1 + ROOT + 2)


def least_weight(dtype: Any) -> float:
    """The smallest weight of a sample that is more than nothing.

    Below it, a weighted factor of the gradient could lose entries to underflow, and what is left
    would no longer cancel as the norm says (`engine.factors.gram`). In float32 it is 6e-13: of a
    sample whose gradient is larger than 10¹² thresholds nothing is left.
    """
    return 2.0**13 * math.sqrt(_smallest_normal(dtype) / (32 * unit_roundoff(dtype)))
