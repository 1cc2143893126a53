"""Convolutions: `conv_general_dilated` with any stride, padding, dilation, groups and layout.

The gradients are those of `engine.factors.patches`. With a window of one pixel there are no patches
to form, and it is the product of `engine.factors.outer`.
"""

import math

import jax
import jax.numpy as jnp

from jaxdp.engine.boxes import distinct, split_loops
from jaxdp.engine.factors.geometry import Geometry, ImageAxes, Window
from jaxdp.engine.factors.outer import Layout, MatrixDims, OuterProducts, Product
from jaxdp.engine.factors.patches import Patches
from jaxdp.engine.kinds.base import Record, refuse_repeats, stored_bits
from jaxdp.engine.views import Part, View
from jaxdp.engine.walker import Equation


class Convolution:
    """`conv_general_dilated` of an image and a kernel."""

    tapped = True

    def refuse(self, eqn: Equation, operand: int, view: View | None) -> str:
        if operand != 1:
            return "a parameter as the image of a convolution"
        if eqn.params["batch_group_count"] != 1:
            return "a convolution with batch groups"
        if 0 in eqn.outputs[0].shape:
            return "a convolution without output"
        if view is None:
            return ""
        if len(view) != 1 or view[0].shape != tuple(eqn.operands[1].shape):
            return "a concatenated kernel"
        return refuse_repeats(view)

    def captures(self, eqn: Equation, operand: int) -> tuple[int, ...]:
        return (0,)

    def factor(self, record: Record) -> Patches | OuterProducts:
        geometry, part = _geometry(record.eqn), record.part

        def channels_last(array: jax.Array, axes: ImageAxes) -> jax.Array:
            array = split_loops(array, part.loops)
            array = jnp.transpose(array, (0, 1, 2, *(3 + axis for axis in axes.to_last)))
            return jax.lax.collapse(array, 2, 4)

        patches = Patches(
            images=channels_last(record.captured[0], geometry.image),
            cotangents=channels_last(record.cotangent, geometry.output),
            geometry=geometry,
            slices=distinct(part.loops),
            dims=part.dims,
            stored=stored_bits(record.eqn, record.operand),
            target=record.target,
        )
        pointwise = math.prod(patches.window.sizes) == 1 and patches.groups == 1
        return _products(patches, part) if pointwise and not patches.slices else patches


def _products(patches: Patches, part: Part) -> OuterProducts:
    """A convolution whose window is one pixel, as the matrix product that it is."""
    kernel, window = patches.geometry.kernel, patches.window
    images = window.padded(patches.images[:, 0])
    pixels = window.under((0,) * len(window.sizes), images, first_axis=2)
    channels = pixels.ndim - 2  # without the axis of samples
    layout = Layout(
        batch=(),
        contract=((kernel.features, channels),),
        shared=tuple((axis, axis) for axis in range(channels)),
        free=((kernel.batch, channels),),
    )
    cotangents = patches.cotangents[:, 0]
    product = Product(pixels, cotangents, layout, part.window, (), patches.stored, turned=False)
    dims = MatrixDims((), (part.dims[kernel.features],), (part.dims[kernel.batch],))
    return OuterProducts((product,), dims, patches.target)


def _geometry(eqn: Equation) -> Geometry:
    """What a convolution does."""
    params = eqn.params
    image, kernel, output = (
        ImageAxes(spec[0], spec[1], tuple(spec[2:])) for spec in params["dimension_numbers"]
    )
    window = Window(
        sizes=tuple(eqn.operands[1].shape[axis] for axis in kernel.spatial),
        strides=tuple(params["window_strides"]),
        padding=tuple(params["padding"]),
        image_dilation=tuple(params["lhs_dilation"]),
        window_dilation=tuple(params["rhs_dilation"]),
        outputs=tuple(eqn.outputs[0].shape[axis] for axis in output.spatial),
    )
    return Geometry(window, params["feature_group_count"], image, kernel, output)
