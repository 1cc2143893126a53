"""Answers by privacy loss distributions, composed as dp-accounting's `PLDAccountant` does.

Example:
  >>> from jaxdp.accounting.mechanisms.gaussian import SampledGaussian
  >>> steps = (Counted(SampledGaussian(None, 10.0), 50),)
  >>> round(epsilon(steps, 1e-5, "add_or_remove_one"), 3)
  2.943
"""

# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Sequence

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from jaxdp.accounting.masses import TAIL, Masses
from jaxdp.accounting.mechanisms.base import Counted
from jaxdp.accounting.question import RelationName

# Beyond this a privacy loss distribution says "infinite": its grid would be so coarse that nothing
# is resolved, and no such ε is a promise.
_LARGEST_RESOLVED = 1e5

# More mechanisms than this are composed on a grid that is coarser in proportion, so that an answer
# takes seconds however many there are.
_FINE_MECHANISMS = 8

# How much coarser the grid of a rough answer is. A power of two, as `epsilon` needs.
_ROUGHLY_COARSER = 16

# With more equal steps than this a coarse grid is off by more than a tenth.
_MANY_STEPS = 300_000

# What the sums of masses may be off by from which ε and δ are read.
_ROUNDING = 1e-9


def epsilon(
    mechanisms: tuple[Counted, ...], delta: float, relation: RelationName, *, coarser: int = 1
) -> float:
    """The ε of mechanisms at a given δ.

    Args:
      mechanisms: at least one, none without noise.
      delta: δ in (0, 1).
      relation: "add_or_remove_one" or "replace_one".
      coarser: how many times coarser than usual the grid of losses is, a power of two. The points
        of the coarse grid are points of the fine one, and rounding a distribution up to a
        coarser grid can only raise every δ(ε).

    Returns:
      ε ≥ 0; `math.inf` where it may be beyond 10⁵.

    Raises:
      TooManyStepsError: more equal sampled steps than are composed.

    Example:
      >>> from jaxdp.accounting.mechanisms import mechanisms_of, PureRelease
      >>> round(epsilon(mechanisms_of([[PureRelease(0.1)]]), 1e-5, "replace_one"), 3)
      0.2
    """
    interval = coarser * grid_interval(mechanisms, relation)
    if math.isinf(interval):
        return math.inf
    found = float(_composed(mechanisms, relation, interval).get_epsilon_for_delta(delta))
    return found * (1 + _ROUNDING) + _ROUNDING if found > 0 else 0.0


def rough_epsilon(mechanisms: tuple[Counted, ...], delta: float, relation: RelationName) -> float:
    """About `epsilon`, in about a tenth of the time: to search with, never to answer with.

    Args:
      mechanisms: at least one, none without noise.
      delta: δ in (0, 1).
      relation: "add_or_remove_one" or "replace_one".

    Returns:
      ε ≥ 0; `math.inf` where it may be beyond 10⁵.

    Raises:
      TooManyStepsError: more equal sampled steps than are composed.

    Example:
      >>> from jaxdp.accounting.mechanisms import mechanisms_of, PureRelease
      >>> round(rough_epsilon(mechanisms_of([[PureRelease(0.1)]]), 1e-5, "replace_one"), 2)
      0.2
    """
    many = any(count > _MANY_STEPS for _, count in mechanisms)
    return epsilon(mechanisms, delta, relation, coarser=1 if many else _ROUGHLY_COARSER)


def delta(mechanisms: tuple[Counted, ...], epsilon: float, relation: RelationName) -> float:
    """The δ of mechanisms at a given ε.

    Args:
      mechanisms: at least one, none without noise.
      epsilon: ε ≥ 0.
      relation: "add_or_remove_one" or "replace_one".

    Returns:
      δ in [0, 1]; 1.0 where an ε beyond 10⁵ would have to be resolved.

    Raises:
      TooManyStepsError: more equal sampled steps than are composed.

    Example:
      >>> from jaxdp.accounting.mechanisms import mechanisms_of, PureRelease
      >>> delta(mechanisms_of([[PureRelease(0.1)]]), 0.3, "replace_one")
      0.0
    """
    interval = grid_interval(mechanisms, relation)
    if math.isinf(interval):
        return 1.0
    pld = _composed(mechanisms, relation, interval)
    found = float(pld.get_delta_for_epsilon(epsilon)) * (1 + _ROUNDING)
    return min(max(found, 0.0), 1.0)  # a sum of masses may end below zero


def grid_interval(mechanisms: Sequence[Counted], relation: RelationName) -> float:
    """The PLD grid's step: dp-accounting's 1e-4, coarser once epsilon may reach 25 or where
    many mechanisms are composed; infinite where epsilon may be beyond what is resolved.

    A step is rounded pessimistically, so this choice bounds memory and time and never the truth: at
    σ = 0.01 the usual grid would need gigabytes to say that epsilon is about 5,000.

    Args:
      mechanisms: what is composed.
      relation: "add_or_remove_one" or "replace_one".

    Returns:
      1e-4 times a power of two, or infinity.

    Example:
      >>> from jaxdp.accounting.mechanisms.gaussian import SampledGaussian
      >>> grid_interval([Counted(SampledGaussian(None, 1.0), 1)], "add_or_remove_one")
      0.0001
    """
    mean = widest = 0.0
    for mechanism, count in mechanisms:
        losses = mechanism.losses(relation)
        mean += count * losses.mean
        widest = max(widest, losses.widest)
    reach = mean + 10 * math.sqrt(2 * mean) + widest
    if reach > _LARGEST_RESOLVED:
        return math.inf
    coarsening = max(1.0, reach / 25, len(mechanisms) / _FINE_MECHANISMS)
    # Powers of two: points of the coarse grid are points of the fine one, so the pessimistic
    # rounding of the coarse one dominates.
    return 1e-4 * 2 ** math.ceil(math.log2(coarsening))


def _nothing(interval: float) -> PrivacyLossDistribution:
    """The losses of no release."""
    return PrivacyLossDistribution(Masses(0, np.ones(1), 0.0, interval=interval))


_Key = tuple[tuple[Counted, ...], RelationName, float]

# What was composed last, the least recently used first.
_COMPOSED: dict[_Key, PrivacyLossDistribution] = {}
_MOST_COMPOSED = 8


def _keep(key: _Key, pld: PrivacyLossDistribution) -> None:
    _COMPOSED.pop(key, None)
    _COMPOSED[key] = pld
    if len(_COMPOSED) > _MOST_COMPOSED:
        del _COMPOSED[next(iter(_COMPOSED))]


def _composed(
    mechanisms: tuple[Counted, ...], relation: RelationName, interval: float
) -> PrivacyLossDistribution:
    """Composed as `PLDAccountant` does, with room for rounding; see `Masses`.

    A ledger that grows adds to its last mechanism, or one more behind it: so both what stands
    before the last one and the whole are kept, and the longest beginning that is known is extended.
    """
    composed, done = _nothing(interval), 0
    for (known, *grid), pld in _COMPOSED.items():
        if done < len(known) and grid == [relation, interval]:
            if mechanisms[: len(known)] == known:
                composed, done = pld, len(known)
    for end in range(done, len(mechanisms)):
        if end == len(mechanisms) - 1:
            _keep((mechanisms[:end], relation, interval), composed)
        mechanism, count = mechanisms[end]
        composed = composed.compose(mechanism.pld(count, relation, interval), TAIL)
    _keep((mechanisms, relation, interval), composed)
    return composed
