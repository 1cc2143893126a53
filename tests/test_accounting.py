"""Epsilon against closed forms and numeric integration, calibration round trips, the ledger."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, Literal

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq

from jaxdp import accounting
from jaxdp.accounting import (
    FixedSizeSampling,
    Ledger,
    LedgerEntry,
    PoissonSampling,
    PureRelease,
    SamplingScheme,
    ShuffledEpochs,
    calibrate_noise_multiplier,
    calibrate_sampling_rate,
    calibrate_steps,
    combined_noise_multiplier,
    dp_event,
    epsilon,
)
from jaxdp.accounting import ledger as ledger_module
from jaxdp.accounting.search import largest_count

SETTINGS = settings(derandomize=True, deadline=None, max_examples=4)
MANY = settings(derandomize=True, deadline=None, max_examples=60)
DELTA = 1e-5
ADD: Literal["add_or_remove_one"] = "add_or_remove_one"
REPLACE: Literal["replace_one"] = "replace_one"
RELATIONS = {
    ADD: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    REPLACE: dp_accounting.NeighboringRelation.REPLACE_ONE,
}

# --- oracles: nothing below this line to the next one uses dp-accounting -------------------------


def root(excess: Callable[[float], float], upper: float) -> float:
    """Where a decreasing function crosses zero in [0, upper]."""
    found: Any = brentq(excess, 0.0, upper)
    return float(found)


def gaussian_epsilon(mean: float, delta: float = DELTA) -> float:
    """ε of N(0, 1) against N(mean, 1): Φ(μ/2 - ε/μ) - exp(ε) Φ(-μ/2 - ε/μ) = δ."""

    def excess(eps: float) -> float:
        tail = math.exp(eps + stats.norm.logcdf(-mean / 2 - eps / mean))
        return float(stats.norm.cdf(mean / 2 - eps / mean)) - tail - delta

    return root(excess, mean**2 / 2 + 10 * mean)


def mixture_delta(
    eps: float, sigma: float, left: dict[float, float], right: dict[float, float]
) -> float:
    """Hockey-stick divergence ∫ max(p - exp(ε) r, 0) of two Gaussian mixtures {mean: weight}."""
    x, width = np.linspace(-15 * sigma - 1, 15 * sigma + 1, 400_001, retstep=True)
    p, r = (
        sum(weight * stats.norm.pdf(x, mean, sigma) for mean, weight in side.items())
        for side in (left, right)
    )
    return float(np.maximum(p - math.exp(eps) * r, 0.0).sum() * width)


def epsilon_of_pair(
    sigma: float, left: dict[float, float], right: dict[float, float], delta: float
) -> float:
    """The ε ≥ 0 at which the hockey-stick divergence of one ordered pair is δ."""

    def excess(eps: float) -> float:
        return mixture_delta(eps, sigma, left, right) - delta

    return root(excess, 60.0) if excess(0.0) > 0 else 0.0


def sampled_epsilon(sigma: float, rate: float, relation: str, delta: float = DELTA) -> float:
    """ε of one Poisson step: the worst of all orders of the dominating pairs."""
    with_example, moved = {0.0: 1 - rate, 1.0: rate}, {0.0: 1 - rate, -1.0: rate}
    pairs = (
        [(with_example, moved)]
        if relation == REPLACE
        else [(with_example, {0.0: 1.0}), ({0.0: 1.0}, with_example)]
    )
    return max(epsilon_of_pair(sigma, left, right, delta) for left, right in pairs)


def pure_delta(eps: float, releases: list[float], mean: float = 0.0) -> float:
    """δ of randomised responses at the given ε beside N(0, 1) against N(mean, 1).

    Each response adds ±ε_i to the privacy loss, with chances e^±ε_i/2 / (2 cosh ε_i/2).
    """
    losses, chances = np.zeros(1), np.ones(1)
    for each in releases:
        likely = 1 / (1 + math.exp(-each))
        losses = np.concatenate([losses + each, losses - each])
        chances = np.concatenate([chances * likely, chances * (1 - likely)])
    left = eps - losses
    if mean == 0:
        hockey_stick = np.maximum(-np.expm1(left), 0)
    else:
        tail = np.exp(left + stats.norm.logcdf(-mean / 2 - left / mean))
        hockey_stick = stats.norm.cdf(mean / 2 - left / mean) - tail
    return float(np.sum(chances * hockey_stick))


def pure_epsilon(releases: list[float], mean: float = 0.0, delta: float = DELTA) -> float:
    upper = sum(releases) + mean**2 / 2 + 10 * mean
    return root(lambda eps: pure_delta(eps, releases, mean) - delta, upper)


def brute_force_participations(sigmas: list[float], epoch: int) -> list[float]:
    """The smallest noise of every epoch, one step at a time."""
    return [min(sigmas[start : start + epoch]) for start in range(0, len(sigmas), epoch)]


# --- epsilon -------------------------------------------------------------------------------------


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
        found = EPSILON(sigma, steps=steps, delta=DELTA, sampling_rate=rate, accountant=accountant)
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
    found = epsilon(
        sigma, steps=1, delta=DELTA, sampling_rate=rate, neighboring_relation=relation
    )
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
        return epsilon(
            sigma, steps=steps, delta=delta, sampling_rate=rate, accountant=accountant
        )

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
    assert shorthand == EPSILON(np.float32(1.0), sampling_rate=np.float64(0.1), **question)


# --- combined noise ------------------------------------------------------------------------------


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


# --- schemes and events --------------------------------------------------------------------------

SCHEMES: list[SamplingScheme] = [
    PoissonSampling(0.1),
    FixedSizeSampling(100, 7),
    ShuffledEpochs(13),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_survive_json_and_are_frozen(scheme):
    rebuilt = accounting.scheme_from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert rebuilt == scheme
    assert hash(rebuilt) == hash(scheme)
    field = dataclasses.fields(scheme)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(scheme, field, 1)


def test_events_are_dp_accounting_events():
    gaussian = dp_accounting.GaussianDpEvent(2.0)
    poisson = dp_accounting.PoissonSampledDpEvent(0.1, gaussian)
    fixed = dp_accounting.SampledWithoutReplacementDpEvent(100, 7, gaussian)
    many = dp_accounting.SelfComposedDpEvent
    assert dp_event(2.0, PoissonSampling(0.1), 5) == many(poisson, 5)
    assert dp_event(2.0, FixedSizeSampling(100, 7), 5) == many(fixed, 5)
    assert dp_event(2.0, ShuffledEpochs(4), 5) == many(gaussian, 2)
    assert dp_event(2.0, ShuffledEpochs(4), 4) == gaussian
    assert dp_event(2.0, PoissonSampling(0.1), 0) == dp_accounting.NoOpDpEvent()
    silent = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(0.0))
    assert dp_event([2.0, 0.0], PoissonSampling(0.1)) == silent
    both = Ledger().charge(2.0, PoissonSampling(0.1)).charge(2.0, ShuffledEpochs(4))
    assert both.dp_event() == dp_accounting.ComposedDpEvent([poisson, gaussian])


# --- calibration ---------------------------------------------------------------------------------

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
@pytest.mark.parametrize(
    ("accountant", "relation"), [("pld", ADD), ("pld", REPLACE), ("rdp", ADD)]
)
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


# --- ledger --------------------------------------------------------------------------------------

POISSON, OTHER, FIXED, SHUFFLED = (
    PoissonSampling(0.1),
    PoissonSampling(0.2),
    FixedSizeSampling(100, 10),
    ShuffledEpochs(4),
)

noise = st.one_of(
    st.floats(0, 1e6), st.lists(st.floats(0, 1e6), min_size=1, max_size=3).map(tuple)
)
steps_of_a_run = st.tuples(
    noise, st.sampled_from([POISSON, OTHER, FIXED, SHUFFLED]), st.integers(0, 1000)
)
pure_releases = st.builds(
    PureRelease, st.floats(1e-6, 1e6), st.sampled_from([None, POISSON, PoissonSampling(1.0)])
)
charges = st.lists(st.one_of(steps_of_a_run, pure_releases), max_size=6)


def ledger_of(*charged: tuple[Any, SamplingScheme, int] | PureRelease) -> Ledger:
    ledger = Ledger()
    for each in charged:
        if isinstance(each, PureRelease):
            ledger = ledger.charge_pure(each.epsilon, each.sampling)
        else:
            ledger = ledger.charge(*each)
    return ledger


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


# --- pure releases -------------------------------------------------------------------------------

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
        max(np.log(most / chances).max(), np.log(chances / least).max()), np.log(most / least).max()
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


# --- errors --------------------------------------------------------------------------------------

# Typed as Any: the table passes wrong types on purpose.
EPSILON: Any = epsilon
NOISE: Any = calibrate_noise_multiplier
RATE: Any = calibrate_sampling_rate
STEPS: Any = calibrate_steps
ANY: Any = accounting
BOOK: Any = Ledger()


def ask(sigma: Any = 1.0, **changes: Any) -> Callable[[], object]:
    return lambda: EPSILON(sigma, **({"steps": 3, "delta": DELTA, "sampling": POISSON} | changes))


ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (ask(-1.0), ValueError, "noise_multiplier must be finite, >= 0, got -1.0"),
    (ask(math.inf), ValueError, "noise_multiplier must be finite"),
    (ask([1.0, math.nan]), ValueError, "noise_multiplier must be finite"),
    (ask([]), ValueError, "noise_multiplier must hold at least one number"),
    (ask("1"), TypeError, "noise_multiplier must be a real number, got '1'"),
    (ask(True), TypeError, "noise_multiplier must be a real number, got True"),
    (ask(None), TypeError, "noise_multiplier must be a real number, got None"),
    (ask(steps=-1), ValueError, "steps must be at least 0, got -1"),
    (ask(steps=1.0), TypeError, "steps must be an integer, got 1.0"),
    (ask(delta=0.0), ValueError, "delta must be finite, > 0, < 1, got 0.0"),
    (ask(delta=1.0), ValueError, "delta must be finite, > 0, < 1, got 1.0"),
    (ask(delta=None), TypeError, "delta must be a real number, got None"),
    (ask(sampling=None), ValueError, "exactly one of sampling_rate and sampling"),
    (ask(sampling_rate=0.1), ValueError, "exactly one of sampling_rate and sampling"),
    (ask(sampling=0.1), TypeError, "sampling must be PoissonSampling, FixedSizeSampling or"),
    (ask(sampling=None, sampling_rate=0), ValueError, "sampling_rate must be finite, > 0, <= 1"),
    (ask(accountant="prv"), ValueError, "accountant must be 'pld' or 'rdp', got 'prv'"),
    (ask(neighboring_relation="zero"), ValueError, "neighboring_relation must be 'add_or_remove"),
    (ask(sampling=FIXED), ValueError, 'Use accountant="rdp" with .*"replace_one"'),
    (ask(sampling=FIXED, accountant="rdp"), ValueError, 'accountant="rdp" with .*"replace_one"'),
    (ask(sampling=FIXED, neighboring_relation=REPLACE), ValueError, "which it does not"),
    (
        ask(accountant="rdp", neighboring_relation=REPLACE),
        ValueError,
        'Use accountant="pld" for "replace_one"',
    ),
    (ask(0.0, sampling=FIXED), ValueError, "must be one that dp-accounting supports"),
    (
        lambda: ledger_of((1.0, POISSON, 1), (1.0, FIXED, 1)).epsilon(DELTA),
        ValueError,
        "No accountant composes Poisson and fixed-size steps",
    ),
    (lambda: PoissonSampling(0), ValueError, "sampling_rate must be finite, > 0, <= 1, got 0.0"),
    (lambda: PoissonSampling(1.1), ValueError, "sampling_rate must be"),
    (lambda: ANY.PoissonSampling("a"), TypeError, "sampling_rate must be a real number"),
    (lambda: FixedSizeSampling(5, 6), ValueError, "batch_size must be at most num_examples=5"),
    (lambda: FixedSizeSampling(0, 1), ValueError, "num_examples must be at least 1"),
    (lambda: ShuffledEpochs(0), ValueError, "steps_per_epoch must be at least 1, got 0"),
    (lambda: ANY.ShuffledEpochs(1.5), TypeError, "steps_per_epoch must be an integer"),
    (lambda: ANY.scheme_from_dict({"kind": "x"}), ValueError, "sampling kind must be 'poisson'"),
    (lambda: ANY.scheme_from_dict({"kind": "poisson"}), ValueError, "sampling scheme must be a m"),
    (lambda: ANY.LedgerEntry((1.0,), POISSON, 0), ValueError, "steps must be at least 1, got 0"),
    (lambda: ANY.LedgerEntry((1.0,), None, 1), TypeError, "sampling must be PoissonSampling"),
    (lambda: BOOK.charge(-1.0, POISSON), ValueError, "noise_multiplier must be"),
    (lambda: BOOK.charge(-1.0, POISSON, 0), ValueError, "noise_multiplier must be"),
    (lambda: BOOK.charge(1.0, 0.1), TypeError, "sampling must be PoissonSampling"),
    (lambda: BOOK.charge(1.0, POISSON, -1), ValueError, "steps must be at least 0, got -1"),
    (lambda: BOOK.charge_pure(0.0), ValueError, "epsilon must be finite, > 0, got 0.0"),
    (lambda: BOOK.charge_pure(math.inf), ValueError, "epsilon must be finite, > 0, got inf"),
    (lambda: BOOK.charge_pure("1"), TypeError, "epsilon must be a real number, got '1'"),
    (lambda: BOOK.charge_pure(0.1, 0.5), TypeError, "must be PoissonSampling or None, got 0.5"),
    (lambda: BOOK.charge_pure(0.1, SHUFFLED), TypeError, "Pass None where the whole data set"),
    (lambda: BOOK.charge_pure(0.1).dp_event(), ValueError, "Ask the ledger itself for epsilon"),
    (lambda: BOOK.merge({}), TypeError, "other must be of type Ledger, got {}"),
    (lambda: BOOK.epsilon(2.0), ValueError, "delta must be"),
    (lambda: BOOK.delta(-1.0), ValueError, "epsilon must be finite, >= 0, got -1.0"),
    (
        lambda: BOOK.steps_left(1.0, POISSON, epsilon=0.0, delta=DELTA),
        ValueError,
        "epsilon must be finite, > 0, got 0.0",
    ),
    (
        lambda: NOISE(1.0, delta=DELTA, steps=0, sampling_rate=0.1),
        ValueError,
        "steps must be at least 1, got 0. Without a step there is no noise",
    ),
    (
        lambda: NOISE(1e-9, delta=1e-17, steps=5, sampling_rate=0.1),
        ValueError,
        "epsilon must be reachable.* still gives inf. .*rdp",
    ),
    (
        lambda: NOISE(1e9, delta=DELTA, steps=1, sampling_rate=0.1, accountant="rdp"),
        ValueError,
        "epsilon must need noise.*Lower epsilon, or delta",
    ),
    (
        lambda: RATE(1.0, noise_multiplier=0.0, steps=5, delta=DELTA),
        ValueError,
        "epsilon must be reachable.*noise_multiplier=0 gives inf even at",
    ),
    (
        lambda: STEPS(1.0, noise_multiplier=1.0, delta=DELTA, sampling_rate=0.1, at_most=-1),
        ValueError,
        "at_most must be at least 0, got -1",
    ),
    (
        lambda: STEPS("1", noise_multiplier=1.0, delta=DELTA, sampling_rate=0.1),
        TypeError,
        "epsilon must be a real number, got '1'",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_rule_and_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
