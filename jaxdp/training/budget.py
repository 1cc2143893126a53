"""The budget of a run: a step is allowed only if ε stays within it."""

from dataclasses import dataclass, field

from jaxdp.accounting import (
    AccountantName,
    Ledger,
    RelationName,
    SamplingScheme,
    combined_noise_multiplier,
)

# A schedule gives every step its own σ. Asking how many steps fit at a slightly smaller one
# answers for many steps at once; near the end of the budget the question is exact again.
_MARGIN = 0.98


@dataclass
class Budget:
    """Tells before each step whether it fits into (ε, δ).

    Asked once per step, in order. What it answers is exact: `allows` is true exactly when the
    ledger with that step in it stays at or below ε. It remembers how many steps fit, so that the
    accountant is not asked for each of them.

    Args:
      epsilon: ε > 0 that must not be exceeded.
      delta: δ in (0, 1).
      accountant: "pld" or "rdp".
      neighboring_relation: "add_or_remove_one" or "replace_one".

    Example:
      >>> from jaxdp.accounting import Ledger, PoissonSampling
      >>> scheme, ledger = PoissonSampling(0.01), Ledger()
      >>> budget, steps = Budget(epsilon=0.5, delta=1e-5, accountant="rdp"), 0
      >>> while budget.allows(ledger, [1.0], scheme):
      ...     ledger, steps = ledger.charge([1.0], scheme), steps + 1
      >>> ledger.epsilon(1e-5, accountant="rdp") <= 0.5
      True
      >>> ledger.charge([1.0], scheme).epsilon(1e-5, accountant="rdp") <= 0.5
      False
    """

    epsilon: float
    delta: float
    accountant: AccountantName = "pld"
    neighboring_relation: RelationName = "add_or_remove_one"
    _left: int = field(default=0, init=False, repr=False)
    _floor: tuple[float, SamplingScheme] | None = field(default=None, init=False, repr=False)
    _last: float | None = field(default=None, init=False, repr=False)

    def allows(
        self, ledger: Ledger, noise_multipliers: list[float], sampling: SamplingScheme
    ) -> bool:
        """Whether one more step with these releases fits.

        Args:
          ledger: what has been executed.
          noise_multipliers: of the Gaussians that the coming step releases.
          sampling: the scheme that draws its batch.
        """
        sigma = combined_noise_multiplier(noise_multipliers)
        known = self._floor is not None and sampling == self._floor[1] and sigma >= self._floor[0]
        if not (known and self._left > 0):
            steady = self._last is None or sigma == self._last
            floor = sigma if steady else _MARGIN * sigma
            self._floor, self._left = (floor, sampling), self._fitting(ledger, floor, sampling)
            if self._left == 0 and floor < sigma:
                self._floor, self._left = (sigma, sampling), self._fitting(ledger, sigma, sampling)
        self._last = sigma
        self._left -= 1
        return self._left >= 0

    def _fitting(self, ledger: Ledger, sigma: float, sampling: SamplingScheme) -> int:
        return ledger.steps_left(
            sigma,
            sampling,
            epsilon=self.epsilon,
            delta=self.delta,
            accountant=self.accountant,
            neighboring_relation=self.neighboring_relation,
        )
