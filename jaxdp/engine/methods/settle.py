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
from jaxdp.engine.parts import InParts, on_any_device, together
from jaxdp.engine.plan import Plan
from jaxdp.engine.reduction import Batch, Reduction, stacked
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
      start: what is seen of no row at all.
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
        some, sums = jnp.any(counted), reduction.sums
        settled = jnp.all(left == counted)
        if together(batch.mask):
            # A device on which nobody counts goes along for the others, and adds nothing.
            sums = [_zero_unless(some, total) for total in sums]
        else:
            settled &= some
        return _State(left, settled, by_row._replace(sums=sums))

    def step(state: _State) -> _State:
        nothing = state.reduction._replace(sums=jax.tree.map(jnp.zeros_like, state.reduction.sums))
        done = _State(state.counted, jnp.logical_or(state.settled, True), nothing)
        some = on_any_device(jnp.any(state.counted), batch.mask)
        return jax.lax.cond(some, again, lambda _: done, state)

    # The first pass stands outside of the loop, in which XLA runs convolutions thirty times
    # slower on a CPU. The loop runs where a sample is not finite, or where there is none.
    first = again(_State(batch.mask, zeros((), bool, batch.mask), start))

    def unsettled(state: _State) -> jax.Array:
        return on_any_device(~state.settled, batch.mask)

    return jax.lax.while_loop(unsettled, step, first).reduction


def _zero_unless(some: jax.Array, total: Any) -> Any:
    """By selection. What is in parts is a sum over all devices, each of which has selected."""
    return total if isinstance(total, InParts) else jnp.where(some, total, jnp.zeros_like(total))


def nothing_seen(plan: Plan, leaves: Sequence[Any], mask: jax.Array) -> Reduction:
    """What is seen of none of the rows."""
    loss, aux = plan.outputs(plan.program.outputs)

    def by_row(shape: Any) -> jax.Array:
        return zeros((*mask.shape, *shape.shape), shape.dtype, mask)

    norms = [zeros(mask.shape, accumulation_dtype(leaf.dtype), mask) for leaf in leaves]
    return Reduction([], stacked(norms, mask), by_row(loss), jax.tree.map(by_row, aux))
