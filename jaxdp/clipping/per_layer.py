"""One threshold for each leaf."""

# JAX and optax leave some of their types unknown.
# pyright: reportMissingTypeStubs=false
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from typing import Any

import jax
import optax

from jaxdp.bounded import Groups
from jaxdp.clipping.base import from_rule, one_group_each, shrink
from jaxdp.clipping.thresholds import check_threshold, thresholds_at
from jaxdp.engine.weighting import ClipRule
from jaxdp.schedules import FloatOrSchedule
from jaxdp.trees import prefix_leaves


def clip_per_layer(threshold: Any) -> optax.GradientTransformationExtraArgs:
    r"""Clips each sample's gradient leaf by leaf, and sums.

    $$ \sum_i g_{ik} \min(1, C_k / \lVert g_{ik} \rVert_2), \qquad
       \Delta = (\textstyle\sum_k C_k^2)^{1/2} $$

    Args:
      threshold: C_k > 0. One number (or schedule) is given to EACH of the K leaves, so Δ = √K·C;
        pass C/√K to keep the total at C. Else a pytree prefix of the parameters, whose number on a
        subtree holds for each of its leaves, or a flat list of K numbers in the order of
        `jax.tree.leaves(params)`. Integer and frozen leaves need a place there, but count for
        nothing.

    Returns:
      A transformation from per-sample gradients to a `jaxdp.Bounded` with sensitivity `[K]`.

    Raises:
      ValueError: a threshold is not positive and finite; the structure does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_per_layer({"b": 0.5, "w": 2.0})
      >>> per_sample = {"b": jnp.array([[1.0]]), "w": jnp.array([[0.0, 3.0]])}
      >>> total, _ = tx.update(per_sample, tx.init({"b": jnp.zeros(1), "w": jnp.zeros(2)}))
      >>> {name: leaf.round(4).tolist() for name, leaf in total.value.items()}
      {'b': [0.5], 'w': [0.0, 2.0]}
      >>> total.sensitivity.tolist()
      [0.5, 2.0]

    Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models",
    section 3 (per-layer clipping).
    """
    for value in jax.tree.leaves(threshold):
        check_threshold("threshold", value)

    def rule(params: Any, groups: Groups, step: jax.Array) -> ClipRule:
        values = _leaf_thresholds(threshold, params)
        kept = [value for value, group in zip(values, groups, strict=True) if group is not None]
        return ClipRule(one_group_each(groups), thresholds_at(kept, step), shrink)

    return from_rule(rule)


def _leaf_thresholds(threshold: Any, params: Any) -> list[FloatOrSchedule]:
    """One threshold for each leaf, from a number, a prefix tree or a flat list."""
    leaves = jax.tree.structure(params).num_leaves
    if isinstance(threshold, list | tuple) and not isinstance(params, type(threshold)):
        if len(threshold) != leaves:
            raise ValueError(
                f"threshold must hold one number for each of the {leaves} leaves of the "
                f"parameters, got {len(threshold)}. Pass one for each, or one number for all."
            )
        return list(threshold)
    return prefix_leaves("threshold", threshold, params)
