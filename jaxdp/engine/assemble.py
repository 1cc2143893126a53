"""From what each use saw to the gradients of each parameter leaf.

A leaf's gradient is the sum over its uses. Uses of boxes without a common entry are orthogonal:
the squares of their norms add. Uses of the same box are joined into one factor, cross terms
included. Where neither holds the leaf is materialised: norms of overlapping uses never just add.

A penalty on the parameters, which a loss adds to the loss of an example, has one gradient r for all
samples, which is kept apart: ‖g_i + r‖² = ‖g_i‖² + 2⟨g_i, r⟩ + ‖r‖², and
Σ_i w_i (g_i + r) = Σ_i w_i g_i + (Σ_i w_i) r.
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import combinations
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxdp.engine import views, walker
from jaxdp.engine.boxes import Box, Target, disjoint, indices, row_major
from jaxdp.engine.factors.base import Factored, Inner, factored, static
from jaxdp.engine.factors.materialized import Materialized
from jaxdp.engine.factors.scaled import Scaled
from jaxdp.engine.instrument import ByUse, Captures
from jaxdp.engine.kinds.base import Record
from jaxdp.engine.numerics import accumulation_dtype, once, scale_rows, select_rows
from jaxdp.engine.rounding import ROOT, gamma, joint_norm, rounded_up
from jaxdp.engine.sums import row_norms, weighted_sum
from jaxdp.engine.uses import Use, by_path
from jaxdp.engine.views import Part
from jaxdp.engine.walker import Equation, Path, Program

# Cotangents of all results to those of all arguments.
PullBack = Callable[[list[jax.Array]], tuple[list[jax.Array]]]


@factored
class LeafGradients:
    """The gradients of one leaf, in pieces that have no entry in common.

    Attributes:
      pieces: `[B, ...]` each.
      shared: a gradient that every sample has besides, of the leaf's shape, or None.
    """

    pieces: tuple[Factored, ...]
    shared: jax.Array | None
    leaf: jax.ShapeDtypeStruct = static()

    def certified_norms(self, batch_size: int) -> jax.Array:
        """`[B]`: what `weighted_sum` adds for one sample of weight w has the norm w times that at
        most (`Factored.certified_norms`)."""
        pieces = [piece.certified_norms() for piece in self.pieces]
        norms = joined_norms(pieces, accumulation_dtype(self.leaf.dtype), batch_size)
        if self.shared is None:
            return norms
        shared = row_norms(self.shared[None]).astype(norms.dtype)
        # Both sums are rounded once more where they are added, and (Σ w) r as a product is.
        apart = rounded_up(norms + shared, 4)
        if not self.pieces:
            return apart
        inner = reduce(Inner.__add__, [piece.inner(self.shared) for piece in self.pieces])
        return jnp.minimum(apart, _norms_of_sums(norms, shared, inner))

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        """Σ_i w_i g_i, of the leaf's shape."""
        zero = jnp.zeros(self.leaf.shape, accumulation_dtype(self.leaf.dtype))
        sums = [piece.weighted_sum(weights) for piece in self.pieces]
        if self.shared is not None:
            count = weighted_sum(weights, jnp.ones_like(weights))[None]
            # One that is not finite leaves no sample a weight.
            sums.append(select_rows(count != 0, scale_rows(count, self.shared[None]))[0])
        return reduce(jnp.add, [each.astype(zero.dtype) for each in sums]) if sums else zero

    def rows(self, batch_size: int) -> jax.Array:
        """`[B, *leaf.shape]`, in the leaf's own dtype as `vmap(grad)` gives them."""
        zero = jnp.zeros((batch_size, *self.leaf.shape), self.leaf.dtype)
        rows = [piece.rows().astype(zero.dtype) for piece in self.pieces]
        if self.shared is not None:
            rows.append(zero + self.shared.astype(zero.dtype)[None])
        return reduce(jnp.add, rows) if rows else zero


def _norms_of_sums(norms: jax.Array, shared: jax.Array, inner: Inner) -> jax.Array:
    """Certified norms √(‖g‖² + 2⟨g, r⟩ + ‖r‖²) `[B]`; infinite where ⟨g, r⟩ is not known.

    Relative to the larger of ‖g‖ and ‖r‖, each of the three terms is 2 at most, so that their
    rounding, that of quotients included, is γ_{4·ROOT + 8} · 4 at most. Then √ and two products.
    """
    unit = jnp.maximum(norms, shared)
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1)
    values, errors = (each.astype(norms.dtype) / unit / unit for each in inner)
    squares = jnp.square(norms / unit) + 2 * values + jnp.square(shared / unit)
    error = 2 * rounded_up(errors, 2 * ROOT) + 4 * gamma(4 * ROOT + 8, norms.dtype)
    whole = rounded_up(unit * jnp.sqrt(jnp.maximum(squares + error, 0)), ROOT + 8)
    return jnp.where(jnp.isfinite(values) & jnp.isfinite(errors), whole, jnp.inf)


def joined_norms(pieces: Sequence[jax.Array], dtype: Any, batch_size: int) -> jax.Array:
    """Certified norms `[B]` of gradients in pieces without a common entry, from those of the
    pieces; in the dtype in which the leaf's sum accumulates, to which either may be cast."""
    if not pieces:
        return jnp.zeros(batch_size, dtype)
    widest = jnp.result_type(dtype, *pieces)
    whole = joint_norm(jnp.stack([piece.astype(widest) for piece in pieces], axis=-1))
    return rounded_up(whole.astype(dtype), 2)


def assemble(
    program: Program,
    uses: Mapping[int, Use],
    leaves: Sequence[jax.Array],
    captures: Captures,
    cotangents: ByUse,
    formed: Mapping[int, Factored] = MappingProxyType({}),
) -> list[LeafGradients]:
    """The gradients of every leaf, from what a batch left at the uses; those of some may be formed
    already."""
    captures, cotangents = once((captures, cotangents))
    sources = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    owner: dict[int, int] = {}  # of uses that are no views: the source that stands for the operand
    for number, use in uses.items():
        if use.view is None:
            owner[number] = len(sources)
            sources.append(jax.ShapeDtypeStruct(use.aval.shape, use.aval.dtype))

    factors: dict[int, list[Factored]] = {source: [] for source in range(len(sources))}
    for number, use in uses.items():
        view, boxes = use.view, use.boxes
        if view is None:
            view = views.whole(owner[number], use.aval.shape)
            boxes = (Target.whole(use.aval.shape).at,)
        for part, at in zip(view, boxes, strict=True):
            target = Target(at, tuple(sources[part.source].shape))
            if number in formed:
                factor = formed[number]
            else:
                captured = captures.get(number, [])
                factor = factor_of(use, part, target, captured, cotangents[number])
            factors[part.source].append(factor)

    gradients = [
        LeafGradients(_pieces(factors[source]), None, leaf) for source, leaf in enumerate(sources)
    ]
    derived = {number: gradients[source] for number, source in owner.items()}
    direct = gradients[: len(leaves)]
    shared = {n: cotangents[n] for n in derived if uses[n].shared}
    derived = {n: each for n, each in derived.items() if n not in shared}
    if derived:
        direct = _with_derived(program, uses, leaves, direct, derived)
    return _with_shared(program, uses, leaves, direct, shared) if shared else direct


def factor_of(
    use: Use, part: Part, target: Target, captured: list[jax.Array], cotangent: jax.Array
) -> Factored:
    """The gradients with respect to one part of an operand."""
    if use.kind is None:
        values = cotangent[(slice(None), *indices(part.window))]
        factor = Materialized(values, part.dims, target, "materialized")
    else:
        factor = use.kind.factor(Record(use.eqn, use.operand, part, target, captured, cotangent))
    return factor if part.scale == 1 else Scaled(factor, part.scale)


def _pieces(factors: list[Factored]) -> tuple[Factored, ...]:
    """The sum of factors as pieces without a common entry."""
    by_box: dict[Box, Factored | None] = {}
    for factor in factors:
        at = factor.target.at
        if at not in by_box:
            by_box[at] = factor
        elif (first := by_box[at]) is not None:
            by_box[at] = first.join(factor) or factor.join(first)
    overlap = any(not disjoint(a, b) for a, b in combinations(by_box, 2))
    joined = tuple(factor.prepared() for factor in by_box.values() if factor is not None)
    if overlap or len(joined) < len(by_box):
        return (_materialized([factor.rows() for factor in factors]),)
    return joined


def _materialized(rows: Sequence[jax.Array]) -> Materialized:
    """The sum of materialised gradients `[B, *leaf.shape]` of a whole leaf."""
    shape = rows[0].shape[1:]
    total = once(reduce(jnp.add, rows))
    return Materialized(total, row_major(shape), Target.whole(shape), "materialized")


def _with_derived(
    program: Program,
    uses: Mapping[int, Use],
    leaves: Sequence[jax.Array],
    direct: list[LeafGradients],
    derived: Mapping[int, LeafGradients],
) -> list[LeafGradients]:
    """Adds the gradients with respect to values computed from parameters, pulled back to these
    sample by sample."""
    batch_size = jax.tree.leaves(list(derived.values()))[0].shape[0]
    roots, pull_back = _pull_back(program, {n: uses[n] for n in derived}, leaves)
    rows = [gradients.rows(batch_size) for gradients in derived.values()]
    (pulled,) = jax.vmap(pull_back)(rows)
    total = list(direct)
    for root, rows in zip(roots, pulled, strict=True):
        others = [piece.rows().astype(rows.dtype) for piece in direct[root].pieces]
        total[root] = replace(direct[root], pieces=(_materialized([rows, *others]),))
    return total


def _with_shared(
    program: Program,
    uses: Mapping[int, Use],
    leaves: Sequence[jax.Array],
    gradients: list[LeafGradients],
    cotangents: Mapping[int, jax.Array],
) -> list[LeafGradients]:
    """Adds what all samples share: of numbers computed from parameters, whose cotangents `[B]` are
    equal, pulled back to these once."""
    roots, pull_back = _pull_back(program, {n: uses[n] for n in cotangents}, leaves)
    (pulled,) = pull_back([cotangent[0] for cotangent in cotangents.values()])
    total = list(gradients)
    for root, shared in zip(roots, pulled, strict=True):
        total[root] = replace(total[root], shared=once(shared))
    return total


def _pull_back(
    program: Program, uses: Mapping[int, Use], leaves: Sequence[jax.Array]
) -> tuple[list[int], PullBack]:
    """The leaves from which the operands of these uses are computed, and what takes the cotangents
    of the operands to those of the leaves."""
    roots = sorted(frozenset[int]().union(*(use.sources for use in uses.values())))

    def derive(chosen: list[jax.Array]) -> list[jax.Array]:
        merged = list(leaves)
        for root, leaf in zip(roots, chosen, strict=True):
            merged[root] = leaf
        operands = _operands(program, uses, merged)
        return [operands[number] for number in uses]

    return roots, cast(PullBack, jax.vjp(derive, [leaves[root] for root in roots])[1])


def _operands(
    program: Program, uses: Mapping[int, Use], leaves: Sequence[jax.Array]
) -> dict[int, jax.Array]:
    """The operands of these uses, all of them at the top of the program: whatever needs the
    sample is left out."""
    at = by_path(uses)
    operands: dict[int, jax.Array] = {}

    def rule(path: Path, eqn: Equation, values: list[Any]) -> Sequence[Any]:
        if all(value is not None for value in values):
            return eqn.bind(values)
        for number in at.get(path, []):
            operands[number] = values[uses[number].operand]
        return [None] * len(eqn.outputs)

    sample = [None] * (len(program.inputs) - len(leaves))
    walker.evaluate(program, [*leaves, *sample], rule)
    return operands
