"""ε of equal steps against closed forms, numeric integration and dp-accounting."""

import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdp import accounting
from jaxdp.accounting import (
    FixedSizeSampling,
    PoissonSampling,
    ShuffledEpochs,
    combined_noise_multiplier,
    dp_event,
    epsilon,
)
from tests.accounting.closed_forms import (
    gaussian_epsilon,
    sampled_epsilon,
)
from tests.accounting.small import ADD, DELTA, REPLACE

SETTINGS = settings(derandomize=True, deadline=None, max_examples=4)
MANY = settings(derandomize=True, deadline=None, max_examples=60)
RELATIONS = {
    ADD: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    REPLACE: dp_accounting.NeighboringRelation.REPLACE_ONE,
}
ANY: Any = accounting


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "pld", "rdp"),
    [
        (1.1, 0.04, 250, 3.4715, 3.8950),
        ([2.0, 3.0, 4.0], 0.04, 250, 1.9851, 2.1969),
        (1.1, 256 / 60_000, 14_062, 2.3817, 2.5966),
    ],
)
def test_reference_values(sigma, rate, steps, pld, rdp):
    for accountant, expected in (("pld", pld), ("rdp", rdp)):
        found = ANY.epsilon(
            sigma, steps=steps, delta=DELTA, sampling_rate=rate, accountant=accountant
        )
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sigma", [0.7, 3.0])
@pytest.mark.parametrize("relation", [ADD, REPLACE])
@pytest.mark.parametrize("epochs", [1, 9])
def test_unsampled_gaussians_match_the_closed_form(sigma, relation, epochs):
    distance = 2.0 if relation == REPLACE else 1.0
    exact = gaussian_epsilon(distance * math.sqrt(epochs) / sigma)
    question: Any = {"steps": 5 * epochs, "delta": DELTA, "neighboring_relation": relation}
    tight = epsilon(sigma, sampling=ShuffledEpochs(5), **question)
    assert exact - 1e-9 <= tight <= exact * 1.001
    loose = epsilon(sigma, sampling=ShuffledEpochs(5), accountant="rdp", **question)
    assert exact <= loose <= exact * 1.25


@pytest.mark.sweep
@pytest.mark.parametrize(("sigma", "rate"), [(0.8, 0.02), (1.5, 0.3), (3.0, 0.1), (1.0, 1.0)])
@pytest.mark.parametrize("relation", [ADD, REPLACE])
def test_poisson_steps_match_numeric_integration(sigma, rate, relation):
    exact = sampled_epsilon(sigma, rate, relation)
    found = epsilon(sigma, steps=1, delta=DELTA, sampling_rate=rate, neighboring_relation=relation)
    assert exact - 1e-6 <= found <= exact * 1.001 + 1e-6


def test_the_oracle_tells_the_two_replace_one_conventions_apart():
    """Noise relative to distance 1 instead of 2 would be off by more than the test tolerates."""
    assert gaussian_epsilon(2 / 3.0) > 2 * gaussian_epsilon(1 / 3.0)
    ours, halved = (sampled_epsilon(sigma, 0.1, REPLACE) for sigma in (3.0, 6.0))
    assert ours > 2 * halved


@pytest.mark.parametrize(("batch", "steps"), [(500, 1), (900, 1), (1000, 1), (1000, 16)])
def test_fixed_size_is_above_its_exact_lower_bound(batch, steps):
    """The replaced example alone against a batch of zeros is one attack, hence a lower bound."""
    sigma, scheme = 3.0, FixedSizeSampling(1000, batch)
    question: Any = {"delta": DELTA, "accountant": "rdp", "neighboring_relation": REPLACE}
    found = epsilon(sigma, steps=steps, sampling=scheme, **question)
    attack = (
        gaussian_epsilon(2 * math.sqrt(steps) / sigma)
        if batch == 1000
        else sampled_epsilon(sigma, batch / 1000, REPLACE)
    )
    assert found >= attack
    # dp-accounting read with noise / clip norm claims less than the attack achieves.
    naive = RdpAccountant(neighboring_relation=RELATIONS[REPLACE])
    naive.compose(dp_event(sigma, scheme, steps))
    assert naive.get_epsilon(DELTA) < attack


@pytest.mark.parametrize(
    ("sampling", "accountant", "relation"),
    [
        (PoissonSampling(0.1), "pld", ADD),
        (PoissonSampling(0.1), "pld", REPLACE),
        (PoissonSampling(0.1), "rdp", ADD),
        (FixedSizeSampling(100, 10), "rdp", REPLACE),
        (ShuffledEpochs(3), "pld", ADD),
        (ShuffledEpochs(3), "pld", REPLACE),
        (ShuffledEpochs(3), "rdp", ADD),
        (ShuffledEpochs(3), "rdp", REPLACE),
    ],
)
def test_never_below_dp_accounting(sampling, accountant, relation):
    theirs = (
        PLDAccountant(RELATIONS[relation])
        if accountant == "pld"
        else RdpAccountant(neighboring_relation=RELATIONS[relation])
    )
    theirs.compose(dp_event(2.0, sampling, 20))
    ours = epsilon(
        2.0,
        steps=20,
        delta=DELTA,
        sampling=sampling,
        accountant=accountant,
        neighboring_relation=relation,
    )
    halved = (accountant, relation) == ("rdp", REPLACE)
    assert ours >= theirs.get_epsilon(DELTA)
    assert halved or ours == pytest.approx(theirs.get_epsilon(DELTA), rel=1e-8)


@given(
    sigma=st.floats(0.6, 5.0),
    steps=st.integers(1, 300),
    rate=st.floats(0.005, 0.3),
    exponent=st.floats(-8, -3),
    data=st.data(),
)
@SETTINGS
def test_epsilon_is_monotone_in_every_argument(sigma, steps, rate, exponent, data):
    accountant = data.draw(st.sampled_from(["pld", "rdp"]))

    def at(sigma=sigma, steps=steps, rate=rate, delta=10**exponent) -> float:
        return epsilon(sigma, steps=steps, delta=delta, sampling_rate=rate, accountant=accountant)

    base = at()
    assert at(sigma=sigma * 1.3) < base or base == 0.0
    assert at(steps=steps * 2) > base or base == 0.0
    assert at(rate=rate * 1.3) > base or base == 0.0
    assert at(delta=10 ** (exponent + 0.5)) < base or base == 0.0


@pytest.mark.parametrize("sampling", [PoissonSampling(0.1), ShuffledEpochs(2)])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_no_noise_and_no_steps(sampling, accountant):
    def at(sigma: Any, steps: int) -> float:
        return epsilon(sigma, steps=steps, delta=DELTA, sampling=sampling, accountant=accountant)

    assert at(0.0, 3) == at([1.0, 0.0], 3) == at(1e-200, 3) == math.inf
    assert at(0.0, 0) == at(1.0, 0) == 0.0
    assert at(1e200, 3) < 1e-3


@pytest.mark.sweep
@pytest.mark.parametrize("sigma", [0.05, 0.3])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_little_noise_gets_a_large_answer_not_a_large_grid(sigma, accountant):
    question: Any = {"steps": 4, "delta": DELTA, "accountant": accountant}
    found = epsilon(sigma, sampling=ShuffledEpochs(1), **question)
    mean = 2 / sigma
    assert mean**2 / 2 < found < mean**2 / 2 + 12 * mean
    assert epsilon(sigma, sampling_rate=0.5, **question) <= found * (1 + 1e-3)


def test_sampling_rate_is_the_shorthand_of_poisson():
    question: Any = {"steps": 20, "delta": DELTA}
    shorthand = epsilon(1.0, sampling_rate=0.1, **question)
    assert shorthand == epsilon(1.0, sampling=PoissonSampling(0.1), **question)
    assert shorthand == ANY.epsilon(np.float32(1.0), sampling_rate=np.float64(0.1), **question)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.floats(0.1, 10))
@MANY
def test_combined_noise_multiplier(sigmas, factor):
    combined = combined_noise_multiplier(sigmas)
    assert combined == pytest.approx(sum(s**-2 for s in sigmas) ** -0.5, rel=1e-12)
    assert combined <= min(sigmas)
    scaled = combined_noise_multiplier([factor * s for s in sigmas])
    assert scaled == pytest.approx(factor * combined, rel=1e-12)
    assert combined_noise_multiplier([*sigmas, 0.0]) == 0.0
    assert combined_noise_multiplier(sigmas[0]) == combined_noise_multiplier([sigmas[0]])


def test_combined_noise_multiplier_is_one_gaussian_inside_the_sampling():
    """Two releases from ONE batch cost more than two steps, each with its own batch."""
    question: Any = {"delta": DELTA, "sampling_rate": 0.1}
    together = epsilon([1.5, 1.5], steps=1, **question)
    exact = sampled_epsilon(1.5 / math.sqrt(2), 0.1, ADD)
    assert together == pytest.approx(exact, rel=1e-3)
    assert together > epsilon(1.5, steps=2, **question) * 1.05


def test_combined_noise_multiplier_survives_extreme_scales():
    assert combined_noise_multiplier([1e-200, 1e200]) == 1e-200
