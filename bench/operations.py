"""Counts operations and bytes of one device in a compiled program, loops as often as they run.

    cost = operations.cost(jax.jit(step).lower(...).compile())

A program that is spread over devices is compiled as what one of them does, so that this is the work
of a device. `compiled.cost_analysis()` of XLA counts the body of a loop once, and draws of random
numbers are loops on a CPU; here the body counts for each of its steps. An operation is one number
computed from others, integers included; a product of matrices has two for each of its terms. Bytes
are those that instructions read and write, where a slice of an array is all that is touched. What
devices exchange counts in bytes, too; `jaxdp.distributed.exchanged` says what it is.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.stages import Compiled

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"}
_MOVES = _FREE | {
    *("iota", "broadcast", "reshape", "copy", "transpose", "slice", "concatenate", "pad"),
    *("reverse", "gather", "dynamic-slice", "dynamic-update-slice", "copy-start", "copy-done"),
    *("after-all", "partition-id", "replica-id"),
}
_EXCHANGES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


class Cost(NamedTuple):
    """What one device computes and touches."""

    operations: float
    bytes: float

    def __add__(self, other: Any) -> "Cost":
        return Cost(self.operations + other.operations, self.bytes + other.bytes)

    def times(self, count: int) -> "Cost":
        """That of as many runs."""
        return Cost(count * self.operations, count * self.bytes)


class _Instruction(NamedTuple):
    name: str
    shapes: list[tuple[str, tuple[int, ...]]]  # dtype and sizes of each result
    opcode: str
    operands: list[str]
    text: str

    @property
    def elements(self) -> int:
        return sum(math.prod(sizes) for _, sizes in self.shapes)

    @property
    def bytes(self) -> int:
        return sum(_BYTES.get(dtype, 4) * math.prod(sizes) for dtype, sizes in self.shapes)


class _Program(dict[str, dict[str, _Instruction]]):
    """The instructions of each computation by name, and which computation is the entry."""

    entry = ""

    @classmethod
    def of(cls, text: str) -> "_Program":
        program, current = cls(), {}
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
                current = program[head[2]] = {}
                program.entry = head[2] if head[1] else program.entry
            elif found := _parsed(line):
                current[found.name] = found
        return program

    def cost(self, name: str) -> Cost:
        """That of a computation."""
        return sum((self._of(each, self[name]) for each in self[name].values()), Cost(0, 0))

    def _of(self, each: _Instruction, among: dict[str, _Instruction]) -> Cost:
        if each.opcode == "while":
            steps = re.search(r'known_trip_count":\{"n":"(\d+)"', each.text)
            inside = sum(map(self.cost, _called(each, "body", "condition")), Cost(0, 0))
            # A loop of unknown length runs where a sample is not finite: not at all.
            return inside.times(int(steps[1]) if steps else 0)
        if each.opcode == "conditional":
            branches = _called(each, "branch_computations", "true_computation", "false_computation")
            return max(map(self.cost, branches))
        if each.opcode == "call":
            return self.cost(_called(each, "to_apply")[0])
        if each.opcode == "fusion":
            inside = _called(each, "calls")[0]
            return Cost(self.cost(inside).operations, self._touched(each, among, self[inside]))
        touched = 0 if each.opcode in _FREE else self._moved(each, among)
        return Cost(_operations(each, among), touched)

    def _touched(
        self,
        fusion: _Instruction,
        among: dict[str, _Instruction],
        inside: dict[str, _Instruction],
    ) -> float:
        """Bytes of a fusion: of an operand that is only sliced the slices, and of a result that is
        updated in place the update."""
        parameters = {
            int(found[1]): each
            for each in inside.values()
            if (found := re.search(r" parameter\((\d+)\)", each.text))
        }
        total = 0.0
        for index, operand in enumerate(fusion.operands):
            users = [each for each in inside.values() if parameters[index].name in each.operands]
            sliced = [each for each in users if each.opcode == "dynamic-slice"]
            updated = [
                each
                for each in users
                if each.opcode == "dynamic-update-slice"
                and each.operands[0] == parameters[index].name
            ]
            if len(sliced) + len(updated) == len(users):
                total += sum(each.bytes for each in sliced)
            else:
                total += among[operand].bytes if operand in among else 0
        root = list(inside.values())[-1]
        updates = [each for each in inside.values() if each.opcode == "dynamic-update-slice"]
        in_place = updates and {shape for each in updates for shape in each.shapes} >= set(
            root.shapes
        )
        written = sum(inside[each.operands[1]].bytes for each in updates)
        return total + (written if in_place else fusion.bytes)

    def _moved(self, each: _Instruction, among: dict[str, _Instruction]) -> float:
        operands = [among[name] for name in each.operands if name in among]
        if each.opcode == "dynamic-slice":
            return 2 * each.bytes
        if each.opcode == "dynamic-update-slice":
            return 2 * operands[1].bytes
        return each.bytes + sum(operand.bytes for operand in operands)


def cost(compiled: Compiled) -> Cost:
    """The operations and bytes of one call, on each device."""
    program = _Program.of(str(compiled.as_text()))
    return program.cost(program.entry)


def _parsed(line: str) -> _Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", line)
    if found is None:
        return None
    name, result, opcode, rest = found.groups()
    shapes = [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in re.findall(r"([a-z]\w*)\[([\d,]*)\]", result)
    ]
    inside = rest[: _closing(rest)]
    return _Instruction(name, shapes, opcode, re.findall(r"%([\w.\-]+)", inside), line)


def _closing(text: str) -> int:
    """Where the bracket closes that was open at the beginning."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index
    return len(text)


def _called(each: _Instruction, *keys: str) -> list[str]:
    def names() -> Iterator[str]:
        for key in keys:
            for listed in re.findall(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", each.text):
                yield from re.findall(r"[\w.\-]+", listed)

    return list(names())


def _operations(each: _Instruction, among: dict[str, _Instruction]) -> float:
    if each.opcode in _MOVES or each.opcode.startswith(_EXCHANGES):
        return 0
    if each.opcode == "dot":
        _, sizes = among[each.operands[0]].shapes[0]
        along = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.text)
        dims = along[1].split(",") if along and along[1] else []
        return 2 * each.elements * math.prod(sizes[int(dim)] for dim in dims)
    if each.opcode == "convolution":
        return 2 * _products(each, among)
    if each.opcode in ("reduce", "reduce-window"):
        half = len(each.operands) // 2
        return sum(among[name].elements for name in each.operands[:half])
    return each.elements


def _products(each: _Instruction, among: dict[str, _Instruction]) -> int:
    """How many products a convolution adds up; one with the padding or between the entries of what
    is dilated is none."""
    (image, kernel), result = (among[name].shapes[0][1] for name in each.operands[:2]), each.shapes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.text)
    assert labels is not None, each.text
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", each.text.split("window={")[-1].split("}")[0]))
    groups = re.search(r"batch_group_count=(\d+)", each.text)
    channels = kernel[labels[2].index("i")] * kernel[labels[2].index("o")]
    total = channels * image[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    for axis in range(len(image) - 2):

        def setting(name: str, default: str, axis: int = axis) -> str:
            return window[name].split("x")[axis] if name in window else default

        size = image[labels[1].index(str(axis))]
        low = int(setting("pad", "0_0").split("_")[0])
        stride, dilated = int(setting("stride", "1")), int(setting("lhs_dilate", "1"))
        holes = int(setting("rhs_dilate", "1"))
        places = (
            out * stride - low + tap * holes
            for out in range(result[0][1][labels[3].index(str(axis))])
            for tap in range(int(setting("size", "1")))
        )
        total *= sum(at % dilated == 0 and 0 <= at // dilated < size for at in places)
    return total
