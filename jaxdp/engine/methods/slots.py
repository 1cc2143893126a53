"""Slots: one forward and one backward pass, then everything from the factors.

The cotangents at all uses come from one vector-Jacobian product of the batched loss with respect
to slots (`engine.instrument`); the parameters themselves are not differentiated. Norms and
weighted sums follow from operands and cotangents (`engine.assemble`). The fastest way to clip by a
norm over the whole tree; it holds the operands and cotangents of all layers at once.

Source: Bu et al. 2023, "Differentially Private Optimization on Large Model at Small Cost"
(book-keeping).
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxdp.engine import instrument
from jaxdp.engine.assemble import LeafGradients, assemble
from jaxdp.engine.effects import Excuse
from jaxdp.engine.explanation import LeafExplanation, explain_leaf
from jaxdp.engine.methods.base import distinct_bytes
from jaxdp.engine.methods.formed import formed_slots, formed_uses, forming
from jaxdp.engine.numerics import select_rows
from jaxdp.engine.plan import Plan, TracedLoss
from jaxdp.engine.reduction import Batch, Reduction, Rows, stacked
from jaxdp.engine.uses import Use
from jaxdp.engine.walker import Path
from jaxdp.engine.weighting import Weighting
from jaxdp.varying import zeros


@dataclass(frozen=True)
class Slots:
    """One batched forward and backward pass."""

    plan: Plan
    leaves: list[jax.Array]

    excuses: ClassVar[frozenset[Excuse]] = frozenset()

    @property
    def most_at_once(self) -> int | None:
        """As the plan says."""
        return self.plan.most_at_once

    @classmethod
    def of(cls, traced: TracedLoss) -> "Slots":
        """The method for this loss."""
        return cls(traced.plan, traced.leaves)

    def reduce(self, batch: Batch, weighting: Weighting | None) -> Reduction:
        """Norms, and weighted sums if `weighting` is given."""
        gradients, losses, aux = self.leaf_gradients(batch)
        norms = stacked([leaf.certified_norms(losses.shape[0]) for leaf in gradients], batch.mask)
        counted = select_rows(batch.mask, norms)
        sums = []
        if weighting is not None:
            weights = weighting.weights(counted, batch)
            pieces = without(jnp.all(weights == 0, axis=1), [leaf.pieces for leaf in gradients])
            gradients = [replace(leaf, pieces=p) for leaf, p in zip(gradients, pieces, strict=True)]
            sums = [leaf.weighted_sum(weights[:, k]) for k, leaf in enumerate(gradients)]
        return Reduction(sums, counted, select_rows(batch.mask, losses), aux)

    def rows(self, batch: Batch) -> Rows:
        """The gradients of every sample."""
        gradients, losses, aux = self.leaf_gradients(batch)
        return Rows([leaf.rows(losses.shape[0]) for leaf in gradients], losses, aux)

    def kept_bytes(self, batch: Batch) -> int:
        """The factors of all layers: operands and cotangents."""

        def factors(batch: Batch) -> list[LeafGradients]:
            return self.leaf_gradients(batch)[0]

        return distinct_bytes(factors, batch)

    def explained(
        self, names: list[str], batch: Batch, tapped: Mapping[int, Use] = MappingProxyType({})
    ) -> list[LeafExplanation]:
        """How the norms of each leaf come from its factors.

        Args:
          names: of the leaves.
          batch: the rows.
          tapped: uses whose factors are not kept (`methods.taps`).
        """
        gradients, *_ = jax.eval_shape(self.leaf_gradients, batch)
        return [
            explain_leaf(
                name,
                leaf,
                [use for use in self.plan.uses.values() if index in use.sources],
                tapped=any(index in use.sources for use in tapped.values()),
            )
            for index, (name, leaf) in enumerate(zip(names, gradients, strict=True))
        ]

    def leaf_gradients(self, batch: Batch) -> tuple[list[LeafGradients], jax.Array, Any]:
        """Gradients of every leaf as factors, losses and aux, of every sample."""
        plan = self.plan
        forms = formed_uses(plan.uses, self.leaves)
        others = {number: use for number, use in plan.uses.items() if number not in forms}

        def one(slots: Any, example: Any) -> tuple[jax.Array, Any]:
            args = plan.arguments(self.leaves, example)
            taps = forming({number: slots[number] for number in forms}, self.leaves)
            outputs, captures = instrument.run(plan.program, plan.uses, args, slots, taps)
            loss, aux = plan.outputs(outputs)
            return loss, (captures, aux)

        def batched(slots: Any) -> tuple[jax.Array, Any]:
            return jax.vmap(one)(slots, batch.examples)

        slots = {**zero_slots(others, batch.mask), **formed_slots(forms, plan.uses, batch.mask)}
        losses, pull_back, (captures, aux) = jax.vjp(batched, slots, has_aux=True)
        (cotangents,) = pull_back(jnp.ones_like(losses))
        formed = {number: cotangents.pop(number) for number in forms}
        cotangents = with_twins(others, cotangents)
        gradients = assemble(plan.program, plan.uses, self.leaves, captures, cotangents, formed)
        return gradients, losses, aux


def zero_slots(uses: Mapping[int, Use], mask: jax.Array) -> instrument.ByUse:
    """Slots `[B, ...]` for the uses; none for one whose twin has one."""
    at = {use.path for use in uses.values() if use.kind is not None}
    slotted = {number: use for number, use in uses.items() if use.twin not in at}
    return {number: _zero_slot(use, mask) for number, use in slotted.items()}


def _zero_slot(use: Use, mask: jax.Array) -> jax.Array:
    shape = (*mask.shape, *use.lengths, *use.slotted.shape)
    # It varies over devices as the value it is attached to, or JAX would add up its cotangents.
    return zeros(shape, use.slotted.dtype, (use.slotted, mask))


def with_twins(uses: Mapping[int, Use], cotangents: instrument.ByUse) -> instrument.ByUse:
    """The cotangents of all uses: those of a twin for a use without a slot of its own."""
    at: dict[Path | None, int] = {
        use.path: number for number, use in uses.items() if use.kind is not None
    }
    return {
        number: cotangents[number] if number in cotangents else cotangents[at[use.twin]]
        for number, use in uses.items()
    }


def without(dropped: jax.Array, factors: Any) -> Any:
    """The factors with zeros for the dropped samples: one that is not finite would poison the
    products that sum over samples, whatever its weight."""
    arrays, structure = jax.tree.flatten(factors)
    each_once = {id(array): array for array in arrays}
    kept = {key: select_rows(~dropped, array) for key, array in each_once.items()}
    return jax.tree.unflatten(structure, [kept[id(array)] for array in arrays])
