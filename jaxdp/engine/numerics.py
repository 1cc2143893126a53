"""Zeros by selection, and sums in a precision that is wide enough."""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

from typing import Any

import jax
import jax.numpy as jnp

from jaxdp.engine.platforms import tracing_for as tracing_for
from jaxdp.engine.rounding import least_weight, total


def accumulation_dtype(dtype: Any) -> Any:
    """Norms and sums accumulate in float32 at least."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def square_sums(rows: jax.Array) -> jax.Array:
    """Σ x² of each row `[b, n]`, with `rounding.roundings(n)` roundings."""
    return total(jnp.square(rows))


def select_rows(keep: jax.Array, rows: jax.Array) -> jax.Array:
    """Zero where `keep` is false: by selection, since 0 · NaN is NaN."""
    return jnp.where(keep.reshape(keep.shape + (1,) * (rows.ndim - 1)), rows, jnp.zeros_like(rows))


def widened(array: jax.Array) -> jax.Array:
    """In the precision in which norms and sums accumulate.

    What was rounded to bfloat16 stays so: XLA may leave out that rounding on the way to float32,
    and norms would then be of other numbers than sums.
    """
    wide = array.astype(accumulation_dtype(array.dtype))
    if array.dtype != jnp.bfloat16:
        return wide
    return jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)


def scale_rows(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """w_i x_i for every sample, in at least float32; zero for a weight that would lose entries."""
    rows = widened(rows)
    weights = held(weights.astype(rows.dtype))
    return weights.reshape(weights.shape + (1,) * (rows.ndim - 1)) * rows


def held(weights: jax.Array) -> jax.Array:
    """The weights, zero where they are below `rounding.least_weight`."""
    return jnp.where(jnp.abs(weights) < least_weight(weights.dtype), 0, weights)


def once(tree: Any) -> Any:
    """The same arrays, as numbers that are computed once.

    A compiler may compute a cheap value anew for each of its uses, and round it in another way each
    time, with a fused multiply-add here and without one there. Where terms cancel, the norm of one
    result says nothing about the other. So what norms and sums have in common goes through here.
    """
    each_once = {id(array): array for array in jax.tree.leaves(tree)}
    behind = {key: jax.lax.optimization_barrier(array) for key, array in each_once.items()}

    def computed(array: jax.Array) -> jax.Array:
        return behind[id(array)]

    return jax.tree.map(computed, tree)
