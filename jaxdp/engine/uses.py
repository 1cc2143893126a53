"""Where each parameter meets the sample.

`find_uses` walks the program of the per-example loss once. Every value is a constant, depends on
parameters alone, or depends on the sample; an operand of the second sort in an equation of the
third is a *use*, and the equation its *site*. The gradient of a parameter is the sum over its uses,
each seen from the output cotangent of one equation.

A use at a site of a recognised kind (`kinds.KINDS`) is factored: its gradient is never formed
unless that pays. Any other is *promoted*: each sample gets the operand for itself, so that its
gradient is materialised for that operand alone. Always right, whatever the equation does.

Within a loop or a rematerialised block only factored uses of views of a parameter stay inside; for
any other the parameter is promoted where it enters the block, and all of its uses with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxdp.engine import views, walker
from jaxdp.engine.boxes import Box
from jaxdp.engine.constant import constant_cotangents
from jaxdp.engine.kinds import KINDS, Kind
from jaxdp.engine.liveness import live_paths
from jaxdp.engine.twins import cotangent_classes
from jaxdp.engine.views import View
from jaxdp.engine.walker import Equation, Path, Program


class Use(NamedTuple):
    """One operand that depends on parameters alone, in an equation that depends on the sample.

    Attributes:
      path: of the equation.
      operand: which operand of the equation it is.
      eqn: the equation.
      kind: how it is factored; None for a promoted use.
      view: of which parameters the operand is a view. None if it is computed from them in
        another way: then the operand counts as a parameter of its own, and its gradient is
        pulled back through that computation.
      boxes: for each part of the view its box in the leaf, over all steps of the loops.
      sources: the parameters that the operand depends on.
      lengths: of the enclosing scans, the outermost first.
      in_remat: whether a rematerialised block encloses it.
      reason: why it is promoted, for `explain`.
      twin: the path of an earlier factored use whose output has the same cotangent, if any.
      shared: whether the operand is a number whose cotangent is the same for every sample, as that
        of a penalty on the parameters is: all samples then share one gradient by this use.
    """

    path: Path
    operand: int
    eqn: Equation
    kind: Kind | None
    view: View | None
    boxes: tuple[Box, ...]
    sources: frozenset[int]
    lengths: tuple[int, ...]
    in_remat: bool
    reason: str
    twin: Path | None = None
    shared: bool = False

    @property
    def aval(self) -> Any:
        """Shape and dtype of the operand."""
        return self.eqn.operands[self.operand]

    @property
    def slotted(self) -> Any:
        """The same of what a slot is attached to: the operand of a promoted use, the output of the
        equation of a factored one."""
        return self.aval if self.kind is None else self.eqn.outputs[0]


class _Value(NamedTuple):
    """What is known of a value: it depends on the sample, or else on some inputs (`roots`) of the
    enclosing block that are parameters, or on neither."""

    sample: bool = False
    roots: frozenset[int] = frozenset()
    view: View | None = ()

    @property
    def parameter(self) -> bool:
        return bool(self.roots)


_CONSTANT = _Value()
_SAMPLE = _Value(sample=True)


class _Block(NamedTuple):
    """Where the walk is: at the top, or inside of loops and rematerialised blocks."""

    leaves: tuple[tuple[int, ...], ...]  # shapes of the parameters
    path: Path = ()
    lengths: tuple[int, ...] = ()
    in_remat: bool = False


class _Walked(NamedTuple):
    """Uses inside a program, what is known of its outputs, and which of its inputs must be
    promoted, with the reason."""

    uses: list[Use]
    outputs: list[_Value]
    promoted: dict[int, str]


def find_uses(program: Program, leaves: Sequence[Any], needed: Sequence[bool]) -> list[Use]:
    """The uses of the leaves, in the order of the program.

    Args:
      program: of a function of the leaves and then of the parts of one example.
      leaves: the parameters (shape, dtype).
      needed: for each output whether it is differentiated.
    """
    parameters = [
        _Value(roots=frozenset({index}), view=views.whole(index, leaf.shape))
        if leaf.size
        else _CONSTANT  # without entries
        for index, leaf in enumerate(leaves)
    ]
    sample = [_SAMPLE] * (len(program.inputs) - len(leaves))
    block = _Block(tuple(tuple(leaf.shape) for leaf in leaves))
    uses = _walk(program, [*parameters, *sample], needed, block).uses
    constant = constant_cotangents(program, needed)

    def shared(use: Use) -> bool:
        return use.view is None and use.aval.shape == () and use.path in constant

    return [use._replace(shared=shared(use)) for use in uses]


def by_path(uses: Mapping[int, Use]) -> dict[Path, list[int]]:
    """The numbers of the uses at each equation."""
    at: dict[Path, list[int]] = {}
    for number, use in uses.items():
        at.setdefault(use.path, []).append(number)
    return at


def _walk(
    program: Program, inputs: Sequence[_Value], needed: Sequence[bool], block: _Block
) -> _Walked:
    live = live_paths(program, needed, block.path)
    uses: list[Use] = []
    promoted: dict[int, str] = {}

    def meet(path: Path, operand: int, eqn: Equation, value: _Value, reason: str) -> None:
        boxes = _boxes(value.view, block)
        view = None if boxes is None else value.view
        kind, refusal = _kind(eqn, operand, view, block)
        if kind is not None or not block.path:
            reason = "" if kind is not None else reason or refusal
            # Without a view it is at the top, where the roots are the parameters themselves.
            sources = value.roots if view is None else frozenset(part.source for part in view)
            uses.append(
                Use(
                    path,
                    operand,
                    eqn,
                    kind,
                    view,
                    boxes or (),
                    sources,
                    block.lengths,
                    block.in_remat,
                    reason,
                )
            )
        else:
            promoted.update({root: reason or refusal for root in value.roots})

    def rule(path: Path, eqn: Equation, values: list[_Value]) -> list[_Value]:
        if path not in live:
            return [_CONSTANT] * len(eqn.outputs)
        if not any(value.sample for value in values):
            return _derived(eqn, values)
        inside = _enter(eqn, values, block, path)
        uses.extend(inside.uses)
        for operand, reason in inside.promoted.items():
            meet(path, operand, eqn, values[operand], reason)
        return inside.outputs

    outputs = walker.evaluate(program, inputs, rule, lift=lambda _: _CONSTANT, path=block.path)
    if block.path:
        for root in frozenset[int]().union(*(value.roots for value in outputs)):
            promoted[root] = "leaves a loop or block unchanged"
    return _Walked(_with_twins(uses, program, block.path), outputs, promoted)


def _with_twins(uses: list[Use], program: Program, path: Path) -> list[Use]:
    """Marks factored uses at this level whose cotangent an earlier one has, too."""
    classes = cotangent_classes(program)
    first: dict[Any, Path] = {}
    marked: list[Use] = []
    for use in uses:
        if use.kind is not None and use.path[:-1] == path:
            earlier = first.setdefault(classes[use.path[-1]], use.path)
            use = use._replace(twin=earlier if earlier != use.path else None)
        marked.append(use)
    return marked


def _derived(eqn: Equation, values: list[_Value]) -> list[_Value]:
    """Outputs that depend on parameters alone, or on nothing."""
    roots = frozenset[int]().union(*(value.roots for value in values))
    if not roots or eqn.name == "stop_gradient":
        return [_CONSTANT] * len(eqn.outputs)
    shown = views.apply(eqn, [value.view for value in values])
    return [
        _Value(roots=roots, view=view)
        if view != () and jnp.issubdtype(output.dtype, jnp.inexact)
        else _CONSTANT  # integers and booleans have no gradient
        for view, output in zip(shown, eqn.outputs, strict=True)
    ]


def _boxes(view: View | None, block: _Block) -> tuple[Box, ...] | None:
    """The boxes of all parts of a view, if each of them is one."""
    boxes: list[Box] = []
    for part in view or ():
        if (at := views.box(part, block.leaves[part.source])) is None:
            return None
        boxes.append(at)
    return None if view is None else tuple(boxes)


def _kind(eqn: Equation, operand: int, view: View | None, block: _Block) -> tuple[Kind | None, str]:
    """How a use is factored, or None and why it is not."""
    kind = KINDS.get(eqn.name)
    if kind is None:
        return None, eqn.name
    if not jnp.issubdtype(eqn.outputs[0].dtype, jnp.floating):
        return None, f"{eqn.name} of {eqn.outputs[0].dtype}"
    if view is None and block.path:
        return None, f"{eqn.name} of a value computed from parameters inside a loop or block"
    refusal = kind.refuse(eqn, operand, view)
    return (None, refusal) if refusal else (kind, "")


def _enter(eqn: Equation, values: list[_Value], block: _Block, path: Path) -> _Walked:
    """What an equation that depends on the sample does with its operands.

    Where it has a body that can be entered, inputs of the body are promoted, and carries become
    sample-dependent, until the walk of the body asks for no more of it.
    """
    scan, remat = eqn.scan, eqn.remat
    promoted = {index: "" for index, value in enumerate(values) if value.parameter}
    if scan is not None:
        inner = block._replace(path=path, lengths=(*block.lengths, scan.length))
        body, first_carry, first_xs = scan.body, scan.constants, scan.constants + scan.carry
    elif remat is not None:
        inner = block._replace(path=path, in_remat=True)
        body, first_carry, first_xs = remat.body, len(values), len(values)
    else:
        return _Walked([], [_SAMPLE] * len(eqn.outputs), promoted)

    def seen_inside(index: int, value: _Value) -> _Value:
        if not value.parameter:
            return value
        if first_carry <= index < first_xs:
            return _SAMPLE
        if scan is None:
            return value._replace(roots=frozenset({index}))
        seen = views.step_through if index >= first_xs else views.share
        view = seen(value.view, scan.length)
        return value._replace(roots=frozenset({index}), view=view)

    inputs = [seen_inside(index, value) for index, value in enumerate(values)]
    carried = range(first_carry, first_xs)
    promoted = {index: "initial carry of a scan" for index in carried if values[index].parameter}
    while True:
        walked = _walk(body, inputs, [True] * len(eqn.outputs), inner)
        became = [
            index
            for index in carried
            if inputs[index] == _CONSTANT and walked.outputs[index - first_carry] != _CONSTANT
        ]
        # Carries first: while one is taken for a constant, products with it look like parameters.
        again = became or walked.promoted
        if not again:
            break
        if not became:
            promoted |= walked.promoted
        for index in again:
            inputs[index] = _SAMPLE
    # All outputs, constant ones too: whatever comes out of a block needs the sample to be computed.
    return _Walked(walked.uses, [_SAMPLE] * len(eqn.outputs), promoted)
