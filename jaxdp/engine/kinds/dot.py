"""Matrix products: `dot_general` with any dimension numbers.

With E slices of the kernel (batch dimensions, and loops that walk through the leaf), T positions
that share each (free dimensions of the activation, and loops that share the kernel), inputs
u[E, T, d] and output cotangents v[E, T, p], the gradient of one sample is

    G[e] = Σ_t u[e, t] v[e, t]ᵀ          (E matrices, d × p)

    ‖G‖² = Σ_e ‖u‖² ‖v‖²                 for T = 1                            ("outer product")
         = Σ_e Σ_{t,s} ⟨u_t, u_s⟩⟨v_t, v_s⟩    Gram matrices, 2 T² (d + p) FLOPs    ("gram")
         = Σ_e Σ_{ij} G_ij²              the matrices themselves, 2 T d p FLOPs  ("rows")

Source: Goodfellow 2015, "Efficient Per-Example Gradient Computations" (T = 1); Li et al. 2022,
"Large Language Models Can Be Strong Differentially Private Learners", section 4 (T > 1).
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from jaxdp.engine.gram import Gram, gram_norms, lengths, spread, sum_error
from jaxdp.engine.kinds.base import (
    Factored,
    Materialized,
    Site,
    Target,
    distinct_loops,
    factored,
    refuse_repeats,
    split_loops,
    static,
)
from jaxdp.engine.numerics import scale_rows, widened
from jaxdp.engine.rounding import joint_norm, norms, rounded_up
from jaxdp.engine.sums import in_blocks
from jaxdp.engine.views import Dim, Part, View
from jaxdp.engine.walker import Equation


class Extent(NamedTuple):
    """E slices, T positions, d inputs, p outputs."""

    slices: int
    positions: int
    inputs: int
    outputs: int


def choose_method(extent: Extent) -> str:
    """How the norms of products of this extent are computed."""
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


class Axes(NamedTuple):
    """Where the matrices `[E, d, p]` lie in the leaf: the axes of each side."""

    slices: tuple[Dim, ...]
    inputs: tuple[Dim, ...]
    outputs: tuple[Dim, ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        """All of them, in the order of `[E, d, p]`."""
        return (*self.slices, *self.inputs, *self.outputs)


@factored
class Product:
    """What one matrix product left.

    Attributes:
      activation: the operand that is no parameter, `[B, *lengths, ...]`.
      cotangent: of the output, `[B, *lengths, ...]`.
      layout: which of their axes belong together.
      part: what of the kernel the gradients are with respect to.
      lengths: of the enclosing scans.
      turned: whether inputs and outputs of the kernel have changed places.
    """

    activation: jax.Array
    cotangent: jax.Array
    layout: "Layout" = static()
    part: Part = static()
    lengths: tuple[int, ...] = static()
    turned: bool = static()

    def vectors(self) -> tuple[jax.Array, jax.Array]:
        """u `[B, E, T, d]` and v `[B, E, T, p]`."""
        layout, part = self.layout, self.part
        activation = split_loops(self.activation, part, self.lengths)
        cotangent = split_loops(self.cotangent, part, self.lengths)
        for axis, in_activation, in_output in layout.batch:
            activation = _window(activation, 3 + in_activation, part, axis)
            cotangent = _window(cotangent, 3 + in_output, part, axis)
        for axis, in_activation in layout.contract:
            activation = _window(activation, 3 + in_activation, part, axis)
        for axis, in_output in layout.free:
            cotangent = _window(cotangent, 3 + in_output, part, axis)
        u = _arranged(
            activation,
            [place for _, place, _ in layout.batch],
            [place for place, _ in layout.shared],
            [place for _, place in layout.contract],
        )
        v = _arranged(
            cotangent,
            [place for _, _, place in layout.batch],
            [place for _, place in layout.shared],
            [place for _, place in layout.free],
        )
        u, v = widened(u), widened(v)
        return (v, u) if self.turned else (u, v)


@factored
class OuterProducts:
    """Gradients Σ_t u_t v_tᵀ, the positions t from one or more products with the same kernel."""

    products: tuple[Product, ...]
    axes: Axes = static()
    target: Target = static()

    @property
    def method(self) -> str:
        return choose_method(self._extent())

    @property
    def flops(self) -> int:
        slices, positions, inputs, outputs = self._extent()
        pairs = positions**2 if self.method == "gram" else positions
        return 2 * self.products[0].cotangent.shape[0] * slices * pairs * (inputs + outputs)

    def _extent(self) -> Extent:
        u, v = jax.eval_shape(OuterProducts.vectors, self)
        return Extent(u.shape[1], u.shape[2], u.shape[3], v.shape[3])

    def vectors(self) -> tuple[jax.Array, jax.Array]:
        """u `[B, E, T, d]` and v `[B, E, T, p]` of all products."""
        inputs, outputs = zip(*(product.vectors() for product in self.products), strict=True)
        if len(self.products) == 1:
            return inputs[0], outputs[0]
        return jnp.concatenate(inputs, axis=2), jnp.concatenate(outputs, axis=2)

    def prepared(self) -> Factored:
        return self._materialized() if self.method == "rows" else self

    def certified_norms(self) -> jax.Array:
        u, v = self.vectors()
        if self.method == "outer product":
            # The weight may be cast, and is multiplied into one of the two; one product of these.
            slices = rounded_up((norms(u) * norms(v))[..., 0], 1 + 4)
        else:
            slices = gram_norms(Gram.of(u), Gram.of(v))
        return joint_norm(slices)

    def certified_norms_elsewhere(self) -> jax.Array:
        if self.method != "rows":
            return self.certified_norms()
        # Both the matrices here and the sum there are off by `sum_error`.
        u, v = self.vectors()
        error = sum_error(spread(lengths(u), lengths(v)), u.shape[2])
        matrices = self._materialized().certified_norms()
        return rounded_up(matrices + 2 * joint_norm(error), 2)

    def rows(self) -> jax.Array:
        return self._materialized().rows()

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        u, v = self.vectors()
        # The weights go to the smaller factor; the sum over samples is part of the product.
        if u.shape[-1] < v.shape[-1]:
            u = scale_rows(weights, u)
        else:
            v = scale_rows(weights, v)

        def contract(u: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.einsum("betd,betp->edp", u, v, precision=Precision.HIGHEST)

        total = in_blocks(contract, u, v)
        return self.target.place(
            total.reshape([dim.size for dim in self.axes.dims]), self.axes.dims
        )

    def join(self, other: Factored) -> Factored | None:
        if not isinstance(other, OuterProducts) or self.axes.slices != other.axes.slices:
            return None
        if self.axes != other.axes:
            other = other.turned()
        if self.axes != other.axes:
            return None
        return replace(self, products=self.products + other.products)

    def turned(self) -> "OuterProducts":
        """The same gradients as those of the transposed kernel."""
        products = tuple(replace(each, turned=not each.turned) for each in self.products)
        axes = self.axes._replace(inputs=self.axes.outputs, outputs=self.axes.inputs)
        return replace(self, products=products, axes=axes)

    def _materialized(self) -> Materialized:
        u, v = self.vectors()
        matrices = jnp.einsum("betd,betp->bedp", u, v, precision=Precision.HIGHEST)
        values = matrices.reshape(matrices.shape[0], *(dim.size for dim in self.axes.dims))
        return Materialized(values, self.axes.dims, self.target, "per-sample matrices")


class DotGeneral:
    """`dot_general` of an activation and a kernel, on either side."""

    tapped = True

    def refuse(self, eqn: Equation, operand: int, view: View | None) -> str:
        if not jnp.issubdtype(eqn.operands[1 - operand].dtype, jnp.floating):
            return "a product with integers"
        return refuse_repeats(view)

    def captures(self, eqn: Equation, operand: int) -> tuple[int, ...]:
        return (1 - operand,)

    def factor(self, site: Site, part: Part, target: Target) -> OuterProducts:
        layout = Layout.of(site.eqn, site.operand, part)
        axes = Axes(
            slices=(
                *distinct_loops(part, site.lengths),
                *(part.dims[axis] for axis, _, _ in layout.batch),
            ),
            inputs=tuple(part.dims[axis] for axis, _ in layout.contract),
            outputs=tuple(part.dims[axis] for axis, _ in layout.free),
        )
        (activation,) = site.captured
        product = Product(activation, site.cotangent, layout, part, site.lengths, turned=False)
        return OuterProducts((product,), axes, target)


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

    @classmethod
    def of(cls, eqn: Equation, kernel: int, part: Part) -> "Layout":
        """The layout of a product whose operand number `kernel` is the parameter."""
        contract, batch = eqn.params["dimension_numbers"]
        other = 1 - kernel
        free = [
            [
                axis
                for axis in range(len(eqn.operands[side].shape))
                if axis not in contract[side] and axis not in batch[side]
            ]
            for side in range(2)
        ]
        # The output has the batch axes, then the free ones of the left, then of the right.
        first = [len(batch[0]), len(batch[0]) + len(free[0])]
        in_output = [[first[side] + k for k in range(len(free[side]))] for side in range(2)]

        def outermost_first(pairs: Iterable[Any]) -> tuple[Any, ...]:
            return tuple(sorted(pairs, key=lambda pair: -part.dims[pair[0]].stride))

        return cls(
            batch=outermost_first(
                zip(batch[kernel], batch[other], range(len(batch[0])), strict=True)
            ),
            contract=outermost_first(zip(contract[kernel], contract[other], strict=True)),
            shared=tuple(zip(free[other], in_output[other], strict=True)),
            free=outermost_first(zip(free[kernel], in_output[kernel], strict=True)),
        )


def _window(array: jax.Array, axis: int, part: Part, kernel_axis: int) -> jax.Array:
    """What of this axis belongs to the part of the kernel."""
    start = part.start[kernel_axis]
    return jax.lax.slice_in_dim(array, start, start + part.dims[kernel_axis].size, axis=axis)


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
