"""Inside `jax.shard_map`: arrays that vary over devices.

There the gradient with respect to an array that is the same on all devices is summed over the
devices, before anything could be clipped. So parameters are cast to varying over the axes over
which the samples are spread. What varies over further axes holds a part of the model, whose
squared norms add up over these. Outside of `shard_map` nothing varies, and nothing happens.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which some leaf varies; leaves may be abstract."""
    return frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(tree)))


def untracked_axes() -> frozenset[str]:
    """The axes of an enclosing `pmap`, or `shard_map` with `check_vma=False`: there no type tells
    which arrays differ between devices."""
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    return frozenset(axis for axis in mapped if axis not in _axes(jax.lax.axis_index(axis)))


def sample_axes(rows: Any) -> frozenset[str]:
    """The axes of devices along which these rows of a batch may be spread."""
    return varying_axes(rows) | untracked_axes()


def model_axes(rows: Any) -> frozenset[str]:
    """The axes of devices along which these rows of a batch are the same: what differs there is a
    part of the model."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes) - sample_axes(rows)


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """The same arrays, each varying over all of these axes."""

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.Array:
    """Zeros that vary over devices as `like` does."""
    return vary(jnp.zeros(shape, dtype), varying_axes(like))


def summed_over_devices(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Σ over the devices along those of the axes over which it varies."""
    along = tuple(sorted(axes & _axes(array)))
    return jax.lax.psum(array, along) if along else array


def devices_along(axes: frozenset[str]) -> int:
    """How many devices there are along these axes together."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def _axes(array: Any) -> frozenset[str]:
    aval = array if isinstance(array, ShapedArray) else jax.typeof(array)
    return frozenset(aval.mat.varying)
