"""A batch in microbatches: what these need of memory, not what the batch would."""

# JAX leaves some of its types unknown.
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.effects import with_nobody_beside
from jaxdp.engine.methods.base import Reducer
from jaxdp.engine.parts import on_any_device, sums_held
from jaxdp.engine.reduction import Batch, Reduction, Rows, zero_sums
from jaxdp.engine.sums import Running
from jaxdp.engine.weighting import Weighting
from jaxdp.varying import zeros

# (carried, a microbatch) -> (carried, results by row)
Visit = Callable[[Any, Batch], tuple[Any, Any]]


class Microbatched(NamedTuple):
    """`size` samples at a time.

    Attributes:
      reducer: of one microbatch.
      leaves: parameters that have a gradient.
      size: of a microbatch.
      alone: whether one sample must be all that there is to see (`effects.with_nobody_beside`).
    """

    reducer: Reducer
    leaves: list[Any]
    size: int
    alone: bool = False

    def reduce(self, batch: Batch, weighting: Weighting | None) -> Reduction:
        """Norms, and weighted sums if `weighting` is given, added up over microbatches."""

        def reduce(microbatch: Batch) -> tuple[list[jax.Array], Reduction]:
            reduction = self.reducer.reduce(microbatch, weighting)
            return sums_held(reduction.sums, self.leaves), reduction._replace(sums=[])

        if self.alone:
            batch = with_nobody_beside(self.leaves, batch)
        empty = [] if weighting is None else zero_sums(self.leaves, batch.mask)
        sums, by_row = added_up(reduce, batch, self.size, empty)
        return by_row._replace(sums=sums)

    def rows(self, batch: Batch) -> Rows:
        """The gradients of the whole batch, computed one microbatch after the other."""

        def rows(nothing: tuple[()], microbatch: Batch) -> tuple[tuple[()], Rows]:
            return nothing, self.reducer.rows(microbatch)

        if self.alone:
            batch = with_nobody_beside(self.leaves, batch)
        return _one_by_one(rows, (), batch, self.size)[1]


def added_up(
    reduce: Callable[[Batch], tuple[list[jax.Array], Any]],
    batch: Batch,
    size: int,
    empty: list[jax.Array],
) -> tuple[list[jax.Array], Any]:
    """Adds up what one microbatch after the other gives, with compensation (`sums.Running`).

    Args:
      reduce: `microbatch -> (sums over its rows, results by row)`, of which masked rows have no
        part and zeros.
      batch: the rows.
      size: of a microbatch.
      empty: the sums over no rows.

    Returns:
      The sums over all rows, and the results `[B, ...]`.
    """

    def add(sums: Running, microbatch: Batch) -> tuple[Running, Any]:
        terms, by_row = reduce(microbatch)
        return sums.add(terms), by_row

    start = Running.start(empty, samples=batch.mask.shape[0])
    sums, by_row = _one_by_one(add, start, batch, size)
    return sums.value, by_row


def _one_by_one(visit: Visit, start: Any, batch: Batch, size: int) -> tuple[Any, Any]:
    """What visits to all microbatches have carried along, and their results by row. One without a
    sample is not visited: it would add nothing, and its rows give zeros."""
    microbatches = _split(batch, size)

    @jax.jit  # traced once, for its types and in its branch
    def visit_at(carried: Any, place: jax.Array) -> tuple[Any, Any]:
        # Read in the branch, or each microbatch would be copied on the way to it.
        def one(leaf: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False)

        return visit(carried, jax.tree.map(one, microbatches))

    def step(carried: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        place, holds_a_sample = part
        _, by_row = jax.eval_shape(visit_at, carried, place)

        def nothing(leaf: Any) -> jax.Array:
            return zeros(leaf.shape, leaf.dtype, like=leaf)

        def skip(carried: Any, place: jax.Array) -> tuple[Any, Any]:
            del place
            return carried, jax.tree.map(nothing, by_row)

        # Sums go through the branch, which adds to them in place: one that returned terms would
        # keep a second copy.
        return jax.lax.cond(holds_a_sample, visit_at, skip, carried, place)

    visited = on_any_device(jnp.any(microbatches.mask, axis=1), batch.mask)
    carried, by_row = jax.lax.scan(step, start, (jnp.arange(len(visited)), visited))

    def joined(leaf: jax.Array) -> jax.Array:
        return jax.lax.collapse(leaf, 0, 2)[: batch.mask.shape[0]]

    return carried, jax.tree.map(joined, by_row)


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
