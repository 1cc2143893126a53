"""The dense method: `vmap(grad)`.

It materialises the per-sample gradients. Always right, for any JAX program; the other methods are
held against it.
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownMemberType=false

from dataclasses import dataclass
from typing import ClassVar

import jax

from jaxdp.engine.effects import Excuse
from jaxdp.engine.explanation import LeafExplanation
from jaxdp.engine.numerics import once, select_rows
from jaxdp.engine.plan import TracedLoss
from jaxdp.engine.reduction import Batch, LeafLoss, Reduction, Rows, stacked
from jaxdp.engine.sums import row_norms, weighted_sum
from jaxdp.engine.weighting import Weighting


def certified_norms(grads: list[jax.Array], mask: jax.Array) -> jax.Array:
    """Certified L2 norms `[b, L]` of per-sample gradients; zero where there is no sample."""
    return select_rows(mask, stacked([row_norms(grad) for grad in grads], mask))


def weighted_sums(grads: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
    """For each leaf Σ_i w_i g_i; a row of weight zero counts for nothing, whatever it holds."""

    def of_leaf(grad: jax.Array, weight: jax.Array) -> jax.Array:
        return weighted_sum(weight, select_rows(weight != 0, grad))

    return [of_leaf(grad, weights[:, leaf]) for leaf, grad in enumerate(grads)]


def reduce_rows(rows: Rows, batch: Batch, weighting: Weighting | None) -> Reduction:
    """Norms, then weights, then weighted sums (none without `weighting`) of materialised rows."""
    grads = once(rows.grads)
    norms = certified_norms(grads, batch.mask)
    sums = []
    if weighting is not None:
        sums = weighted_sums(grads, weighting.weights(norms, batch))
    losses = None if rows.losses is None else select_rows(batch.mask, rows.losses)
    return Reduction(sums, norms, losses, rows.aux)


class GivenRows:
    """Per-sample gradients that the caller has materialised: `Rows`, in place of the examples."""

    def reduce(self, batch: Batch, weighting: Weighting | None) -> Reduction:
        """Norms, and weighted sums if `weighting` is given."""
        return reduce_rows(self.rows(batch), batch, weighting)

    def rows(self, batch: Batch) -> Rows:
        """The gradients as they were given."""
        return batch.examples


@dataclass(frozen=True)
class Dense:
    """`vmap(grad)` of `loss`."""

    loss: LeafLoss
    leaves: list[jax.Array]

    # JAX runs the loss itself.
    excuses: ClassVar[frozenset[Excuse]] = frozenset({"dense"})

    @property
    def most_at_once(self) -> int | None:
        """Any number: its sums are in blocks."""
        return None

    @classmethod
    def of(cls, traced: TracedLoss) -> "Dense":
        """The method for this loss."""
        return cls(traced.loss, traced.leaves)

    def reduce(self, batch: Batch, weighting: Weighting | None) -> Reduction:
        """Norms, and weighted sums if `weighting` is given."""
        return reduce_rows(self.rows(batch), batch, weighting)

    def rows(self, batch: Batch) -> Rows:
        """The gradients of every sample."""
        value_and_grad = jax.value_and_grad(self.loss, has_aux=True)
        per_sample = jax.vmap(value_and_grad, in_axes=(None, 0))
        (losses, aux), grads = per_sample(self.leaves, batch.examples)
        return Rows(grads, losses, aux)

    def kept_bytes(self, batch: Batch) -> int:
        """The per-sample gradients."""
        count = batch.mask.shape[0]
        return count * sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves)

    def explained(self, names: list[str], batch: Batch) -> list[LeafExplanation]:
        """Every leaf is materialised."""
        count = batch.mask.shape[0]
        return [
            LeafExplanation(
                leaf=name,
                shape=tuple(leaf.shape),
                sites="",
                form="materialized",
                flops=2 * count * leaf.size,
                bytes=count * leaf.size * leaf.dtype.itemsize,
                reason="method is dense",
            )
            for name, leaf in zip(names, self.leaves, strict=True)
        ]
