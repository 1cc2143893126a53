"""The lowering for per-layer rules: each layer is clipped and summed as soon as it is known.

One forward and one backward pass as by slots, but the weights of a group of leaves come from its
own norms alone. So no layer waits for another, and the compiler may drop the operands and
cotangents of a layer before the backward pass reaches the next.

Source: He et al. 2023, "Exploring the Limits of Differentially Private Deep Learning with
Group-wise Clipping".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.plan import Plan
from jaxdp.engine.reduction import Batch, Reduction, Rows, Weigh, stacked
from jaxdp.engine.settle import nothing_seen, settle
from jaxdp.engine.slots import Slots


class Fused(NamedTuple):
    """One backward pass that clips on the way."""

    plan: Plan
    leaves: list[jax.Array]

    def reduce(self, part: Batch, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        if weigh is None:
            return Slots(self.plan, self.leaves).reduce(part, weigh)
        start = nothing_seen(self.plan, self.leaves, part.mask, sums=True)
        return settle(lambda part: self._reduce(part, weigh), part, start)

    def rows(self, part: Batch) -> Rows:
        """The gradients of every sample."""
        return Slots(self.plan, self.leaves).rows(part)

    def _reduce(self, part: Batch, weigh: Weigh) -> Reduction:
        gradients, losses, aux = Slots(self.plan, self.leaves).factors(part)
        columns = [leaf.certified_norms(losses.shape[0]) for leaf in gradients]
        sums = []
        for index, leaf in enumerate(gradients):
            # The norms of the other groups are left out, so that nothing depends on them.
            own = weigh.groups[index]
            known = [
                column if group == own else jnp.zeros_like(column)
                for column, group in zip(columns, weigh.groups, strict=True)
            ]
            weights = weigh.of(stacked(known, part.mask), part)
            sums.append(leaf.weighted_sum(weights[:, index]))
        return Reduction(sums, stacked(columns, part.mask), losses, aux)
