"""What the engine does with each parameter leaf, and why."""

from collections import Counter
from typing import NamedTuple

import jax

from jaxdp.engine.assemble import LeafGradients
from jaxdp.engine.uses import Use


class LeafExplanation(NamedTuple):
    """How the gradients of one leaf are computed.

    Attributes:
      leaf: its path in the parameters.
      shape: its shape.
      sites: the operations where it meets the sample, with the loops that hold them.
      form: of its gradients, which its norms are computed from.
      flops: floating-point operations of that for the batch, beyond the ordinary gradient.
      bytes: kept for it until the norms are known, of the whole batch; what several leaves share
        counts for each.
      reason: why it is materialised, if it is; else empty.
    """

    leaf: str
    shape: tuple[int, ...]
    sites: str
    form: str
    flops: int
    bytes: int
    reason: str


def explain_leaf(
    name: str, gradients: LeafGradients, uses: list[Use], *, tapped: bool
) -> LeafExplanation:
    """The row of one leaf whose gradients are kept as factors.

    Args:
      name: of the leaf.
      gradients: shapes of its factors.
      uses: those of the leaf.
      tapped: whether its factors are not kept (`methods.taps`).
    """
    pieces = gradients.pieces
    forms = list(dict.fromkeys(piece.form for piece in pieces))
    if gradients.shared is not None:
        forms.append("one gradient for all samples")
    forms = forms or ["unused"]
    arrays = [] if tapped else jax.tree.leaves(pieces)
    form = ", ".join(forms)
    return LeafExplanation(
        leaf=name,
        shape=tuple(gradients.leaf.shape),
        sites=", ".join(
            f"{site} ×{count}" if count > 1 else site
            for site, count in Counter(map(_site, uses)).items()
        ),
        form=f"tap: {form}" if tapped else form,
        flops=sum(piece.flops for piece in pieces),
        bytes=sum(array.size * array.dtype.itemsize for array in arrays),
        reason=_reason(uses) if "materialized" in forms else "",
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
