"""Batches of a fixed size, without replacement."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxdp.accounting.schemes import FixedSizeSampling
from jaxdp.sampling.base import LARGEST_DATA
from jaxdp.sampling.registry import register
from jaxdp.sampling.sized import SizedSampler
from jaxdp.sampling.subsets import uniform_subset


@register
@dataclass(frozen=True, init=False)
class FixedSizeSampler(SizedSampler):
    """Every step takes a uniform subset of b examples, independent of the other steps.

    Each of the C(n, b) subsets is equally likely, exactly (`jaxdp.sampling.subsets`). A draw costs
    time and memory for the batch, whatever the size of the data.

    Args:
      num_examples: n, from 1 to 10¹².
      batch_size: b, between 1 and n.
      physical_batch_size: rows of one physical batch. Default: b, at most 10⁸.
      seed: integer in [0, 2¹²⁸), as secret as the data and the noise key: amplification is
        claimed against those who cannot guess it, so a small number is for tests alone.
        Default: 128 bits from the system.

    Attributes:
      num_examples: n.
      batch_size: b.
      physical_batch_size: rows of one physical batch.
      seed: the seed, left out of `repr`.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

    Source: Wang, Balle, Kasiviswanathan 2019, "Subsampled Rényi Differential Privacy and
    Analytical Moments Accountant".

    Example:
      >>> [batch] = FixedSizeSampler(100, batch_size=4, seed=1).draw(0)
      >>> len(set(batch.indices.tolist()))
      4
    """

    kind = "fixed_size"
    stream = 11
    most_examples = LARGEST_DATA

    @property
    def scheme(self) -> FixedSizeSampling:
        """What the accountant must know.

        Returns:
          The fixed-size scheme.

        Example:
          >>> FixedSizeSampler(100, batch_size=4, seed=1).scheme
          FixedSizeSampling(num_examples=100, batch_size=4)
        """
        return FixedSizeSampling(self.num_examples, self.batch_size)

    def members(self, step: int) -> NDArray[np.intp]:
        """Indices of the examples that take part, ascending."""
        return uniform_subset(self.words(step), self.num_examples, self.batch_size)
