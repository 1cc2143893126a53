"""Bound rules of sums and extrema, over axes and over windows."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.operator_norm import patch_multiplicity
from jaxdp.lipschitz.rounding import gamma, up
from jaxdp.lipschitz.rules.registry import PullBack, register_bound_rule
from jaxdp.lipschitz.value import Range, Value, scaled


@register_bound_rule("reduce_sum", whole=True)
def _sum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    count = x.size // max(eqn.outputs[0].size, 1)
    gain = math.sqrt(count)
    image = Range(up(gain * x.norm, count), -_most(-x.low, count), _most(x.high, count))
    return [image], lambda cotangents: [scaled(cotangents[0], gain)]


def _most(high: jax.Array, count: int) -> jax.Array:
    """A bound on the sum of `count` entries, none of which is above `high`. Where `high` is below
    zero, so are all partial sums, and rounding takes a share of it."""
    return count * high * jnp.where(high > 0, 1 + gamma(count), 1 - gamma(count))


@register_bound_rule("reduce_max", "reduce_min", exact=True)
def _extremum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    # Between entries that are equal the cotangent is divided.
    return [values[0].range], lambda cotangents: cotangents


@register_bound_rule("cumsum", whole=True)
def _cumulative_sum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    length = x.shape[eqn.params["axis"]]
    gain = math.sqrt(length * (length + 1) / 2)  # Frobenius norm of a triangle of ones
    gain *= 1 + gamma(length)
    return [Range(gain * x.norm)], lambda cotangents: [scaled(cotangents[0], gain)]


@register_bound_rule("reduce_window_sum", whole=True)
def _window_sum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    window = math.prod(eqn.params["window_dimensions"])
    gain = math.sqrt(window * _multiplicity(eqn)) * (1 + gamma(window))
    return [Range(gain * x.norm)], lambda cotangents: [scaled(cotangents[0], gain)]


@register_bound_rule("reduce_window_max", "reduce_window_min")
def _window_extremum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    pads = [max(pair) for pair in eqn.params["padding"]]
    windows = zip(pads, eqn.params["window_dimensions"], strict=True)
    holes = any(gap > 1 for gap in eqn.params["window_dilation"]) and any(pads)
    if (
        holes
        or any(gap > 1 for gap in eqn.params["base_dilation"])
        or any(pad >= width for pad, width in windows)
    ):
        raise NotImplementedError(
            f"no bound is known for {eqn.name} with windows that may lie in the padding alone "
            f"({eqn.source}). Pad by less than the window, without dilation."
        )
    gain = math.sqrt(_multiplicity(eqn)) * (1 + gamma(_multiplicity(eqn)))
    return [Range(gain * x.norm, x.low, x.high)], lambda cotangents: [scaled(cotangents[0], gain)]


def _multiplicity(eqn: Equation) -> int:
    """The largest number of windows that an entry lies in."""
    names = ("window_dimensions", "window_strides", "window_dilation")
    window, strides, dilation = (eqn.params[name] for name in names)
    return patch_multiplicity(window, strides, dilation, eqn.outputs[0].shape)
