"""What every method takes and gives: some rows, and what was made of them."""

# JAX leaves some of its types unknown.
# pyright: reportUnknownLambdaType=false
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.numerics import accumulation_dtype
from jaxdp.engine.parts import InParts, part_of
from jaxdp.engine.rounding import ROOT, lost, rounded_up
from jaxdp.varying import devices_along, summed_over_devices, vary, varying_axes

# (params leaves with a gradient, one example) -> (loss, aux)
LeafLoss = Callable[[list[jax.Array], Any], tuple[jax.Array, Any]]


class Rows(NamedTuple):
    """What is known of a (micro)batch, row by row.

    Attributes:
      grads: per-sample gradients, a list of `[b, *leaf.shape]`.
      losses: `[b]`, or None where the gradients came without their losses.
      aux: pytree of `[b, ...]`.
    """

    grads: list[jax.Array]
    losses: jax.Array | None
    aux: Any


class Reduction(NamedTuple):
    """Weighted sums over the batch, and what was seen on the way.

    Attributes:
      sums: for each leaf Σ_i w_i g_i, in at least float32. Of a leaf that is held in parts it may
        be the sum over the rows of all devices, in parts, too (`engine.parts.InParts`).
      norms: certified `[B, L]`: what sample i adds to the sum of leaf l has the norm
        w_il · norms_il at most (`factors.base.Factored.certified_norms`); zero in masked rows.
      losses: `[B]`, or None; zero in masked rows.
      aux: pytree of `[B, ...]`.
    """

    sums: list[Any]
    norms: jax.Array
    losses: jax.Array | None
    aux: Any


class Batch(NamedTuple):
    """Some rows of a batch.

    Attributes:
      examples: pytree of `[b, ...]`.
      mask: bool `[b]`, which rows hold a sample; the others count for nothing.
      weights: float `[b]`, what the caller weighs each row by (`weighting.GivenWeights`); None
        where the norms alone say.
    """

    examples: Any
    mask: jax.Array
    weights: jax.Array | None = None


def sum_dtype(dtype: Any) -> Any:
    """What the sum over samples is held in for a parameter of this dtype."""
    return accumulation_dtype(dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype


def zero_sum(leaf: Any) -> jax.Array:
    """The sum over no samples for a parameter of this shape and dtype."""
    return jnp.zeros(leaf.shape, sum_dtype(leaf.dtype))


def zero_sums(leaves: Sequence[Any], mask: jax.Array) -> list[Any]:
    """The sums over no samples, varying over devices as sums over these rows do; in parts where the
    leaf is held in parts (`engine.parts`)."""

    def zeros(leaf: Any) -> Any:
        held = part_of(leaf)
        if isinstance(held, InParts):
            return replace(held, part=zero_sum(held.part))
        return vary(zero_sum(leaf), varying_axes((leaf, mask)))

    return list(map(zeros, leaves))


def stacked(columns: list[jax.Array], mask: jax.Array) -> jax.Array:
    """Certified norms `[B]` of each leaf as one `[B, L]`, in the widest of their dtypes.

    A leaf that varies over devices where the rows do not is a part of a larger one: its squares
    are added up over these devices.
    """
    widest = max((column.dtype for column in columns), key=lambda dtype: jnp.finfo(dtype).bits)
    parts = varying_axes(columns) - varying_axes(mask)

    def whole(column: jax.Array) -> jax.Array:
        along = parts & varying_axes(column)
        if not along:
            return column
        count = devices_along(along)
        squares = summed_over_devices(jnp.square(column) + lost(2, column.dtype), along)
        return rounded_up(jnp.sqrt(squares), count // 2 + 2 + ROOT)

    return jnp.stack([whole(column).astype(widest) for column in columns], axis=1)
