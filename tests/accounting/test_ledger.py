"""The ledger: a value that composes runs, survives JSON and says how many steps are left."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdp.accounting import (
    Ledger,
    LedgerEntry,
    PoissonSampling,
    PureRelease,
    ShuffledEpochs,
    calibrate_steps,
    epsilon,
)
from tests.accounting.closed_forms import (
    brute_force_participations,
    gaussian_epsilon,
)
from tests.accounting.small import ADD, DELTA, FIXED, OTHER, POISSON, SHUFFLED, ledger_of

MANY = settings(derandomize=True, deadline=None, max_examples=60)


noise = st.one_of(st.floats(0, 1e6), st.lists(st.floats(0, 1e6), min_size=1, max_size=3).map(tuple))
steps_of_a_run = st.tuples(
    noise, st.sampled_from([POISSON, OTHER, FIXED, SHUFFLED]), st.integers(0, 1000)
)
pure_releases = st.builds(
    PureRelease, st.floats(1e-6, 1e6), st.sampled_from([None, POISSON, PoissonSampling(1.0)])
)
charges = st.lists(st.one_of(steps_of_a_run, pure_releases), max_size=6)


def test_charges_append_and_equal_neighbours_merge():
    ledger = ledger_of((1.0, POISSON, 2), (1.0, POISSON, 3), (2.0, POISSON, 1), (1.0, POISSON, 1))
    assert ledger.entries == (
        LedgerEntry((1.0,), POISSON, 5),
        LedgerEntry((2.0,), POISSON, 1),
        LedgerEntry((1.0,), POISSON, 1),
    )
    assert ledger.steps == 7
    assert ledger.charge(1.0, OTHER).entries[-1] == LedgerEntry((1.0,), OTHER, 1)
    assert ledger.charge((1.0, 2.0), POISSON).entries[-1] == LedgerEntry((1.0, 2.0), POISSON, 1)
    assert ledger.charge(1.0, POISSON, 0) == ledger


def test_a_ledger_is_a_value():
    ledger = ledger_of((1.0, POISSON, 2))
    longer = ledger.charge(1.0, POISSON)
    assert (ledger.steps, longer.steps) == (2, 3)
    assert {ledger, ledger_of((1.0, POISSON, 1), (1.0, POISSON, 1)), longer} == {ledger, longer}
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(ledger, "current", ())  # noqa: B010
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(ledger.entries[0], "steps", 0)  # noqa: B010


@given(charges, charges)
@MANY
def test_json_round_trip_is_exact(one, two):
    ledger = ledger_of(*one).merge(ledger_of(*two))
    text = ledger.to_json()
    assert Ledger.from_json(text) == ledger
    assert Ledger.from_json(text).to_json() == text


def damaged(change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(
        ledger_of((1.5, POISSON, 2), (1.5, FIXED, 1), PureRelease(0.5, POISSON)).to_json()
    )
    change(data)
    return json.dumps(data)


DAMAGED = {
    "empty": "",
    "truncated": ledger_of((1.5, POISSON, 2)).to_json()[:-5],
    "a list": "[]",
    "null": "null",
    "deep": "[" * 100_000,
    "another format": damaged(lambda d: d.update(format="other")),
    "a newer version": damaged(lambda d: d.update(version=3)),
    "a true version": damaged(lambda d: d.update(version=True)),
    "an unknown field": damaged(lambda d: d.update(extra=1)),
    "a missing field": damaged(lambda d: d.pop("closed")),
    "runs that are no list": damaged(lambda d: d.update(current={})),
    "a run that is no list": damaged(lambda d: d.update(closed=[3])),
    "an entry that is no mapping": damaged(lambda d: d["current"].append(3)),
    "an entry without steps": damaged(lambda d: d["current"][0].pop("steps")),
    "no steps": damaged(lambda d: d["current"][0].update(steps=0)),
    "half a step": damaged(lambda d: d["current"][0].update(steps=0.5)),
    "true steps": damaged(lambda d: d["current"][0].update(steps=True)),
    "negative noise": damaged(lambda d: d["current"][0].update(noise_multipliers=[-1.0])),
    "infinite noise": damaged(lambda d: d["current"][0].update(noise_multipliers=[math.inf])),
    "noise that is not a number": damaged(
        lambda d: d["current"][0].update(noise_multipliers=[math.nan])
    ),
    "no noise multiplier": damaged(lambda d: d["current"][0].update(noise_multipliers=[])),
    "huge noise": damaged(lambda d: d["current"][0].update(noise_multipliers=[10**400])),
    "noise as text": damaged(lambda d: d["current"][0].update(noise_multipliers=["1"])),
    "noise outside a list": damaged(lambda d: d["current"][0].update(noise_multipliers=1.0)),
    "an unknown scheme": damaged(lambda d: d["current"][0].update(sampling={"kind": "sobol"})),
    "a bad rate": damaged(lambda d: d["current"][0]["sampling"].update(sampling_rate=2)),
    "a pure release of nothing": damaged(lambda d: d["current"][2].update(epsilon=0.0)),
    "an infinite pure release": damaged(lambda d: d["current"][2].update(epsilon=math.inf)),
    "a true pure release": damaged(lambda d: d["current"][2].update(epsilon=True)),
    "a pure release with steps": damaged(lambda d: d["current"][2].update(steps=1)),
    "a pure release without sampling": damaged(lambda d: d["current"][2].pop("sampling")),
    "a pure release of fixed size": damaged(
        lambda d: d["current"][2].update(sampling=FIXED.to_dict())
    ),
    "an entry of two kinds": damaged(lambda d: d["current"][0].update(epsilon=0.5)),
    "an entry of an unknown kind": damaged(lambda d: d["current"].append({"rho": 0.5})),
    "another scheme's field": damaged(lambda d: d["current"][1]["sampling"].update(rate=0.1)),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_json_is_refused(text):
    with pytest.raises(ValueError, match="text must be JSON written by Ledger.to_json"):
        Ledger.from_json(text)


def test_a_ledger_from_before_pure_releases_is_read():
    text = (
        '{"format": "jaxdp.ledger", "version": 1, "closed": [], "current": [{"noise_multipliers": '
        '[1.5], "sampling": {"kind": "poisson", "sampling_rate": 0.1}, "steps": 2}]}'
    )
    assert Ledger.from_json(text) == ledger_of((1.5, POISSON, 2))


def test_a_ledger_of_equal_steps_is_epsilon():
    ledger = ledger_of((1.1, POISSON, 20), (2.0, POISSON, 0), (1.1, POISSON, 30))
    question: Any = {"accountant": "rdp", "neighboring_relation": ADD}
    alone = epsilon(1.1, steps=50, delta=DELTA, sampling=POISSON, **question)
    assert ledger.epsilon(DELTA, **question) == alone
    assert ledger.epsilon(DELTA) == epsilon(1.1, steps=50, delta=DELTA, sampling=POISSON)
    assert Ledger().epsilon(DELTA) == Ledger().delta(1.0) == 0.0
    silent = ledger.charge(0.0, POISSON)
    assert (silent.epsilon(DELTA), silent.delta(1.0)) == (math.inf, 1.0)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_delta_is_the_inverse_of_epsilon(accountant):
    ledger = ledger_of((1.1, POISSON, 20), (2.0, OTHER, 5))
    found = ledger.delta(ledger.epsilon(DELTA, accountant=accountant), accountant=accountant)
    # RDP bounds both directions separately, its round trip only loosens.
    assert found == pytest.approx(DELTA, rel=1e-3 if accountant == "pld" else 0.05)


def test_a_mixed_ledger_matches_its_dp_event_in_any_order():
    steps = [(1.1, POISSON, 20), (2.0, OTHER, 5), (1.1, POISSON, 3), (3.0, SHUFFLED, 9)]
    ledger, backwards = ledger_of(*steps), ledger_of(*reversed(steps))
    theirs = PLDAccountant().compose(ledger.dp_event()).get_epsilon(DELTA)
    assert ledger.epsilon(DELTA) == pytest.approx(theirs, rel=1e-6)
    assert backwards.epsilon(DELTA) == pytest.approx(theirs, rel=1e-6)


@given(
    st.lists(st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 12)), max_size=8),
    st.integers(1, 7),
)
@MANY
def test_shuffled_steps_count_the_worst_noise_of_every_epoch(segments, epoch):
    ledger = ledger_of(*((sigma, ShuffledEpochs(epoch), count) for sigma, count in segments))
    sigmas = [sigma for sigma, count in segments for _ in range(count)]
    worst = brute_force_participations(sigmas, epoch)
    event = ledger.dp_event()
    parts = event.events if isinstance(event, dp_accounting.ComposedDpEvent) else [event]
    found: dict[float, int] = {}
    for part in parts:
        match part:
            case dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(sigma), count):
                found[sigma] = count
            case dp_accounting.GaussianDpEvent(sigma):
                found[sigma] = 1
    assert found == {sigma: worst.count(sigma) for sigma in set(worst)}


def test_a_shuffled_schedule_matches_the_closed_form():
    ledger = ledger_of((3.0, SHUFFLED, 6), (2.0, SHUFFLED, 5), (4.0, SHUFFLED, 1))
    # Epochs of four steps: 3 3 3 3 | 3 3 2 2 | 2 2 2 4.
    exact = gaussian_epsilon(math.sqrt(3.0**-2 + 2 * 2.0**-2))
    assert ledger.epsilon(DELTA) == pytest.approx(exact, rel=1e-4)


def test_merge_composes_runs_and_keeps_their_epochs_apart():
    half = ledger_of((1.0, SHUFFLED, 2))
    both = half.merge(half)
    assert both.steps == 4
    # An example may have been in both halves: two participations, not the one of a full epoch.
    assert both.epsilon(DELTA) == pytest.approx(gaussian_epsilon(math.sqrt(2)), rel=1e-3)
    continued = both.charge(1.0, SHUFFLED, 2)
    assert continued.epsilon(DELTA) == both.epsilon(DELTA)
    assert continued.charge(1.0, SHUFFLED).epsilon(DELTA) > both.epsilon(DELTA)


def test_merge_is_composition_whatever_the_order():
    one, two = ledger_of((1.0, POISSON, 9), (1.5, SHUFFLED, 2)), ledger_of((1.0, POISSON, 4))
    together = ledger_of((1.0, POISSON, 13), (1.5, SHUFFLED, 2)).epsilon(DELTA)
    assert one.merge(two).epsilon(DELTA) == pytest.approx(together, rel=1e-9)
    assert two.merge(one).epsilon(DELTA) == pytest.approx(together, rel=1e-9)
    assert one.merge(Ledger()) == one
    assert Ledger().merge(one).epsilon(DELTA) == one.epsilon(DELTA)


@pytest.mark.parametrize(
    ("accountant", "sampling", "sigma"),
    [
        ("pld", POISSON, 1.5),
        ("rdp", POISSON, (3.0, 4.0)),
        ("rdp", SHUFFLED, 1.5),
        pytest.param("pld", SHUFFLED, (3.0, 4.0), marks=pytest.mark.slow),
        pytest.param("pld", OTHER, 3.0, marks=pytest.mark.slow),
    ],
)
def test_steps_left_is_exact(accountant, sampling, sigma):
    spent = ledger_of((1.5, POISSON, 12), (2.5, SHUFFLED, 3), (2.0, OTHER, 4))
    budget = spent.epsilon(DELTA, accountant=accountant) + 2.5
    question: Any = {"delta": DELTA, "accountant": accountant}
    left = spent.steps_left(sigma, sampling, epsilon=budget, **question)
    assert left > 0
    assert spent.charge(sigma, sampling, left).epsilon(**question) <= budget
    assert spent.charge(sigma, sampling, left + 1).epsilon(**question) > budget
    capped = spent.steps_left(sigma, sampling, epsilon=budget, at_most=left - 1, **question)
    assert capped == left - 1


def test_steps_left_of_an_exhausted_budget_and_of_an_empty_ledger():
    spent = ledger_of((1.0, POISSON, 50))
    assert spent.steps_left(1.0, POISSON, epsilon=0.5, delta=DELTA) == 0
    fresh = Ledger().steps_left(1.0, POISSON, epsilon=3.0, delta=DELTA)
    alone = calibrate_steps(3.0, noise_multiplier=1.0, delta=DELTA, sampling=POISSON)
    assert fresh == alone > 0


def schedule(count: int) -> Ledger:
    return ledger_of(*((float(s), PoissonSampling(0.02), 3) for s in np.linspace(1, 2.5, count)))


def exact_epsilon(ledger: Ledger, accountant: Any) -> float:
    return float(accountant.compose(ledger.dp_event()).get_epsilon(DELTA))


def test_a_schedule_is_rounded_to_less_noise_only():
    ledger = schedule(100)
    exact, rounded = exact_epsilon(ledger, RdpAccountant()), ledger.epsilon(DELTA, accountant="rdp")
    assert exact < rounded < exact * 1.04


def test_up_to_32_noise_multipliers_are_exact():
    ledger = schedule(32)
    rounded = ledger.epsilon(DELTA, accountant="rdp")
    assert rounded == pytest.approx(exact_epsilon(ledger, RdpAccountant()), rel=1e-12)


@pytest.mark.slow
def test_a_schedule_is_rounded_to_less_noise_only_under_pld():
    ledger = schedule(40)
    exact, rounded = exact_epsilon(ledger, PLDAccountant()), ledger.epsilon(DELTA)
    assert exact <= rounded < exact * 1.04


def test_steps_left_of_a_rounded_schedule_is_exact():
    ledger = schedule(60)
    question: Any = {"delta": DELTA, "accountant": "rdp"}
    ahead = (1.77, PoissonSampling(0.02))
    budget = ledger.epsilon(**question) + 0.5
    left = ledger.steps_left(*ahead, epsilon=budget, **question)
    assert ledger.charge(*ahead, steps=left).epsilon(**question) <= budget
    assert ledger.charge(*ahead, steps=left + 1).epsilon(**question) > budget
