r"""Masses of privacy losses on a grid, none of them below the truth, however many are composed.

The loss of several releases is the sum of theirs, whose masses are a product of Fourier transforms.
What rounding does to a transform is small beside its largest number, and not beside the masses that
decide about δ = 10⁻¹⁰: a composition of 10⁶ steps is off by more than that. So here

* masses are tilted first. With any numbers K_j, and n_j places of masses p_j for each j,

  .. math:: f = \ast_j\, p_j^{\ast n_j}, \quad \tilde p_j(k) = p_j(k)\, e^{λk - K_j}
      \quad ⟹ \quad f(n) = \tilde f(n)\, e^{\sum_j n_j K_j - λn} ;

  with λ where Chernoff's bound is 10⁻⁶ to 10⁻¹³, the masses of that tail are the largest of f̃;
* what the transforms may be off by is added to every mass, without a tilt and with some, and the
  least sum is taken: each is no less than the truth, and so the least one is.

**Rounding.** With u = 2⁻⁵³, a transform of length N = Π r by Cooley and Tukey computes every output
in a stage for each r from terms of |w| = 1 times inputs, each input once. A stage adds r ≤ 11
terms, each with a relative error of (r + 5)u at most, so that no output is off by more than τ‖x‖₁
with τ = 8 u log₂ 2N, which leaves room. With ẑ the computed transform of x̃, |ẑ - z| ≤ τ‖x̃‖₁ = t
and a = |ẑ| + t ≥ |z|,

.. math:: |\hat z^n - z^n| ≤ n t a^{n-1}, \quad |\mathrm{fl}(\hat z^n) - \hat z^n| ≤ 4nu\, a^n

(a complex product is off by √5 u; n - 1 of them make a power, in whatever order), and the inverse
adds τ times the mean of the |outputs|. Masses that wrap around only add.

**The window.** With S the sum of the places and K(λ) that of ln E[exp(λX)] of each, Markov's
inequality for exp(±λS) is Chernoff's bound for all λ > 0,

.. math:: P[S ≥ s] ≤ e^{K(λ) - λs}, \quad P[S ≤ s] ≤ e^{K(-λ) + λs}.

Places are looked at in buckets, of which the mass and the mean are known: e^{λk} is convex, and no
larger than its chord over a bucket. What may lie outside of the window counts as infinite.

Source of the window: supplementary material of `dp_accounting`, "Privacy Loss Distributions",
equation (5). Tilting: Grübel and Hermesmeier 1999, "Computation of Compound
Distributions I: Aliasing Errors and Exponential Tilting".

Example:
  >>> from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
  >>> step = Masses(-1, np.array([0.4, 0.0, 0.6]), 0.0, interval=math.log(1.5))
  >>> round(PrivacyLossDistribution(step).self_compose(10).get_epsilon_for_delta(1e-5), 3)
  4.053
"""

# pyright: reportMissingTypeStubs=false

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf, PLDPmf
from numpy.typing import NDArray
from scipy import fft

Floats = NDArray[np.float64]

_fft: Any = fft  # SciPy has no types

UNIT = 2.0**-53
"""The unit roundoff of float64."""

# What lies outside of what is composed counts as infinite, once for each time that it is.
TAIL = 1e-18

# How finely places are looked at, and the λ, in lengths of the longest that is composed.
_BUCKETS = 512
_TILTS = np.geomspace(0.005, 600.0, 32)
# -ln of Chernoff's bound where tilted masses are the largest; any numbers are right. Of two terms
# there is less to round.
_TILTED_AT = np.log([1e6, 1e13])
_TILTED_AT_FEW = np.log([1e9])


class _Buckets(NamedTuple):
    """Masses in stretches of places: [b] each.

    Attributes:
      edges: the first place of each, and behind the last one.
      masses: of each.
      beyond: the mean place of each, less its first one.
    """

    edges: Floats
    masses: Floats
    beyond: Floats

    @classmethod
    def of(cls, probs: Floats) -> "_Buckets":
        width = -(-len(probs) // _BUCKETS)
        starts = np.arange(0, len(probs), width)
        masses = np.add.reduceat(probs, starts)
        within = np.add.reduceat(probs * (np.arange(len(probs)) % width), starts)
        with np.errstate(invalid="ignore"):
            beyond = np.where(masses > 0, within / masses, 0.0)
        return cls(np.append(starts, len(probs)).astype(np.float64), masses, beyond)

    def log_moments(self, tilts: Floats) -> Floats:
        """No less than ln E[exp(λX)] for each λ, of either sign."""
        slopes = tilts[:, None] * self.edges
        most = np.maximum(slopes[:, :1], slopes[:, -1:])
        powers = np.exp(slopes - most)
        part = self.beyond / np.diff(self.edges)
        chords = powers[:, :-1] + part * np.diff(powers, axis=1)
        return np.log(np.sum(chords * self.masses, axis=1)) + most[:, 0]


class _Term(NamedTuple):
    """Masses of places 0, 1, ... and how many such places are added up."""

    masses: "Masses"
    times: int


class Masses(DensePLDPmf):
    """The masses of privacy losses, each no less than the truth.

    Args:
      lower: the least loss, in intervals.
      probs: the masses of the losses (lower + k) · interval, [n], n ≥ 1, not all of them 0.
      infinite: the mass of an infinite loss.
      interval: the step of the grid, > 0.

    Example:
      >>> Masses(0, np.array([0.5, 0.5]), 0.0, interval=1.0).self_compose(10_000).size
      929
    """

    def __init__(self, lower: int, probs: Floats, infinite: float, *, interval: float) -> None:
        super().__init__(interval, lower, probs, infinite, True)
        self.lower, self.probs, self.infinite, self.interval = lower, probs, infinite, interval

    @classmethod
    def connecting(cls, lower: int, deltas: Floats, *, interval: float) -> "Masses":
        """The masses on a grid whose δ(ε) is the given one there, and above the truth in between.

        Args:
          lower: the least loss, in intervals: below it δ(ε) = 1 - e^ε, or less.
          deltas: δ at the losses (lower + k) · interval, [n], none below the truth.
          interval: the step of the grid, > 0.

        Returns:
          The masses; that of an infinite loss is the last δ.

        Source: Doroshenko et al. 2022, "Connect the Dots: Tighter Discrete Approximations of
        Privacy Loss Distributions", Algorithm 1.

        Example:
          >>> fair = Masses.connecting(-1, np.array([0.5, 0.2, 0.0]), interval=math.log(2))
          >>> round(float(fair.get_delta_for_epsilon(0.0)), 6)
          0.2
        """
        deltas = np.minimum.accumulate(np.clip(deltas, 0, 1))
        if len(deltas) == 1:
            probs = 1 - deltas
        else:
            drops, growth = np.diff(deltas), math.expm1(interval)
            grown = drops[:-1] * math.exp(interval)
            first = 1 - deltas[0] + drops[0] / growth
            # Two drops nearly cancel; a mass that is too large is no less private.
            inner = (drops[1:] - grown - 8 * UNIT * (drops[1:] + grown)) / growth
            probs = np.concatenate([[first], inner, [drops[-1] / math.expm1(-interval)]])
        probs = np.maximum(probs, 0) * (1 + 8 * UNIT)
        return cls(lower, probs, float(deltas[-1]), interval=interval)

    @cached_property
    def buckets(self) -> _Buckets:
        """The same in short."""
        return _Buckets.of(self.probs)

    def self_compose(self, num_times: int, tail_mass_truncation: float = TAIL) -> "Masses":
        """Several such releases together.

        Args:
          num_times: how many, ≥ 1.
          tail_mass_truncation: the mass that may lie outside of the masses, counted as infinite.

        Returns:
          The masses.

        Raises:
          ValueError: num_times is below 1.

        Example:
          >>> Masses(0, np.array([0.5, 0.5]), 0.0, interval=1.0).self_compose(3).size
          4
        """
        if num_times < 1:
            raise ValueError(f"num_times must be at least 1, got {num_times}. Ask for a release.")
        return _together([_Term(self, num_times)], tail_mass_truncation)

    def compose(self, other: PLDPmf, tail_mass_truncation: float = 0) -> "Masses":
        """This release and another one together.

        Args:
          other: on the same grid; its masses are taken as they are.
          tail_mass_truncation: the mass that may lie outside of the masses, counted as infinite.

        Returns:
          The masses.

        Example:
          >>> fair = Masses(0, np.array([0.5, 0.5]), 0.0, interval=1.0)
          >>> fair.compose(fair.self_compose(2)).size
          4
        """
        self.validate_composable(other)
        return _together([_Term(self, 1), _Term(_masses_of(other), 1)], tail_mass_truncation)

    def get_epsilon_for_delta(self, delta: float) -> float:
        """The least ε ≥ 0 with δ(ε) ≤ δ.

        Between two losses δ(ε) = U - e^ε V, with U all the mass above and V what it weighs without
        the example; both are taken relative to the upper loss, so that none is out of range.

        Args:
          delta: δ in (0, 1).

        Returns:
          ε; infinity where an infinite loss has more mass than δ.

        Example:
          >>> response = Masses(-1, np.array([0.4, 0.0, 0.6]), 0.0, interval=math.log(1.5))
          >>> round(response.get_epsilon_for_delta(0.1), 4)
          0.2231
        """
        target = delta * (1 - 2.0**-33)  # what sums of masses may be off by
        if self.infinite > target:
            return math.inf
        size = len(self.probs)
        masses = self.infinite + np.cumsum(self.probs[::-1])[::-1]
        weights = _powers(-self.interval, 0.0, size)

        def weight(index: int) -> float:
            # By BLAS it would wake up threads.
            return float(np.sum(self.probs[index:] * weights[: size - index]))

        # The first loss at which δ is small enough; at the last one it is.
        found = bisect_left(range(size - 1), True, key=lambda k: masses[k] - weight(k) <= target)
        if masses[found] <= target:
            return 0.0
        at = (self.lower + found) * self.interval
        return max(0.0, at + math.log((masses[found] - target) / weight(found)))

    def to_dense_pmf(self) -> "Masses":
        """What dp-accounting composes: these masses.

        Returns:
          The masses.

        Example:
          >>> Masses(0, np.array([1.0]), 0.0, interval=1.0).to_dense_pmf().size
          1
        """
        return self


def _masses_of(pmf: PLDPmf) -> Masses:
    """Those of dp-accounting as ours, which it does not show."""
    dense: Any = pmf.to_dense_pmf()
    if isinstance(dense, Masses):
        return dense
    lower, probs, infinite = dense._lower_loss, dense._probs, dense._infinity_mass
    return Masses(lower, np.asarray(probs), float(infinite), interval=dense._discretization)


def _together(terms: Sequence[_Term], tail: float) -> Masses:
    """All of these releases, but for a tail."""
    lower = sum(times * masses.lower for masses, times in terms)
    finite = sum(times * math.log1p(-masses.infinite) for masses, times in terms)
    infinite, interval = tail - math.expm1(finite), terms[0].masses.interval
    longest = max(len(masses.probs) for masses, _ in terms)
    if sum(times * (len(masses.probs) - 1) for masses, times in terms) == longest - 1:
        # No more than one has more than one place: masses are moved.
        probs = np.ones(1)
        for masses, times in terms:
            probs = probs * masses.probs**times
        return Masses(lower, probs * (1 + 8 * UNIT), -math.expm1(finite), interval=interval)
    tilts = _TILTS / longest
    above, below = (
        sum(times * masses.buckets.log_moments(signed) for masses, times in terms)
        for signed in (tilts, -tilts)
    )
    first, last = 0, sum(times * (len(masses.probs) - 1) for masses, times in terms)
    if tail > 0:
        # What a logarithm may be off by, for each of the terms.
        room = math.log(2 / tail) + 256 * UNIT * sum(times for _, times in terms)
        first = max(first, math.floor(np.max(-(below + room) / tilts)))
        last = max(first, min(last, math.ceil(np.min((above + room) / tilts))))
    # λ K'(λ) - K(λ) grows with λ, and is -ln of Chernoff's bound at the mean K'(λ).
    rates = np.maximum.accumulate(tilts * np.gradient(above, tilts) - above)
    tilted_at = _TILTED_AT if sum(times for _, times in terms) > 2 else _TILTED_AT_FEW
    probs = _sums(terms, first, last, 0.0)
    for tilt in np.interp(tilted_at, rates, tilts).tolist():
        probs = np.minimum(probs, _sums(terms, first, last, tilt))
    return Masses(lower + first, probs, infinite, interval=interval)


def _sums(terms: Sequence[_Term], first: int, last: int, tilt: float) -> Floats:
    """No less than the masses of the sums of so many places each, from the first to the last,
    computed where masses are tilted by e^{λk}."""
    size = last - first + 1
    # The transform wraps around: it must be as long as the window.
    length: int = _fft.next_fast_len(
        max(size, *(len(masses.probs) for masses, _ in terms)), real=True
    )
    off_by = 8 * UNIT * math.log2(2 * length)
    together, largest, spoilt, relative, exponent = None, 1.0, 0.0, 0.0, 0.0
    for masses, times in terms:
        probs, steepest = masses.probs, tilt * (len(masses.probs) - 1)
        tilted = probs * _powers(tilt, -steepest, len(probs)) if tilt else probs
        # So that the sum is about one; no matter how near.
        scale = float(np.sum(tilted))
        z = _fft.rfft(tilted / scale, length)
        log_sum = steepest + math.log(scale)
        # What a tilted mass may be off by, in each of the terms.
        exponent += times * (log_sum + UNIT * (64 + 8 * steepest + 4 * abs(log_sum)))
        spoilt_by = off_by * 1.01
        bound = np.sqrt(np.square(z.real) + np.square(z.imag)) + spoilt_by
        before = bound ** (times - 1) if times > 1 else 1.0
        # Beside n t a^(n-1) stand the bounds of the other terms.
        spoilt = (spoilt * bound + times * spoilt_by * largest) * before
        largest = largest * bound * before
        relative += 4 * times * UNIT
        power = _power(z, times)
        together = power if together is None else together * power
    # Of a real transform one half is computed, and stands for both.
    of_all = 2.02 / length * float(np.sum(spoilt + (relative + off_by) * largest))
    sums = np.maximum(np.roll(_fft.irfft(together, length), -first)[:size] + of_all, 0)
    exponent += 16 * UNIT * (abs(exponent) + tilt * last + 8)
    if not tilt:
        return sums * math.exp(exponent)
    return sums * _powers(-tilt, exponent - tilt * first, size)


def _powers(slope: float, start: float, count: int) -> Floats:
    """exp(start + slope · k) for k = 0, 1, ...; some number beyond e⁶⁹⁰ for what is beyond e⁷⁰⁰."""
    width = math.isqrt(count) + 1
    if abs(slope) * width > 1:
        return np.exp(np.minimum(start + slope * np.arange(count), 700))
    # As products of two exponentials.
    rows = np.exp(np.minimum(start + slope * width * np.arange(-(-count // width)), 700))
    return np.multiply.outer(rows, np.exp(slope * np.arange(width))).ravel()[:count]


def _power(z: NDArray[np.complex128], count: int) -> NDArray[np.complex128]:
    """z to the power of an integer ≥ 1 by products: what a product is off by is known."""
    power, square = None, z
    while True:
        if count & 1:
            power = square if power is None else power * square
        count >>= 1
        if not count:
            assert power is not None
            return power
        square = square * square
