"""What every lowering takes and gives."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxdp.engine.numerics import accumulation_dtype, select_rows
from jaxdp.engine.rounding import ROOT, lost, rounded_up
from jaxdp.varying import devices_along, summed_over_devices, vary, varying_axes

# (params leaves with a gradient, one example) -> (loss, aux)
LeafLoss = Callable[[list[jax.Array], Any], tuple[jax.Array, Any]]


class Weigh(NamedTuple):
    """How certified norms become weights.

    Attributes:
      weights: `(certified norms [b, L] of some rows, constants, what the caller gives these rows
        [b]) -> weights [b, L]`. Closes over no array, so that it can go wherever the rows are.
      groups: for each leaf its group; leaves of one group have equal weights.
      constants: arrays that all rows have in common.
    """

    weights: Callable[[jax.Array, Any, jax.Array], jax.Array]
    groups: tuple[int, ...]
    constants: Any = ()

    def of(self, norms: jax.Array, part: "Batch") -> jax.Array:
        """The weights `[b, L]` of these rows; zero where there is no sample."""
        weights = self.weights(norms, self.constants, part.given)
        return select_rows(part.mask, weights)


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
      sums: for each leaf Σ_i w_i g_i, in at least float32.
      norms: certified `[B, L]`: what sample i adds to the sum of leaf l has the norm
        w_il · norms_il at most (`factors.base.Factored.certified_norms`); zero in masked rows.
      losses: `[B]`, or None; zero in masked rows.
      aux: pytree of `[B, ...]`.
    """

    sums: list[jax.Array]
    norms: jax.Array
    losses: jax.Array | None
    aux: Any


class Batch(NamedTuple):
    """Some rows of a batch.

    Attributes:
      examples: pytree of `[b, ...]`.
      mask: bool `[b]`, which rows hold a sample; the others count for nothing.
      given: float `[b]`, a number that the caller has for each row (`Weigh`).
    """

    examples: Any
    mask: jax.Array
    given: jax.Array


class Lowering(Protocol):
    """A way to compute per-sample gradients, or what is asked of them without computing them."""

    def reduce(self, part: Batch, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        ...

    def rows(self, part: Batch) -> Rows:
        """The gradients themselves."""
        ...


class Handle(Protocol):
    """A lowering applied to one batch."""

    @property
    def batch(self) -> Batch:
        """The rows."""
        ...

    def reduce(self, weigh: Weigh | None) -> Reduction:
        """Norms, and weighted sums if `weigh` is given."""
        ...

    def rows(self) -> Rows:
        """The gradients themselves."""
        ...

    def _replace(self, *, batch: Batch) -> "Handle":
        """The same on another batch."""
        ...


def zero_sum(leaf: Any) -> jax.Array:
    """The sum over no samples for a parameter of this shape and dtype."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros(leaf.shape, accumulation_dtype(leaf.dtype) if floating else leaf.dtype)


def zero_sums(leaves: Sequence[Any], mask: jax.Array) -> list[jax.Array]:
    """The sums over no samples, varying over devices as sums over these rows do."""
    return [vary(zero_sum(leaf), varying_axes((leaf, mask))) for leaf in leaves]


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
