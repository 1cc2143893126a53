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
"""More different sampled Gaussians than this have their noise rounded down before composing."""

MOST_MECHANISMS = 1024
"""More different mechanisms than this are not composed."""

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

    Pure ones first, then by first occurrence, except that the mechanism of the very last step comes
    last, and its scheme: a run that grows then keeps its composed past, which is found again.

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
    keys = sorted(counts, key=lambda key: (key == last, key[0] == (last and last[0])))
    return (
        *(PureMechanism(release, pure[release]) for release in sorted(pure, key=repr)),
        *(GaussianMechanism(*key, counts[key]) for key in keys),
    )


def coarsened(
    mechanisms: tuple[Mechanism, ...], *, always: bool = False
) -> tuple[Mechanism, ...]:
    """The mechanisms that are really composed: fewer, and never more private.

    Plain Gaussians, and those that every example joins, compose exactly into one. If there are more
    than `MAX_DISTINCT_SIGMAS` sampled ones, their noise multipliers fall to the next power of
    2^(1/32), by 2.2% at the most; if they have more than that many Poisson rates, these rise to the
    next power likewise. Less noise, and a larger rate, is less private, so this can only overstate
    epsilon. Pure releases stay as they are.

    Args:
        mechanisms: distinct mechanisms, the one of the last step last.
        always: whether noise multipliers fall to the grid however few there are.

    Returns:
        Distinct mechanisms, pure ones first, the one of the last step still last.

    Raises:
        ValueError: more than `MOST_MECHANISMS` are left.

    Example:
        >>> coarsened((GaussianMechanism(None, 2.0, 2), GaussianMechanism(None, 2.0, 2)))
        (GaussianMechanism(sampling=None, noise_multiplier=1.0, repeats=1),)
    """
    gaussians = [each for each in mechanisms if isinstance(each, GaussianMechanism)]
    rates = {each.sampling for each in gaussians if isinstance(each.sampling, PoissonSampling)}
    by_scheme: dict[PoissonSampling | FixedSizeSampling | None, list[GaussianMechanism]] = {}
    for sampling, sigma, repeats in gaussians:
        if isinstance(sampling, PoissonSampling):
            sampling = _joined(sampling, round_up=len(rates) > MAX_DISTINCT_SIGMAS)
        # Reinserting keeps the scheme of the most recent mechanism at the end.
        group = by_scheme.pop(sampling, [])
        capped = GaussianMechanism(sampling, min(sigma, _LARGEST_SIGMA), repeats)
        by_scheme[sampling] = [*group, capped]
    sampled = sum(len(group) for sampling, group in by_scheme.items() if sampling is not None)
    rounds = always or sampled > MAX_DISTINCT_SIGMAS
    coarse = [
        coarse
        for sampling, group in by_scheme.items()
        for coarse in (_one_gaussian(group) if sampling is None else _grouped(group, rounds))
    ]
    pure = [each for each in mechanisms if isinstance(each, PureMechanism)]
    if len(pure) + len(coarse) > MOST_MECHANISMS:
        raise ValueError(
            f"a ledger must hold at most {MOST_MECHANISMS} different mechanisms, got "
            f"{len(pure) + len(coarse)} after rounding. Keep one ledger for each part of the "
            "releases and add their epsilons and their deltas."
        )
    return (*pure, *coarse)


def rounded_down(sigma: float) -> float:
    """The largest power of 2^(1/32) that is at most σ, on a grid that never moves: what a step
    costs does not depend on the steps around it, so that a growing ledger only grows dearer.

    Args:
        sigma: noise multiplier > 0.

    Returns:
        More than σ · 2^(-1/32), up to rounding, and never more than σ.

    Example:
        >>> rounded_down(1.0), rounded_down(1.99) < 1.99
        (1.0, True)
    """
    # The logarithm may have rounded up.
    return min(2 ** (math.floor(_PER_OCTAVE * math.log2(sigma)) / _PER_OCTAVE), sigma)


def _joined(sampling: PoissonSampling, *, round_up: bool) -> PoissonSampling | None:
    """What is composed for a rate; None where every example joins every step."""
    rate = sampling.sampling_rate
    if round_up:
        rate = min(max(1 / rounded_down(1 / rate), rate), 1.0)
    return None if rate == 1 else PoissonSampling(rate)


def _one_gaussian(group: list[GaussianMechanism]) -> list[GaussianMechanism]:
    sigma = combined_with_counts(tuple((each.noise_multiplier, each.repeats) for each in group))
    return [GaussianMechanism(None, sigma, 1)]


def _grouped(group: list[GaussianMechanism], rounds: bool) -> list[GaussianMechanism]:
    """Of one scheme: equal ones together, the most recent last."""
    counts: dict[float, int] = {}
    for _, sigma, repeats in group:
        sigma = rounded_down(sigma) if rounds else sigma
        counts[sigma] = counts.pop(sigma, 0) + repeats
    return [GaussianMechanism(group[0].sampling, *each) for each in counts.items()]


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
