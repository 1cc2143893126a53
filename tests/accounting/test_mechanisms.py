"""The registry of mechanisms: what CONTRIBUTING.md says of a new one."""

import math
from typing import Any

import pytest

from jaxdp.accounting import Ledger, PoissonSampling, mechanisms
from tests.test_contributing import example


def test_the_example_of_a_new_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    release = example("Adding a mechanism")["LaplaceRelease"]
    monkeypatch.setitem(mechanisms.KINDS, "scale", release)
    alone = Ledger(current=(release(2.0),))
    assert Ledger.from_json(alone.to_json()) == alone
    with pytest.raises(ValueError, match="scale must be finite, > 0, got 0.0"):
        Ledger.from_json(alone.to_json().replace("2.0", "0.0"))
    # δ(ε) = 1 - e^((ε - Δ/b)/2) of Laplace noise of scale b at distance Δ.
    for relation, distance in (("add_or_remove_one", 1), ("replace_one", 2)):
        question: Any = {"neighboring_relation": relation}
        exact = 1 - math.exp((0.1 - distance / 2.0) / 2)
        assert exact <= alone.delta(0.1, **question) <= exact * 1.001
        assert distance / 2.0 <= alone.epsilon(1e-12, accountant="rdp", **question)
    # Two runs of it, and steps beside them.
    twice = alone.merge(alone)
    assert alone.epsilon(1e-5) < twice.epsilon(1e-5) <= 2 * alone.epsilon(1e-5) + 1e-3
    for accountant in ("pld", "rdp"):
        asked: Any = {"delta": 1e-5, "accountant": accountant}
        both = twice.charge(4.0, PoissonSampling(0.1), 10)
        steps = Ledger().charge(4.0, PoissonSampling(0.1), 10).epsilon(**asked)
        assert max(steps, twice.epsilon(**asked)) < both.epsilon(**asked)
        assert both.steps_left(4.0, PoissonSampling(0.1), epsilon=2.0, **asked) > 10
