"""Where a run begins, so that nothing that was charged is lost."""

from jaxdp.accounting import Ledger
from jaxdp.accounting.union import united
from jaxdp.gathering import check_between_batches
from jaxdp.sampling import Sampler
from jaxdp.training.checkpoints import Checkpoints, Saved
from jaxdp.training.identity import check_charged
from jaxdp.training.run import Due, Progress
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
      Where it holds more than the saved one, the run is to be saved before it goes on.

    Raises:
      ValueError: a state is amid a logical batch; a ledger misses what its state has executed, or
        holds draws that the state is yet to make; both ledgers hold draws that they cannot share,
        or something of which nobody can tell whether they share it.
    """
    check_between_batches(state.opt_state)
    saved = None if checkpoints is None else checkpoints.restore(state, sampler, data)
    run = _begun(state, ledger, saved)
    if run.done:
        check_charged(run.whole, run.ledger, sampler)
    known = Ledger() if saved is None else saved.ledger
    if run.ledger != known:
        run.saved -= 1
    return run


def _begun(state: TrainState, ledger: Ledger, saved: Saved | None) -> Progress:
    done = int(state.step)
    if saved is None:
        # What the data was charged with before is closed: a new run begins its own epochs.
        return Progress(state, ledger if done else Ledger().merge(ledger), [])
    due = None if saved.report is None else Due(saved.report, saved.state.params)
    if int(saved.state.step) > done or done == 0:
        return Progress(saved.state, united(saved.ledger, ledger), saved.history, due)
    if not ledger.extends(saved.ledger):
        raise ValueError(
            f"ledger must hold what the checkpoint of step {int(saved.state.step)} was charged "
            "with, got one that does not extend it. Pass ledger=run.ledger with run.state, or "
            "another directory."
        )
    return Progress(state, ledger, saved.history, due)
