"""For per-layer rules: each layer is clipped and summed as soon as it is known.

One forward and one backward pass as by slots, but the weights of a group of leaves come from its
own norms alone. So no layer waits for another, and the compiler may drop the operands and
cotangents of a layer before the backward pass reaches the next.

Source: He et al. 2023, "Exploring the Limits of Differentially Private Deep Learning with
Group-wise Clipping".
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownMemberType=false

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxdp.engine.effects import Excuse
from jaxdp.engine.explanation import LeafExplanation
from jaxdp.engine.methods.settle import nothing_seen, settle
from jaxdp.engine.methods.slots import Slots
from jaxdp.engine.plan import Plan, TracedLoss
from jaxdp.engine.reduction import Batch, Reduction, Rows, stacked
from jaxdp.engine.weighting import Weighting


@dataclass(frozen=True)
class Fused:
    """One backward pass that clips on the way."""

    plan: Plan
    leaves: list[jax.Array]

    excuses: ClassVar[frozenset[Excuse]] = frozenset()

    @property
    def most_at_once(self) -> int | None:
        """As the plan says."""
        return self.plan.most_at_once

    @classmethod
    def of(cls, traced: TracedLoss) -> "Fused":
        """The method for this loss."""
        return cls(traced.plan, traced.leaves)

    def reduce(self, batch: Batch, weighting: Weighting | None) -> Reduction:
        """Norms, and weighted sums if `weighting` is given."""
        if weighting is None:
            return self._slots.reduce(batch, weighting)
        start = nothing_seen(self.plan, self.leaves, batch.mask)
        return settle(lambda batch: self._pass(batch, weighting), batch, start)

    def rows(self, batch: Batch) -> Rows:
        """The gradients of every sample."""
        return self._slots.rows(batch)

    def kept_bytes(self, batch: Batch) -> int:
        """What slots keep: that the compiler drops some of it earlier cannot be relied on."""
        return self._slots.kept_bytes(batch)

    def explained(self, names: list[str], batch: Batch) -> list[LeafExplanation]:
        """As by slots."""
        return self._slots.explained(names, batch)

    @property
    def _slots(self) -> Slots:
        return Slots(self.plan, self.leaves)

    def _pass(self, batch: Batch, weighting: Weighting) -> Reduction:
        gradients, losses, aux = self._slots.leaf_gradients(batch)
        columns = [leaf.certified_norms(losses.shape[0]) for leaf in gradients]
        sums = []
        for index, leaf in enumerate(gradients):
            # The norms of the other groups are left out, so that nothing depends on them.
            known = [
                column if group == weighting.groups[index] else jnp.zeros_like(column)
                for column, group in zip(columns, weighting.groups, strict=True)
            ]
            weights = weighting.weights(stacked(known, batch.mask), batch)
            sums.append(leaf.weighted_sum(weights[:, index]))
        return Reduction(sums, stacked(columns, batch.mask), losses, aux)
