"""Gradients that are normalised, without a threshold to tune."""

# JAX and optax leave some of their types unknown.
# pyright: reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false

from typing import Any

import jax
import optax

from jaxdp.bounded import Groups
from jaxdp.checks import check_bool
from jaxdp.clipping.base import from_rule, members, one_group_each
from jaxdp.clipping.thresholds import check_threshold, threshold_at, thresholds_at
from jaxdp.engine.weighting import ClipRule
from jaxdp.schedules import FloatOrSchedule, check_number


def clip_automatic(
    threshold: FloatOrSchedule = 1.0, *, stability: float = 0.01, per_layer: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Normalises each sample's gradient instead of clipping it: no threshold to tune.

    $$ \sum_i g_i \frac{C}{\lVert g_i \rVert_2 + \gamma}, \qquad \Delta = C $$

    C only scales the update, so it is absorbed by the learning rate.

    Args:
      threshold: C > 0, a number or a schedule.
      stability: γ > 0, in the unit of the gradients. It keeps the small gradients small.
      per_layer: normalise each leaf by its own norm: Δ = √K·C for K leaves.

    Returns:
      A transformation from per-sample gradients to a `jaxdp.Bounded`.

    Raises:
      ValueError: C or γ is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_automatic(stability=1.0)
      >>> total, _ = tx.update(jnp.array([[3.0], [0.0]]), tx.init(jnp.zeros(1)))
      >>> total.value.round(4).tolist(), float(total.sensitivity)
      ([0.75], 1.0)

    Source: Bu et al. 2023, "Automatic Clipping: Differentially Private Deep Learning Made Easier
    and Stronger", equation 5.5 (AUTO-S).
    """
    check_threshold("threshold", threshold)
    check_number("stability", stability)
    check_bool("per_layer", per_layer, advice="Leave it out for one norm over all leaves.")

    def normalise(norms: jax.Array, thresholds: jax.Array) -> jax.Array:
        return thresholds / (norms + stability)

    def rule(params: Any, groups: Groups, step: jax.Array) -> ClipRule:
        if not per_layer:
            return ClipRule(groups, threshold_at(threshold, step), normalise)
        layers = one_group_each(groups)
        return ClipRule(layers, thresholds_at([threshold] * len(members(layers)), step), normalise)

    return from_rule(rule)
