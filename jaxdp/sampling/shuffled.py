"""Shuffled epochs."""

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from jaxdp.accounting.draws import EPOCHS, Draws
from jaxdp.accounting.schemes import ShuffledEpochs
from jaxdp.sampling.registry import register
from jaxdp.sampling.sized import SizedSampler


@register
@dataclass(frozen=True, init=False)
class ShuffledSampler(SizedSampler):
    """A fresh uniform permutation per epoch, cut into batches; every example once per epoch.

    An epoch has ceil(n / b) steps. Its last batch may hold fewer examples; the mask pads it, and
    the divisor stays b. The accountant claims no amplification for it (`ShuffledEpochs`).

    Args:
      num_examples: n, from 1 to 10⁸.
      batch_size: b, between 1 and n.
      physical_batch_size: rows of one physical batch. Default: b.
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

    Source: Chua et al. 2024, "How Private are DP-SGD Implementations?".

    Example:
      >>> sampler = ShuffledSampler(10, batch_size=4, seed=1)
      >>> sampler.steps_per_epoch, [int(sampler.draw(t)[0].mask.sum()) for t in range(3)]
      (3, [4, 4, 2])
    """

    kind = "shuffled"
    stream = 2
    most_examples = 100_000_000

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every example once.

        Returns:
          ceil(n / b).

        Example:
          >>> ShuffledSampler(10, batch_size=4, seed=1).steps_per_epoch
          3
        """
        return -(-self.num_examples // self.batch_size)

    @property
    def scheme(self) -> ShuffledEpochs:
        """What the accountant must know.

        Returns:
          The scheme without amplification.

        Example:
          >>> ShuffledSampler(10, batch_size=4, seed=1).scheme
          ShuffledEpochs(steps_per_epoch=3)
        """
        return ShuffledEpochs(self.steps_per_epoch)

    def draws(self, step: int, count: int = 1) -> tuple[Draws, ...]:
        """What a ledger must know of the batch of a step, its place in the epoch included.

        Args:
          step: number of the first step, ≥ 0.
          count: how many steps, ≥ 1.

        Returns:
          The draws of these steps, and of which permutations they are pieces: batches of one
          epoch are disjoint only where one sampler, with one size of batches, cut them.

        Raises:
          TypeError: an argument is no integer.
          ValueError: an argument is out of range.

        Example:
          >>> sampler = ShuffledSampler(10, batch_size=4, seed=1)
          >>> [drawn.purpose for drawn in sampler.draws(7)]
          ['batches', 'epochs']
        """
        [batches] = super().draws(step, count)
        cut = f"{self.fingerprint} {self.num_examples} {self.batch_size}"
        epochs = hashlib.sha256(cut.encode()).hexdigest()
        return batches, replace(batches, purpose=EPOCHS, fingerprint=epochs)

    def members(self, step: int) -> NDArray[np.intp]:
        """Indices of the examples that take part, in the order of the epoch's permutation."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _permutation(self, epoch)
        first = position * self.batch_size
        return order[first : first + self.batch_size]


@lru_cache(maxsize=4)
def _permutation(sampler: ShuffledSampler, epoch: int) -> NDArray[np.intp]:
    keys = sampler.words(epoch).random_raw(sampler.num_examples)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False  # The cache hands the same array to every step of the epoch.
    return order
