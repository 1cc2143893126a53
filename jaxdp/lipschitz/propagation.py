"""Propagates bounds through a whole program: on values forward, on cotangents backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine import walker
from jaxdp.engine.walker import Equation, Program
from jaxdp.lipschitz.dataflow import row_for_each_sample, rows_of_outputs, vanishing
from jaxdp.lipschitz.declaration import declared_rule, shown_name
from jaxdp.lipschitz.rules.registry import PullBack, Registered, rule_of
from jaxdp.lipschitz.rules.structure import side_by_side
from jaxdp.lipschitz.value import (
    INFINITE,
    SHARED,
    UNKNOWN,
    Cotangent,
    Range,
    Value,
    added,
    is_infinite,
    jointly,
    known_infinite,
    largest,
)


class Step(NamedTuple):
    """One equation of the program, or the work of a loop beside the equations of its body.

    Attributes:
      name: the name of the primitive or of the declared function.
      source: where the user wrote it.
      operands, outputs: their values, as far as they are known.
      pull_back: maps bounds on cotangents of the outputs to bounds on those of the operands.
    """

    name: str
    source: str
    operands: Sequence[Value]
    outputs: Sequence[Value]
    pull_back: PullBack


Tape = list[Step]


class Cotangents:
    """Bounds on the cotangents of values, by identity."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Value, Cotangent]] = {}

    def __getitem__(self, value: Value) -> Cotangent:
        return self._found.get(id(value), (value, None))[1]

    def add(self, value: Value, bound: Cotangent) -> None:
        """A value that is used twice has the sum of two cotangents."""
        total = added([self[value], bound])
        if total is not None and not is_infinite(total):
            total = jnp.where(jnp.isnan(total), jnp.inf, total)  # 0 · ∞ says nothing
        # The value is kept, so that no other one can get its id.
        self._found[id(value)] = (value, total)


def propagate(program: Program, inputs: Sequence[Value]) -> tuple[list[Value], Tape]:
    """Values of the outputs, and the steps through which cotangents are pulled back.

    Raises:
      NotImplementedError: a primitive without a rule.
    """
    tape: Tape = []
    return _evaluate(program, inputs, tape), tape


def pull_back(tape: Tape, outputs: Sequence[Value], bounds: Sequence[Cotangent]) -> Cotangents:
    """Bounds on the cotangents of every value, given those of the outputs."""
    cotangents = Cotangents()
    for output, bound in zip(outputs, bounds, strict=True):
        cotangents.add(output, bound)
    for step in reversed(tape):
        here = [cotangents[output] for output in step.outputs]
        if all(bound is None for bound in here):
            continue
        for operand, bound in zip(step.operands, step.pull_back(here), strict=True):
            if operand.moves:
                cotangents.add(operand, bound)
    return cotangents


def culprit(tape: Tape, cotangents: Cotangents) -> str:
    """Names the equation that made the bound on a cotangent infinite, with its place in the code.

    The equation is arbitrarily steep, or its result may be infinite or NaN though its operands are
    not. The answer is "" where the bounds are traced.
    """
    makers = {id(output): step for step in tape for output in step.outputs}
    for step in reversed(tape):
        if any(known_infinite(cotangents[value]) for value in step.outputs):
            continue
        if not any(known_infinite(cotangents[value]) for value in step.operands):
            continue
        suspects = [value for value in step.operands if _endless(value)]
        if not suspects:
            return f"{step.name} ({step.source}) can be arbitrarily steep"
        (suspect, *_) = suspects
        while (maker := makers.get(id(suspect))) is not None:
            before = [value for value in maker.operands if _endless(value)]
            if not before:
                return f"{maker.name} ({maker.source}) may give what is infinite or no number"
            (suspect, *_) = before
        if suspect.array is None:
            return f"{step.name} ({step.source}) is given numbers that have no bound"
        return f"{step.name} ({step.source}) meets parameters or constants that are not finite"
    return ""


def _endless(value: Value) -> bool:
    return value.unknown or known_infinite(value.norm)


def _evaluate(
    program: Program, inputs: Sequence[Value], tape: Tape, declared: bool = True
) -> list[Value]:
    """`declared`: whether calls of declared functions are known by their names, which the calls of
    their derivatives keep."""

    def rule_for(eqn: Equation) -> Registered | None:
        return declared_rule(eqn) if declared else None

    def rule(_: walker.Path, eqn: Equation, values: list[Value]) -> Sequence[Value]:
        _check_precision(eqn)
        moves = any(value.moves for value in values)
        known = all(value.array is not None for value in values)
        if known and not moves:
            return [Value.known(array) for array in eqn.bind([value.array for value in values])]
        if (scan := eqn.scan) is not None:
            return _unrolled(scan, eqn, values, tape, declared)
        if (remat := eqn.remat) is not None:
            return _evaluate(remat.body, values, tape, declared)
        found = _found(eqn, values, rule_for(eqn), declared)
        if known:
            arrays = eqn.bind([value.array for value in values])
            outputs = [Value.known(array, moves=moves) for array in arrays]
        else:
            outputs = [
                Value(aval.shape, aval.dtype, range=Range(*range), moves=moves, per_sample=rows)
                for aval, range, rows in zip(
                    eqn.outputs, found.ranges, found.per_sample, strict=True
                )
            ]
        tape.append(Step(shown_name(eqn), eqn.source, values, outputs, found.pull_back))
        return outputs

    return walker.evaluate(
        program, inputs, rule, lift=Value.known, enter=lambda eqn: rule_for(eqn) is None
    )


class _Found(NamedTuple):
    """The values of the outputs of an equation, and how cotangents go back."""

    ranges: Sequence[Range]
    pull_back: PullBack
    per_sample: Sequence[bool]


def _found(
    eqn: Equation, values: Sequence[Value], own: Registered | None, declared: bool
) -> _Found:
    rows = [value.per_sample for value in values]
    if own is not None:
        assert eqn.call is not None  # what is declared is a function that is called
        return _of_rule(own, eqn, values, row_for_each_sample(eqn.call, rows))
    if eqn.branches:
        return _branches(eqn, values, declared)
    if (body := eqn.custom_jvp or eqn.custom_vjp) is not None:
        return _own_derivative(body, eqn, values, declared)
    rows = rows_of_outputs(eqn, rows)
    whole_numbers = not any(
        jnp.issubdtype(each.dtype, jnp.inexact) for each in (*eqn.outputs, *values)
    )
    if whole_numbers and eqn.name in _CHOICES:
        return _of_rule(rule_of(eqn), eqn, values, rows)
    if not any(jnp.issubdtype(aval.dtype, jnp.inexact) for aval in eqn.outputs):
        # Integers and flags have no gradient, and may have any value of their type.
        return _Found([UNKNOWN for _ in eqn.outputs], lambda bounds: [None] * len(values), rows)
    return _of_rule(rule_of(eqn), eqn, values, rows)


# These give one of their operands for each entry, so that no integer overflows.
_CHOICES = {
    "broadcast_in_dim", "clamp", "concatenate", "expand_dims", "max", "min", "reshape", "rev",
    "select_n", "slice", "squeeze", "transpose",
}  # fmt: skip


def _of_rule(
    registered: Registered, eqn: Equation, values: Sequence[Value], per_sample: Sequence[bool]
) -> _Found:
    ranges, back = registered.rule(eqn, values)
    if all(value.array is not None for value in values):
        ranges = [UNKNOWN for _ in eqn.outputs]  # not needed: the outputs are known
    else:
        ranges = registered.ranges(ranges, values)
    return _Found(ranges, registered.back(back, values), per_sample)


def _check_precision(eqn: Equation) -> None:
    for aval in eqn.outputs:
        if jnp.issubdtype(aval.dtype, jnp.complexfloating):
            raise NotImplementedError(
                f"no bound is known for complex numbers, as {eqn.name} gives ({eqn.source}). Clip "
                "instead (jaxdp.clip_flat)."
            )
        if jnp.issubdtype(aval.dtype, jnp.floating) and jnp.finfo(aval.dtype).bits < 32:
            raise TypeError(
                f"bounds need at least float32, got {aval.dtype} ({eqn.source}). Half precision "
                "rounds by more than a bound has room for; clip instead (jaxdp.clip_flat)."
            )


def _unrolled(
    scan: walker.Scan, eqn: Equation, values: Sequence[Value], tape: Tape, declared: bool
) -> list[Value]:
    """Propagates through the body once for every step, since the bounds on the state change."""
    first, last = scan.constants, scan.constants + scan.carry
    constants, carry, rows = values[:first], list(values[first:last]), values[last:]
    parts = [_rows(value, scan.length, eqn, tape) for value in rows]
    collected: dict[int, list[Value]] = {}
    order = range(scan.length)
    for step in reversed(order) if scan.reverse else order:
        inputs = [*constants, *carry, *(part[step] for part in parts)]
        outputs = _evaluate(scan.body, inputs, tape, declared)
        carry, collected[step] = outputs[: scan.carry], outputs[scan.carry :]
    stacked = zip(*(collected[step] for step in order), strict=True)
    if scan.length == 0:
        stacked = [()] * (len(eqn.outputs) - scan.carry)
    avals = eqn.outputs[scan.carry :]
    return carry + [
        _stacked(list(parts), aval, eqn, tape) for parts, aval in zip(stacked, avals, strict=True)
    ]


def _rows(value: Value, length: int, eqn: Equation, tape: Tape) -> list[Value]:
    """The slices along the first axis; together they are no longer than the whole."""
    if value.array is not None:
        parts = [Value.known(value.array[k], moves=value.moves) for k in range(length)]
    else:
        known_of_each = {
            "range": value.range,
            "moves": value.moves,
            "per_sample": value.per_sample,
        }
        parts = [Value(value.shape[1:], value.dtype, **known_of_each) for _ in range(length)]
    tape.append(Step(eqn.name, eqn.source, [value], parts, lambda bounds: [jointly(bounds)]))
    return parts


def _stacked(parts: list[Value], aval: Any, eqn: Equation, tape: Tape) -> Value:
    moves = any(part.moves for part in parts)
    if all(part.array is not None for part in parts):
        slices = [jnp.asarray(part.array)[None] for part in parts]
        empty = jnp.zeros((0, *aval.shape[1:]), aval.dtype)
        whole = Value.known(jnp.concatenate([empty, *slices]), moves=moves)
    else:
        rows = any(part.per_sample for part in parts)
        joint = side_by_side(parts)
        whole = Value(aval.shape, aval.dtype, range=joint, moves=moves, per_sample=rows)
    count = len(parts)
    tape.append(Step(eqn.name, eqn.source, parts, [whole], lambda bounds: [*bounds] * count))
    return whole


def _branches(eqn: Equation, values: Sequence[Value], declared: bool) -> _Found:
    """Bounds that hold for every branch."""
    operands = values[1:]
    runs: list[tuple[list[Value], Tape]] = []
    for branch in eqn.branches:
        tape: Tape = []
        runs.append((_evaluate(branch, operands, tape, declared), tape))
    ranges = [
        Range(
            jnp.max(jnp.stack([output.norm for output in outputs])),
            jnp.min(jnp.stack([output.low for output in outputs])),
            jnp.max(jnp.stack([output.high for output in outputs])),
        )
        if not any(output.unknown for output in outputs)
        else UNKNOWN
        for outputs in zip(*(outputs for outputs, _ in runs), strict=True)
    ]

    def back(bounds: Sequence[Cotangent]) -> Sequence[Cotangent]:
        found = [pull_back(tape, outputs, bounds) for outputs, tape in runs]
        return [None, *(largest([each[operand] for each in found]) for operand in operands)]

    rows = [
        all(output.per_sample for output in outputs)
        for outputs in zip(*(outputs for outputs, _ in runs), strict=True)
    ]
    return _Found(ranges, back, rows)


def _own_derivative(
    body: Program, eqn: Equation, values: Sequence[Value], declared: bool
) -> _Found:
    """Bounds for `jax.custom_jvp` and `jax.custom_vjp`.

    Their body says nothing about their gradient. So the program of the gradient itself is bounded,
    with the cotangent as one more input.
    """
    outputs = _evaluate(body, values, [], declared)
    rows = rows_of_outputs(eqn, [value.per_sample for value in values])
    if eqn.custom_vjp is not None and not all(rows):
        raise NotImplementedError(
            f"the gradient of {eqn.name} ({eqn.source}) need not be linear in the cotangent, and "
            f"{SHARED}. Use jax.custom_jvp, or declare the function (jaxdp.lipschitz.declare)."
        )
    moving = [index for index, value in enumerate(values) if value.moves]

    def transposed(arrays: list[jax.Array], cotangents: list[jax.Array]) -> list[jax.Array]:
        def function(moved: list[jax.Array]) -> list[jax.Array]:
            given = list(arrays)
            for index, array in zip(moving, moved, strict=True):
                given[index] = array
            return eqn.bind(given)

        _, transpose = jax.vjp(function, [arrays[index] for index in moving])
        return transpose(cotangents)[0]

    def back(bounds: Sequence[Cotangent]) -> Sequence[Cotangent]:
        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]
        outs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in eqn.outputs]
        program, _ = walker.trace(transposed, shapes, outs)
        if not all(vanishing(program, [False] * len(shapes) + [True] * len(outs))):
            raise NotImplementedError(
                f"the gradient of {eqn.name} ({eqn.source}) is not known to be zero where its "
                "cotangent is, so that rows without a sample might count. Multiply it by the "
                "cotangent, or declare the function (jaxdp.lipschitz.declare)."
            )
        upstream = [
            Value(
                aval.shape, aval.dtype, range=Range(0 if bound is None else bound), per_sample=row
            )
            for aval, bound, row in zip(outs, bounds, rows, strict=True)
        ]
        still = [_unmoved(value) for value in values]
        found = _evaluate(program, [*still, *upstream], [], declared=False)
        bounded = [INFINITE if value.unknown else value.norm for value in found]
        return [bounded[moving.index(k)] if k in moving else None for k in range(len(values))]

    return _Found([output.range for output in outputs], back, rows)


def _unmoved(value: Value) -> Value:
    if value.array is not None:
        return Value.known(value.array)
    return Value(value.shape, value.dtype, range=value.range, per_sample=value.per_sample)
