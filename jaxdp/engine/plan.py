"""The plan of a loss: its program, and where its parameters meet the sample."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine import walker
from jaxdp.engine.reduction import LeafLoss
from jaxdp.engine.uses import Use, find_uses
from jaxdp.engine.walker import Program
from jaxdp.varying import zeros


class Plan(NamedTuple):
    """What all lowerings work from.

    Attributes:
      program: of the loss of one example.
      structure: of what it returns.
      uses: where parameters meet the sample, by number.
    """

    program: Program
    structure: Any
    uses: dict[int, Use]

    @classmethod
    def of(cls, loss: LeafLoss, leaves: list[Any], example: Any) -> "Plan":
        """Traces the loss of one example and finds the uses of the leaves."""
        program, structure = trace(loss, leaves, example)
        return cls.from_program(program, structure, leaves)

    @classmethod
    def from_program(cls, program: Program, structure: Any, leaves: list[Any]) -> "Plan":
        """The same for a loss that is traced already."""
        needed = [True] + [False] * (structure.num_leaves - 1)
        return cls(program, structure, dict(enumerate(find_uses(program, leaves, needed))))

    def arguments(self, leaves: list[Any], example: Any) -> list[Any]:
        """The inputs of the program."""
        return [*leaves, *jax.tree.leaves(example), zeros((), jnp.float32, example)]

    def outputs(self, outputs: list[Any]) -> tuple[jax.Array, Any]:
        """Loss and aux from the outputs of the program."""
        return jax.tree.unflatten(self.structure, outputs)


def trace(loss: LeafLoss, leaves: list[Any], example: Any) -> tuple[Program, Any]:
    """The program of the loss of one example, and the structure of what it returns."""

    def anchored(leaves: list[Any], example: Any, anchor: jax.Array) -> tuple[jax.Array, Any]:
        value, aux = loss(leaves, example)
        # So that a loss of the parameters alone meets the sample, too: in this sum.
        return value + anchor.astype(value.dtype), aux

    return walker.trace(anchored, leaves, example, zeros((), jnp.float32, example))


def one_example(batch: Any) -> Any:
    """The first example of a batch; of an empty one its shapes."""

    def first(leaf: jax.Array) -> Any:
        if leaf.shape[0] == 0:
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[0]

    return jax.tree.map(first, batch)
