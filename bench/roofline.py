"""What a traced program asks of a machine: passes through its matrix units, bytes, and a time.

Claim: it counts a program, it runs none. Equations whose results nobody uses are left out first,
and equal equations count once, as a compiler would have it.

- A product of `f` operations takes f × passes, by the dtype of its operands and its precision, in
  units of a pass in bfloat16.
- Elementwise equations are part of what consumes them. An array is written where a product, a
  reduction or a loop makes it or needs it, and read by each of those.
- A loop of known length counts so many times its body; a branch as its dearest; a loop of unknown
  length, which here runs only where a sample is not finite, counts for nothing.

The time of a product is the larger of its arithmetic and its traffic, and all of them add up.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jax.lax import Precision

from jaxdp.engine import walker
from jaxdp.engine.walker import Equation, Path, Program


class Machine(NamedTuple):
    """An accelerator.

    Attributes:
      platform: as JAX calls it.
      flops: operations a second of its matrix units in bfloat16.
      bandwidth: bytes a second of its memory.
      float32: passes of a product of float32 at the precisions DEFAULT, HIGH and HIGHEST.
    """

    platform: str
    flops: float
    bandwidth: float
    float32: tuple[int, int, int]


# Vendors' data sheets: dense bfloat16, and memory. Of float32, a TPU makes 1, 3 or 6 products of
# bfloat16; an H100 takes TF32 at half the speed, or leaves its matrix units (67 against 989).
MACHINES = {
    "H100": Machine("gpu", 989e12, 3.35e12, (2, 2, 15)),
    "v5p": Machine("tpu", 459e12, 2.765e12, (1, 3, 6)),
}


class Cost(NamedTuple):
    """What a program asks for."""

    flops: float = 0.0
    passes: float = 0.0  # flops, each as many times as it takes passes
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Any) -> "Cost":
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, count: Any) -> "Cost":
        return Cost(*(count * a for a in self))


@dataclass(eq=False)
class Value:
    """An array of a program: written, or still part of what will consume it.

    Attributes:
      size: in bytes.
      sources: the written arrays that it is computed from, if it is not written itself.
    """

    size: int
    sources: frozenset["Value"] = field(default_factory=frozenset["Value"])
    written: bool = False

    @property
    def read(self) -> frozenset["Value"]:
        """What is read where the value is needed."""
        return frozenset([self]) if self.written else self.sources


def cost(fun: Callable[..., Any], args: Sequence[Any], machine: Machine) -> Cost:
    """Of a function of these arguments, which may be shapes."""
    program, _ = walker.trace(fun, *args)
    alive = [True] * len(program.outputs)
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, alive, instantiate=True)
    return _Meter(machine).of_program(Program(jaxpr, program.constants))


_PRODUCTS = {"dot_general", "conv_general_dilated"}
# The same bytes in the same order; a sum is one over axes of size one, if it makes nothing smaller.
_RESHAPES = {"reshape", "squeeze", "reduce_sum"}
# What reads a part of an operand alone, as large as its result.
_LOOK_UPS = {"gather", "dynamic_slice"}
_UPDATES = {"scatter": 2, "scatter-add": 2, "scatter_add": 2, "dynamic_update_slice": 1}
_NOT_FUSED = ("reduce_", "arg", "cum", "sort", "top_k", "concatenate", "select_and_", "random_")


class _Meter:
    def __init__(self, machine: Machine):
        self.machine = machine
        self.total = Cost()
        self.seen: dict[Any, list[Value]] = {}

    def of_program(self, program: Program) -> Cost:
        """The cost of a program by itself: its inputs are there, its outputs are written."""
        args = [Value(_size(aval), written=True) for aval in program.inputs]

        def constant(value: Any) -> Value:
            return Value(getattr(value, "nbytes", 8), written=True)

        for value in walker.evaluate(program, args, self._rule, lift=constant):
            self._write(value)
        return self.total

    def _rule(self, path: Path, eqn: Equation, values: list[Value]) -> list[Value]:
        del path
        if eqn.bodies:
            return self._of_bodies(eqn, values)
        key = (eqn.name, tuple(map(id, values)), str(eqn.params))
        if eqn.name == "optimization_barrier" or key not in self.seen:
            self.seen[key] = self._of_equation(eqn, values)
        return self.seen[key]

    def _of_equation(self, eqn: Equation, values: list[Value]) -> list[Value]:
        sizes = [_size(aval) for aval in eqn.outputs]
        if eqn.name == "optimization_barrier":
            for value in values:
                self._write(value)
            return values
        if eqn.name in _RESHAPES and sizes == [values[0].size]:
            return values
        if eqn.name in _PRODUCTS:
            for value in values:
                self._write(value)
            flops = _operations(eqn)
            moved = sum(value.size for value in set(values)) + sizes[0]
            self._spend(flops, flops * self._passes(eqn), moved)
            return [Value(sizes[0], written=True)]
        if eqn.name in _LOOK_UPS:
            self._spend(0, 0, 2 * sizes[0])
            return [Value(sizes[0], written=True)]
        if eqn.name in _UPDATES:
            update = values[_UPDATES[eqn.name]]
            self._write(values[0])
            self._spend(0, 0, 3 * update.size)
            return [Value(sizes[0], written=True)]
        if eqn.name == "slice":  # of what is written, a part
            sources = frozenset(Value(min(v.size, sizes[0]), written=True) for v in values[0].read)
            return [Value(sizes[0], sources)]
        sources = frozenset[Value]().union(*(value.read for value in values))
        if eqn.name.startswith(_NOT_FUSED) and eqn.name != "reduce_precision":
            self._spend(0, 0, sum(value.size for value in sources) + sum(sizes))
            return [Value(size, written=True) for size in sizes]
        return [Value(size, sources) for size in sizes]

    def _of_bodies(self, eqn: Equation, values: list[Value]) -> list[Value]:
        for value in values:
            self._write(value)
        costs = [_Meter(self.machine).of_program(body) for body in eqn.bodies]
        if eqn.scan is not None:
            self.total += costs[0] * eqn.scan.length
        elif eqn.branches:
            self.total += max(costs, key=lambda cost: cost.seconds)
        elif eqn.name != "while":
            self.total += costs[0]
        return [Value(_size(aval), written=True) for aval in eqn.outputs]

    def _write(self, value: Value) -> None:
        if not value.written:
            self._spend(0, 0, sum(source.size for source in value.sources) + value.size)
            value.written, value.sources = True, frozenset()

    def _spend(self, flops: float, passes: float, size: float) -> None:
        seconds = max(passes / self.machine.flops, size / self.machine.bandwidth)
        self.total += Cost(flops, passes, size, seconds)

    def _passes(self, eqn: Equation) -> int:
        if max(jnp.finfo(aval.dtype).bits for aval in eqn.operands) < 32:
            return 1
        precision = eqn.params["precision"]
        asked = precision if isinstance(precision, tuple) else (precision,)
        order = [None, Precision.HIGH, Precision.HIGHEST]
        places = [order.index(None if p == Precision.DEFAULT else p) for p in asked]
        return self.machine.float32[max(places)]


def _operations(eqn: Equation) -> int:
    """Twice the products of a matrix product or a convolution."""
    left, right = eqn.operands
    out = math.prod(eqn.outputs[0].shape)
    if eqn.name == "dot_general":
        contracted = eqn.params["dimension_numbers"][0][0]
        return 2 * out * math.prod(left.shape[axis] for axis in contracted)
    kernel = eqn.params["dimension_numbers"].rhs_spec
    dilation = math.prod(eqn.params["lhs_dilation"])
    # Zeros between the pixels are not multiplied by those who know of them.
    return 2 * out * math.prod(right.shape) // right.shape[kernel[0]] // dilation


def _size(aval: Any) -> int:
    if not hasattr(aval, "shape") or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return 8
    return math.prod(aval.shape) * aval.dtype.itemsize
