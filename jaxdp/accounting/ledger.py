"""The record of what was executed, and every privacy question that can be asked of it.

Example:
  >>> from jaxdp.accounting import PoissonSampling
  >>> ledger = Ledger()
  >>> for _ in range(3):
  ...     ledger = ledger.charge(1.1, PoissonSampling(0.04))
  >>> ledger.entries
  (LedgerEntry(noise_multipliers=(1.1,), sampling=PoissonSampling(sampling_rate=0.04), steps=3),)
  >>> Ledger.from_json(ledger.to_json()) == ledger
  True
  >>> ledger.charge_pure(0.1).entries[-1]
  PureRelease(epsilon=0.1, sampling=None)
"""

# pyright: reportMissingTypeStubs=false

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

import dp_accounting

from jaxdp.accounting.composition import delta_of, epsilon_of, rough_epsilon_of
from jaxdp.accounting.draws import DrawsLike, check_draws
from jaxdp.accounting.entries import appended, entry_from_dict, entry_to_dict
from jaxdp.accounting.guarantee import Guarantee, as_guarantee
from jaxdp.accounting.mechanisms import event_of, mechanisms_of
from jaxdp.accounting.mechanisms.base import Counted, Entry, TooManyStepsError
from jaxdp.accounting.mechanisms.gaussian import LedgerEntry
from jaxdp.accounting.question import (
    AccountantName,
    RelationName,
    as_question,
    check_at_most,
    check_epsilon,
)
from jaxdp.accounting.record import Record
from jaxdp.accounting.schemes import (
    NoiseMultiplier,
    SamplingScheme,
    as_noise_multipliers,
    check_scheme,
)
from jaxdp.accounting.search import largest_count
from jaxdp.accounting.strict_json import check_keys, check_list, parse
from jaxdp.checks import check_real, shown

_FORMAT = "jaxdp.ledger"
_VERSION = 2

# Version 1 did not note draws. What was saved with it stays readable, and knows of none.
_BEFORE_DRAWS = 1

# Up to so many steps are searched without looking first where about the answer is.
_FEW_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Ledger(Record):
    """An append-only, immutable record of executed steps, and of pure releases beside them.

    Only what is public enters: noise multipliers, schemes and counts, never a realised batch size.

    Privacy notes:
        * Equal (σ, scheme) steps are grouped before composing; for Poisson and fixed-size sampling
          the order does not matter. Shuffled steps are counted per epoch, in order.
        * When a scheme saw more than 32 distinct noise multipliers (a noise schedule), each is
          rounded DOWN to a power of 2^(1/32). That only overstates epsilon, by a few percent.
          `dp_event()` stays exact.
        * Composition holds for releases that are independent given the data. Which random numbers
          a release was made of is noted where `draws` say it, and a second release of the same
          ones is refused: two runs with one noise key, one sampler in two runs, a checkpoint that
          was continued twice. Charges without draws are believed: whoever charges by hand sees to
          it that keys and seeds are new.
        * Answers are cached, and so is the composed past of the last answer.

    Args:
      closed: finished runs on the same data, each in order of execution; filled by `merge`.
      current: the run that `charge` continues.

    Raises:
      ValueError: (when charged, merged or read) a step of a stream was drawn twice.

    Example:
      >>> from jaxdp.accounting import PoissonSampling
      >>> Ledger().charge([2.0, 3.0], PoissonSampling(0.04), steps=10).steps
      10
    """

    def dp_event(self) -> dp_accounting.DpEvent:
        """The dp-accounting event of everything executed, exact and grouped.

        Returns:
          A `dp_accounting.DpEvent` whose noise multipliers are noise std / clip norm (see
          `jaxdp.accounting.dp_event` for what the RDP accountant makes of them).

        Raises:
          ValueError: the ledger holds a pure release: dp-accounting has no event that all of its
            accountants read alike.

        Example:
          >>> from jaxdp.accounting import ShuffledEpochs
          >>> Ledger().charge(2.0, ShuffledEpochs(4), steps=4).dp_event()
          GaussianDpEvent(noise_multiplier=2.0)
        """
        return event_of(mechanisms_of(self.runs))

    def epsilon(
        self,
        delta: float | Guarantee,
        *,
        accountant: AccountantName | None = None,
        neighboring_relation: RelationName | None = None,
    ) -> float:
        """The ε spent so far, at a given δ.

        Args:
          delta: δ in (0, 1); or a guarantee, which says the two below as well.
          accountant: "pld", the default, or "rdp".
          neighboring_relation: "add_or_remove_one", the default, or "replace_one".

        Returns:
          ε ≥ 0: 0.0 for an empty ledger, `math.inf` if a step had no noise.

        Raises:
          TypeError: δ is no number.
          ValueError: an argument is out of range or contradicts the guarantee, or dp-accounting
            does not support the combination.

        Source: see `jaxdp.accounting.epsilon`.

        Example:
          >>> Ledger().epsilon(1e-5)
          0.0
        """
        guarantee = as_guarantee(delta, accountant, neighboring_relation)
        return epsilon_of(mechanisms_of(self.runs), guarantee)

    def delta(
        self,
        epsilon: float,
        *,
        accountant: AccountantName = "pld",
        neighboring_relation: RelationName = "add_or_remove_one",
    ) -> float:
        """The δ spent so far, at a given ε.

        Args:
          epsilon: ε ≥ 0.
          accountant: "pld" or "rdp".
          neighboring_relation: "add_or_remove_one" or "replace_one".

        Returns:
          δ in [0, 1]: 0.0 for an empty ledger, 1.0 if a step had no noise.

        Raises:
          TypeError: ε is no number.
          ValueError: an argument is out of range, or dp-accounting does not support the
            combination.

        Example:
          >>> from jaxdp.accounting import PoissonSampling
          >>> Ledger().charge(0.0, PoissonSampling(0.1)).delta(1.0)
          1.0
        """
        target = check_real("epsilon", epsilon, minimum=0, advice="Pass the privacy budget.")
        question = as_question(accountant, neighboring_relation)
        return delta_of(mechanisms_of(self.runs), target, question)

    def steps_left(
        self,
        noise_multiplier: NoiseMultiplier,
        sampling: SamplingScheme,
        *,
        epsilon: float,
        delta: float | Guarantee,
        accountant: AccountantName | None = None,
        neighboring_relation: RelationName | None = None,
        at_most: int = 10_000_000,
        draws: Sequence[DrawsLike] = (),
    ) -> int:
        """How many more steps of one kind fit into a privacy budget.

        n* = max {n : self.charge(noise_multiplier, sampling, n).epsilon(δ) ≤ ε}. The past is
        composed once; only the added count is searched.

        Args:
          noise_multiplier: σ ≥ 0 of the steps to come, or one for each release of a step.
          sampling: how their batches will be drawn.
          epsilon: the whole budget ε > 0, of which this ledger may have spent a part.
          delta: δ in (0, 1); or a guarantee, which says the two below as well.
          accountant: "pld", the default, or "rdp".
          neighboring_relation: "add_or_remove_one", the default, or "replace_one".
          at_most: the largest answer of interest, ≥ 0.
          draws: those of the first of these steps, if they will be charged; the further steps
            go on with them. They matter to shuffled epochs.

        Returns:
          n*, exactly: n* fits and n* + 1 does not. 0 also if the past alone exceeds the budget,
          `at_most` if n* is larger.

        Raises:
          TypeError: an argument has the wrong type.
          ValueError: an argument is out of range or contradicts the guarantee, or dp-accounting
            does not support the combination.

        Example:
          >>> from jaxdp.accounting import PoissonSampling
          >>> spent = Ledger().charge(1.1, PoissonSampling(0.04), steps=100)
          >>> soon = PoissonSampling(0.02)
          >>> spent.steps_left(1.1, soon, epsilon=3.0, delta=1e-5, accountant="rdp")
          176
        """
        target, guarantee = (
            check_epsilon(epsilon),
            as_guarantee(delta, accountant, neighboring_relation),
        )
        at_most = check_at_most(at_most)
        sigmas, scheme = as_noise_multipliers(noise_multiplier), check_scheme(sampling)
        drawn = check_draws(draws)

        def mechanisms_after(steps: int) -> tuple[Counted, ...]:
            return mechanisms_of(supposed(self, sigmas, scheme, steps, drawn).runs)

        @cache
        def epsilon_after(steps: int) -> float:
            return epsilon_of(mechanisms_after(steps), guarantee)

        @cache
        def roughly_after(steps: int) -> float:
            return rough_epsilon_of(mechanisms_after(steps), guarantee)

        near = 1
        if at_most > _FEW_STEPS:
            with suppress(TooManyStepsError):
                near = max(largest_count(roughly_after, target, at_most), 1)
        return largest_count(epsilon_after, target, at_most, near)

    def to_json(self) -> str:
        """Returns the ledger as versioned JSON; floats survive exactly.

        Returns:
          A string for `from_json`.

        Example:
          >>> Ledger().to_json()
          '{"format": "jaxdp.ledger", "version": 2, "closed": [], "current": []}'
        """
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "closed": [[entry_to_dict(entry) for entry in run] for run in self.closed],
                "current": [entry_to_dict(entry) for entry in self.current],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        """Rebuilds the ledger that `to_json` wrote.

        Args:
          text: the JSON string; also one of version 1, which noted no draws.

        Returns:
          An equal ledger.

        Raises:
          ValueError: the text is no JSON, of another format or version, or any field is missing,
            unknown, repeated or out of range. A damaged ledger is never read in part.

        Example:
          >>> Ledger.from_json(Ledger().to_json()) == Ledger()
          True
        """
        try:
            data = check_keys("ledger", parse(text), {"format", "version", "closed", "current"})
            version = data["version"]
            known = version in (_BEFORE_DRAWS, _VERSION) and type(version) is int
            if data["format"] != _FORMAT or not known:
                found = data["format"], version
                raise ValueError(
                    f"format and version must be {(_FORMAT, _VERSION)}, got {shown(found)}."
                )
            with_draws = version == _VERSION
            runs = check_list("closed", data["closed"])
            closed = tuple(_run_from_list(run, with_draws) for run in runs)
            ledger = cls(closed, _run_from_list(data["current"], with_draws))
            return replace(ledger, _drawn=ledger.draws)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"text must be JSON written by Ledger.to_json, got something else: {error} "
                "Restore the ledger from an intact checkpoint; do not start from an empty one."
            ) from error


def supposed(
    ledger: Ledger,
    noise_multiplier: NoiseMultiplier,
    sampling: SamplingScheme,
    steps: int,
    draws: Sequence[DrawsLike] = (),
) -> Ledger:
    """What a ledger would be after steps that may never be executed: for a question, not a record.

    Args:
      ledger: what was executed.
      noise_multiplier: of the steps.
      sampling: their scheme.
      steps: how many, ≥ 1.
      draws: of the first of them; the further ones go on. Whether any was drawn before is not
        looked at.

    Returns:
      A ledger to ask.

    Example:
      >>> from jaxdp.accounting import PoissonSampling
      >>> supposed(Ledger(), 1.0, PoissonSampling(0.1), steps=3).steps
      3
    """
    drawn = tuple(replace(each, count=steps) for each in check_draws(draws))
    entry = LedgerEntry(as_noise_multipliers(noise_multiplier), sampling, steps, drawn)
    return Ledger(ledger.closed, appended(ledger.current, entry))


def _run_from_list(data: object, with_draws: bool) -> tuple[Entry, ...]:
    entries = check_list("a run", data)
    return tuple(entry_from_dict(entry, with_draws=with_draws) for entry in entries)
