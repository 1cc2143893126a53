"""What the engine does with each parameter leaf, and why."""

from collections import Counter
from typing import Any, NamedTuple

import jax

from jaxdp.engine.assemble import LeafGradients
from jaxdp.engine.dense import Dense
from jaxdp.engine.fused import Fused
from jaxdp.engine.lowerings import Choice
from jaxdp.engine.reduction import Batch
from jaxdp.engine.slots import Slots
from jaxdp.engine.taps import Taps, tapped_uses
from jaxdp.engine.uses import Use


class LeafExplanation(NamedTuple):
    """How the gradients of one leaf are computed.

    Attributes:
      leaf: its path in the parameters.
      shape: its shape.
      sites: the operations where it meets the sample, with the loops that hold them.
      method: how its norms are computed.
      flops: floating-point operations of that for the batch, beyond the ordinary gradient.
      bytes: kept for it until the norms are known, of the whole batch; what several leaves share
        counts for each.
      reason: why it is materialised, if it is; else empty.
    """

    leaf: str
    shape: tuple[int, ...]
    sites: str
    method: str
    flops: int
    bytes: int
    reason: str


def explain_leaves(
    choice: Choice, names: list[str], leaves: list[jax.Array], batch: Batch
) -> list[LeafExplanation]:
    """One row for each leaf that has a gradient."""
    lowering = choice.lowering
    if isinstance(lowering, Dense):
        return [_dense(name, leaf, batch) for name, leaf in zip(names, leaves, strict=True)]
    assert isinstance(lowering, Slots | Taps | Fused)
    uses = lowering.plan.uses
    factors, *_ = jax.eval_shape(Slots(lowering.plan, leaves).factors, batch)
    tapped = {}
    if isinstance(lowering, Taps):
        tapped = tapped_uses(uses, leaves, one_weight=True)
    return [
        _leaf(
            names[k],
            gradients,
            [use for use in uses.values() if k in use.sources],
            [use for use in tapped.values() if k in use.sources],
        )
        for k, gradients in enumerate(factors)
    ]


def _leaf(
    name: str, gradients: LeafGradients, uses: list[Use], tapped: list[Use]
) -> LeafExplanation:
    pieces = gradients.pieces
    methods = list(dict.fromkeys(piece.form for piece in pieces)) or ["unused"]
    arrays = [] if tapped else jax.tree.leaves(pieces)
    method = ", ".join(methods)
    return LeafExplanation(
        leaf=name,
        shape=tuple(gradients.leaf.shape),
        sites=", ".join(
            f"{site} ×{count}" if count > 1 else site
            for site, count in Counter(map(_site, uses)).items()
        ),
        method=f"tap: {method}" if tapped else method,
        flops=sum(piece.flops for piece in pieces),
        bytes=sum(array.size * array.dtype.itemsize for array in arrays),
        reason=_reason(uses) if "materialized" in methods else "",
    )


def _site(use: Use) -> str:
    loops = "".join(f" in scan of {length}" for length in use.lengths)
    remat = " in remat" if use.in_remat else ""
    return f"{use.eqn.name}{loops}{remat}"


def _reason(uses: list[Use]) -> str:
    """Why a leaf is materialised."""
    reasons = [f"promoted: {use.reason}" for use in uses if use.kind is None]
    reasons += ["computed from parameters before its use" for use in uses if use.view is None]
    return "; ".join(dict.fromkeys(reasons)) or "uses with no common factored form"


def _dense(name: str, leaf: Any, batch: Batch) -> LeafExplanation:
    size = batch.mask.shape[0] * leaf.size
    return LeafExplanation(
        name,
        tuple(leaf.shape),
        "",
        "materialized",
        2 * size,
        size * leaf.dtype.itemsize,
        "method is dense",
    )
