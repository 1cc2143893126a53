"""Steps that release Gaussians of a batch: what a ledger notes of them, and how they compose.

Order does not matter for Poisson and fixed-size steps, so equal ones become one mechanism with a
count. Shuffled epochs become plain Gaussians (`epochs.py`).

Example:
  >>> step = LedgerEntry((1.1,), PoissonSampling(0.1), steps=2)
  >>> list(LedgerEntry.counted([[step, step]]))
  [Counted(mechanism=SampledGaussian(sampling=PoissonSampling(sampling_rate=0.1),
  noise_multiplier=1.1), repeats=4)]
"""

# pyright: reportMissingTypeStubs=false

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any, Self

import dp_accounting
import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from numpy.typing import NDArray

from jaxdp.accounting.draws import BATCHES, EPOCHS, Draws, check_draws
from jaxdp.accounting.epochs import EpochSteps, participations
from jaxdp.accounting.masses import TAIL
from jaxdp.accounting.mechanisms.base import (
    Counted,
    Entry,
    Losses,
    Mechanism,
    TooManyStepsError,
)
from jaxdp.accounting.one_step import pld_of_gaussian
from jaxdp.accounting.question import Question, RelationName
from jaxdp.accounting.schemes import (
    FixedSizeSampling,
    PoissonSampling,
    SamplingScheme,
    ShuffledEpochs,
    as_noise_multipliers,
    check_scheme,
    combined_with_counts,
    scheme_from_dict,
)
from jaxdp.accounting.strict_json import check_list
from jaxdp.checks import check_integer

MOST_SAMPLED_STEPS = 10_000_000
"""More equal sampled steps than this are not composed with "pld"."""

# Less noise than this is counted as none: squares of smaller numbers leave what floats can hold,
# and assuming none only overstates epsilon.
_NO_NOISE = 1e-6


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Consecutive equal steps of one run.

    Args:
      noise_multipliers: one σ_k ≥ 0 for each Gaussian that a step released from its batch; they
        count as one Gaussian with (Σ σ_k⁻²)^(-1/2).
      sampling: the scheme that really drew the batches.
      steps: how many such steps were executed, ≥ 1.
      draws: the random numbers that they were made of, one of each stream for each step; none
        where nobody knows. Left out of `repr`, which they would fill.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: a field is out of range, a stream comes twice, or its draws are not as many as
        the steps.

    Example:
      >>> from jaxdp.accounting import PoissonSampling
      >>> LedgerEntry((1.0,), PoissonSampling(0.1), steps=5).steps
      5
    """

    noise_multipliers: tuple[float, ...]
    sampling: SamplingScheme
    steps: int
    draws: tuple[Draws, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multipliers", as_noise_multipliers(self.noise_multipliers))
        check_scheme(self.sampling)
        advice = "Leave out what was not executed."
        steps = check_integer("steps", self.steps, minimum=1, advice=advice)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "draws", check_draws(self.draws))
        for each in self.draws:
            if each.count != steps:
                raise ValueError(
                    f"draws must count one of each stream for each of the {steps} steps, got "
                    f"{each.count} of {each.purpose!r}. Charge steps apart that drew otherwise."
                )

    def to_dict(self) -> dict[str, object]:
        """Returns the fields but the draws as JSON-able data for `from_dict`.

        Returns:
          A dict of three fields.

        Example:
          >>> from jaxdp.accounting import ShuffledEpochs
          >>> LedgerEntry((1.0,), ShuffledEpochs(4), steps=5).to_dict()["noise_multipliers"]
          [1.0]
        """
        return {
            "noise_multipliers": list(self.noise_multipliers),
            "sampling": self.sampling.to_dict(),
            "steps": self.steps,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], draws: tuple[Draws, ...]) -> Self:
        """Rebuilds the entry from what `to_dict` returned.

        Args:
          fields: the three fields.
          draws: those of the steps.

        Returns:
          The equal entry.

        Raises:
          TypeError: a field has the wrong type.
          ValueError: a field is out of range, or the noise multipliers are no list.

        Example:
          >>> from jaxdp.accounting import PoissonSampling
          >>> entry = LedgerEntry((1.0,), PoissonSampling(0.1), steps=5)
          >>> LedgerEntry.from_dict(entry.to_dict(), draws=()) == entry
          True
        """
        sigmas = check_list("noise_multipliers", fields["noise_multipliers"])
        return cls(tuple(sigmas), scheme_from_dict(fields["sampling"]), fields["steps"], draws)

    @classmethod
    def counted(cls, runs: Sequence[Sequence[Entry]]) -> Iterable[Counted]:
        """Groups the steps of all runs into distinct Gaussians with counts.

        By first occurrence, except that the mechanism of the very last step comes last, and its
        scheme: a run that grows then keeps its composed past, which is found again.

        Args:
          runs: for every run its entries, in the order of execution.

        Returns:
          The Gaussians; none if no step was executed.

        Example:
          >>> from jaxdp.accounting import ShuffledEpochs
          >>> step = LedgerEntry((1.0,), ShuffledEpochs(4), steps=6)
          >>> [each.repeats for each in LedgerEntry.counted([[step], [step]])]
          [4]
        """
        counts: Counter[tuple[PoissonSampling | FixedSizeSampling | None, float]] = Counter()
        last = None
        for run in runs:
            steps = (entry for entry in run if isinstance(entry, cls))
            # What another sampler drew in between ends an epoch: each piece is counted up.
            for scheme, entries in groupby(steps, key=lambda entry: entry.sampling):
                piece = [entry._epoch_steps() for entry in entries]
                plain = None if isinstance(scheme, ShuffledEpochs) else scheme
                last = plain, piece[-1].noise_multiplier
                if isinstance(scheme, ShuffledEpochs):
                    groups = participations(piece, scheme.steps_per_epoch)
                else:
                    groups = ((sigma, count) for sigma, count, _ in piece)
                for sigma, count in groups:
                    counts[plain, sigma] += count
        ordered = sorted(counts, key=lambda key: (key == last, key[0] == (last and last[0])))
        return [Counted(SampledGaussian(*key), counts[key]) for key in ordered]

    def _epoch_steps(self) -> EpochSteps:
        """The steps with one noise multiplier, and with their epochs where they are known."""
        sigma = combined_with_counts(tuple((each, 1) for each in self.noise_multipliers))
        # Of a sampler that does not say how it cuts its epochs, its steps tell where they lie.
        drawn = {each.purpose: each for each in self.draws}
        return EpochSteps(sigma, self.steps, drawn.get(EPOCHS, drawn.get(BATCHES)))


@dataclass(frozen=True, slots=True)
class SampledGaussian:
    """One Gaussian of a batch, as accountants read it.

    Attributes:
      sampling: how the batch was drawn; None for a plain Gaussian, which every example joins.
      noise_multiplier: σ ≥ 0, noise std / clip norm.
    """

    sampling: PoissonSampling | FixedSizeSampling | None
    noise_multiplier: float

    def event(self) -> dp_accounting.DpEvent:
        return self._event(self.noise_multiplier)

    def _event(self, sigma: float) -> dp_accounting.DpEvent:
        event = dp_accounting.GaussianDpEvent(sigma)
        match self.sampling:
            case PoissonSampling(rate):
                return dp_accounting.PoissonSampledDpEvent(rate, event)
            case FixedSizeSampling(size, batch):
                return dp_accounting.SampledWithoutReplacementDpEvent(size, batch, event)
            case None:
                return event

    def refusal(self, question: Question, beside: Sequence[Mechanism]) -> str:
        if question.new_accountant().supports(self.event()):
            return ""
        gaussians = [each for each in beside if isinstance(each, SampledGaussian)]
        if {PoissonSampling, FixedSizeSampling} <= {type(each.sampling) for each in gaussians}:
            advice = (
                "No accountant composes Poisson and fixed-size steps: keep one ledger for each and "
                "add their epsilons and their deltas."
            )
        elif isinstance(self.sampling, FixedSizeSampling):
            advice = (
                'Use accountant="rdp" with neighboring_relation="replace_one", or draw the batches '
                "with PoissonSampling."
            )
        else:
            advice = (
                'Use accountant="pld" for "replace_one", or '
                'neighboring_relation="add_or_remove_one".'
            )
        return (
            f"sampling={self.sampling} must be one that dp-accounting supports with "
            f'accountant="{question.accountant}" and neighboring_relation="{question.relation}", '
            f"which it does not. {advice}"
        )

    def is_bare(self) -> bool:
        return self.noise_multiplier < _NO_NOISE

    def losses(self, relation: RelationName) -> Losses:
        sigma = self.noise_multiplier / (2 if relation == "replace_one" else 1)
        sampling = self.sampling
        rate = sampling.sampling_rate if isinstance(sampling, PoissonSampling) else 1.0
        # Mean loss of one step: convexity gives q/2σ², Jensen gives log of the χ² moment.
        linear, exponent = rate / (2 * sigma**2), 1 / sigma**2
        chi = math.log1p(rate**2 * math.expm1(exponent)) if exponent < 700 else math.inf
        # The grid of one step reaches ten standard deviations of the noise.
        return Losses(min(linear, chi), 1 / (2 * sigma**2) + 10 / sigma + math.log(rate))

    def pld(self, count: int, relation: RelationName, interval: float) -> PrivacyLossDistribution:
        sigma = self.noise_multiplier
        if self.sampling is None:
            # Plain Gaussians add up exactly, without the rounding of a self-composition.
            return _pld_of_step(1.0, sigma / math.sqrt(count), relation, interval)
        if isinstance(self.sampling, FixedSizeSampling):
            raise TypeError(
                'sampling must be one that dp-accounting supports with accountant="pld", got '
                f'{self.sampling}. Use accountant="rdp" with neighboring_relation="replace_one".'
            )
        if count > MOST_SAMPLED_STEPS:
            raise TooManyStepsError(
                f'steps must be at most {MOST_SAMPLED_STEPS} for accountant="pld", got {count} of '
                'one kind: the rounding errors of as many would show. Use accountant="rdp".'
            )
        step = _pld_of_step(self.sampling.sampling_rate, sigma, relation, interval)
        # Of one step nothing has to be cut off.
        return step if count == 1 else step.self_compose(count, TAIL)

    def rdp(self, relation: RelationName) -> NDArray[np.float64]:
        # What our noise multiplier must be multiplied with before this accountant reads it.
        #
        # Ours is noise std / C with C the effect of adding or removing one example. Replacing one
        # moves the sum by up to 2C. dp-accounting's PLD accountant knows that: under REPLACE_ONE it
        # compares N(-1, σ²) with N(+1, σ²), sampled or not. Its RDP accountant compares N(0, σ²)
        # with N(1, σ²) under every relation, so there σ means noise std / 2C. The tests hold both
        # against the exact hockey-stick divergence.
        scale = 0.5 if relation == "replace_one" else 1.0
        event = self._event(self.noise_multiplier * scale)
        return Question("rdp", relation).new_accountant().compose(event).rdp


@lru_cache(maxsize=64)
def _pld_of_step(
    rate: float, sigma: float, relation: RelationName, interval: float
) -> PrivacyLossDistribution:
    """Of one step: the same at every report."""
    return pld_of_gaussian(
        sigma, sampling_rate=rate, replace_one=relation == "replace_one", interval=interval
    )
