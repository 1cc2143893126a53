"""Shares: the part of an array that each device takes where several hold the same one.

What is computed for such an array would be computed by each of them. Where the devices are known,
each may take a share instead, of its own, and gather what the others made of theirs:

    share = share_of(total)                     # None where it is whole on one device, or small
    part = placed(total, share)                 # nothing is sent
    whole = placed(jnp.exp(part), jax.typeof(total).sharding)

The types of a mesh with explicit axes say who holds what. Those of a mesh with automatic axes know
the mesh alone, so that somebody must say along which axes arrays are the same. Within
`jax.shard_map` nothing is shared: what a device computes there is its own affair.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# From so many entries on it takes longer to draw noise for them than to gather it.
WORTH_SHARING = 2**13


def share_of(array: jax.Array, rows: NamedSharding | None = None) -> NamedSharding | None:
    """How an array lies when each of the devices that hold the same part of it has a share.

    Args:
      array: traced, or not.
      rows: the sharding of a batch along whose axes the array is the same. Needed where these axes
        are automatic, and of no account elsewhere.

    Returns:
      The sharding, or None where nothing is to share: the devices are not known, each has a part
      of its own already, or the array is small. None, too, if no axis of the array divides into an
      even number of entries for each device: numbers of a normal distribution are drawn in pairs.
    """
    held = jax.typeof(array).sharding
    mesh, same = _where_it_is_the_same(held, rows)
    axes = [name for name in same if mesh.shape[name] > 1]
    if array.size < WORTH_SHARING or not axes:
        return None
    entries = [names_in(entry) for entry in held.spec]
    dividing = [
        _dividing(size, axes, entry, mesh) for size, entry in zip(array.shape, entries, strict=True)
    ]
    # The outermost of those that divide best: there a share is one run of memory.
    best = max(range(array.ndim), key=lambda axis: _parts(dividing[axis], mesh))
    if not dividing[best]:
        return None
    entries[best] += dividing[best]
    return NamedSharding(mesh, PartitionSpec(*entries))


def placed(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same array, laid out as this sharding says, over explicit or automatic axes."""
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def placed_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """The same array, laid out as another one on the same mesh, where types say how that lies."""
    at, now = jax.typeof(like).sharding, jax.typeof(array).sharding
    if at == now or at.mesh != now.mesh or AxisType.Explicit not in at.mesh.axis_types:
        return array
    return placed(array, at)


def names_in(entry: None | str | Sequence[str]) -> tuple[str, ...]:
    """The axes that one entry of a partition spec names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _where_it_is_the_same(
    held: NamedSharding, rows: NamedSharding | None
) -> tuple[Mesh | AbstractMesh, tuple[str, ...]]:
    """The mesh, and those of its axes along which all devices hold the same part of an array."""
    kinds = dict(zip(held.mesh.axis_names, held.mesh.axis_types, strict=True))
    if AxisType.Manual in kinds.values():
        return held.mesh, ()
    if AxisType.Explicit in kinds.values():
        used = {name for entry in held.spec for name in names_in(entry)}
        explicit = (name for name, kind in kinds.items() if kind == AxisType.Explicit)
        return held.mesh, tuple(name for name in explicit if name not in used)
    if rows is None or held.mesh != rows.mesh.abstract_mesh:
        return held.mesh, ()
    return rows.mesh, names_in(rows.spec[0])


def _dividing(
    size: int, axes: Sequence[str], held_along: tuple[str, ...], mesh: Mesh | AbstractMesh
) -> tuple[str, ...]:
    """Those of the axes of the mesh along which so many entries divide into pairs."""
    dividing: tuple[str, ...] = ()
    for name in axes:
        if size % (2 * _parts((*held_along, *dividing, name), mesh)) == 0:
            dividing = (*dividing, name)
    return dividing


def _parts(names: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in names)
