"""Leaves of pytrees: their names, their dtypes, and prefixes that give a subtree one value."""

from typing import Any

import jax
import jax.numpy as jnp


def path_name(path: Any) -> str:
    """The path of a leaf as users read it, as in "body/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_float(leaf: Any) -> bool:
    """Whether a leaf holds floating-point numbers, and so can have a gradient and a norm."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def prefix_leaves(name: str, prefix: Any, tree: Any, whole: str = "the parameters") -> list[Any]:
    """The value that `prefix` gives to each leaf of `tree`, in the order of its leaves.

    Args:
      name: the argument's name, for the message.
      prefix: pytree prefix of `tree`; a value on a subtree holds for each of its leaves.
      tree: the full tree.
      whole: a description of the full tree, for the message.

    Returns:
      One value for each leaf.

    Raises:
      ValueError: `prefix` is no prefix of `tree`.
    """
    values: list[Any] = []

    def give(value: Any, subtree: Any) -> None:
        values.extend([value] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(give, prefix, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} must be a pytree prefix of {whole}, got structure "
            f"{jax.tree.structure(prefix)} for {whole.removeprefix('the ')} "
            f"{jax.tree.structure(tree)}. Give one value for all leaves, "
            "for a subtree or for a leaf."
        ) from error
    return values
