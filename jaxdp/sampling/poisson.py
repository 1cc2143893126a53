"""Poisson sampling."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxdp.accounting.schemes import PoissonSampling
from jaxdp.checks import check_real, shown
from jaxdp.sampling.base import LARGEST_DATA, LARGEST_PHYSICAL, Sampler, check_num_examples
from jaxdp.sampling.binomial import RATE_BITS, binomial
from jaxdp.sampling.registry import register
from jaxdp.sampling.subsets import uniform_subset


@register
@dataclass(frozen=True, init=False)
class PoissonSampler(Sampler):
    """Every example joins every step independently with probability q.

    The logical batch size is Binomial(n, q) with mean `expected_batch_size`, zero included. The
    rate is realised as floor(2⁵³ q) / 2⁵³, never above q.

    A draw takes the number of its members first, and then a uniform subset of so many: that is what
    independent choices with one probability come to, given how many were chosen. Both are exact
    (`jaxdp.sampling.binomial`, `jaxdp.sampling.subsets`). A draw costs time and memory for the
    batch, whatever the size of the data. The first one also makes a table of the law, whose length
    grows with the square root of the batch.

    Args:
      num_examples: n, from 1 to 10¹².
      expected_batch_size: n · q in (0, n]; give this or `sampling_rate`.
      sampling_rate: q in (0, 1].
      physical_batch_size: rows of one physical batch. Default: mean + 4 standard deviations,
        rounded up to a multiple of 8, at most n rounded the same way.
      seed: integer in [0, 2¹²⁸), as secret as the data and the noise key: amplification is
        claimed against those who cannot guess it, so a small number is for tests alone.
        Default: 128 bits from the system.

    Attributes:
      num_examples: n.
      sampling_rate: q.
      physical_batch_size: rows of one physical batch.
      seed: the seed, left out of `repr`.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range, or not exactly one of the two rates is given.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Section 3.1.

    Example:
      >>> sampler = PoissonSampler(60_000, expected_batch_size=256, seed=1)
      >>> sampler.expected_batch_size, sampler.physical_batch_size
      (256.0, 320)
      >>> all((a.indices == b.indices).all() for a, b in zip(sampler.draw(9), sampler.draw(9)))
      True
    """

    sampling_rate: float
    kind = "poisson"
    stream = 10

    def __init__(
        self,
        num_examples: int,
        *,
        expected_batch_size: float | None = None,
        sampling_rate: float | None = None,
        physical_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        size = check_num_examples(num_examples, maximum=LARGEST_DATA)
        if (expected_batch_size is None) == (sampling_rate is None):
            raise ValueError(
                "exactly one of expected_batch_size and sampling_rate must be given, got "
                f"expected_batch_size={shown(expected_batch_size)} and "
                f"sampling_rate={shown(sampling_rate)}. "
                "Their relation is sampling_rate = expected_batch_size / num_examples."
            )
        if sampling_rate is None:
            expected = check_real(
                "expected_batch_size",
                expected_batch_size,
                above=0,
                maximum=size,
                advice="It is the mean of the batch size, at most num_examples.",
            )
            sampling_rate = expected / size
        rate = PoissonSampling(sampling_rate).sampling_rate
        if rate * 2**RATE_BITS < 1:
            raise ValueError(
                f"sampling_rate must be at least 2**-{RATE_BITS}, got {rate!r}. "
                "Below that no example would ever be drawn; raise expected_batch_size."
            )
        expected = size * rate
        default = math.ceil(expected + 4 * math.sqrt(expected * (1 - rate)))
        default = min(_round_up(default, 8), _round_up(size, 8), LARGEST_PHYSICAL)
        object.__setattr__(self, "sampling_rate", rate)
        super().__init__(
            size, default if physical_batch_size is None else physical_batch_size, seed
        )

    @property
    def expected_batch_size(self) -> float:
        """The constant to divide a noised sum by.

        Returns:
          n · q, a whole number where rounding alone kept it from being one.

        Example:
          >>> PoissonSampler(60_000, expected_batch_size=256, seed=1).expected_batch_size
          256.0
        """
        expected = self.num_examples * self.sampling_rate
        nearest = float(round(expected))
        return nearest if math.isclose(expected, nearest, rel_tol=1e-12) else expected

    @property
    def largest_draw(self) -> int:
        """How many examples one draw can hold at the most: every example at once."""
        return self.num_examples

    @property
    def scheme(self) -> PoissonSampling:
        """What the accountant must know.

        Returns:
          The Poisson scheme with this sampler's rate.

        Example:
          >>> PoissonSampler(10, sampling_rate=0.5, seed=1).scheme
          PoissonSampling(sampling_rate=0.5)
        """
        return PoissonSampling(self.sampling_rate)

    def members(self, step: int) -> NDArray[np.intp]:
        """Indices of the examples that take part, ascending."""
        words = self.words(step)
        rate = math.floor(self.sampling_rate * 2**RATE_BITS)
        count = binomial(words, self.num_examples, rate)
        return uniform_subset(words, self.num_examples, count)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
