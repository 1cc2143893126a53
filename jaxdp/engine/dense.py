"""The dense lowering: `vmap(grad)`, whole or in microbatches.

It materialises the per-sample gradients of a microbatch at a time. Always right, for any JAX
program; the other lowerings are held against it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.numerics import accumulation_dtype, select_rows, square_sums

# (squared norms [b, L] of some rows, which rows of the batch these are [b]) -> weights [b, L]
Weigh = Callable[[jax.Array, jax.Array], jax.Array]

# (params leaves with a gradient, one example) -> (loss, aux)
LeafLoss = Callable[[list[jax.Array], Any], tuple[jax.Array, Any]]


class Rows(NamedTuple):
    """What is known of a (micro)batch, row by row.

    Attributes:
      grads: per-sample gradients, a list of `[b, *leaf.shape]`.
      losses: `[b]`, or None where the gradients came without their losses.
      aux: pytree of `[b, ...]`.
    """

    grads: list[jax.Array]
    losses: jax.Array | None
    aux: Any


class Reduction(NamedTuple):
    """Weighted sums over the batch, and what was seen on the way.

    Attributes:
      sums: for each leaf Σ_i w_i g_i, in at least float32.
      squared_norms: `[B, L]`; zero in masked rows.
      losses: `[B]`, or None; zero in masked rows.
      aux: pytree of `[B, ...]`.
    """

    sums: list[jax.Array]
    squared_norms: jax.Array
    losses: jax.Array | None
    aux: Any


def zero_sum(leaf: Any) -> jax.Array:
    """The sum over no samples for a parameter of this shape and dtype."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros(leaf.shape, accumulation_dtype(leaf.dtype) if floating else leaf.dtype)


def per_sample_rows(loss: LeafLoss, leaves: list[jax.Array], batch: Any) -> Rows:
    """`vmap(grad)` of the loss of one example over the leading axis of the batch."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (losses, aux), grads = jax.vmap(value_and_grad, in_axes=(None, 0))(leaves, batch)
    return Rows(grads, losses, aux)


def squared_norms(grads: list[jax.Array]) -> jax.Array:
    """Squared L2 norms `[b, L]` of per-sample gradients."""

    def of_leaf(grad: jax.Array) -> jax.Array:
        flat = grad.reshape(grad.shape[0], math.prod(grad.shape[1:]))
        return square_sums(flat.astype(accumulation_dtype(grad.dtype)))

    return stacked([of_leaf(grad) for grad in grads])


def stacked(columns: list[jax.Array]) -> jax.Array:
    """Squared norms `[B]` of each leaf as one `[B, L]`, in the widest of their dtypes."""
    widest = max((column.dtype for column in columns), key=lambda dtype: jnp.finfo(dtype).bits)
    return jnp.stack([column.astype(widest) for column in columns], axis=1)


def weighted_sums(grads: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
    """For each leaf Σ_i w_i g_i; a row of weight zero counts for nothing, whatever it holds."""

    def of_leaf(grad: jax.Array, weight: jax.Array) -> jax.Array:
        dtype = accumulation_dtype(grad.dtype)
        kept = select_rows(weight != 0, grad).astype(dtype)
        # A contraction, not a product and a sum: that form is ten times slower on CPU.
        return jnp.tensordot(weight.astype(dtype), kept, 1, precision=jax.lax.Precision.HIGHEST)

    return [of_leaf(grad, weights[:, leaf]) for leaf, grad in enumerate(grads)]


def reduce_rows(
    rows: Rows, mask: jax.Array, weigh: Weigh | None, index: jax.Array | None = None
) -> Reduction:
    """Norms, then weights, then weighted sums (none without `weigh`) of materialised rows."""
    squared = select_rows(mask, squared_norms(rows.grads))
    sums = []
    if weigh is not None:
        index = jnp.arange(mask.shape[0]) if index is None else index
        sums = weighted_sums(rows.grads, select_rows(mask, weigh(squared, index)))
    losses = None if rows.losses is None else select_rows(mask, rows.losses)
    return Reduction(sums, squared, losses, rows.aux)


class Given(NamedTuple):
    """Per-sample gradients that the caller has materialised already."""

    rows: Rows
    mask: jax.Array

    def reduce(self, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        return reduce_rows(self.rows, self.mask, weigh)

    def materialize(self) -> Rows:
        """The gradients as they were given."""
        return self.rows


class Dense(NamedTuple):
    """`vmap(grad)` of `loss` over the whole batch at once."""

    loss: LeafLoss
    leaves: list[jax.Array]
    batch: Any
    mask: jax.Array

    def reduce(self, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        return reduce_rows(self.materialize(), self.mask, weigh)

    def materialize(self) -> Rows:
        """The gradients of the whole batch."""
        return per_sample_rows(self.loss, self.leaves, self.batch)


class Microbatched(NamedTuple):
    """`vmap(grad)` over `size` samples at a time: their memory, not that of the batch."""

    loss: LeafLoss
    leaves: list[jax.Array]
    batch: Any
    mask: jax.Array
    size: int

    def reduce(self, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given, added up over microbatches."""

        def add(sums: list[jax.Array], chunk: _Chunk) -> tuple[list[jax.Array], Reduction]:
            rows = per_sample_rows(self.loss, self.leaves, chunk.batch)
            part = reduce_rows(rows, chunk.mask, weigh, chunk.rows)
            return [a + b for a, b in zip(sums, part.sums, strict=True)], part._replace(sums=[])

        zeros = [zero_sum(leaf) for leaf in self.leaves]
        sums, parts = jax.lax.scan(add, [] if weigh is None else zeros, self._chunks())
        return self._unchunk(parts)._replace(sums=sums)

    def materialize(self) -> Rows:
        """The gradients of the whole batch, computed one microbatch after the other."""

        def rows(chunk: _Chunk) -> Rows:
            return per_sample_rows(self.loss, self.leaves, chunk.batch)

        return self._unchunk(jax.lax.map(rows, self._chunks()))

    def _chunks(self) -> "_Chunk":
        """Everything as `[chunks, size, ...]`; masked copies of the last row fill up the end."""
        count = self.mask.shape[0]
        chunks = -(-count // self.size)
        index = jnp.minimum(jnp.arange(chunks * self.size), count - 1)

        def split(leaf: jax.Array) -> jax.Array:
            filled = leaf if len(index) == count else leaf[index]
            return filled.reshape(chunks, self.size, *leaf.shape[1:])

        real = (jnp.arange(chunks * self.size) < count).reshape(chunks, self.size)
        batch = jax.tree.map(split, self.batch)
        return _Chunk(batch, split(self.mask) & real, index.reshape(chunks, self.size))

    def _unchunk(self, tree: Any) -> Any:
        count = self.mask.shape[0]
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], tree)


class _Chunk(NamedTuple):
    batch: Any
    mask: jax.Array
    rows: jax.Array
