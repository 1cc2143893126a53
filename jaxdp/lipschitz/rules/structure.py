"""Bound rules of primitives that move entries, and change none of them."""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.rounding import gamma, root_of_squares
from jaxdp.lipschitz.rules.registry import PullBack, register_bound_rule
from jaxdp.lipschitz.value import UNKNOWN, Range, Value, jointly, scaled


@register_bound_rule(
    "reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p",
    "slice", "dynamic_slice", "sharding_constraint", "pvary", "pcast", whole=True, exact=True,
)  # fmt: skip
def _same_entries(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, *where = values
    return [x.range], lambda cotangents: [*cotangents, *(None for _ in where)]


@register_bound_rule("optimization_barrier", "sort", whole=True, exact=True)
def _each_alone(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    # A sort of several operands moves all of them as it orders the first.
    return [value.range for value in values], lambda cotangents: cotangents


@register_bound_rule("stop_gradient", whole=True, exact=True)
def _stop_gradient(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    return [values[0].range], lambda cotangents: [None]


@register_bound_rule("convert_element_type", whole=True)
def _convert(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    if jnp.issubdtype(x.dtype, jnp.floating):
        return [x.range], lambda cotangents: cotangents
    return [x.range], lambda cotangents: [None]


@register_bound_rule("bitcast_convert_type")
def _bits(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    # Random bits may become any number, and have no gradient.
    return [UNKNOWN], lambda cotangents: [None]


@register_bound_rule("broadcast_in_dim", whole=True)
def _broadcast(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x = values[0]
    copies = eqn.outputs[0].size // x.size if x.size else 1
    gain = math.sqrt(copies)
    image = Range(gain * x.norm, x.low, x.high)
    return [image], lambda cotangents: [scaled(cotangents[0], gain * (1 + gamma(copies)))]


@register_bound_rule("concatenate", "stack", whole=True)
def _concatenate(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    return [side_by_side(values)], lambda cotangents: [cotangents[0] for _ in values]


@register_bound_rule("split", "unstack", whole=True)
def _split(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    return [x.range for _ in eqn.outputs], lambda cotangents: [jointly(cotangents)]


@register_bound_rule("pad", whole=True)
def _pad(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, filling = values
    added = max(eqn.outputs[0].size - x.size, 0)
    if any(low < 0 or high < 0 for low, high, _ in eqn.params["padding_config"]):
        added = eqn.outputs[0].size  # entries are cut away, others are added: at most all
    gain = math.sqrt(added)
    norm = root_of_squares(jnp.stack([x.norm, gain * filling.norm]))
    image = Range(norm, jnp.minimum(x.low, filling.low), jnp.maximum(x.high, filling.high))
    filled = gain * (1 + gamma(added))
    return [image], lambda cotangents: [cotangents[0], scaled(cotangents[0], filled)]


@register_bound_rule("dynamic_update_slice", whole=True)
def _update(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, update, *where = values
    image = side_by_side([x, update])
    return [image], lambda cotangents: [cotangents[0], cotangents[0], *(None for _ in where)]


def side_by_side(values: Sequence[Value]) -> Range:
    """The range of several arrays put together into one."""
    if any(value.unknown for value in values):
        return UNKNOWN
    if not values:
        return Range(0, 0, 0)
    norm = root_of_squares(jnp.stack([value.norm for value in values]))
    low = jnp.min(jnp.stack([value.low for value in values]))
    return Range(norm, low, jnp.max(jnp.stack([value.high for value in values])))
