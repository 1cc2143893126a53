"""The budget of a run: a step is allowed only if ε stays within it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxdp.accounting import (
    AccountantName,
    Draws,
    Guarantee,
    Ledger,
    RelationName,
    SamplingScheme,
    combined_noise_multiplier,
)
from jaxdp.accounting.ahead import exact_noise, surely_fits
from jaxdp.accounting.coarsening import rounded_down
from jaxdp.accounting.draws import check_draws, continued
from jaxdp.accounting.guarantee import as_guarantee
from jaxdp.accounting.ledger import supposed
from jaxdp.accounting.question import check_epsilon

# How far ahead to look: one question to the accountant then serves this many steps.
_HORIZON = 1000

# The same for the last percent of a budget.
_NEAR = 64

# More new values of `rounded_down` than this end what a bound without known noise has granted: the
# ledger's own answer is composed on a grid that grows with the number of its mechanisms, and must
# stay on a finer one than the bound was. The bound, of m ≥ 1 mechanisms, has sixteen times the
# interval that m need, 16 · 2^⌈log₂ max(1, m/8)⌉; the ledger holds at most m + 32 of before (m when
# rounded, 32 when not) and 64 more, whose 2^⌈log₂((m + 96)/8)⌉ is at most that for every m.
_MOST_NEW = 64

# A first question covers noise that is weaker by this factor than what was seen, so that it serves
# a schedule for a while.
_MARGIN = 2**0.5
_LEAST_MARGIN = 2**0.05


class _Grant(NamedTuple):
    """Steps that fit, by one answer.

    Attributes:
      steps: how many are left.
      floor: the least noise multiplier that they may have.
      known: the noise multipliers that they may have; None for any above the floor.
      rounded: whether these are what noise multipliers are rounded down to.
      sampling: their scheme.
      after: the ledger that they begin from: what else it is charged with ends the grant.
      draws: of the step before them, with which they go on: another sampler, or another place in
        an epoch, ends it, too.
      new: the noise multipliers that they had so far, rounded down; of any above the floor.
    """

    steps: int
    floor: float
    known: frozenset[float] | None
    rounded: bool
    sampling: SamplingScheme
    after: Ledger
    draws: tuple[Draws, ...]
    new: frozenset[float] = frozenset()

    def covers(
        self, ledger: Ledger, sigma: float, sampling: SamplingScheme, draws: tuple[Draws, ...]
    ) -> bool:
        """Whether a step is one of them."""
        kind = _rounded_down(sigma) if self.rounded else sigma
        seen = self.known is None or kind in self.known
        same = sampling == self.sampling and ledger == self.after
        goes_on = continued(self.draws, draws) is not None
        few = self.known is not None or len(self._with(sigma)) <= _MOST_NEW
        return self.steps > 0 and sigma >= self.floor and seen and same and goes_on and few

    def used(self, sigma: float, after: Ledger, draws: tuple[Draws, ...]) -> "_Grant":
        """What is left of it behind a step."""
        new = self.new if self.known is not None else self._with(sigma)
        return self._replace(steps=self.steps - 1, after=after, draws=draws, new=new)

    def _with(self, sigma: float) -> frozenset[float]:
        return self.new | {_rounded_down(sigma)}


def _rounded_down(sigma: float) -> float:
    return rounded_down(sigma) if sigma > 0 else 0.0


@dataclass
class _Asked:
    """How much to ask an upper bound about. What does not fit is not asked again: what is left of a
    budget only shrinks.

    Attributes:
      steps: how many steps.
      margin: with noise that is less than what was seen by this factor.
      failed: the largest noise multiplier of which the bound did not even grant one step.
    """

    steps: int
    margin: float
    failed: float = 0.0

    def steps_that(
        self, fit: Callable[[float, int], bool], least: float
    ) -> tuple[float, int] | None:
        """The margin and the number of steps that fit, or None."""
        while least > self.failed:
            if fit(self.margin, self.steps):
                return self.margin, self.steps
            if self.margin == 1 and self.steps == 1:
                self.failed = least
            self.margin = self.margin**0.5 if self.margin > _LEAST_MARGIN else 1.0
            self.steps = max(self.steps // 2, 1)
        return None


@dataclass
class Budget:
    """Tells before each step whether it fits into (ε, δ).

    Asked once per step, in order. What it answers is exact: `allows` is true exactly when the
    ledger with that step in it stays at or below ε. So that the accountant is not asked in full at
    every step, it remembers how many steps fit, and while the budget is far it asks an upper bound
    of what many steps with the least noise in sight would cost: if they fit, fewer do, and such
    with more noise. Only the last few percent of a budget are asked about step by step, where σ
    changes at every step.

    Args:
      epsilon: ε > 0 that must not be exceeded.
      delta: δ in (0, 1); or a guarantee, which says the two below as well.
      accountant: "pld", the default, or "rdp".
      neighboring_relation: "add_or_remove_one", the default, or "replace_one".

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range, or contradicts the guarantee.

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
    delta: float | Guarantee
    accountant: AccountantName | None = None
    neighboring_relation: RelationName | None = None
    _asked: Guarantee = field(init=False, repr=False)
    _grant: _Grant | None = field(default=None, init=False, repr=False)
    _bound: _Asked = field(
        default_factory=lambda: _Asked(_HORIZON, _MARGIN), init=False, repr=False
    )
    _known: _Asked = field(default_factory=lambda: _Asked(_NEAR, 1.0), init=False, repr=False)
    # The least noise since the last question, and what the accountant was asked last.
    _least: float = field(default=math.inf, init=False, repr=False)
    _kind: tuple[float, SamplingScheme] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.epsilon = check_epsilon(self.epsilon)
        self._asked = as_guarantee(self.delta, self.accountant, self.neighboring_relation)
        self.delta, self.accountant = self._asked.delta, self._asked.accountant
        self.neighboring_relation = self._asked.neighboring_relation

    def allows(
        self,
        ledger: Ledger,
        noise_multipliers: list[float],
        sampling: SamplingScheme,
        draws: Sequence[Draws] = (),
        after: Ledger | None = None,
    ) -> bool:
        """Whether one more step with these releases fits.

        Args:
          ledger: what has been executed.
          noise_multipliers: of the Gaussians that the coming step releases.
          sampling: the scheme that draws its batch.
          draws: what the coming step will be charged with beside.
          after: that ledger charged with all this, where it is at hand.

        Returns:
          Whether the ledger stays within the budget with the coming step.

        Raises:
          TypeError, ValueError: what `Ledger.charge` refuses.
        """
        sigma, drawn = combined_noise_multiplier(noise_multipliers), check_draws(draws)
        grant = self._grant
        if grant is None or not grant.covers(ledger, sigma, sampling, drawn):
            coming = ledger, sigma, sampling, drawn
            grant = self._surely(*coming) or self._exactly(*coming)
            self._least = math.inf
        self._least = min(self._least, sigma)
        if after is None:
            after = ledger.charge(noise_multipliers, sampling, draws=drawn)
        self._grant = grant.used(sigma, after, drawn)
        return grant.steps > 0

    def _surely(
        self, ledger: Ledger, sigma: float, sampling: SamplingScheme, draws: tuple[Draws, ...]
    ) -> _Grant | None:
        """By an upper bound: first of any noise above a floor, then of noise that was seen."""
        least = min(self._least, sigma)
        if least == 0:
            return None

        def fits(floor: float, steps: int, rounded: bool) -> bool:
            ahead = supposed(ledger, floor, sampling, steps, draws)
            return surely_fits(ahead, self.epsilon, self._asked, rounded=rounded)

        if self._grant is not None and self._grant.steps == 0:
            self._bound.steps *= 2  # all of the last ones were used
        found = self._bound.steps_that(
            lambda margin, steps: fits(rounded_down(least / margin), steps, True), least
        )
        if found is not None:
            margin, steps = found
            floor = rounded_down(least / margin)
            return _Grant(steps, floor, None, False, sampling, ledger, draws)
        seen = exact_noise(supposed(ledger, sigma, sampling, 1, draws), sampling)
        if seen is None:
            return None
        found = self._known.steps_that(lambda _, steps: fits(least, steps, False), least)
        return found and _Grant(found[1], least, seen, False, sampling, ledger, draws)

    def _exactly(
        self, ledger: Ledger, sigma: float, sampling: SamplingScheme, draws: tuple[Draws, ...]
    ) -> _Grant:
        """By the accountant's answer."""
        exact = exact_noise(supposed(ledger, sigma, sampling, 1, draws), sampling) is not None
        # Beyond a number of noise multipliers the ledger rounds them: those that are rounded alike
        # are one kind. What is asked about is σ itself, which may be what makes the ledger round.
        floor = sigma if exact else _rounded_down(sigma)
        kind = floor, sampling
        # A σ that has just changed is one of a schedule: look one step ahead only.
        horizon = _HORIZON if self._kind in (None, kind) else 1
        self._kind = kind
        steps = ledger.steps_left(
            sigma,
            sampling,
            epsilon=self.epsilon,
            delta=self._asked,
            at_most=horizon,
            draws=draws,
        )
        return _Grant(steps, floor, frozenset({floor}), not exact, sampling, ledger, draws)
