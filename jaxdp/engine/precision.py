"""Products in the precision of the model.

The gradient of a sample at a site is Σ_t û_t v̂_tᵀ, with the operands as the ordinary gradient of
the weight multiplies them where the program runs: bfloat16 as it is; float32 rounded to what a
matrix unit reads of it, unless the model asks for more (`jax.default_matmul_precision`, or the
precision of the equation); on a CPU float32. We round them ourselves, since a machine may truncate
instead. Products of such operands are exact in float32, so that one pass through a matrix unit
gives inner products, rows and sums of exactly this gradient, up to how sums are added
(`engine.rounding`).

What has no such form is w·v̂, with the weight of a sample. It is rounded once more, by

    u_s = 2^−(stored + 1)

for each entry, where operands store that many bits of their significand: 2⁻⁸ in bfloat16. The sum
is off by u_s Σ_t ‖û_t‖‖v̂_t‖ for that, which is part of the certificate (`factors.gram.sum_error`).

Sources: "Performance precision" in XLA's documentation of `PrecisionConfig`; NVIDIA, "CUDA C++
Programming Guide", on TensorFloat-32 (10 stored bits); Google, "bfloat16: The secret to high
performance on Cloud TPUs" (7 stored bits).
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.lax import Precision

from jaxdp.engine.numerics import accumulation_dtype, scale_rows, widened
from jaxdp.engine.platforms import platform

# Bits of a significand that bfloat16 and float32 store.
BFLOAT16, FLOAT32 = 7, 23
# Of a float32 operand, a matrix unit reads so many at these precisions.
_READ = {"tpu": BFLOAT16, "gpu": 10}
_DEFAULT: Any = (None, (Precision.DEFAULT, Precision.DEFAULT))
_ONE_PASS = {"tpu": _DEFAULT, "gpu": (*_DEFAULT, (Precision.HIGH, Precision.HIGH))}


def stored_bits(dtypes: Iterable[Any], precision: Any) -> int:
    """How many bits of their significands the operands of a product store.

    What is not known to be read in one pass stays as wide as it is, in float32 at least.

    Args:
      dtypes: of its operands.
      precision: that the product names, as JAX writes it.
    """
    stored = max(cast(int, jnp.finfo(dtype).nmant) for dtype in dtypes)
    where = platform()
    if where not in _READ or stored > FLOAT32:
        return max(FLOAT32, stored)
    if stored <= BFLOAT16:
        return BFLOAT16
    return _READ[where] if precision in _ONE_PASS[where] else FLOAT32


def as_operand(array: jax.Array, stored: int, held_in: int | None = None) -> jax.Array:
    """The array as a product multiplies it, rounded to nearest.

    Args:
      array: any floating-point array.
      stored: bits of its significand.
      held_in: bits of those it is multiplied with, if they have more.
    """
    if array.dtype == jnp.bfloat16 and (held_in or stored) <= BFLOAT16:
        return array
    wide = widened(array)
    if stored < FLOAT32:
        # Not by a cast alone, which XLA may leave out where the result is widened again.
        wide = jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=stored)
    return wide.astype(jnp.bfloat16) if (held_in or stored) <= BFLOAT16 else wide


def weighted_operand(weights: jax.Array, array: jax.Array, stored: int) -> jax.Array:
    """w_i v̂_i for every sample, as a product multiplies it."""
    return as_operand(scale_rows(weights, array), stored)


def weight_roundoff(stored: int) -> float:
    """u_s; zero where w·v̂ is rounded as any product is (`factors.gram`)."""
    return 2.0 ** -(stored + 1) if stored < FLOAT32 else 0.0


def multiplied(subscripts: str, a: jax.Array, b: jax.Array, stored: int) -> jax.Array:
    """`einsum` of two operands, in float32 at least."""
    dtype: Any = accumulation_dtype(jnp.result_type(a, b))
    return jnp.einsum(
        subscripts, a, b, precision=precision_of(stored), preferred_element_type=dtype
    )


def multiplied_wide(subscripts: str, a: jax.Array, wide: jax.Array, stored: int) -> jax.Array:
    """`einsum` of an operand and an array that is none, in float32: as a sum of three operands it
    takes fewer passes than `Precision.HIGHEST`. 3·(stored + 1) bits hold all of float32."""
    if stored >= FLOAT32:
        return multiplied(subscripts, widened(a), wide, FLOAT32)
    total, rest = jnp.zeros((), jnp.float32), wide
    for _ in range(3):
        part = as_operand(rest, stored)
        total, rest = total + multiplied(subscripts, a, part, stored), rest - widened(part)
    return total


def precision_of(stored: int) -> Precision:
    """One pass multiplies operands exactly that were rounded before; others ask for more."""
    return Precision.DEFAULT if stored < FLOAT32 else Precision.HIGHEST
