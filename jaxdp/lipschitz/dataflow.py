"""Properties of a program that hold for all values of its inputs.

The bounds need them for functions with a backward pass of their own, which need not be linear in
the cotangent.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from jaxdp.engine import walker
from jaxdp.engine.walker import Equation, Program

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


def row_for_each_sample(program: Program, inputs: Sequence[bool]) -> list[bool]:
    """Whether `jax.vmap` certainly gives each output a row for each sample, if the marked inputs
    have such rows. The answer for loops and branches is no: it is not known there."""

    def rule(_: walker.Path, eqn: Equation, values: list[bool]) -> list[bool]:
        body = eqn.custom_jvp or eqn.custom_vjp
        if body is not None:
            return row_for_each_sample(body, values)
        plain = eqn.scan is None and not eqn.branches and eqn.name not in ("while", "remat")
        return [plain and any(values)] * len(eqn.outputs)

    return walker.evaluate(program, list(inputs), rule, lift=lambda _: False)


def _is_zero(constant: Any) -> bool:
    # Only a number of the program's text: an array may be traced.
    return isinstance(constant, int | float | np.generic | np.ndarray) and not np.any(constant)
