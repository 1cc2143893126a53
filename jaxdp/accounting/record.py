"""The record of what was executed: runs of steps, pure releases, and what they were drawn from.

Example:
  >>> from jaxdp.accounting.schemes import PoissonSampling
  >>> record = Record().charge(1.1, PoissonSampling(0.04), steps=2).charge_pure(0.1)
  >>> record.entries[-1], record.steps
  (PureRelease(epsilon=0.1, sampling=None), 2)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from jaxdp.accounting.draws import Draws, DrawsLike, check_draws, joined
from jaxdp.accounting.entries import appended, begins_with
from jaxdp.accounting.mechanisms.base import Entry
from jaxdp.accounting.mechanisms.gaussian import LedgerEntry
from jaxdp.accounting.mechanisms.pure import PureRelease
from jaxdp.accounting.schemes import (
    NoiseMultiplier,
    PoissonSampling,
    SamplingScheme,
    as_noise_multipliers,
    check_scheme,
)
from jaxdp.checks import check_instance, check_integer


@dataclass(frozen=True, slots=True)
class Record:
    """An append-only, immutable record of runs on one data set; `Ledger` answers for it.

    Args:
      closed: finished runs, each in order of execution; filled by `merge`.
      current: the run that `charge` continues.

    Raises:
      ValueError: (when charged or merged) a step of a stream was drawn twice.

    Example:
      >>> Record().entries
      ()
    """

    closed: tuple[tuple[Entry, ...], ...] = ()
    current: tuple[Entry, ...] = ()
    _drawn: tuple[Draws, ...] | None = field(default=None, compare=False, repr=False)

    @property
    def draws(self) -> tuple[Draws, ...]:
        """Which steps of which streams of random numbers were used, as far as it was noted.

        Returns:
          Sorted, and joined where they are contiguous.

        Example:
          >>> from jaxdp.accounting import PoissonSampling
          >>> drawn = [Draws("batches", "5eed", first=0, count=2)]
          >>> Record().charge(1.0, PoissonSampling(0.1), steps=2, draws=drawn).draws
          (Draws(purpose='batches', fingerprint='5eed', first=0, count=2),)
        """
        # Handed on from charge to charge: to join them anew at every step would take the square.
        if self._drawn is not None:
            return self._drawn
        return joined((), (each for entry in self.entries for each in entry.draws))

    @property
    def runs(self) -> tuple[tuple[Entry, ...], ...]:
        """Every run, each in order of execution: the closed ones first, then the current one.

        Returns:
          The entries of each run.

        Example:
          >>> Record().charge_pure(0.5).runs
          ((PureRelease(epsilon=0.5, sampling=None),),)
        """
        return (*self.closed, self.current)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Everything executed: the closed runs first, then the current one.

        Returns:
          The entries; consecutive equal steps of one run share an entry, each pure release has
          its own.

        Example:
          >>> Record().entries
          ()
        """
        return tuple(entry for run in self.runs for entry in run)

    @property
    def steps(self) -> int:
        """The number of executed steps over all runs; a pure release is none.

        Returns:
          A count ≥ 0.

        Example:
          >>> Record().charge_pure(0.1).steps
          0
        """
        return sum(entry.steps for entry in self.entries if isinstance(entry, LedgerEntry))

    def charge(
        self,
        noise_multiplier: NoiseMultiplier,
        sampling: SamplingScheme,
        steps: int = 1,
        draws: Sequence[DrawsLike] = (),
    ) -> Self:
        """Returns a ledger with `steps` more executed steps.

        Args:
          noise_multiplier: σ ≥ 0, noise std / clip norm, or one for each Gaussian that a step
            releases from the same batch; `jaxdp.executed_noise_multipliers(state)` does.
          sampling: the scheme that really drew the batches.
          steps: how many steps, ≥ 0.
          draws: the random numbers that the steps are made of: `sampler.draws(step)`, and
            `jaxdp.noise_draws(opt_state)` of the state before the first of them. For shuffled
            epochs they also tell where in an epoch the steps lie. Without them, steps begin
            with an epoch, or go on with the equal steps right before them.

        Returns:
          The longer ledger; this one is unchanged.

        Raises:
          TypeError: an argument has the wrong type.
          ValueError: an argument is out of range; a step of a stream was drawn before.

        Example:
          >>> from jaxdp.accounting import PoissonSampling
          >>> Record().charge(1.0, PoissonSampling(0.1), steps=2).steps
          2
        """
        advice = "Pass the number of executed steps."
        steps = check_integer("steps", steps, minimum=0, advice=advice)
        if steps == 0:
            as_noise_multipliers(noise_multiplier)
            check_scheme(sampling)
            check_draws(draws)
            return self
        entry = LedgerEntry(as_noise_multipliers(noise_multiplier), sampling, steps, draws)  # pyright: ignore[reportArgumentType]  # it checks its fields
        return self._with(entry)

    def charge_pure(
        self,
        epsilon: float,
        sampling: PoissonSampling | None = None,
        draws: Sequence[DrawsLike] = (),
    ) -> Self:
        """Returns a ledger with one more release that is (ε, 0)-differentially private.

        For what is no Gaussian of a step: a threshold from `lipschitz.select_clip_value`, a
        Laplace count, a choice by the exponential mechanism.

        Args:
          epsilon: ε > 0, of adding or removing one example, before any sampling.
          sampling: None if the whole data set was looked at; Poisson sampling if a draw was,
            made afresh for this release alone (see `PureRelease`).
          draws: the random numbers that it was made of, such as those of
            `lipschitz.selection_draws(key, step)`.

        Returns:
          The longer ledger; this one is unchanged.

        Raises:
          TypeError: an argument has the wrong type.
          ValueError: ε is not positive and finite; a step of a stream was drawn before.

        Example:
          >>> Record().charge_pure(0.5).steps
          0
        """
        entry = PureRelease(epsilon, sampling, draws)  # pyright: ignore[reportArgumentType]  # as above
        return self._with(entry)

    def merge(self, other: "Record") -> Self:
        """Returns the record of both ledgers' runs on the same data: their composition.

        Both must have been charged apart. Ledgers that share a past hold it twice: where draws
        were noted that is refused, where they were not it counts twice.

        Args:
          other: the ledger of another run. It is closed: its epochs end where it ended.

        Returns:
          A ledger whose later charges continue this ledger's run.

        Raises:
          TypeError: `other` is no ledger.
          ValueError: a step of a stream was drawn by both.

        Example:
          >>> from jaxdp.accounting import PoissonSampling
          >>> one, other = (Record().charge(1.0, PoissonSampling(q)) for q in (0.1, 0.2))
          >>> one.merge(other).steps
          2
          >>> drawn = Record().charge_pure(0.5, draws=[Draws("selection", "5eed", first=0)])
          >>> drawn.merge(drawn)
          Traceback (most recent call last):
          ValueError: draws must be new to the ledger, got step 0 of 'selection' (fingerprint
          5eed) a second time, so that the two releases are not independent. Charge one run after
          ...
        """
        check_instance("other", other, type(self), advice="Read it with from_json.")
        finished = (other.current,) if other.current else ()
        advice = (
            "Charge one run after the other, each with a key and a sampler seed of its own, and "
            "give the later one the ledger of the earlier."
        )
        drawn = joined(self.draws, other.draws, advice)
        return type(self)((*self.closed, *other.closed, *finished), self.current, drawn)

    def extends(self, other: "Record") -> bool:
        """Whether everything that another ledger holds is held here, as the same record.

        Every run of the other one is a run of this ledger, or its last run is the beginning of
        this ledger's. Runs are the same where their entries and draws are; what was charged
        without draws is recognised by its numbers alone.

        Args:
          other: an earlier state of this ledger, or another one.

        Returns:
          Whether nothing would be forgotten if this ledger took the place of the other.

        Raises:
          TypeError: `other` is no ledger.

        Example:
          >>> from jaxdp.accounting import PoissonSampling
          >>> before = Record().charge_pure(0.5)
          >>> run = Record().merge(before).charge(1.0, PoissonSampling(0.1))
          >>> run.extends(before), before.extends(run)
          (True, False)
        """
        check_instance("other", other, type(self), advice="Read it with from_json.")
        runs = Counter(self.closed)
        runs.subtract(other.closed)
        if min(runs.values(), default=0) < 0:
            return False
        return runs[other.current] > 0 or begins_with(self.current, other.current)

    def _with(self, entry: Entry) -> Self:
        drawn = joined(self.draws, entry.draws)
        return type(self)(self.closed, appended(self.current, entry), drawn)
