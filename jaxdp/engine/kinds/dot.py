"""Matrix products: `dot_general` with any dimension numbers, of an activation and a kernel.

Slices of the kernel are its batch dimensions, and loops that walk through the leaf; the positions
that share each are free dimensions of the activation, and loops that share the kernel. The
gradients are those of `engine.factors.outer`.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from jaxdp.engine.boxes import distinct
from jaxdp.engine.factors.outer import Layout, MatrixDims, OuterProducts, Product
from jaxdp.engine.kinds.base import Record, refuse_repeats, stored_bits
from jaxdp.engine.views import Part, View
from jaxdp.engine.walker import Equation


class DotGeneral:
    """`dot_general` of an activation and a kernel, on either side."""

    tapped = True

    def refuse(self, eqn: Equation, operand: int, view: View | None) -> str:
        if not jnp.issubdtype(eqn.operands[1 - operand].dtype, jnp.floating):
            return "a product with integers"
        return refuse_repeats(view)

    def captures(self, eqn: Equation, operand: int) -> tuple[int, ...]:
        return (1 - operand,)

    def factor(self, record: Record) -> OuterProducts:
        part = record.part
        layout = _layout(record.eqn, record.operand, part)
        dims = MatrixDims(
            slices=(*distinct(part.loops), *(part.dims[axis] for axis, _, _ in layout.batch)),
            inputs=tuple(part.dims[axis] for axis, _ in layout.contract),
            outputs=tuple(part.dims[axis] for axis, _ in layout.free),
        )
        (activation,) = record.captured
        product = Product(
            activation,
            record.cotangent,
            layout,
            part.window,
            part.loops,
            stored_bits(record.eqn, record.operand),
            turned=False,
        )
        return OuterProducts((product,), dims, record.target)


def _layout(eqn: Equation, kernel: int, part: Part) -> Layout:
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
        def inwards(pair: tuple[int, ...]) -> int:
            return -part.dims[pair[0]].stride

        return tuple(sorted(pairs, key=inwards))

    return Layout(
        batch=outermost_first(zip(batch[kernel], batch[other], range(len(batch[0])), strict=True)),
        contract=outermost_first(zip(contract[kernel], contract[other], strict=True)),
        shared=tuple(zip(free[other], in_output[other], strict=True)),
        free=outermost_first(zip(free[kernel], in_output[kernel], strict=True)),
    )
