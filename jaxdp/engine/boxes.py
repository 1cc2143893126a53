"""Boxes of arrays, and axes by strides: which entries of a parameter leaf an array stands for.

An axis is a `Dim`, its length and its stride in the flat leaf, as NumPy counts; a stride of 0
repeats an entry. A `Box` is a range along every axis of an array. Gradients with respect to some
entries of a leaf come with the dims that say where these lie, and a `Target` places them.
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dim(NamedTuple):
    """One axis of an array of gradients, or one loop: its length, and its stride in the leaf."""

    size: int
    stride: int


# Along every axis of an array: the first entry and how many.
Box = tuple[tuple[int, int], ...]


class Target(NamedTuple):
    """The box of a parameter leaf that a factor's gradients belong to."""

    at: Box
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Target":
        """A leaf of this shape."""
        return cls(tuple((0, size) for size in shape), tuple(shape))

    def place(self, rows: jax.Array, dims: Sequence[Dim]) -> jax.Array:
        """`[*lead, *dims]` as gradients of the whole leaf, `[*lead, *shape]`: repeated entries add
        up, entries outside of the box are zero."""
        lead = rows.ndim - len(dims)
        repeated = tuple(lead + k for k, dim in enumerate(dims) if dim.stride == 0)
        rows = jnp.sum(rows, axis=repeated)
        kept = [dim for dim in dims if dim.stride != 0]
        order = sorted(range(len(kept)), key=lambda k: -kept[k].stride)
        rows = jnp.transpose(rows, (*range(lead), *(lead + k for k in order)))
        rows = rows.reshape(*rows.shape[:lead], *(count for _, count in self.at))
        ranges = zip(self.at, self.shape, strict=True)
        edges = [(start, size - start - count) for (start, count), size in ranges]
        if not any(map(any, edges)):
            return rows
        return jnp.pad(rows, [(0, 0)] * lead + edges)

    def shown(self, leaf: jax.Array, dims: Sequence[Dim]) -> jax.Array:
        """`[*dims]`: the entries of an array of the leaf's shape that the dims show."""
        kept = [k for k, dim in enumerate(dims) if dim.stride != 0]
        order = sorted(kept, key=lambda k: -dims[k].stride)
        box = leaf[indices(self.at)].reshape([dims[k].size for k in order])
        box = jnp.transpose(box, [order.index(k) for k in kept])
        repeated = [k for k, dim in enumerate(dims) if dim.stride == 0]
        return jnp.broadcast_to(jnp.expand_dims(box, repeated), [dim.size for dim in dims])


def row_major(shape: Sequence[int]) -> tuple[Dim, ...]:
    """The axes of a leaf of this shape."""
    return tuple(Dim(size, math.prod(shape[k + 1 :])) for k, size in enumerate(shape))


def indices(box: Box) -> tuple[slice, ...]:
    """What selects a box from its array."""
    return tuple(slice(start, start + count) for start, count in box)


def disjoint(a: Box, b: Box) -> bool:
    """Whether two boxes of one leaf have no entry in common."""
    return any(i + n <= j or j + m <= i for (i, n), (j, m) in zip(a, b, strict=True))


def covered(offset: int, dims: Sequence[Dim], shape: Sequence[int]) -> Box | None:
    """Which box of a leaf of this shape the dims show, from a position in the flat leaf on.

    None if the entries are no box (every second row, a diagonal).
    """
    axes = row_major(shape)
    start = [offset // axis.stride % axis.size for axis in axes]
    count = [1] * len(axes)
    for size, stride in _merged(dims):
        inner = [k for k, axis in enumerate(axes) if axis.stride == stride and axis.size > 1]
        if not inner:
            return None
        k = inner[0]
        # A run that is longer than its axis goes on along the next outer one.
        while size > axes[k].size - start[k]:
            if start[k] or size % axes[k].size or k == 0:
                return None
            count[k], size = axes[k].size, size // axes[k].size
            k -= 1
        if count[k] != 1:
            return None
        count[k] = size
    return tuple(zip(start, count, strict=True))


def _merged(dims: Sequence[Dim]) -> list[Dim]:
    """Neighbouring axes that form one run of memory as one; repeated axes left out."""
    merged: list[Dim] = []
    real = [dim for dim in dims if dim.size > 1 and dim.stride]
    for dim in sorted(real, key=lambda dim: -dim.stride):
        if merged and merged[-1].stride == dim.size * dim.stride:
            merged[-1] = Dim(merged[-1].size * dim.size, dim.stride)
        else:
            merged.append(dim)
    return merged


def reshaped(dims: Sequence[Dim], sizes: Sequence[int]) -> tuple[Dim, ...] | None:
    """The axes after a reshape, or None where that would need a copy.

    Old and new axes are matched in groups of equal product; within a group the old axes must be
    one run of memory.
    """
    if 0 in sizes:
        return None
    old = [dim for dim in dims if dim.size > 1]
    new: list[Dim] = []
    position = 0
    remaining = [size for size in sizes if size > 1]
    while position < len(old):
        group, target = [old[position]], [remaining.pop(0)]
        while (have := math.prod(dim.size for dim in group)) != (want := math.prod(target)):
            if have < want:
                group.append(old[position + len(group)])
            else:
                target.append(remaining.pop(0))
        if any(a.stride != b.size * b.stride for a, b in zip(group, group[1:], strict=False)):
            return None
        position += len(group)
        new += [Dim(dim.size, dim.stride * group[-1].stride) for dim in row_major(target)]
    kept = iter(new)
    return tuple(next(kept) if size > 1 else Dim(1, 0) for size in sizes)


def distinct(loops: Sequence[Dim]) -> tuple[Dim, ...]:
    """The loops that walk through the leaf: another slice of it at every step."""
    return tuple(loop for loop in loops if loop.stride)


def split_loops(array: jax.Array, loops: Sequence[Dim]) -> jax.Array:
    """`[B, *loops, ...] -> [B, E, S, ...]`: the steps that see distinct slices of the leaf, and
    those that share them."""
    walking = [k for k, loop in enumerate(loops) if loop.stride]
    sharing = [k for k, loop in enumerate(loops) if not loop.stride]
    rest = range(1 + len(loops), array.ndim)
    array = jnp.transpose(array, (0, *(1 + k for k in walking), *(1 + k for k in sharing), *rest))
    sizes = [math.prod(loops[k].size for k in group) for group in (walking, sharing)]
    return array.reshape(array.shape[0], *sizes, *(array.shape[k] for k in rest))
