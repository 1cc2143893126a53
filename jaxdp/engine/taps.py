"""The lowering by taps: norms in one backward pass, weighted sums in a second.

A tap at the output of a site lets the cotangent g through, and gives the squared norm of the
site's gradient as the cotangent of a small accumulator (`engine.instrument`). No g is kept, so
taps work inside loops and rematerialised blocks at the memory of the ordinary gradient. Then one
more backward pass, from the same forward, of Σ_i c_i loss_i. About 4/3 of the operations of the
ordinary gradient.

Only a use whose parameter is used nowhere else is tapped, and not one that a loop shares: norms of
several uses do not add. The others keep slots (`engine.slots`).

Source: Lee and Kifer 2021, "Scaling up Differentially Private Deep Learning with Fast Per-Example
Gradient Clipping" (reweighted second pass).
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine import instrument, views
from jaxdp.engine.assemble import LeafGradients, assemble
from jaxdp.engine.instrument import Taps as TapsAt
from jaxdp.engine.kinds.base import Site, Target
from jaxdp.engine.manual import zeros
from jaxdp.engine.numerics import rounded_down, select_rows
from jaxdp.engine.plan import Plan
from jaxdp.engine.reduction import Batch, Reduction, Rows, Weigh, stacked
from jaxdp.engine.settle import nothing_seen, settle
from jaxdp.engine.sites import Use
from jaxdp.engine.slots import Slots, with_twins, zero_slots


class Taps(NamedTuple):
    """Two backward passes."""

    plan: Plan
    leaves: list[jax.Array]

    def reduce(self, part: Batch, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        start = nothing_seen(self.plan, self.leaves, part.mask, sums=weigh is not None)
        return settle(lambda part: self._reduce(part, weigh), part, start)

    def rows(self, part: Batch) -> Rows:
        """The gradients of every sample."""
        return Slots(self.plan, self.leaves).rows(part)

    def _reduce(self, part: Batch, weigh: Weigh | None) -> Reduction:
        plan, count = self.plan, part.mask.shape[0]
        one_weight = weigh is None or len(set(weigh.groups)) == 1
        tapped = tapped_uses(plan.uses, self.leaves, one_weight=one_weight)
        slotted = {number: use for number, use in plan.uses.items() if number not in tapped}
        second = sorted({part.source for use in tapped.values() for part in use.view or ()})

        def one(
            chosen: list[jax.Array], slots: instrument.Slots, sums: Any, example: Any
        ) -> tuple[jax.Array, Any]:
            args = plan.arguments(self._with(second, chosen), example)
            taps = TapsAt(_watch, sums)
            outputs, captures = instrument.run(plan.program, plan.uses, args, slots, taps)
            loss, aux = plan.outputs(outputs)
            return loss, (captures, aux)

        def batched(chosen: list[jax.Array], slots: instrument.Slots, sums: Any) -> Any:
            in_axes = (None, 0, 0, 0)
            return jax.vmap(one, in_axes)(chosen, slots, sums, part.examples)

        chosen = [self.leaves[index] for index in second]
        start = {
            number: zeros((count, len(use.view or ())), jnp.float32, part.mask)
            for number, use in tapped.items()
        }
        losses, pull_back, (captures, aux) = jax.vjp(
            batched, chosen, zero_slots(slotted, part.mask), start, has_aux=True
        )
        _, cotangents, seen = pull_back(jnp.ones_like(losses))
        cotangents = with_twins(slotted, cotangents)
        gradients = assemble(plan.program, slotted, self.leaves, captures, cotangents)
        squared = stacked(_squared_norms(gradients, tapped, seen, count))
        sums = []
        if weigh is not None:
            weights = select_rows(part.mask, weigh.weights(squared, part.positions))
            sums = [leaf.weighted_sum(weights[:, k]) for k, leaf in enumerate(gradients)]
            if one_weight:
                totals, _, _ = pull_back(rounded_down(weights[:, 0], losses.dtype))
            else:
                totals = self._weighted_pass(part, tapped, second, weights, losses)
            for index, total in zip(second, totals, strict=True):
                sums[index] = total.astype(sums[index].dtype)
        return Reduction(sums, squared, losses, aux)

    def _weighted_pass(
        self,
        part: Batch,
        tapped: Mapping[int, Use],
        second: list[int],
        weights: jax.Array,
        losses: jax.Array,
    ) -> list[jax.Array]:
        """Σ_i w_il g_il for leaves with weights of their own: these enter at each use."""
        plan = self.plan

        def one(chosen: list[jax.Array], weights: jax.Array, example: Any) -> jax.Array:
            args = plan.arguments(self._with(second, chosen), example)
            # Here every tapped use is of one leaf.
            at = {n: weights[leaf] for n, use in tapped.items() for leaf in use.sources}
            taps = TapsAt(_weighted, at)
            outputs, _ = instrument.run(plan.program, tapped, args, {}, taps)
            return plan.outputs(outputs)[0]

        def batched(chosen: list[jax.Array]) -> jax.Array:
            return jax.vmap(one, (None, 0, 0))(chosen, weights, part.examples)

        _, pull_back = jax.vjp(batched, [self.leaves[index] for index in second])
        return pull_back(jnp.ones_like(losses))[0]

    def _with(self, second: list[int], chosen: list[jax.Array]) -> list[jax.Array]:
        leaves = list(self.leaves)
        for index, leaf in zip(second, chosen, strict=True):
            leaves[index] = leaf
        return leaves


def tapped_uses(uses: Mapping[int, Use], leaves: list[Any], *, one_weight: bool) -> dict[int, Use]:
    """The uses whose norms add up: every leaf in them is tapped at all of its uses, none of these
    overlap, and no loop shares them. The second pass has the precision of the operand, which must
    be single at least. Leaves with weights of their own need uses of their own."""
    boxes: dict[int, list[views.Box]] = {}
    alone = dict(uses)
    for number, use in uses.items():
        parts = use.view or ()
        for part in parts:
            at = views.box(part, use.lengths, leaves[part.source].shape)
            assert at is not None, f"{use.eqn.name} at {use.path} is no box of its leaf"
            boxes.setdefault(part.source, []).append(at)
        shared = any(
            length > 1 and not stride
            for part in parts
            for length, stride in zip(use.lengths, part.loops, strict=True)
        )
        half = jnp.finfo(use.aval.dtype).bits < 32
        apart = len(parts) > 1 and not one_weight
        if use.kind is None or not parts or shared or half or apart:
            del alone[number]
    spoiled = {
        source
        for source, found in boxes.items()
        if any(not views.disjoint(a, b) for a, b in combinations(found, 2))
    }
    # A leaf with one use that is not tapped takes its other uses, and their leaves, with it.
    while True:
        spoiled |= {leaf for n, use in uses.items() if n not in alone for leaf in use.sources}
        kept = {n: use for n, use in alone.items() if not use.sources & spoiled}
        if len(kept) == len(alone):
            return kept
        alone = kept


def _squared_norms(
    gradients: list[LeafGradients],
    tapped: Mapping[int, Use],
    seen: Mapping[int, jax.Array],
    count: int,
) -> list[jax.Array]:
    """`[B]` for every leaf, from its slots and its taps."""
    columns = [leaf.squared_norms(count) for leaf in gradients]
    for number, use in tapped.items():
        for column, part in enumerate(use.view or ()):
            columns[part.source] += seen[number][:, column].astype(columns[part.source].dtype)
    return columns


def _watch(use: Use, values: list[Any], accumulator: jax.Array) -> list[Any]:
    """The equation, with its squared norms as the cotangent of the accumulator."""
    operands = jax.tree.map(jax.lax.stop_gradient, instrument.captured(use, values))
    output, *rest = use.eqn.bind(values)

    @jax.custom_vjp
    def tap(output: jax.Array, operands: list[Any], accumulator: jax.Array) -> jax.Array:
        del operands, accumulator
        return output

    def forward(output: jax.Array, operands: list[Any], accumulator: jax.Array) -> Any:
        del accumulator
        return output, operands

    def backward(operands: list[Any], cotangent: jax.Array) -> Any:
        return cotangent, None, _norms_of_one(use, operands, cotangent)

    tap.defvjp(forward, backward)
    return [tap(output, operands, accumulator), *rest]


def _norms_of_one(use: Use, operands: list[Any], cotangent: jax.Array) -> jax.Array:
    """Squared norms of the gradients of one sample with respect to each part of the operand."""

    @jax.custom_batching.custom_vmap
    def norms(operands: list[Any], cotangent: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda array: array[None], (operands, cotangent))
        return _norms(use, *one)[0]

    @norms.def_vmap
    def _(size: int, batched: Any, operands: list[Any], cotangent: jax.Array) -> Any:
        # The kinds know best how to go through a batch.
        def spread(array: jax.Array, is_batched: bool) -> jax.Array:
            return array if is_batched else jnp.broadcast_to(array, (size, *array.shape))

        operands, cotangent = jax.tree.map(spread, (operands, cotangent), tuple(batched))
        return _norms(use, operands, cotangent), True

    return norms(operands, cotangent)


def _norms(use: Use, operands: list[jax.Array], cotangent: jax.Array) -> jax.Array:
    """The same for a batch, `[B, parts]`, at one step of the enclosing scans."""
    assert use.kind is not None
    columns = []
    for part in use.view or ():
        here = part._replace(loops=())
        shape = tuple(dim.size for dim in here.dims)
        target = Target(tuple((0, size) for size in shape), shape)
        site = Site(use.eqn, use.operand, (), operands, cotangent)
        factor = use.kind.factor(site, here, target)
        squared = factor.prepared().squared_norms()
        if factor.method != "outer product":
            # The sum comes from another pass with other rounding errors, so that where terms
            # cancel it may be larger than what is seen here.
            squared += 4 * jnp.finfo(squared.dtype).eps * factor.spread()
        columns.append(squared.astype(jnp.float32))
    return jnp.stack(columns, axis=1)


def _weighted(use: Use, values: list[Any], weight: jax.Array) -> list[Any]:
    """The equation, with the gradient of its parameter scaled by the sample's weight."""
    apart = [jax.lax.stop_gradient(value) for value in values]
    of_sample, of_parameter = list(values), apart
    of_sample[use.operand], of_parameter[use.operand] = apart[use.operand], values[use.operand]
    output, *rest = use.eqn.bind(of_sample)
    return [_weigh_parameter(output, use.eqn.bind(of_parameter)[0], weight), *rest]


@jax.custom_jvp
def _weigh_parameter(output: jax.Array, by_parameter: jax.Array, weight: jax.Array) -> jax.Array:
    del by_parameter, weight
    return output


@_weigh_parameter.defjvp
def _weigh_parameter_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    output, _, weight = primals
    return output, tangents[0] + rounded_down(weight, output.dtype) * tangents[1]
