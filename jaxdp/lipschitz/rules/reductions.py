"""Sums and extrema, over axes and over windows."""

import math
from collections.abc import Sequence

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.operator_norm import patch_multiplicity
from jaxdp.lipschitz.rules.registry import PullBack, register_bound_rule
from jaxdp.lipschitz.value import Range, Value, scaled


@register_bound_rule("reduce_sum")
def _sum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    count = x.size // max(eqn.outputs[0].size, 1)
    gain = math.sqrt(count)
    image = Range(gain * x.norm, count * x.low, count * x.high)
    return [image], lambda cotangents: [scaled(cotangents[0], gain)]


@register_bound_rule("reduce_max", "reduce_min")
def _extremum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    # Between entries that are equal the cotangent is divided.
    return [values[0].range], lambda cotangents: cotangents


@register_bound_rule("cumsum")
def _cumulative_sum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    length = x.shape[eqn.params["axis"]]
    gain = math.sqrt(length * (length + 1) / 2)  # Frobenius norm of a triangle of ones
    return [Range(gain * x.norm)], lambda cotangents: [scaled(cotangents[0], gain)]


@register_bound_rule("reduce_window_sum")
def _window_sum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    gain = math.sqrt(math.prod(eqn.params["window_dimensions"]) * _multiplicity(eqn))
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
            f"({eqn.source}): pad by less than the window, without dilation"
        )
    gain = math.sqrt(_multiplicity(eqn))
    return [Range(gain * x.norm, x.low, x.high)], lambda cotangents: [scaled(cotangents[0], gain)]


def _multiplicity(eqn: Equation) -> int:
    """In how many windows an entry lies, at most."""
    names = ("window_dimensions", "window_strides", "window_dilation")
    window, strides, dilation = (eqn.params[name] for name in names)
    return patch_multiplicity(window, strides, dilation, eqn.outputs[0].shape)
