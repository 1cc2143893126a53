"""Rows of a table that were looked up, and tables that are multiplied by, too.

With ids i_t and output cotangents v_t[p], t = 1..T, the gradient has the row Σ_{t: i_t = n} v_t
for every looked-up n and zeros elsewhere. Equal ids add up before they are squared:

    ‖G‖² = Σ_{distinct n} ‖Σ_{t: i_t = n} v_t‖²

in memory of the T looked-up rows, never of the table.
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxdp.engine.boxes import Dim, Target
from jaxdp.engine.factors.base import Factored, Inner, factored, inner_of_rows, static
from jaxdp.engine.factors.gram import certificate, gram_sum, grams, mass, sum_error, uncancelled
from jaxdp.engine.factors.outer import OuterProducts
from jaxdp.engine.numerics import scale_rows, widened
from jaxdp.engine.precision import FLOAT32, multiplied_wide
from jaxdp.engine.rounding import (
    lost,
    norms,
    rounded_up,
    roundings,
    total,
    unit_roundoff,
)
from jaxdp.engine.sums import BLOCK, Running, as_blocks, row_norms
from jaxdp.varying import zeros


@factored
class LookedUp:
    """Gradients of looked-up rows: ids `[B, T]`, cotangents `[B, T, p]`.

    Attributes:
      row: the axis of the leaf that the ids count.
      features: its other axes.
    """

    ids: jax.Array
    cotangents: jax.Array
    row: Dim = static()
    features: tuple[Dim, ...] = static()
    target: Target = static()

    @property
    def form(self) -> str:
        return "looked-up rows"

    @property
    def flops(self) -> int:
        return 2 * self.cotangents.size

    def prepared(self) -> Factored:
        # Equal ids are added up once, so that norms and sums see the same rounding errors.
        ids, sums = jax.vmap(_distinct_rows)(self.ids, widened(self.cotangents))
        return replace(self, ids=ids, cotangents=sums)

    def certified_norms(self) -> jax.Array:
        return row_norms(self.cotangents)

    def certified_norms_elsewhere(self) -> jax.Array:
        # Of one-hot vectors u: both the rows here and the sum there are off by `sum_error`.
        lengths = norms(widened(self.cotangents))
        positions = lengths.shape[1]
        whole = rounded_up(total(lengths), roundings(positions))
        error = sum_error(whole, positions, FLOAT32)
        return uncancelled(rounded_up(self.prepared().certified_norms() + 2 * error, 2), whole)

    def rows(self) -> jax.Array:
        return self._placed(jax.vmap(self._table)(self.ids, widened(self.cotangents)))

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        return self._placed(self._summed(self.ids, scale_rows(weights, self.cotangents)))

    def inner(self, direction: jax.Array) -> Inner:
        table = self.target.shown(widened(direction), (self.row, *self.features))
        # Ids are distinct, but for those of rows that are zero.
        along = table.reshape(self.row.size, -1)[self.ids]
        rows = widened(self.cotangents)
        count = rows.shape[0]
        return inner_of_rows(rows.reshape(count, -1), along.reshape(count, -1), direction)

    def join(self, other: Factored) -> Factored | None:
        if isinstance(other, OuterProducts):
            return tied(self, other)
        if not isinstance(other, LookedUp):
            return None
        if (self.row, self.features) != (other.row, other.features):
            return None
        ids = jnp.concatenate([self.ids, other.ids], axis=1)
        cotangents = [widened(self.cotangents), widened(other.cotangents)]
        return replace(self, ids=ids, cotangents=jnp.concatenate(cotangents, axis=1))

    def _table(self, ids: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.zeros((self.row.size, rows.shape[-1]), rows.dtype).at[ids].add(rows)

    def _summed(self, ids: jax.Array, rows: jax.Array) -> jax.Array:
        """The table of all samples, from `[B, T]` and `[B, T, p]`: as `engine.sums` asks, but with
        blocks that touch few rows of the table."""
        size, width = self.row.size, rows.shape[-1]
        if ids.shape[0] <= BLOCK:
            return self._table(ids.reshape(-1), rows.reshape(-1, width))
        ids, rows = as_blocks(ids), as_blocks(rows)

        def add(sums: Running, block: tuple[jax.Array, jax.Array]) -> tuple[Running, None]:
            ids, rows = block
            # Each row of the table once; an id outside of it is dropped.
            places, rows = _distinct_rows(ids.reshape(-1), rows.reshape(-1, width), unused=size)

            def read(table: jax.Array) -> jax.Array:
                return table.at[places].get(mode="clip")

            def write(table: jax.Array, rows: jax.Array) -> jax.Array:
                return table.at[places].set(rows, mode="drop")

            return jax.tree.map(write, sums, jax.tree.map(read, sums).add(rows)), None

        start = Running.start(zeros((size, width), rows.dtype, (ids, rows)))
        return jax.lax.scan(add, start, (ids, rows))[0].value

    def _placed(self, table: jax.Array) -> jax.Array:
        dims = (self.row, *self.features)
        return self.target.place(
            table.reshape(*table.shape[:-2], *(dim.size for dim in dims)), dims
        )


@factored
class Tied:
    """A table that is looked up and multiplied by: both gradients and their cross term.

    ⟨G_lookup, G_product⟩ = Σ_{s,t} u[t, i_s] ⟨v_t, w_s⟩, with the vocabulary side u and the
    feature side v of the products, and looked-up ids i and cotangents w.
    """

    looked_up: LookedUp
    products: OuterProducts
    target: Target = static()

    @property
    def form(self) -> str:
        return f"{self.looked_up.form}, {self.products.form} and their cross term"

    @property
    def flops(self) -> int:
        u, v = jax.eval_shape(OuterProducts.vectors, self.products)
        cross = 2 * u.shape[0] * u.shape[2] * self.looked_up.ids.shape[1] * v.shape[-1]
        return self.looked_up.flops + self.products.flops + cross

    def prepared(self) -> Factored:
        looked_up = self.looked_up.prepared()
        assert isinstance(looked_up, LookedUp)
        return replace(self, looked_up=looked_up)

    def certified_norms(self) -> jax.Array:
        """As `engine.factors.gram`, of the products G and the look-ups L, with size S + ‖L‖:

            ‖G + L‖² = ‖G‖² + ‖L‖² + 2 Σ_t Σ_s u[t, i_s] ⟨v_t, w_s⟩

        Ids are distinct, so that Σ_s |u[t, i_s]| ‖w_s‖ ≤ ‖u_t‖ ‖L‖; the terms of the cross sum are
        2 S ‖L‖ together, and all of them (S + ‖L‖)². Adding up the three takes three roundings.
        """
        stored = self.products.stored
        u, v = (side[:, 0] for side in self.products.vectors())
        w, ids = widened(self.looked_up.cotangents), self.looked_up.ids
        # [B, T, S]: the vocabulary side of every position at every looked-up id.
        at_ids = jax.vmap(partial(jnp.take, axis=1))(widened(u), ids)
        # Rows that were added up are no operands of one pass.
        inner = multiplied_wide("btp,bsp->bts", v, w, stored)
        positions, looked_up = inner.shape[1:]
        cross = total(total(at_ids * inner))
        # Three more for a sum of three products.
        crossed = w.shape[-1] + 3 + roundings(positions) + roundings(looked_up)

        u_gram, v_gram = grams(u, v, stored)
        alone, off = gram_sum(u_gram, v_gram)
        rows = self._looked_up_norms(w)
        whole = mass(u_gram.lengths, v_gram.lengths) + rows
        squared = alone + rows * rows + 2 * cross
        # As many positions have no fewer roundings, in either sum, nor less to lose.
        count = 2 * max(positions, looked_up)
        return certificate(squared, rounded_up(whole, 1), max(off, crossed) + 3, count, stored)

    def _looked_up_norms(self, w: jax.Array) -> jax.Array:
        """‖L‖ `[B]`, with √e for each looked-up row, so that the theorem counts underflow; unused
        rows have the id 0 once more, and are zero."""
        tiny = math.sqrt(lost(2, w.dtype) / unit_roundoff(w.dtype))
        return rounded_up(norms(w.reshape(w.shape[0], -1)) + w.shape[1] * tiny, 2)

    def rows(self) -> jax.Array:
        return self.looked_up.rows() + self.products.rows()

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        return self.looked_up.weighted_sum(weights) + self.products.weighted_sum(weights)

    def inner(self, direction: jax.Array) -> Inner:
        return self.looked_up.inner(direction) + self.products.inner(direction)

    def join(self, other: Factored) -> Factored | None:
        if isinstance(other, LookedUp):
            joined = self.looked_up.join(other)
            return replace(self, looked_up=joined) if isinstance(joined, LookedUp) else None
        if isinstance(other, OuterProducts):
            joined = self.products.join(other)
            return replace(self, products=joined) if isinstance(joined, OuterProducts) else None
        return None


def tied(looked_up: LookedUp, products: OuterProducts) -> Tied | None:
    """Both uses of one table, if the products have the looked-up axis as one of their sides."""
    if products.dims.slices:
        return None
    table = ((looked_up.row,), looked_up.features)
    for candidate in (products, products.turned()):
        if (candidate.dims.inputs, candidate.dims.outputs) == table:
            return Tied(looked_up, candidate, looked_up.target)
    return None


def _distinct_rows(ids: jax.Array, rows: jax.Array, unused: int = 0) -> tuple[jax.Array, jax.Array]:
    """Ids and rows `[T, p]` with the rows of equal ids added up: each sum stands once. Behind them
    zeros, with the id `unused`."""
    if ids.shape[0] <= 1:
        return ids, rows
    order = jnp.argsort(ids)
    starts = jnp.diff(ids[order], prepend=ids[order][:1]) != 0
    segment = jnp.cumsum(starts)
    sums = jnp.zeros_like(rows).at[segment].add(rows[order])
    return jnp.full_like(ids, unused).at[segment].set(ids[order]), sums
