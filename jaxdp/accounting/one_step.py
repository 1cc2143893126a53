r"""The privacy loss distribution of one Gaussian step, computed for all grid points at once.

dp-accounting says which stretch of losses to cover and composes the result; only the divergences
at the grid points are ours, since it takes them one by one (a third of a second for each σ of a
schedule). With P the output's distribution with the example and Q the one without, or moved,

.. math:: δ(ε) = \sup_E P[E] - e^ε Q[E] = P[L > ε] - e^ε Q[L > ε], \quad L = \ln(dP/dQ),

and L is monotone in the one coordinate x that matters, so that L > ε is a half-line. The masses at
the grid points follow from δ by connecting its dots from above. What rounding may take from a δ or
from a mass is added to it. An x that is off takes no more than the square of that: at the true one
P[X > x] - e^ε Q[X > x] is largest.

Source: Doroshenko et al. 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy Loss
Distributions", Algorithm 1.

Example:
  >>> step = pld_of_gaussian(1.0, sampling_rate=0.1, replace_one=False, interval=1e-3)
  >>> round(step.get_epsilon_for_delta(1e-5), 3)
  1.685
"""

# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from scipy.special import log_ndtr

from jaxdp.accounting.masses import UNIT, Floats, Masses


def pld_of_gaussian(
    sigma: float, *, sampling_rate: float, replace_one: bool, interval: float
) -> PrivacyLossDistribution:
    """The privacy loss distribution of one Poisson-sampled Gaussian of sensitivity 1.

    Args:
      sigma: noise standard deviation > 0.
      sampling_rate: q in (0, 1].
      replace_one: whether the example is moved from +1 to -1, instead of added or removed.
      interval: the step of the grid of losses, > 0.

    Returns:
      What `dp_accounting.pld.from_gaussian_mechanism` returns, up to rounding, which is upwards.

    Example:
      >>> step = pld_of_gaussian(2.0, sampling_rate=1.0, replace_one=True, interval=1e-3)
      >>> round(float(step.get_delta_for_epsilon(1.0)), 4)
      0.1269
    """

    def pmf(kind: AdjacencyType, deltas: Callable[[Floats, float, float], Floats]) -> Masses:
        loss = GaussianPrivacyLoss(sigma, sampling_prob=sampling_rate, adjacency_type=kind)
        ends = loss.connect_dots_bounds()
        assert ends.epsilon_lower is not None and ends.epsilon_upper is not None
        lower = math.floor(ends.epsilon_lower / interval)
        grid = np.arange(lower, math.ceil(ends.epsilon_upper / interval) + 1) * interval
        at_grid = deltas(grid.astype(np.float64), sigma, sampling_rate)
        return Masses.connecting(lower, at_grid, interval=interval)

    if replace_one:
        return PrivacyLossDistribution(pmf(AdjacencyType.REPLACE, _replaced))
    removed = pmf(AdjacencyType.REMOVE, _removed)
    if sampling_rate == 1:
        return PrivacyLossDistribution(removed)  # adding is its mirror image
    return PrivacyLossDistribution(removed, pmf(AdjacencyType.ADD, _added))


class _Product(NamedTuple):
    """A product of numbers that are known by their logarithms, and what it may be off by: a few
    units of each logarithm. A little more is no less private."""

    value: Floats
    off: Floats

    @classmethod
    def of(cls, *logs: Floats | float) -> "_Product":
        value = np.exp(sum(logs))
        magnitude = sum(np.minimum(np.abs(log), 1e3) for log in logs)
        return cls(value, 16 * UNIT * (4 + magnitude) * value)


def _log_excess(epsilon: Floats, rate: float) -> tuple[Floats, Floats]:
    """ln(e^ε - 1 + q), q times how much likelier the example makes x where the loss is ε; and what
    e^ε - 1 + q may be off by.

    -∞ where no x has so small a loss. For ε > 0 both terms are positive: nothing cancels. For
    others the smaller of two pairs of terms is subtracted.
    """
    shrunk, lost = np.exp(-np.abs(epsilon)), np.minimum(epsilon, 0)
    if rate < 0.5:
        below, terms = np.expm1(lost) + rate, rate
    else:
        below, terms = np.exp(lost) - (1 - rate), np.exp(lost)
    with np.errstate(divide="ignore"):
        above = epsilon + np.log(-np.expm1(-np.abs(epsilon)) + rate * shrunk)
        log = np.where(epsilon > 0, above, np.log(np.maximum(below, 0)))
    return log, np.where(epsilon > 0, 0, 16 * UNIT * terms)


def _removed(epsilon: Floats, sigma: float, rate: float) -> Floats:
    """(1 - q) N(0, σ²) + q N(1, σ²) against N(0, σ²): the loss grows with x, and

    δ = q P[N(1, σ²) > x] - (e^ε - 1 + q) P[N(0, σ²) > x],

    in which terms of the size of q alone are left. Where no x has so small a loss, x = -∞.
    """
    log_excess, excess_off = _log_excess(epsilon, rate)
    x = sigma**2 * (log_excess - math.log(rate)) + 0.5
    other = log_ndtr(-x / sigma)
    more = _Product.of(math.log(rate), log_ndtr((1 - x) / sigma))
    less = _Product.of(log_excess, other)
    off = more.off + less.off + excess_off * np.exp(other)
    nowhere = -np.expm1(np.minimum(epsilon, 0)) * (1 + 4 * UNIT)
    return np.where(np.isneginf(x), nowhere, more.value - less.value) + off


def _added(epsilon: Floats, sigma: float, rate: float) -> Floats:
    """N(0, σ²) against (1 - q) N(0, σ²) + q N(1, σ²): the loss is above ε below an x, and

    δ = e^ε ((e^-ε - 1 + q) P[N(0, σ²) < x] - q P[N(1, σ²) < x]).
    """
    log_excess, excess_off = _log_excess(-epsilon, rate)
    x = sigma**2 * (log_excess - math.log(rate)) + 0.5
    other = log_ndtr(x / sigma)
    more = _Product.of(epsilon, log_excess, other)
    less = _Product.of(epsilon, math.log(rate), log_ndtr((x - 1) / sigma))
    off = more.off + less.off + excess_off * np.exp(epsilon + other)
    return more.value - less.value + off


def _replaced(epsilon: Floats, sigma: float, rate: float) -> Floats:
    """(1 - q) N(0, σ²) + q N(1, σ²) against (1 - q) N(0, σ²) + q N(-1, σ²).

    With y = e^(x/σ²), c = 1 - q and a = q e^(-1/2σ²) the loss is ln (c + ay) / (c + a/y); it is ε
    at x = σ² (ε/2 + arsinh((c/a) sinh(ε/2))), and

    δ = q P[N(1, σ²) > x] - e^ε q P[N(-1, σ²) > x] - (e^ε - 1) (1 - q) P[N(0, σ²) > x].
    """
    half = np.abs(epsilon) / 2
    log_rate, log_rest = math.log(rate), math.log1p(-rate) if rate < 1 else -math.inf
    with np.errstate(divide="ignore"):
        log_growth = np.maximum(epsilon, 0) + np.log(-np.expm1(-np.abs(epsilon)))
        log_sinh = half + np.log(-np.expm1(-2 * half) / 2)
    if rate == 1:
        x = sigma**2 * epsilon / 2
    else:
        u = log_rest - log_rate + 0.5 / sigma**2 + log_sinh
        arsinh = np.logaddexp(np.logaddexp(0, 2 * u) / 2, u)  # of e^u
        x = sigma**2 * np.sign(epsilon) * (half + np.where(np.isneginf(u), 0, arsinh))
    more = _Product.of(log_rate, log_ndtr((1 - x) / sigma))
    less = _Product.of(log_rate, epsilon, log_ndtr((-1 - x) / sigma))
    rest = _Product.of(log_rest, log_growth, log_ndtr(-x / sigma))
    off = more.off + less.off + rest.off
    return more.value - less.value - np.sign(epsilon) * rest.value + off
