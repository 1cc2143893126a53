"""A run that an exception ends leaves state, ledger and history, charged for all it released."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.core import Tracer

import jaxdp
from jaxdp import training
from jaxdp.accounting import Ledger
from tests.training import small
from tests.training.small import DATA, chain, fit, poisson, step_of


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """A shell's background job ignores Ctrl-C, and so would the tests in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Fails:
    """Does as told at its n-th call."""

    def __init__(self, at: int, action: Callable[[], Any]):
        self.left, self.action = at, action

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            self.action()


def broken() -> None:
    raise OSError("the disk is full")


def interrupt() -> None:
    """As the terminal does."""
    os.kill(os.getpid(), signal.SIGINT)


def caught(error: type[BaseException], **options: Any) -> Any:
    with pytest.raises(error) as found:
        fit(**options)
    run = training.run_of(found.value)
    assert run is not None and run.stopped_by == error.__name__
    notes = "\n".join(found.value.__notes__)
    assert f"{run.ledger.steps} steps are charged" in notes and "run_of(error)" in notes
    return run


def in_evaluate(fails: Fails) -> dict[str, Any]:
    def evaluate(params: Any) -> dict[str, float]:
        fails()
        return {}

    return {"evaluate": evaluate}


def in_data(fails: Fails) -> dict[str, Any]:
    def rows(indices: np.ndarray) -> np.ndarray:
        fails()
        return DATA[indices]

    return {"data": rows}


# Where it fails -> the options of `fit`.
PLACES: dict[str, Callable[[Fails], dict[str, Any]]] = {
    "evaluate": in_evaluate,
    "log": lambda fails: {"log_fn": fails},
    "data": in_data,
}


@pytest.mark.parametrize("action", [broken, interrupt], ids=["exception", "Ctrl-C"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_what_was_reached_can_be_continued(place: str, at: int, action: Callable[[], None]) -> None:
    error = OSError if action is broken else KeyboardInterrupt
    at = at if place != "data" else 5 * at
    run = caught(error, steps=8, **PLACES[place](Fails(at, action)))
    assert run.ledger.steps == int(run.state.step)
    whole = fit(steps=8)
    assert [row["step"] for row in run.history] == [
        row["step"] for row in whole.history[: len(run.history)]
    ]
    more = fit(state=run.state, ledger=run.ledger, steps=8)
    assert more.ledger == whole.ledger
    np.testing.assert_array_equal(more.state.params, whole.state.params)


def with_run(replaced: Callable[..., Any]) -> training.Step:
    return step_of(chain())._replace(run=replaced)


@pytest.mark.parametrize("executed", [0, 3])
@pytest.mark.parametrize("action", [broken, interrupt], ids=["exception", "Ctrl-C"])
def test_a_step_that_cannot_be_compiled_is_not_charged(
    executed: int, action: Callable[[], None]
) -> None:
    """What raises while it is traced, as a loss that does not fit, or somebody impatient."""
    before = fit(steps=executed)
    true = step_of(chain())

    def traced(*arguments: Any) -> Any:
        action()
        return true.run(*arguments)

    error = OSError if action is broken else KeyboardInterrupt
    options: dict[str, Any] = {"ledger": before.ledger, "steps": 8}
    left = caught(error, state=before.state, step=with_run(jax.jit(traced)), **options)
    assert left.ledger == before.ledger and int(left.state.step) == executed
    more = fit(state=left.state, ledger=left.ledger, steps=8)
    small.assert_same(more._replace(history=[]), fit(steps=8)._replace(history=[]))


@pytest.mark.anew
def test_to_compile_ahead_of_the_charge_compiles_nothing_twice() -> None:
    true, count = step_of(chain()), [0]

    def traced(*arguments: Any) -> Any:
        count[0] += 1
        return true.run(*arguments)

    step: Any = jax.jit(traced, donate_argnums=0)
    fit(steps=6, step=with_run(step))
    assert count == [1] and step._cache_size() == 1


def eager(true: Any, fails: Fails) -> Callable[..., Any]:
    """Runs operation by operation, and raises behind the release."""

    def run(*arguments: Any) -> Any:
        with jax.disable_jit():
            found = true.run(*arguments)
        fails()
        return found

    return run


def copying(true: Any, fails: Fails) -> Callable[..., Any]:
    """Keeps the state that it is given, and raises behind the release."""

    def run(state: Any, *arguments: Any) -> Any:
        found = true.run(jax.tree.map(jnp.copy, state), *arguments)
        fails()
        return found

    return run


def seen_to_fail(true: Any, fails: Fails) -> Callable[..., Any]:
    """Nothing of it has run, but who is to tell?"""

    def run(*arguments: Any) -> Any:
        fails()
        return true.run(*arguments)

    return run


@pytest.mark.parametrize("kind", [eager, copying, seen_to_fail])
def test_a_step_that_was_begun_is_charged_though_its_state_is_still_there(kind: Any) -> None:
    sampler, true = poisson(physical_batch_size=24), step_of(chain())
    step = with_run(kind(true, Fails(3, broken)))
    left = caught(OSError, sampler=sampler, steps=8, step=step)
    assert left.state is None and left.ledger.steps == 3
    assert [row["step"] for row in left.history] == [2]
    # And its noise is not drawn again on this ledger.
    with pytest.raises(ValueError, match="draws must be new to the ledger"):
        fit(sampler=poisson(2, physical_batch_size=24), ledger=left.ledger)


def test_a_run_without_jit_is_charged_for_all_that_it_executed() -> None:
    """There, a loss or a transformation may raise behind the noise."""
    released: list[Any] = []
    fails = Fails(3, broken)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if not isinstance(updates, Tracer):
            released.append(updates)
            fails()
        return updates, state

    noise = jaxdp.add_noise(2.0, jax.random.key(0))
    seen = optax.GradientTransformation(lambda params: (), update)
    behind = optax.chain(noise, seen, optax.sgd(0.1))
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(behind))
    sampler = poisson(physical_batch_size=24)
    with jax.disable_jit():
        step = training.make_step(jaxdp.per_sample_grads(small.loss_fn), tx)
        left = caught(OSError, state=small.start(tx), sampler=sampler, step=step)
    assert left.state is None and left.ledger.steps == len(released) == 3


def test_a_step_that_ran_is_charged_whatever_became_of_it() -> None:
    fails, true = Fails(3, broken), step_of(chain())

    def run(*arguments: Any) -> Any:
        found = true.run(*arguments)
        fails()
        return found

    left = caught(OSError, sampler=poisson(physical_batch_size=24), steps=12, step=with_run(run))
    assert left.state is None and left.ledger.steps == 3
    assert [row["step"] for row in left.history] == [2]


def test_half_a_logical_batch_is_no_state_to_go_on_from() -> None:
    """Its sum would be added to once more: every example of the first half counts twice."""
    sampler = poisson()
    parts = [len(sampler.draw(step)) for step in range(8)]
    step = next(step for step, count in enumerate(parts) if count > 1)
    fails, true = Fails(sum(parts[:step]) + 2, broken), step_of(chain())

    def run(*arguments: Any) -> Any:
        fails()
        return true.run(*arguments)

    left = caught(OSError, sampler=sampler, steps=8, step=with_run(run))
    assert left.state is None and left.ledger.steps == step + 1


def amid_a_batch(adaptive: int = -1) -> training.TrainState:
    """A state of a loop of one's own, behind the first of several physical batches."""
    tx, sampler = chain(adaptive=adaptive), poisson()
    first = next(parts[0] for step in range(8) if len(parts := sampler.draw(step)) > 1)
    assert not first.is_last
    begun, _ = step_of(tx).run(small.start(tx), DATA[first.indices], first.mask, False)
    return begun


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("adaptive", "named"), [(-1, "in Acc"), (5, "in ClipAdaptiveState, Acc")])
def test_a_state_amid_a_logical_batch_is_no_state_to_begin_from(
    steps: int, adaptive: int, named: str
) -> None:
    """The next step would add its whole batch on top: one sample contributes twice."""
    seen: list[Any] = []
    with pytest.raises(ValueError, match=f"between two logical batches, got raw sums .*{named}"):
        fit(
            chain(adaptive=adaptive),
            state=amid_a_batch(adaptive),
            steps=steps,
            evaluate=seen.append,
            data=lambda indices: seen.append(indices),
        )
    assert not seen


def test_a_state_amid_a_logical_batch_is_not_saved(tmp_path: Path) -> None:
    """Its sums are raw, and so would be the file."""
    store = training.Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="between two logical batches, got raw sums"):
        store.save(amid_a_batch(), Ledger(), poisson(), [])
    assert store.restore(small.start(chain()), poisson()) is None
    store.close()


def test_a_state_amid_a_logical_batch_is_not_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that an earlier jaxdp saved."""
    store = training.Checkpoints(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("jaxdp.training.checkpoints.check_between_batches", lambda state: None)
        store.save(amid_a_batch(), Ledger(), poisson(), [])
    with pytest.raises(ValueError, match=r"is damaged \(it was saved amid a logical batch, whose"):
        fit(checkpoints=store)
    store.close()


def test_ctrl_c_waits_for_the_end_of_a_step() -> None:
    """Between a state that is consumed and the one that takes its place there is none."""
    fails, true = Fails(4, interrupt), step_of(chain())

    def run(*arguments: Any) -> Any:
        found = true.run(*arguments)
        fails()
        return found

    left = caught(KeyboardInterrupt, steps=8, step=with_run(run))
    assert left.ledger.steps == int(left.state.step) > 0
    assert fit(state=left.state, ledger=left.ledger, steps=8).ledger == fit(steps=8).ledger
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_pressed_twice_acts_at_once() -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    fails, true, after = Fails(1, twice), step_of(chain()), []

    def run(*arguments: Any) -> Any:
        found = true.run(*arguments)
        fails()
        after.append(found)
        return found

    left = caught(KeyboardInterrupt, steps=8, step=with_run(run))
    assert not after and left.state is None and left.ledger.steps == 1


def test_a_handler_of_another_s_is_called_and_put_back() -> None:
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        fit(**in_data(Fails(3, interrupt)))
        assert seen == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_another_thread_needs_no_handler() -> None:
    found: list[training.Run] = []
    thread = threading.Thread(target=lambda: found.append(fit()))
    thread.start()
    thread.join()
    small.assert_same(found[0], fit())


def test_ctrl_c_saves_the_run(tmp_path: Path) -> None:
    """Five steps are not lost because the report of the sixth was not reached."""
    store = training.Checkpoints(tmp_path)
    options: dict[str, Any] = {"steps": 9, "report_every": 3}
    calls = sum(len(poisson().draw(step)) for step in range(5)) + 1
    left = caught(
        KeyboardInterrupt, checkpoints=store, **options, **in_data(Fails(calls, interrupt))
    )
    done = int(left.state.step)
    assert done % 3
    saved = store.restore(small.start(chain()), poisson())
    assert saved is not None and int(saved.state.step) == done and saved.ledger == left.ledger
    run = fit(checkpoints=store, **options)
    store.close()
    np.testing.assert_array_equal(run.state.params, fit(**options).state.params)
    assert run.ledger == fit(**options).ledger


def test_ctrl_c_stays_ctrl_c_where_nothing_can_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = training.Checkpoints(tmp_path)
    monkeypatch.setattr(store, "save", lambda *arguments: broken())
    with pytest.raises(KeyboardInterrupt) as found:
        fit(checkpoints=store, report_every=9, steps=9, **in_data(Fails(5, interrupt)))
    store.close()
    assert any("could not be saved: the disk is full" in note for note in found.value.__notes__)
    run = training.run_of(found.value)
    assert run is not None and run.ledger.steps == int(run.state.step) > 0


def test_an_exception_leaves_the_run_saved_and_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Whoever caught it may have seen the parameters: those steps are not executed again."""
    store = training.Checkpoints(tmp_path)
    caught(OSError, steps=8, checkpoints=store, **in_evaluate(Fails(3, broken)))
    saved = store.restore(small.start(chain()), poisson())
    assert saved is not None and int(saved.state.step) == 6
    run = fit(steps=8, checkpoints=store)
    store.close()
    whole = fit(steps=8)
    np.testing.assert_array_equal(run.state.params, whole.state.params)
    assert run.ledger == whole.ledger


def test_a_failing_step_on_the_device_leaves_no_poisoned_state() -> None:
    def fails(x: Any) -> Any:
        raise OSError("on the device")

    true = step_of(chain())

    def run(*arguments: Any) -> Any:
        state, metrics = true.run(*arguments)
        if int(state.step) == 3:
            shape = jax.ShapeDtypeStruct(state.params.shape, state.params.dtype)
            poisoned = jax.jit(lambda x: jax.pure_callback(fails, shape, x))(state.params)
            state = state._replace(params=poisoned)
        return state, metrics

    with pytest.raises(jax.errors.JaxRuntimeError) as found:
        fit(sampler=poisson(physical_batch_size=24), steps=8, step=with_run(run))
    left = training.run_of(found.value)
    assert left is not None and left.state is None and left.ledger.steps in (3, 4)


def test_what_fails_before_the_first_step_leaves_a_run_of_none() -> None:
    left = caught(OSError, data=Fails(1, broken))
    assert left.ledger == Ledger() and int(left.state.step) == 0 and left.history == []


def test_an_exception_of_something_else_has_no_run() -> None:
    assert training.run_of(ValueError("of something else")) is None
    with pytest.raises(ValueError) as found:
        fit(steps=-1)
    assert training.run_of(found.value) is None


@pytest.mark.slow
def test_ctrl_c_ends_a_script_that_does_not_care() -> None:
    script = (
        "import os, signal, threading, time\n"
        "from tests.training.small import fit\n"
        "def rows(indices):\n"
        "    time.sleep(0.05)\n"
        "    from tests.training.small import DATA\n"
        "    return DATA[indices]\n"
        "threading.Timer(3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "fit(data=rows, steps=100_000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr and "steps are charged" in done.stderr


def test_the_state_given_back_is_readable() -> None:
    left = caught(OSError, **in_evaluate(Fails(2, broken)))
    assert jnp.isfinite(left.state.params).all()
