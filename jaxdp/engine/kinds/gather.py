"""Table look-ups: `gather` along one axis (an embedding), and `dynamic_slice` of one row.

The gradients are those of `engine.factors.rows`.
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

import math

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from jaxdp.engine.boxes import split_loops
from jaxdp.engine.factors.rows import LookedUp
from jaxdp.engine.kinds.base import Record
from jaxdp.engine.views import View
from jaxdp.engine.walker import Equation


class Gather:
    """`gather` of whole slices along one axis of a table."""

    tapped = True

    def refuse(self, eqn: Equation, operand: int, view: View | None) -> str:
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        if operand != 0:
            return "parameters as indices"
        if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
            return "a gather along several axes"
        (axis,) = numbers.start_index_map
        if numbers.collapsed_slice_dims != (axis,):
            return "a gather of overlapping slices"
        rest = [size for k, size in enumerate(eqn.operands[0].shape) if k != axis]
        if [size for k, size in enumerate(sizes) if k != axis] != rest:
            return "a gather of partial rows"
        return _refuse_table(eqn, view)

    def captures(self, eqn: Equation, operand: int) -> tuple[int, ...]:
        return (1,)

    def factor(self, record: Record) -> LookedUp:
        numbers = record.eqn.params["dimension_numbers"]
        (axis,) = numbers.start_index_map
        ids = split_loops(record.captured[0], record.part.loops)[..., 0]
        cotangent = split_loops(record.cotangent, record.part.loops)
        offset = numbers.offset_dims
        batch = [k for k in range(cotangent.ndim - 3) if k not in offset]
        cotangent = jnp.transpose(
            cotangent, (0, 1, 2, *(3 + k for k in batch), *(3 + k for k in offset))
        )
        return _looked_up(ids, cotangent, record, axis)


class DynamicSlice:
    """`dynamic_slice` of one entry along one axis: the look-up of a single id."""

    tapped = True

    def refuse(self, eqn: Equation, operand: int, view: View | None) -> str:
        if operand != 0:
            return "parameters as indices"
        if len(_cut_axes(eqn)) != 1:
            return "a dynamic slice of more than one row"
        return _refuse_table(eqn, view)

    def captures(self, eqn: Equation, operand: int) -> tuple[int, ...]:
        (axis,) = _cut_axes(eqn)
        return (1 + axis,)

    def factor(self, record: Record) -> LookedUp:
        (axis,) = _cut_axes(record.eqn)
        ids = split_loops(record.captured[0], record.part.loops)
        cotangent = jnp.squeeze(split_loops(record.cotangent, record.part.loops), 3 + axis)
        return _looked_up(ids, cotangent, record, axis)


def _cut_axes(eqn: Equation) -> list[int]:
    """The axes of which a dynamic slice takes one entry; none if it takes part of another."""
    pairs = list(zip(eqn.params["slice_sizes"], eqn.operands[0].shape, strict=True))
    cut = [axis for axis, (size, full) in enumerate(pairs) if size != full]
    return cut if all(pairs[axis][0] == 1 for axis in cut) else []


def _refuse_table(eqn: Equation, view: View | None) -> str:
    if view is None:
        return ""
    if len(view) != 1 or view[0].shape != tuple(eqn.operands[0].shape):
        return "a look-up in a concatenated table"
    if view[0].repeats or any(view[0].loops):
        return "a look-up in a broadcast or stacked table"
    return ""


def _looked_up(ids: jax.Array, cotangent: jax.Array, record: Record, axis: int) -> LookedUp:
    """From ids `[B, 1, S, *positions]` and cotangents `[B, 1, S, *positions, *features]`."""
    part = record.part
    row, features = part.dims[axis], part.dims[:axis] + part.dims[axis + 1 :]
    batch, width = ids.shape[0], math.prod(dim.size for dim in features)
    ids = ids.reshape(batch, -1)
    ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
    cotangent = cotangent.reshape(batch, ids.shape[1], width)
    # Only clipped ids reach a row from outside: a dynamic slice has no other mode, and in all the
    # others the gradient of a look-up outside of the table is dropped.
    if record.eqn.params.get("mode", GatherScatterMode.CLIP) != GatherScatterMode.CLIP:
        inside = (ids >= 0) & (ids < row.size)
        cotangent = jnp.where(inside[..., None], cotangent, jnp.zeros_like(cotangent))
    return LookedUp(jnp.clip(ids, 0, row.size - 1), cotangent, row, features, record.target)
