"""The clip rule: groups of leaves, thresholds, and how norms become weights.

Every lowering turns norms into weights through `sample_weights`, so that what a sample can
contribute is decided in one place.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.bounded import Groups
from jaxdp.engine.numerics import lost


class ClipRule(NamedTuple):
    """What a clip asks for: each sample's gradient in group k is scaled by `weight(norm, C)[k]`.

    Attributes:
      groups: for each leaf its group; here every leaf has one.
      thresholds: C, a scalar for one group or `[K]`; equals the L2 sensitivity of the sum.
      weight: `(norm, threshold) -> weight` of ONE sample in ONE group: it cannot look at
        another. What it returns is only a wish: `sample_weights` never lets a sample contribute
        more than its threshold.
    """

    groups: Groups
    thresholds: jax.Array
    weight: Callable[[jax.Array, jax.Array], jax.Array]


def group_norms(squared_norms: jax.Array, groups: Groups) -> jax.Array:
    """L2 norms `[B, K]` of the groups, from the squared norms `[B, L]` of the leaves."""
    count = 1 + max(group for group in groups if group is not None)
    squared = [
        sum(squared_norms[:, leaf] for leaf, group in enumerate(groups) if group == k)
        for k in range(count)
    ]
    return jnp.sqrt(jnp.stack(squared, axis=1))


def finite_rows(squared_norms: jax.Array) -> jax.Array:
    """Which samples `[B]` have a finite gradient whose squared norm is finite, too."""
    return jnp.all(jnp.isfinite(squared_norms), axis=1)


def _wish(rule: ClipRule, norms: jax.Array, thresholds: jax.Array) -> jax.Array:
    """`[B, K]`, from norms `[B, K]` and thresholds `[K]`."""
    return jax.vmap(jax.vmap(rule.weight), (0, None))(norms, thresholds)


def sample_weights(rule: ClipRule, squared_norms: jax.Array, sizes: Sequence[int]) -> jax.Array:
    r"""Weights `[B, L]` of every sample in every leaf, from squared norms `[B, L]` and leaf sizes.

    $$ w_{ik} = \min(\max(\mathrm{wish}_{ik}, 0),\; C_k / \lVert g_{ik} \rVert_2) $$

    so that ‖w_ik g_ik‖ ≤ C_k whatever the rule wishes; zero, by selection, for a sample whose
    gradient or wish is not finite in any group.
    """
    norms = group_norms(squared_norms, rule.groups)
    thresholds = jnp.maximum(rule.thresholds, 0).astype(norms.dtype).reshape(-1)
    wish = _wish(rule, norms, jnp.broadcast_to(thresholds, norms.shape[1:]))
    # A square below `tiny` may have been flushed to zero: the cap counts every entry as that much.
    # That of float32, since squares of a float64 leaf may have been computed there.
    missing = jnp.asarray([lost(size, jnp.float32) for size in sizes], norms.dtype)
    largest_norms = group_norms(squared_norms + missing.reshape(1, -1), rule.groups)
    weights = jnp.clip(wish, 0, thresholds.reshape(1, -1) / largest_norms)
    alive = finite_rows(squared_norms) & jnp.all(jnp.isfinite(wish), axis=1)
    weights = jnp.where(alive[:, None], weights, 0)
    return weights[:, jnp.asarray(rule.groups)]
