"""Keeps samples that are not finite out of a pass that mixes samples.

Where a lowering weighs samples inside the backward pass, a sample of weight zero still takes part:
zero times NaN is NaN. So rows that do not count are replaced by a row that does before the pass,
and if the pass finds rows whose gradient is not finite, it runs again without these.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.numerics import select_rows
from jaxdp.engine.reduction import Batch, Reduction
from jaxdp.engine.rule import finite_rows


class _State(NamedTuple):
    counted: jax.Array
    settled: jax.Array
    found: Reduction


def settle(
    run: Callable[[Batch], Reduction], part: Batch, start: Reduction
) -> Reduction:
    """The reduction over the rows that hold a sample and have finite gradients.

    Args:
      run: the pass. Rows of its batch that are masked have weight zero, and are finite.
      part: the rows.
      start: what no row at all gives.
    """

    def again(state: _State) -> _State:
        counted = state.counted
        index = jnp.where(counted, jnp.arange(counted.shape[0]), jnp.argmax(counted))
        examples = jax.tree.map(lambda leaf: leaf[index], part.examples)
        found = run(Batch(examples, counted, part.index))

        def seen(new: jax.Array, old: jax.Array) -> jax.Array:
            shape = counted.shape + (1,) * (new.ndim - 1)
            return jnp.where(counted.reshape(shape), new, old)

        # A row that drops out keeps what the first pass saw of it.
        by_row = jax.tree.map(seen, found._replace(sums=[]), state.found._replace(sums=[]))
        left = counted & finite_rows(found.squared_norms)
        return _State(left, jnp.all(left == counted), by_row._replace(sums=found.sums))

    def step(state: _State) -> _State:
        nothing = _State(state.counted, jnp.ones_like(state.settled), state.found._replace(sums=start.sums))
        return jax.lax.cond(jnp.any(state.counted), again, lambda _: nothing, state)

    state = _State(part.mask, jnp.zeros((), bool), start)
    return jax.lax.while_loop(lambda state: ~state.settled, step, state).found


def nothing_seen(
    sums: Sequence[jax.Array], count: int, leaves: int, dtype: Any, loss: Any, aux: Any
) -> Reduction:
    """The reduction over no rows: of losses and aux with these shapes of one example."""

    def zeros(shape: Any) -> jax.Array:
        return jnp.zeros((count, *shape.shape), shape.dtype)

    squared = jnp.zeros((count, leaves), dtype)
    return Reduction(list(sums), squared, zeros(loss), jax.tree.map(zeros, aux))
