"""What a convolution does: how its window runs over images, and where arrays have their axes."""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import ConvDimensionNumbers, Precision

from jaxdp.engine.numerics import accumulation_dtype
from jaxdp.engine.precision import precision_of


class Window(NamedTuple):
    """How a convolution reads images `[..., *spatial, channels]`."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    image_dilation: tuple[int, ...]
    window_dilation: tuple[int, ...]
    outputs: tuple[int, ...]  # number of positions along each spatial axis

    def padded(self, images: jax.Array) -> jax.Array:
        """The images as the window runs over them; negative padding cuts."""
        edges = zip(self.padding, self.image_dilation, strict=True)
        config = [(low, high, step - 1) for (low, high), step in edges]
        lead = images.ndim - len(config) - 1
        config = [(0, 0, 0)] * lead + config + [(0, 0, 0)]
        return jax.lax.pad(images, jnp.zeros((), images.dtype), config)

    def offsets(self) -> list[tuple[int, ...]]:
        """Of the entries of the window from its first one, in pixels."""
        steps = zip(self.sizes, self.window_dilation, strict=True)
        return list(product(*(range(0, size * step, step) for size, step in steps)))

    def under(self, offset: tuple[int, ...], images: jax.Array, *, first_axis: int) -> jax.Array:
        """What of padded images (spatial axes from `first_axis`) lies under one entry of the
        window at the output positions."""
        starts, limits, strides = [0] * images.ndim, list(images.shape), [1] * images.ndim
        for k, (start, count) in enumerate(zip(offset, self.outputs, strict=True)):
            axis = first_axis + k
            starts[axis], strides[axis] = start, self.strides[k]
            limits[axis] = start + (count - 1) * self.strides[k] + 1
        return jax.lax.slice(images, starts, limits, strides)


class ImageAxes(NamedTuple):
    """Where one array of a convolution has its axes; for a kernel these are outputs and inputs."""

    batch: int
    features: int
    spatial: tuple[int, ...]

    @property
    def to_last(self) -> tuple[int, ...]:
        """Transposes into (batch, *spatial, features)."""
        return (self.batch, *self.spatial, self.features)

    @property
    def from_last(self) -> tuple[int, ...]:
        """Transposes back."""
        order = self.to_last
        return tuple(order.index(axis) for axis in range(len(order)))

    @property
    def spec(self) -> tuple[int, ...]:
        """As JAX writes it."""
        return (self.batch, self.features, *self.spatial)


class Geometry(NamedTuple):
    """What a convolution does.

    Attributes:
      window: how it reads the images.
      groups: number of groups of features that do not mix.
      image, kernel, output: their axes.
    """

    window: Window
    groups: int
    image: ImageAxes
    kernel: ImageAxes
    output: ImageAxes

    def convolve(self, images: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
        """From images and to outputs `[N, *spatial, features]`."""
        window = self.window
        output = jax.lax.conv_general_dilated(
            jnp.transpose(images, self.image.from_last),
            kernel,
            window_strides=window.strides,
            padding=window.padding,
            lhs_dilation=window.image_dilation,
            rhs_dilation=window.window_dilation,
            dimension_numbers=ConvDimensionNumbers(
                self.image.spec, self.kernel.spec, self.output.spec
            ),
            feature_group_count=self.groups,
            precision=precision,
        )
        return jnp.transpose(output, self.output.to_last)

    def kernel_gradient(
        self, images: jax.Array, cotangents: jax.Array, stored: int
    ) -> jax.Array:
        """The gradient with respect to the kernel, summed over images and outputs `[N, *spatial,
        features]`, in float32 at least; operands store so many bits.

        It is a convolution itself, of images with the cotangents as a kernel, in which samples are
        channels and channels are samples, strides are dilations and dilations are strides.
        """
        window = self.window
        steps = zip(
            images.shape[1:-1],
            window.padding,
            window.image_dilation,
            window.sizes,
            window.window_dilation,
            window.outputs,
            window.strides,
            strict=True,
        )
        padding = [
            # So much at the end that the result has the size of the kernel.
            (low, (size - 1) * apart + (count - 1) * stride - (pixels - 1) * dilation - low)
            for pixels, (low, _), dilation, size, apart, count, stride in steps
        ]
        rank = len(window.sizes)
        swapped = (rank + 1, 0, *range(1, rank + 1))
        kernel = jax.lax.conv_general_dilated(
            images,
            cotangents,
            window_strides=window.window_dilation,
            padding=padding,
            lhs_dilation=window.image_dilation,
            rhs_dilation=window.strides,
            dimension_numbers=ConvDimensionNumbers(swapped, swapped, swapped),
            batch_group_count=self.groups,
            precision=precision_of(stored),
            preferred_element_type=accumulation_dtype(images.dtype),
        )
        return jnp.transpose(kernel, self.kernel.from_last)
