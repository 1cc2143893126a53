"""Inside `jax.shard_map`: arrays that vary over devices.

There the gradient with respect to an array that is the same on all devices is summed over the
devices, before anything could be clipped. So parameters are cast to varying first, together with
everything else that is differentiated. Outside of `shard_map` nothing varies, and nothing happens.
"""

from typing import Any

import jax
import jax.numpy as jnp


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which some leaf varies."""
    return frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(tree)))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """The same arrays, each varying over all of these axes."""

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.Array:
    """Zeros that vary over devices as `like` does."""
    return vary(jnp.zeros(shape, dtype), varying_axes(like))


def _axes(array: Any) -> frozenset[str]:
    return frozenset(jax.typeof(array).mat.varying)
