"""One threshold for the whole gradient."""

# optax leaves some of its types unknown.
# pyright: reportMissingTypeStubs=false

from typing import Any

import jax
import optax

from jaxdp.bounded import Groups
from jaxdp.clipping.base import from_rule, shrink
from jaxdp.clipping.thresholds import check_threshold, threshold_at
from jaxdp.engine.weighting import ClipRule
from jaxdp.schedules import FloatOrSchedule


def clip_flat(threshold: FloatOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Clips each sample's whole gradient to L2 norm C, and sums.

    $$ \sum_i g_i \min(1, C / \lVert g_i \rVert_2), \qquad \Delta = C $$

    Args:
      threshold: C > 0, in the unit of the gradients, or a schedule of the logical step. As large
        as float32 can hold is no clipping, and the release NaN unless σ is zero.

    Returns:
      A transformation from per-sample gradients to a `jaxdp.Bounded` with scalar sensitivity.

    Raises:
      ValueError: C is not finite and at least `SMALLEST_THRESHOLD`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_flat(2.5)
      >>> per_sample = {"w": jnp.array([[3.0, 4.0], [0.0, 0.5]])}
      >>> total, _ = tx.update(per_sample, tx.init({"w": jnp.zeros(2)}))
      >>> total.value["w"].round(4).tolist(), float(total.sensitivity)
      ([1.5, 2.5], 2.5)

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.
    """
    check_threshold("threshold", threshold)

    def rule(params: Any, groups: Groups, step: jax.Array) -> ClipRule:
        return ClipRule(groups, threshold_at(threshold, step), shrink)

    return from_rule(rule)
