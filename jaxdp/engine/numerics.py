"""Sums that do not lose what is small, and zeros by selection."""

from typing import Any

import jax
import jax.numpy as jnp

# Rows up to this length are summed in one go, longer ones in blocks of blocks: adding a small
# square to a large running sum rounds it away, and a norm that is too small is a leak.
_BLOCK = 256


def accumulation_dtype(dtype: Any) -> Any:
    """Norms and sums accumulate in float32 at least."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def square_sums(rows: jax.Array) -> jax.Array:
    """Σ x² of each row `[b]`, to a relative error of about 1e-6 in float32 for any length."""
    blocked = _blocks(rows)
    sums = jnp.einsum("bki,bki->bk", blocked, blocked, precision=jax.lax.Precision.HIGHEST)
    while sums.shape[1] > 1:
        sums = jnp.sum(_blocks(sums), axis=2)
    return sums[:, 0]


def _blocks(rows: jax.Array) -> jax.Array:
    """`[b, n] -> [b, k, _BLOCK]`, filled up with zeros; one shorter block if that holds a row."""
    count, length = rows.shape
    if length <= _BLOCK:
        return rows.reshape(count, 1, length)
    blocks = -(-length // _BLOCK)
    return jnp.pad(rows, ((0, 0), (0, blocks * _BLOCK - length))).reshape(count, blocks, _BLOCK)


def select_rows(keep: jax.Array, rows: jax.Array) -> jax.Array:
    """Zero where `keep` is false: by selection, since 0 · NaN is NaN."""
    return jnp.where(keep.reshape(keep.shape + (1,) * (rows.ndim - 1)), rows, jnp.zeros_like(rows))


def lost(count: int, dtype: Any) -> float:
    """What a sum of so many products may lack because some underflowed to zero."""
    return count * float(jnp.finfo(dtype).tiny)


def widened(array: jax.Array) -> jax.Array:
    """In the precision in which norms and sums accumulate."""
    return array.astype(accumulation_dtype(array.dtype))


def scale_rows(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """w_i x_i for every sample, in at least float32."""
    rows = widened(rows)
    return weights.astype(rows.dtype).reshape(weights.shape + (1,) * (rows.ndim - 1)) * rows
