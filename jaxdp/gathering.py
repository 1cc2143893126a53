"""What a state gathers of a logical batch: raw until the batch ends, and nothing outside of one.

A logical batch may come in several physical ones. Between two of them a state holds sums or counts
of samples that have no noise yet. It is nothing to begin a run from, which would add a whole batch
on top, and nothing to save. A state that gathers says so:

    @Gathers.register
    class State(NamedTuple):
        counts: jax.Array

        @property
        def gathered(self):
            return self.counts

        def emptied(self):
            return self._replace(counts=jnp.zeros_like(self.counts))
"""

from abc import ABC, abstractmethod
from functools import reduce
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax


class Gathers(ABC):
    """The state of a transformation that adds up over the physical batches of a logical one."""

    @property
    @abstractmethod
    def gathered(self) -> Any:
        """The arrays that hold it: zeros wherever no logical batch is under way."""

    @abstractmethod
    def emptied(self) -> Self:
        """The same state with zeros in their place."""


def emptied(tree: Any) -> Any:
    """A state of a chain as if none of its logical batch had come.

    Args:
      tree: a state; leaves may be traced.

    Returns:
      It, with zeros in place of all that is gathered.

    Example:
      >>> import jaxdp
      >>> tx = jaxdp.accumulate(jaxdp.add_noise(1.0, jax.random.key(0)))
      >>> state = tx.init(jnp.zeros(2))
      >>> _, half = tx.update(jaxdp.Bounded(jnp.ones(2), 1.0), state, is_last=False)
      >>> half.sums.total.tolist(), emptied(half).sums.total.tolist()
      ([1.0, 1.0], [0.0, 0.0])
    """

    def replaced(node: Any) -> Any:
        if not isinstance(node, Gathers):
            return node
        children, structure = _children(node.emptied())
        return jax.tree.unflatten(structure, [emptied(child) for child in children])

    return jax.tree.map(replaced, tree, is_leaf=_gathers)


def amid_a_batch(opt_state: optax.OptState) -> list[str]:
    """Which states of a chain hold a part of a logical batch that has not ended.

    Args:
      opt_state: state of an optax chain, not traced. It is waited for.

    Returns:
      The names of their types; none where no batch is under way.

    Example:
      >>> import jaxdp
      >>> tx = jaxdp.accumulate(jaxdp.add_noise(1.0, jax.random.key(0)))
      >>> state = tx.init(jnp.zeros(2))
      >>> _, half = tx.update(jaxdp.Bounded(jnp.ones(2), 1.0), state, is_last=False)
      >>> amid_a_batch(state), amid_a_batch(half)
      ([], ['AccumulateState'])
    """
    nodes = _nodes(opt_state)
    hold = jax.device_get(_any_but_zeros([jax.tree.leaves(node.gathered) for node in nodes]))
    return [type(node).__name__ for node, holds in zip(nodes, hold, strict=True) if holds]


def check_between_batches(opt_state: optax.OptState) -> None:
    """Raises unless no logical batch is under way.

    Args:
      opt_state: state of an optax chain, not traced. It is waited for.

    Raises:
      ValueError: a part of a logical batch is in it.

    Example:
      >>> import jaxdp
      >>> tx = jaxdp.accumulate(jaxdp.add_noise(1.0, jax.random.key(0)))
      >>> check_between_batches(tx.init(jnp.zeros(2)))
    """
    if found := amid_a_batch(opt_state):
        raise ValueError(
            "state must be one between two logical batches, got raw sums of one that has not ended "
            f"(in {', '.join(found)}): the next batch would be added on top, and a sample count "
            "twice. End the batch with is_last=True and charge it, or take the state before it."
        )


def _gathers(node: Any) -> bool:
    return isinstance(node, Gathers)


def _children(node: Any) -> tuple[list[Any], Any]:
    """What lies right below a node."""
    return jax.tree.flatten(node, is_leaf=lambda each: each is not node)


def _nodes(tree: Any) -> list[Gathers]:
    """All states that gather, those within others, too."""
    found = [node for node in jax.tree.leaves(tree, is_leaf=_gathers) if _gathers(node)]
    return [each for node in found for each in (node, *_nodes(_children(node)[0]))]


@jax.jit
def _any_but_zeros(raw: list[list[jax.Array]]) -> list[jax.Array]:
    """Of each list of arrays, whether one of them holds anything but zeros; NaN is not zero."""
    nothing = jnp.zeros((), bool)
    return [
        reduce(jnp.logical_or, (jnp.any(leaf != 0) for leaf in leaves), nothing) for leaves in raw
    ]
