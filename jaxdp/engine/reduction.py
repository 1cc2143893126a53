"""What every lowering takes and gives."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxdp.engine.numerics import accumulation_dtype

# (params leaves with a gradient, one example) -> (loss, aux)
LeafLoss = Callable[[list[jax.Array], Any], tuple[jax.Array, Any]]


class Weigh(NamedTuple):
    """How squared norms become weights.

    Attributes:
      weights: `(squared norms [b, L] of some rows, which rows of the batch these are [b]) ->
        weights [b, L]`.
      groups: for each leaf its group; leaves of one group have equal weights.
    """

    weights: Callable[[jax.Array, jax.Array], jax.Array]
    groups: tuple[int, ...]


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


class Batch(NamedTuple):
    """Some rows of a batch.

    Attributes:
      examples: pytree of `[b, ...]`.
      mask: bool `[b]`, which rows hold a sample; the others count for nothing.
      positions: int `[b]`, which rows of the whole batch these are.
    """

    examples: Any
    mask: jax.Array
    positions: jax.Array


class Lowering(Protocol):
    """A way to compute per-sample gradients, or what is asked of them without computing them."""

    def reduce(self, part: Batch, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        ...

    def rows(self, part: Batch) -> Rows:
        """The gradients themselves."""
        ...


def zero_sum(leaf: Any) -> jax.Array:
    """The sum over no samples for a parameter of this shape and dtype."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros(leaf.shape, accumulation_dtype(leaf.dtype) if floating else leaf.dtype)


def stacked(columns: list[jax.Array]) -> jax.Array:
    """Squared norms `[B]` of each leaf as one `[B, L]`, in the widest of their dtypes."""
    widest = max((column.dtype for column in columns), key=lambda dtype: jnp.finfo(dtype).bits)
    return jnp.stack([column.astype(widest) for column in columns], axis=1)
