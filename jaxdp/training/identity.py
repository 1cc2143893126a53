"""Which random numbers a step is made of, and whether a ledger knows those of a state."""

from collections.abc import Sequence

from jaxdp.accounting import Draws, Ledger, LedgerEntry
from jaxdp.accounting.draws import check_draws
from jaxdp.released import noise_draws
from jaxdp.sampling import Sampler
from jaxdp.training.step import TrainState


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


def check_charged(state: TrainState, ledger: Ledger) -> None:
    """Raises ValueError unless a ledger holds the steps that a state has executed.

    They are counted, and those of every stream of noise are looked up. Steps that were charged by
    hand say nothing of their noise: they may be those that are missing.

    Args:
      state: after its steps.
      ledger: what is said to hold them.
    """
    done = int(state.step)
    advice = "Pass ledger=run.ledger with run.state."
    if ledger.steps < done:
        raise ValueError(
            f"ledger must hold every step that was executed, got {ledger.steps} steps for a state "
            f"after {done}. {advice}"
        )
    steps = [entry for entry in ledger.entries if isinstance(entry, LedgerEntry)]
    by_hand = sum(entry.steps for entry in steps if not entry.draws)
    for purpose, fingerprint, drawn in noise_draws(state.opt_state):
        # Beyond the steps of the run: an optimizer that has trained on other data before.
        first = max(drawn - done, 0)
        known = [each for each in ledger.draws if each.stream == (purpose, fingerprint)]
        held = sum(max(min(each.end, drawn) - max(each.first, first), 0) for each in known)
        if held + by_hand < drawn - first:
            raise ValueError(
                f"ledger must hold every step that was executed, got {held} of the "
                f"{drawn - first} draws of {purpose!r} that the state has behind it. {advice}"
            )
