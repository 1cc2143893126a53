"""Reads and evaluates jaxprs: the only room that knows their internals (JAX 0.10 to 0.12).

A `Program` is a traced function. `evaluate` walks its equations in order and asks a rule what to
do with each; nested calls (`jit`) are entered, so that a rule never sees them. What a value is
depends on the rule alone: arrays, or whatever an analysis knows of them. An analysis that walks in
another order follows the `Key` of each value from the equation that writes it to those that read
it (`engine.liveness`, `engine.twins`).

    program = walker.trace(fun, *args)
    outputs = walker.evaluate(program, args, lambda path, eqn, values: eqn.bind(values))

A `Path` names an equation: its position in the program, behind the positions of the equations
that hold it. Loops and rematerialised blocks are equations with a `body`.
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
from jax.core import AbstractValue
from jax.extend import core, source_info_util

Path = tuple[int, ...]
# Names a value within one program; says nothing else about it.
Key = Hashable

# Names that differ between versions, or that mean the same to us.
_NAMES = {"pjit": "jit", "remat2": "remat", "checkpoint": "remat"}
# Primitives that only call a function: its equations count as those of the caller.
_CALLS = {"jit", "closed_call", "core_call"}


@dataclass(frozen=True, eq=False)
class Program:
    """A traced function, or the body of a call, a loop, a branch or a block.

    Attributes:
      jaxpr: as JAX has it; this module alone looks into it.
      constants: the arrays that it closes over.
    """

    jaxpr: Any
    constants: Sequence[Any]

    @classmethod
    def of(cls, jaxpr: Any) -> "Program":
        """Of what JAX calls a `ClosedJaxpr`; from JAX 0.11 on, and for the body of a block before,
        this is a `Jaxpr`."""
        return cls(getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ())))

    @property
    def inputs(self) -> list[Any]:
        """Abstract values (shape, dtype) of the inputs."""
        return [variable.aval for variable in self.jaxpr.invars]

    @property
    def outputs(self) -> list[Any]:
        """Abstract values (shape, dtype) of the outputs."""
        return [atom.aval for atom in self.jaxpr.outvars]

    @property
    def takes(self) -> list[Key]:
        """The keys of the inputs."""
        return list(self.jaxpr.invars)

    @property
    def returns(self) -> list[Key | None]:
        """The keys of the outputs; None for a literal."""
        return list(map(_key, self.jaxpr.outvars))

    def equations(self, caller: "Equation | None" = None) -> list["Equation"]:
        """Those at its own level, in their order; `caller` holds the program."""
        return [Equation(eqn, caller) for eqn in self.jaxpr.eqns]


def _key(atom: Any) -> Key | None:
    return None if isinstance(atom, core.Literal) else atom


class Scan(NamedTuple):
    """What `lax.scan` was asked for; the operands are constants, carry and xs, in this order."""

    body: Program
    constants: int
    carry: int
    length: int
    reverse: bool
    unroll: int


class Remat(NamedTuple):
    """What `jax.checkpoint` was asked for."""

    body: Program
    policy: Callable[..., bool] | None
    prevent_cse: Any


class Equation:
    """One equation: a primitive applied to operands.

    Args:
      eqn: JAX's.
      caller: the equation that calls the function, or holds the body, that it lies in.
    """

    def __init__(self, eqn: Any, caller: "Equation | None" = None):
        self._eqn = eqn
        self._caller = caller
        name = str(eqn.primitive.name)
        self.name: str = _NAMES.get(name, name)
        self.params: dict[str, Any] = eqn.params

    @property
    def operands(self) -> list[Any]:
        """Abstract values (shape, dtype) of the operands."""
        return [atom.aval for atom in self._eqn.invars]

    @property
    def outputs(self) -> list[Any]:
        """Abstract values (shape, dtype) of the outputs."""
        return [variable.aval for variable in self._eqn.outvars]

    @property
    def reads(self) -> list[Key | None]:
        """The keys of the operands; None for a literal."""
        return list(map(_key, self._eqn.invars))

    @property
    def writes(self) -> list[Key]:
        """The keys of the outputs."""
        return list(self._eqn.outvars)

    @property
    def source(self) -> str:
        """Where the user wrote it: file, line and function. Inside of functions that JAX itself
        compiles, as `jnp.take`, where they were called."""
        line = source_info_util.summarize(self._eqn.source_info)
        return line if line or self._caller is None else self._caller.source

    @property
    def effects(self) -> frozenset[str]:
        """What it does beside computing its outputs, by JAX's names for it: "WriteEffect"."""
        return frozenset(type(effect).__name__ for effect in self._eqn.effects)

    @property
    def named_axes(self) -> frozenset[str]:
        """The axes that it names: those of `vmap`, `shard_map` or `pmap`. JAX names its own axes by
        numbers."""
        named = jax.tree.leaves([self.params.get(key) for key in ("axes", "axis_name")])
        named += [
            getattr(effect, "name", None)
            for effect in self._eqn.effects
            if type(effect).__name__ == "NamedAxisEffect"
        ]
        return frozenset(name for name in named if isinstance(name, str))

    @property
    def bound_axes(self) -> frozenset[str]:
        """The axes of devices that it opens for the functions that it holds."""
        if self.name != "shard_map":
            return frozenset()
        # JAX 0.10 calls them manual, 0.12 newly manual.
        axes = self.params.get("newly_manual_axes", self.params.get("manual_axes"))
        return frozenset(self.params["mesh"].axis_names if axes is None else axes)

    @property
    def literals(self) -> list[Any]:
        """Operands that are constants of the equation itself."""
        return [atom.val for atom in self._eqn.invars if isinstance(atom, core.Literal)]

    @property
    def bodies(self) -> list[Program]:
        """The functions, loops and branches that it holds."""
        leaves = jax.tree.leaves(list(self.params.values()), is_leaf=_is_program)
        return [Program.of(leaf) for leaf in leaves if _is_program(leaf)]

    @property
    def touches_refs(self) -> bool:
        """Whether it makes, reads or writes a mutable array."""
        return any(map(is_ref, (*self.operands, *self.outputs)))

    @property
    def foreign(self) -> bool:
        """Whether its primitive is not one of JAX's own, so that nobody knows what it means."""
        return not is_of_jax(self._eqn.primitive)

    def bind(self, values: Sequence[Any], **changed: Any) -> list[Any]:
        """The primitive applied to these values, with other parameters where these are given."""
        params = self._eqn.primitive.get_bind_params({**self.params, **changed})
        with self._eqn.ctx.manager:
            outputs = self._eqn.primitive.bind(*values, **params)
        return list(outputs) if self._eqn.primitive.multiple_results else [outputs]

    @property
    def call(self) -> Program | None:
        """The function that this equation calls and nothing else, or None."""
        if self.name not in _CALLS:
            return None
        return Program.of(self.params["jaxpr" if "jaxpr" in self.params else "call_jaxpr"])

    @property
    def function(self) -> str:
        """The name of the function that this equation calls, or ""."""
        return str(self.params.get("name", "")) if self.name in _CALLS else ""

    @property
    def branches(self) -> Sequence[Program]:
        """What `lax.cond` or `lax.switch` chooses from by its first operand, or nothing."""
        return list(map(Program.of, self.params["branches"])) if self.name == "cond" else []

    @property
    def custom_jvp(self) -> Program | None:
        """The function, if it is one of `jax.custom_jvp`."""
        return Program.of(self.params["call_jaxpr"]) if self.name == "custom_jvp_call" else None

    @property
    def custom_vjp(self) -> Program | None:
        """The function, if it is one of `jax.custom_vjp`."""
        return Program.of(self.params["call_jaxpr"]) if self.name == "custom_vjp_call" else None

    @property
    def custom_vmap(self) -> Program | None:
        """The function, if it is one of `jax.custom_batching.custom_vmap`."""
        return self.bodies[0] if self.name == "custom_vmap_call" else None

    @property
    def own_derivative(self) -> bool:
        """Whether it may bring a rule of differentiation of its own, which is no part of the
        program until that is differentiated."""
        return self.name.startswith("custom_") or self.name in ("linear_call", "call_hi_primitive")

    @property
    def scan(self) -> Scan | None:
        """The loop, if this equation is one of static length."""
        if self.name != "scan":
            return None
        if "num_consts" in self.params:
            constants, carry = self.params["num_consts"], self.params["num_carry"]
        else:  # JAX 0.11
            constants, carry, _ = (len(group) for group in self.params["ft_in"].unpack())
        return Scan(
            body=Program.of(self.params["jaxpr"]),
            constants=constants,
            carry=carry,
            length=self.params["length"],
            reverse=self.params["reverse"],
            unroll=self.params["unroll"],
        )

    @property
    def remat(self) -> Remat | None:
        """The rematerialised block, if this equation is one that is not being differentiated."""
        if self.name != "remat" or self.params["differentiated"]:
            return None
        body = Program.of(self.params["jaxpr"])
        return Remat(body, self.params["policy"], self.params["prevent_cse"])


Rule = Callable[[Path, Equation, list[Any]], Sequence[Any]]


def trace(fun: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """The program of `fun` and the structure of what it returns; args may be shapes only."""
    jaxpr, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    return Program.of(jaxpr), cast(Any, jax.tree.structure(shapes))


def evaluate(
    program: Program,
    args: Sequence[Any],
    rule: Rule,
    *,
    lift: Callable[[Any], Any] = lambda constant: constant,
    enter: Callable[[Equation], bool] = lambda eqn: True,
    path: Path = (),
    caller: Equation | None = None,
) -> list[Any]:
    """The outputs of the program under a rule.

    Args:
      program: from `trace`, or the body of a loop or block.
      args: one value for each input.
      rule: `(path, equation, values of the operands) -> values of the outputs`.
      lift: turns a constant array into a value.
      enter: which calls are entered; the others are given to the rule.
      path: of the equation that holds this program.
      caller: that equation, if it calls this program and nothing else.
    """
    jaxpr = program.jaxpr
    values: dict[Key, Any] = dict(zip(jaxpr.constvars, map(lift, program.constants), strict=True))
    values |= zip(jaxpr.invars, args, strict=True)

    def read(atom: Any) -> Any:
        return lift(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for index, eqn in enumerate(jaxpr.eqns):
        equation, place = Equation(eqn, caller), (*path, index)
        operands = [read(atom) for atom in eqn.invars]
        if (body := equation.call) is not None and enter(equation):
            outputs = evaluate(
                body, operands, rule, lift=lift, enter=enter, path=place, caller=equation
            )
        else:
            outputs = rule(place, equation, operands)
        values |= zip(eqn.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def equations(program: Program) -> Iterator[Equation]:
    """All of them, those of every function, loop and branch inside included."""
    yield from _within(program, None)


def _within(program: Program, caller: Equation | None) -> Iterator[Equation]:
    for equation in program.equations(caller):
        yield equation
        for body in equation.bodies:
            yield from _within(body, equation)


def closed_over(program: Program) -> list[Any]:
    """The constant arrays of a program and of all programs inside."""
    bodies = [body for equation in equations(program) for body in equation.bodies]
    return [constant for nested in (program, *bodies) for constant in nested.constants]


def literals(program: Program) -> list[Any]:
    """The constants that the equations of a program, and of all programs inside, have as operands:
    numbers, and from JAX 0.11 small arrays."""
    return [literal for equation in equations(program) for literal in equation.literals]


def is_ref(value: Any) -> bool:
    """Whether an array, or what is known of one, is a mutable array."""
    aval = value if isinstance(value, AbstractValue) else jax.typeof(value)
    return "Ref" in type(aval).__name__


# Primitives are known by where they are: each is a name in the module that defines it.
_OF_JAX: set[Any] = set()


def is_of_jax(primitive: Any) -> bool:
    """Whether a primitive is a name in a module of JAX."""
    if primitive not in _OF_JAX:  # first seen, or defined in a module that was imported since
        modules = [module for name, module in list(sys.modules.items()) if _of_jax(name)]
        values = (value for module in modules for value in list(vars(module).values()))
        _OF_JAX.update(value for value in values if isinstance(value, core.Primitive))
    return primitive in _OF_JAX


def _of_jax(module: str) -> bool:
    return module == "jax" or module.startswith("jax.")


def _is_program(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")
