"""Gradients of a kernel from the patches of images: what convolutions leave.

A convolution is a matrix product with the patches of its input: u_t holds the k inputs under the
window at output position t, for each of c channels. The gradient of one sample is Σ_t u_t v_tᵀ as
for products (`engine.factors.outer`), but the patches take k times the memory of the input. So they
are formed for a few samples at a time ("rows"), or not at all, since their Gram matrix comes from
that of the pixels ("gram"):

    ⟨u_t, u_s⟩ = Σ_o ⟨x_{t+o}, x_{s+o}⟩          (o: offsets within the window)

Source: Rochette et al. 2019, "Efficient Per-Example Gradient Computations in Convolutional Neural
Networks" (per-sample kernels); Bu et al. 2022, "Scalable and Efficient Training of Large
Convolutional Neural Networks with Differential Privacy" (Gram matrices of patches).
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxdp.engine.boxes import Dim, Target
from jaxdp.engine.factors.base import Factored, Inner, factored, static
from jaxdp.engine.factors.geometry import Geometry, Window
from jaxdp.engine.factors.gram import (
    Gram,
    gram_norms,
    inner_error,
    inner_products,
    lengths_of,
    lengths_of_squares,
    mass,
    sum_error,
    uncancelled,
)
from jaxdp.engine.factors.materialized import Materialized
from jaxdp.engine.numerics import once, widened
from jaxdp.engine.platforms import platform
from jaxdp.engine.precision import (
    FLOAT32,
    as_operand,
    multiplied,
    precision_of,
    weighted_operand,
)
from jaxdp.engine.rounding import joint_norm, rounded_up, roundings, total
from jaxdp.engine.sums import in_turns
from jaxdp.varying import zeros

# How many entries of patches are in memory at once, if that is more than those of one sample: on
# a CPU what fits the caches.
_PATCHES_AT_ONCE = {"cpu": 2**19}
_PATCHES_ELSEWHERE = 2**24


class PatchExtent(NamedTuple):
    """Sizes of a convolution within one group."""

    pixels: int
    positions: int
    window: int
    inputs: int
    outputs: int


def gram_operations(extent: PatchExtent) -> int:
    """Products that the Gram matrices of pixels, patches and cotangents take."""
    by_position = extent.outputs + 2 * extent.window
    return extent.pixels**2 * extent.inputs + extent.positions**2 * by_position


def form_of_patches(extent: PatchExtent) -> str:
    """What the norms of a convolution are computed from."""
    kernel = extent.window * extent.inputs * extent.outputs
    # Gram matrices where they take clearly fewer operations, and no more memory.
    fewer = 2 * gram_operations(extent) < extent.positions * kernel
    if fewer and extent.pixels**2 + extent.positions**2 <= kernel:
        return "gram"
    return "rows"


@factored
class Patches:
    """Gradients Σ_t u_t v_tᵀ of a kernel, with u the patches of images.

    Attributes:
      images: `[B, E, N, *spatial, c]`: E slices of the kernel, N images that share each.
      cotangents: `[B, E, N, *outputs, o]`.
      geometry: what the convolution does.
      slices: the E axes of the kernel in the leaf.
      dims: the axes of the kernel in the leaf, in its own order.
      stored: bits of the significands that are multiplied (`engine.precision`).
      target: where they belong.
    """

    images: jax.Array
    cotangents: jax.Array
    geometry: Geometry = static()
    slices: tuple[Dim, ...] = static()
    dims: tuple[Dim, ...] = static()
    stored: int = static()
    target: Target = static()

    @property
    def window(self) -> Window:
        """How the convolution reads the images."""
        return self.geometry.window

    @property
    def groups(self) -> int:
        """Number of groups of features that do not mix."""
        return self.geometry.groups

    @property
    def form(self) -> str:
        return form_of_patches(self._extent())

    @property
    def flops(self) -> int:
        batch, slices = self.images.shape[:2]
        return 2 * batch * slices * self.groups * gram_operations(self._extent())

    def _extent(self) -> PatchExtent:
        images = self.images.shape[2]
        padded = jax.eval_shape(self.window.padded, self.images)
        return PatchExtent(
            pixels=images * math.prod(padded.shape[3:-1]),
            positions=images * math.prod(self.window.outputs),
            window=math.prod(self.window.sizes),
            inputs=self.images.shape[-1] // self.groups,
            outputs=self.cotangents.shape[-1] // self.groups,
        )

    def prepared(self) -> Factored:
        return once(self._materialized()) if self.form == "rows" else self

    def certified_norms(self) -> jax.Array:
        return self._map(self._certified_norm)

    def certified_norms_elsewhere(self) -> jax.Array:
        whole = jax.vmap(self._mass)(self.images, self.cotangents)
        if self.form != "rows":
            return uncancelled(self.certified_norms(), whole)
        # Both the kernels here and the sum there are off; weights are rounded there alone.
        positions = self._extent().positions
        error = sum_error(whole, positions, FLOAT32) + sum_error(whole, positions, self.stored)
        return uncancelled(rounded_up(self._materialized().certified_norms() + error, 3), whole)

    def rows(self) -> jax.Array:
        return self._materialized().rows()

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        cotangents = as_operand(self.cotangents, self.stored)
        cotangents = weighted_operand(weights, cotangents, self.stored)
        images = as_operand(self.images, self.stored)
        return in_turns(self._kernel_gradient, images, cotangents)

    def inner(self, direction: jax.Array) -> Inner:
        shown = self.target.shown(direction, (*self.slices, *self.dims))
        sizes = [dim.size for dim in self.dims]
        kernels = as_operand(shown, self.stored).reshape(-1, *sizes)
        images = as_operand(self.images, self.stored)
        batch, slices, count = images.shape[:3]
        precision = precision_of(self.stored)
        along = [
            self.geometry.convolve(images[:, k].reshape(-1, *images.shape[3:]), kernel, precision)
            for k, kernel in enumerate(kernels)
        ]
        cotangents = widened(as_operand(self.cotangents, self.stored))
        outputs = jnp.stack([widened(each) for each in along], axis=1)
        outputs = outputs.reshape(batch, count, slices, *cotangents.shape[3:])
        terms = (jnp.swapaxes(outputs, 1, 2) * cotangents).reshape(batch, -1)
        extent = self._extent()
        whole = jax.vmap(self._mass)(self.images, self.cotangents)
        off = extent.window * extent.inputs + roundings(terms.shape[1])
        error = inner_error(whole, direction, extent.positions, off, self.stored)
        return Inner(total(terms), error)

    def join(self, other: Factored) -> Factored | None:
        return None

    def _materialized(self) -> Materialized:
        kernels = self._map(self._kernel)
        dims = self._kernel_dims()
        values = kernels.reshape(kernels.shape[0], *(dim.size for dim in dims))
        return Materialized(values, dims, self.target, "per-sample kernels")

    def _map(self, fun: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        extent = self._extent()
        entries = extent.positions * extent.window * self.images.shape[1] * self.images.shape[-1]
        return _map_samples(fun, entries, self.images, self.cotangents)

    def _kernel(self, images: jax.Array, cotangents: jax.Array) -> jax.Array:
        """Of one sample: `[E, g, k, c/g, o/g]`."""
        images = as_operand(images, self.stored)
        padded, offsets = self.window.padded(images), self.window.offsets()
        shifts = [self.window.under(offset, padded, first_axis=2) for offset in offsets]
        if self.groups == padded.shape[-1] == cotangents.shape[-1]:
            # Depthwise: as products of one entry each, matrices would be slower.
            v = widened(as_operand(cotangents, self.stored))
            positions = tuple(range(1, v.ndim - 1))
            entries = [jnp.sum(widened(shift) * v, axis=positions) for shift in shifts]
            return jnp.stack(entries, axis=-1)[..., None, None]
        patches = jnp.stack(shifts, axis=-2)
        lead, k = patches.shape[0], len(offsets)
        u = patches.reshape(lead, -1, k, self.groups, patches.shape[-1] // self.groups)
        v = self._grouped(cotangents)
        return multiplied("etkgc,etgo->egkco", u, v, self.stored)

    def _certified_norm(self, images: jax.Array, cotangents: jax.Array) -> jax.Array:
        """Of one sample, from the Gram matrices."""
        padded = self.window.padded(images)
        pixels = jnp.swapaxes(self._grouped(padded), 1, 2)
        (gram,), off = inner_products(pixels, self.stored)
        positions = padded.shape[1:-1]
        gram = gram.reshape(*gram.shape[:2], *positions, *positions)

        def at_both_positions(offset: tuple[int, ...]) -> jax.Array:
            rows = self.window.under(offset, gram, first_axis=3)
            return self.window.under(offset, rows, first_axis=3 + len(positions))

        offsets = self.window.offsets()
        v_gram = Gram.of(jnp.swapaxes(self._grouped(cotangents), 1, 2), self.stored)
        products = reduce(jnp.add, map(at_both_positions, offsets)).reshape(v_gram.panels[0].shape)
        # By Cauchy–Schwarz over the offsets, errors relative to pixels are so to patches, too.
        terms = len(offsets) * pixels.shape[-1]
        u_gram = Gram.of_panels([products], terms, off + len(offsets) - 1)
        return joint_norm(gram_norms(u_gram, v_gram, self.stored).reshape(-1))

    def _mass(self, images: jax.Array, cotangents: jax.Array) -> jax.Array:
        """Of one sample: S of the patches and the cotangents, of all slices and groups."""
        padded, offsets = self.window.padded(images), self.window.offsets()
        pixels = self._grouped(padded)
        squares = total(jnp.square(widened(pixels))).reshape(*padded.shape[:-1], self.groups)
        windows = [self.window.under(offset, squares, first_axis=2) for offset in offsets]
        patches = reduce(jnp.add, windows).reshape(images.shape[0], -1, self.groups)
        off = roundings(pixels.shape[-1]) + len(offsets) - 1
        u = lengths_of_squares(patches, off, len(offsets) * pixels.shape[-1])
        v = lengths_of(self._grouped(cotangents))
        return joint_norm(mass(jnp.swapaxes(u, 1, 2), jnp.swapaxes(v, 1, 2)).reshape(-1))

    def _grouped(self, images: jax.Array) -> jax.Array:
        """`[E, N, *spatial, c] -> [E, N · positions, g, c/g]`, as they are multiplied."""
        return as_operand(images, self.stored).reshape(
            images.shape[0], -1, self.groups, images.shape[-1] // self.groups
        )

    def _kernel_dims(self) -> tuple[Dim, ...]:
        """The axes of `[E, g, k, c/g, o/g]` in the leaf."""
        kernel = self.geometry.kernel
        output = self.dims[kernel.batch]
        inner = Dim(output.size // self.groups, output.stride)
        return (
            *self.slices,
            Dim(self.groups, inner.size * inner.stride),
            *(self.dims[axis] for axis in kernel.spatial),
            self.dims[kernel.features],
            inner,
        )

    def _kernel_gradient(self, images: jax.Array, cotangents: jax.Array) -> jax.Array:
        """The ordinary gradient with respect to the kernel, summed over the batch."""

        def gradient(images: jax.Array, cotangents: jax.Array) -> jax.Array:
            return self.geometry.kernel_gradient(images, cotangents, self.stored)

        def of_pair(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            return gradient(*pair)

        # All samples are images of one large batch, once for each slice of the kernel.
        def whole_batch(array: jax.Array) -> jax.Array:
            array = jnp.moveaxis(array, 1, 0)
            return array.reshape(array.shape[0], -1, *array.shape[3:])

        images, cotangents = whole_batch(images), whole_batch(cotangents)
        if images.shape[0] == 1:
            kernels = gradient(images[0], cotangents[0])[None]
        else:  # in turns: their batched form is a grouped convolution, an order slower
            kernels = cast(jax.Array, jax.lax.map(of_pair, (images, cotangents)))
        slices = [dim.size for dim in self.slices]
        kernels = kernels.reshape(*slices, *kernels.shape[1:])
        return self.target.place(kernels, (*self.slices, *self.dims))


def _map_samples(
    fun: Callable[..., jax.Array], patch_entries: int, *arrays: jax.Array
) -> jax.Array:
    """`vmap` over the samples, a few at a time."""
    limit = _PATCHES_AT_ONCE.get(platform(), _PATCHES_ELSEWHERE) // patch_entries
    # A power of two divides most batches; for a rest XLA compiles everything twice.
    at_once = 2 ** max(0, limit.bit_length() - 1)
    count = arrays[0].shape[0]
    while at_once > 1 and count % at_once:
        at_once //= 2
    of_some = jax.vmap(fun)
    if at_once >= count:
        return of_some(*arrays)
    result = jax.eval_shape(of_some, *arrays)
    # `lax.map` begins with zeros that need nothing, and XLA makes them when the program begins.
    # These need what is mapped.
    zero, arrays = jax.lax.optimization_barrier((zeros((), result.dtype, arrays), arrays))

    def place(index: int, kernels: jax.Array) -> jax.Array:
        first = index * at_once
        some = [jax.lax.dynamic_slice_in_dim(each, first, at_once) for each in arrays]
        # Behind a barrier: one with a transposition fused into it is not written in place.
        formed = jax.lax.optimization_barrier(of_some(*some))
        return jax.lax.dynamic_update_slice_in_dim(kernels, formed, first, axis=0)

    empty = jnp.broadcast_to(zero, result.shape)
    return cast(jax.Array, jax.lax.fori_loop(0, count // at_once, place, empty))
