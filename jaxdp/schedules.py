"""Numbers that may be schedules, checked once and read at a step."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

# A number, or a function of the logical step (optax's schedules are such functions).
FloatOrSchedule = ArrayLike | Callable[[jax.Array], ArrayLike]


def checked(name: str, value: FloatOrSchedule, *, zero: bool = False) -> None:
    """Raises unless `value` is a schedule, a traced scalar, or a finite number above zero.

    Args:
      name: of the argument, for the message.
      zero: whether zero is allowed, too.
    """
    if callable(value) or isinstance(value, Tracer):
        return
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be one number or a schedule, got shape {np.shape(value)}")
    number = float(np.asarray(value))
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        rule = "at least 0" if zero else "above 0"
        raise ValueError(f"{name} must be finite and {rule}, got {name}={number}")


def value_at(value: FloatOrSchedule, step: jax.Array) -> jax.Array:
    """The value at a logical step, a float32 scalar."""
    return jnp.asarray(value(step) if callable(value) else value, jnp.float32)
