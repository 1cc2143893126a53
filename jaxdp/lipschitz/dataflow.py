"""Properties of a program that hold for all values of its inputs.

The bounds need them for functions with a backward pass of their own, which need not be linear in
the cotangent.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.lax import GatherScatterMode

from jaxdp.engine import walker
from jaxdp.engine.walker import Equation, Program
from jaxdp.trees import is_float

# Zero where the first operand is and the result is a number, as bounds tell: 0/0 and 0 · ∞ are
# none. Further operands say where to look, or divide.
_OF_FIRST = {
    "abs", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "cumsum", "div",
    "dynamic_slice", "expand_dims", "neg", "reduce_max", "reduce_min",
    "reduce_precision", "reduce_sum", "reshape", "rev", "sign", "slice", "square", "squeeze",
    "tanh", "transpose", "reduce_window_sum", "sqrt",
}  # fmt: skip
# Zero where one operand is.
_OF_ANY = {"mul", "dot_general", "conv_general_dilated"}
# Zero where all are.
_OF_ALL = {"add", "add_any", "sub", "max", "min", "concatenate", "pad", "optimization_barrier"}


def vanishing(program: Program, inputs: Sequence[bool]) -> list[bool]:
    """Whether each output is certainly zero where the marked inputs are zero."""

    def rule(_: walker.Path, eqn: Equation, values: list[bool]) -> list[bool]:
        if eqn.name in _OF_FIRST:
            zero = values[0]
        elif eqn.name in _OF_ANY:
            zero = any(values)
        elif eqn.name in _OF_ALL:
            zero = all(values)
        elif eqn.name == "integer_pow":
            zero = values[0] and eqn.params["y"] > 0
        elif eqn.name == "gather":
            fill = eqn.params["fill_value"]
            zero = values[0] and (fill == 0 or eqn.params["mode"] != GatherScatterMode.FILL_OR_DROP)
        elif eqn.name == "select_n":
            zero = all(values[1:])
        else:
            zero = False
        return [zero] * len(eqn.outputs)

    return walker.evaluate(program, list(inputs), rule, lift=_is_zero)


# Several results, or one that a function of entries gives, all with rows if one operand has them.
_ALL_OR_NONE = {
    "reduce", "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub",
    "sort", "split", "threefry2x32", "top_k", "unstack",
}  # fmt: skip


def row_for_each_sample(
    program: Program, inputs: Sequence[bool], *, differentiated: bool = True
) -> list[bool]:
    """Whether `jax.vmap` certainly gives each output a row for each sample, if the marked inputs
    have such rows.

    Args:
      program: of one example.
      inputs: the marks.
      differentiated: whether the program is to be differentiated, and not a part of a derivative.
    """

    def rule(_: walker.Path, eqn: Equation, values: list[bool]) -> list[bool]:
        return rows_of_outputs(eqn, values, differentiated=differentiated)

    return walker.evaluate(program, list(inputs), rule, lift=lambda _: False)


def rows_of_outputs(
    eqn: Equation, operands: Sequence[bool], *, differentiated: bool = True
) -> list[bool]:
    """As `row_for_each_sample`, of one equation.

    The answer is no where it is not known: a result that seems to be each sample's own, and is
    shared, would let a nonlinear backward pass see the cotangent of the whole batch.
    """
    if eqn.name == "optimization_barrier":
        return list(operands)
    if (body := eqn.custom_jvp or eqn.custom_vjp) is not None:
        # Where it is differentiated, the rule of the derivative computes the results anew.
        programs = [body, _with_derivative(eqn)] if differentiated else [body]
        return _in_all(programs, operands, differentiated=False)
    if eqn.branches:
        return _in_all(eqn.branches, operands[1:], differentiated=differentiated)
    if (scan := eqn.scan) is not None:
        return _rows_of_scan(scan, operands, differentiated=differentiated)
    if (remat := eqn.remat) is not None:
        return row_for_each_sample(remat.body, operands, differentiated=differentiated)
    certain = eqn.name in _ALL_OR_NONE or (len(eqn.outputs) == 1 and not eqn.bodies)
    return [certain and any(operands)] * len(eqn.outputs)


def _in_all(
    programs: Sequence[Program], inputs: Sequence[bool], *, differentiated: bool
) -> list[bool]:
    """Which outputs have rows whichever of the programs gives them."""
    found = [row_for_each_sample(each, inputs, differentiated=differentiated) for each in programs]
    return [all(rows) for rows in zip(*found, strict=True)]


def _rows_of_scan(
    scan: walker.Scan, operands: Sequence[bool], *, differentiated: bool
) -> list[bool]:
    """By the least fixed point, as JAX has it: a part of the state has rows from the first step on
    if it gets them in any step."""
    first, last = scan.constants, scan.constants + scan.carry
    carry = list(operands[first:last])
    while True:
        inputs = [*operands[:first], *carry, *operands[last:]]
        outputs = row_for_each_sample(scan.body, inputs, differentiated=differentiated)
        after = [a or b for a, b in zip(carry, outputs, strict=False)]
        if after == carry:
            return [*carry, *outputs[scan.carry :]]
        carry = after


def _with_derivative(eqn: Equation) -> Program:
    """What computes the results of a function with a derivative of its own where it is
    differentiated."""

    def results(*arrays: jax.Array) -> list[jax.Array]:
        floats = {number: array for number, array in enumerate(arrays) if is_float(array)}

        def function(floats: dict[int, jax.Array]) -> list[jax.Array]:
            return eqn.bind([floats.get(number, array) for number, array in enumerate(arrays)])

        return jax.vjp(function, floats)[0]

    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in eqn.operands]
    return walker.trace(results, *shapes)[0]


def _is_zero(constant: Any) -> bool:
    # Only a number of the program's text: an array may be traced.
    return isinstance(constant, int | float | np.generic | np.ndarray) and not np.any(constant)
