"""`Bounded`: a sum over samples together with its L2 sensitivity, not yet noised.

The two roads of jaxdp meet here. Clipping builds a `Bounded`; `jaxdp.add_noise` is the only
transformation that turns one into plain arrays:

    PerSampleGrads ── clip_* ──►  Bounded ── add_noise ──► plain arrays ── optax
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false
# The functions that make a pytree of it stand beside the class.
# pyright: reportPrivateUsage=false

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl
from jax.typing import ArrayLike

from jaxdp.varying import sample_axes

# Leaf -> index of its sensitivity group, in the order of `jax.tree.leaves`. `None` marks a leaf
# that no sample can change (an integer or frozen leaf): it has no sensitivity and gets no noise.
Groups = tuple[int | None, ...]

_NEXT_STEP = (
    "a Bounded is a sum over samples that has no noise yet: put jaxdp.add_noise(...) between the "
    "clip and the optimizer, with nothing of optax around it"
)

_TAG = "jaxdp.Bounded: needs jaxdp.add_noise first"

# Bounded must be a pytree to cross jit, scan and shard_map, yet a transformation that maps over
# its leaves (a norm clip, a learned scale) would change the value behind the sensitivity's back.
# So beside every leaf of the value stands a seal of the same path, shape and size, of no bytes, in
# a dtype that no arithmetic accepts: whichever leaves such a map picks by these, it fails while it
# is traced, and JAX's message names this tag. One that picks by dtype leaves the seals as they
# are, which `_unflatten` sees.
_SEAL = define_prng_impl(
    key_shape=(0,),
    seed=None,  # pyright: ignore[reportArgumentType]
    split=None,  # pyright: ignore[reportArgumentType]
    random_bits=None,  # pyright: ignore[reportArgumentType]
    fold_in=None,  # pyright: ignore[reportArgumentType]
    name="jaxdp_bounded",
    tag=_TAG,
)


def _seal(leaf: jax.Array) -> jax.Array:
    nothing = jnp.zeros((*leaf.shape, 0), jnp.uint32)
    return jax.random.wrap_key_data(nothing, impl=_SEAL)  # pyright: ignore[reportArgumentType]


class _SpeakingType(type):
    """JAX prints the class when an optimizer's state does not match; let it say what to do."""

    def __repr__(cls) -> str:
        return f"<class 'jaxdp.Bounded': {_NEXT_STEP}>"


class Bounded(metaclass=_SpeakingType):
    r"""A sum over samples and a proof of how much one sample can change it.

    For neighbouring batches D, D' that differ by adding or removing one sample, and for every
    group k of leaves,

    $$ \Bigl(\sum_{l \in k} \lVert v_l(D) - v_l(D') \rVert_2^2\Bigr)^{1/2} \le \Delta_k. $$

    Building one is a claim that this holds: clips do it, and the bounds of a Lipschitz network.
    A Bounded crosses `jit`, `scan`, `cond` and `shard_map`. Arithmetic other than adding disjoint
    sums and scaling by a public constant raises, and so does any transformation that maps over it.

    Args:
      value: pytree with the structure and shapes of the parameters; leaves in at least float32.
      sensitivity: Δ, a scalar for the whole tree, or `[K]` for K groups; same unit as the value.
      groups: for each leaf of `value` the index of its group, `None` for a leaf that no sample
        can change. Default: one group that holds every floating-point leaf.
      unsummed: inside `shard_map` or `pmap`, axes of devices along which samples are spread and
        over which `jaxdp.distributed.all_reduce` has not added up yet. Default: all along which
        the value may differ.

    Raises:
      ValueError: groups and sensitivity do not fit each other or the value.

    Example:
      >>> import jax.numpy as jnp
      >>> total = Bounded({"w": jnp.ones(3)}, sensitivity=2.0) * 0.5
      >>> float(total.total_sensitivity)
      1.0
      >>> jnp.zeros(3) + total  # doctest: +ELLIPSIS
      Traceback (most recent call last):
        ...
      TypeError: cannot combine ArrayImpl with Bounded: ... put jaxdp.add_noise(...) between ...
    """

    __slots__ = ("value", "sensitivity", "groups", "unsummed", "_seals")

    value: Any
    sensitivity: jax.Array
    groups: Groups
    unsummed: frozenset[str]
    _seals: Any

    def __init__(
        self,
        value: Any,
        sensitivity: ArrayLike,
        groups: Iterable[int | None] | None = None,
        unsummed: frozenset[str] | None = None,
    ):
        leaves = jax.tree.leaves(value)
        sensitivity = jnp.asarray(sensitivity)
        if sensitivity.dtype != jnp.float64:
            sensitivity = sensitivity.astype(jnp.float32)
        if groups is None:
            groups = (0 if jnp.issubdtype(leaf.dtype, jnp.inexact) else None for leaf in leaves)
        groups = tuple(groups)
        if len(groups) != len(leaves):
            raise ValueError(
                f"groups must name one group per leaf, got {len(groups)} groups for "
                f"{len(leaves)} leaves. Name None for a leaf without a gradient."
            )
        self.value = value
        self.sensitivity = sensitivity
        self.groups = groups
        if unsummed is None:
            unsummed = sample_axes(self.moving_leaves())
        self.unsummed = unsummed
        self.check_groups()
        self._seals = jax.tree.map(_seal, value)

    @property
    def total_sensitivity(self) -> jax.Array:
        """L2 sensitivity of the whole tree, a scalar: sqrt(Σ_k Δ_k²)."""
        return root_sum_squares(self.sensitivity)

    def check_groups(self) -> None:
        """Raises ValueError unless there is one sensitivity for each group of leaves.

        What comes out of `vmap` fails here: a stack of sums is no sum with a sensitivity.

        Raises:
          ValueError: the groups and the shape of the sensitivity do not fit each other.

        Example:
          >>> import jax.numpy as jnp
          >>> Bounded(jnp.zeros(2), 1.0).check_groups()
        """
        used = {group for group in self.groups if group is not None}
        if used != set(range(self.sensitivity.size)) or self.sensitivity.ndim > 1:
            raise ValueError(
                f"sensitivity must be a scalar or hold one number for each group of leaves, got "
                f"shape {self.sensitivity.shape} for groups {sorted(used)}. Number the groups from "
                "0, and do not map over a Bounded."
            )

    def __add__(self, other: object) -> "Bounded":
        """Adds the sum over further, disjoint samples: one sample is in one of the two only."""
        if not isinstance(other, Bounded):
            return self._refuse(other)
        if self.groups != other.groups:
            raise ValueError(
                f"two Bounded that are added must have the same groups, got {self.groups} and "
                f"{other.groups}. Add sums of the same clip."
            )
        if self.unsummed != other.unsummed:
            raise ValueError(
                "two Bounded that are added must both be of one device or both of all devices, "
                "got one of each. Put jaxdp.distributed.all_reduce(...) behind both."
            )
        value = jax.tree.map(jnp.add, self.value, other.value)
        return self.with_value(value, jnp.maximum(self.sensitivity, other.sensitivity))

    def __mul__(self, factor: ArrayLike) -> "Bounded":
        """Scales value and sensitivity by a public constant (never by a function of the data)."""
        if isinstance(factor, Bounded) or jnp.ndim(factor) != 0:
            return self._refuse(factor)
        factor = jnp.asarray(factor, self.sensitivity.dtype)
        leaves, treedef = jax.tree.flatten(self.value)
        scaled = [
            leaf if group is None else leaf * factor.astype(leaf.dtype)
            for leaf, group in zip(leaves, self.groups, strict=True)
        ]
        value = jax.tree.unflatten(treedef, scaled)
        # A product that is too small for its precision vanishes, though entries of the value, sums
        # of many samples, may be left: rounded up to what is left of one sample.
        sensitivity = self.sensitivity * jnp.abs(factor)
        moved = ~(is_zero(self.sensitivity) | is_zero(factor))
        tiny = jnp.finfo(sensitivity.dtype).tiny
        sensitivity = jnp.where(moved & (sensitivity < tiny), tiny, sensitivity)
        return self.with_value(value, sensitivity)

    __rmul__ = __mul__

    def with_value(
        self, value: Any, sensitivity: jax.Array, *, summed_over: frozenset[str] = frozenset()
    ) -> "Bounded":
        """Another sum over samples with the same groups. As building one, it is a claim.

        Args:
          value: the sum, a pytree like this one's.
          sensitivity: L2 sensitivity of the sum, as this one's.
          summed_over: axes of devices over which the sum has been added up.

        Returns:
          The sum; it is still to be added up over the other axes that this one is.

        Example:
          >>> import jax.numpy as jnp
          >>> doubled = Bounded(jnp.ones(2), 1.0).with_value(2 * jnp.ones(2), jnp.float32(2.0))
          >>> doubled.value.tolist(), float(doubled.sensitivity)
          ([2.0, 2.0], 2.0)
        """
        return Bounded(value, sensitivity, self.groups, self.unsummed - summed_over)

    def moving_leaves(self) -> list[jax.Array]:
        """The leaves that a sample can change.

        Returns:
          The leaves of `value` that belong to a group, in their order.

        Example:
          >>> import jax.numpy as jnp
          >>> len(Bounded((jnp.zeros(2), jnp.arange(3)), 1.0).moving_leaves())
          1
        """
        leaves = jax.tree.leaves(self.value)
        return [leaf for leaf, g in zip(leaves, self.groups, strict=True) if g is not None]

    def _refuse(self, other: Any, *_: Any) -> Any:
        raise TypeError(f"cannot combine {type(other).__name__} with Bounded: {_NEXT_STEP}.")

    __radd__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse

    def __repr__(self) -> str:
        shapes = jax.tree.map(jnp.shape, self.value)
        return f"Bounded(value={shapes}, sensitivity={self.sensitivity}; {_NEXT_STEP})"


@contextlib.contextmanager
def taken_whole() -> Generator[None, None, None]:
    """Says in a sentence what is wrong where a transformation takes a `Bounded` apart: what stops
    it is the words of JAX about trees and dtypes.

    Raises:
      TypeError: instead of an error that names a `Bounded` without noise.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if not any(words in str(error) for words in (_NEXT_STEP, _TAG)):
            raise
        raise TypeError(
            "the jaxdp.Bounded of a clip must come to jaxdp.add_noise or jaxdp.accumulate whole, "
            "got a transformation that takes it apart. Put jaxdp.add_noise(...) right behind the "
            "clip. optax.masked, partition, MultiSteps or apply_if_finite may hold what stands "
            "behind the noise, not the noise: for groups of leaves there are jaxdp.clip_by_group, "
            "allocation= and trainable=, for several physical batches jaxdp.accumulate."
        ) from error


def root_sum_squares(numbers: jax.Array) -> jax.Array:
    """(Σ x²)^(1/2) of an array, relative to its largest entry: no square vanishes or overflows."""
    largest = jnp.max(jnp.abs(numbers))
    scale = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum(jnp.square(numbers / scale)))


def is_zero(number: jax.Array) -> jax.Array:
    """Whether every bit is zero. `number == 0` is true of subnormal numbers, too, where these are
    flushed to zero; a sample can move what has such a sensitivity. (Of -0.0 it is false: LLVM would
    make a comparison of floats of a test that leaves the sign out.)"""
    bits = jax.lax.bitcast_convert_type(number, jnp.dtype(f"uint{8 * number.dtype.itemsize}"))
    return bits == 0


@dataclass(frozen=True)
class _Static:
    """What a pytree of a `Bounded` holds beside its leaves.

    Attributes:
      groups, unsummed: of the Bounded.
      leaves: those it was made of, for `_unflatten`; references that keep nothing alive. Trees of
        others are alike.
    """

    groups: Groups
    unsummed: frozenset[str]
    leaves: tuple[Callable[[], Any], ...] = field(compare=False)


def _flatten(bounded: Bounded) -> tuple[tuple[Any, ...], _Static]:
    children = bounded.value, bounded.sensitivity, bounded._seals
    try:
        leaves = tuple(map(weakref.ref, jax.tree.leaves(children)))
    except TypeError:  # placeholders of JAX
        leaves = ()
    return children, _Static(bounded.groups, bounded.unsummed, leaves)


def _flatten_with_keys(bounded: Bounded) -> tuple[tuple[Any, ...], _Static]:
    children, static = _flatten(bounded)
    names = map(jax.tree_util.GetAttrKey, ("value", "sensitivity", "seals"))
    return tuple(zip(names, children, strict=True)), static


def _unflatten(static: _Static, children: Iterable[Any]) -> Bounded:
    # JAX also unflattens with placeholders, which no validation would pass: skip __init__.
    bounded = object.__new__(Bounded)
    bounded.value, bounded.sensitivity, bounded._seals = children = tuple(children)
    bounded.groups, bounded.unsummed = static.groups, static.unsummed
    # optax.masked and optax.partition make a tree of flags or labels to pick leaves by, and so
    # would reach the value past the seals.
    if any(isinstance(leaf, bool | np.bool | str) for leaf in jax.tree.leaves(bounded.value)):
        raise TypeError(f"cannot pick leaves of a Bounded: {_NEXT_STEP}.")
    # What crosses jit, scan or shard_map has all leaves anew; what a map has left out is the same.
    kept = [a() is b for a, b in zip(static.leaves, jax.tree.leaves(children), strict=False)]
    if any(kept) and not all(kept):
        raise TypeError(f"cannot change some leaves of a Bounded and not others: {_NEXT_STEP}.")
    return bounded


jax.tree_util.register_pytree_with_keys(Bounded, _flatten_with_keys, _unflatten, _flatten)
