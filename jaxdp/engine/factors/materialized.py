"""Per-sample gradients that are formed, one array for every sample."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxdp.engine.boxes import Dim, Target
from jaxdp.engine.factors.base import Factored, Inner, factored, inner_of_rows, static
from jaxdp.engine.numerics import once, widened
from jaxdp.engine.sums import row_norms, weighted_sum


@factored
class Materialized:
    """Per-sample gradients themselves, `[B, *dims]`."""

    values: jax.Array
    dims: tuple[Dim, ...] = static()
    target: Target = static()
    form: str = static()

    @property
    def flops(self) -> int:
        # Their sum over samples replaces the ordinary gradient, so that only the squares are new.
        return 2 * self.values.size

    def prepared(self) -> Factored:
        # Repeated entries are added up once, so that norms and sums see the same rounding errors.
        repeated = [1 + axis for axis, dim in enumerate(self.dims) if dim.stride == 0]
        if all(self.values.shape[axis] == 1 for axis in repeated):
            return once(self)
        values = jnp.sum(widened(self.values), axis=tuple(repeated), keepdims=True)
        dims = tuple(dim if dim.stride else Dim(1, 0) for dim in self.dims)
        return once(replace(self, values=values, dims=dims))

    def certified_norms(self) -> jax.Array:
        return row_norms(self.values)

    def rows(self) -> jax.Array:
        return self.target.place(self.values, self.dims)

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        return self.target.place(weighted_sum(weights, self.values), self.dims)

    def inner(self, direction: jax.Array) -> Inner:
        shown = self.target.shown(widened(direction), self.dims)
        rows = widened(self.values).reshape(self.values.shape[0], -1)
        return inner_of_rows(rows, shown.reshape(1, -1), direction)

    def join(self, other: Factored) -> Factored | None:
        if isinstance(other, Materialized) and self.dims == other.dims:
            return replace(self, values=self.values + other.values)
        return None
