"""Pytree prefixes: one value for a whole subtree of the parameters."""

from typing import Any

import jax


def prefix_leaves(name: str, prefix: Any, tree: Any, whole: str = "the parameters") -> list[Any]:
    """The value that `prefix` gives to each leaf of `tree`, in the order of its leaves.

    Args:
      name: of the argument, for the message.
      prefix: pytree prefix of `tree`; a value on a subtree holds for each of its leaves.
      tree: the full tree.
      whole: what the full tree is, for the message.

    Raises:
      ValueError: `prefix` is no prefix of `tree`.
    """
    values: list[Any] = []

    def spread(value: Any, subtree: Any) -> None:
        values.extend([value] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(spread, prefix, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} must be a pytree prefix of {whole}: got structure "
            f"{jax.tree.structure(prefix)} for {whole.removeprefix('the ')} "
            f"{jax.tree.structure(tree)}"
        ) from error
    return values
