"""The plan of a loss: its program, and where its parameters meet the sample."""

# JAX leaves some of its types unknown.
# pyright: reportUnknownMemberType=false

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine import walker
from jaxdp.engine.reduction import LeafLoss
from jaxdp.engine.sums import BLOCK
from jaxdp.engine.uses import Use, find_uses
from jaxdp.engine.walker import Program
from jaxdp.varying import zeros


class Plan(NamedTuple):
    """What the methods work from that compute from factors.

    Attributes:
      program: of the loss of one example.
      structure: of what it returns.
      uses: where parameters meet the sample, by number.
    """

    program: Program
    structure: Any
    uses: dict[int, Use]

    @property
    def most_at_once(self) -> int | None:
        """How many samples may be added up in one sum, if not any number.

        Of what all samples share, the sum over many is large, and the sum of all else nearly its
        opposite where the two cancel: each is rounded, by more than what is left of one sample. So
        it is with a table that is looked up and multiplied, whose sums are of two kinds.
        """
        kinds: dict[int, set[Any]] = {}
        for use in self.uses.values():
            for leaf in use.sources:
                kinds.setdefault(leaf, set()).add(use.kind and type(use.kind))
        several = any(len(found) > 1 for found in kinds.values())
        return BLOCK if several or any(use.shared for use in self.uses.values()) else None

    def arguments(self, leaves: list[Any], example: Any) -> list[Any]:
        """The inputs of the program."""
        return [*leaves, *jax.tree.leaves(example), zeros((), jnp.float32, example)]

    def outputs(self, outputs: list[Any]) -> tuple[jax.Array, Any]:
        """Loss and aux from the outputs of the program."""
        return jax.tree.unflatten(self.structure, outputs)


@dataclass(frozen=True)
class TracedLoss:
    """The loss of one example, and its program.

    Attributes:
      loss: the loss itself.
      leaves: its parameters.
      program: its program; `Plan.arguments` gives what that takes.
      structure: of what it returns.
    """

    loss: LeafLoss
    leaves: list[Any]
    program: Program
    structure: Any

    @classmethod
    def of(cls, loss: LeafLoss, leaves: list[Any], example: Any) -> "TracedLoss":
        """Traces the loss of one example."""

        def anchored(leaves: list[Any], example: Any, anchor: jax.Array) -> tuple[jax.Array, Any]:
            value, aux = loss(leaves, example)
            # So that a loss of the parameters alone meets the sample, too: in this sum.
            return value + anchor.astype(value.dtype), aux

        program, structure = walker.trace(
            anchored, leaves, example, zeros((), jnp.float32, example)
        )
        return cls(loss, leaves, program, structure)

    @cached_property
    def plan(self) -> Plan:
        """Where its parameters meet the sample: found when a method asks, since not all need it."""
        needed = [True] + [False] * (self.structure.num_leaves - 1)
        uses = find_uses(self.program, self.leaves, needed)
        return Plan(self.program, self.structure, dict(enumerate(uses)))


def one_example(batch: Any) -> Any:
    """The first example of a batch; of an empty one its shapes."""

    def first(leaf: jax.Array) -> Any:
        if leaf.shape[0] == 0:
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[0]

    return jax.tree.map(first, batch)
