"""Calibration round trips: what is found fits, and a little more does not."""

from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdp.accounting import (
    FixedSizeSampling,
    Ledger,
    PoissonSampling,
    SamplingScheme,
    ShuffledEpochs,
    calibrate_noise_multiplier,
    calibrate_sampling_rate,
    calibrate_steps,
    dp_event,
    epsilon,
)
from jaxdp.accounting import ledger as ledger_module
from jaxdp.accounting.search import largest_count
from tests.accounting.small import ADD, DELTA, REPLACE

MANY = settings(derandomize=True, deadline=None, max_examples=60)


CALIBRATIONS: list[tuple[SamplingScheme, str, str]] = [
    (PoissonSampling(0.05), "pld", ADD),
    (PoissonSampling(0.05), "pld", REPLACE),
    (PoissonSampling(0.05), "rdp", ADD),
    (FixedSizeSampling(1000, 50), "rdp", REPLACE),
    (ShuffledEpochs(10), "pld", ADD),
    (ShuffledEpochs(10), "rdp", REPLACE),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("sampling", "accountant", "relation"), CALIBRATIONS)
@pytest.mark.parametrize(
    "target",
    [3.0, pytest.param(0.3, marks=pytest.mark.slow), pytest.param(30.0, marks=pytest.mark.slow)],
)
def test_calibrated_noise_fits_and_is_tight(sampling, accountant, relation, target):
    question: Any = {
        "steps": 40,
        "delta": DELTA,
        "sampling": sampling,
        "accountant": accountant,
        "neighboring_relation": relation,
    }
    sigma = calibrate_noise_multiplier(target, **question)
    assert epsilon(sigma, **question) <= target
    assert epsilon(sigma / 1.001, **question) > target


@pytest.mark.slow
def test_calibrated_noise_agrees_with_dp_accounting():
    theirs = dp_accounting.calibrate_dp_mechanism(
        PLDAccountant,
        lambda sigma: dp_event(sigma, PoissonSampling(0.04), 250),
        3.0,
        DELTA,
        dp_accounting.ExplicitBracketInterval(0.8, 2.0),
        tol=1e-4,
    )
    ours = calibrate_noise_multiplier(3.0, delta=DELTA, steps=250, sampling_rate=0.04)
    assert ours == pytest.approx(theirs, rel=1.1e-3)


@pytest.mark.parametrize(("sampling", "accountant", "relation"), CALIBRATIONS)
@pytest.mark.parametrize("target", [1.0, 4.0])
def test_calibrated_steps_fit_and_one_more_does_not(sampling, accountant, relation, target):
    question: Any = {
        "noise_multiplier": 4.0,
        "delta": DELTA,
        "sampling": sampling,
        "accountant": accountant,
        "neighboring_relation": relation,
    }
    steps = calibrate_steps(target, **question)
    assert epsilon(steps=steps, **question) <= target < epsilon(steps=steps + 1, **question)


def test_calibrated_steps_at_the_ends():
    question: Any = {"delta": DELTA, "sampling_rate": 0.01}
    assert calibrate_steps(1.0, noise_multiplier=0.0, **question) == 0
    assert calibrate_steps(0.01, noise_multiplier=0.3, **question) == 0
    assert calibrate_steps(5.0, noise_multiplier=5.0, at_most=17, **question) == 17
    assert calibrate_steps(5.0, noise_multiplier=5.0, at_most=0, **question) == 0


@given(
    st.integers(0, 5000),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 6000),
    st.one_of(st.just(1), st.integers(1, 7000)),
    st.integers(0, 5000),
)
@MANY
def test_largest_count_is_exact_for_any_growth(answer, power, at_most, near, leap):
    """Wherever it begins to look, and also where ε is 0 up to a count and leaps up there."""

    def epsilon_at(steps: int) -> float:
        assert 0 < steps <= at_most
        return steps**power if steps > leap else 0.0

    found = largest_count(epsilon_at, (answer + 0.5) ** power, at_most, near)
    assert found == min(max(answer, leap), at_most)


@pytest.mark.parametrize("past", [0, 10, 1000, 100_000])
@pytest.mark.parametrize("power", [0.5, 0.7, 1.0])
def test_a_count_is_found_by_a_few_questions_whatever_was_spent_before(past, power):
    """Near the end of a budget ε hardly rises from one step to the next."""
    for answer in (1, 5, 40, 68, 300, 999, 5000, 1_000_000):
        asked = set()

        def epsilon_at(steps: int, asked=asked) -> float:
            asked.add(steps)
            return (past + steps) ** power

        assert largest_count(epsilon_at, (past + answer + 0.5) ** power, 10_000_000) == answer
        assert len(asked) <= 12


def test_steps_left_near_the_end_of_a_budget_composes_a_few_times(monkeypatch):
    asked: list[Any] = []
    seen = ledger_module.epsilon_of

    def counting(*question: Any) -> float:
        asked.append(question)
        return seen(*question)

    monkeypatch.setattr(ledger_module, "epsilon_of", counting)
    spent = Ledger().charge(1.5, PoissonSampling(0.01), 800)
    limit = spent.charge(1.35, PoissonSampling(0.01), 70).epsilon(DELTA, accountant="rdp")
    asked.clear()
    question: Any = {"epsilon": limit, "delta": DELTA, "accountant": "rdp", "at_most": 1000}
    assert spent.steps_left(1.35, PoissonSampling(0.01), **question) == 70
    # Each count once: a question of a ledger with thousands of entries is dear even if answered.
    assert len(asked) == len(set(asked)) <= 8


@pytest.mark.sweep
@pytest.mark.parametrize(("accountant", "relation"), [("pld", ADD), ("pld", REPLACE), ("rdp", ADD)])
def test_calibrated_rate_fits_and_is_tight(accountant, relation):
    question: Any = {
        "noise_multiplier": [2.0, 2.0],
        "steps": 30,
        "delta": DELTA,
        "accountant": accountant,
        "neighboring_relation": relation,
    }
    rate = calibrate_sampling_rate(1.0, **question)
    assert epsilon(sampling_rate=rate, **question) <= 1.0
    assert epsilon(sampling_rate=rate * 1.001, **question) > 1.0
    assert calibrate_sampling_rate(200.0, **question) == 1.0
