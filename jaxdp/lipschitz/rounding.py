"""The arithmetic in which bounds hold: how far float32 may move a value, and a bound.

A bound holds for the numbers that the machine computes, not for those of exact arithmetic. So every
rule includes the rounding of its own primitive, forward and backward, and bounds themselves are
rounded up. The model, with u = 2⁻²⁴:

* A sum of k terms, in any order, with or without fused multiply-adds, is off by at most
  γ_k Σ|terms|, γ_k = ku/(1 - ku) (Higham 2002, "Accuracy and Stability of Numerical Algorithms",
  section 4.2, and theorem 3.1 for inner products, whose products count as one more rounding).
* A function of one entry is off by at most 16u of its value; exp2 and erfc, which are made of other
  ones, by `COMPOSED` more. The formulas of its derivative, with the arithmetic of the bound beside
  them, add at most 16u: `EQUATION` is both.
* A result below the least normal number may be flushed to zero; products that reassociation can
  bring back are therefore never counted as less than that number.

A compiler may compute a value twice and round it differently each time: with a fused multiply-add
at one place, without at another. Each is within the bounds, but z - max z may then be above zero by
as much as z is rounded. Where a formula needs that a number and a function of it agree, it reads
the number `once`. (The gradient of a maximum is divided between the entries that equal it: that
there is one is assumed.)

Products in the default precision of an accelerator round their operands first (`product`). Values
that depend on public values alone are computed alike by the program of the loss and by that of its
bounds. The sum over samples is not part of this: it is rounded as it is after a clip.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxdp.engine.numerics import square_sums
from jaxdp.engine.platforms import platform
from jaxdp.engine.rounding import roundings, unit_roundoff

UNIT = 2.0**-24
"""u: the largest relative error of one operation in float32."""

EQUATION = 2.0**-19
"""32u, the largest relative error of an equation without a sum, its bound's arithmetic included."""

COMPOSED = 128
"""Further error in units of u: XLA's exp2 is that of a product, and erfc has a tail of its own."""

TINY = float(np.finfo(np.float32).tiny)
"""The least normal number of float32."""

_OPERANDS = {"gpu": 2.0**-10, "cuda": 2.0**-10, "rocm": 2.0**-10, "tpu": 2.0**-7}
"""Relative error of a product of two operands that were rounded first: to the 10 bits of TF32
(NVIDIA 2020, "A100 Tensor Core GPU Architecture"), or to bfloat16."""


def gamma(count: int, unit: float = UNIT) -> float:
    """γ_k, the relative error of a sum of k = `count` terms; infinite where ku ≥ ½."""
    share = count * unit
    return share / (1 - share) if share < 0.5 else math.inf


def product(count: int, precision: Any = jax.lax.Precision.HIGHEST) -> float:
    """The error of an inner product of k terms, relative to Σ|x_j y_j|.

    Args:
      count: k.
      precision: the precision that the equation names; an unknown algorithm counts as the least
        precise one.
    """
    where = platform()
    error = gamma(count + 1, unit_roundoff(jnp.float32))
    asked = set(precision) if isinstance(precision, tuple) else {precision}
    if not asked <= {None, *jax.lax.Precision}:
        return error + _OPERANDS["tpu"]
    if asked == {jax.lax.Precision.HIGHEST} or where == "cpu":
        return error
    return error + _OPERANDS.get(where, _OPERANDS["tpu"])


def up(bound: ArrayLike, count: int = 0) -> jax.Array:
    """A bound on the computed result, from a bound on the exact one, for one equation that holds a
    sum of that many terms."""
    return jnp.asarray(bound, jnp.float32) * np.float32(1 + EQUATION + gamma(count))


def times(*factors: ArrayLike) -> jax.Array:
    """The product of bounds. It is above zero where all factors are, and infinite where one is."""
    result, *rest = (jnp.asarray(factor, jnp.float32) for factor in factors)
    for factor in rest:
        positive = (result > 0) & (factor > 0)
        product = result * factor
        product = jnp.where(positive, jnp.maximum(product, TINY), product)
        result = jnp.where(jnp.isnan(product), jnp.inf, product)  # 0 · ∞ says nothing
    return result


def power(bound: jax.Array, exponent: int) -> jax.Array:
    """The power of a bound, with an exponent of at least zero, as `times` would."""
    found = bound**exponent
    return up(jnp.where(bound > 0, jnp.maximum(found, TINY), found), 2 * exponent)


def divisor(most: jax.Array) -> jax.Array:
    """The divisor for numbers of this largest absolute value, so that squares neither overflow nor
    all vanish.

    It is that value, but at most 2¹²⁵, since a division may be computed as a product with the
    reciprocal, which must not vanish; and one for zeros.
    """
    return jnp.where(most > 0, jnp.minimum(most, jnp.asarray(2.0**125, most.dtype)), 1)


def root_of_squares(bounds: ArrayLike) -> jax.Array:
    """sqrt(Σ b²) at any scale: bounds are divided by the largest first, since squares vanish."""
    bounds = jnp.asarray(bounds, jnp.float32).reshape(-1)
    scale = divisor(jnp.max(bounds, initial=0))
    found = scale * jnp.sqrt(jnp.sum(jnp.square(bounds / scale)))
    return up(jnp.where(jnp.isnan(found), jnp.inf, found), bounds.size // 2 + 2)


def norm(array: jax.Array) -> jax.Array:
    """A bound on the L2 norm of an array at any scale; infinite unless every entry is finite."""
    sizes = jnp.abs(array).reshape(1, -1)
    most = jnp.max(sizes, initial=0)
    share = (sizes / divisor(most)).astype(jnp.float32)
    found = times(divisor(most), jnp.sqrt(square_sums(share)[0]))
    found = jnp.maximum(found, jnp.where(most > 0, TINY, 0))
    return up(jnp.where(jnp.isfinite(most), found, jnp.inf), roundings(array.size) // 2 + 2)
