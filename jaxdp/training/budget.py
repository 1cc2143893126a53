"""The budget of a run: a step is allowed only if ε stays within it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxdp.accounting import (
    AccountantName,
    Draws,
    Ledger,
    RelationName,
    SamplingScheme,
    combined_noise_multiplier,
)

# How far ahead to look: one question to the accountant then serves this many equal steps.
_HORIZON = 1000


@dataclass
class Budget:
    """Tells before each step whether it fits into (ε, δ).

    Asked once per step, in order. What it answers is exact: `allows` is true exactly when the
    ledger with that step in it stays at or below ε. For equal steps it remembers how many fit, so
    that the accountant is not asked for each of them; a schedule of σ makes it ask at every step,
    and so does whatever else the ledger is charged with in between.

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
    _step: tuple[float, SamplingScheme] | None = field(default=None, init=False, repr=False)
    _left: int = field(default=0, init=False, repr=False)
    _next: Ledger | None = field(default=None, init=False, repr=False)

    def allows(
        self,
        ledger: Ledger,
        noise_multipliers: list[float],
        sampling: SamplingScheme,
        draws: Sequence[Draws] = (),
    ) -> bool:
        """Whether one more step with these releases fits.

        Args:
          ledger: what has been executed.
          noise_multipliers: of the Gaussians that the coming step releases.
          sampling: the scheme that draws its batch.
          draws: what the coming step will be charged with beside.
        """
        step = combined_noise_multiplier(noise_multipliers), sampling
        if step != self._step or ledger != self._next or self._left <= 0:
            # A σ that has just changed is one of a schedule: look one step ahead only.
            horizon = _HORIZON if self._step in (None, step) else 1
            self._step = step
            self._left = ledger.steps_left(
                *step,
                epsilon=self.epsilon,
                delta=self.delta,
                accountant=self.accountant,
                neighboring_relation=self.neighboring_relation,
                at_most=horizon,
                draws=draws,
            )
        self._left -= 1
        self._next = ledger.charge(noise_multipliers, sampling, draws=draws)
        return self._left >= 0
