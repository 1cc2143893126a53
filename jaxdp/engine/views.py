"""Linear views: which entries of a derived array are which entries of a parameter.

A model seldom multiplies by a parameter as it is stored: it transposes, reshapes, slices or
concatenates first. As long as every entry of the result is one entry of one parameter, gradients
come back by rearranging, and norms do not change. A `View` keeps track of that by strides, as NumPy
does, one `Part` for each rectangular piece:

    V[start + i] = parameter.ravel()[offset + Σ_k i_k · dims[k].stride + Σ_l t_l · loops[l].stride]

where t_l counts the iterations of the l-th enclosing `lax.scan`, and a number may stand before it
all (LoRA's α/r, the multipliers of μP). A stride of 0 repeats an entry: an axis that was broadcast,
or a loop that shares the parameter. An operation that is no view of this kind gives None, and its
result is treated as an array of its own.
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax.numpy as jnp

from jaxdp.engine.boxes import Box, Dim, covered, reshaped, row_major
from jaxdp.engine.walker import Equation


class Part(NamedTuple):
    """A box of V that shows entries of one source, a parameter leaf.

    Attributes:
      source: which leaf.
      offset: position in the flat leaf of the first entry.
      start: where in V the box begins.
      dims: the axes of V within the box.
      loops: the enclosing scans, the outermost first: how many steps, and the stride between them.
      half: whether V was cast to less than 32 bits on the way.
      scale: what the entries were multiplied by.
    """

    source: int
    offset: int
    start: tuple[int, ...]
    dims: tuple[Dim, ...]
    loops: tuple[Dim, ...] = ()
    half: bool = False
    scale: float = 1.0

    @property
    def repeats(self) -> bool:
        """Whether V shows an entry more than once: gradients then add up."""
        return any(dim.stride == 0 and dim.size > 1 for dim in self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple(dim.size for dim in self.dims)

    @property
    def window(self) -> Box:
        """Where in V the box lies."""
        return tuple(zip(self.start, self.shape, strict=True))


# Entries of V outside every part are constants.
View = tuple[Part, ...]


def whole(source: int, shape: Sequence[int]) -> View:
    """The leaf itself."""
    return (Part(source, 0, (0,) * len(shape), row_major(shape)),)


def share(view: View | None, length: int) -> View | None:
    """V as the body of a scan sees a constant: the same at every step."""
    return view and tuple(part._replace(loops=(*part.loops, Dim(length, 0))) for part in view)


def step_through(view: View | None, length: int) -> View | None:
    """V as the body of a scan sees its xs: one slice per step."""
    if view is None or any(part.dims[0].size != length for part in view):
        return None  # steps that show different leaves

    def stepped(part: Part) -> Part:
        loops = (*part.loops, part.dims[0])
        return part._replace(start=part.start[1:], dims=part.dims[1:], loops=loops)

    return tuple(map(stepped, view))


def apply(eqn: Equation, views: Sequence[View | None]) -> list[View | None]:
    """The views that an operation on views gives; constant operands are `()`."""
    rule = _RULES.get(eqn.name)
    if rule is None or any(view is None for view in views):
        return [None] * len(eqn.outputs)
    return rule(eqn, [view for view in views if view is not None])


def _same(_: Equation, views: list[View]) -> list[View | None]:
    return list(views)


def _cast(eqn: Equation, views: list[View]) -> list[View | None]:
    dtype = eqn.outputs[0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return [None]
    half = cast(int, jnp.finfo(dtype).bits) < 32
    return [tuple(part._replace(half=part.half or half) for part in views[0])]


def _rounded(eqn: Equation, views: list[View]) -> list[View | None]:
    half = eqn.params["mantissa_bits"] < 23
    return [tuple(part._replace(half=part.half or half) for part in views[0])]


def _scaled(eqn: Equation, views: list[View]) -> list[View | None]:
    """Minus a view, or a view times or by a number of the program itself."""
    if eqn.name == "neg":
        return [_times(views[0], -1.0)]
    numbers, shown = eqn.literals, [view for view in views if view]
    if len(numbers) != 1 or len(shown) != 1 or (eqn.name == "div" and not views[0]):
        return [None]
    number = float(numbers[0])
    if eqn.name == "div":
        return [_times(shown[0], 1 / number) if number else None]
    return [_times(shown[0], number)]


# Of a larger or a smaller number times a gradient it is not known that nothing over- or underflows.
_LARGEST_SCALE = 2.0**24


def _times(view: View, number: float) -> View | None:
    parts = tuple(part._replace(scale=number * part.scale) for part in view)
    known = all(1 / _LARGEST_SCALE <= abs(part.scale) <= _LARGEST_SCALE for part in parts)
    return parts if known else None


def _transpose(eqn: Equation, views: list[View]) -> list[View | None]:
    order: tuple[int, ...] = eqn.params["permutation"]

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
    axis: int = eqn.params["axis"]
    begin, outputs = 0, list[View | None]()
    shape: tuple[int, ...] = eqn.operands[0].shape
    for size in map(int, eqn.params["sizes"]):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = begin, begin + size
        outputs.append(_sliced(views[0], starts, limits, (1,) * len(shape)))
        begin += size
    return outputs


def _sliced(
    view: View, starts: Sequence[int], limits: Sequence[int], steps: Sequence[int]
) -> View | None:
    parts: list[Part] = []
    for part in view:
        start, dims, offset = list[int](), list[Dim](), part.offset
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
    axis: int = eqn.params["dimension"]
    begin, parts = 0, list[Part]()
    for view, operand in zip(views, eqn.operands, strict=True):
        for part in view:
            start = list(part.start)
            start[axis] += begin
            parts.append(part._replace(start=tuple(start)))
        begin += operand.shape[axis]
    return [tuple(parts)]


def _stack(eqn: Equation, views: list[View]) -> list[View | None]:
    axis: int = eqn.params["axis"]
    parts: list[Part] = []
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


_RULES: dict[str, Callable[[Equation, list[View]], list[View | None]]] = {
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
    "reduce_precision": _rounded,
    "neg": _scaled,
    "mul": _scaled,
    "div": _scaled,
    "name": _same,  # `jax.ad_checkpoint.checkpoint_name`
    "copy": _same,
    "copy_p": _same,
    "optimization_barrier": _same,
    "sharding_constraint": _same,
}


def box(part: Part, shape: Sequence[int]) -> Box | None:
    """Which box of a leaf of this shape the part shows, over all steps of its loops; None if the
    entries are no box."""
    return covered(part.offset, [*part.loops, *part.dims], shape)
