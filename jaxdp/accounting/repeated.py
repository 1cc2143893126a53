r"""One release that is repeated: composed as dp-accounting does it, but its moments are kept.

Of the sum of n equal losses dp-accounting keeps a window, which follows from forty moments of one
loss. It looks for them anew whenever n changes, two thirds of the time of a budget under a schedule
of σ; here they are computed once for a release. All else is left to dp-accounting.

Source: supplementary material of `dp_accounting`, "Privacy Loss Distributions", equation (5).

Example:
  >>> from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
  >>> step = StepPmf(-1, np.array([0.4, 0.0, 0.6]), 0.0, interval=math.log(1.5))
  >>> round(PrivacyLossDistribution(step).self_compose(10).get_epsilon_for_delta(1e-5), 3)
  4.053
"""

# pyright: reportMissingTypeStubs=false

import math
from functools import cached_property
from typing import Any

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf
from numpy.typing import NDArray
from scipy import fft

Floats = NDArray[np.float64]

_fft: Any = fft  # SciPy has no types

# The λ of Chernoff's bound, relative to the length of the grid; dp-accounting's.
_ORDERS = np.arange(1, 21)


class StepPmf(DensePLDPmf):
    """The masses of the privacy losses of one release.

    Args:
      lower: the least loss, in intervals.
      probs: the masses of the losses (lower + k) · interval, [n], n ≥ 1, not all of them 0.
      infinite: the mass of an infinite loss.
      interval: the step of the grid, > 0.

    Example:
      >>> StepPmf(0, np.array([0.5, 0.5]), 0.0, interval=1.0).self_compose(10_000).size
      1381
    """

    def __init__(self, lower: int, probs: Floats, infinite: float, *, interval: float) -> None:
        super().__init__(interval, lower, probs, infinite, True)
        self.lower, self.probs, self.infinite, self.interval = lower, probs, infinite, interval

    @cached_property
    def moments(self) -> tuple[Floats, Floats]:
        """ln E[exp(λX)] of the place X on the grid, for λ in `_ORDERS` / n and for -λ: |λX| ≤ 20
        stays within the floats, and one more order is one more factor."""
        places = np.arange(len(self.probs)) / len(self.probs)
        found: list[Floats] = []
        for factor in (np.exp(places), np.exp(-places)):
            tilted, sums = self.probs, np.empty(len(_ORDERS))
            for index in range(len(_ORDERS)):
                tilted = tilted * factor
                sums[index] = np.sum(tilted)
            found.append(np.log(sums))
        return found[0], found[1]

    def window(self, count: int, tail: float) -> tuple[int, int]:
        r"""Where all of the sum of several places is, but for a tail.

        With S the sum of n places and K(λ) = ln E[exp(λX)] of one, E[exp(λS)] = exp(nK(λ)), and
        Markov's inequality for exp(±λS) is Chernoff's bound for all λ > 0,

        .. math:: P[S ≥ s] ≤ e^{nK(λ) - λs}, \quad P[S ≤ s] ≤ e^{nK(-λ) + λs},

        of which each is half a tail at the ends of the window.

        Args:
          count: how many, ≥ 1.
          tail: the mass that may lie outside, > 0.

        Returns:
          The first and the last place.

        Example:
          >>> StepPmf(0, np.array([0.5, 0.5]), 0.0, interval=1.0).window(10_000, 1e-15)
          (4310, 5690)
        """
        above, below = (count * moments + math.log(2 / tail) for moments in self.moments)
        orders, last = _ORDERS / len(self.probs), (len(self.probs) - 1) * count
        start = max(0, math.floor(np.max(-below / orders)))
        return start, min(last, math.ceil(np.min(above / orders)))

    def self_compose(self, num_times: int, tail_mass_truncation: float = 1e-15) -> DensePLDPmf:
        """Several such releases together; dp-accounting's masses, up to rounding.

        Args:
          num_times: how many, ≥ 1.
          tail_mass_truncation: the mass that may lie outside the window, counted as infinite.

        Returns:
          The masses within `window`.

        Example:
          >>> StepPmf(0, np.array([0.5, 0.5]), 0.0, interval=1.0).self_compose(3).size
          4
        """
        if num_times < 1 or tail_mass_truncation == 0:
            return super().self_compose(num_times, tail_mass_truncation)
        start, end = self.window(num_times, tail_mass_truncation)
        size = end - start + 1
        # The transform wraps around: it must be as long as the window.
        length: int = _fft.next_fast_len(max(size, len(self.probs)))
        together: Floats = np.real(_fft.ifft(_fft.fft(self.probs, length) ** num_times))
        infinite = tail_mass_truncation - math.expm1(num_times * math.log1p(-self.infinite))
        kept = np.roll(together, -start)[:size]
        return DensePLDPmf(self.interval, self.lower * num_times + start, kept, infinite, True)

    def to_dense_pmf(self) -> DensePLDPmf:
        """The same masses without their moments, since dp-accounting composes equal kinds only.

        Returns:
          The masses.

        Example:
          >>> StepPmf(0, np.array([1.0]), 0.0, interval=1.0).to_dense_pmf().size
          1
        """
        return DensePLDPmf(self.interval, self.lower, self.probs, self.infinite, True)
