"""What is known of an intermediate result: an L2 norm, an interval, or the array itself."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Cotangent = jax.Array | None
"""Bound on the L2 norm of a cotangent, a scalar; None where the cotangent is zero."""

SHARED = "the cotangents of samples that share a value are added up before"
"""Why a backward pass that is not linear has no bound on a value without a row for each sample."""


class Range(NamedTuple):
    r"""Bounds on an array x that hold for every example: float32 scalars, possibly traced.

    $$ \lVert x \rVert_2 \le \text{norm}, \qquad \text{low} \le x_j \le \text{high} $$

    They may depend on the parameters, never on an example.

    Attributes:
      norm: of all entries together.
      low: of the smallest entry.
      high: of the largest entry.
    """

    norm: ArrayLike = math.inf
    low: ArrayLike = -math.inf
    high: ArrayLike = math.inf

    def numbers(self) -> "Range":
        """In float32, and infinite where it is not a number: 0 · ∞ and ∞ - ∞ say nothing."""
        bounds = (jnp.asarray(bound, jnp.float32) for bound in self)
        return Range(
            *(
                jnp.where(jnp.isnan(bound), nothing, bound)
                for bound, nothing in zip(bounds, Range(), strict=True)
            )
        )

    def tightened(self, size: int) -> "Range":
        """What norm and interval say of each other, for `size` entries."""
        norm, low, high = (jnp.asarray(bound) for bound in self.numbers())
        if size == 0:
            return Range(*(jnp.zeros((), jnp.float32),) * 3)
        norm = jnp.minimum(norm, math.sqrt(size) * jnp.maximum(jnp.abs(low), jnp.abs(high)))
        return Range(norm, jnp.maximum(low, -norm), jnp.minimum(high, norm))


class Value:
    """One intermediate result of the program of one example.

    Args:
      shape, dtype: of the result.
      range: bounds on it; not needed where the array is known.
      array: the result itself, if it depends on no example.
      moves: whether it depends on a parameter, so that its cotangent matters.
      per_sample: whether `jax.vmap` certainly gives it a row for each sample. What has none is
        shared: the cotangents of all samples arrive there as one sum.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        *,
        range: Range | None = None,
        array: Any = None,
        moves: bool = False,
        per_sample: bool = False,
    ):
        self.shape = tuple(shape)
        self.dtype = dtype
        self.array = array
        self.per_sample = per_sample
        self.moves = moves and jnp.issubdtype(dtype, jnp.floating)
        self._range = Range() if range is None else range
        self._found: dict[Any, jax.Array] = {}

    @classmethod
    def known(cls, array: Any, *, moves: bool = False) -> "Value":
        """An array that depends on no example."""
        return cls(jnp.shape(array), jnp.result_type(array), array=array, moves=moves)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def once(self, what: Hashable, compute: Callable[[], jax.Array]) -> jax.Array:
        """What `compute` finds out about this value, found out once: the steps of a loop share
        their weights."""
        if what not in self._found:
            self._found[what] = compute()
        return self._found[what]

    @functools.cached_property
    def range(self) -> Range:
        """Norm and interval. Computed when asked for: not every array has numbers in it."""
        if self.array is None:
            return self._range.tightened(self.size)
        if self.size == 0:
            return Range(0, 0, 0).tightened(0)
        entries = jnp.asarray(self.array).astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(entries)))
        return Range(norm, jnp.min(entries), jnp.max(entries)).numbers()

    @property
    def norm(self) -> jax.Array:
        """Bound on the L2 norm of all entries together."""
        return jnp.asarray(self.range.norm)

    @property
    def low(self) -> jax.Array:
        """Bound on the smallest entry."""
        return jnp.asarray(self.range.low)

    @property
    def high(self) -> jax.Array:
        """Bound on the largest entry."""
        return jnp.asarray(self.range.high)

    @property
    def largest(self) -> jax.Array:
        """Bound on the absolute value of an entry."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))


def added(bounds: Sequence[Cotangent]) -> Cotangent:
    """Of the sum of cotangents: the triangle inequality."""
    found = [bound for bound in bounds if bound is not None]
    return None if not found else functools.reduce(jnp.add, found)


def jointly(bounds: Sequence[Cotangent]) -> Cotangent:
    """Of cotangents side by side: Pythagoras."""
    found = [bound for bound in bounds if bound is not None]
    return None if not found else jnp.sqrt(sum(map(jnp.square, found), jnp.float32(0)))


def largest(bounds: Sequence[Cotangent]) -> Cotangent:
    """Of one among them, whichever."""
    found = [bound for bound in bounds if bound is not None]
    return None if not found else functools.reduce(jnp.maximum, found)


def scaled(bound: Cotangent, gain: ArrayLike) -> Cotangent:
    """Behind a linear map of that operator norm."""
    return None if bound is None else bound * jnp.asarray(gain, np.float32)
