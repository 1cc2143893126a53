"""One threshold for all leaves that carry a label."""

# optax leaves some of its types unknown.
# pyright: reportMissingTypeStubs=false

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxdp.bounded import Groups
from jaxdp.checks import check_instance, shown
from jaxdp.clipping.base import from_rule, shrink
from jaxdp.clipping.thresholds import check_threshold, thresholds_at
from jaxdp.engine.weighting import ClipRule
from jaxdp.schedules import FloatOrSchedule
from jaxdp.trees import prefix_leaves


def clip_by_group(
    labels: Any, thresholds: Mapping[Any, FloatOrSchedule]
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each sample's gradient group by group, and sums.

    $$ \sum_i g_{ik} \min(1, C_k / \lVert g_{ik} \rVert_2), \qquad
       \Delta = (\textstyle\sum_k C_k^2)^{1/2} $$

    with g_ik the joint gradient of all leaves of group k.

    Args:
      labels: pytree prefix of the parameters whose leaves are labels, or a function from the
        parameters to one (as in `optax.partition`).
      thresholds: label -> C_k > 0, a number or a schedule. Groups keep this order.

    Returns:
      A transformation from per-sample gradients to a `jaxdp.Bounded` with sensitivity `[K]`.

    Raises:
      ValueError: a threshold is not positive and finite, a label has none, or none of the leaves
        that have a gradient carries a label that has one.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_by_group({"body": "slow", "head": "fast"}, {"slow": 0.25, "fast": 1.0})
      >>> params = {"body": {"b": jnp.zeros(1), "w": jnp.zeros(2)}, "head": jnp.zeros(2)}
      >>> per_sample = jax.tree.map(lambda p: jnp.ones((4, *p.shape)), params)
      >>> total, _ = tx.update(per_sample, tx.init(params))
      >>> total.groups, total.sensitivity.tolist()
      ((0, 0, 1), [0.25, 1.0])

    Source: McMahan et al. 2018, "A General Approach to Adding Differential Privacy to Iterative
    Training Procedures", section 2.
    """
    advice = "Pass a threshold for each label."
    check_instance("thresholds", thresholds, Mapping, advice=advice)
    if not thresholds:
        raise ValueError(f"thresholds must hold at least one label, got {{}}. {advice}")
    for label, value in thresholds.items():
        check_threshold(f"thresholds[{shown(label)}]", value)
    names = list(thresholds)

    def rule(params: Any, groups: Groups, step: jax.Array) -> ClipRule:
        tree = labels(params) if callable(labels) else labels
        leaf_labels = prefix_leaves("labels", tree, params)
        unknown = {label for label in leaf_labels if label not in thresholds}
        if unknown:
            raise ValueError(
                f"thresholds must hold every label, got labels {sorted(map(repr, unknown))} "
                f"without one; known: {sorted(map(repr, names))}. {advice}"
            )
        merged = tuple(
            None if group is None else names.index(label)
            for label, group in zip(leaf_labels, groups, strict=True)
        )
        unused = [names[k] for k in range(len(names)) if k not in merged]
        if unused:
            raise ValueError(
                f"every threshold must guard a leaf that has a gradient, got {unused}, which guard "
                "none and would only add noise. Remove them."
            )
        return ClipRule(merged, thresholds_at([thresholds[name] for name in names], step), shrink)

    return from_rule(rule)
