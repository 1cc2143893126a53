"""Checks of the arguments of losses."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxdp.checks import check_array, check_real
from jaxdp.trees import is_float

_LEAST = 1e-12
_OF_ONE_EXAMPLE = "Give the values of one example, as an array."


def checked_scale(name: str, value: object) -> float:
    """A temperature, a margin or a weight as a float in [1e-12, 1e12]."""
    return check_real(
        name, value, minimum=_LEAST, maximum=1 / _LEAST, advice="Beyond it float32 overflows."
    )


def check_logits(loss: str, logits: Any) -> int:
    """The number of classes K, from logits `[K]` of one example."""
    shape = tuple(jnp.shape(check_array("logits", logits, advice=_OF_ONE_EXAMPLE)))
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(
            f"logits must be the [K] of one example, K at least 2, in {loss}, got shape {shape}. "
            "Map it over further axes (jax.vmap), and use binary_cross_entropy for one logit."
        )
    _check_floating("logits", logits)
    return shape[0]


def _check_floating(name: str, array: Any) -> None:
    if not is_float(array):
        raise TypeError(
            f"{name} must be floating-point numbers, got dtype {jnp.result_type(array)}. "
            "Convert them (astype)."
        )


def checked_label(label: Any, classes: int) -> jax.Array:
    """The label as an int32, or -1 where it is not in 0..K-1."""
    check_array("label", label, advice="Give the class of one example, an integer.")
    dtype, shape = jnp.result_type(label), tuple(jnp.shape(label))
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"label must be one integer, got dtype {dtype}. Convert it (astype), and one-hot "
            "labels with jnp.argmax."
        )
    if shape:
        raise ValueError(
            f"label must be one integer, got shape {shape}. Give one label for each example, and "
            "one-hot labels as jnp.argmax of them."
        )
    if not isinstance(label, Tracer) and not 0 <= int(label) < classes:
        raise ValueError(
            f"label must be in 0..{classes - 1}, got {int(label)}. Count classes from zero, one "
            "logit for each."
        )
    label = jnp.asarray(label)
    if jnp.iinfo(dtype).bits < 32:  # which may not hold the number of classes
        label = label.astype(jnp.int32)
    is_class = (label >= 0) & (label < classes)
    within = jnp.where(is_class, label, jnp.zeros_like(label)).astype(jnp.int32)
    return jnp.where(is_class, within, -1)


def checked_target(loss: str, name: str, array: Any, target_name: str, target: Any) -> jax.Array:
    """The target in the dtype of the prediction."""
    _check_floating(name, check_array(name, array, advice=_OF_ONE_EXAMPLE))
    check_array(target_name, target, advice=_OF_ONE_EXAMPLE)
    shape, other = tuple(jnp.shape(array)), tuple(jnp.shape(target))
    if shape != other:
        raise ValueError(
            f"{target_name} must have the shape of the {name}, {shape}, in {loss}, got shape "
            f"{other}. Give the values of one example."
        )
    dtype = jnp.result_type(target)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{target_name} must be real, got dtype {dtype}. Give its parts apart.")
    return jnp.asarray(target).astype(jnp.result_type(array))
