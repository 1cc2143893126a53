"""Zeros by selection, and sums in a precision that is wide enough."""

from typing import Any

import jax
import jax.numpy as jnp

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
    """In the precision in which norms and sums accumulate."""
    return array.astype(accumulation_dtype(array.dtype))


def scale_rows(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """w_i x_i for every sample, in at least float32; zero for a weight that would lose entries."""
    rows = widened(rows)
    weights = held(weights.astype(rows.dtype))
    return weights.reshape(weights.shape + (1,) * (rows.ndim - 1)) * rows


def held(weights: jax.Array) -> jax.Array:
    """The weights, zero where they are below `rounding.least_weight`."""
    return jnp.where(jnp.abs(weights) < least_weight(weights.dtype), 0, weights)
