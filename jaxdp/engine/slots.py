"""The lowering by slots: one forward and one backward pass, then everything from the factors.

The cotangents at all uses come from one vector-Jacobian product of the batched loss with respect
to slots (`engine.instrument`); the parameters themselves are not differentiated. Norms and
weighted sums follow from operands and cotangents (`engine.assemble`). The fastest way to clip by a
norm over the whole tree; it holds the operands and cotangents of all layers at once.

Source: Bu et al. 2023, "Differentially Private Optimization on Large Model at Small Cost"
(book-keeping).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine import instrument
from jaxdp.engine.assemble import LeafGradients, assemble
from jaxdp.engine.dense import LeafLoss, Reduction, Rows, Weigh, stacked
from jaxdp.engine.numerics import select_rows
from jaxdp.engine.plan import Plan, example_shapes


class Slots(NamedTuple):
    """One batched forward and backward pass."""

    loss: LeafLoss
    leaves: list[jax.Array]
    batch: Any
    mask: jax.Array

    def reduce(self, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        gradients, losses, aux = self._pass()
        count = self.mask.shape[0]
        squared = stacked([leaf.squared_norms(count) for leaf in gradients])
        sums = []
        if weigh is not None:
            kept = select_rows(self.mask, squared)
            weights = select_rows(self.mask, weigh(kept, jnp.arange(count)))
            sums = weighted_sums(gradients, weights, jnp.all(jnp.isfinite(squared)))
        return Reduction(
            sums, select_rows(self.mask, squared), select_rows(self.mask, losses), aux
        )

    def materialize(self) -> Rows:
        """The gradients of the whole batch."""
        gradients, losses, aux = self._pass()
        return Rows([leaf.rows(self.mask.shape[0]) for leaf in gradients], losses, aux)

    def _pass(self) -> tuple[list[LeafGradients], jax.Array, Any]:
        plan = Plan.of(self.loss, self.leaves, example_shapes(self.batch))
        count = self.mask.shape[0]

        def one(slots: instrument.Slots, example: Any) -> tuple[jax.Array, Any]:
            args = plan.arguments(self.leaves, example)
            outputs, captures = instrument.run(plan.program, plan.uses, args, slots)
            loss, aux = plan.outputs(outputs)
            return loss, (captures, aux)

        def batched(slots: instrument.Slots) -> tuple[jax.Array, Any]:
            return jax.vmap(one)(slots, self.batch)

        shapes = {number: instrument.slot_shape(use) for number, use in plan.uses.items()}
        zeros = {n: jnp.zeros((count, *shape.shape), shape.dtype) for n, shape in shapes.items()}
        losses, pull_back, (captures, aux) = jax.vjp(batched, zeros, has_aux=True)
        (cotangents,) = pull_back(jnp.ones_like(losses))
        gradients = assemble(plan.program, plan.uses, self.leaves, captures, cotangents)
        return gradients, losses, aux


def weighted_sums(
    gradients: list[LeafGradients], weights: jax.Array, finite: jax.Array
) -> list[jax.Array]:
    """Σ_i w_i g_i for every leaf, weights `[B, L]`.

    A sample that is not finite would poison the product that sums over samples, whatever its
    weight. To select it away costs a copy of every factor, and is done only where needed.
    """

    def sums(guard: bool) -> list[jax.Array]:
        return [
            leaf.weighted_sum(weights[:, index], guard=guard)
            for index, leaf in enumerate(gradients)
        ]

    return jax.lax.cond(finite, lambda: sums(guard=False), lambda: sums(guard=True))
