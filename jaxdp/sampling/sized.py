"""What samplers with a given batch size share."""

from dataclasses import dataclass
from typing import ClassVar

from jaxdp.accounting.schemes import FixedSizeSampling
from jaxdp.sampling.base import LARGEST_PHYSICAL, Sampler, check_num_examples


@dataclass(frozen=True, init=False)
class SizedSampler(Sampler):
    """A sampler whose draws hold at most `batch_size` examples.

    Attributes:
      batch_size: b, between 1 and n.
    """

    most_examples: ClassVar[int]
    """The most examples that it draws from."""

    batch_size: int

    def __init__(
        self,
        num_examples: int,
        *,
        batch_size: int,
        physical_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        sizes = FixedSizeSampling(
            check_num_examples(num_examples, maximum=self.most_examples), batch_size
        )
        object.__setattr__(self, "batch_size", sizes.batch_size)
        default = min(sizes.batch_size, LARGEST_PHYSICAL)
        super().__init__(
            sizes.num_examples,
            default if physical_batch_size is None else physical_batch_size,
            seed,
        )

    @property
    def expected_batch_size(self) -> float:
        """The constant to divide a noised sum by: b, for a shorter last batch of an epoch too.

        Example:
          >>> from jaxdp.sampling import FixedSizeSampler
          >>> FixedSizeSampler(100, batch_size=4, seed=1).expected_batch_size
          4.0
        """
        return float(self.batch_size)

    @property
    def largest_draw(self) -> int:
        """How many examples one draw can hold at the most: b."""
        return self.batch_size
