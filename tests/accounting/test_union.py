"""Two ledgers of one data set: nothing is forgotten, and nothing counts twice that is known."""

import dataclasses
import math
from collections import Counter
from functools import reduce

import numpy as np
import pytest

from jaxdp.accounting import (
    Draws,
    FixedSizeSampling,
    Guarantee,
    Ledger,
    LedgerEntry,
    PoissonSampling,
    PureRelease,
    ShuffledEpochs,
)
from jaxdp.accounting.entries import begins_with, parted, split
from jaxdp.accounting.union import united

POISSON = PoissonSampling(0.1)
GUARANTEE = Guarantee(1e-5, "rdp")


def steps(count: int, name: str = "", *, first: int = 0, sigma: float = 1.0) -> LedgerEntry:
    """Steps by hand, or with the draws of a run."""
    draws = [Draws(purpose, name, first, count) for purpose in ("batches", "noise") if name]
    return LedgerEntry((sigma,), POISSON, count, tuple(draws))


def pure(epsilon: float, name: str = "") -> PureRelease:
    return PureRelease(epsilon, None, (Draws("selection", name, 0),) if name else ())


def shuffled(count: int) -> LedgerEntry:
    return LedgerEntry((1.0,), ShuffledEpochs(4), count)


def ledger(*runs: object) -> Ledger:
    """Of runs, the last of which goes on."""
    *closed, current = (run if isinstance(run, tuple) else (run,) for run in runs)
    return Ledger(tuple(closed), current)  # pyright: ignore[reportArgumentType]


def runs_of(found: Ledger) -> Counter[object]:
    return Counter(run for run in found.runs if run)


RUN = steps(4, "run")

# (saved, given) -> the runs of both; the current one of the first is the last.
UNIONS: dict[str, tuple[Ledger, Ledger, Ledger]] = {
    "nothing": (ledger(RUN), Ledger(), ledger(RUN)),
    "the same": (ledger(steps(3), RUN), ledger(steps(3)), ledger(steps(3), RUN)),
    "itself": (ledger(steps(3), RUN), ledger(steps(3), RUN), ledger(steps(3), RUN)),
    "less": (
        ledger((pure(0.5), pure(0.7)), RUN),
        ledger(pure(0.5)),
        ledger((pure(0.5), pure(0.7)), RUN),
    ),
    "more behind a run by hand": (
        ledger(steps(3), RUN),
        ledger((steps(3), pure(0.5))),
        ledger((steps(3), pure(0.5)), RUN),
    ),
    "more behind a run with draws": (
        ledger(steps(3, "prior"), RUN),
        ledger((steps(3, "prior"), pure(0.5))),
        ledger((steps(3, "prior"), pure(0.5)), RUN),
    ),
    "more steps of a run by hand": (
        ledger(steps(3), RUN),
        ledger(steps(5)),
        ledger(steps(5), RUN),
    ),
    "more steps of a run with draws": (
        ledger(steps(3, "prior"), RUN),
        ledger(steps(5, "prior")),
        ledger(steps(5, "prior"), RUN),
    ),
    "more behind this run": (
        ledger(RUN),
        ledger((RUN, pure(0.5))),
        ledger((RUN, pure(0.5))),
    ),
    "more of this run": (ledger(RUN), ledger(steps(9, "run")), ledger(steps(9, "run"))),
    "this run as it was before": (ledger(RUN), ledger(steps(2, "run")), ledger(RUN)),
    "this run, closed by another": (
        ledger(RUN),
        ledger(RUN, steps(2, "other")),
        ledger(steps(2, "other"), RUN),
    ),
    "this run as it was before, with something behind it": (
        ledger(RUN),
        ledger((steps(2, "run"), pure(0.5))),
        ledger(pure(0.5), RUN),
    ),
    "something else": (
        ledger(pure(0.5), RUN),
        ledger(pure(0.7)),
        ledger(pure(0.5), pure(0.7), RUN),
    ),
    "steps by hand that are no steps of the run": (
        ledger(RUN),
        ledger(steps(2)),
        ledger(steps(2), RUN),
    ),
    "one run more of the same": (
        ledger(steps(3), RUN),
        ledger(steps(3), steps(3)),
        ledger(steps(3), steps(3), RUN),
    ),
    "made once more": (
        ledger(pure(0.5, "a"), RUN),
        ledger(pure(0.5, "b")),
        ledger(pure(0.5, "a"), pure(0.5, "b"), RUN),
    ),
    "made once more behind the same past": (
        ledger((steps(3), pure(0.5, "a")), RUN),
        ledger((steps(3), pure(0.5, "b"))),
        ledger((steps(3), pure(0.5, "a")), pure(0.5, "b"), RUN),
    ),
    "known by its draws, elsewhere": (
        ledger(steps(3, "prior"), pure(0.5, "a"), RUN),
        ledger((pure(0.5, "a"), steps(5, "prior"))),
        ledger(steps(5, "prior"), pure(0.5, "a"), RUN),
    ),
    "around what is known by its draws": (
        ledger(steps(3, "prior"), RUN),
        ledger((pure(0.5), steps(3, "prior"), pure(0.7))),
        ledger((steps(3, "prior"), pure(0.7)), pure(0.5), RUN),
    ),
    "in the middle of what is known by its draws": (
        ledger(steps(2, "prior", first=3), RUN),
        ledger((pure(0.5), steps(9, "prior"))),
        ledger(steps(6, "prior", first=3), (pure(0.5), steps(3, "prior")), RUN),
    ),
    # Epochs that nobody has placed begin with the run, or go on with what is right before them.
    "epochs by hand around what is known": (
        ledger(steps(3, "prior"), RUN),
        ledger((shuffled(2), steps(3, "prior"), shuffled(2))),
        ledger((steps(3, "prior"), shuffled(2)), shuffled(2), RUN),
    ),
    "made once more ahead of the same": (
        ledger((pure(0.5, "a"), pure(0.7)), RUN),
        ledger((pure(0.5, "b"), pure(0.7))),
        ledger((pure(0.5, "a"), pure(0.7)), pure(0.5, "b"), RUN),
    ),
    "two runs of epochs by hand": (
        ledger(shuffled(4), RUN),
        ledger(shuffled(2), shuffled(2)),
        ledger(shuffled(4), shuffled(2), RUN),
    ),
}


@pytest.mark.parametrize(("saved", "given", "both"), UNIONS.values(), ids=UNIONS.keys())
def test_what_both_hold_counts_once(saved: Ledger, given: Ledger, both: Ledger) -> None:
    found = united(saved, given)
    assert runs_of(found) == runs_of(both) and found.current == both.current
    assert found.draws == both.draws
    assert united(found, given) == found  # started again, it says the same
    assert united(found, saved) == found


REFUSED: dict[str, tuple[Ledger, Ledger]] = {
    "by hand": (ledger((pure(0.5), pure(0.7)), RUN), ledger((pure(0.5), pure(0.9)))),
    "steps by hand": (
        ledger((steps(3), steps(2, sigma=2.0)), RUN),
        ledger((steps(3), steps(2, sigma=3.0))),
    ),
    "a shorter run by hand": (
        ledger((steps(5), pure(0.5)), RUN),
        ledger((steps(3), pure(0.5))),
    ),
    "by hand and not": (ledger((steps(3), pure(0.5, "a")), RUN), ledger((steps(3), pure(0.7)))),
    # An epoch that begins with the row would go on.
    "epochs by hand": (ledger((shuffled(2), pure(0.5, "a")), RUN), ledger(shuffled(3))),
}


@pytest.mark.parametrize(("saved", "given"), REFUSED.values(), ids=REFUSED.keys())
def test_what_nobody_can_tell_apart_is_refused(saved: Ledger, given: Ledger) -> None:
    """To take it for the same would guess low, and to add it would count the past twice."""
    with pytest.raises(ValueError, match="nobody can tell .* Pass the ledger that this run was"):
        united(saved, given)


@pytest.mark.parametrize(
    "given",
    [
        steps(4, "run", sigma=2.0),
        dataclasses.replace(RUN, draws=RUN.draws[:1]),
        dataclasses.replace(RUN, sampling=FixedSizeSampling(10, 1)),
    ],
    ids=["another noise", "without its noise", "another scheme"],
)
def test_a_draw_that_was_charged_otherwise_is_refused(given: LedgerEntry) -> None:
    """Nobody knows which of the two charges is right."""
    says = "draws must be new to the ledger, .* Pass the ledger that"
    with pytest.raises(ValueError, match=says):
        united(ledger(RUN), ledger(given))


def test_a_run_of_many_entries_is_united_within_a_second() -> None:
    """A schedule makes one of every step."""
    entries = [steps(1, "run", first=k, sigma=1 + k / 10**5) for k in range(10_000)]
    saved, given = ledger(tuple(entries)), ledger((*entries[:-1], pure(0.5)))
    assert runs_of(united(saved, given)) == runs_of(ledger(pure(0.5), tuple(entries)))
    backwards = ledger(pure(0.5), tuple(entries[1::2]), tuple(entries[::2]))
    assert united(saved, backwards).steps == 10_000


# At random.


def history(random: np.random.Generator) -> list[tuple[int, Ledger]]:
    """Ledgers of one data set as it grows: every run has its own way of saying what it drew."""
    runs: list[list[LedgerEntry | PureRelease]] = []
    moments: list[tuple[int, Ledger]] = []
    for moment in range(int(random.integers(2, 8))):
        if not runs or random.random() < 0.4:
            runs.append([])
        number = int(random.integers(len(runs)))
        run, kind = runs[number], random.integers(3)
        first = sum(each.steps for each in run if isinstance(each, LedgerEntry) and each.draws)
        count = int(random.integers(1, 4))
        if kind == 0:
            run.append(pure(float(random.choice([0.1, 0.2])), random.choice(["", f"{moment}"])))
        elif kind == 1:
            run.append(steps(count, f"run {number}", first=first))
        else:
            run.append(steps(count, sigma=float(random.choice([1.0, 2.0]))))
        grown = [reduce(Ledger._with, each, Ledger()).current for each in runs]  # pyright: ignore[reportPrivateUsage]
        moments.append((moment, Ledger(tuple(grown[:-1]), grown[-1])))
    return moments


@pytest.mark.parametrize("seed", range(200))
def test_two_moments_of_one_history_are_the_later_one(seed: int) -> None:
    """Whichever of the two was saved."""
    random = np.random.default_rng(seed)
    moments = [found for _, found in history(random)]
    earlier, later = sorted(random.choice(len(moments), 2))
    for saved, given in ((earlier, later), (later, earlier)):
        try:
            found = united(moments[saved], moments[given])
        except ValueError as error:
            assert "nobody can tell" in str(error)
            continue
        assert runs_of(found) == runs_of(moments[later])


@pytest.mark.parametrize("seed", range(200))
def test_two_ledgers_hold_at_least_as_much_together_as_alone(seed: int) -> None:
    random = np.random.default_rng(1000 + seed)
    saved, given = (history(random)[-1][1] for _ in range(2))
    try:
        found = united(saved, given)
    except ValueError as error:
        assert "nobody can tell" in str(error) or "draws must be new" in str(error)
        return
    spent = [each.epsilon(GUARANTEE) for each in (found, saved, given)]
    assert spent[0] >= max(spent[1:]) * (1 - 1e-12) and math.isfinite(spent[0])
    assert max(saved.steps, given.steps) <= found.steps <= saved.steps + given.steps
    assert united(found, given) == united(found, saved) == found


# What it is made of.


def test_entries_are_split_with_their_draws() -> None:
    head, tail = split(steps(5, "run", first=10), 2)
    assert (head, tail) == (steps(2, "run", first=10), steps(3, "run", first=12))
    assert split(pure(0.5), 1) == (pure(0.5),)


def test_runs_part_where_they_differ() -> None:
    one, two = (steps(5, "run"), pure(0.5)), (steps(3, "run"), pure(0.7))
    rest = (steps(2, "run", first=3), pure(0.5))
    assert parted(one, two) == ((steps(3, "run"),), rest, (pure(0.7),))
    assert parted(one, one) == (one, (), ())
    assert parted(one, ()) == ((), one, ())
    assert parted((steps(3, "run"),), (steps(3),)) == ((), (steps(3, "run"),), (steps(3),))
    assert begins_with(one, (steps(3, "run"),)) and not begins_with(one, two)
