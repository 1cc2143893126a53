"""Bounds on an intermediate result: an L2 norm, an interval, or the array itself."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxdp.lipschitz import rounding
from jaxdp.lipschitz.rounding import EQUATION, gamma, root_of_squares, times, up

Cotangent = jax.Array | float | None
"""A bound on the L2 norm of a cotangent, a scalar; None where the cotangent is zero. A finite bound
implies that every entry is finite."""

INFINITE = math.inf
"""The bound on a cotangent that is unbounded for all parameters: a number, not an array."""

SHARED = "the cotangents of samples that share a value are added up before"
"""The reason why a nonlinear backward pass has no bound on a value that samples share."""


class Range(NamedTuple):
    r"""Bounds on an array x that hold for every example: float32 scalars, possibly traced.

    $$ \lVert x \rVert_2 \le \text{norm}, \qquad \text{low} \le x_j \le \text{high} $$

    The bounds hold for the numbers that the machine computes (`jaxdp.lipschitz.rounding`). They may
    depend on the parameters, never on an example. A finite bound implies that every entry is
    finite; an array that may hold an infinity or NaN has no bound. A bound that is not given
    follows from the others, where possible.

    Attributes:
      norm: bound on the L2 norm of all entries together.
      low: lower bound on every entry.
      high: upper bound on every entry.

    Example:
      >>> from jaxdp import lipschitz
      >>> print(lipschitz.Range(low=-1, high=1).tightened(4).norm.round(3))
      2.0
    """

    norm: ArrayLike = math.inf
    low: ArrayLike = -math.inf
    high: ArrayLike = math.inf

    @property
    def unknown(self) -> bool:
        """Whether it bounds nothing, for any parameters."""
        return all(isinstance(bound, float) for bound in self) and self == UNKNOWN

    def outward(self, units: int = 0) -> "Range":
        """The range, rounded outward so that it holds for what one equation computes.

        Args:
          units: by how many u more a function in the equation is off, see `rounding.EQUATION`.

        Returns:
          A range that contains this one.

        Example:
          >>> bool(Range(1.0, -1.0, 1.0).outward().norm > 1)
          True
        """
        if self.unknown:
            return self
        low, high = (jnp.asarray(end, jnp.float32) for end in (self.low, self.high))
        slip = np.float32(EQUATION + gamma(units))
        return Range(up(self.norm, units), low - slip * jnp.abs(low), high + slip * jnp.abs(high))

    def tightened(self, size: int) -> "Range":
        """The range with what norm and interval say of each other.

        Where neither is finite, or one is NaN (0 · ∞, ∞ - ∞), the result says nothing.

        Args:
          size: number of entries of the array.

        Returns:
          A range of float32 scalars.

        Example:
          >>> print(Range(norm=3.0).tightened(4).high)
          3.0
        """
        if size == 0:
            return Range(*(jnp.zeros((), jnp.float32),) * 3)
        norm, low, high = (jnp.asarray(bound, jnp.float32) for bound in self)
        widest = times(up(math.sqrt(size)), jnp.maximum(jnp.abs(low), jnp.abs(high)))
        norm = jnp.minimum(jnp.where(jnp.isnan(norm), jnp.inf, norm), widest)
        low, high = (
            jnp.where(jnp.isnan(low), -jnp.inf, low),
            jnp.where(jnp.isnan(high), jnp.inf, high),
        )
        finite = jnp.isfinite(norm)
        low, high = jnp.maximum(low, -norm), jnp.minimum(high, norm)
        return Range(norm, jnp.where(finite, low, -jnp.inf), jnp.where(finite, high, jnp.inf))


UNKNOWN = Range()
"""The range of an array that may hold anything, NaN included, for all parameters."""


class Value:
    """One intermediate result of the program of one example.

    Args:
      shape, dtype: shape and dtype of the result.
      range: bounds on the result; not needed where the array is known. By default integers and
        flags have the bounds of their dtype.
      array: the result itself, if it depends on no example.
      moves: whether the result depends on a parameter, so that its cotangent matters.
      per_sample: whether `jax.vmap` certainly gives the result a row for each sample. A result
        without such rows is shared: the cotangents of all samples arrive there as one sum.

    Example:
      >>> x = Value((4,), jnp.float32, range=Range(low=-1, high=1), per_sample=True)
      >>> print(x.size, x.norm.round(3), x.largest)
      4 2.0 1.0
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        *,
        range: Range = UNKNOWN,
        array: Any = None,
        moves: bool = False,
        per_sample: bool = False,
    ):
        self.shape = tuple(shape)
        self.dtype = dtype
        self.array = array
        self.per_sample = per_sample
        self.moves = moves and jnp.issubdtype(dtype, jnp.floating)
        self._range = _all_of(dtype) if range.unknown else range
        self._found: dict[Any, jax.Array] = {}

    @classmethod
    def known(cls, array: Any, *, moves: bool = False) -> "Value":
        """The value of an array that depends on no example.

        Args:
          array: the result itself.
          moves: whether it depends on a parameter.

        Returns:
          A value whose range is read from the array.

        Example:
          >>> print(Value.known(jnp.array([3.0, 4.0])).norm.round(3))
          5.0
        """
        return cls(jnp.shape(array), jnp.result_type(array), array=array, moves=moves)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def unknown(self) -> bool:
        """Whether nothing is known of the result, for any parameters."""
        return self.array is None and self._range.unknown

    def once(self, what: Hashable, compute: Callable[[], jax.Array]) -> jax.Array:
        """The number that `compute` finds for this value, found once: the steps of a loop share it.

        Args:
          what: names the number among those of this value.
          compute: called for the first request of that name.

        Returns:
          The number.

        Example:
          >>> weights = Value.known(jnp.eye(2))
          >>> print(weights.once("trace", lambda: jnp.trace(weights.array)))
          2.0
        """
        if what not in self._found:
            self._found[what] = compute()
        return self._found[what]

    @functools.cached_property
    def range(self) -> Range:
        """Norm and interval, computed when they are asked for: not every array holds numbers."""
        if self.unknown:
            return UNKNOWN
        if self.array is None:
            return self._range.tightened(self.size)
        if self.size == 0 or not _has_numbers(self.dtype):
            return Range(0, 0, 0).tightened(0)
        entries = jnp.asarray(self.array)
        if not jnp.issubdtype(self.dtype, jnp.floating):
            entries = entries.astype(jnp.float32)
        # In float32 a number of another dtype is rounded.
        return (
            Range(rounding.norm(entries), jnp.min(entries), jnp.max(entries))
            .outward()
            .tightened(self.size)
        )

    @property
    def norm(self) -> jax.Array:
        """A bound on the L2 norm of all entries together."""
        return jnp.asarray(self.range.norm)

    @property
    def low(self) -> jax.Array:
        """A lower bound on every entry."""
        return jnp.asarray(self.range.low)

    @property
    def high(self) -> jax.Array:
        """An upper bound on every entry."""
        return jnp.asarray(self.range.high)

    @property
    def largest(self) -> jax.Array:
        """A bound on the absolute value of every entry."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))


def _has_numbers(dtype: Any) -> bool:
    return not jnp.issubdtype(dtype, jax.dtypes.extended)


def _all_of(dtype: Any) -> Range:
    """The range of all numbers of a dtype."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return Range(low=0, high=1)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return Range(low=float(info.min), high=float(info.max))
    return UNKNOWN if _has_numbers(dtype) else Range(0, 0, 0)


def is_infinite(bound: Cotangent) -> bool:
    """Whether a bound is `INFINITE`, which is known while the program of the bound is traced."""
    return isinstance(bound, float) and bound == INFINITE


def known_infinite(bound: Cotangent) -> bool:
    """Whether a bound is infinite, as far as that is known outside of compiled code."""
    unknown = bound is None or isinstance(bound, Tracer)
    return not unknown and not np.isfinite(np.asarray(bound))


def added(bounds: Sequence[Cotangent]) -> Cotangent:
    """The bound on a sum of cotangents, by the triangle inequality."""
    found = [bound for bound in bounds if bound is not None]
    if len(found) < 2:
        return found[0] if found else None
    return INFINITE if any(map(is_infinite, found)) else up(functools.reduce(jnp.add, found))


def jointly(bounds: Sequence[Cotangent]) -> Cotangent:
    """The bound on cotangents side by side, by Pythagoras."""
    found = [bound for bound in bounds if bound is not None]
    if any(map(is_infinite, found)):
        return INFINITE
    return None if not found else root_of_squares(jnp.stack(list(map(jnp.asarray, found))))


def largest(bounds: Sequence[Cotangent]) -> Cotangent:
    """The bound on any one of the cotangents."""
    found = [bound for bound in bounds if bound is not None]
    if any(map(is_infinite, found)):
        return INFINITE
    return None if not found else functools.reduce(jnp.maximum, found)


def scaled(bound: Cotangent, *gains: ArrayLike) -> Cotangent:
    """The bound behind linear maps of these operator norms, one after the other."""
    return bound if bound is None or is_infinite(bound) else times(bound, *gains)


def through_entries(bound: Cotangent, x: Value, gain: float) -> Cotangent:
    """The bound behind a layer that multiplies the cotangent by entries of x in between; infinite
    where that product may overflow."""
    if bound is None:
        return None
    return times(bound, gain) + 0 * times(bound, x.norm)
