"""Finds what is left of statistics over a batch where the batch is one example.

A layer that normalises over its batch subtracts from every feature the mean of that feature over
the samples, or divides it by their mean square. In the loss of one example these are the feature
and its square, so that zero or a sign is left, whatever the example: the layers before get no
gradient, and nobody notices. It is found by what it does, whatever the class that does it: a value
is followed through sums over axes of length one, divisions by one, reshapes, casts and functions
entry by entry, and found again where it is subtracted from itself, or scaled by what was made of it
alone.

Only statistics over a leading axis that leave another axis standing are meant. A layer that
normalises one feature by itself, or a sequence of one position, ignores its input likewise, but not
for want of a batch. Where the mean is over positions, too, as in a BatchNorm of images, something
is left: the example normalised by itself, which is told apart.
"""

# NumPy leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxdp.engine import walker
from jaxdp.engine.walker import Equation, Program

_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"}
_SAME_ENTRIES = {
    "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type", "copy",
    "copy_p", "sharding_constraint", "reduce_precision",
}  # fmt: skip
_BY_ENTRY = {
    "abs", "add", "div", "integer_pow", "max", "min", "mul", "neg", "pow", "rsqrt", "sqrt",
    "square", "sub",
}  # fmt: skip


class _Value(NamedTuple):
    """What is known of a value.

    Attributes:
      entries: equal for values with the same entries in the same order, but for axes of length
        one; None for a constant.
      origin: the entries of which each of its own is a function, and of constants.
      statistic: whether a reduction over a leading axis of length one lies behind it, alone
        ("batch") or with others ("positions").
      sample: whether it depends on the sample.
      number: of a constant, if all of its entries are this one.
    """

    entries: int | None = None
    origin: int | None = None
    statistic: Literal["", "batch", "positions"] = ""
    sample: bool = False
    number: float | None = None


class OwnStatistic(NamedTuple):
    """An equation that normalises a value by a statistic over a batch of one.

    Attributes:
      eqn: the equation.
      over_batch_alone: whether that is over nothing else, so that nothing is left of the value.
    """

    eqn: Equation
    over_batch_alone: bool


def own_statistics(program: Program, parameters: int) -> list[OwnStatistic]:
    """The equations that subtract from a value of the sample its own mean over a batch of one, or
    scale it by a statistic of its own.

    Args:
      program: of a function of parameters and then of the parts of one example.
      parameters: how many of its inputs are parameters.
    """
    found: list[OwnStatistic] = []
    numbers = count()
    samples = [index >= parameters for index in range(len(program.inputs))]
    _walk(program, samples, numbers, found)
    return found


def _walk(
    program: Program, samples: Sequence[bool], numbers: Iterator[int], found: list[OwnStatistic]
) -> None:
    def rule(_: walker.Path, eqn: Equation, values: list[_Value]) -> list[_Value]:
        sample = any(value.sample for value in values)
        for body in eqn.bodies:
            inner = [value.sample for value in values]
            if len(inner) != len(body.inputs):
                inner = [sample] * len(body.inputs)
            _walk(body, inner, numbers, found)
        if sample and len(values) == 2 and _is_own_statistic(eqn, *values):
            alone = all(value.statistic != "positions" for value in values)
            found.append(OwnStatistic(eqn, alone))
        if (known := _followed(eqn, values, numbers)) is not None:
            return [known]
        return [_fresh(numbers, sample) for _ in eqn.outputs]

    inputs = [_fresh(numbers, sample) for sample in samples]
    walker.evaluate(program, inputs, rule, lift=_constant)


def _fresh(numbers: Iterator[int], sample: bool) -> _Value:
    number = next(numbers)
    return _Value(number, number, sample=sample)


def _is_own_statistic(eqn: Equation, value: _Value, other: _Value) -> bool:
    if value.entries is None or other.entries is None:
        return False
    if bool(value.statistic) == bool(other.statistic):
        return False
    if eqn.name == "sub" and "positions" not in (value.statistic, other.statistic):
        return value.entries == other.entries
    if eqn.name == "sub":
        return value.origin == other.origin
    # A share of itself, as in a softmax over one, is no normalisation over a batch.
    by_another = value.origin == other.origin and value.entries != other.entries
    return eqn.name in ("mul", "div") and by_another


def _followed(eqn: Equation, values: list[_Value], numbers: Iterator[int]) -> _Value | None:
    """What is known of the output, where it has entries of one origin, in their order."""
    moving = [value for value in values if value.entries is not None]
    if not moving or any(value.origin != moving[0].origin for value in moving):
        return None
    value = moving[0]
    same_size = eqn.outputs and math.prod(eqn.outputs[0].shape) == math.prod(eqn.operands[0].shape)
    if eqn.name in _REDUCTIONS:
        shape, axes = eqn.operands[0].shape, eqn.params["axes"]
        over_batch = 0 in axes and shape[0] == 1 and len(axes) < len(shape)
        if math.prod(shape[axis] for axis in axes) == 1:
            batch = "batch" if over_batch else ""
            return value._replace(statistic=value.statistic or batch)
        if over_batch:
            return value._replace(entries=next(numbers), statistic="positions")
        return None
    if eqn.name in _SAME_ENTRIES and (same_size or value.statistic == "positions"):
        return value
    if eqn.name in ("div", "mul") and values[-1].number == 1:
        return value
    if eqn.name in _BY_ENTRY and len(eqn.outputs) == 1:
        kinds = {value.statistic for value in moving}
        statistic = "" if "" in kinds else max(kinds)
        return value._replace(entries=next(numbers), statistic=statistic)
    return None


def _constant(array: Any) -> _Value:
    # Only a number of the program's text: an array may be traced.
    known = isinstance(array, int | float | np.generic | np.ndarray) and np.size(array) == 1
    if known and not np.iscomplexobj(array):
        return _Value(number=float(np.reshape(array, ())))
    return _Value()
