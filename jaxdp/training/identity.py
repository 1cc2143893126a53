"""Which random numbers a step is made of, and whether a ledger knows those of a state."""

import math
from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np

from jaxdp.accounting import Draws, Ledger, LedgerEntry, combined_noise_multiplier
from jaxdp.accounting.draws import check_draws, joined
from jaxdp.accounting.mechanisms.base import Entry
from jaxdp.released import executed_noise_multipliers, noise_draws
from jaxdp.sampling import Sampler
from jaxdp.training.step import TrainState

_WHAT_NEXT = "Pass ledger=run.ledger with run.state."


def step_draws(
    noise: Sequence[tuple[str, str, int]], sampler: Sampler, step: int
) -> tuple[Draws, ...]:
    """The draws of the coming step: of every noised release, by its own counter, and of its batch.

    A run that goes on never repeats one. An optimizer that is initialised anew does, and so do two
    runs with one chain, or with one sampler: their ledger refuses it.

    Args:
      noise: purpose, fingerprint and step of every noised release, as `noise_draws` tells them.
      sampler: draws the batch.
      step: logical step.

    Returns:
      What `Ledger.charge` takes.
    """
    return check_draws((*noise, *sampler.draws(step)))


def same_noise(one: float, two: float) -> bool:
    """Whether two noise multipliers are one: two programs may round a schedule differently."""
    return math.isclose(one, two, rel_tol=1e-5)


def check_charged(state: TrainState, ledger: Ledger, sampler: Sampler) -> None:
    """Raises ValueError unless a ledger holds the steps that a state has executed, and no others.

    They are counted, and those of every stream of noise are looked up. Steps that were charged by
    hand say nothing of their noise: they may be those that are missing, as long as nothing says
    that they are others; see `_by_hand`.

    Args:
      state: after its steps.
      ledger: what is said to hold them.
      sampler: draws the steps that follow.
    """
    done = int(state.step)
    if ledger.steps < done:
        raise ValueError(
            f"ledger must hold every step that was executed, got {ledger.steps} steps for a state "
            f"after {done}. {_WHAT_NEXT}"
        )
    for purpose, fingerprint, drawn in noise_draws(state.opt_state):
        stream = purpose, fingerprint
        known = [each for each in ledger.draws if each.stream == stream]
        # A state that is behind its ledger is to draw again what was drawn.
        if (end := max((each.end for each in known), default=0)) > drawn:
            joined(ledger.draws, [Draws(*stream, drawn, end - drawn)])
        # Beyond the steps of the run: an optimizer that has trained on other data before.
        first = max(drawn - done, 0)
        held = sum(max(each.end - max(each.first, first), 0) for each in known)
        missing = drawn - first - held
        in_front = all(each.first >= first + missing for each in known if each.end > first)
        if missing and not (in_front and missing == _by_hand(state, ledger, sampler, stream)):
            raise _missing(ledger, purpose, held, drawn - first)


def _missing(ledger: Ledger, purpose: str, held: int, drawn: int) -> ValueError:
    by_hand = ""
    if _steps_without_draws(ledger.entries):
        by_hand = (
            " Steps that were charged by hand pass for these only if they are as many, begin the "
            "last run of the ledger, and have the noise and the sampling of this one."
        )
    return ValueError(
        f"ledger must hold every step that was executed, got {held} of the {drawn} draws of "
        f"{purpose!r} that the state has behind it.{by_hand} {_WHAT_NEXT}"
    )


def _by_hand(state: TrainState, ledger: Ledger, sampler: Sampler, stream: tuple[str, str]) -> int:
    """How many steps charged by hand may be the first ones of a state; 0 where they must be others.

    Only the run that goes on can hold them, in front of all that says what it drew: what was
    charged before another run is another's. Steps behind them are of this stream and of the same
    scheme. Where there are none yet, the scheme is that of the sampler, and the last of them has
    the noise that the state still tells of.
    """
    steps = [entry for entry in ledger.current if isinstance(entry, LedgerEntry)]
    first = list(takewhile(lambda entry: not entry.draws, steps))
    if not first:
        return 0
    if behind := steps[len(first) :]:
        fits = any(each.stream == stream for each in behind[0].draws)
    else:
        fits = _is_noise_of(state, first[-1])
    scheme = behind[0].sampling if behind else sampler.scheme
    same = all(entry.sampling == scheme for entry in first)
    return _steps_without_draws(first) if fits and same else 0


def _is_noise_of(state: TrainState, entry: LedgerEntry) -> bool:
    """Whether the last step of a state had the noise of an entry, taken together."""
    told = executed_noise_multipliers(state.opt_state)
    executed = [sigma for each in told for sigma in np.ravel(each).tolist()]
    if not all(sigma >= 0 for sigma in executed):  # NaN, before the first step
        return False
    both = (combined_noise_multiplier(each) for each in (executed, entry.noise_multipliers))
    return same_noise(*both)


def _steps_without_draws(entries: Iterable[Entry]) -> int:
    steps = [entry for entry in entries if isinstance(entry, LedgerEntry)]
    return sum(entry.steps for entry in steps if not entry.draws)
