"""Bound rules of matrix products and convolutions."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.operator_norm import convolution_norm, matrix_norm, patch_multiplicity
from jaxdp.lipschitz.rounding import product, times
from jaxdp.lipschitz.rules.registry import PullBack, register_bound_rule
from jaxdp.lipschitz.value import INFINITE, Cotangent, Range, Value, scaled


@register_bound_rule("dot_general", whole=True)
def _dot(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, y = values
    (contract_x, contract_y), (batch_x, batch_y) = eqn.params["dimension_numbers"]
    gain_x = _gain(x, contract_x, batch_x)
    gain_y = _gain(y, contract_y, batch_y)
    terms, precision = _size(x, contract_x), eqn.params["precision"]
    rounded = product(terms, precision)
    norm = jnp.minimum(
        times(x.norm, gain_y + times(rounded, y.norm)),
        times(y.norm, gain_x + times(rounded, x.norm)),
    )

    def back(bound: Cotangent, gain: jax.Array, other: Value, summed: Sequence[int]) -> Cotangent:
        """The bound on the cotangent times the other operand, summed over the free axes of that."""
        # Entry by entry a product is off in proportion to the product of absolute values, whose
        # norm is at most that of all entries.
        if bound is not None and other.unknown:
            return INFINITE
        off = product(
            _size(other, [k for k in range(len(other.shape)) if k not in summed]), precision
        )
        return scaled(bound, gain + times(off, other.norm))

    def pull_back(cotangents: Sequence[Cotangent]) -> Sequence[Cotangent]:
        (bound,) = cotangents
        return [
            back(bound, gain_y, y, (*contract_y, *batch_y)),
            back(bound, gain_x, x, (*contract_x, *batch_x)),
        ]

    return [Range(norm)], pull_back


def _size(value: Value, axes: Sequence[int]) -> int:
    return math.prod(value.shape[axis] for axis in axes)


def _gain(value: Value, contract: Sequence[int], batch: Sequence[int]) -> jax.Array:
    """The factor by which a product with this matrix lengthens the other operand or a cotangent."""
    array = value.array
    if array is None:
        return value.norm  # the Frobenius norm bounds the operator norm
    free = [axis for axis in range(len(value.shape)) if axis not in {*contract, *batch}]
    sizes = [math.prod(value.shape[axis] for axis in axes) for axes in (batch, contract, free)]

    def largest() -> jax.Array:
        matrix = array.transpose(*batch, *contract, *free).reshape(sizes)
        return matrix_norm(matrix).max(initial=0.0)

    return value.once((tuple(contract), tuple(batch)), largest)


@register_bound_rule("conv_general_dilated", whole=True)
def _convolution(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, kernel = values
    if kernel.array is None or eqn.params["batch_group_count"] != 1:
        raise NotImplementedError(
            f"no bound is known for a convolution with a kernel that depends on the example "
            f"({eqn.source}). Clip instead (jaxdp.clip_flat)."
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

    # The convolution with absolute values, to whose results it is rounded in proportion, is a
    # product of the kernel with all patches, which are √m times as long as the image.
    sizes = times(patches, kernel.norm)
    precision = eqn.params["precision"]
    terms = math.prod(window) * kernel.shape[axes[1]]
    outputs = math.prod(window) * kernel.shape[axes[0]]
    forward = norm + times(product(terms, precision), sizes)
    backward = norm + times(product(outputs, precision), sizes)
    over_positions = patches * (1 + product(math.prod(positions), precision))

    def pull_back(cotangents: Sequence[Cotangent]) -> Sequence[Cotangent]:
        (bound,) = cotangents
        return [scaled(bound, backward), scaled(bound, x.norm, over_positions)]

    return [Range(times(x.norm, forward))], pull_back
