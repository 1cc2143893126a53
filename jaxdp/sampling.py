"""Which examples join a step: draws as (indices, mask) of static shape, on the host, in NumPy.

A sampler is a value and a draw is a function of the step: the same seed and step give the same
draw, so resuming a run is `draw(step)`. A draw that is larger than the physical batch continues in
further physical batches; nothing is ever dropped.

Randomness: step t of a sampler reads the raw 64-bit words of
`PCG64(SeedSequence(seed, spawn_key=(kind, t)))`. NumPy promises these streams (NEP 19), unlike
those of `Generator`'s methods, which may change between versions; the arithmetic on the words is
ours.

Privacy notes:
    * The seed is as secret as the data. Amplification by sampling holds only while nobody knows
      who took part in which step; whoever knows the seed knows all of it.
    * A realised batch size is private under Poisson sampling. Divide by `expected_batch_size`.
    * PCG64 is a statistical generator, not a cryptographic one.

Example:
    >>> sampler = PoissonSampler(1000, expected_batch_size=32, seed=7)
    >>> sampler.physical_batch_size
    56
    >>> [batch] = sampler.draw(0)
    >>> batch.indices.shape, batch.mask.dtype, batch.is_last
    ((56,), dtype('bool'), True)
"""

import itertools
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxdp.accounting.checks import check_choice, check_integer, check_keys, check_real
from jaxdp.accounting.schemes import FixedSizeSampling, PoissonSampling, ShuffledEpochs

_SEED_BITS = 128
_CHUNK = 1 << 20
_MANTISSA_BITS = 53
_POISSON_STREAM, _FIXED_SIZE_STREAM, _SHUFFLED_STREAM = range(3)


class PhysicalBatch(NamedTuple):
    """One array-shaped piece of a logical batch.

    Attributes:
        indices: int64 [P], rows of the training set; 0 where the mask is False.
        mask: bool [P], True for the examples that take part.
        is_last: whether this piece completes its logical batch, and noise is due.

    Example:
        >>> PhysicalBatch(np.zeros(2, np.int64), np.zeros(2, bool), True).is_last
        True
    """

    indices: NDArray[np.int64]
    mask: NDArray[np.bool_]
    is_last: bool


@dataclass(frozen=True, init=False)
class PoissonSampler:
    """Every example joins every step independently with probability q.

    The logical batch size is Binomial(n, q) with mean `expected_batch_size`, zero included. The
    rate is realised as floor(2⁵³ q) / 2⁵³, never above q.

    Args:
        num_examples: n, at least 1.
        expected_batch_size: n · q in (0, n]; give this or `sampling_rate`.
        sampling_rate: q in (0, 1].
        physical_batch_size: rows of one physical batch. Default: mean + 4 standard deviations,
            rounded up to a multiple of 8, at most n rounded the same way.
        seed: integer in [0, 2¹²⁸), as secret as the data. Default: 128 bits from the system.

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

    num_examples: int
    sampling_rate: float
    physical_batch_size: int
    seed: int = field(repr=False)

    def __init__(
        self,
        num_examples: int,
        *,
        expected_batch_size: float | None = None,
        sampling_rate: float | None = None,
        physical_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        size = _check_num_examples(num_examples)
        if (expected_batch_size is None) == (sampling_rate is None):
            raise ValueError(
                "exactly one of expected_batch_size and sampling_rate must be given, got "
                f"expected_batch_size={expected_batch_size!r} and sampling_rate={sampling_rate!r}. "
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
        if rate * 2**_MANTISSA_BITS < 1:
            raise ValueError(
                f"sampling_rate must be at least 2**-{_MANTISSA_BITS}, got {rate!r}. "
                "Below that no example would ever be drawn; raise expected_batch_size."
            )
        expected = size * rate
        default = math.ceil(expected + 4 * math.sqrt(expected * (1 - rate)))
        default = min(_round_up(default, 8), _round_up(size, 8))
        object.__setattr__(self, "num_examples", size)
        object.__setattr__(self, "sampling_rate", rate)
        object.__setattr__(
            self, "physical_batch_size", _check_physical(physical_batch_size, default)
        )
        object.__setattr__(self, "seed", _check_seed(seed))

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

    def draw(self, step: int) -> tuple[PhysicalBatch, ...]:
        """The logical batch of one step.

        Args:
            step: number of the step, ≥ 0.

        Returns:
            At least one physical batch of [physical_batch_size] rows; indices ascend.

        Raises:
            TypeError: `step` is no integer.
            ValueError: `step` is negative.

        Example:
            >>> len(PoissonSampler(20, sampling_rate=1.0, physical_batch_size=8, seed=1).draw(0))
            3
        """
        words = _words(self.seed, _POISSON_STREAM, _check_step(step))
        threshold = math.floor(self.sampling_rate * 2**_MANTISSA_BITS)
        taken = [
            start
            + np.flatnonzero(
                words.random_raw(min(_CHUNK, self.num_examples - start)) >> (64 - _MANTISSA_BITS)
                < threshold
            )
            for start in range(0, self.num_examples, _CHUNK)
        ]
        return _packed(np.concatenate(taken), self.physical_batch_size)

    def batches(self, start: int = 0) -> Iterator[tuple[int, PhysicalBatch]]:
        """All physical batches from a step on, without end.

        Args:
            start: the first step, ≥ 0; a resumed run passes the step it stopped before.

        Returns:
            An iterator of (step, physical batch).

        Example:
            >>> next(PoissonSampler(20, sampling_rate=0.1, seed=1).batches(start=5))[0]
            5
        """
        return _endless(self, start)

    def to_dict(self) -> dict[str, object]:
        """The sampler as JSON-able data for `sampler_from_dict`; it contains the secret seed.

        Returns:
            A dict with a "kind".

        Example:
            >>> PoissonSampler(20, sampling_rate=0.1, seed=1).to_dict()["kind"]
            'poisson'
        """
        return {
            "kind": "poisson",
            "num_examples": self.num_examples,
            "sampling_rate": self.sampling_rate,
            "physical_batch_size": self.physical_batch_size,
            "seed": self.seed,
        }


@dataclass(frozen=True, init=False)
class FixedSizeSampler:
    """Every step takes a uniform subset of b examples, independent of the other steps.

    Each of the C(n, b) subsets is equally likely: every example gets a random 64-bit key and the b
    smallest keys win.

    Args:
        num_examples: n, at least 1.
        batch_size: b, between 1 and n.
        physical_batch_size: rows of one physical batch. Default: b.
        seed: integer in [0, 2¹²⁸), as secret as the data. Default: 128 bits from the system.

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

    num_examples: int
    batch_size: int
    physical_batch_size: int
    seed: int = field(repr=False)

    def __init__(
        self,
        num_examples: int,
        *,
        batch_size: int,
        physical_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        scheme = FixedSizeSampling(_check_num_examples(num_examples), batch_size)
        object.__setattr__(self, "num_examples", scheme.num_examples)
        object.__setattr__(self, "batch_size", scheme.batch_size)
        object.__setattr__(
            self, "physical_batch_size", _check_physical(physical_batch_size, scheme.batch_size)
        )
        object.__setattr__(self, "seed", _check_seed(seed))

    @property
    def expected_batch_size(self) -> float:
        """The constant to divide a noised sum by.

        Returns:
            b.

        Example:
            >>> FixedSizeSampler(100, batch_size=4, seed=1).expected_batch_size
            4.0
        """
        return float(self.batch_size)

    @property
    def largest_draw(self) -> int:
        """How many examples one draw can hold at the most: the batch."""
        return self.batch_size

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

    def draw(self, step: int) -> tuple[PhysicalBatch, ...]:
        """The logical batch of one step.

        Args:
            step: number of the step, ≥ 0.

        Returns:
            At least one physical batch of [physical_batch_size] rows; indices ascend.

        Raises:
            TypeError: `step` is no integer.
            ValueError: `step` is negative.

        Example:
            >>> sampler = FixedSizeSampler(100, batch_size=5, physical_batch_size=4, seed=1)
            >>> [int(batch.mask.sum()) for batch in sampler.draw(0)]
            [4, 1]
        """
        words = _words(self.seed, _FIXED_SIZE_STREAM, _check_step(step))
        keys = words.random_raw(self.num_examples)
        chosen = np.argpartition(keys, self.batch_size - 1)[: self.batch_size]
        return _packed(np.sort(chosen), self.physical_batch_size)

    def batches(self, start: int = 0) -> Iterator[tuple[int, PhysicalBatch]]:
        """All physical batches from a step on, without end.

        Args:
            start: the first step, ≥ 0; a resumed run passes the step it stopped before.

        Returns:
            An iterator of (step, physical batch).

        Example:
            >>> next(FixedSizeSampler(100, batch_size=4, seed=1).batches())[0]
            0
        """
        return _endless(self, start)

    def to_dict(self) -> dict[str, object]:
        """The sampler as JSON-able data for `sampler_from_dict`; it contains the secret seed.

        Returns:
            A dict with a "kind".

        Example:
            >>> FixedSizeSampler(100, batch_size=4, seed=1).to_dict()["kind"]
            'fixed_size'
        """
        return {
            "kind": "fixed_size",
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
            "physical_batch_size": self.physical_batch_size,
            "seed": self.seed,
        }


@dataclass(frozen=True, init=False)
class ShuffledSampler:
    """A fresh uniform permutation per epoch, cut into batches; every example once per epoch.

    An epoch has ceil(n / b) steps. Its last batch may hold fewer examples; the mask pads it, and
    the divisor stays b. The accountant claims no amplification for it (`ShuffledEpochs`).

    Args:
        num_examples: n, at least 1.
        batch_size: b, between 1 and n.
        physical_batch_size: rows of one physical batch. Default: b.
        seed: integer in [0, 2¹²⁸), as secret as the data. Default: 128 bits from the system.

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

    num_examples: int
    batch_size: int
    physical_batch_size: int
    seed: int = field(repr=False)

    def __init__(
        self,
        num_examples: int,
        *,
        batch_size: int,
        physical_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        sizes = FixedSizeSampling(_check_num_examples(num_examples), batch_size)
        object.__setattr__(self, "num_examples", sizes.num_examples)
        object.__setattr__(self, "batch_size", sizes.batch_size)
        object.__setattr__(
            self, "physical_batch_size", _check_physical(physical_batch_size, sizes.batch_size)
        )
        object.__setattr__(self, "seed", _check_seed(seed))

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
    def expected_batch_size(self) -> float:
        """The constant to divide a noised sum by.

        Returns:
            b, for the shorter last batch of an epoch too.

        Example:
            >>> ShuffledSampler(10, batch_size=4, seed=1).expected_batch_size
            4.0
        """
        return float(self.batch_size)

    @property
    def largest_draw(self) -> int:
        """How many examples one draw can hold at the most: the batch."""
        return self.batch_size

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

    def draw(self, step: int) -> tuple[PhysicalBatch, ...]:
        """The logical batch of one step.

        Args:
            step: number of the step, ≥ 0; step // steps_per_epoch is its epoch.

        Returns:
            At least one physical batch of [physical_batch_size] rows, in the permutation's order.

        Raises:
            TypeError: `step` is no integer.
            ValueError: `step` is negative.

        Example:
            >>> sampler = ShuffledSampler(4, batch_size=2, seed=1)
            >>> sorted(int(i) for t in (0, 1) for i in sampler.draw(t)[0].indices)
            [0, 1, 2, 3]
        """
        epoch, position = divmod(_check_step(step), self.steps_per_epoch)
        order = _permutation(self.seed, self.num_examples, epoch)
        first = position * self.batch_size
        return _packed(order[first : first + self.batch_size], self.physical_batch_size)

    def batches(self, start: int = 0) -> Iterator[tuple[int, PhysicalBatch]]:
        """All physical batches from a step on, without end.

        Args:
            start: the first step, ≥ 0; a resumed run passes the step it stopped before.

        Returns:
            An iterator of (step, physical batch).

        Example:
            >>> next(ShuffledSampler(10, batch_size=4, seed=1).batches(start=2))[0]
            2
        """
        return _endless(self, start)

    def to_dict(self) -> dict[str, object]:
        """The sampler as JSON-able data for `sampler_from_dict`; it contains the secret seed.

        Returns:
            A dict with a "kind".

        Example:
            >>> ShuffledSampler(10, batch_size=4, seed=1).to_dict()["kind"]
            'shuffled'
        """
        return {
            "kind": "shuffled",
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
            "physical_batch_size": self.physical_batch_size,
            "seed": self.seed,
        }


Sampler = PoissonSampler | FixedSizeSampler | ShuffledSampler
"""Any of the samplers; they share every method and property but their own parameters."""

_KINDS: dict[str, tuple[type[Sampler], frozenset[str]]] = {
    "poisson": (PoissonSampler, frozenset({"sampling_rate"})),
    "fixed_size": (FixedSizeSampler, frozenset({"batch_size"})),
    "shuffled": (ShuffledSampler, frozenset({"batch_size"})),
}


def sampler_from_dict(data: object) -> Sampler:
    """Rebuilds a sampler from what its `to_dict` returned.

    Args:
        data: a mapping with the key "kind" and the sampler's own fields, all of them.

    Returns:
        The equal sampler: it draws the same.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: the kind is unknown, a key is missing or unknown, or a field is out of range.

    Example:
        >>> sampler = PoissonSampler(20, sampling_rate=0.1, seed=1)
        >>> sampler_from_dict(sampler.to_dict()) == sampler
        True
    """
    kind = data.get("kind") if isinstance(data, dict) else data
    sampler, own = _KINDS[check_choice("sampler kind", kind, _KINDS)]
    shared = {"kind", "num_examples", "physical_batch_size", "seed"}
    fields = dict(check_keys("sampler", data, own | shared))
    # None would be filled from defaults and OS entropy, and the draws would silently be others.
    for key in ("physical_batch_size", "seed"):
        check_integer(key, fields[key], minimum=0, advice="Restore the saved sampler unaltered.")
    del fields["kind"]
    return sampler(**fields)  # pyright: ignore[reportArgumentType]  # each sampler checks its fields


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check_num_examples(value: object) -> int:
    return check_integer(
        "num_examples", value, minimum=1, advice="Pass the number of rows of the training set."
    )


def _check_physical(value: object, default: int) -> int:
    if value is None:
        return default
    advice = "Pass the number of rows that fit the device at once, or leave it out."
    return check_integer("physical_batch_size", value, minimum=1, advice=advice)


def _check_seed(value: object) -> int:
    if value is None:
        return secrets.randbits(_SEED_BITS)
    # The value is a secret: no message of ours may print it.
    advice = "Pass secrets.randbits(128), or leave it out."
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"seed must be an integer, got a {type(value).__name__}. {advice}")
    if not 0 <= value < 2**_SEED_BITS:
        raise ValueError(f"seed must be in [0, 2**{_SEED_BITS}), got one outside. {advice}")
    return int(value)


def _check_step(value: object) -> int:
    return check_integer("step", value, minimum=0, advice="Steps count from 0.")


def _words(seed: int, stream: int, number: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream, number)))


@lru_cache(maxsize=4)
def _permutation(seed: int, size: int, epoch: int) -> NDArray[np.int64]:
    keys = _words(seed, _SHUFFLED_STREAM, epoch).random_raw(size)
    order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False  # The cache hands the same array to every step of the epoch.
    return order


def _packed(indices: NDArray[np.intp], rows: int) -> tuple[PhysicalBatch, ...]:
    count = max(1, -(-len(indices) // rows))
    padded = np.zeros((count, rows), np.int64)
    padded.reshape(-1)[: len(indices)] = indices
    mask = (np.arange(count * rows) < len(indices)).reshape(count, rows)
    return tuple(PhysicalBatch(padded[i], mask[i], i == count - 1) for i in range(count))


def _endless(sampler: Sampler, start: int) -> Iterator[tuple[int, PhysicalBatch]]:
    # Checked here, not in the generator below, so that a wrong start fails at the call.
    steps = itertools.count(_check_step(start))
    return ((step, batch) for step in steps for batch in sampler.draw(step))
