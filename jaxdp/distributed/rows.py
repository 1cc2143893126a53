"""Rows of a batch on many devices, and the state beside them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdp.accumulation import AccumulateState
from jaxdp.checks import (
    check_array,
    check_callable,
    check_instance,
    check_integer,
    shown,
)
from jaxdp.shares import placed, share_of

_INDICES = "Pass those of the rows of the whole batch."


def data_parallel(devices: int | None = None) -> NamedSharding:
    """The rows of a batch spread over devices, of all processes together.

    Args:
      devices: number of devices of each process; all by default.

    Returns:
      The sharding of the first axis over a mesh with one axis, "data", for `training.fit`, or for
      `jax.device_put` of a batch of your own.

    Raises:
      ValueError: a process has fewer devices, or none is asked for.

    Example:
      >>> sharding = data_parallel(1)
      >>> batch = jax.device_put(jnp.ones((4, 2)), sharding)
      >>> tuple(sharding.spec)
      ('data',)
    """
    available = jax.local_device_count()
    count = available if devices is None else devices
    advice = "Take no more than this process has."
    count = check_integer("devices", count, minimum=1, maximum=available, advice=advice)
    chosen: dict[int, list[Any]] = {}
    for device in jax.devices():
        of_process = chosen.setdefault(device.process_index, [])
        if len(of_process) < count:
            of_process.append(device)
    everyone = [device for process in sorted(chosen) for device in chosen[process]]
    mesh = jax.make_mesh((len(everyone),), ("data",), devices=everyone)
    return NamedSharding(mesh, P("data"))


def spread_rows(
    rows_of: Callable[[np.ndarray], Any], indices: np.ndarray, sharding: NamedSharding
) -> Any:
    """Spreads rows of the training data over many devices. A process loads its own rows only.

    Args:
      rows_of: `indices [b] -> pytree of host arrays [b, ...]`.
      indices: `[P]`, the indices of the whole batch; the same on all processes.
      sharding: the sharding of the rows.

    Returns:
      Pytree of `[P, ...]`, row i on the device that the sharding says.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: the indices have not one axis; the rows are not one for each.

    Example:
      >>> batch = spread_rows(lambda index: 10.0 * index, np.arange(4), data_parallel(1))
      >>> print(batch)
      [ 0. 10. 20. 30.]
    """
    check_callable("rows_of", rows_of, advice="Pass a function of indices.")
    check_instance("sharding", sharding, NamedSharding, advice="data_parallel() makes one.")
    check_array("indices", indices, advice=_INDICES)
    if np.ndim(indices) != 1:
        raise ValueError(f"indices must have one axis, got {shown(indices)}. {_INDICES}")
    count = len(indices)
    places = sharding.addressable_devices_indices_map((count,)).values()
    spans = {place[0].indices(count)[:2] for place in places if place is not None}
    own = np.concatenate([indices[start:stop] for start, stop in sorted(spans)])

    def placed(leaf: Any) -> jax.Array:
        local = np.asarray(leaf)
        if local.shape[:1] != own.shape:
            raise ValueError(
                f"rows_of must return one row for each of {len(own)} indices, got "
                f"{shown(local)}. Index the first axis of every array."
            )
        shape = (count, *local.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return jax.tree.map(placed, rows_of(own))


def spread_state(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The same state on all devices of a mesh.

    Args:
      state: pytree of JAX's arrays, keys included. An array that lies on the mesh already, as a
        parameter that is spread over it, stays as it is.
      mesh: the devices, as in `data_parallel().mesh`; an abstract mesh names none, and is refused.

    Returns:
      The state, with every other array copied to all devices of the mesh. Of the sums that
      `jaxdp.accumulate` holds each device has a share where the axes of the mesh are explicit.

    Raises:
      TypeError: `mesh` is no mesh of devices, or a leaf is no array of JAX.

    Example:
      >>> state = spread_state({"w": jnp.ones(2)}, data_parallel(1).mesh)
      >>> tuple(state["w"].sharding.spec)
      (None,)
    """
    check_instance("mesh", mesh, Mesh, advice="Pass data_parallel().mesh, or jax.make_mesh(...).")
    for leaf in jax.tree.leaves(state):
        check_instance("state", leaf, jax.Array, advice="Convert its leaves with jnp.asarray.")

    def everywhere(leaf: jax.Array, by_axis: bool) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = everywhere(jax.random.key_data(leaf), by_axis=True)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        # device_put would take NaN on two processes for different values.
        host = np.asarray(leaf)
        # Named as a step names it: what a layout is called is part of what is compiled for it.
        whole = NamedSharding(mesh, P(*[None] * host.ndim) if by_axis else P())
        return jax.make_array_from_callback(host.shape, whole, lambda index: host[index])

    def spread(leaf: jax.Array) -> jax.Array:
        there = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if there else everywhere(leaf, by_axis=AxisType.Explicit in mesh.axis_types)

    def in_shares(node: Any) -> Any:
        if not isinstance(node, AccumulateState):
            return node
        return node._replace(sums=jax.tree.map(_own_share, node.sums))

    everything = jax.tree.map(spread, state)
    return jax.tree.map(in_shares, everything, is_leaf=lambda n: isinstance(n, AccumulateState))


def _own_share(array: jax.Array) -> jax.Array:
    share = share_of(array)
    return array if share is None else placed(array, share)
