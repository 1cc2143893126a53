"""A batch in microbatches: what these need of memory, not what the batch would."""

# JAX leaves some of its types unknown.
# pyright: reportUnknownMemberType=false

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.methods.base import Reducer
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

        def add(sums: Running, microbatch: Batch) -> tuple[Running, Reduction]:
            reduction = self.reducer.reduce(microbatch, weighting)
            return sums.add(reduction.sums), reduction._replace(sums=[])

        zeros = [] if weighting is None else zero_sums(self.leaves, batch.mask)
        start = Running.start(zeros, samples=batch.mask.shape[0])
        sums, by_row = jax.lax.scan(add, start, self._split(batch))
        return _joined(by_row, batch)._replace(sums=sums.value)

    def rows(self, batch: Batch) -> Rows:
        """The gradients of the whole batch, computed one microbatch after the other."""
        return _joined(jax.lax.map(self.reducer.rows, self._split(batch)), batch)

    def _split(self, batch: Batch) -> Batch:
        """Everything as `[microbatches, size, ...]`; masked copies of the last row fill up the
        end."""
        count = batch.mask.shape[0]
        microbatches = -(-count // self.size)
        places = jnp.arange(microbatches * self.size)

        def split(leaf: jax.Array) -> jax.Array:
            filled = leaf if len(places) == count else leaf[jnp.minimum(places, count - 1)]
            return filled.reshape(microbatches, self.size, *leaf.shape[1:])

        real = (places < count).reshape(microbatches, self.size)
        parts = jax.tree.map(split, batch)
        return parts._replace(mask=parts.mask & real)


def _joined(tree: Any, batch: Batch) -> Any:
    def joined(leaf: jax.Array) -> jax.Array:
        return jax.lax.collapse(leaf, 0, 2)[: batch.mask.shape[0]]

    return jax.tree.map(joined, tree)
