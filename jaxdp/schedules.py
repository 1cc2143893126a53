"""Numbers that may be schedules, checked once and read at a step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxdp.checks import check_real

# A number, or a function of the logical step (optax's schedules are such functions).
FloatOrSchedule = ArrayLike | Callable[[jax.Array], ArrayLike]

NUMBER_OR_SCHEDULE = "Pass one number, or a schedule: a function of the step."
"""The advice for an argument that is neither."""

# A step computes in float32.
_SMALLEST, _LARGEST = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max)


def check_schedule(name: str, value: FloatOrSchedule, *, zero: bool = False) -> None:
    """Raises unless `value` is a schedule, or passes `check_number`.

    Args:
      name: the argument's name, for the message.
      value: a number, or a function of the step.
      zero: whether zero is allowed, too.

    Raises:
      TypeError: the value is neither a number nor a function, or it is an array with axes or a
        bool.
      ValueError: the number is negative, zero where that is not allowed, or no normal float32.
    """
    if not callable(value):
        check_number(name, value, zero=zero, advice=NUMBER_OR_SCHEDULE)


def check_number(
    name: str, value: ArrayLike, *, zero: bool = False, advice: str = "Pass one number."
) -> float | Tracer:
    """Returns `value` as a float, or as the traced scalar that it is; raises unless it is finite
    and above zero.

    Args:
      name: the argument's name, for the message.
      value: a Python or NumPy number, or an array of no axes.
      zero: whether zero is allowed, too.
      advice: one sentence on what to do next.

    Raises:
      TypeError: the value is no number, or it is an array with axes or a bool.
      ValueError: the number is negative, zero where that is not allowed, or no normal float32.
    """
    if isinstance(value, Tracer) and value.ndim == 0:
        return value
    if zero:
        number = check_real(name, value, minimum=0, advice=advice)
    else:
        number = check_real(name, value, above=0, advice=advice)
    if number > 0:  # beyond these it would be infinite at a step, or zero
        check_real(name, number, minimum=_SMALLEST, maximum=_LARGEST, advice=advice)
    return number


def value_at(value: FloatOrSchedule, step: jax.Array) -> jax.Array:
    """The value of a number or a schedule at a logical step, a float32 scalar."""
    return jnp.asarray(value(step) if callable(value) else value, jnp.float32)
