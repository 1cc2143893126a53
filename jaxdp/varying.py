"""Arrays that vary over devices inside `jax.shard_map`.

If an array is the same on all devices, JAX sums its gradient over the devices before a clip can see
it. So parameters are cast to varying over the axes along which the samples are spread. An array
that varies over further axes holds a part of the model, and squared norms are added up over these
axes. Outside of `shard_map` nothing varies, and these functions do nothing.
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
    """The axes of an enclosing `pmap`, or of a `shard_map` with `check_vma=False`, where no type
    tells which arrays differ between devices."""
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    return frozenset(axis for axis in mapped if axis not in _axes(jax.lax.axis_index(axis)))


def sample_axes(rows: Any) -> frozenset[str]:
    """The axes of devices along which these rows of a batch may be spread."""
    return varying_axes(rows) | untracked_axes()


def model_axes(rows: Any) -> frozenset[str]:
    """The axes of devices along which these rows of a batch are the same. Arrays that differ there
    are parts of the model."""
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
    """The sum over devices along those of the axes over which the array varies."""
    along = tuple(sorted(axes & _axes(array)))
    return jax.lax.psum(array, along) if along else array


def devices_along(axes: frozenset[str]) -> int:
    """The number of devices along these axes together."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def _axes(array: Any) -> frozenset[str]:
    aval = array if isinstance(array, ShapedArray) else jax.typeof(array)
    return frozenset(aval.mat.varying)
