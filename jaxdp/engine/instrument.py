"""Runs the per-example loss with a slot or a tap at every use.

A slot is a second input of a value that adds nothing to it but receives its cotangent. For a
factored use it sits on the output of the equation, for a promoted one on the operand. Slots of
uses inside a scan are stacked over its steps, and so are the operands captured there.

A tap replaces the equation of a factored use by one with another backward pass. What it does with
its slot, which is the operand's, and what it captures is its own affair.
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxdp.engine import parts, walker
from jaxdp.engine.parts import part_of, whole
from jaxdp.engine.uses import Use, by_path
from jaxdp.engine.walker import Equation, Path, Program

# Something for each use, by the number of the use: one array, or the operands that it asks for.
ByUse = dict[int, jax.Array]
Captures = dict[int, list[jax.Array]]
Seen = Callable[[list[Any], jax.Array], Any]


@jax.custom_jvp
def attach(value: jax.Array, slot: jax.Array) -> jax.Array:
    """The value, unchanged; its cotangent reaches the slot, too.

    Unlike adding an array of zeros this costs nothing in the forward pass.
    """
    del slot
    return value


@attach.defjvp
def _attach_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[0] + tangents[1]


def watched(
    output: jax.Array, operands: list[Any], slot: Any, seen: Seen, *, first: bool
) -> jax.Array:
    """The output of an equation of one example, unchanged.

    Args:
      output: of the equation.
      operands: that `seen` asks for.
      slot: a pytree of arrays; its cotangent is what `seen` makes of a batch of operands and of the
        cotangents of the output, one example of it.
      seen: `(operands [B, ...], cotangent [B, ...]) -> pytree of [B, ...]`.
      first: whether the backward pass goes on only when that is there.
    """

    @jax.custom_vjp
    def watch(output: jax.Array, operands: list[Any], slot: Any) -> jax.Array:
        del operands, slot
        return output

    def forward(output: jax.Array, operands: list[Any], slot: Any) -> Any:
        del slot
        return output, operands

    def backward(operands: list[Any], cotangent: jax.Array) -> Any:
        # What is seen and what goes on are the same numbers, which a compiler might compute twice.
        cotangent, operands = jax.lax.optimization_barrier((cotangent, operands))
        found = _seen_of_one(seen, operands, cotangent)
        if first:
            cotangent, found = jax.lax.optimization_barrier((cotangent, found))
        return cotangent, None, found

    watch.defvjp(forward, backward)
    return watch(output, jax.tree.map(jax.lax.stop_gradient, operands), slot)


def _seen_of_one(seen: Seen, operands: list[Any], cotangent: jax.Array) -> Any:
    """What is seen of one example, without the axis of examples."""

    @jax.custom_batching.custom_vmap
    def one(operands: list[Any], cotangent: jax.Array) -> Any:
        batch = jax.tree.map(lambda array: array[None], (operands, cotangent))
        return jax.tree.map(lambda array: array[0], seen(*batch))

    @one.def_vmap
    def _(size: int, batched: Any, operands: list[Any], cotangent: jax.Array) -> Any:
        # Whoever sees them knows best how to go through a batch.
        def for_all(array: jax.Array, is_batched: bool) -> jax.Array:
            return array if is_batched else jnp.broadcast_to(array, (size, *array.shape))

        found = seen(*jax.tree.map(for_all, (operands, cotangent), tuple(batched)))
        return found, jax.tree.map(lambda _: True, found)

    return one(operands, cotangent)


class Replacement(NamedTuple):
    """What replaces an equation at tapped uses.

    Attributes:
      apply: `(use, values of the operands, slot, array) -> (outputs of the equation, captures)`.
      arrays: by use; what `apply` gets, the same at every step of a scan.
    """

    apply: Callable[[Use, list[Any], jax.Array, jax.Array], tuple[list[Any], list[Any]]]
    arrays: Mapping[int, Any]


def _unreplaced(
    use: Use, values: list[Any], slot: jax.Array, array: jax.Array
) -> tuple[list[Any], list[Any]]:
    del slot, array
    return use.eqn.bind(values), []


NO_REPLACEMENT = Replacement(_unreplaced, {})


def run(
    program: Program,
    uses: Mapping[int, Use],
    args: Sequence[Any],
    slots: ByUse,
    taps: Replacement = NO_REPLACEMENT,
    path: Path = (),
) -> tuple[list[Any], Captures]:
    """Outputs of the program for one example, and what its uses captured: the operands that a
    slotted use asks for, or what a tap gives.

    Args:
      program: as `uses.find_uses` saw it.
      uses: by number; those that are slotted or tapped.
      args: parameter leaves and the leaves of the example.
      slots: for the uses within this program; none for one that has a twin. That of a tapped use
        is of the operand.
      taps: for the tapped ones.
      path: of the equation that holds this program.
    """
    at = by_path(uses)
    inside: dict[Path, list[int]] = {}  # by the paths of the equations that hold them
    for number, use in uses.items():
        for depth in range(len(path) + 1, len(use.path)):
            inside.setdefault(use.path[:depth], []).append(number)
    captures: Captures = {}

    def rule(path: Path, eqn: Equation, values: list[Any]) -> Sequence[Any]:
        values = list(values)
        factored: list[int] = []
        for number in at.get(path, []):
            use = uses[number]
            if use.kind is None:
                (operand,) = whole([values[use.operand]])
                values[use.operand] = attach(operand, slots[number])
            else:
                factored.append(number)
        if path in inside:
            inner = {number: uses[number] for number in inside[path]}
            outputs, captured_inside = _run_inside(eqn, inner, values, slots, taps, path)
            captures.update(captured_inside)
            return outputs
        if not factored:
            return parts.bind(eqn, values)
        (number,) = factored  # a second parameter would leave no operand to the sample
        use = uses[number]
        if number in taps.arrays:
            apply = functools.partial(taps.apply, use)
            tapped = parts.gathered(apply, values, slots[number], taps.arrays[number])
            outputs, captures[number] = tapped
            return outputs
        captures[number] = captured(use, values)
        outputs = parts.bind(eqn, values)
        if number in slots:
            outputs[0] = attach(outputs[0], slots[number])
        return outputs

    args = [part_of(value) for value in args]
    return whole(walker.evaluate(program, args, rule, lift=part_of, path=path)), captures


def captured(use: Use, values: Sequence[Any]) -> list[Any]:
    """The operands that a factored use asks for."""
    assert use.kind is not None
    return [values[operand] for operand in use.kind.captures(use.eqn, use.operand)]


def _run_inside(
    eqn: Equation,
    uses: Mapping[int, Use],
    values: list[Any],
    slots: ByUse,
    taps: Replacement,
    path: Path,
) -> tuple[Sequence[Any], Captures]:
    """The same for the body of a scan or of a rematerialised block."""
    slots = {number: slot for number, slot in slots.items() if number in uses}
    arrays = {number: array for number, array in taps.arrays.items() if number in uses}
    if (remat := eqn.remat) is not None:

        def block(values: list[Any], slots: ByUse, arrays: ByUse) -> tuple[list[Any], Captures]:
            return run(remat.body, uses, values, slots, taps._replace(arrays=arrays), path)

        wrapped = cast(
            Callable[..., tuple[list[Any], Captures]],
            jax.checkpoint(block, policy=remat.policy, prevent_cse=remat.prevent_cse),
        )
        return wrapped(values, slots, arrays)

    scan = eqn.scan
    assert scan is not None, eqn.name
    first_xs = scan.constants + scan.carry
    constants, init = values[: scan.constants], whole(values[scan.constants : first_xs])
    stacks = [value if parts.is_stacked(value) else value.whole() for value in values[first_xs:]]

    def body(carry: list[Any], step: tuple[list[Any], ByUse]) -> tuple[list[Any], Any]:
        xs, slots = step
        args = [*constants, *carry, *xs]
        outputs, captures = run(scan.body, uses, args, slots, taps._replace(arrays=arrays), path)
        return outputs[: scan.carry], (outputs[scan.carry :], captures)

    carry, (ys, captures) = jax.lax.scan(
        body,
        init,
        (stacks, slots),
        length=scan.length,
        reverse=scan.reverse,
        unroll=scan.unroll,
    )
    return [*carry, *ys], captures
