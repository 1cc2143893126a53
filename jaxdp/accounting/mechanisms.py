"""From executed steps to counted mechanisms.

Order does not matter for Poisson and fixed-size steps, so equal ones become one mechanism with a
count, and so do equal pure releases. Shuffled epochs become plain Gaussians (`epochs.py`).

Example:
    >>> step = Release(1.1, PoissonSampling(0.1), steps=2)
    >>> mechanisms_of([[step, step]])
    (GaussianMechanism(sampling=PoissonSampling(sampling_rate=0.1), noise_multiplier=1.1,
    repeats=4),)
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import dp_accounting

from jaxdp.accounting.draws import Draws
from jaxdp.accounting.epochs import EpochSteps, participations
from jaxdp.accounting.pure import PureRelease
from jaxdp.accounting.schemes import (
    FixedSizeSampling,
    PoissonSampling,
    SamplingScheme,
    ShuffledEpochs,
    combined_with_counts,
)

MAX_DISTINCT_SIGMAS = 32
"""More distinct noise multipliers than this, of one scheme, are rounded down before composing."""

# The rounded noise multipliers are powers of 2^(1/32): at most 2.2% below the true ones.
_PER_OCTAVE = 32

# More noise than this is counted as this much: squares of larger numbers leave what floats can
# hold, and capping only overstates epsilon.
_LARGEST_SIGMA = 1e6


class Release(NamedTuple):
    """`steps` consecutive steps of one run that released the same thing; for shuffled epochs with
    the draws that say which epochs these were, if they are known."""

    noise_multiplier: float
    sampling: SamplingScheme
    steps: int
    epochs: Draws | None = None


class GaussianMechanism(NamedTuple):
    """`repeats` equal Gaussians; without a sampling scheme they are plain ones."""

    sampling: PoissonSampling | FixedSizeSampling | None
    noise_multiplier: float
    repeats: int


class PureMechanism(NamedTuple):
    """`repeats` equal pure releases."""

    release: PureRelease
    repeats: int


Mechanism = GaussianMechanism | PureMechanism
"""What is composed."""


def mechanisms_of(runs: Iterable[Sequence[Release | PureRelease]]) -> tuple[Mechanism, ...]:
    """Groups what all runs released into distinct mechanisms with counts.

    Sorted, pure ones first, except that the mechanism of the very last step comes last: a run that
    grows then keeps its composed past, and `compose` finds it in the cache.

    Args:
        runs: for every run its releases, in the order of execution.

    Returns:
        The mechanisms; empty if nothing was released.

    Example:
        >>> poisson = PoissonSampling(0.5)
        >>> mechanisms_of([[Release(1.0, poisson, 2)], [Release(1.0, poisson, 3)]])
        (GaussianMechanism(sampling=PoissonSampling(sampling_rate=0.5), noise_multiplier=1.0,
        repeats=5),)
    """
    counts: Counter[tuple[PoissonSampling | FixedSizeSampling | None, float]] = Counter()
    pure: Counter[PureRelease] = Counter()
    last = None
    for run in runs:
        pure.update(each for each in run if isinstance(each, PureRelease))
        steps = (each for each in run if isinstance(each, Release))
        # What another sampler drew in between ends an epoch: each piece is counted up.
        for scheme, releases in groupby(steps, key=lambda release: release.sampling):
            plain = None if isinstance(scheme, ShuffledEpochs) else scheme
            piece = [EpochSteps(sigma, steps, epochs) for sigma, _, steps, epochs in releases]
            last = plain, piece[-1].noise_multiplier
            if isinstance(scheme, ShuffledEpochs):
                counted = participations(piece, scheme.steps_per_epoch)
            else:
                counted = ((sigma, steps) for sigma, steps, _ in piece)
            for sigma, count in counted:
                counts[plain, sigma] += count
    keys = sorted(counts, key=lambda key: (key == last, key[0] == (last and last[0]), repr(key)))
    return (
        *(PureMechanism(release, pure[release]) for release in sorted(pure, key=repr)),
        *(GaussianMechanism(*key, counts[key]) for key in keys),
    )


def coarsened(mechanisms: tuple[Mechanism, ...]) -> tuple[Mechanism, ...]:
    """The mechanisms that are really composed: fewer, and never more private.

    Plain Gaussians compose exactly into one. Of every sampling scheme with more than
    `MAX_DISTINCT_SIGMAS` noise multipliers, each falls to the next power of 2^(1/32), by 2.2% at
    the most. Less noise is less private, so this can only overstate epsilon. Pure releases stay
    as they are.

    Args:
        mechanisms: distinct mechanisms, the one of the last step last.

    Returns:
        Distinct mechanisms, pure ones first, the one of the last step still last.

    Example:
        >>> coarsened((GaussianMechanism(None, 2.0, 2), GaussianMechanism(None, 2.0, 2)))
        (GaussianMechanism(sampling=None, noise_multiplier=1.0, repeats=1),)
    """
    by_scheme: dict[PoissonSampling | FixedSizeSampling | None, list[GaussianMechanism]] = {}
    pure = []
    for mechanism in mechanisms:
        if isinstance(mechanism, PureMechanism):
            pure.append(mechanism)
            continue
        # Reinserting keeps the scheme of the most recent mechanism at the end.
        capped = min(mechanism.noise_multiplier, _LARGEST_SIGMA)
        group = by_scheme.pop(mechanism.sampling, [])
        by_scheme[mechanism.sampling] = [*group, mechanism._replace(noise_multiplier=capped)]
    coarse = (
        coarse
        for sampling, group in by_scheme.items()
        for coarse in (_one_gaussian(group) if sampling is None else _rounded_down(group))
    )
    return (*pure, *coarse)


def _one_gaussian(group: list[GaussianMechanism]) -> list[GaussianMechanism]:
    sigma = combined_with_counts(tuple((each.noise_multiplier, each.repeats) for each in group))
    return [GaussianMechanism(None, sigma, 1)]


def _rounded_down(group: list[GaussianMechanism]) -> list[GaussianMechanism]:
    if len({each.noise_multiplier for each in group}) <= MAX_DISTINCT_SIGMAS:
        return group
    # A grid that never moves: what a step costs does not depend on the steps around it, so that a
    # growing ledger only grows dearer.
    bins: dict[float, GaussianMechanism] = {}
    for each in group:
        grid = 2 ** (math.floor(_PER_OCTAVE * math.log2(each.noise_multiplier)) / _PER_OCTAVE)
        sigma = min(grid, each.noise_multiplier)  # the logarithm may have rounded up
        known = bins.pop(sigma, GaussianMechanism(each.sampling, sigma, 0))
        bins[sigma] = known._replace(repeats=known.repeats + each.repeats)
    return list(bins.values())


def event_of(mechanism: GaussianMechanism, scale: float = 1.0) -> dp_accounting.DpEvent:
    """The DpEvent of equal Gaussians, counted.

    Args:
        mechanism: what was released, how often.
        scale: factor on the noise multiplier, see `noise_scale`.

    Returns:
        The event; wrapped in `SelfComposedDpEvent` if it happened more than once.

    Example:
        >>> event_of(GaussianMechanism(None, 1.5, 1))
        GaussianDpEvent(noise_multiplier=1.5)
    """
    event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier * scale)
    match mechanism.sampling:
        case PoissonSampling(rate):
            event = dp_accounting.PoissonSampledDpEvent(rate, event)
        case FixedSizeSampling(size, batch):
            event = dp_accounting.SampledWithoutReplacementDpEvent(size, batch, event)
    if mechanism.repeats == 1:
        return event
    return dp_accounting.SelfComposedDpEvent(event, mechanism.repeats)


def events_of(mechanisms: Sequence[Mechanism]) -> dp_accounting.DpEvent:
    """The DpEvent of several mechanisms together, in the convention of noise std / clip norm.

    Args:
        mechanisms: what was released.

    Returns:
        One event; `NoOpDpEvent` if there is none.

    Raises:
        ValueError: a pure release is among them.

    Example:
        >>> events_of(())
        NoOpDpEvent()
    """
    gaussians = [each for each in mechanisms if isinstance(each, GaussianMechanism)]
    if len(gaussians) < len(mechanisms):
        # Randomised response is refused under add-or-remove-one, would count ε where replacing
        # one costs 2ε, and once however often it is composed; Laplace noise is more private.
        raise ValueError(
            "dp_event must be asked of Gaussian steps alone, got a ledger with pure releases, for "
            "which dp-accounting has no event. Ask the ledger itself for epsilon or delta."
        )
    events = [event_of(mechanism) for mechanism in gaussians]
    match events:
        case []:
            return dp_accounting.NoOpDpEvent()
        case [event]:
            return event
        case _:
            return dp_accounting.ComposedDpEvent(events)
