"""Keeps samples that are not finite out of a pass that mixes samples.

Where a method weighs samples inside the backward pass, a sample of weight zero still takes part:
zero times NaN is NaN. So rows that do not count are replaced by a row that does before the pass,
and if the pass finds rows whose gradient is not finite, it runs again without these.
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.numerics import accumulation_dtype
from jaxdp.engine.parts import on_any_device
from jaxdp.engine.plan import Plan
from jaxdp.engine.reduction import Batch, Reduction, stacked, zero_sums
from jaxdp.engine.weighting import finite_rows
from jaxdp.varying import zeros


class _State(NamedTuple):
    counted: jax.Array
    settled: jax.Array
    reduction: Reduction


def settle(run: Callable[[Batch], Reduction], batch: Batch, start: Reduction) -> Reduction:
    """The reduction over the rows that hold a sample and have finite gradients.

    Args:
      run: the pass. Rows of its batch that are masked have weight zero, and are finite.
      batch: the rows.
      start: what no row at all gives.
    """

    def again(state: _State) -> _State:
        counted = state.counted
        index = jnp.where(counted, jnp.arange(counted.shape[0]), jnp.argmax(counted))
        examples = jax.tree.map(lambda leaf: leaf[index], batch.examples)
        reduction = run(Batch(examples, counted, batch.weights))

        def seen(new: jax.Array, old: jax.Array) -> jax.Array:
            shape = counted.shape + (1,) * (new.ndim - 1)
            return jnp.where(counted.reshape(shape), new, old)

        # A row that drops out keeps what the first pass saw of it.
        before = state.reduction._replace(sums=[])
        by_row = jax.tree.map(seen, reduction._replace(sums=[]), before)
        left = counted & finite_rows(reduction.norms)
        settled = jnp.all(left == counted) & jnp.any(counted)
        return _State(left, settled, by_row._replace(sums=reduction.sums))

    def step(state: _State) -> _State:
        nothing = state.reduction._replace(sums=start.sums)
        done = _State(state.counted, jnp.logical_or(state.settled, True), nothing)
        some = jnp.any(state.counted)
        after = jax.lax.cond(on_any_device(some), again, lambda _: done, state)
        # A device that has nobody left goes along where others gather parameters with it.
        return jax.tree.map(lambda new, old: jnp.where(some, new, old), after, done)

    # The first pass stands outside of the loop, in which XLA runs convolutions thirty times
    # slower on a CPU. The loop runs where a sample is not finite, or where there is none.
    first = again(_State(batch.mask, zeros((), bool, batch.mask), start))
    unsettled = lambda state: on_any_device(~state.settled)
    return jax.lax.while_loop(unsettled, step, first).reduction


def nothing_seen(plan: Plan, leaves: Sequence[Any], mask: jax.Array, *, sums: bool) -> Reduction:
    """The reduction over none of the rows."""
    loss, aux = plan.outputs(plan.program.outputs)

    def by_row(shape: Any) -> jax.Array:
        return zeros((*mask.shape, *shape.shape), shape.dtype, mask)

    norms = [zeros(mask.shape, accumulation_dtype(leaf.dtype), mask) for leaf in leaves]
    totals = zero_sums(leaves, mask) if sums else []
    return Reduction(totals, stacked(norms, mask), by_row(loss), jax.tree.map(by_row, aux))
