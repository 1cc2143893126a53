"""Look-up tables."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp.checks import check_flags, check_integer, check_real, check_sizes
from jaxdp.nn.layer import Layer, Params, TorchName, deterministic

# Torch adds it to the divisor of rows that are too long.
_NORM_EPS = 1e-7


def embedding(
    num_embeddings: int,
    embedding_dim: int,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
) -> Layer:
    """The row of a table for each id.

    Per-sample gradients cost memory for the rows that are looked up, never for the table. So there
    is no option `sparse`: every table is sparse in this sense.

    Args:
      num_embeddings: V, number of rows.
      embedding_dim: d, length of a row.
      padding_idx: a row that starts at zero and gets no gradient; negative counts from the end.
      max_norm: rows longer than this are looked up as if they had this norm. Gradients are those
        with respect to the shortened row. The table itself is left as it is: torch overwrites the
        rows that a batch has looked up, which tells, without noise, what was in the batch.
      norm_type: p of that norm.
      scale_grad_by_freq: divides the gradient of a row by how often the example has its id.
        (Torch counts in the whole batch, which would make one sample's gradient depend on others.)

    Returns:
      A layer of integer ids `[...] -> [..., d]`. Ids outside of [0, V) give rows of NaN, so that
      in a network the sample counts for nothing and is seen among those that are not finite.
      Parameters: embedding `[V, d]`, of N(0, 1).

    Raises:
      ValueError: a size below 1; a padding_idx outside of the table; a max_norm or norm_type that
        is not positive.
      TypeError: ids that are no integers.

    Example:
      >>> layer = embedding(10, 4, padding_idx=0)
      >>> params = layer.init(jax.random.key(0))
      >>> layer.apply(params, jnp.array([0, 3, 3])).shape
      (3, 4)
    """
    check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
    if padding_idx is not None:
        check_integer(
            "padding_idx",
            padding_idx,
            minimum=-num_embeddings,
            maximum=num_embeddings - 1,
            advice="It is a row of the table; negative ones count from the end.",
        )
    if max_norm is not None:
        check_real("max_norm", max_norm, above=0, advice="Pass None for rows of any norm.")
    if not (isinstance(norm_type, float) and norm_type == math.inf):
        check_real("norm_type", norm_type, above=0, advice="It is the p of the norm, or infinity.")
    check_flags(scale_grad_by_freq=scale_grad_by_freq)
    padding = None if padding_idx is None else padding_idx % num_embeddings

    def init(key: jax.Array) -> Params:
        table = jax.random.normal(key, (num_embeddings, embedding_dim))
        return {"embedding": table if padding is None else table.at[padding].set(0)}

    def apply(params: Params, ids: jax.Array) -> jax.Array:
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"embedding takes integer ids, got {ids.dtype}. Convert them (astype).")
        ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
        # Negative ids would count from the end: they are moved out of the table.
        inside = jnp.where(ids < 0, jnp.full_like(ids, num_embeddings), ids)
        rows = params["embedding"].at[inside].get(mode="fill", fill_value=jnp.nan)
        if max_norm is not None:
            norms = jnp.linalg.norm(lax.stop_gradient(rows), norm_type, axis=-1, keepdims=True)
            short = jnp.where(norms > max_norm, max_norm / (norms + _NORM_EPS), 1)
            rows = _with_value(rows, rows * short)
        if scale_grad_by_freq:
            flat = ids.reshape(-1)
            counts = jnp.sum(flat[:, None] == flat[None, :], axis=1).reshape(*ids.shape, 1)
            rows = _with_value(rows / counts.astype(rows.dtype), rows)
        if padding is not None:
            rows = jnp.where((ids == padding)[..., None], lax.stop_gradient(rows), rows)
        return rows

    return deterministic(init, apply, {("embedding",): (TorchName("weight"),)})


def _with_value(x: jax.Array, value: jax.Array) -> jax.Array:
    """An array with this value and the derivative of x."""
    return lax.stop_gradient(value) + (x - lax.stop_gradient(x))
