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

import json
from collections.abc import Mapping
from dataclasses import dataclass

import dp_accounting

from jaxdp.accounting.calibration import check_epsilon, largest_count
from jaxdp.accounting.checks import check_integer, check_keys, check_real
from jaxdp.accounting.composition import (
    AccountantName,
    RelationName,
    as_question,
    check_delta,
    delta_of,
    epsilon_of,
)
from jaxdp.accounting.mechanisms import Mechanism, Release, events_of, mechanisms_of
from jaxdp.accounting.pure import PureRelease
from jaxdp.accounting.schemes import (
    NoiseMultiplier,
    PoissonSampling,
    SamplingScheme,
    as_noise_multipliers,
    check_scheme,
    combined_noise_multiplier,
    scheme_from_dict,
)

_FORMAT = "jaxdp.ledger"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Consecutive equal steps of one run.

    Args:
        noise_multipliers: one σ_k ≥ 0 for each Gaussian that a step released from its batch; they
            count as one Gaussian with (Σ σ_k⁻²)^(-1/2).
        sampling: the scheme that really drew the batches.
        steps: how many such steps were executed, ≥ 1.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range.

    Example:
        >>> from jaxdp.accounting import PoissonSampling
        >>> LedgerEntry((1.0,), PoissonSampling(0.1), steps=5).steps
        5
    """

    noise_multipliers: tuple[float, ...]
    sampling: SamplingScheme
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multipliers", as_noise_multipliers(self.noise_multipliers))
        check_scheme(self.sampling)
        advice = "Leave out what was not executed."
        object.__setattr__(
            self, "steps", check_integer("steps", self.steps, minimum=1, advice=advice)
        )


Entry = LedgerEntry | PureRelease
"""What a ledger holds: steps, and what was released beside them."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """An append-only, immutable record of executed steps, and of pure releases beside them.

    Only what is public enters: noise multipliers, schemes and counts, never a realised batch size.

    Privacy notes:
        * Equal (σ, scheme) steps are grouped before composing; for Poisson and fixed-size sampling
          the order does not matter. Shuffled steps are counted per epoch, in order.
        * When a scheme saw more than 32 distinct noise multipliers (a noise schedule), each is
          rounded DOWN to a power of 2^(1/32). That only overstates epsilon, by a few percent.
          `dp_event()` stays exact.
        * Answers are cached, and so is the composed past of the last answer.

    Args:
        closed: finished runs on the same data, each in order of execution; filled by `merge`.
        current: the run that `charge` continues.

    Example:
        >>> from jaxdp.accounting import PoissonSampling
        >>> Ledger().charge([2.0, 3.0], PoissonSampling(0.04), steps=10).steps
        10
    """

    closed: tuple[tuple[Entry, ...], ...] = ()
    current: tuple[Entry, ...] = ()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Everything executed: the closed runs first, then the current one.

        Returns:
            The entries; consecutive equal steps of one run share an entry, each pure release has
            its own.

        Example:
            >>> Ledger().entries
            ()
        """
        return (*(entry for run in self.closed for entry in run), *self.current)

    @property
    def steps(self) -> int:
        """The number of executed steps over all runs; a pure release is none.

        Returns:
            A count ≥ 0.

        Example:
            >>> Ledger().charge_pure(0.1).steps
            0
        """
        return sum(entry.steps for entry in self.entries if isinstance(entry, LedgerEntry))

    def charge(
        self, noise_multiplier: NoiseMultiplier, sampling: SamplingScheme, steps: int = 1
    ) -> "Ledger":
        """Returns a ledger with `steps` more executed steps.

        Args:
            noise_multiplier: σ ≥ 0, noise std / clip norm, or one for each Gaussian that a step
                releases from the same batch.
            sampling: the scheme that really drew the batches.
            steps: how many steps, ≥ 0.

        Returns:
            The longer ledger; this one is unchanged.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of range.

        Example:
            >>> from jaxdp.accounting import PoissonSampling
            >>> Ledger().charge(1.0, PoissonSampling(0.1), steps=2).steps
            2
        """
        advice = "Pass the number of executed steps."
        if check_integer("steps", steps, minimum=0, advice=advice) == 0:
            as_noise_multipliers(noise_multiplier)
            check_scheme(sampling)
            return self
        entry = LedgerEntry(as_noise_multipliers(noise_multiplier), sampling, steps)
        return Ledger(self.closed, _appended(self.current, entry))

    def charge_pure(self, epsilon: float, sampling: PoissonSampling | None = None) -> "Ledger":
        """Returns a ledger with one more release that is (ε, 0)-differentially private.

        For what is no Gaussian of a step: a threshold from `lipschitz.select_clip_value`, a
        Laplace count, a choice by the exponential mechanism.

        Args:
            epsilon: ε > 0, of adding or removing one example, before any sampling.
            sampling: None if the whole data set was looked at; Poisson sampling if a draw was,
                made afresh for this release alone (see `PureRelease`).

        Returns:
            The longer ledger; this one is unchanged.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: ε is not positive and finite.

        Example:
            >>> round(Ledger().charge_pure(0.5).delta(0.2), 4)
            0.1613
        """
        return Ledger(self.closed, (*self.current, PureRelease(epsilon, sampling)))

    def merge(self, other: "Ledger") -> "Ledger":
        """Returns the record of both ledgers' runs on the same data: their composition.

        Args:
            other: the ledger of another run. It is closed: its epochs end where it ended.

        Returns:
            A ledger whose later charges continue this ledger's run.

        Raises:
            TypeError: `other` is no ledger.

        Example:
            >>> from jaxdp.accounting import PoissonSampling
            >>> one = Ledger().charge(1.0, PoissonSampling(0.1))
            >>> one.merge(one).steps
            2
        """
        if not isinstance(other, Ledger):
            raise TypeError(f"other must be a Ledger, got {other!r}. Read it with from_json.")
        finished = (other.current,) if other.current else ()
        return Ledger((*self.closed, *other.closed, *finished), self.current)

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
        return events_of(self._mechanisms())

    def epsilon(
        self,
        delta: float,
        *,
        accountant: AccountantName = "pld",
        neighboring_relation: RelationName = "add_or_remove_one",
    ) -> float:
        """The ε spent so far, at a given δ.

        Args:
            delta: δ in (0, 1).
            accountant: "pld" or "rdp".
            neighboring_relation: "add_or_remove_one" or "replace_one".

        Returns:
            ε ≥ 0: 0.0 for an empty ledger, `math.inf` if a step had no noise.

        Raises:
            TypeError: δ is no number.
            ValueError: an argument is out of range, or dp-accounting does not support the
                combination.

        Source: see `jaxdp.accounting.epsilon`.

        Example:
            >>> Ledger().epsilon(1e-5)
            0.0
        """
        question = as_question(accountant, neighboring_relation)
        return epsilon_of(self._mechanisms(), check_delta(delta), question)

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
        return delta_of(self._mechanisms(), target, question)

    def steps_left(
        self,
        noise_multiplier: NoiseMultiplier,
        sampling: SamplingScheme,
        *,
        epsilon: float,
        delta: float,
        accountant: AccountantName = "pld",
        neighboring_relation: RelationName = "add_or_remove_one",
        at_most: int = 10_000_000,
    ) -> int:
        """How many more steps of one kind fit into a privacy budget.

        n* = max {n : self.charge(noise_multiplier, sampling, n).epsilon(δ) ≤ ε}. The past is
        composed once; only the added count is searched.

        Args:
            noise_multiplier: σ ≥ 0 of the steps to come, or one for each release of a step.
            sampling: how their batches will be drawn.
            epsilon: the whole budget ε > 0, of which this ledger may have spent a part.
            delta: δ in (0, 1).
            accountant: "pld" or "rdp".
            neighboring_relation: "add_or_remove_one" or "replace_one".
            at_most: the largest answer of interest, ≥ 0.

        Returns:
            n*, exactly: n* fits and n* + 1 does not. 0 also if the past alone exceeds the budget,
            `at_most` if n* is larger.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of range, or dp-accounting does not support the
                combination.

        Example:
            >>> from jaxdp.accounting import PoissonSampling
            >>> spent = Ledger().charge(1.1, PoissonSampling(0.04), steps=100)
            >>> soon = PoissonSampling(0.02)
            >>> spent.steps_left(1.1, soon, epsilon=3.0, delta=1e-5, accountant="rdp")
            176
        """
        target, delta = check_epsilon(epsilon), check_delta(delta)
        at_most = check_integer("at_most", at_most, minimum=0, advice="Pass a number of steps.")
        question = as_question(accountant, neighboring_relation)

        def epsilon_after(steps: int) -> float:
            longer = self.charge(noise_multiplier, sampling, steps)
            return epsilon_of(longer._mechanisms(), delta, question)

        return largest_count(epsilon_after, target, at_most)

    def to_json(self) -> str:
        """Returns the ledger as versioned JSON; floats survive exactly.

        Returns:
            A string for `from_json`.

        Example:
            >>> Ledger().to_json()
            '{"format": "jaxdp.ledger", "version": 1, "closed": [], "current": []}'
        """
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "closed": [[_entry_to_dict(entry) for entry in run] for run in self.closed],
                "current": [_entry_to_dict(entry) for entry in self.current],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        """Rebuilds the ledger that `to_json` wrote.

        Args:
            text: the JSON string.

        Returns:
            An equal ledger.

        Raises:
            ValueError: the text is no JSON, of another format or version, or any field is missing,
                unknown or out of range. A damaged ledger is never read in part.

        Example:
            >>> Ledger.from_json(Ledger().to_json()) == Ledger()
            True
        """
        try:
            data = json.loads(text)
            found = data.get("format"), data.get("version")
            if found != (_FORMAT, _VERSION) or isinstance(found[1], bool):
                raise ValueError(f"format and version must be {(_FORMAT, _VERSION)}, got {found}.")
            data = check_keys("ledger", data, {"format", "version", "closed", "current"})
            closed = tuple(_run_from_list(run) for run in _checked_list(data["closed"]))
            return cls(closed, _run_from_list(data["current"]))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"text must be JSON written by Ledger.to_json, got something else: {error} "
                "Restore the ledger from an intact checkpoint; do not start from an empty one."
            ) from error

    def _mechanisms(self) -> tuple[Mechanism, ...]:
        runs = [*self.closed, self.current]
        return mechanisms_of([[_release_of(entry) for entry in run] for run in runs])


def _release_of(entry: Entry) -> Release | PureRelease:
    if isinstance(entry, PureRelease):
        return entry
    sigma = combined_noise_multiplier(entry.noise_multipliers)
    return Release(sigma, entry.sampling, entry.steps)


def _appended(run: tuple[Entry, ...], entry: LedgerEntry) -> tuple[Entry, ...]:
    last = run[-1] if run else None
    if isinstance(last, LedgerEntry) and (last.noise_multipliers, last.sampling) == (
        entry.noise_multipliers,
        entry.sampling,
    ):
        steps = last.steps + entry.steps
        return (*run[:-1], LedgerEntry(entry.noise_multipliers, entry.sampling, steps))
    return (*run, entry)


def _entry_to_dict(entry: Entry) -> dict[str, object]:
    if isinstance(entry, PureRelease):
        sampling = None if entry.sampling is None else entry.sampling.to_dict()
        return {"epsilon": entry.epsilon, "sampling": sampling}
    return {
        "noise_multipliers": list(entry.noise_multipliers),
        "sampling": entry.sampling.to_dict(),
        "steps": entry.steps,
    }


def _entry_from_dict(data: object) -> Entry:
    # Each kind of entry has keys of its own, so that a reader refuses a kind that it does not know.
    if isinstance(data, Mapping) and "epsilon" in data:
        fields = check_keys("pure release", data, {"epsilon", "sampling"})
        sampling = fields["sampling"]
        return PureRelease(
            fields["epsilon"],  # pyright: ignore[reportArgumentType]  # it checks its fields
            None if sampling is None else scheme_from_dict(sampling),  # pyright: ignore[reportArgumentType]
        )
    fields: Mapping[str, object] = check_keys(
        "ledger entry", data, {"noise_multipliers", "sampling", "steps"}
    )
    return LedgerEntry(
        tuple(_checked_list(fields["noise_multipliers"])),
        scheme_from_dict(fields["sampling"]),
        fields["steps"],  # pyright: ignore[reportArgumentType]  # the entry checks its fields
    )


def _run_from_list(data: object) -> tuple[Entry, ...]:
    return tuple(_entry_from_dict(entry) for entry in _checked_list(data))


def _checked_list(data: object) -> list:
    if not isinstance(data, list):
        raise ValueError(f"a run must be a JSON list, got {data!r}.")
    return data
