"""Matrix products and convolutions."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.operator_norm import convolution_norm, matrix_norm, patch_multiplicity
from jaxdp.lipschitz.rules.registry import PullBack, register_bound_rule
from jaxdp.lipschitz.value import Cotangent, Range, Value, scaled


@register_bound_rule("dot_general")
def _dot(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, y = values
    (contract_x, contract_y), (batch_x, batch_y) = eqn.params["dimension_numbers"]
    gain_x = _gain(x, contract_x, batch_x)
    gain_y = _gain(y, contract_y, batch_y)
    norm = jnp.minimum(x.norm * gain_y, y.norm * gain_x)

    def pull_back(cotangents: Sequence[Cotangent]) -> Sequence[Cotangent]:
        return [scaled(cotangents[0], gain_y), scaled(cotangents[0], gain_x)]

    return [Range(norm)], pull_back


def _gain(value: Value, contract: Sequence[int], batch: Sequence[int]) -> jax.Array:
    """By how much a product with this matrix lengthens the other one, or a cotangent."""
    array = value.array
    if array is None:
        return value.norm  # the Frobenius norm bounds the operator norm
    free = [axis for axis in range(len(value.shape)) if axis not in {*contract, *batch}]
    sizes = [math.prod(value.shape[axis] for axis in axes) for axes in (batch, contract, free)]

    def largest() -> jax.Array:
        matrix = array.transpose(*batch, *contract, *free).reshape(sizes)
        return matrix_norm(matrix).max(initial=0.0)

    return value.once((tuple(contract), tuple(batch)), largest)


@register_bound_rule("conv_general_dilated")
def _convolution(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, kernel = values
    if kernel.array is None or eqn.params["batch_group_count"] != 1:
        raise NotImplementedError(
            f"no bound is known for a convolution with a kernel that depends on the example "
            f"({eqn.source}): clip instead (jaxdp.clip_flat)"
        )
    _, axes, out_axes = eqn.params["dimension_numbers"]
    stride, dilation = eqn.params["window_strides"], eqn.params["rhs_dilation"]
    window = [kernel.shape[axis] for axis in axes[2:]]
    positions = [eqn.outputs[0].shape[axis] for axis in out_axes[2:]]
    # Zeros between the entries of the input lengthen nothing, but leave no stride to account for.
    spread = any(gap > 1 for gap in eqn.params["lhs_dilation"])
    steps = (1,) * len(window) if spread else tuple(stride)
    ordered = kernel.array.transpose(*axes[2:], axes[1], axes[0])
    norm = convolution_norm(ordered, steps, tuple(dilation), eqn.params["feature_group_count"])
    patches = math.sqrt(patch_multiplicity(window, stride, dilation, positions))

    def pull_back(cotangents: Sequence[Cotangent]) -> Sequence[Cotangent]:
        return [scaled(cotangents[0], norm), scaled(cotangents[0], patches * x.norm)]

    return [Range(x.norm * norm)], pull_back
