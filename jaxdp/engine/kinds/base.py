"""What a kind of site must provide, and what its factors can do."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxdp.engine.views import Box, Dim, Part, View, place
from jaxdp.engine.walker import Equation


class Target(NamedTuple):
    """The box of a parameter leaf that a factor's gradients belong to."""

    at: Box
    shape: tuple[int, ...]

    def place(self, rows: jax.Array, dims: Sequence[Dim]) -> jax.Array:
        """`[*lead, *dims]` as gradients of the whole leaf, `[*lead, *shape]`."""
        return place(rows, dims, self.at, self.shape)


class Factored(Protocol):
    """Per-sample gradients of one box of a leaf, kept as factors."""

    @property
    def target(self) -> Target: ...

    @property
    def method(self) -> str:
        """How the norms are computed, for `explain`."""
        ...

    def squared_norms(self) -> jax.Array:
        """`[B]`: not below the true ones by more than a rounding error of 1e-5."""
        ...

    def rows(self) -> jax.Array:
        """The gradients themselves, `[B, *leaf.shape]`."""
        ...

    def weighted_sum(self, weights: jax.Array, *, guard: bool) -> jax.Array:
        """Σ_i w_i g_i, of the leaf's shape; with `guard`, a sample of weight zero counts for
        nothing even where it is not finite."""
        ...

    def join(self, other: "Factored") -> "Factored | None":
        """The sum of both gradients as one factor, for a box that is used twice; None where
        that has no factored form."""
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
    """A primitive whose gradient with respect to one operand has a factored form."""

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


def refuse_repeats(view: View | None) -> str:
    """A broadcast parameter in a factored position is left to promotion."""
    if view is not None and any(part.repeats for part in view):
        return "a broadcast parameter"
    return ""
