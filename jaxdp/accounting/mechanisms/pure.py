"""Releases beside the steps that need no δ, such as a selection by the sparse vector technique.

Example:
  >>> PureRelease(0.1)
  PureRelease(epsilon=0.1, sampling=None)
  >>> round(PureRelease(0.1, PoissonSampling(0.04)).spent(replace_one=False), 5)
  0.0042
"""

# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import dp_accounting
import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from numpy.typing import NDArray

from jaxdp.accounting.draws import Draws, check_draws
from jaxdp.accounting.masses import TAIL, UNIT, Masses
from jaxdp.accounting.mechanisms.base import Counted, Entry, Losses, Mechanism, alike
from jaxdp.accounting.question import Question, RelationName
from jaxdp.accounting.schemes import PoissonSampling, scheme_from_dict
from jaxdp.checks import check_real, shown

# A pure release of a larger ε is counted as one without noise: e^2ε would leave the floats.
_LARGEST_EPSILON = 300.0


@dataclass(frozen=True, slots=True)
class PureRelease:
    """Something that was released once with (ε, 0)-differential privacy.

    P[M(D) ∈ E] ≤ exp(ε) P[M(D') ∈ E] for all events E and all D, D' of which one has one example
    more. Whatever the noise was, such a release composes like randomised response, the least
    private of all that are (ε, 0)-private.

    Args:
      epsilon: ε > 0, for one example that is added or removed, and before any sampling; what
        another relation or the sampling makes of it is `spent`.
      sampling: None if the whole data set was looked at; Poisson sampling if a draw was, made
        afresh for this release alone. A batch that a training step sees as well is no such
        draw: together they tell more than each would tell of a batch of its own.
      draws: the random numbers that it was made of, left out of `repr`; none where nobody knows.

    Raises:
      TypeError: ε is no number, or the sampling or the draws are of another kind.
      ValueError: ε is not positive and finite, or a stream comes twice among the draws.

    Source: Kairouz, Oh, Viswanath 2015, "The Composition Theorem for Differential Privacy".

    Example:
      >>> PureRelease(0.5).spent(replace_one=True)
      1.0
    """

    epsilon: float
    sampling: PoissonSampling | None = None
    draws: tuple[Draws, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        advice = "Pass the ε of this release alone; what released nothing is not charged."
        epsilon = check_real("epsilon", self.epsilon, above=0, advice=advice)
        object.__setattr__(self, "epsilon", epsilon)
        sampling: Any = self.sampling
        if not isinstance(sampling, PoissonSampling | None):
            raise TypeError(
                "sampling of a pure release must be PoissonSampling or None, got "
                f"{shown(sampling)}. Pass None where the whole data set was looked at."
            )
        object.__setattr__(self, "draws", check_draws(self.draws))

    def spent(self, *, replace_one: bool) -> float:
        r"""The ε that the release costs: at most ε, or 2ε when one example is replaced.

        .. math:: \ln(1 - q + q e^ε), \qquad
            \ln(1 - q + q e^ε) - \ln(1 - q + q e^{-ε}) \text{ when one is replaced}

        Derivation: given who else was drawn, let P₀ be the output's distribution without the
        example and P₁ with it, so that e^-ε P₀ ≤ P₁ ≤ e^ε P₀. With the example in the data it is
        (1 - q) P₀ + q P₁, between (1 - q + q e^±ε) times P₀, which is what it is without. That
        bounds the ratio of two different examples by the second formula, and that of one and none
        by the first: (1 - q + q e^-ε)⁻¹ is no larger.

        Args:
          replace_one: whether neighbours differ by replacing an example.

        Returns:
          ε > 0.

        Example:
          >>> round(PureRelease(1.0, PoissonSampling(0.5)).spent(replace_one=True), 6)
          1.0
        """
        epsilon = self.epsilon
        if self.sampling is None or self.sampling.sampling_rate == 1:
            return 2 * epsilon if replace_one else epsilon
        rate = self.sampling.sampling_rate
        # e^ε is taken out of the first logarithm: it may be more than floats can hold.
        added = epsilon + math.log1p((1 - rate) * math.expm1(-epsilon))
        return added - math.log1p(rate * math.expm1(-epsilon)) if replace_one else added

    def to_dict(self) -> dict[str, object]:
        """Returns the fields but the draws as JSON-able data for `from_dict`.

        Returns:
          A dict of two fields.

        Example:
          >>> PureRelease(0.5).to_dict()
          {'epsilon': 0.5, 'sampling': None}
        """
        sampling = None if self.sampling is None else self.sampling.to_dict()
        return {"epsilon": self.epsilon, "sampling": sampling}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], draws: tuple[Draws, ...]) -> Self:
        """Rebuilds the release from what `to_dict` returned.

        Args:
          fields: the two fields.
          draws: those of the release.

        Returns:
          The equal release.

        Raises:
          TypeError: a field has the wrong type.
          ValueError: a field is out of range.

        Example:
          >>> PureRelease.from_dict({"epsilon": 0.5, "sampling": None}, draws=())
          PureRelease(epsilon=0.5, sampling=None)
        """
        sampling: Any = fields["sampling"]
        scheme: Any = None if sampling is None else scheme_from_dict(sampling)
        return cls(fields["epsilon"], scheme, draws)

    @classmethod
    def counted(cls, runs: Sequence[Sequence[Entry]]) -> Iterable[Counted]:
        """Equal releases are one mechanism.

        Args:
          runs: the entries of all runs.

        Returns:
          The pure releases among them.

        Example:
          >>> [each.repeats for each in PureRelease.counted([[PureRelease(0.5)] * 3])]
          [3]
        """
        return [Counted(PureMechanism(release), n) for release, n in alike(runs, cls)]


@dataclass(frozen=True, slots=True)
class PureMechanism:
    """A pure release as accountants read it: randomised response between two answers.

    Attributes:
      release: what was released, without its draws.
    """

    release: PureRelease

    def event(self) -> dp_accounting.DpEvent:
        # Randomised response is refused under add-or-remove-one, would count ε where replacing
        # one costs 2ε, and once however often it is composed; Laplace noise is more private.
        raise ValueError(
            "dp_event must be asked of Gaussian steps alone, got a ledger with pure releases, for "
            "which dp-accounting has no event. Ask the ledger itself for epsilon or delta."
        )

    def refusal(self, question: Question, beside: Sequence[Mechanism]) -> str:
        # Pure releases are (ε, 0)-private under every relation, which both accountants can compose.
        return ""

    def is_bare(self) -> bool:
        return self.release.epsilon > _LARGEST_EPSILON

    def losses(self, relation: RelationName) -> Losses:
        # A loss of ±ε, of which the mean is ε tanh(ε/2).
        epsilon = self._epsilon(relation)
        return Losses(epsilon * math.tanh(epsilon / 2), epsilon)

    def pld(self, count: int, relation: RelationName, interval: float) -> PrivacyLossDistribution:
        # Randomised response, either answer e^ε times likelier than with the other: δ(e) is
        # (1 - e^(e-ε)) / (1 + e^-ε) for |e| ≤ ε.
        epsilon = self._epsilon(relation)
        end = math.ceil(epsilon / interval)
        at = np.arange(-end, end + 1) * interval
        between = np.maximum(-np.expm1(at - epsilon), 0) / (1 + math.exp(-epsilon))
        deltas = np.where(at < -epsilon, -np.expm1(np.minimum(at, 0)), between) * (1 + 8 * UNIT)
        response = Masses.connecting(-end, deltas, interval=interval)
        return PrivacyLossDistribution(response).self_compose(count, TAIL)

    def rdp(self, relation: RelationName) -> NDArray[np.float64]:
        # Randomised response between two answers, of which the other's is e^ε times less likely.
        noise = 2 / (1 + math.exp(self._epsilon(relation)))
        event = dp_accounting.RandomizedResponseDpEvent(noise, 2)
        return Question("rdp", "replace_one").new_accountant().compose(event).rdp

    def _epsilon(self, relation: RelationName) -> float:
        return self.release.spent(replace_one=relation == "replace_one")
