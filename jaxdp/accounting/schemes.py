"""Who takes part in a step, and the noise multiplier of several releases from one batch.

A scheme says how the batches were really drawn. It is data: frozen, hashable, JSON-able.

Example:
  >>> PoissonSampling(256 / 60_000).to_dict()
  {'kind': 'poisson', 'sampling_rate': 0.004266666666666667}
  >>> scheme_from_dict({"kind": "shuffled_epochs", "steps_per_epoch": 235})
  ShuffledEpochs(steps_per_epoch=235)
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from jaxdp.accounting.strict_json import check_keys
from jaxdp.checks import (
    LARGEST_COUNT,
    check_choice,
    check_integer,
    check_real,
    check_reals,
    shown,
)

NoiseMultiplier = float | Iterable[float]
"""One noise multiplier, or one for each Gaussian that a step releases from the same batch."""


@dataclass(frozen=True, slots=True)
class PoissonSampling:
    """Every example joins every step independently with the same probability.

    The released sum over the batch S, with P[i ∈ S] = q independently for each i, is amplified:
    one step compares N(0, σ²) with (1 - q) N(0, σ²) + q N(1, σ²).

    Args:
      sampling_rate: q, in (0, 1].

    Raises:
      TypeError: the rate is not a number.
      ValueError: the rate is outside (0, 1].

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Section 3.1.

    Example:
      >>> PoissonSampling(0.01)
      PoissonSampling(sampling_rate=0.01)
    """

    sampling_rate: float

    def __post_init__(self) -> None:
        rate = check_real(
            "sampling_rate",
            self.sampling_rate,
            above=0,
            maximum=1,
            advice="Pass expected batch size / number of examples.",
        )
        object.__setattr__(self, "sampling_rate", rate)

    def to_dict(self) -> dict[str, object]:
        """Returns the scheme as JSON-able data for `scheme_from_dict`.

        Returns:
          `{"kind": "poisson", "sampling_rate": q}`.

        Example:
          >>> PoissonSampling(0.5).to_dict()
          {'kind': 'poisson', 'sampling_rate': 0.5}
        """
        return {"kind": "poisson", "sampling_rate": self.sampling_rate}


@dataclass(frozen=True, slots=True)
class FixedSizeSampling:
    """Every step draws a uniform subset of fixed size without replacement, afresh.

    The batch is one of the C(n, b) subsets, each equally likely. The size is public, hence the
    natural neighbours are datasets of the same size: replace one.

    Args:
      num_examples: n, at least 1.
      batch_size: b, between 1 and n.

    Raises:
      TypeError: a size is not an integer.
      ValueError: a size is out of range.

    Source: Wang, Balle, Kasiviswanathan 2019, "Subsampled Rényi Differential Privacy and
    Analytical Moments Accountant", Theorem 27.

    Example:
      >>> FixedSizeSampling(num_examples=1000, batch_size=10).batch_size
      10
    """

    num_examples: int
    batch_size: int

    def __post_init__(self) -> None:
        advice = "Pass the size of the training set and of one logical batch."
        size = check_integer(
            "num_examples", self.num_examples, minimum=1, maximum=LARGEST_COUNT, advice=advice
        )
        batch = check_integer("batch_size", self.batch_size, minimum=1, advice=advice)
        if batch > size:
            raise ValueError(
                f"batch_size must be at most num_examples={size}, got {shown(batch)}. {advice}"
            )
        object.__setattr__(self, "num_examples", size)
        object.__setattr__(self, "batch_size", batch)

    def to_dict(self) -> dict[str, object]:
        """Returns the scheme as JSON-able data for `scheme_from_dict`.

        Returns:
          `{"kind": "fixed_size", "num_examples": n, "batch_size": b}`.

        Example:
          >>> FixedSizeSampling(8, 2).to_dict()
          {'kind': 'fixed_size', 'num_examples': 8, 'batch_size': 2}
        """
        return {
            "kind": "fixed_size",
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True, slots=True)
class ShuffledEpochs:
    """Every example takes part exactly once per epoch; no amplification is claimed.

    After t executed steps an example took part at most ceil(t / steps_per_epoch) times, so the run
    counts as that many plain Gaussians. When the noise varies, an example may have met the weakest
    noise of every epoch, so each epoch counts with its smallest noise multiplier.

    Privacy notes:
        * Under "add_or_remove_one" the guarantee is the zero-out form: the removed example keeps
          its place and contributes zero. A truly shorter dataset is cut into other batches, every
          batch after the missing place would change, and no per-step bound could hold.
        * Under "replace_one" the guarantee is the usual one, since places do not move.
        * Shuffling gives real but hard to prove amplification; claiming the Poisson figure for
          shuffled data understates epsilon (Chua et al. 2024).
        * The first step of a run is the first step of an epoch.

    Args:
      steps_per_epoch: steps that visit every example once, at least 1.

    Raises:
      TypeError: the count is not an integer.
      ValueError: the count is below 1.

    Source: Chua et al. 2024, "How Private are DP-SGD Implementations?"; Kairouz et al. 2021,
    "Practical and Private (Deep) Learning without Sampling or Shuffling", Definition 1.1.

    Example:
      >>> ShuffledEpochs(steps_per_epoch=100)
      ShuffledEpochs(steps_per_epoch=100)
    """

    steps_per_epoch: int

    def __post_init__(self) -> None:
        steps = check_integer(
            "steps_per_epoch",
            self.steps_per_epoch,
            minimum=1,
            maximum=LARGEST_COUNT,
            advice="Pass ceil(number of examples / batch size).",
        )
        object.__setattr__(self, "steps_per_epoch", steps)

    def to_dict(self) -> dict[str, object]:
        """Returns the scheme as JSON-able data for `scheme_from_dict`.

        Returns:
          `{"kind": "shuffled_epochs", "steps_per_epoch": k}`.

        Example:
          >>> ShuffledEpochs(4).to_dict()
          {'kind': 'shuffled_epochs', 'steps_per_epoch': 4}
        """
        return {"kind": "shuffled_epochs", "steps_per_epoch": self.steps_per_epoch}


SamplingScheme = PoissonSampling | FixedSizeSampling | ShuffledEpochs
"""How batches are drawn."""

_KINDS: dict[str, tuple[type[SamplingScheme], frozenset[str]]] = {
    "poisson": (PoissonSampling, frozenset({"sampling_rate"})),
    "fixed_size": (FixedSizeSampling, frozenset({"num_examples", "batch_size"})),
    "shuffled_epochs": (ShuffledEpochs, frozenset({"steps_per_epoch"})),
}


def scheme_from_dict(data: object) -> SamplingScheme:
    """Rebuilds a scheme from what its `to_dict` returned.

    Args:
      data: a mapping with the key "kind" and the scheme's own fields.

    Returns:
      The equal scheme.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: the kind is unknown, a key is missing or unknown, or a field is out of range.

    Example:
      >>> scheme_from_dict({"kind": "poisson", "sampling_rate": 0.5})
      PoissonSampling(sampling_rate=0.5)
    """
    is_mapping = isinstance(data, Mapping)
    kind = cast(Mapping[str, Any], data).get("kind") if is_mapping else data
    scheme, keys = _KINDS[check_choice("sampling kind", kind, _KINDS)]
    fields = dict(check_keys("sampling scheme", data, keys | {"kind"}))
    del fields["kind"]
    return scheme(**fields)  # pyright: ignore[reportArgumentType]  # each scheme checks its fields


def check_scheme(sampling: object) -> SamplingScheme:
    """Returns `sampling` if it is a scheme, or says what a scheme is.

    Args:
      sampling: what the caller passed.

    Returns:
      The scheme.

    Raises:
      TypeError: it is not one of the three schemes.

    Example:
      >>> check_scheme(PoissonSampling(0.5))
      PoissonSampling(sampling_rate=0.5)
    """
    if not isinstance(sampling, PoissonSampling | FixedSizeSampling | ShuffledEpochs):
        raise TypeError(
            "sampling must be PoissonSampling, FixedSizeSampling or ShuffledEpochs, "
            f"got {shown(sampling)}. A sampler's `.scheme` is the right object."
        )
    return sampling


def scheme_meant(sampling_rate: float | None, sampling: SamplingScheme | None) -> SamplingScheme:
    """The scheme meant by the two alternative arguments.

    Args:
      sampling_rate: shorthand for Poisson sampling.
      sampling: any scheme.

    Returns:
      The scheme.

    Raises:
      TypeError: `sampling` is no scheme, or the rate is no number.
      ValueError: none or both are given, or the rate is outside (0, 1].

    Example:
      >>> scheme_meant(0.5, None)
      PoissonSampling(sampling_rate=0.5)
    """
    if (sampling_rate is None) == (sampling is None):
        raise ValueError(
            "exactly one of sampling_rate and sampling must be given, got "
            f"sampling_rate={shown(sampling_rate)} and sampling={shown(sampling)}. "
            "Pass sampling_rate for Poisson sampling, sampling for any other scheme."
        )
    return check_scheme(sampling) if sampling_rate is None else PoissonSampling(sampling_rate)


def as_noise_multipliers(noise_multiplier: NoiseMultiplier) -> tuple[float, ...]:
    """Returns the noise multipliers of one step as a tuple of floats.

    Args:
      noise_multiplier: one number or a non-empty sequence of numbers, each ≥ 0; arrays of no or
        of one axis do, NumPy's and JAX's.

    Returns:
      A tuple with at least one float.

    Raises:
      TypeError: an entry is not a number.
      ValueError: the sequence is empty, or an entry is negative or not finite.

    Example:
      >>> as_noise_multipliers(1)
      (1.0,)
    """
    return check_reals(
        "noise_multiplier",
        noise_multiplier,
        minimum=0,
        advice="Pass noise standard deviation / clip norm, or one for each release of the step.",
    )


def combined_noise_multiplier(noise_multipliers: NoiseMultiplier) -> float:
    r"""The one noise multiplier that is as private as K Gaussians released from the same batch.

    .. math:: σ = \Big(\sum_k σ_k^{-2}\Big)^{-1/2}

    Release k has unit sensitivity and noise σ_k. Scaling coordinate k by 1/σ_k turns the joint
    release into one isotropic Gaussian of sensitivity (Σ σ_k⁻²)^½. The batch is drawn once, so the
    combination happens inside the sampling: per-layer noise, or the noised count of adaptive
    clipping next to the gradients.

    Args:
      noise_multipliers: one number or a sequence, each ≥ 0; 0 anywhere means no noise.

    Returns:
      The combined multiplier, at most the smallest of the list; 0.0 if any entry is 0.

    Raises:
      TypeError: an entry is not a number.
      ValueError: the list is empty, or an entry is negative or not finite.

    Source: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", Theorem 1.

    Example:
      >>> round(combined_noise_multiplier([2.0, 3.0, 4.0]), 4)
      1.5364
    """
    sigmas = as_noise_multipliers(noise_multipliers)
    return combined_with_counts(tuple((sigma, 1) for sigma in sigmas))


def combined_with_counts(groups: tuple[tuple[float, int], ...]) -> float:
    """The combined noise multiplier of groups of equal Gaussians.

    Args:
      groups: pairs (noise multiplier ≥ 0, how often ≥ 1); not empty.

    Returns:
      (Σ count / σ²)^(-1/2), or 0.0 if any noise multiplier is 0.

    Example:
      >>> combined_with_counts(((2.0, 4),))
      1.0
    """
    smallest = min(sigma for sigma, _ in groups)
    if smallest == 0.0:
        return 0.0
    # Relative to the smallest, so that no square overflows and a single entry comes back exactly.
    return smallest / math.sqrt(math.fsum(n * (smallest / sigma) ** 2 for sigma, n in groups))
