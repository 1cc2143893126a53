"""The dense lowering: `vmap(grad)`.

It materialises the per-sample gradients. Always right, for any JAX program; the other lowerings
are held against it.
"""

from typing import NamedTuple

import jax

from jaxdp.engine.numerics import once, select_rows
from jaxdp.engine.reduction import Batch, LeafLoss, Reduction, Rows, Weigh, stacked
from jaxdp.engine.sums import row_norms, weighted_sum


def certified_norms(grads: list[jax.Array], mask: jax.Array) -> jax.Array:
    """Certified L2 norms `[b, L]` of per-sample gradients; zero where there is no sample."""
    return select_rows(mask, stacked([row_norms(grad) for grad in grads], mask))


def weighted_sums(grads: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
    """For each leaf Σ_i w_i g_i; a row of weight zero counts for nothing, whatever it holds."""

    def of_leaf(grad: jax.Array, weight: jax.Array) -> jax.Array:
        return weighted_sum(weight, select_rows(weight != 0, grad))

    return [of_leaf(grad, weights[:, leaf]) for leaf, grad in enumerate(grads)]


def reduce_rows(rows: Rows, part: Batch, weigh: Weigh | None) -> Reduction:
    """Norms, then weights, then weighted sums (none without `weigh`) of materialised rows."""
    grads = once(rows.grads)
    norms = certified_norms(grads, part.mask)
    sums = []
    if weigh is not None:
        sums = weighted_sums(grads, weigh.of(norms, part))
    losses = None if rows.losses is None else select_rows(part.mask, rows.losses)
    return Reduction(sums, norms, losses, rows.aux)


class Given(NamedTuple):
    """Per-sample gradients that the caller has materialised already."""

    given: Rows

    def reduce(self, part: Batch, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        return reduce_rows(self.rows(part), part, weigh)

    def rows(self, part: Batch) -> Rows:
        """The gradients as they were given."""
        return self.given


class Dense(NamedTuple):
    """`vmap(grad)` of `loss`."""

    loss: LeafLoss
    leaves: list[jax.Array]

    def reduce(self, part: Batch, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        return reduce_rows(self.rows(part), part, weigh)

    def rows(self, part: Batch) -> Rows:
        """The gradients of every sample."""
        value_and_grad = jax.value_and_grad(self.loss, has_aux=True)
        per_sample = jax.vmap(value_and_grad, in_axes=(None, 0))
        (losses, aux), grads = per_sample(self.leaves, part.examples)
        return Rows(grads, losses, aux)
