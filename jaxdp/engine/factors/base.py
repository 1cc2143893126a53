"""What every factor gives: certified norms, rows, and the weighted sum."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform

import jax

from jaxdp.engine.boxes import Target
from jaxdp.engine.rounding import gamma, lost, rounded_up, roundings, total
from jaxdp.engine.sums import row_norms

T = TypeVar("T")


def static() -> Any:
    """A field of a factor that is no array."""
    return field(metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def factored(cls: type[T]) -> type[T]:
    """A frozen dataclass and a pytree whose leaves are arrays `[B, ...]`."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


class Inner(NamedTuple):
    """Inner products of per-sample gradients with one array.

    Attributes:
      values: ⟨g_i, r⟩ `[B]`.
      errors: `[B]`: by how much they are off at most from ⟨g̃_i, r⟩, with what a sum adds for the
        sample at a weight of one, g̃_i.
    """

    values: jax.Array
    errors: jax.Array

    def __add__(self, other: Any) -> "Inner":
        return Inner(self.values + other.values, self.errors + other.errors)


def inner_of_rows(rows: jax.Array, along: jax.Array, direction: jax.Array) -> Inner:
    """Of gradients that are formed.

    Args:
      rows: `[B, n]`, in float32 at least; a sum adds them with their weights.
      along: what of r stands beside them, `[B, n]` or `[1, n]`: no entry of r twice but beside 0.
      direction: r.
    """
    count, dtype = rows.shape[1], rows.dtype
    size = rounded_up(row_norms(rows) * row_norms(direction[None]).astype(dtype), 1)
    # Four more for the weight and the sum.
    error = rounded_up(gamma(roundings(count) + 4, dtype) * size, 2)
    return Inner(total(rows * along.astype(dtype)), error + lost(2 * count, dtype))


class Factored(Protocol):
    """Per-sample gradients of one box of a leaf, kept as factors: a pytree of `[B, ...]`."""

    @property
    def target(self) -> Target: ...

    @property
    def form(self) -> str:
        """What the norms are computed from, for `explain`."""
        ...

    @property
    def flops(self) -> int:
        """Operations that the norms of the batch take, beyond the ordinary gradient."""
        ...

    def prepared(self) -> "Factored":
        """The same gradients, in the form that both the norms and the sum start from; what is
        joined is joined before, and what is formed is computed once (`engine.numerics.once`)."""
        ...

    def certified_norms(self) -> jax.Array:
        """`[B]`, of prepared factors: N such that what `weighted_sum` adds for one sample of
        weight w has the norm w·N at most, whatever rounding does to either. Infinite or NaN where
        that is not known."""
        ...

    def rows(self) -> jax.Array:
        """The gradients themselves, `[B, *leaf.shape]`."""
        ...

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        """Σ_i w_i g_i, of the leaf's shape."""
        ...

    def inner(self, direction: jax.Array) -> "Inner":
        """Of prepared factors, with an array r of the leaf's shape."""
        ...

    def join(self, other: "Factored") -> "Factored | None":
        """The sum of both gradients as one factor, for a box that is used twice; None where
        that has no factored form."""
        ...


class Addends(Factored, Protocol):
    """The same as one equation gives it: what it adds up is known."""

    def certified_norms_elsewhere(self) -> jax.Array:
        """`[B]`, of factors that are not prepared: `certified_norms` for a sum that another pass
        computes of the same addends, with other rounding errors."""
        ...
