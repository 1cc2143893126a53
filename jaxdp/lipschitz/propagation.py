"""Bounds through a whole program: values forward, cotangents backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine import walker
from jaxdp.engine.walker import Equation, Program
from jaxdp.lipschitz.dataflow import row_for_each_sample, vanishing
from jaxdp.lipschitz.declaration import declared_rule, shown_name
from jaxdp.lipschitz.rules.registry import PullBack, rule_of
from jaxdp.lipschitz.rules.structure import side_by_side
from jaxdp.lipschitz.value import SHARED, Cotangent, Range, Value, added, jointly, largest


class Step(NamedTuple):
    """One equation that lies between a parameter and the loss.

    Attributes:
      name: of its primitive, or of the declared function.
      source: where the user wrote it.
      operands, outputs: what is known of them.
      pull_back: of cotangents.
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
        if total is not None:
            total = jnp.where(jnp.isnan(total), jnp.inf, total)  # 0 · ∞ says nothing
        # The value is kept, so that no other one can get its id.
        self._found[id(value)] = (value, total)


def propagate(program: Program, inputs: Sequence[Value]) -> tuple[list[Value], Tape]:
    """Values of the outputs, and what it takes to pull cotangents back.

    Raises:
      NotImplementedError: a primitive without a rule.
    """
    tape: Tape = []
    return _evaluate(program, inputs, tape, ()), tape


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


def _evaluate(
    program: Program, inputs: Sequence[Value], tape: Tape, path: walker.Path
) -> list[Value]:
    def rule(path: walker.Path, eqn: Equation, values: list[Value]) -> Sequence[Value]:
        _check_precision(eqn)
        moves = any(value.moves for value in values)
        known = all(value.array is not None for value in values)
        if known and not moves:
            return [Value.known(array) for array in eqn.bind([value.array for value in values])]
        if (scan := eqn.scan) is not None:
            return _unrolled(scan, eqn, values, tape, path)
        if (remat := eqn.remat) is not None:
            return _evaluate(remat.body, values, tape, path)
        found = _found(eqn, values, path)
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
        if any(output.moves for output in outputs):
            tape.append(Step(shown_name(eqn), eqn.source, values, outputs, found.pull_back))
        return outputs

    return walker.evaluate(
        program,
        inputs,
        rule,
        lift=Value.known,
        enter=lambda eqn: declared_rule(eqn) is None,
        path=path,
    )


class _Found(NamedTuple):
    """What is known of the outputs of an equation, see `Value`, and how cotangents go back."""

    ranges: Sequence[Range]
    pull_back: PullBack
    per_sample: Sequence[bool]


def _found(eqn: Equation, values: Sequence[Value], path: walker.Path) -> _Found:
    rows = [value.per_sample for value in values]
    if (declared := declared_rule(eqn)) is not None:
        return _Found(*declared(eqn, values), row_for_each_sample(eqn.call, rows))
    if eqn.branches:
        return _branches(eqn, values, path)
    if (body := eqn.custom_jvp or eqn.custom_vjp) is not None:
        return _own_derivative(body, eqn, values, path)
    same = [any(rows)] * len(eqn.outputs)
    if not any(jnp.issubdtype(aval.dtype, jnp.inexact) for aval in eqn.outputs):
        # Numbers to count and to compare with have no gradient, and any value.
        return _Found([Range() for _ in eqn.outputs], lambda bounds: [None] * len(values), same)
    return _Found(*rule_of(eqn)(eqn, values), same)


def _check_precision(eqn: Equation) -> None:
    for aval in eqn.outputs:
        if jnp.issubdtype(aval.dtype, jnp.complexfloating):
            raise NotImplementedError(
                f"no bound is known for complex numbers, as {eqn.name} gives ({eqn.source}): clip "
                "instead (jaxdp.clip_flat)"
            )
        if jnp.issubdtype(aval.dtype, jnp.floating) and jnp.finfo(aval.dtype).bits < 32:
            raise TypeError(
                f"bounds need at least float32, got {aval.dtype} ({eqn.source}): half precision "
                "rounds by more than a bound has room for; clip instead (jaxdp.clip_flat)"
            )


def _unrolled(
    scan: walker.Scan, eqn: Equation, values: Sequence[Value], tape: Tape, path: walker.Path
) -> list[Value]:
    """The body once for every step, since what is known of the state changes from step to step."""
    first, last = scan.constants, scan.constants + scan.carry
    constants, carry, rows = values[:first], list(values[first:last]), values[last:]
    parts = [_rows(value, scan.length, eqn, tape) for value in rows]
    collected: dict[int, list[Value]] = {}
    order = range(scan.length)
    for step in reversed(order) if scan.reverse else order:
        inputs = [*constants, *carry, *(part[step] for part in parts)]
        outputs = _evaluate(scan.body, inputs, tape, path)
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
    if value.moves:
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
    if moves:
        count = len(parts)
        tape.append(Step(eqn.name, eqn.source, parts, [whole], lambda bounds: [*bounds] * count))
    return whole


def _branches(eqn: Equation, values: Sequence[Value], path: walker.Path) -> _Found:
    """Whatever the branch."""
    operands = values[1:]
    runs: list[tuple[list[Value], Tape]] = []
    for branch in eqn.branches:
        tape: Tape = []
        runs.append((_evaluate(branch, operands, tape, path), tape))
    ranges = [
        Range(
            jnp.max(jnp.stack([output.norm for output in outputs])),
            jnp.min(jnp.stack([output.low for output in outputs])),
            jnp.max(jnp.stack([output.high for output in outputs])),
        )
        if jnp.issubdtype(outputs[0].dtype, jnp.floating)
        else Range()
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
    body: Program, eqn: Equation, values: Sequence[Value], path: walker.Path
) -> _Found:
    """Of `jax.custom_jvp` and `jax.custom_vjp`: their body says nothing about their gradient, so
    the program of the gradient itself is bounded, with its cotangent as one more input."""
    outputs = _evaluate(body, values, [], path)
    if eqn.custom_vjp is not None and not all(output.per_sample for output in outputs):
        raise NotImplementedError(
            f"the gradient of {eqn.name} ({eqn.source}) need not be linear in the cotangent, and "
            f"{SHARED}: use jax.custom_jvp, or declare the function (jaxdp.lipschitz.declare)"
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
                "cotangent is, so that rows without a sample might count: multiply it by the "
                "cotangent, or declare the function (jaxdp.lipschitz.declare)"
            )
        upstream = [
            Value(
                aval.shape, aval.dtype, range=Range(0 if bound is None else bound), per_sample=True
            )
            for aval, bound in zip(outs, bounds, strict=True)
        ]
        still = [_unmoved(value) for value in values]
        found = iter(_evaluate(program, [*still, *upstream], [], path))
        return [next(found).norm if index in moving else None for index in range(len(values))]

    rows = [output.per_sample for output in outputs]
    return _Found([output.range for output in outputs], back, rows)


def _unmoved(value: Value) -> Value:
    if value.array is not None:
        return Value.known(value.array)
    return Value(value.shape, value.dtype, range=value.range, per_sample=value.per_sample)
