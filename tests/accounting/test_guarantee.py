"""One value for what an epsilon is stated with, checked where it is made."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from jaxdp.accounting import (
    Guarantee,
    Ledger,
    PoissonSampling,
    calibrate_noise_multiplier,
    calibrate_sampling_rate,
    calibrate_steps,
    epsilon,
)
from jaxdp.accounting.guarantee import as_guarantee
from jaxdp.training import Budget

RDP = Guarantee(1e-5, "rdp", "replace_one")
ANY: Any = Guarantee
ASKED: Any = as_guarantee


def test_a_guarantee_is_a_value() -> None:
    assert Guarantee(1e-5) == Guarantee(1e-5, "pld", "add_or_remove_one")
    assert len({Guarantee(1e-5), Guarantee(1e-5), RDP}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(RDP, "delta", 0.5)  # noqa: B010


def test_the_arguments_mean_a_guarantee() -> None:
    assert as_guarantee(1e-5, "rdp", "replace_one") == RDP
    assert as_guarantee(RDP) is RDP
    assert as_guarantee(RDP, "rdp") is RDP
    assert as_guarantee(RDP, neighboring_relation="replace_one") is RDP


POISSON = PoissonSampling(0.1)
SPENT = Ledger().charge(4.0, POISSON, 5)
RUN: Any = {"steps": 5, "sampling": POISSON}


def allowed(**question: Any) -> int:
    """How many steps a budget allows."""
    budget, ledger = Budget(0.5, **question), Ledger()
    while budget.allows(ledger, [4.0], POISSON):
        ledger = ledger.charge(4.0, POISSON)
    return ledger.steps


QUESTIONS: dict[str, Callable[..., Any]] = {
    "epsilon": lambda **question: epsilon(4.0, **RUN, **question),
    "ledger": lambda **question: SPENT.epsilon(**question),
    "steps left": lambda **question: SPENT.steps_left(4.0, POISSON, epsilon=2.0, **question),
    "noise": lambda **question: calibrate_noise_multiplier(2.0, **RUN, **question),
    "steps": lambda **question: calibrate_steps(
        2.0, noise_multiplier=4.0, sampling=POISSON, **question
    ),
    "rate": lambda **question: calibrate_sampling_rate(
        2.0, noise_multiplier=4.0, steps=5, **question
    ),
    "budget": allowed,
}


@pytest.mark.parametrize("name", list(QUESTIONS))
def test_every_question_takes_a_guarantee_for_its_three_arguments(name: str) -> None:
    ask = QUESTIONS[name]
    answer = ask(delta=1e-5, accountant="rdp")
    assert ask(delta=Guarantee(1e-5, "rdp")) == answer
    assert ask(delta=Guarantee(1e-5, "rdp"), accountant="rdp") == answer
    assert ask(delta=Guarantee(1e-3, "rdp")) != answer
    with pytest.raises(ValueError, match="accountant must be that of the guarantee, 'rdp', got 'p"):
        ask(delta=Guarantee(1e-5, "rdp"), accountant="pld")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ANY(0.0), ValueError, "delta must be finite, > 0, < 1, got 0.0"),
        (lambda: ANY(RDP), TypeError, "delta must be a real number, got Guarantee"),
        (lambda: ANY(1e-5, "prv"), ValueError, "accountant must be 'pld' or 'rdp', got 'prv'"),
        (lambda: ANY(1e-5, None), TypeError, "accountant must be 'pld' or 'rdp', got None"),
        (lambda: ANY(1e-5, "rdp", "some"), ValueError, "neighboring_relation must be 'add_or_rem"),
        (lambda: ASKED(RDP, "pld"), ValueError, "accountant must be that of the guarantee, 'rdp'"),
        (lambda: ASKED(RDP, "prv"), ValueError, "accountant must be 'pld' or 'rdp', got 'prv'"),
        (
            lambda: ASKED(RDP, None, "add_or_remove_one"),
            ValueError,
            "neighboring_relation must be that of the guarantee, 'replace_one', got 'add_or_rem",
        ),
    ],
)
def test_what_is_none_is_refused(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
