"""Fewer mechanisms where there are many, never more private ones: so an answer takes seconds.

Example:
  >>> coarsened((Counted(SampledGaussian(None, 2.0), 3), Counted(SampledGaussian(None, 2.0), 1)))
  (Counted(mechanism=SampledGaussian(sampling=None, noise_multiplier=1.0), repeats=1),)
"""

import math

from jaxdp.accounting.mechanisms.base import Counted
from jaxdp.accounting.mechanisms.gaussian import SampledGaussian
from jaxdp.accounting.schemes import FixedSizeSampling, PoissonSampling, combined_with_counts

MAX_DISTINCT_SIGMAS = 32
"""More different sampled Gaussians than this have their noise rounded down before composing."""

MOST_MECHANISMS = 1024
"""More different mechanisms than this are not composed."""

# The rounded noise multipliers are powers of 2^(1/32): at most 2.2% below the true ones.
_PER_OCTAVE = 32

# The exponent, in these steps, of the largest of them that a float can hold.
_HIGHEST = 1024 * _PER_OCTAVE - 1

# More noise than this is counted as this much: squares of larger numbers leave what floats can
# hold, and capping only overstates epsilon.
_MOST_NOISE = 1e6

# Noise multipliers of one scheme, and how often each came.
_Group = list[tuple[float, int]]


def coarsened(mechanisms: tuple[Counted, ...], *, always: bool = False) -> tuple[Counted, ...]:
    """The mechanisms that are really composed: fewer, and never more private.

    Plain Gaussians, and those that every example joins, compose exactly into one. If there are more
    than `MAX_DISTINCT_SIGMAS` sampled ones, their noise multipliers fall to the next power of
    2^(1/32), by 2.2% at the most; if they have more than that many Poisson rates, these rise to the
    next power likewise. Less noise, and a larger rate, is less private, so this can only overstate
    epsilon. What is no Gaussian stays as it is.

    Args:
      mechanisms: distinct mechanisms, the one of the last step last.
      always: whether noise multipliers fall to the grid however few there are.

    Returns:
      Distinct mechanisms, those that are no Gaussian first, the one of the last step still last.

    Raises:
      ValueError: more than `MOST_MECHANISMS` are left.

    Example:
      >>> coarsened((Counted(SampledGaussian(PoissonSampling(1.0), 2.0), 4),))
      (Counted(mechanism=SampledGaussian(sampling=None, noise_multiplier=1.0), repeats=1),)
    """
    gaussians = [
        (mechanism, count)
        for mechanism, count in mechanisms
        if isinstance(mechanism, SampledGaussian)
    ]
    others = [each for each in mechanisms if not isinstance(each.mechanism, SampledGaussian)]
    rates = {each.sampling for each, _ in gaussians if isinstance(each.sampling, PoissonSampling)}
    by_scheme: dict[PoissonSampling | FixedSizeSampling | None, _Group] = {}
    for mechanism, count in gaussians:
        sampling = mechanism.sampling
        if isinstance(sampling, PoissonSampling):
            sampling = _joined(sampling, round_up=len(rates) > MAX_DISTINCT_SIGMAS)
        # Reinserting keeps the scheme of the most recent mechanism at the end.
        group = by_scheme.pop(sampling, [])
        group.append((min(mechanism.noise_multiplier, _MOST_NOISE), count))
        by_scheme[sampling] = group
    sampled = sum(len(group) for sampling, group in by_scheme.items() if sampling is not None)
    rounds = always or sampled > MAX_DISTINCT_SIGMAS
    coarse = [
        Counted(SampledGaussian(sampling, sigma), count)
        for sampling, group in by_scheme.items()
        for sigma, count in (_as_one(group) if sampling is None else _grouped(group, rounds))
    ]
    if len(others) + len(coarse) > MOST_MECHANISMS:
        raise ValueError(
            f"a ledger must hold at most {MOST_MECHANISMS} different mechanisms, got "
            f"{len(others) + len(coarse)} after rounding. Keep one ledger for each part of the "
            "releases and add their epsilons and their deltas."
        )
    return (*others, *coarse)


def rounded_down(sigma: float) -> float:
    """The largest power of 2^(1/32) that is at most σ, on a grid that never moves: what a step
    costs does not depend on the steps around it, so that a growing ledger only grows dearer.

    Args:
      sigma: noise multiplier > 0.

    Returns:
      More than σ · 2^(-1/32), up to rounding, and never more than σ. A power is its own answer.

    Example:
      >>> rounded_down(1.0), rounded_down(1.99) < 1.99
      (1.0, True)
      >>> rounded_down(rounded_down(1.99)) == rounded_down(1.99)
      True
    """
    # The logarithm may be rounded either way, so that the neighbours are looked at, too.
    about = min(math.floor(_PER_OCTAVE * math.log2(sigma)), _HIGHEST - 1)
    powers = (2 ** (exponent / _PER_OCTAVE) for exponent in range(about - 1, about + 2))
    return max(power for power in powers if power <= sigma)


def _joined(sampling: PoissonSampling, *, round_up: bool) -> PoissonSampling | None:
    """What is composed for a rate; None where every example joins every step."""
    rate = sampling.sampling_rate
    if round_up:
        rate = min(max(1 / rounded_down(1 / rate), rate), 1.0)
    return None if rate == 1 else PoissonSampling(rate)


def _as_one(group: _Group) -> _Group:
    return [(combined_with_counts(tuple(group)), 1)]


def _grouped(group: _Group, rounds: bool) -> _Group:
    """Equal ones together, the most recent last."""
    counts: dict[float, int] = {}
    for sigma, count in group:
        sigma = rounded_down(sigma) if rounds else sigma
        counts[sigma] = counts.pop(sigma, 0) + count
    return list(counts.items())
