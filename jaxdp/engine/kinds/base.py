"""What a kind of site must provide, and what its factors can do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from jaxdp.engine.numerics import widened
from jaxdp.engine.rounding import norms, rounded_up
from jaxdp.engine.sums import weighted_sum
from jaxdp.engine.views import Box, Dim, Part, View, place
from jaxdp.engine.walker import Equation

T = TypeVar("T")


class Target(NamedTuple):
    """The box of a parameter leaf that a factor's gradients belong to."""

    at: Box
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Target":
        """A leaf of this shape."""
        return cls(tuple((0, size) for size in shape), shape)

    def place(self, rows: jax.Array, dims: Sequence[Dim]) -> jax.Array:
        """`[*lead, *dims]` as gradients of the whole leaf, `[*lead, *shape]`."""
        return place(rows, dims, self.at, self.shape)


def static() -> Any:
    """A field of a factor that is no array."""
    return field(metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def factored(cls: type[T]) -> type[T]:
    """A frozen dataclass and a pytree whose leaves are arrays `[B, ...]`."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


class Factored(Protocol):
    """Per-sample gradients of one box of a leaf, kept as factors: a pytree of `[B, ...]`."""

    @property
    def target(self) -> Target: ...

    @property
    def method(self) -> str:
        """How the norms are computed, for `explain`."""
        ...

    @property
    def flops(self) -> int:
        """Operations that the norms of the batch take, beyond the ordinary gradient."""
        ...

    def prepared(self) -> "Factored":
        """The same gradients, in the form that both the norms and the sum start from; what is
        joined is joined before."""
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

    def join(self, other: "Factored") -> "Factored | None":
        """The sum of both gradients as one factor, for a box that is used twice; None where
        that has no factored form."""
        ...


class Addends(Factored, Protocol):
    """The same as a site gives it: what it adds up is known."""

    def certified_norms_elsewhere(self) -> jax.Array:
        """`[B]`, of factors that are not prepared: `certified_norms` for a sum that another pass
        computes of the same addends, with other rounding errors."""
        ...


class Site(NamedTuple):
    """What a batch left at one equation, within scans of the given lengths.

    Attributes:
      eqn: the equation.
      operand: the one that is the parameter.
      lengths: of the enclosing scans.
      captured: the operands that the kind asked for, each `[B, *lengths, ...]`.
      cotangent: of the output, `[B, *lengths, ...]`.
    """

    eqn: Equation
    operand: int
    lengths: tuple[int, ...]
    captured: list[jax.Array]
    cotangent: jax.Array


class Kind(Protocol):
    """A primitive whose gradient with respect to one operand has a factored form.

    Attributes:
      tapped: whether its factors are `Addends`; others bound no sum of another pass, and stay in
        slots (`methods.taps`).
    """

    tapped: bool

    def refuse(self, eqn: Equation, operand: int, view: View | None) -> str:
        """Why this use cannot be factored; empty if it can."""
        ...

    def captures(self, eqn: Equation, operand: int) -> tuple[int, ...]:
        """Which operands the factors are made of, beside the output's cotangent."""
        ...

    def factor(self, site: Site, part: Part, target: Target) -> Factored:
        """The gradients with respect to one part of the operand."""
        ...


def distinct_loops(part: Part, lengths: Sequence[int]) -> list[Dim]:
    """The loops that walk through the leaf: another slice of it at every step."""
    loops = zip(lengths, part.loops, strict=True)
    return [Dim(length, stride) for length, stride in loops if stride]


def split_loops(array: jax.Array, part: Part, lengths: Sequence[int]) -> jax.Array:
    """`[B, *lengths, ...] -> [B, E, S, ...]`: the steps that see distinct slices of the leaf, and
    those that share them."""
    loops = range(len(lengths))
    distinct = [k for k in loops if part.loops[k]]
    shared = [k for k in loops if not part.loops[k]]
    rest = range(1 + len(lengths), array.ndim)
    array = jnp.transpose(array, (0, *(1 + k for k in distinct), *(1 + k for k in shared), *rest))
    sizes = [math.prod(lengths[k] for k in loops) for loops in (distinct, shared)]
    return array.reshape(array.shape[0], *sizes, *(array.shape[k] for k in rest))


@factored
class Materialized:
    """Per-sample gradients themselves, `[B, *dims]`."""

    values: jax.Array
    dims: tuple[Dim, ...] = static()
    target: Target = static()
    method: str = static()

    @property
    def flops(self) -> int:
        # Their sum over samples replaces the ordinary gradient, so that only the squares are new.
        return 2 * self.values.size

    def prepared(self) -> Factored:
        # Repeated entries are added up once, so that norms and sums see the same rounding errors.
        repeated = [1 + axis for axis, dim in enumerate(self.dims) if dim.stride == 0]
        if all(self.values.shape[axis] == 1 for axis in repeated):
            return self
        values = jnp.sum(widened(self.values), axis=tuple(repeated), keepdims=True)
        dims = tuple(dim if dim.stride else Dim(1, 0) for dim in self.dims)
        return replace(self, values=values, dims=dims)

    def certified_norms(self) -> jax.Array:
        return row_norms(self.values)

    def rows(self) -> jax.Array:
        return self.target.place(self.values, self.dims)

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        return self.target.place(weighted_sum(weights, self.values), self.dims)

    def join(self, other: Factored) -> Factored | None:
        if isinstance(other, Materialized) and self.dims == other.dims:
            return replace(self, values=self.values + other.values)
        return None


def row_norms(rows: jax.Array) -> jax.Array:
    """Certified norms of rows `[B, ...]`: one sample alone has its entries times its weight, which
    may have been cast, and its sum may be cast in turn."""
    flat = widened(rows).reshape(rows.shape[0], math.prod(rows.shape[1:]))
    return rounded_up(norms(flat), 3)


def refuse_repeats(view: View | None) -> str:
    """A broadcast parameter in a factored position is left to promotion."""
    if view is not None and any(part.repeats for part in view):
        return "a broadcast parameter"
    return ""
