"""Sums of outer products: what matrix products leave.

With E slices of a kernel, T positions that share each, inputs u[E, T, d] and output cotangents
v[E, T, p], the gradient of one sample is

    G[e] = Σ_t u[e, t] v[e, t]ᵀ          (E matrices, d × p)

    ‖G‖² = Σ_e ‖u‖² ‖v‖²                 for T = 1                            ("outer product")
         = Σ_e Σ_{t,s} ⟨u_t, u_s⟩⟨v_t, v_s⟩    Gram matrices, 2 T² (d + p) FLOPs    ("gram")
         = Σ_e Σ_{ij} G_ij²              the matrices themselves, 2 T d p FLOPs  ("rows")

Source: Goodfellow 2015, "Efficient Per-Example Gradient Computations" (T = 1); Li et al. 2022,
"Large Language Models Can Be Strong Differentially Private Learners", section 4 (T > 1).
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.boxes import Box, Dim, Target, split_loops
from jaxdp.engine.factors.base import Factored, Inner, factored, static
from jaxdp.engine.factors.gram import (
    gram_norms,
    grams,
    inner_error,
    lengths_of,
    mass,
    sum_error,
    uncancelled,
)
from jaxdp.engine.factors.materialized import Materialized
from jaxdp.engine.numerics import once, widened
from jaxdp.engine.precision import (
    FLOAT32,
    as_operand,
    multiplied,
    weight_roundoff,
    weighted_operand,
)
from jaxdp.engine.rounding import joint_norm, norms, rounded_up, roundings, total
from jaxdp.engine.sums import in_blocks


class ProductExtent(NamedTuple):
    """E slices, T positions, d inputs, p outputs."""

    slices: int
    positions: int
    inputs: int
    outputs: int


def form_of_products(extent: ProductExtent) -> str:
    """What the norms of products of this extent are computed from."""
    if extent.positions == 1:
        return "outer product"
    matrix = extent.inputs * extent.outputs
    vectors = extent.positions * (extent.inputs + extent.outputs)
    # Matrices are products that the sum needs anyway, but they are written and read once more: as
    # long as 200 operations take, on a CPU. A Gram matrix has the products of its own to pay, and
    # the vectors to keep.
    slower = extent.positions * vectors > 100 * matrix
    if slower and 4 * matrix <= 5 * vectors:
        return "rows"
    if 2 * vectors <= 3 * matrix and 2 * extent.positions**2 <= matrix:
        return "gram"
    return "rows"


class MatrixDims(NamedTuple):
    """Where the matrices `[E, d, p]` lie in the leaf: the axes of each side."""

    slices: tuple[Dim, ...]
    inputs: tuple[Dim, ...]
    outputs: tuple[Dim, ...]

    @property
    def all(self) -> tuple[Dim, ...]:
        """All of them, in the order of `[E, d, p]`."""
        return (*self.slices, *self.inputs, *self.outputs)


class Layout(NamedTuple):
    """Which axes of kernel, activation and output belong together.

    batch: (kernel, activation, output); contract: (kernel, activation); shared: (activation,
    output), the free axes of the activation; free: (kernel, output). Each side of the kernel from
    its outermost axis in memory, so that different products with one kernel agree.
    """

    batch: tuple[tuple[int, int, int], ...]
    contract: tuple[tuple[int, int], ...]
    shared: tuple[tuple[int, int], ...]
    free: tuple[tuple[int, int], ...]


@factored
class Product:
    """What one matrix product left.

    Attributes:
      activation: the operand that is no parameter, `[B, *loops, ...]`.
      cotangent: of the output, `[B, *loops, ...]`.
      layout: which of their axes belong together.
      window: the box of the kernel that the gradients are with respect to.
      loops: the enclosing scans.
      stored: bits of the significands that are multiplied (`engine.precision`).
      turned: whether inputs and outputs of the kernel have changed places.
    """

    activation: jax.Array
    cotangent: jax.Array
    layout: Layout = static()
    window: Box = static()
    loops: tuple[Dim, ...] = static()
    stored: int = static()
    turned: bool = static()

    def vectors(self, held_in: int) -> tuple[jax.Array, jax.Array]:
        """u `[B, E, T, d]` and v `[B, E, T, p]`, operands that are held in so many bits."""
        batch, contract, shared, free = self.layout
        u = _arranged(
            self._within(self.activation, [*((k, a) for k, a, _ in batch), *contract]),
            [axis for _, axis, _ in batch],
            [axis for axis, _ in shared],
            [axis for _, axis in contract],
        )
        v = _arranged(
            self._within(self.cotangent, [*((k, o) for k, _, o in batch), *free]),
            [axis for _, _, axis in batch],
            [axis for _, axis in shared],
            [axis for _, axis in free],
        )
        u, v = (as_operand(side, self.stored, held_in) for side in (u, v))
        return (v, u) if self.turned else (u, v)

    def _within(self, array: jax.Array, axes: Iterable[tuple[int, int]]) -> jax.Array:
        """`[B, E, S, ...]`: what belongs to the window, along pairs of an axis of the kernel and
        one of the array."""
        array = split_loops(array, self.loops)
        for kernel_axis, axis in axes:
            start, count = self.window[kernel_axis]
            array = jax.lax.slice_in_dim(array, start, start + count, axis=3 + axis)
        return array


@factored
class OuterProducts:
    """Gradients Σ_t u_t v_tᵀ, the positions t from one or more products with the same kernel."""

    products: tuple[Product, ...]
    dims: MatrixDims = static()
    target: Target = static()

    @property
    def form(self) -> str:
        return form_of_products(self._extent())

    @property
    def flops(self) -> int:
        slices, positions, inputs, outputs = self._extent()
        pairs = positions**2 if self.form == "gram" else positions
        return 2 * self.products[0].cotangent.shape[0] * slices * pairs * (inputs + outputs)

    def _extent(self) -> ProductExtent:
        u, v = jax.eval_shape(OuterProducts.vectors, self)
        return ProductExtent(u.shape[1], u.shape[2], u.shape[3], v.shape[3])

    @property
    def stored(self) -> int:
        """Bits of the significands that are multiplied: the most that one of the products has."""
        return max(product.stored for product in self.products)

    def vectors(self) -> tuple[jax.Array, jax.Array]:
        """u `[B, E, T, d]` and v `[B, E, T, p]` of all products."""
        each = [product.vectors(self.stored) for product in self.products]
        inputs, outputs = zip(*each, strict=True)
        if len(self.products) == 1:
            return inputs[0], outputs[0]
        return jnp.concatenate(inputs, axis=2), jnp.concatenate(outputs, axis=2)

    def prepared(self) -> Factored:
        return once(self._materialized()) if self.form == "rows" else self

    def certified_norms(self) -> jax.Array:
        u, v = self.vectors()
        if self.form == "outer product":
            # The weight may be cast, and is multiplied into one of the two; one product of these.
            product = (norms(widened(u)) * norms(widened(v)))[..., 0]
            slices = rounded_up(product * (1 + weight_roundoff(self.stored)), 2 + 4)
        else:
            slices = gram_norms(*grams(u, v, self.stored), self.stored)
        return joint_norm(slices)

    def certified_norms_elsewhere(self) -> jax.Array:
        u, v = self.vectors()
        whole, positions = mass(lengths_of(u), lengths_of(v)), u.shape[2]
        if self.form != "rows":
            return uncancelled(self.certified_norms(), joint_norm(whole))
        # Both the matrices here and the sum there are off; weights are rounded there alone.
        error = sum_error(whole, positions, FLOAT32) + sum_error(whole, positions, self.stored)
        norms = rounded_up(self._materialized().certified_norms() + joint_norm(error), 3)
        return uncancelled(norms, joint_norm(whole))

    def rows(self) -> jax.Array:
        return self._materialized().rows()

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        u, v = self.vectors()
        # The weights go to the smaller factor; the sum over samples is part of the product.
        if u.shape[-1] < v.shape[-1]:
            u = weighted_operand(weights, u, self.stored)
        else:
            v = weighted_operand(weights, v, self.stored)

        def contract(u: jax.Array, v: jax.Array) -> jax.Array:
            return multiplied("betd,betp->edp", u, v, self.stored)

        matrices = in_blocks(contract, u, v).reshape([dim.size for dim in self.dims.all])
        return self.target.place(matrices, self.dims.all)

    def inner(self, direction: jax.Array) -> Inner:
        u, v = self.vectors()
        slices, positions, inputs, outputs = self._extent()
        shown = self.target.shown(direction, self.dims.all).reshape(slices, inputs, outputs)
        operand = as_operand(shown, self.stored)
        along = multiplied("betd,edp->betp", u, operand, self.stored)
        values = total(total(total(along * widened(v))))
        whole = joint_norm(mass(lengths_of(u), lengths_of(v)))
        off = inputs + roundings(outputs) + roundings(positions) + roundings(slices)
        return Inner(values, inner_error(whole, direction, positions, off, self.stored))

    def join(self, other: Factored) -> Factored | None:
        if not isinstance(other, OuterProducts) or self.dims.slices != other.dims.slices:
            return None
        if self.dims != other.dims:
            other = other.turned()
        if self.dims != other.dims:
            return None
        return replace(self, products=self.products + other.products)

    def turned(self) -> "OuterProducts":
        """The same gradients as those of the transposed kernel."""
        products = tuple(replace(each, turned=not each.turned) for each in self.products)
        dims = self.dims._replace(inputs=self.dims.outputs, outputs=self.dims.inputs)
        return replace(self, products=products, dims=dims)

    def _materialized(self) -> Materialized:
        u, v = self.vectors()
        matrices = multiplied("betd,betp->bedp", u, v, self.stored)
        values = matrices.reshape(matrices.shape[0], *(dim.size for dim in self.dims.all))
        return Materialized(values, self.dims.all, self.target, "per-sample matrices")


def _arranged(
    array: jax.Array, slices: list[int], positions: list[int], vector: list[int]
) -> jax.Array:
    """`[B, E, S, ...] -> [B, E · slices, S · positions, vector]`."""
    groups = (
        [1, *(3 + k for k in slices)],
        [2, *(3 + k for k in positions)],
        [3 + k for k in vector],
    )
    shape = [math.prod(array.shape[k] for k in group) for group in groups]
    order = [0, *(axis for group in groups for axis in group)]
    return jnp.transpose(array, order).reshape(array.shape[0], *shape)
