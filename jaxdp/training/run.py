"""What a run leaves behind, also where an exception ended it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from jaxdp.accounting import Ledger
from jaxdp.training.step import TrainState


class Run(NamedTuple):
    """What `fit` leaves behind.

    Attributes:
      state: after the last step. Of a run that an exception ended it is None where a step was
        begun and not ended: half a step is nothing to go on from, and is charged as a whole.
      ledger: what was executed, from the first step on.
      history: one dict per report: step, epoch, epsilon, delta, loss, nonfinite,
        samples_per_second, and what `evaluate` returned. Loss, nonfinite and samples_per_second
        come from raw training data and are NOT private.
      stopped_by: "steps" or "budget"; or the name of the exception, such as "KeyboardInterrupt".

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxdp import training
      >>> state = training.init(jnp.zeros(2), optax.sgd(0.1))
      >>> Run(state, Ledger(), history=[], stopped_by="steps").ledger.steps
      0
    """

    state: TrainState
    ledger: Ledger
    history: list[dict[str, Any]]
    stopped_by: str


class Due(NamedTuple):
    """A report that is to be made.

    Attributes:
      row: without what `evaluate` adds to it.
      params: that it is of.
    """

    row: dict[str, Any]
    params: Any


@dataclass
class Progress:
    """How far a run has come. It changes as the run goes on, so that an exception can carry it.

    Attributes:
      state: after the last whole step; None during a step, which consumes it.
      ledger: charged with what is, or is about to be, executed.
      history: the reports so far.
      due: a report that nobody may have seen, or None. It is saved with the state that it is of.
      done: whole steps executed.
      saved: of these, how many need not be saved any more.
    """

    state: TrainState | None
    ledger: Ledger
    history: list[dict[str, Any]]
    due: Due | None = None
    done: int = field(init=False)
    saved: int = field(init=False)

    def __post_init__(self) -> None:
        self.done = self.saved = int(self.whole.step)

    @property
    def whole(self) -> TrainState:
        """The state, where no step is under way."""
        assert self.state is not None
        return self.state


def run_of(error: BaseException) -> Run | None:
    """The run that an exception ended: what `fit` would have returned, had it ended there.

    Exceptions leave `fit` as they are, Ctrl-C included, and carry the run. Its ledger holds
    whatever may have been released: a step that was begun is charged, whatever became of it. What
    fails before, such as the compilation of the first one, is not. Where the run has a state, `fit`
    goes on from both, as from those of any other run; without one, go on from a checkpoint, or
    begin again with new keys and this ledger.

    Args:
      error: what was caught; in a notebook `sys.last_exc`.

    Returns:
      The run, or None where the exception did not come out of a run that had begun.

    Example:
      >>> run_of(ValueError("of something else")) is None
      True
    """
    return getattr(error, _ATTRIBUTE, None)


_ATTRIBUTE = "_jaxdp_run"


@contextlib.contextmanager
def kept(progress: Progress) -> Iterator[None]:
    """Lets an exception carry the run as it stands; see `run_of`."""
    try:
        yield
    except BaseException as error:
        state: Any = progress.state if can_be_read(progress.state) else None
        run = Run(state, progress.ledger, progress.history, type(error).__name__)
        with contextlib.suppress(AttributeError):  # an exception may have no room
            setattr(error, _ATTRIBUTE, run)
            error.add_note(
                f"jaxdp: {run.ledger.steps} steps are charged; state, ledger and history of the "
                "run are in jaxdp.training.run_of(error)."
            )
        raise


def can_be_read(state: TrainState | None) -> bool:
    """A step that fails on the device leaves a state that raises when it is read, and so does a
    function that was given its buffers to use."""
    if state is None or any(leaf.is_deleted() for leaf in _arrays(state)):
        return False
    try:
        jax.block_until_ready(state)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _arrays(state: TrainState) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block; pressed again, at once.

    A step that is cut off leaves neither the old state nor the new one.
    """
    handler = signal.getsignal(signal.SIGINT)
    # Only the main thread may set handlers, and it alone is interrupted.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed: list[Any] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            handler(number, frame)
        pressed.append(frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        handler(signal.SIGINT, pressed[0])
