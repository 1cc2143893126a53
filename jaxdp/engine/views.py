"""Linear views: which entries of a derived array are which entries of a parameter.

A model seldom multiplies by a parameter as it is stored: it transposes, reshapes, slices or
concatenates first. As long as every entry of the result is one entry of one parameter, gradients
come back by rearranging, and norms do not change. A `View` keeps track of that by strides, as NumPy
does, one `Part` for each rectangular piece:

    V[start + i] = parameter.ravel()[offset + Σ_k i_k · strides_k + Σ_l step_l · loops_l]

where step_l counts the iterations of the l-th enclosing `lax.scan`. A stride of 0 repeats an
entry: an axis that was broadcast, or a loop that shares the parameter. An operation that is no
view of this kind gives None, and its result is treated as an array of its own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.walker import Equation


class Dim(NamedTuple):
    """One axis of an array of gradients: its length, and its stride in the parameter."""

    size: int
    stride: int


class Part(NamedTuple):
    """A box of V that shows entries of one source, a parameter leaf.

    Attributes:
      source: which leaf.
      offset: position in the flat leaf of the first entry.
      start: where in V the box begins.
      dims: the axes of V within the box.
      loops: for each enclosing scan, the outermost first, the stride from step to step.
      half: whether V was cast to less than 32 bits on the way.
    """

    source: int
    offset: int
    start: tuple[int, ...]
    dims: tuple[Dim, ...]
    loops: tuple[int, ...] = ()
    half: bool = False

    @property
    def repeats(self) -> bool:
        """Whether V shows an entry more than once: gradients then add up."""
        return any(dim.stride == 0 and dim.size > 1 for dim in self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple(dim.size for dim in self.dims)


# Entries of V outside every part are constants.
View = tuple[Part, ...]

# Along every axis of a leaf: the first entry and how many.
Box = tuple[tuple[int, int], ...]


def whole(source: int, shape: Sequence[int]) -> View:
    """The leaf itself."""
    return (Part(source, 0, (0,) * len(shape), _row_major(shape)),)


def share(view: View | None) -> View | None:
    """V as the body of a scan sees a constant: the same at every step."""
    return view and tuple(part._replace(loops=(*part.loops, 0)) for part in view)


def step_through(view: View | None, length: int) -> View | None:
    """V as the body of a scan sees its xs: one slice per step."""
    if view is None or any(part.dims[0].size != length for part in view):
        return None  # steps that show different leaves

    def stepped(part: Part) -> Part:
        loops = (*part.loops, part.dims[0].stride)
        return part._replace(start=part.start[1:], dims=part.dims[1:], loops=loops)

    return tuple(map(stepped, view))


def apply(eqn: Equation, views: Sequence[View | None]) -> list[View | None]:
    """The views that an operation on views gives; constant operands are `()`."""
    rule = _RULES.get(eqn.name)
    if rule is None or any(view is None for view in views):
        return [None] * len(eqn.outputs)
    return rule(eqn, [view for view in views if view is not None])


def _same(_: Equation, views: list[View]) -> list[View | None]:
    return [views[0]]


def _cast(eqn: Equation, views: list[View]) -> list[View | None]:
    dtype = eqn.outputs[0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return [None]
    half = jnp.finfo(dtype).bits < 32
    return [tuple(part._replace(half=part.half or half) for part in views[0])]


def _transpose(eqn: Equation, views: list[View]) -> list[View | None]:
    order = eqn.params["permutation"]

    def permuted(part: Part) -> Part:
        start = tuple(part.start[axis] for axis in order)
        return part._replace(start=start, dims=tuple(part.dims[axis] for axis in order))

    return [tuple(map(permuted, views[0]))]


def _squeeze(eqn: Equation, views: list[View]) -> list[View | None]:
    rank = len(eqn.operands[0].shape)
    kept = sorted(set(range(rank)) - {axis % rank for axis in eqn.params["dimensions"]})

    def squeezed(part: Part) -> Part:
        start = tuple(part.start[axis] for axis in kept)
        return part._replace(start=start, dims=tuple(part.dims[axis] for axis in kept))

    return [tuple(map(squeezed, views[0]))]


def _broadcast(eqn: Equation, views: list[View]) -> list[View | None]:
    shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    old = eqn.operands[0].shape

    def broadcasted(part: Part) -> Part:
        start, dims = [0] * len(shape), [Dim(size, 0) for size in shape]
        for source, target in enumerate(axes):
            if old[source] == shape[target]:
                start[target], dims[target] = part.start[source], part.dims[source]
        return part._replace(start=tuple(start), dims=tuple(dims))

    return [tuple(map(broadcasted, views[0]))]


def _reshape(eqn: Equation, views: list[View]) -> list[View | None]:
    if eqn.params["dimensions"] is not None or len(views[0]) != 1:
        return [None]
    (part,) = views[0]
    if part.shape != tuple(eqn.operands[0].shape):
        return [None]
    dims = reshaped(part.dims, eqn.params["new_sizes"])
    if dims is None:
        return [None]
    return [(part._replace(start=(0,) * len(dims), dims=dims),)]


def _slice(eqn: Equation, views: list[View]) -> list[View | None]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    return [_sliced(views[0], starts, limits, steps)]


def _split(eqn: Equation, views: list[View]) -> list[View | None]:
    axis, begin, outputs = eqn.params["axis"], 0, []
    shape = eqn.operands[0].shape
    for size in map(int, eqn.params["sizes"]):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = begin, begin + size
        outputs.append(_sliced(views[0], starts, limits, (1,) * len(shape)))
        begin += size
    return outputs


def _sliced(
    view: View, starts: Sequence[int], limits: Sequence[int], steps: Sequence[int]
) -> View | None:
    parts = []
    for part in view:
        start, dims, offset = [], [], part.offset
        for begin, dim, low, high, step in zip(
            part.start, part.dims, starts, limits, steps, strict=True
        ):
            # The first of low, low + step, ... inside the part, and how many follow.
            skipped = max(0, -(-(begin - low) // step))
            first = low + skipped * step
            count = len(range(first, min(high, begin + dim.size), step))
            if count == 0:
                break
            start.append(skipped)
            dims.append(Dim(count, dim.stride * step))
            offset += (first - begin) * dim.stride
        else:
            parts.append(part._replace(offset=offset, start=tuple(start), dims=tuple(dims)))
    return tuple(parts)


def _concatenate(eqn: Equation, views: list[View]) -> list[View | None]:
    axis, begin, parts = eqn.params["dimension"], 0, []
    for view, operand in zip(views, eqn.operands, strict=True):
        for part in view:
            start = list(part.start)
            start[axis] += begin
            parts.append(part._replace(start=tuple(start)))
        begin += operand.shape[axis]
    return [tuple(parts)]


def _stack(eqn: Equation, views: list[View]) -> list[View | None]:
    axis, parts = eqn.params["axis"], []
    for index, view in enumerate(views):
        for part in view:
            start, dims = list(part.start), list(part.dims)
            start.insert(axis, index)
            dims.insert(axis, Dim(1, 0))
            parts.append(part._replace(start=tuple(start), dims=tuple(dims)))
    return [tuple(parts)]


def _unstack(eqn: Equation, views: list[View]) -> list[View | None]:
    axis, shape = eqn.params["axis"], eqn.operands[0].shape

    def entry(index: int) -> View | None:
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = index, index + 1
        view = _sliced(views[0], starts, limits, (1,) * len(shape))
        return view and tuple(map(squeezed, view))

    def squeezed(part: Part) -> Part:
        start, dims = list(part.start), list(part.dims)
        del start[axis], dims[axis]
        return part._replace(start=tuple(start), dims=tuple(dims))

    return [entry(index) for index in range(shape[axis])]


_RULES = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "optimization_barrier": lambda eqn, views: list(views),
    "sharding_constraint": _same,
}


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
        inner = _row_major(target)
        new += [Dim(dim.size, dim.stride * group[-1].stride) for dim in inner]
    kept = iter(new)
    return tuple(next(kept) if size > 1 else Dim(1, 0) for size in sizes)


def box(part: Part, lengths: Sequence[int], shape: Sequence[int]) -> Box | None:
    """Which box of a leaf of this shape the part shows, over all steps of its loops.

    None if the entries are no box (every second row, a diagonal).
    """
    loops = [Dim(*loop) for loop in zip(lengths, part.loops, strict=True)]
    axes = list(_row_major(shape))
    start = [part.offset // axis.stride % axis.size for axis in axes]
    count = [1] * len(axes)
    for size, stride in _merged([*loops, *part.dims]):
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


def disjoint(a: Box, b: Box) -> bool:
    """Whether two boxes of one leaf have no entry in common."""
    return any(i + n <= j or j + m <= i for (i, n), (j, m) in zip(a, b, strict=True))


def place(rows: jax.Array, dims: Sequence[Dim], at: Box, shape: Sequence[int]) -> jax.Array:
    """Gradients with respect to a part, `[*lead, *dims]`, as gradients of the leaf
    `[*lead, *shape]`: repeated entries add up, entries outside of the box are zero."""
    lead = rows.ndim - len(dims)
    repeated = tuple(lead + k for k, dim in enumerate(dims) if dim.stride == 0)
    rows = jnp.sum(rows, axis=repeated)
    kept = [dim for dim in dims if dim.stride != 0]
    order = sorted(range(len(kept)), key=lambda k: -kept[k].stride)
    rows = jnp.transpose(rows, (*range(lead), *(lead + k for k in order)))
    rows = rows.reshape(*rows.shape[:lead], *(count for _, count in at))
    edges = [(start, size - start - count) for (start, count), size in zip(at, shape, strict=True)]
    if not any(map(any, edges)):
        return rows
    return jnp.pad(rows, [(0, 0)] * lead + edges)


def _row_major(shape: Sequence[int]) -> tuple[Dim, ...]:
    return tuple(Dim(size, math.prod(shape[k + 1 :])) for k, size in enumerate(shape))


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
