"""How certified norms become weights: by a clip rule, or as the caller gives them.

Every method asks a `Weighting` for the weights of its rows. A clip goes through `sample_weights`,
so that what a sample can contribute is decided in one place.
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxdp.bounded import Groups
from jaxdp.checks import check_callable, check_integer, shown
from jaxdp.engine.numerics import select_rows
from jaxdp.engine.reduction import Batch
from jaxdp.engine.rounding import ROOT, joint_norm, rounded_up

# Below this a sum of products of float32 numbers that underflow would not be small
# (`engine.factors.gram`).
LEAST_THRESHOLD = 1e-20


class Weighting(Protocol):
    """How the certified norms of some rows become their weights.

    It is a pytree, whose leaves are arrays that all rows have in common, so that it can go to
    wherever the rows are.
    """

    @property
    def groups(self) -> Groups:
        """For each leaf its group: leaves of one group have equal weights."""
        ...

    def weights(self, norms: jax.Array, batch: Batch) -> jax.Array:
        """The weights `[b, L]` of every row in every leaf, from certified norms `[b, L]`. Zero
        where there is no sample, or one whose norm is not known to be finite."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClipRule:
    """What a clip asks for: each sample's gradient in group k is scaled by `weight(norm, C)[k]`.

    A pytree, whose one leaf are the thresholds.

    Attributes:
      groups: for each leaf its group; None for a leaf without gradient, of which the engine sees
        none.
      thresholds: C, a scalar for one group or `[K]`; equals the L2 sensitivity of the sum.
      weight: `(norm, threshold) -> weight` of ONE sample in ONE group: it cannot look at
        another. What it returns is only a wish: `sample_weights` never lets a sample contribute
        more than its threshold.
    """

    groups: Groups = field(metadata={"static": True})
    thresholds: jax.Array
    weight: Callable[[jax.Array, jax.Array], jax.Array] = field(metadata={"static": True})

    def check(self) -> None:
        """Raises unless groups, thresholds and weight fit each other.

        Raises:
          TypeError: a group is no integer; `weight` is no function.
          ValueError: the groups are not 0..K-1 without a gap; there is not one threshold for each.

        Example:
          >>> ClipRule((0, 2), jnp.ones(2), lambda norm, threshold: norm).check()
          Traceback (most recent call last):
          ValueError: groups must be numbered 0, 1, ... without a gap, got (0, 2). ...
        """
        count, shape = check_groups(self.groups), jnp.shape(self.thresholds)
        if shape != (count,) and (shape or count > 1):
            raise ValueError(
                f"thresholds of a ClipRule must hold one number for each of its {count} groups, "
                f"got shape {shape}. Pass an array of {count}, or a scalar for one group."
            )
        advice = "Pass a function of one norm and one threshold."
        check_callable("weight of a ClipRule", self.weight, advice=advice)

    def weights(self, norms: jax.Array, batch: Batch) -> jax.Array:
        """Those of `sample_weights`; zero where there is no sample."""
        return select_rows(batch.mask, sample_weights(self, norms))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GivenWeights:
    """Each row has the weight that the batch holds for it; nothing bounds what it contributes.

    Attributes:
      groups: for each leaf its group.
    """

    groups: Groups = field(metadata={"static": True})

    def weights(self, norms: jax.Array, batch: Batch) -> jax.Array:
        """Those of the batch, in every leaf."""
        assert batch.weights is not None, "a batch without weights"
        counted = select_rows(batch.mask & finite_rows(norms), batch.weights)
        return jnp.broadcast_to(counted[:, None], norms.shape)


def check_groups(groups: Groups) -> int:
    """How many groups there are; raises unless they are 0..K-1, each of at least one leaf."""
    advice = "Number the groups of leaves from 0, and pass None for a leaf without gradient."
    for leaf, group in enumerate(groups):
        if group is not None:
            check_integer(f"groups[{leaf}]", group, minimum=0, advice=advice)
    used = {group for group in groups if group is not None}
    if not used or used != set(range(len(used))):
        raise ValueError(
            f"groups must be numbered 0, 1, ... without a gap, got {shown(groups)}. {advice}"
        )
    return len(used)


def group_norms(norms: jax.Array, groups: Groups) -> jax.Array:
    """Certified L2 norms `[B, K]` of the groups, from those of the leaves `[B, L]`."""
    count = 1 + max(group for group in groups if group is not None)
    members = [[leaf for leaf, group in enumerate(groups) if group == k] for k in range(count)]
    return jnp.stack([joint_norm(norms[:, jnp.asarray(leaves)]) for leaves in members], axis=1)


def finite_rows(norms: jax.Array) -> jax.Array:
    """Which samples `[B]` have gradients whose norms in all leaves are known to be finite."""
    return jnp.all(jnp.isfinite(norms), axis=1)


def _wish(rule: ClipRule, norms: jax.Array, thresholds: jax.Array) -> jax.Array:
    """`[B, K]`, from norms `[B, K]` and thresholds `[K]`."""
    return jax.vmap(jax.vmap(rule.weight), (0, None))(norms, thresholds)


def sample_weights(rule: ClipRule, norms: jax.Array) -> jax.Array:
    r"""Weights `[B, L]` of every sample in every leaf, from certified norms `[B, L]`.

    $$ w_{ik} = \min(\max(\mathrm{wish}_{ik}, 0),\; C_k / N_{ik}) $$

    with the certified norms N of the groups, so that what a sample adds to the sum of a group has
    the norm C_k at most, rounding included, whatever the rule wishes. Zero, by selection, for a
    sample whose gradient or wish is not finite in any group, and where C_k is so small that
    products below the smallest normal number would matter.
    """
    of_groups = group_norms(norms, rule.groups)
    thresholds = jnp.maximum(rule.thresholds, 0).astype(norms.dtype).reshape(-1)
    wish = _wish(rule, of_groups, jnp.broadcast_to(thresholds, of_groups.shape[1:]))
    # The quotient may be rounded up, and so may a threshold that is cast.
    weights = jnp.clip(wish, 0, thresholds.reshape(1, -1) / rounded_up(of_groups, ROOT + 1))
    alive = finite_rows(norms) & jnp.all(jnp.isfinite(wish), axis=1)
    # Not the same as a threshold that is large enough: one that is NaN shows in the sum.
    normal = ~(thresholds < LEAST_THRESHOLD).reshape(1, -1)
    weights = jnp.where(alive[:, None] & normal, weights, 0)
    return weights[:, jnp.asarray(rule.groups)]
