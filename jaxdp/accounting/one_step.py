r"""The privacy loss distribution of one Gaussian step, computed for all grid points at once.

dp-accounting says which stretch of losses to cover and composes the result; only the divergences
at the grid points are ours, since it takes them one by one (a third of a second for each σ of a
schedule). With P the output's distribution with the example and Q the one without, or moved,

.. math:: δ(ε) = \sup_E P[E] - e^ε Q[E] = P[L > ε] - e^ε Q[L > ε], \quad L = \ln(dP/dQ),

and L is monotone in the one coordinate x that matters, so that L > ε is a half-line. The masses at
the grid points follow from δ by connecting its dots from above.

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

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray
from scipy.special import log_ndtr

from jaxdp.accounting.repeated import StepPmf

Floats = NDArray[np.float64]


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
      What `dp_accounting.pld.from_gaussian_mechanism` returns, up to rounding.

    Example:
      >>> step = pld_of_gaussian(2.0, sampling_rate=1.0, replace_one=True, interval=1e-3)
      >>> round(float(step.get_delta_for_epsilon(1.0)), 4)
      0.1269
    """

    def pmf(kind: AdjacencyType, deltas: Callable[[Floats, float, float], Floats]) -> StepPmf:
        loss = GaussianPrivacyLoss(sigma, sampling_prob=sampling_rate, adjacency_type=kind)
        ends = loss.connect_dots_bounds()
        assert ends.epsilon_lower is not None and ends.epsilon_upper is not None
        lower = math.floor(ends.epsilon_lower / interval)
        grid = np.arange(lower, math.ceil(ends.epsilon_upper / interval) + 1) * interval
        return _connected(lower, deltas(grid.astype(np.float64), sigma, sampling_rate), interval)

    if replace_one:
        return PrivacyLossDistribution(pmf(AdjacencyType.REPLACE, _replaced))
    removed = pmf(AdjacencyType.REMOVE, _removed)
    if sampling_rate == 1:
        return PrivacyLossDistribution(removed)  # adding is its mirror image
    return PrivacyLossDistribution(removed, pmf(AdjacencyType.ADD, _added))


def _connected(lower: int, deltas: Floats, interval: float) -> StepPmf:
    """The masses on the grid whose δ is `deltas` there, and above the truth in between."""
    deltas = np.minimum.accumulate(np.clip(deltas, 0, 1))
    if len(deltas) == 1:
        probs = 1 - deltas
    else:
        drops, growth = np.diff(deltas), math.expm1(interval)
        first = 1 - deltas[0] + drops[0] / growth
        inner = (drops[1:] - drops[:-1] * math.exp(interval)) / growth
        probs = np.concatenate([[first], inner, [drops[-1] / math.expm1(-interval)]])
    return StepPmf(lower, np.maximum(probs, 0), float(deltas[-1]), interval=interval)


def _log_mixture(x: Floats, sigma: float, rate: float, mean: float) -> Floats:
    """ln P[X > x] of X from (1 - q) N(0, σ²) + q N(mean, σ²)."""
    moved = math.log(rate) + log_ndtr((mean - x) / sigma)
    if rate == 1:
        return moved
    return np.logaddexp(math.log1p(-rate) + log_ndtr(-x / sigma), moved)


def _log_excess(epsilon: Floats, rate: float) -> Floats:
    """ln((e^ε - 1 + q) / q): how much likelier the example makes x where the loss is ε.

    -∞ where no x has so small a loss. For ε > 0 both terms are positive: nothing cancels.
    """
    shrunk = np.exp(-np.abs(epsilon))
    with np.errstate(divide="ignore"):
        above = epsilon + np.log(-np.expm1(-np.abs(epsilon)) + rate * shrunk)
        below = np.log(np.maximum(np.expm1(np.minimum(epsilon, 0)) + rate, 0))
    return np.where(epsilon > 0, above, below) - math.log(rate)


def _removed(epsilon: Floats, sigma: float, rate: float) -> Floats:
    """(1 - q) N(0, σ²) + q N(1, σ²) against N(0, σ²): the loss grows with x."""
    x = sigma**2 * _log_excess(epsilon, rate) + 0.5
    return np.exp(_log_mixture(x, sigma, rate, 1.0)) - np.exp(epsilon + log_ndtr(-x / sigma))


def _added(epsilon: Floats, sigma: float, rate: float) -> Floats:
    """N(0, σ²) against (1 - q) N(0, σ²) + q N(1, σ²): the loss is above ε below an x."""
    x = sigma**2 * _log_excess(-epsilon, rate) + 0.5
    # P[X < x] of the mixture is P[-X > -x], of which the other mean is -1.
    other = epsilon + _log_mixture(-x, sigma, rate, -1.0)
    return np.exp(log_ndtr(x / sigma)) - np.exp(other)


def _replaced(epsilon: Floats, sigma: float, rate: float) -> Floats:
    """(1 - q) N(0, σ²) + q N(1, σ²) against (1 - q) N(0, σ²) + q N(-1, σ²).

    With y = e^(x/σ²), c = 1 - q and a = q e^(-1/2σ²) the loss is ln (c + ay) / (c + a/y); it is ε
    at x = σ² (ε/2 + arsinh((c/a) sinh(ε/2))).
    """
    half = np.abs(epsilon) / 2
    if rate == 1:
        x = sigma**2 * epsilon / 2
    else:
        with np.errstate(divide="ignore"):
            log_sinh = half + np.log(-np.expm1(-2 * half) / 2)
        u = math.log1p(-rate) - math.log(rate) + 0.5 / sigma**2 + log_sinh
        arsinh = np.logaddexp(np.logaddexp(0, 2 * u) / 2, u)  # of e^u
        x = sigma**2 * np.sign(epsilon) * (half + np.where(np.isneginf(u), 0, arsinh))
    with_it = np.exp(_log_mixture(x, sigma, rate, 1.0))
    return with_it - np.exp(epsilon + _log_mixture(x, sigma, rate, -1.0))
