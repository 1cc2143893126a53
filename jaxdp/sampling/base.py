"""What all samplers share: physical batches, and draws that are functions of (seed, step)."""

import hashlib
import itertools
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxdp.accounting.draws import BATCHES, Draws
from jaxdp.accounting.schemes import SamplingScheme
from jaxdp.checks import LARGEST_COUNT, check_integer

_SEED_BITS = 128

# What a draw can hold in memory: its members, its physical batches, and their rows.
_LARGEST_EXPECTED = 1_000_000_000
_MOST_PHYSICAL = 100_000
LARGEST_PHYSICAL = 100_000_000
"""The most rows of a physical batch."""
LARGEST_DATA = 1_000_000_000_000
"""The most examples that a sampler draws from whose draws cost what they hold."""
_PARTS = "Pass the number of places that the data is kept in."


class PhysicalBatch(NamedTuple):
    """One array-shaped piece of a logical batch.

    Attributes:
      indices: int64 [P], rows of the training set; 0 where the mask is False.
      mask: bool [P], True for the examples that take part.
      is_last: whether this piece completes its logical batch, and noise is due.

    Example:
      >>> import numpy as np
      >>> PhysicalBatch(np.zeros(2, np.int64), np.zeros(2, bool), True).is_last
      True
    """

    indices: NDArray[np.int64]
    mask: NDArray[np.bool_]
    is_last: bool


@dataclass(frozen=True, init=False)
class Sampler(ABC):
    """A value that says, for every step, which examples take part.

    A new sampler is one file: a frozen dataclass under `jaxdp.sampling.register`. It provides

    * `kind` and `stream`, names of its own;
    * `members(step)`, a function of its fields and of `words` alone, so that draws can be repeated;
    * `expected_batch_size` and `largest_draw`, constants that do not depend on the data;
    * `scheme`, whose claim `members` must fulfil: the guarantee rests on it;
    * `draws`, where its scheme needs to know more of a batch than which seed and step it is of;
    * a constructor that takes each field by name, checks them, and ends in that of `Sampler`.

    All else is made from these: batches of static shape, parts, checkpoints, and what the ledger is
    charged with. Nothing else in jaxdp asks which sampler it has.

    Attributes:
      num_examples: n.
      physical_batch_size: rows of one physical batch.
      seed: as secret as the data and the noise key; left out of `repr`.

    Example:
      >>> from jaxdp.sampling import FixedSizeSampler
      >>> sampler = FixedSizeSampler(10, batch_size=2, seed=1)
      >>> isinstance(sampler, Sampler), len(sampler.members(step=0))
      (True, 2)
    """

    kind: ClassVar[str]
    """Names the sampler in `to_dict`."""

    stream: ClassVar[int]
    """Keeps the randomness of one kind apart from that of another with the same seed.

    It belongs to one way of drawing: where `members` comes to draw other batches, it changes, and
    what was saved before is refused. 0 and 1 were those of Poisson and fixed-size draws by a word
    for each example.
    """

    num_examples: int
    physical_batch_size: int
    seed: int = field(repr=False)

    def __init__(self, num_examples: int, physical_batch_size: int, seed: int | None) -> None:
        object.__setattr__(self, "num_examples", num_examples)
        object.__setattr__(self, "physical_batch_size", _check_physical(physical_batch_size))
        object.__setattr__(self, "seed", _check_seed(seed))
        if self.expected_batch_size > _LARGEST_EXPECTED:
            raise ValueError(
                f"expected_batch_size must be at most {_LARGEST_EXPECTED}, got "
                f"{self.expected_batch_size:g}. Sample at a lower rate."
            )
        if self.expected_batch_size > _MOST_PHYSICAL * self.physical_batch_size:
            raise ValueError(
                f"physical_batch_size must hold a {_MOST_PHYSICAL}th of the expected batch of "
                f"{self.expected_batch_size:g} examples, got {self.physical_batch_size}. Raise it, "
                "or leave it out."
            )

    @property
    @abstractmethod
    def expected_batch_size(self) -> float:
        """The constant to divide a noised sum by."""

    @property
    @abstractmethod
    def largest_draw(self) -> int:
        """How many examples one draw can hold at the most."""

    @property
    @abstractmethod
    def scheme(self) -> SamplingScheme:
        """What the accountant must know."""

    @abstractmethod
    def members(self, step: int) -> NDArray[np.intp]:
        """Indices of the examples that take part in a step ≥ 0.

        Args:
          step: number of the step.

        Returns:
          Indices, int64, in 0..num_examples-1.
        """

    def draw(self, step: int, parts: int = 1) -> tuple[PhysicalBatch, ...]:
        """The logical batch of one step.

        Where the training data is kept in several places, each place must be able to load its own
        rows: with `parts`, the rows of a physical batch come in as many blocks of equal size, and
        block p holds examples of part p only. The examples that take part are the same.

        Args:
          step: number of the step, ≥ 0.
          parts: number of parts of the data (see `part`), which divides the physical batch.

        Returns:
          At least one physical batch of [physical_batch_size] rows; only the last says
          `is_last`. A block whose part has no more examples is masked, so that all parts go
          through the same number of physical batches.

        Raises:
          TypeError: `step` or `parts` is no integer.
          ValueError: `step` is negative; there are more parts than examples, or they do not
            divide the physical batch.

        Example:
          >>> from jaxdp.sampling import FixedSizeSampler
          >>> sampler = FixedSizeSampler(100, batch_size=5, physical_batch_size=4, seed=1)
          >>> [int(batch.mask.sum()) for batch in sampler.draw(0)]
          [4, 1]
          >>> sampler.draw(0, parts=2)[0].indices.reshape(2, 2) // 50
          array([[0, 0],
                 [1, 1]])
        """
        members = self.members(_check_step(step))
        parts = _check_parts(parts)
        ranges = [self.part(index, parts) for index in range(parts)]
        if self.physical_batch_size % parts:
            raise ValueError(
                f"parts must divide physical_batch_size={self.physical_batch_size}, got {parts}. "
                f"Choose a physical batch that is a multiple of {parts}."
            )
        return _packed(members, ranges, self.physical_batch_size // parts)

    @property
    def fingerprint(self) -> str:
        """Names the seed without telling it: SHA-256, 64 hex digits.

        It names the seed alone: samplers of another rate or size that share it draw batches that
        depend on each other. It cannot be turned back, but a guess can be checked: a small seed is
        found by trying them all, one of 128 bits from the system is not.

        Example:
          >>> from jaxdp.sampling import FixedSizeSampler
          >>> one, other = (FixedSizeSampler(9, batch_size=b, seed=1) for b in (2, 3))
          >>> one.fingerprint == other.fingerprint, len(one.fingerprint)
          (True, 64)
        """
        return hashlib.sha256(f"jaxdp sampler seed\n{self.seed}".encode()).hexdigest()

    def draws(self, step: int, count: int = 1) -> tuple[Draws, ...]:
        """What a ledger must know of the random numbers behind a step's batch.

        Two steps with the same batch are not independent, so a ledger that was charged with these
        refuses them a second time. They are of the seed: samplers of another rate, size or kind
        with the same seed draw batches that are alike, and count as the same.

        Args:
          step: number of the first step, ≥ 0.
          count: how many steps, ≥ 1.

        Returns:
          The draws of these steps, for `Ledger.charge(..., draws=...)`.

        Raises:
          TypeError: an argument is no integer.
          ValueError: an argument is out of range.

        Example:
          >>> from jaxdp.sampling import FixedSizeSampler
          >>> [drawn] = FixedSizeSampler(100, batch_size=5, seed=1).draws(7)
          >>> drawn.purpose, drawn.first, drawn.count
          ('batches', 7, 1)
        """
        return (Draws(BATCHES, self.fingerprint, _check_step(step), count),)

    def part(self, index: int, parts: int) -> range:
        """The examples of one part of the data: contiguous, and of the same number up to one.

        Args:
          index: which part, in 0..parts-1.
          parts: how many there are, at most `num_examples`.

        Returns:
          Their indices.

        Raises:
          TypeError: an argument is no integer.
          ValueError: an argument is out of range.

        Example:
          >>> from jaxdp.sampling import FixedSizeSampler
          >>> FixedSizeSampler(10, batch_size=5, seed=1).part(1, 3)
          range(3, 6)
        """
        parts = _check_parts(parts)
        advice = "Parts count from 0."
        index = check_integer("index", index, minimum=0, maximum=LARGEST_COUNT, advice=advice)
        size = self.num_examples
        if not index < parts <= size:
            raise ValueError(
                f"index must be below parts, and parts at most num_examples={size}, got "
                f"index={index} and parts={parts}. {_PARTS}"
            )
        return range(index * size // parts, (index + 1) * size // parts)

    def batches(self, start: int = 0) -> Iterator[tuple[int, PhysicalBatch]]:
        """All physical batches from a step on, without end.

        Args:
          start: the first step, ≥ 0; a resumed run passes the step it stopped before.

        Returns:
          An iterator of (step, physical batch).

        Raises:
          TypeError: start is no integer.
          ValueError: start is out of range.

        Example:
          >>> from jaxdp.sampling import PoissonSampler
          >>> next(PoissonSampler(20, sampling_rate=0.1, seed=1).batches(start=5))[0]
          5
        """
        # Checked here, not in the generator below, so that a wrong start fails at the call.
        steps = itertools.count(_check_step(start, "start"))
        return ((step, batch) for step in steps for batch in self.draw(step))

    def to_dict(self) -> dict[str, object]:
        """The sampler as JSON-able data for `sampler_from_dict`; it contains the secret seed.

        Returns:
          A dict with the "kind", the "stream" and the fields.

        Example:
          >>> from jaxdp.sampling import PoissonSampler
          >>> PoissonSampler(20, sampling_rate=0.1, seed=1).to_dict()["kind"]
          'poisson'
        """
        return {"kind": self.kind, "stream": self.stream, **asdict(self)}

    def words(self, number: int) -> np.random.PCG64:
        """The stream of raw 64-bit words of a step or an epoch.

        Args:
          number: of the step or the epoch.

        Returns:
          A bit generator, the same for the same seed, kind and number.

        Example:
          >>> from jaxdp.sampling import FixedSizeSampler
          >>> first, again = (FixedSizeSampler(9, batch_size=2, seed=1).words(0) for _ in range(2))
          >>> first.random_raw() == again.random_raw()
          True
        """
        sequence = np.random.SeedSequence(self.seed, spawn_key=(self.stream, number))
        return np.random.PCG64(sequence)


def check_num_examples(value: object, *, maximum: int) -> int:
    """The number of examples, an integer from 1 to what a sampler can draw from."""
    advice = (
        "Pass the number of rows of the training set; let one row stand for several where there "
        "are more."
    )
    return check_integer("num_examples", value, minimum=1, maximum=maximum, advice=advice)


def _check_physical(value: object) -> int:
    advice = "Pass the number of rows that fit the device at once, or leave it out."
    return check_integer(
        "physical_batch_size", value, minimum=1, maximum=LARGEST_PHYSICAL, advice=advice
    )


def _check_seed(value: object) -> int:
    if value is None:
        return secrets.randbits(_SEED_BITS)
    # The value is a secret: no message of ours may print it.
    advice = "Pass secrets.randbits(128), or leave it out."
    try:
        seed = check_integer("seed", value, advice=advice)
    except TypeError:
        name = type(value).__name__
        raise TypeError(f"seed must be an integer, got a {name}. {advice}") from None
    if not 0 <= seed < 2**_SEED_BITS:
        raise ValueError(f"seed must be in [0, 2**{_SEED_BITS}), got one outside. {advice}")
    return seed


def _check_parts(value: object) -> int:
    return check_integer("parts", value, minimum=1, maximum=LARGEST_COUNT, advice=_PARTS)


def _check_step(value: object, name: str = "step") -> int:
    advice = "Steps count from 0."
    return check_integer(name, value, minimum=0, maximum=LARGEST_COUNT, advice=advice)


def _packed(
    members: NDArray[np.intp], parts: Sequence[range], rows: int
) -> tuple[PhysicalBatch, ...]:
    """Physical batches with `rows` rows for each part."""
    taken = [members[(members >= part.start) & (members < part.stop)] for part in parts]
    count = max(1, *(-(-len(indices) // rows) for indices in taken))
    blocks = np.empty((count, len(parts), rows), np.int64)
    mask = np.empty(blocks.shape, bool)
    for place, (part, indices) in enumerate(zip(parts, taken, strict=True)):
        # A masked row is loaded, too: from the same part.
        filled = np.full(count * rows, part.start, np.int64)
        filled[: len(indices)] = indices
        blocks[:, place] = filled.reshape(count, rows)
        mask[:, place] = (np.arange(count * rows) < len(indices)).reshape(count, rows)
    return tuple(
        PhysicalBatch(blocks[i].reshape(-1), mask[i].reshape(-1), i == count - 1)
        for i in range(count)
    )
