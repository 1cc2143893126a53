"""A batch in microbatches: what these need of memory, not what the batch would."""

# JAX leaves some of its types unknown.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.methods.base import Reducer
from jaxdp.engine.parts import sums_held
from jaxdp.engine.reduction import Batch, Reduction, Rows, zero_sums
from jaxdp.engine.sums import Running
from jaxdp.engine.weighting import Weighting


class Microbatched(NamedTuple):
    """`size` samples at a time.

    Attributes:
      reducer: of one microbatch.
      leaves: parameters that have a gradient.
      size: of a microbatch.
    """

    reducer: Reducer
    leaves: list[Any]
    size: int

    def reduce(self, batch: Batch, weighting: Weighting | None) -> Reduction:
        """Norms, and weighted sums if `weighting` is given, added up over microbatches."""

        def reduce(microbatch: Batch) -> tuple[list[jax.Array], Reduction]:
            reduction = self.reducer.reduce(microbatch, weighting)
            return sums_held(reduction.sums, self.leaves), reduction._replace(sums=[])

        zeros = [] if weighting is None else zero_sums(self.leaves, batch.mask)
        sums, by_row = added_up(reduce, batch, self.size, zeros)
        return by_row._replace(sums=sums)

    def rows(self, batch: Batch) -> Rows:
        """The gradients of the whole batch, computed one microbatch after the other."""
        return _joined(jax.lax.map(self.reducer.rows, _split(batch, self.size)), batch)


def added_up(
    reduce: Callable[[Batch], tuple[list[jax.Array], Any]],
    batch: Batch,
    size: int,
    zeros: list[jax.Array],
) -> tuple[list[jax.Array], Any]:
    """Adds up what one microbatch after the other gives, with compensation (`sums.Running`).

    Args:
      reduce: `microbatch -> (sums over its rows, results by row)`.
      batch: the rows.
      size: of a microbatch.
      zeros: the sums over no rows.

    Returns:
      The sums over all rows, and the results `[B, ...]`.
    """

    def add(sums: Running, microbatch: Batch) -> tuple[Running, Any]:
        terms, by_row = reduce(microbatch)
        return sums.add(terms), by_row

    start = Running.start(zeros, samples=batch.mask.shape[0])
    sums, by_row = jax.lax.scan(add, start, _split(batch, size))
    return sums.value, _joined(by_row, batch)


def _split(batch: Batch, size: int) -> Batch:
    """Everything as `[microbatches, size, ...]`; masked copies of the last row fill up the end."""
    count = batch.mask.shape[0]
    microbatches = -(-count // size)
    places = jnp.arange(microbatches * size)

    def split(leaf: jax.Array) -> jax.Array:
        filled = leaf if len(places) == count else leaf[jnp.minimum(places, count - 1)]
        return filled.reshape(microbatches, size, *leaf.shape[1:])

    real = (places < count).reshape(microbatches, size)
    parts = jax.tree.map(split, batch)
    return parts._replace(mask=parts.mask & real)


def _joined(tree: Any, batch: Batch) -> Any:
    def joined(leaf: jax.Array) -> jax.Array:
        return jax.lax.collapse(leaf, 0, 2)[: batch.mask.shape[0]]

    return jax.tree.map(joined, tree)
