"""Where a run begins, so that nothing that was charged is lost."""

from jaxdp.accounting import Ledger
from jaxdp.sampling import Sampler
from jaxdp.training.checkpoints import Checkpoints
from jaxdp.training.identity import check_charged
from jaxdp.training.run import Progress
from jaxdp.training.step import TrainState


def begin(
    state: TrainState,
    ledger: Ledger,
    sampler: Sampler,
    checkpoints: Checkpoints | None,
    data: str | None,
) -> Progress:
    """At the newest checkpoint, or at what `fit` was given where that is as far.

    Args:
      state: what `fit` was given.
      ledger: what the data has been charged with.
      sampler: of the run.
      checkpoints: where it may have been saved.
      data: a digest of what it trains on, where there is one.

    Returns:
      State, ledger and history to go on from. The ledger holds all that either of the two held.

    Raises:
      ValueError: a ledger misses what its state has executed; both ledgers hold draws that they
        cannot share.
    """
    saved = None if checkpoints is None else checkpoints.restore(state, sampler, data)
    done = int(state.step)
    if saved is not None and (int(saved.state.step) > done or done == 0):
        check_charged(saved.state, saved.ledger)
        return Progress(saved.state, _both(saved.ledger, ledger), saved.history)
    if done == 0:
        # What the data was charged with before is closed: a new run begins its own epochs.
        return Progress(state, Ledger().merge(ledger), [])
    check_charged(state, ledger)
    if saved is None:
        return Progress(state, ledger, [])
    if not ledger.extends(saved.ledger):
        raise ValueError(
            f"ledger must hold what the checkpoint of step {int(saved.state.step)} was charged "
            "with, got one that does not extend it. Pass ledger=run.ledger with run.state, or "
            "another directory."
        )
    return Progress(state, ledger, saved.history)


def _both(saved: Ledger, given: Ledger) -> Ledger:
    """What was saved, and what else the data was charged with since.

    A script that is started again states again what it stated the first time: that is no other
    release. What it states beyond that is one. Of a release that it made once more, with other
    random numbers, the draws tell.
    """
    if saved.extends(given):
        return saved
    if given.extends(saved):
        return given
    return saved.merge(given)
