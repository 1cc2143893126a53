"""A resume forgets nothing that was charged, and charges nothing twice."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp import training
from jaxdp.accounting import Draws, Ledger, LedgerEntry, PoissonSampling, PureRelease
from jaxdp.training.loading import data_digest
from tests.training import small
from tests.training.small import chain, fit, going_on, poisson, start

POISSON = PoissonSampling(0.25)
SELECTED = Ledger().charge_pure(0.5)


def selected(key: str) -> Ledger:
    """A release that says which random numbers it was made of."""
    return Ledger().charge_pure(0.5, draws=[Draws("selection", key, 0)])


def pure(ledger: Ledger) -> list[float]:
    return [entry.epsilon for entry in ledger.entries if isinstance(entry, PureRelease)]


def steps_by_hand(ledger: Ledger) -> int:
    entries = [entry for entry in ledger.entries if isinstance(entry, LedgerEntry)]
    return sum(entry.steps for entry in entries if not entry.draws)


# (given at the first start, given at the second, pure releases then, steps by hand then)
GIVEN: dict[str, tuple[Ledger, Ledger, list[float], int]] = {
    "nothing": (Ledger(), Ledger(), [], 0),
    "something since": (Ledger(), Ledger().charge_pure(10.0), [10.0], 0),
    "the same again": (SELECTED, SELECTED, [0.5], 0),
    "not stated again": (SELECTED, Ledger(), [0.5], 0),
    "something else since": (SELECTED, Ledger().charge_pure(0.7), [0.5, 0.7], 0),
    "more since": (SELECTED, SELECTED.charge_pure(0.7), [0.5, 0.7], 0),
    "the same, known by its draws": (selected("a"), selected("a"), [0.5], 0),
    "made once more": (selected("a"), selected("b"), [0.5, 0.5], 0),
    "made once more, and noted now": (SELECTED, selected("b"), [0.5, 0.5], 0),
    "earlier steps": (
        Ledger().charge(3.0, POISSON, 5),
        Ledger().charge(3.0, POISSON, 5),
        [],
        5,
    ),
    "other steps since": (Ledger(), Ledger().charge(2.0, POISSON, 100), [], 100),
    # By their numbers they might be the first two of the run: by their draws they are not.
    "as many steps by hand": (Ledger(), Ledger().charge(2.0, POISSON, 2), [], 2),
    "fewer steps by hand": (Ledger(), Ledger().charge(2.0, POISSON, 1), [], 1),
}


@pytest.mark.parametrize(("first", "second", "releases", "steps"), GIVEN.values(), ids=GIVEN)
def test_what_was_charged_counts_once(
    tmp_path: Path, first: Ledger, second: Ledger, releases: list[float], steps: int
) -> None:
    run = going_on(tmp_path, steps=2, ledger=first)
    for _ in range(2):  # started again, it says the same
        run = going_on(tmp_path, steps=4, ledger=second)
        assert sorted(pure(run.ledger)) == releases
        assert steps_by_hand(run.ledger) == steps
        assert run.ledger.steps == steps + 4
        assert run.history[-1]["step"] == 4
    assert run.ledger.epsilon(small.DELTA, accountant="rdp") >= max([0.0, *releases])


def test_a_script_that_selects_at_every_start_is_charged_for_every_start(tmp_path: Path) -> None:
    """With its draws: a fresh key is a fresh release."""
    runs = [
        going_on(tmp_path, steps=2 * number + 2, ledger=selected(f"key {number}"))
        for number in range(3)
    ]
    assert pure(runs[-1].ledger) == [0.5] * 3


def test_a_ledger_that_went_on_from_what_was_saved_takes_its_place(tmp_path: Path) -> None:
    """As it is given, with a state that has to be read: what was released since is not lost."""
    first = going_on(tmp_path, steps=2)
    run = going_on(tmp_path, steps=4, ledger=first.ledger.charge_pure(0.7))
    assert pure(run.ledger) == [0.7] and run.ledger.steps == 4
    assert run.ledger.entries[0] == first.ledger.entries[0]


def test_steps_beyond_the_saved_ones_are_not_forgotten(tmp_path: Path) -> None:
    """Ten steps were executed, six of them saved: the others cannot be drawn again uncharged."""
    going_on(tmp_path, steps=6)
    whole = fit(steps=10)
    with pytest.raises(ValueError, match="must be new to the ledger, got steps 6 to 9 of 'gradie"):
        going_on(tmp_path, steps=12, ledger=whole.ledger)
    run = going_on(tmp_path, steps=12, ledger=whole.ledger, state=whole.state)
    assert run.ledger.steps == 12 and int(run.state.step) == 12


def test_the_saved_ledger_is_not_forgotten_either(tmp_path: Path) -> None:
    """A state that is as far as the checkpoint, with a ledger that lacks what was saved."""
    first = going_on(tmp_path, steps=4, ledger=SELECTED)
    other = fit(steps=4)
    with pytest.raises(ValueError, match="ledger must hold what the checkpoint of step 4 was"):
        going_on(tmp_path, steps=6, state=other.state, ledger=other.ledger)
    assert pure(going_on(tmp_path, steps=6).ledger) == pure(first.ledger) == [0.5]


def test_a_run_that_was_begun_before_its_checkpoints_goes_on(tmp_path: Path) -> None:
    """Two steps without a directory, the rest with one; then the script is started again."""

    def script(steps: int) -> training.Run:
        first = fit(steps=2, ledger=SELECTED)
        return going_on(tmp_path, state=first.state, ledger=first.ledger, steps=steps)

    assert script(4).ledger.steps == 4
    again = script(6)
    assert again.ledger.steps == 6 and pure(again.ledger) == [0.5]
    whole = fit(steps=6, ledger=SELECTED)
    assert again.ledger == whole.ledger


def test_a_ledger_of_an_older_version_goes_on() -> None:
    """It knows of no draws; what follows does."""
    first = fit(steps=2)
    old = Ledger(current=tuple(LedgerEntry((2.0,), POISSON, 2) for _ in range(1)))
    run = fit(state=first.state, ledger=old, steps=4)
    assert run.ledger.steps == 4 and steps_by_hand(run.ledger) == 2


def test_a_resume_with_another_question_answers_it_for_the_whole_run(tmp_path: Path) -> None:
    """Rows keep the δ that they were asked at; a new one is asked of everything executed."""
    going_on(tmp_path, steps=2, delta=1e-5)
    run = going_on(tmp_path, steps=4, delta=1e-9)
    assert [row["delta"] for row in run.history] == [1e-5, 1e-9]
    assert run.history[1]["epsilon"] == run.ledger.epsilon(1e-9, accountant="rdp")
    assert run.stopped_by == "steps"
    stopped = going_on(tmp_path, steps=9, delta=1e-9, budget=run.history[1]["epsilon"])
    assert (stopped.stopped_by, stopped.ledger) == ("budget", run.ledger)


def test_a_checkpoint_that_was_copied_and_continued_twice_cannot_be_merged(tmp_path: Path) -> None:
    def begin(where: str) -> None:
        going_on(tmp_path / where, steps=2)

    runs = []
    for where, params in (("one", 0.0), ("two", 1.0)):
        begin(where)
        changed = training.Checkpoints(tmp_path / where)
        saved = changed.restore(start(chain()), poisson())
        changed.close()
        assert saved is not None
        state = saved.state._replace(params=jnp.full(3, params))
        runs.append(fit(state=state, steps=6, ledger=saved.ledger))
    with pytest.raises(ValueError, match="a second time.*give the later one the ledger"):
        runs[0].ledger.merge(runs[1].ledger)


def edited(run: training.Run, change: Callable[[Ledger], Ledger], directory: Path) -> None:
    store = training.Checkpoints(directory)
    state = jax.tree.map(jnp.copy, run.state)
    store.save(state, change(run.ledger), poisson(), run.history)
    store.close()


def test_a_saved_ledger_that_misses_steps_of_its_state_is_refused(tmp_path: Path) -> None:
    run = fit(steps=4)
    with pytest.raises(ValueError, match="ledger"):
        edited(run, lambda ledger: fit(steps=1).ledger, tmp_path)
        going_on(tmp_path, steps=6)
    # As many steps, but of other noise.
    other = fit(chain(7), poisson(9), steps=4).ledger
    edited(run, lambda ledger: other, tmp_path / "other")
    with pytest.raises(ValueError, match="got 0 of the 4 draws of 'gradient noise'"):
        going_on(tmp_path / "other", steps=6)


# The data.


def changed(array: np.ndarray, row: int = 0) -> np.ndarray:
    copy = array.copy()
    copy[row, 0] += 1
    return copy


@pytest.mark.parametrize(
    "other",
    [changed(small.DATA), changed(small.DATA, -1), small.DATA[::-1], (small.DATA,)],
    ids=["a row", "the last row", "another order", "another structure"],
)
def test_other_data_of_the_same_size_is_refused(tmp_path: Path, other: Any) -> None:
    going_on(tmp_path, steps=2)
    with pytest.raises(ValueError, match="was trained on other data, to which its ledger says"):
        going_on(tmp_path, steps=4, data=other)
    assert going_on(tmp_path, steps=4, data=small.DATA.copy()).ledger.steps == 4


def test_of_a_function_nobody_knows_what_it_returns_next(tmp_path: Path) -> None:
    going_on(tmp_path, steps=2)
    run = going_on(tmp_path, steps=4, data=lambda indices: small.DATA[indices])
    assert run.ledger.steps == 4
    small.assert_same(going_on(tmp_path, steps=6), fit(steps=6))


def test_the_digest_of_data_tells_nothing_without_the_seed() -> None:
    one, other = (data_digest(small.DATA, poisson(seed)) for seed in (1, 2))
    assert one == data_digest(small.DATA.copy(), poisson(1)) != other
    assert data_digest(jnp.asarray(small.DATA), poisson(1)) == one
    keys = jax.random.split(jax.random.key(0), 24)
    assert data_digest(keys, poisson()) != data_digest(keys[::-1], poisson())


def test_a_step_that_somebody_saw_is_not_executed_again(tmp_path: Path) -> None:
    """An exception lets the run escape: with another chain the same noise would show the data."""

    reports = iter([{}])

    def evaluate(params: Any) -> dict[str, float]:
        if (report := next(reports, None)) is None:
            raise RuntimeError("a typing error")
        return report

    with pytest.raises(RuntimeError, match="a typing error") as caught:
        going_on(tmp_path, steps=4, report_every=2, evaluate=evaluate)
    seen = training.run_of(caught.value)
    assert seen is not None and int(seen.state.step) == 4
    store = training.Checkpoints(tmp_path)
    saved = store.restore(start(chain()), poisson())
    store.close()
    assert saved is not None and int(saved.state.step) == 4
    again = going_on(tmp_path, steps=4)
    np.testing.assert_array_equal(again.state.params, seen.state.params)
    assert again.ledger == seen.ledger


def test_steps_before_an_exception_are_saved(tmp_path: Path) -> None:
    """Between two reports, too: what was charged is never executed by another chain."""
    drawn = itertools.count()

    def load(indices: np.ndarray) -> Any:
        if next(drawn) == 3:
            raise OSError("the disk is gone")
        return small.DATA[indices]

    with pytest.raises(OSError, match="the disk is gone") as caught:
        going_on(tmp_path, steps=8, report_every=8, data=load)
    left = training.run_of(caught.value)
    assert left is not None
    store = training.Checkpoints(tmp_path)
    saved = store.restore(start(chain()), poisson())
    store.close()
    assert saved is not None and saved.ledger == left.ledger
    assert int(saved.state.step) == left.ledger.steps == int(left.state.step) > 0


def test_data_that_differs_in_one_entry_is_refused(tmp_path: Path) -> None:
    going_on(tmp_path, steps=2)
    other = np.array(small.DATA)
    other[len(other) // 3 + 1, -1] += 1e-3
    with pytest.raises(ValueError, match="was trained on other data"):
        going_on(tmp_path, steps=4, data=other)


def test_a_state_that_cannot_be_saved_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    store = training.Checkpoints(tmp_path)
    tx = chain()
    state = training.init({"w": jnp.ones(3), "none": jnp.zeros((0, 2))}, tx)
    with pytest.raises(ValueError, match=r"must have entries in all .* got shape \(0, 2\)"):
        store.restore(state, poisson())
    store.close()
