"""Taps: norms in one backward pass, weighted sums in a second.

A tap at a site lets the output's cotangent g through and does two things with it
(`engine.instrument`). It gives the squared norm of the site's gradient as the cotangent of a small
accumulator; and what goes on to the parameter is w·g, where w, the weight of the sample, arrives
as the cotangent of an output of the tap, the gate. So one program has both passes, over the same
forward: the first for the norms, the second for Σ_i w_i g_i. No g is kept, hence taps work inside
loops and rematerialised blocks at the memory of the ordinary gradient. About 4/3 of the operations
of the ordinary gradient.

The weights enter at the sites, never at the loss: a backward pass that is not linear (a
`custom_vjp` that clips, a cast that rounds) would make something else of w·g than w times what the
norm was computed from.

A compiler rounds the same numbers in other ways where it fuses them with others. So a cotangent
that is what two large numbers leave of each other may be zero in one pass and large in the next,
which the norms of the first pass have not seen. The second pass computes the norms of what it adds
once more; a sample whose weight is above what these allow is left out, and the passes run again
without it (`methods.settle`).

The second pass differentiates the tapped operands, each by a slot of its own, and nothing else: the
leaves are constants in it. So it cannot add to a sum what the first pass has not seen. A use that
the analysis had missed would be without a gradient, not without a clip.

Only a use whose parameter is used nowhere else is tapped, and not one that a loop shares: norms of
several uses do not add. The others keep slots (`methods.slots`).

Source: Lee and Kifer 2021, "Scaling up Differentially Private Deep Learning with Fast Per-Example
Gradient Clipping" (a second, reweighted pass).
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp

from jaxdp.engine import instrument, parts, walker
from jaxdp.engine.assemble import LeafGradients, assemble, joined_norms
from jaxdp.engine.boxes import Box, Target, disjoint, indices, row_major
from jaxdp.engine.effects import Excuse
from jaxdp.engine.explanation import LeafExplanation
from jaxdp.engine.factors.base import Addends
from jaxdp.engine.instrument import Replacement
from jaxdp.engine.kinds.base import Record, multiplies, stored_bits
from jaxdp.engine.methods.settle import nothing_seen, settle
from jaxdp.engine.methods.slots import Slots, with_twins, zero_slots
from jaxdp.engine.numerics import accumulation_dtype, held, once
from jaxdp.engine.parts import Cut, InParts, part_of
from jaxdp.engine.plan import Plan, TracedLoss
from jaxdp.engine.precision import FLOAT32, as_operand, precision_of
from jaxdp.engine.reduction import Batch, Reduction, Rows, stacked
from jaxdp.engine.rounding import ROOT, lost, rounded_up
from jaxdp.engine.sums import BLOCK
from jaxdp.engine.uses import Use
from jaxdp.engine.weighting import Weighting
from jaxdp.varying import vary, varying_axes, zeros


@dataclass(frozen=True)
class Taps:
    """Two backward passes."""

    plan: Plan
    leaves: list[jax.Array]

    excuses: ClassVar[frozenset[Excuse]] = frozenset()

    @property
    def most_at_once(self) -> int | None:
        """A block: the sum over samples is XLA's, which may be one running total."""
        return BLOCK

    @classmethod
    def of(cls, traced: TracedLoss) -> "Taps":
        """The method for this loss."""
        return cls(traced.plan, traced.leaves)

    def reduce(self, batch: Batch, weighting: Weighting | None) -> Reduction:
        """Norms, and weighted sums if `weighting` is given."""
        start = nothing_seen(self.plan, self.leaves, batch.mask)
        return settle(lambda batch: self._passes(batch, weighting), batch, start)

    def rows(self, batch: Batch) -> Rows:
        """The gradients of every sample."""
        return Slots(self.plan, self.leaves).rows(batch)

    def kept_bytes(self, batch: Batch) -> int:
        """The factors of the uses that are not tapped."""
        tapped = tapped_uses(self.plan.uses, self.leaves, one_weight=True)
        slotted = {number: use for number, use in self.plan.uses.items() if number not in tapped}
        return Slots(self.plan._replace(uses=slotted), self.leaves).kept_bytes(batch)

    def explained(self, names: list[str], batch: Batch) -> list[LeafExplanation]:
        """As by slots, with the leaves that are tapped."""
        tapped = tapped_uses(self.plan.uses, self.leaves, one_weight=True)
        return Slots(self.plan, self.leaves).explained(names, batch, tapped)

    @property
    def _margin(self) -> float:
        """By how much of itself a norm may grow from the first pass to the second: the weights
        leave room for it. A sample of which it grows by more is left out."""
        dtypes = {a.dtype for eqn in walker.equations(self.plan.program) for a in eqn.outputs}
        half = any(jnp.issubdtype(d, jnp.floating) and jnp.finfo(d).bits < 32 for d in dtypes)
        return 2.0**-8 if half else 2.0**-17

    def _passes(self, batch: Batch, weighting: Weighting | None) -> Reduction:
        plan, count = self.plan, batch.mask.shape[0]
        one_weight = weighting is None or len(set(weighting.groups)) == 1
        tapped = tapped_uses(plan.uses, self.leaves, one_weight=one_weight)
        slotted = {number: use for number, use in plan.uses.items() if number not in tapped}

        def one(
            operands: instrument.ByUse, slots: instrument.ByUse, sums: Any, example: Any
        ) -> tuple[Any, Any]:
            args = plan.arguments(self.leaves, example)
            slots, taps = {**operands, **slots}, Replacement(partial(_tap, counts), sums)
            outputs, captures = instrument.run(plan.program, plan.uses, args, slots, taps)
            gates = {number: captures.pop(number)[0] for number in tapped}
            loss, aux = plan.outputs(outputs)
            return (loss, gates), (captures, aux)

        def batched(operands: instrument.ByUse, slots: instrument.ByUse, sums: Any) -> Any:
            in_axes = (None, 0, 0, 0)
            return jax.vmap(one, in_axes)(operands, slots, sums, batch.examples)

        counts = jnp.any(batch.mask)
        # The same for all samples: what the second pass gives is summed over them.
        operands = {number: _zero_operand(use, self.leaves) for number, use in tapped.items()}
        start = {
            number: zeros(
                (count, len(use.view or ())),
                accumulation_dtype(use.aval.dtype),
                (use.slotted, batch.mask),
            )
            for number, use in tapped.items()
        }
        (losses, gates), pull_back, (captures, aux) = jax.vjp(
            batched, operands, zero_slots(slotted, batch.mask), start, has_aux=True
        )
        seed = jnp.ones_like(losses)
        _, cotangents, seen = pull_back((seed, jax.tree.map(jnp.zeros_like, gates)))
        cotangents = with_twins(slotted, cotangents)
        gradients = assemble(plan.program, slotted, self.leaves, captures, cotangents)
        # The second pass may compute another cotangent from the same numbers, rounded in another
        # way: what it adds is bounded by its own norm, which is held against this one.
        norms = stacked(_certified_norms(gradients, tapped, seen, count), batch.mask)
        sums = []
        if weighting is not None:
            weights = weighting.weights(norms * (1 + self._margin), batch)
            sums = [leaf.weighted_sum(weights[:, k]) for k, leaf in enumerate(gradients)]
            # Behind a barrier: XLA would see that both passes have the same cotangents, and keep
            # those of the first.
            seed, weights = jax.lax.optimization_barrier((seed, weights))
            totals, _, seen = pull_back((seed, _opened(gates, tapped, weights)))
            again = stacked(_certified_norms(gradients, tapped, seen, count), batch.mask)
            # Whether what was added is what was weighed.
            right = jnp.all(weights <= weighting.weights(again, batch), axis=1)
            norms = jnp.where(right[:, None], norms, jnp.inf)
            for number, total in totals.items():
                _add_to_leaves(sums, tapped[number], total, self.leaves)
        return Reduction(sums, norms, losses, aux)


def tapped_uses(uses: Mapping[int, Use], leaves: list[Any], *, one_weight: bool) -> dict[int, Use]:
    """The uses whose norms add up: every leaf in them is tapped at all of its uses, none of these
    overlap, and no loop shares them."""
    boxes: dict[int, list[Box]] = {}
    for use in uses.values():
        for part, at in zip(use.view or (), use.boxes, strict=True):
            boxes.setdefault(part.source, []).append(at)
    alone = {n: use for n, use in uses.items() if _can_be_tapped(use, leaves, one_weight)}
    spoiled = {
        source
        for source, found in boxes.items()
        if any(not disjoint(a, b) for a, b in combinations(found, 2))
    }
    # A leaf with one use that is not tapped takes its other uses, and their leaves, with it.
    while True:
        spoiled |= {leaf for n, use in uses.items() if n not in alone for leaf in use.sources}
        kept = {n: use for n, use in alone.items() if not use.sources & spoiled}
        if len(kept) == len(alone):
            return kept
        alone = kept


def _can_be_tapped(use: Use, leaves: list[Any], one_weight: bool) -> bool:
    """Whether one weight and one norm do for a use by itself.

    The second pass sums over the batch in the precision of the use, and of whatever lies between
    that and the leaf: it must be single at least, and nothing be multiplied on the way.
    """
    if use.kind is None or not use.kind.tapped or not use.view:
        return False
    shared = any(loop.size > 1 and not loop.stride for part in use.view for loop in part.loops)
    scaled = any(part.scale != 1 for part in use.view)
    dtypes = [use.eqn.outputs[0].dtype, *(leaves[part.source].dtype for part in use.view)]
    half = any(part.half for part in use.view) or min(jnp.finfo(d).bits for d in dtypes) < 32
    # Leaves with weights of their own need uses of their own.
    several = len(use.view) > 1 and not one_weight
    return not (shared or half or several or scaled)


def _certified_norms(
    gradients: list[LeafGradients],
    tapped: Mapping[int, Use],
    seen: Mapping[int, jax.Array],
    count: int,
) -> list[jax.Array]:
    """`[B]` for every leaf, from its slots and its taps."""
    slotted = [leaf.certified_norms(count) for leaf in gradients]
    columns = [
        [column] if leaf.pieces else [] for leaf, column in zip(gradients, slotted, strict=True)
    ]
    for number, use in tapped.items():
        steps = math.prod(use.lengths)
        for column, part in enumerate(use.view or ()):
            # Squares of all steps of the loops, which the backward pass added up.
            norms = rounded_up(jnp.sqrt(seen[number][:, column]), steps // 2 + 1 + ROOT)
            columns[part.source].append(norms)
    return [
        joined_norms(pieces, column.dtype, count) if pieces else column
        for pieces, column in zip(columns, slotted, strict=True)
    ]


def _opened(
    gates: Mapping[int, jax.Array], tapped: Mapping[int, Use], weights: jax.Array
) -> dict[int, jax.Array]:
    """The cotangents of the gates: the weight of each sample in the leaf of the use."""

    def of_use(use: Use, gate: jax.Array) -> jax.Array:
        # Where a use has several leaves, their weights are equal (`tapped_uses`).
        weight = held(weights[:, min(use.sources)].astype(gate.dtype))
        opened = jnp.broadcast_to(weight.reshape(-1, *[1] * (gate.ndim - 1)), gate.shape)
        return vary(opened, varying_axes(gate))

    return {number: of_use(tapped[number], gate) for number, gate in gates.items()}


def _zero_operand(use: Use, leaves: list[Any]) -> jax.Array | InParts:
    """Zeros for the operand of a use, at every step of its loops; in parts if its leaf is."""
    shape, dtype = (*use.lengths, *use.aval.shape), use.aval.dtype
    cut = _cut_of_operand(use, leaves)
    return zeros(shape, dtype, use.aval) if cut is None else InParts.zeros(shape, dtype, cut)


def _cut_of_operand(use: Use, leaves: list[Any]) -> Cut | None:
    """How the operand of a use is cut if its leaf is: known where it shows the whole leaf, axis by
    axis, and each of them once."""
    assert use.view  # or it is not tapped
    part, *others = use.view
    known, axes = part_of(leaves[part.source]), row_major(leaves[part.source].shape)
    whole = part.shape == use.aval.shape and sorted((*part.loops, *part.dims)) == sorted(axes)
    if others or not whole or len({*axes}) < len(axes) or not isinstance(known, InParts):
        return None
    if (axis := axes[known.cut.axis]) not in part.dims:
        return None
    return known.cut._replace(axis=part.dims.index(axis) - len(part.dims))


def _add_to_leaves(
    sums: list[jax.Array], use: Use, total: jax.Array | InParts, leaves: list[Any]
) -> None:
    """Adds Σ_i w_i g_i of the operand of a use, `[*lengths, *operand.shape]`, to the sums of the
    leaves that it shows."""
    assert use.view  # or it is not tapped
    if isinstance(total, InParts):
        # Of the whole leaf, so that no other use adds to its sum.
        part = use.view[0]
        leaf, known = leaves[part.source], part_of(leaves[part.source])
        axes = dict(zip(row_major(leaf.shape), row_major(known.part.shape), strict=True))
        dims = [axes[dim] for dim in (*part.loops, *part.dims)]
        own = total.part.astype(accumulation_dtype(leaf.dtype))
        sums[part.source] = replace(known, part=Target.whole(known.part.shape).place(own, dims))
        return
    steps = (slice(None),) * len(use.lengths)
    for part, at in zip(use.view, use.boxes, strict=True):
        leaf = sums[part.source]
        shown = total[(*steps, *indices(part.window))].astype(leaf.dtype)
        sums[part.source] += Target(at, leaf.shape).place(shown, (*part.loops, *part.dims))


def _tap(
    counts: jax.Array, use: Use, values: list[Any], slot: Any, accumulator: jax.Array
) -> tuple[list[Any], list[Any]]:
    """The outputs of the equation, and its gate. `counts` is whether any sample of the batch does.

    The equation is linear in the parameter, so that with the slot in its place, which is zero, it
    has the same cotangent: that of the slot, and never of the parameter itself.
    """
    slot = parts.slot(slot, counts)
    # The sum and the norm of a pass see the same operand.
    values = [v if n == use.operand else once(v) for n, v in enumerate(values)]
    apart = [jax.lax.stop_gradient(value) for value in values]
    of_sample, of_parameter = list(values), apart
    of_sample[use.operand], of_parameter[use.operand] = apart[use.operand], slot
    output, *rest = use.eqn.bind(of_sample)
    # The gate is made of the accumulator, which is zero, since that is mapped over the samples.
    closed = jnp.sum(jax.lax.stop_gradient(accumulator))
    stored = stored_bits(use.eqn, use.operand)
    precise: dict[str, Any] = {}
    if multiplies(use.eqn):
        # As wide as before, for an equation that takes no others; its product is of fewer bits.
        other = 1 - use.operand
        of_parameter[other] = as_operand(apart[other], stored, held_in=FLOAT32)
        precise = {"precision": (precision_of(stored),) * 2}
    by_slot = use.eqn.bind(of_parameter, **precise)[0]
    by_parameter, gate = _gated(stored, by_slot, closed)
    output = instrument.attach(output, by_parameter)
    operands = instrument.captured(use, values)
    # The second pass has no use for the norms, so that it must not wait for them.
    seen = partial(_norms, use)
    return [instrument.watched(output, operands, accumulator, seen, first=False), *rest], [gate]


def _gated(stored: int, value: jax.Array, gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, unchanged; the cotangent of the value is multiplied by that of the gate, as an operand
    that stores so many bits."""

    @jax.custom_vjp
    def gated(value: jax.Array, gate: jax.Array) -> tuple[jax.Array, jax.Array]:
        return value, gate

    def forward(value: jax.Array, gate: jax.Array) -> Any:
        return (value, gate), None

    def backward(_: None, cotangents: tuple[jax.Array, jax.Array]) -> Any:
        cotangent, weight = cotangents
        operand = as_operand(cotangent, stored, held_in=FLOAT32)
        weighted = operand * weight.astype(operand.dtype)
        return as_operand(weighted, stored, held_in=FLOAT32), None

    gated.defvjp(forward, backward)
    return gated(value, gate)


def _norms(use: Use, operands: list[jax.Array], cotangent: jax.Array) -> jax.Array:
    """Squared norms of the gradients with respect to each part of the operand, `[B, parts]`, at one
    step of the enclosing scans; for a sum that another pass computes."""
    assert use.kind is not None
    columns = []
    for part in use.view or ():
        part = part._replace(loops=())
        target = Target.whole(part.shape)
        record = Record(use.eqn, use.operand, part, target, operands, cotangent)
        norms = cast(Addends, use.kind.factor(record)).certified_norms_elsewhere()
        squares = jnp.square(norms) + lost(2, norms.dtype)
        columns.append(squares.astype(accumulation_dtype(use.aval.dtype)))
    return jnp.stack(columns, axis=1)
