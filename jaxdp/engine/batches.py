"""A lowering applied to a batch, whole or in microbatches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.reduction import Batch, Lowering, Reduction, Rows, Weigh, zero_sums
from jaxdp.engine.sums import Running


class Whole(NamedTuple):
    """The whole batch at once."""

    lowering: Lowering
    batch: Batch

    def reduce(self, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        return self.lowering.reduce(self.batch, weigh)

    def rows(self) -> Rows:
        """The gradients of the whole batch."""
        return self.lowering.rows(self.batch)


class Microbatched(NamedTuple):
    """`size` samples at a time: what they need of memory, not what the batch would."""

    lowering: Lowering
    batch: Batch
    leaves: list[Any]
    size: int

    def reduce(self, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given, added up over microbatches."""

        def add(sums: Running, part: Batch) -> tuple[Running, Reduction]:
            reduction = self.lowering.reduce(part, weigh)
            return sums.add(reduction.sums), reduction._replace(sums=[])

        zeros = [] if weigh is None else zero_sums(self.leaves, self.batch.mask)
        sums, parts = jax.lax.scan(add, Running.start(zeros), self._parts())
        return self._joined(parts)._replace(sums=sums.value)

    def rows(self) -> Rows:
        """The gradients of the whole batch, computed one microbatch after the other."""
        return self._joined(jax.lax.map(self.lowering.rows, self._parts()))

    def _parts(self) -> Batch:
        """Everything as `[parts, size, ...]`; masked copies of the last row fill up the end."""
        count = self.batch.mask.shape[0]
        parts = -(-count // self.size)
        index = jnp.minimum(jnp.arange(parts * self.size), count - 1)

        def split(leaf: jax.Array) -> jax.Array:
            filled = leaf if len(index) == count else leaf[index]
            return filled.reshape(parts, self.size, *leaf.shape[1:])

        real = (jnp.arange(parts * self.size) < count).reshape(parts, self.size)
        examples = jax.tree.map(split, self.batch.examples)
        return Batch(examples, split(self.batch.mask) & real, split(self.batch.given))

    def _joined(self, tree: Any) -> Any:
        count = self.batch.mask.shape[0]
        return jax.tree.map(lambda leaf: jax.lax.collapse(leaf, 0, 2)[:count], tree)
