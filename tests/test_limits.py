"""Answers within seconds, or a refusal that says which limit; and bounds that are bounds."""

import itertools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant

import jaxdp
from jaxdp import accounting
from jaxdp.accounting import Guarantee, Ledger, PoissonSampling, ShuffledEpochs
from jaxdp.accounting.coarsening import rounded_down
from jaxdp.accounting.composition import epsilon_bound_of, epsilon_of, rough_epsilon_of
from jaxdp.accounting.mechanisms.base import Counted
from jaxdp.accounting.mechanisms.gaussian import SampledGaussian
from jaxdp.accounting.one_step import pld_of_gaussian

DELTA = 1e-5
RELATIONS = {
    False: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    True: dp_accounting.NeighboringRelation.REPLACE_ONE,
}


@pytest.mark.parametrize("replace_one", [False, True])
@pytest.mark.parametrize("rate", [1e-9, 0.01, 0.5, 0.999, 1.0])
def test_one_step_is_that_of_dp_accounting(rate: float, replace_one: bool) -> None:
    for sigma in (0.1, 0.3, 1.0, 5.0, 1e3):
        interval = 0.02 if sigma < 1 else 2e-3
        ours = pld_of_gaussian(
            sigma, sampling_rate=rate, replace_one=replace_one, interval=interval
        )
        theirs = from_gaussian_mechanism(
            sigma,
            sampling_prob=rate,
            value_discretization_interval=interval,
            neighboring_relation=RELATIONS[replace_one],
        )
        at: Any = np.linspace(-1, 8, 50)
        np.testing.assert_allclose(
            ours.get_delta_for_epsilon(at), theirs.get_delta_for_epsilon(at), rtol=1e-9, atol=1e-14
        )


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_bound_is_above_the_answer(accountant: Any, rounded: bool) -> None:
    guarantee = Guarantee(DELTA, accountant)
    for sigma, rate, steps in itertools.product((0.83, 1.7), (0.01, 0.2), (1, 300)):
        step = SampledGaussian(PoissonSampling(rate), sigma)
        answer = epsilon_of((Counted(step, steps),), guarantee)
        bound = epsilon_bound_of((Counted(step, steps),), guarantee, rounded=rounded)
        assert answer <= bound <= answer * 1.08 + 0.02
        weaker = Counted(SampledGaussian(PoissonSampling(rate), rounded_down(sigma)), steps)
        # What the rounded bound grants, it grants to all that is rounded alike.
        assert not rounded or epsilon_of((weaker,), guarantee) <= bound


def test_what_is_rounded_down_is_so_once() -> None:
    """A power of 2^(1/32) is its own answer: rounded twice, a step would be dearer than it is."""
    powers = [2 ** (k / 32) for k in range(-32 * 1022, 32 * 1024)]
    assert [rounded_down(power) for power in powers] == powers
    between = np.exp(np.random.default_rng(0).uniform(-300, 300, 2000)).tolist()
    for sigma in (*between, sys.float_info.min, sys.float_info.max):
        below = rounded_down(sigma)
        assert sigma * 2 ** (-1 / 32) * (1 - 1e-15) < below <= sigma
        assert rounded_down(below) == below


def test_many_rates_are_rounded_to_less_privacy_only() -> None:
    ledger, exact = Ledger(), RdpAccountant()
    for rate in np.linspace(0.01, 0.0311, 40):
        ledger = ledger.charge(2.0, PoissonSampling(rate), 5)  # σ is on the grid
    exact.compose(ledger.dp_event())
    found = ledger.epsilon(DELTA, accountant="rdp")
    assert exact.get_epsilon(DELTA) < found < exact.get_epsilon(DELTA) * 1.05


def test_a_rate_of_one_is_no_sampling() -> None:
    sampled = accounting.epsilon(5.0, steps=10**8, delta=DELTA, sampling_rate=1.0, accountant="rdp")
    plain = accounting.epsilon(
        5.0, steps=10**8, delta=DELTA, sampling=ShuffledEpochs(1), accountant="rdp"
    )
    assert sampled == plain


Beyond = tuple[Callable[[], Any], str]

BEYOND: dict[str, Beyond] = {
    "steps of pld": (
        lambda: accounting.epsilon(1e3, steps=10**12, delta=DELTA, sampling_rate=1e-3),
        'steps must be at most 10000000 for accountant="pld", got 1000000000000.*"rdp"',
    ),
    "steps to be found": (
        lambda: accounting.calibrate_steps(
            3.0, noise_multiplier=1e6, delta=DELTA, sampling_rate=1e-6, at_most=10**18
        ),
        'steps must be at most 10000000 for accountant="pld"',
    ),
    "steps": (
        lambda: accounting.epsilon(1.0, steps=10**30, delta=DELTA, sampling_rate=0.1),
        "steps must be at most 9223372036854775807, got 10",
    ),
    "examples": (
        lambda: jaxdp.PoissonSampler(10**30, expected_batch_size=10),
        "num_examples must be at most 1000000000000, got 10",
    ),
    "examples of a permutation": (
        lambda: jaxdp.ShuffledSampler(10**12, batch_size=10),
        "num_examples must be at most 100000000, got 10",
    ),
    "rows of a physical batch": (
        lambda: jaxdp.PoissonSampler(100, sampling_rate=0.1, physical_batch_size=10**12),
        "physical_batch_size must be at most 100000000, got 10",
    ),
    "examples of a draw": (
        lambda: jaxdp.PoissonSampler(10**12, sampling_rate=0.01),
        "expected_batch_size must be at most 1000000000, got 1e",
    ),
    "physical batches of a draw": (
        lambda: jaxdp.PoissonSampler(10**9, sampling_rate=1.0, physical_batch_size=1),
        "physical_batch_size must hold a 100000th of the expected batch of 1e",
    ),
    "mechanisms": (
        lambda: many_pure(1100).epsilon(DELTA),
        "a ledger must hold at most 1024 different mechanisms, got 1100",
    ),
}


def many_pure(count: int) -> Ledger:
    ledger = Ledger()
    for index in range(count):
        ledger = ledger.charge_pure(0.1 + index / count)
    return ledger


@pytest.mark.parametrize("name", list(BEYOND))
def test_what_is_beyond_a_limit_is_refused_at_once(name: str) -> None:
    action, says = BEYOND[name]
    start = time.process_time()
    with pytest.raises(ValueError, match=says):
        action()
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("sigma", "steps", "rate"), [(1.0, 10**12, 0.01), (1e-5, 10, 0.01), (1.0, 2**63 - 1, 1.0)]
)
def test_an_epsilon_beyond_what_pld_resolves_is_infinite(
    sigma: float, steps: int, rate: float
) -> None:
    question: Any = {"steps": steps, "delta": DELTA, "sampling_rate": rate}
    assert accounting.epsilon(sigma, **question) == math.inf
    assert 1e4 < accounting.epsilon(sigma, accountant="rdp", **question)


@pytest.mark.parametrize(
    ("epsilon", "steps", "rate"),
    [
        (1e-3, 1000, 0.01),
        (50.0, 1000, 0.01),
        (1000.0, 1000, 0.01),
        pytest.param(8.0, 10**7, 0.5, marks=pytest.mark.slow),
    ],
)
def test_calibration_takes_seconds_at_the_ends(epsilon: float, steps: int, rate: float) -> None:
    question: Any = {"delta": DELTA, "steps": steps, "sampling_rate": rate}
    start = time.process_time()
    sigma = accounting.calibrate_noise_multiplier(epsilon, **question)
    assert time.process_time() - start < 10
    assert accounting.epsilon(sigma, **question) <= epsilon


@pytest.mark.parametrize(("sigma", "steps"), [(1.1, 250), (190.0, 400_001)])
def test_a_rough_answer_is_near_the_answer(sigma: float, steps: int) -> None:
    step = (Counted(SampledGaussian(PoissonSampling(0.5), sigma), steps),)
    answer = epsilon_of(step, Guarantee(DELTA))
    assert rough_epsilon_of(step, Guarantee(DELTA)) == pytest.approx(answer, rel=0.03)


@pytest.mark.parametrize(
    ("search", "answer"),
    [
        (lambda: accounting.calibrate_sampling_rate(
            1e-9, noise_multiplier=0.01, steps=10, delta=DELTA
        ), 1e-6),
        pytest.param(lambda: accounting.calibrate_steps(
            1.0, noise_multiplier=0.06, delta=0.5, sampling_rate=1e-4
        ), 6931, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_search_at_little_noise_takes_seconds(search: Callable[[], Any], answer: float) -> None:
    start = time.process_time()
    assert search() == pytest.approx(answer, rel=5e-3)
    assert time.process_time() - start < 10


def test_hundreds_of_different_mechanisms_take_seconds() -> None:
    ledger = Ledger()
    for index in range(300):
        ledger = ledger.charge(1.02**index, PoissonSampling(0.01), 3)
    start = time.process_time()
    assert 0.5 < ledger.epsilon(DELTA) < 3
    assert time.process_time() - start < 10
