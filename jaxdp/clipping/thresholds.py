"""Thresholds of clips: which are accepted, and between which one moves that adapts."""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxdp.checks import check_real
from jaxdp.schedules import NUMBER_OR_SCHEDULE, FloatOrSchedule, check_schedule, value_at

# Below, sums of weighted gradients would underflow where the norms do not, and a sample add more
# than its threshold: 1.13 times at 1e-18.
SMALLEST_THRESHOLD = 2.0**-40  # 9.1e-13, a number of every precision

# How far an adaptive threshold may go from where it began. Where over half of the gradients vanish,
# their median is zero, and a threshold that followed it there would never come back.
_ADAPTIVE_RANGE = 1e6


def check_threshold(name: str, value: FloatOrSchedule) -> None:
    """Raises unless `value` is a schedule, or a finite number of at least `SMALLEST_THRESHOLD`."""
    if not callable(value) and not isinstance(value, Tracer):
        number = check_real(name, value, above=0, advice=NUMBER_OR_SCHEDULE)
        advice = "Scale the loss up: gradients of that size underflow."
        check_real(name, number, minimum=SMALLEST_THRESHOLD, advice=advice)
    check_schedule(name, value)


def threshold_at(value: FloatOrSchedule, step: jax.Array) -> jax.Array:
    """The threshold of a logical step, float32, at least `SMALLEST_THRESHOLD`; NaN stays."""
    return jnp.maximum(value_at(value, step), SMALLEST_THRESHOLD)


def thresholds_at(thresholds: list[FloatOrSchedule], step: jax.Array) -> jax.Array:
    """Those of a logical step, `[K]`."""
    return jnp.stack([threshold_at(threshold, step) for threshold in thresholds])


def adaptive_limits(initial_threshold: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Between which an adaptive threshold moves that began here: float32, or the dtype of an array.

    Example:
      >>> print(*adaptive_limits(2.0))
      2e-06 2e+06
    """
    initial = jnp.asarray(initial_threshold)
    lowest = jnp.maximum(initial / _ADAPTIVE_RANGE, SMALLEST_THRESHOLD)
    # Without a product that overflows.
    most = float(jnp.finfo(initial.dtype).max) / _ADAPTIVE_RANGE
    return lowest, jnp.maximum(jnp.minimum(initial, most) * _ADAPTIVE_RANGE, lowest)
