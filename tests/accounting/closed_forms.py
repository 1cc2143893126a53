"""ε by closed forms and numeric integration: nothing here asks dp-accounting or jaxdp."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from tests.accounting.small import DELTA, REPLACE


def root(excess: Callable[[float], float], upper: float) -> float:
    """Where a decreasing function crosses zero in [0, upper]."""
    found: Any = brentq(excess, 0.0, upper)
    return float(found)


def gaussian_epsilon(mean: float, delta: float = DELTA) -> float:
    """ε of N(0, 1) against N(mean, 1): Φ(μ/2 - ε/μ) - exp(ε) Φ(-μ/2 - ε/μ) = δ."""

    def excess(eps: float) -> float:
        tail = math.exp(eps + stats.norm.logcdf(-mean / 2 - eps / mean))
        return float(stats.norm.cdf(mean / 2 - eps / mean)) - tail - delta

    return root(excess, mean**2 / 2 + 10 * mean)


def mixture_delta(
    eps: float, sigma: float, left: dict[float, float], right: dict[float, float]
) -> float:
    """Hockey-stick divergence ∫ max(p - exp(ε) r, 0) of two Gaussian mixtures {mean: weight}."""
    x, width = np.linspace(-15 * sigma - 1, 15 * sigma + 1, 400_001, retstep=True)
    p, r = (
        sum(weight * stats.norm.pdf(x, mean, sigma) for mean, weight in side.items())
        for side in (left, right)
    )
    return float(np.maximum(p - math.exp(eps) * r, 0.0).sum() * width)


def epsilon_of_pair(
    sigma: float, left: dict[float, float], right: dict[float, float], delta: float
) -> float:
    """The ε ≥ 0 at which the hockey-stick divergence of one ordered pair is δ."""

    def excess(eps: float) -> float:
        return mixture_delta(eps, sigma, left, right) - delta

    return root(excess, 60.0) if excess(0.0) > 0 else 0.0


def sampled_epsilon(sigma: float, rate: float, relation: str, delta: float = DELTA) -> float:
    """ε of one Poisson step: the worst of all orders of the dominating pairs."""
    with_example, moved = {0.0: 1 - rate, 1.0: rate}, {0.0: 1 - rate, -1.0: rate}
    pairs = (
        [(with_example, moved)]
        if relation == REPLACE
        else [(with_example, {0.0: 1.0}), ({0.0: 1.0}, with_example)]
    )
    return max(epsilon_of_pair(sigma, left, right, delta) for left, right in pairs)


def pure_delta(eps: float, releases: list[float], mean: float = 0.0) -> float:
    """δ of randomised responses at the given ε beside N(0, 1) against N(mean, 1).

    Each response adds ±ε_i to the privacy loss, with chances e^±ε_i/2 / (2 cosh ε_i/2).
    """
    losses, chances = np.zeros(1), np.ones(1)
    for each in releases:
        likely = 1 / (1 + math.exp(-each))
        losses = np.concatenate([losses + each, losses - each])
        chances = np.concatenate([chances * likely, chances * (1 - likely)])
    left = eps - losses
    if mean == 0:
        hockey_stick = np.maximum(-np.expm1(left), 0)
    else:
        tail = np.exp(left + stats.norm.logcdf(-mean / 2 - left / mean))
        hockey_stick = stats.norm.cdf(mean / 2 - left / mean) - tail
    return float(np.sum(chances * hockey_stick))


def pure_epsilon(releases: list[float], mean: float = 0.0, delta: float = DELTA) -> float:
    upper = sum(releases) + mean**2 / 2 + 10 * mean
    return root(lambda eps: pure_delta(eps, releases, mean) - delta, upper)


def brute_force_participations(sigmas: list[float], epoch: int) -> list[float]:
    """The smallest noise of every epoch, one step at a time."""
    return [min(sigmas[start : start + epoch]) for start in range(0, len(sigmas), epoch)]
