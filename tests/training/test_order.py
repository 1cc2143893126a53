"""Nothing of a step is shown before the step is saved: what a killed run has shown is charged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp import training
from jaxdp.accounting import Ledger
from jaxdp.training.checkpoints import Saved
from jaxdp.training.files import seal
from jaxdp.training.told import note_told, told_with
from tests.training import small
from tests.training.small import chain, fit, going_on, poisson, start

NOTE = ".reports.json"


def norm(params: Any) -> dict[str, float]:
    return {"norm": float(jnp.linalg.norm(params))}


def in_store(directory: Path) -> Saved | None:
    """What a run that is started now would begin from."""
    store = training.Checkpoints(directory)
    try:
        return store.restore(start(chain()), poisson())
    finally:
        store.close()


class Watched:
    """A run that notes in which order it saves and tells, and what is saved when it tells."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.events: list[str] = []
        self.store = training.Checkpoints(directory)
        save, complete = self.store.save, self.store.complete

        def saving(state: Any, ledger: Ledger, *rest: Any) -> None:
            self.events.append(f"save {int(state.step)}")
            save(state, ledger, *rest)

        def completing(history: Any) -> None:
            complete(history)
            self.events.append(f"told {history[-1]['step']}")

        monkeypatch.setattr(self.store, "save", saving)
        monkeypatch.setattr(self.store, "complete", completing)

    def saved(self) -> Saved:
        found = self.store.restore(start(chain()), poisson())
        assert found is not None
        return found

    def evaluate(self, params: Any) -> dict[str, float]:
        saved = self.saved()
        self.events.append(f"evaluate {int(saved.state.step)}")
        np.testing.assert_array_equal(params, saved.state.params)
        assert saved.ledger.steps == int(saved.state.step) and saved.report is not None
        return norm(params)

    def log(self, row: Any) -> None:
        saved = self.saved()
        self.events.append(f"log {row['step']}")
        assert int(saved.state.step) == row["step"]

    def fit(self, **options: Any) -> training.Run:
        told = {"evaluate": self.evaluate, "log_fn": self.log, "checkpoints": self.store}
        return fit(**(told | options))


def report(step: int) -> list[str]:
    return [f"{what} {step}" for what in ("save", "evaluate", "log", "told")]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = Watched(tmp_path, monkeypatch)
    yield found
    found.store.close()


def test_every_report_is_saved_once_before_anything_of_it_is_told(watched: Watched) -> None:
    run = watched.fit(steps=5, report_every=2)
    assert watched.events == [*report(2), *report(4), *report(5)]
    assert [row["step"] for row in run.history] == [2, 4, 5]


def test_a_run_that_its_budget_ends_tells_in_the_same_order(watched: Watched) -> None:
    limit = fit(steps=3).ledger.epsilon(small.DELTA, accountant="rdp") * (1 + 1e-9)
    assert watched.fit(steps=9, report_every=2, budget=limit).stopped_by == "budget"
    assert watched.events == [*report(2), *report(3)]


def test_a_run_that_goes_on_tells_in_the_same_order(watched: Watched) -> None:
    watched.fit(steps=2)
    run = watched.fit(steps=4)
    watched.fit(steps=6, state=run.state, ledger=run.ledger)
    assert watched.events == [*report(2), *report(4), *report(6)]


@pytest.mark.parametrize("place", ["evaluate", "log_fn"])
def test_what_raises_while_it_is_told_is_saved_once(watched: Watched, place: str) -> None:
    def fails(told: Any) -> Any:
        raise OSError("of something else")

    with pytest.raises(OSError, match="of something else"):
        watched.fit(steps=4, **{place: fails})
    assert [event for event in watched.events if event.startswith("save")] == ["save 2"]
    assert watched.saved().report is not None  # which is told once more


def test_without_evaluate_or_a_log_the_order_is_the_same(watched: Watched) -> None:
    run = watched.fit(steps=4, evaluate=None, log_fn=None)
    assert watched.events == ["save 2", "told 2", "save 4", "told 4"]
    small.assert_same(run, fit(steps=4))


# A report that nobody may have seen.


def leave_untold(directory: Path) -> training.Run:
    """As a kill leaves a run: saved, and nobody knows whether the report was seen."""
    run = going_on(directory, steps=4, evaluate=norm)
    (directory / NOTE).unlink()
    return run


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


LOST: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "altered": damage,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "of another checkpoint": lambda path: note_told(
        path.parent, path.parent / "2" / "run.json", [{"step": 2}]
    ),
}


@pytest.mark.parametrize("lose", LOST.values(), ids=LOST.keys())
def test_a_report_that_nobody_may_have_seen_is_made_again(
    tmp_path: Path, lose: Callable[[Path], Any]
) -> None:
    """As it was, and by the parameters that it was of."""
    whole = going_on(tmp_path, steps=4, evaluate=norm)
    lose(tmp_path / NOTE)
    rows: list[Any] = []
    run = going_on(tmp_path, steps=4, evaluate=norm, log_fn=rows.append)
    assert run.history == whole.history and rows == whole.history[-1:]
    again = going_on(tmp_path, steps=4, evaluate=norm, log_fn=rows.append)
    assert again.history == whole.history and len(rows) == 1  # and told now


def test_it_is_made_before_another_step_is_taken(tmp_path: Path) -> None:
    left = leave_untold(tmp_path)
    seen: list[np.ndarray] = []

    def evaluate(params: Any) -> dict[str, float]:
        seen.append(np.asarray(params))
        return norm(params)

    run = going_on(tmp_path, steps=6, evaluate=evaluate)
    np.testing.assert_array_equal(seen[0], left.state.params)
    small.assert_same(run, fit(steps=6, evaluate=norm))


def test_it_is_of_the_saved_parameters_where_a_run_goes_on_from_others(tmp_path: Path) -> None:
    left = leave_untold(tmp_path)
    changed = left.state._replace(params=left.state.params + 1)
    ledger = left.ledger.charge_pure(0.5)
    run = going_on(tmp_path, steps=4, state=changed, ledger=ledger, evaluate=norm)
    assert run.history == left.history
    # What was changed, and charged, is saved before the run goes on.
    saved = in_store(tmp_path)
    assert saved is not None and saved.ledger == ledger and saved.report is None
    np.testing.assert_array_equal(saved.state.params, run.state.params)


def test_it_is_made_again_where_evaluate_raised(tmp_path: Path) -> None:
    def fails(params: Any) -> Any:
        raise OSError("of something else")

    for _ in range(2):
        with pytest.raises(OSError, match="of something else") as error:
            going_on(tmp_path, steps=4, evaluate=fails)
        left = training.run_of(error.value)
        assert left is not None and int(left.state.step) == 2 and left.history == []
    small.assert_same(going_on(tmp_path, steps=4, evaluate=norm), fit(steps=4, evaluate=norm))


def test_a_note_is_of_one_checkpoint(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    note_told(tmp_path, tmp_path / "one", [{"step": 1}])
    assert told_with(tmp_path, tmp_path / "one") == [{"step": 1}]
    assert told_with(tmp_path, tmp_path / "two") is None
    (tmp_path / "one").write_text("changed")
    assert told_with(tmp_path, tmp_path / "one") is None


def test_a_report_of_no_checkpoint_cannot_be_told(tmp_path: Path) -> None:
    store = training.Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="a report must be that of a checkpoint, got none"):
        store.complete([])
    store.close()
    with pytest.raises(ValueError, match="checkpoints must be open"):
        store.complete([])


def test_a_checkpoint_of_the_version_before_is_read(tmp_path: Path) -> None:
    """Its reports had been told when it was written."""
    whole = going_on(tmp_path, steps=4)
    path = tmp_path / "4" / "run.json"
    run = json.loads(path.read_text())
    del run["report"]
    path.write_text(json.dumps(run | {"version": 1, "history": whole.history}))
    seal(tmp_path / "4")
    small.assert_same(going_on(tmp_path, steps=4, evaluate=small.forbidden), whole)


# Charges from outside.


def test_what_was_charged_before_a_run_is_saved_before_it_begins(tmp_path: Path) -> None:
    """A release that a script makes at every start is made, also where the start is killed."""
    seen: list[Ledger] = []
    store = training.Checkpoints(tmp_path)

    def rows(indices: np.ndarray) -> np.ndarray:
        saved = store.restore(start(chain()), poisson())
        seen.append(Ledger() if saved is None else saved.ledger)
        return small.DATA[indices]

    first, second = (Ledger().charge_pure(epsilon) for epsilon in (0.5, 0.7))
    fit(checkpoints=store, data=rows, steps=2, ledger=first)
    assert seen[0] == Ledger().merge(first)
    seen.clear()
    run = fit(checkpoints=store, data=rows, steps=4, ledger=second)
    store.close()
    assert seen[0].steps == 2 and run.ledger.steps == 4
    for ledger in (seen[0], run.ledger):
        assert ledger.extends(first) and ledger.extends(second)


def test_a_start_that_is_told_nothing_new_saves_nothing(watched: Watched) -> None:
    ledger = Ledger().charge_pure(0.5)
    watched.fit(steps=2, ledger=ledger)
    assert watched.events == ["save 0", *report(2)]
    watched.fit(steps=2, ledger=ledger)
    watched.fit(steps=2)
    assert watched.events == ["save 0", *report(2)]


# What evaluate is given.


def test_evaluate_may_keep_what_it_is_given() -> None:
    """The next step reuses the buffers of the state."""
    kept: list[jax.Array] = []
    fit(steps=6, evaluate=lambda params: kept.append(params) or {})
    assert len(kept) == 3 and len({tuple(params.tolist()) for params in kept}) == 3


def test_evaluate_may_give_away_what_it_is_given() -> None:
    taken = jax.jit(lambda params: params * 2, donate_argnums=0)
    run = fit(steps=6, evaluate=lambda params: norm(taken(params)))
    np.testing.assert_array_equal(run.state.params, fit(steps=6).state.params)
