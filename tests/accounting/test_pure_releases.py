"""Pure releases beside steps, against closed forms."""

import math
from typing import Any

import numpy as np
import pytest

from jaxdp.accounting import (
    Ledger,
    LedgerEntry,
    PoissonSampling,
    PureRelease,
)
from tests.accounting.closed_forms import (
    pure_delta,
    pure_epsilon,
)
from tests.accounting.small import ADD, DELTA, FIXED, POISSON, REPLACE, SHUFFLED, ledger_of

EPSILONS = [[0.5], [3.0], [0.1] * 12, [0.2, 1.0, 0.2, 0.7]]


@pytest.mark.parametrize("epsilons", EPSILONS, ids=str)
@pytest.mark.parametrize("relation", [ADD, REPLACE])
def test_pure_releases_compose_as_randomised_responses(epsilons, relation):
    ledger = ledger_of(*map(PureRelease, epsilons))
    spent = [2 * each if relation == REPLACE else each for each in epsilons]
    for delta in (1e-5, 0.05):
        exact = pure_epsilon(spent, delta=delta)
        tight = ledger.epsilon(delta, neighboring_relation=relation)
        assert exact - 1e-9 <= tight <= min(exact, sum(spent)) + len(spent) * 1e-4
    exact = pure_epsilon(spent)
    loose = ledger.epsilon(DELTA, accountant="rdp", neighboring_relation=relation)
    assert exact <= loose <= exact * 1.15 + 0.05
    at = sum(spent) / 2
    found = ledger.delta(at, neighboring_relation=relation)
    assert pure_delta(at, spent) - 1e-12 <= found <= pure_delta(at - len(spent) * 1e-4, spent)


def test_a_pure_release_alone_has_the_closed_form():
    ledger = Ledger().charge_pure(1.0)
    assert ledger.delta(0.25) == pytest.approx((math.e - math.exp(0.25)) / (1 + math.e), rel=1e-6)
    exact = math.log(math.e - (1 + math.e) * 0.1)
    assert ledger.epsilon(0.1) == pytest.approx(exact, abs=1e-4)
    assert 1.0 - 1e-4 < ledger.epsilon(1e-12) <= 1.0 + 1e-8


@pytest.mark.parametrize("relation", [ADD, REPLACE])
@pytest.mark.parametrize("epsilons", EPSILONS, ids=str)
def test_pure_releases_beside_gaussians_match_the_closed_form(epsilons, relation):
    ledger = ledger_of((4.0, SHUFFLED, 10), *map(PureRelease, epsilons), (4.0, SHUFFLED, 2))
    factor = 2 if relation == REPLACE else 1
    mean = factor * math.sqrt(3) / 4.0
    exact = pure_epsilon([factor * each for each in epsilons], mean)
    found = ledger.epsilon(DELTA, neighboring_relation=relation)
    assert exact - 1e-6 <= found <= exact * 1.001 + len(epsilons) * 1e-4
    loose = ledger.epsilon(DELTA, accountant="rdp", neighboring_relation=relation)
    assert exact <= loose <= exact * 1.25


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_together_they_cost_more_than_each_and_less_than_both(accountant):
    steps, pure = (1.1, POISSON, 30), PureRelease(0.4)
    alone, chosen, both = (
        ledger_of(*charged).epsilon(DELTA, accountant=accountant)
        for charged in ([steps], [pure], [steps, pure])
    )
    assert max(alone, chosen) < both < alone + 0.4


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("size", [0.01, 1.0, 8.0])
def test_a_pure_release_of_a_draw_is_amplified(rate, size):
    """Against all answers of one bit, with the example drawn or not."""
    release = PureRelease(size, PoissonSampling(rate))
    added, replaced = (release.spent(replace_one=one) for one in (False, True))
    assert added == pytest.approx(math.log1p(rate * math.expm1(size)), rel=1e-9)
    chances = 1 / (1 + np.exp(np.linspace(-12, 12, 400)))

    def with_example(answer):
        """All that differs from `answer` by no more than e^±ε, for it and for the other bit."""
        least = np.maximum(answer * math.exp(-size), 1 - (1 - answer) * math.exp(size))
        most = np.minimum(answer * math.exp(size), 1 - (1 - answer) * math.exp(-size))
        return least, most

    least, most = ((1 - rate) * chances + rate * end for end in with_example(chances))
    found = [
        max(np.log(most / chances).max(), np.log(chances / least).max()),
        np.log(most / least).max(),
    ]
    assert 0.9 * added < found[0] <= added + 1e-9
    assert 0.9 * replaced < found[1] <= replaced + 1e-9
    assert added <= replaced <= 2 * added + 1e-12


def test_a_huge_pure_release_is_none():
    for ledger in (Ledger().charge_pure(1e5), Ledger().charge_pure(1e300, POISSON)):
        assert ledger.epsilon(DELTA) == ledger.epsilon(DELTA, accountant="rdp") == math.inf
        assert ledger.delta(1.0) == 1.0
    large = Ledger().charge_pure(300.0).charge_pure(300.0)
    assert 1199 < large.epsilon(DELTA, neighboring_relation=REPLACE) <= 1200.1


def test_a_pure_release_is_no_step_and_ends_no_epoch():
    ledger = ledger_of((2.0, SHUFFLED, 2), PureRelease(0.5), (2.0, SHUFFLED, 2))
    assert ledger.steps == 4
    assert ledger.entries == (
        LedgerEntry((2.0,), SHUFFLED, 2),
        PureRelease(0.5),
        LedgerEntry((2.0,), SHUFFLED, 2),
    )
    assert ledger.epsilon(DELTA) == ledger_of((2.0, SHUFFLED, 4), PureRelease(0.5)).epsilon(DELTA)


def test_pure_releases_compose_with_every_kind_of_step():
    fixed = ledger_of((3.0, FIXED, 5), PureRelease(0.2))
    question: Any = {"accountant": "rdp", "neighboring_relation": REPLACE}
    assert fixed.epsilon(DELTA, **question) > ledger_of((3.0, FIXED, 5)).epsilon(DELTA, **question)
    many = [(float(s), PoissonSampling(0.02), 3) for s in np.linspace(1, 2.5, 60)]
    rounded, alone = ledger_of(*many, PureRelease(0.2)), ledger_of(*many)
    costs = [each.epsilon(DELTA, accountant="rdp") for each in (alone, rounded)]
    assert costs[0] < costs[1] < costs[0] + 0.2
    merged = ledger_of(PureRelease(0.2)).merge(ledger_of((1.1, POISSON, 3), PureRelease(0.2)))
    together = ledger_of((1.1, POISSON, 3), PureRelease(0.2), PureRelease(0.2))
    assert merged.epsilon(DELTA) == pytest.approx(together.epsilon(DELTA), rel=1e-9)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_steps_left_after_pure_releases_is_exact(accountant):
    spent = ledger_of((1.5, POISSON, 12), PureRelease(0.3), (1.5, POISSON, 3), PureRelease(0.3))
    question: Any = {"delta": DELTA, "accountant": accountant}
    budget = spent.epsilon(**question) + 1.0
    left = spent.steps_left(1.5, POISSON, epsilon=budget, **question)
    assert left > 0
    assert spent.charge(1.5, POISSON, left).epsilon(**question) <= budget
    assert spent.charge(1.5, POISSON, left + 1).epsilon(**question) > budget
    fewer = spent.charge_pure(0.2).steps_left(1.5, POISSON, epsilon=budget, **question)
    assert 0 <= fewer < left
