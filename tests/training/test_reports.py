"""Reports say what the ledger and the state say, and `evaluate` adds to it."""

from typing import Any

import numpy as np
import pytest

from jaxdp import training
from tests.training import small
from tests.training.small import fit

OWN = ("step", "epoch", "epsilon", "delta", "loss", "nonfinite", "samples_per_second")


@pytest.mark.parametrize("name", OWN)
def test_a_name_of_the_report_is_no_name_for_evaluate(name: str) -> None:
    with pytest.raises(ValueError, match=rf"got \['{name}'\], which come from .*\"test_{name}\""):
        fit(evaluate=lambda params: {"accuracy": 0.5, name: 0.0})


def test_the_names_of_a_report_are_those_that_are_refused() -> None:
    assert tuple(fit().history[0]) == OWN


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (3.0, "evaluate must return a dict of numbers by name, got 3.0"),
        (None, "evaluate must return a dict of numbers by name, got None"),
        ({1: 0.5}, "evaluate must return a dict of numbers by name"),
        ([("accuracy", 0.5)], "evaluate must return a dict of numbers by name"),
        ({"accuracy": "high"}, "evaluate must return numbers, got 'high' for 'accuracy'"),
        ({"accuracy": None}, "evaluate must return numbers, got None for 'accuracy'"),
        ({"accuracy": np.ones(2)}, "evaluate must return numbers, got array.* for 'accuracy'"),
    ],
)
def test_evaluate_returns_numbers_by_name(found: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says) as refused:
        fit(evaluate=lambda params: found)
    # A run that has spent something is not lost by that.
    run = training.run_of(refused.value)
    assert run is not None and run.ledger.steps == int(run.state.step) == 2


def test_what_evaluate_returns_stands_beside_what_was_executed() -> None:
    run = fit(evaluate=lambda params: {"accuracy": np.float32(0.5), "worst": float("inf")})
    row = run.history[-1]
    assert (row["accuracy"], row["worst"]) == (0.5, float("inf"))
    assert row["step"] == int(run.state.step) == run.ledger.steps
    assert row["epsilon"] == run.ledger.epsilon(small.DELTA, accountant="rdp")
    assert row["epoch"] == 4 * 6 / 24


def test_the_step_of_a_report_is_that_of_the_state() -> None:
    """Not of a counter beside it."""
    first = fit(steps=2)
    assert [row["step"] for row in fit(state=first.state, ledger=first.ledger).history] == [4]
