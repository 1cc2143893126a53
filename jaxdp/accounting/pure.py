"""Releases beside the steps that need no δ, such as a selection by the sparse vector technique.

Example:
    >>> PureRelease(0.1)
    PureRelease(epsilon=0.1, sampling=None)
    >>> round(PureRelease(0.1, PoissonSampling(0.04)).spent(replace_one=False), 5)
    0.0042
"""

import math
from dataclasses import dataclass, field

from jaxdp.accounting.draws import Draws, check_draws
from jaxdp.accounting.schemes import PoissonSampling
from jaxdp.checks import check_real, shown


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
        if not isinstance(self.sampling, PoissonSampling | None):
            raise TypeError(
                "sampling of a pure release must be PoissonSampling or None, got "
                f"{shown(self.sampling)}. Pass None where the whole data set was looked at."
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
