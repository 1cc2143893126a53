"""What a kind of site must provide."""

from typing import NamedTuple, Protocol

import jax

from jaxdp.engine import precision
from jaxdp.engine.boxes import Target
from jaxdp.engine.factors.base import Factored
from jaxdp.engine.views import Part, View
from jaxdp.engine.walker import Equation


class Record(NamedTuple):
    """What a batch left at one use, of which one part of the operand is asked for.

    Attributes:
      eqn: the equation.
      operand: the one that is the parameter.
      part: of the operand, with the enclosing scans.
      target: the box of the leaf that the part shows.
      captured: the operands that the kind asked for, each `[B, *loops, ...]`.
      cotangent: of the output, `[B, *loops, ...]`.
    """

    eqn: Equation
    operand: int
    part: Part
    target: Target
    captured: list[jax.Array]
    cotangent: jax.Array


class Kind(Protocol):
    """A primitive whose gradient with respect to one operand has a factored form.

    Attributes:
      tapped: whether its factors are `Addends`; others bound no sum of another pass, and stay in
        slots (`methods.taps`).
    """

    tapped: bool

    def refuse(self, eqn: Equation, operand: int, view: View | None) -> str:
        """Why this use cannot be factored; empty if it can."""
        ...

    def captures(self, eqn: Equation, operand: int) -> tuple[int, ...]:
        """Which operands the factors are made of, beside the output's cotangent."""
        ...

    def factor(self, record: Record) -> Factored:
        """The gradients with respect to one part of the operand."""
        ...


def stored_bits(eqn: Equation, operand: int) -> int:
    """How many bits of their significands the operands of the gradient with respect to `operand`
    store (`engine.precision`): the other operand of a product or convolution, and the cotangent of
    its output. Another equation multiplies nothing."""
    output = eqn.outputs[0].dtype
    if not multiplies(eqn):
        return precision.stored_bits([output], jax.lax.Precision.HIGHEST)
    other = eqn.operands[1 - operand].dtype
    return precision.stored_bits([other, output], eqn.params["precision"])


def multiplies(eqn: Equation) -> bool:
    """Whether the equation multiplies operands in a precision that it names."""
    return "precision" in eqn.params


def refuse_repeats(view: View | None) -> str:
    """A broadcast parameter in a factored position is left to promotion."""
    if view is not None and any(part.repeats for part in view):
        return "a broadcast parameter"
    return ""
