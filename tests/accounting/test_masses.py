"""Masses of composed losses: none is below the truth, and hardly any is above it."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.pld_pmf import DensePLDPmf
from dp_accounting.pld.privacy_loss_distribution import (
    PrivacyLossDistribution,
    from_gaussian_mechanism,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import exp, expm1, log, log1p, mpf, ncdf, workdps
from scipy.stats import binom

from jaxdp import accounting
from jaxdp.accounting import Ledger, PoissonSampling, one_step
from jaxdp.accounting.masses import Masses
from jaxdp.accounting.one_step import pld_of_gaussian
from tests.accounting.closed_forms import gaussian_epsilon

STEPS = [(0.6, 0.2, 3), (1.0, 0.01, 1), (1.1, 0.04, 250), (2.0, 0.5, 40), (8.0, 1.0, 20)]
STEPS += [(0.3, 0.001, 2), (1.0, 0.01, 10_000), (5.0, 0.1, 100_000)]


def sides(pld: PrivacyLossDistribution) -> list[Any]:
    """The masses for either direction of neighbours."""
    of: Any = pld
    return [of._pmf_remove, of._pmf_add]


def plain(pld: PrivacyLossDistribution) -> PrivacyLossDistribution:
    """The same masses, composed by dp-accounting alone."""
    of: Any = pld
    dense = [
        DensePLDPmf(each.interval, each.lower, each.probs, each.infinite, True)
        for each in sides(pld)
    ]
    return PrivacyLossDistribution(dense[0], None if of._symmetric else dense[1])


def assert_alike(ours: PrivacyLossDistribution, theirs: PrivacyLossDistribution) -> None:
    """As private as dp-accounting says, where it does not say what rounding made."""
    for one, other in zip(sides(ours), sides(theirs), strict=True):
        for delta in (1e-2, 1e-5, 1e-8):
            expected = other.get_epsilon_for_delta(delta)
            assert one.get_epsilon_for_delta(delta) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for epsilon in (0.0, 0.5, 3.0):
            found, expected = (each.get_delta_for_epsilon(epsilon) for each in (one, other))
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("replace_one", [False, True])
@pytest.mark.parametrize(("sigma", "rate", "count"), STEPS)
def test_a_repeated_step_is_that_of_dp_accounting(
    sigma: float, rate: float, count: int, replace_one: bool
) -> None:
    step = pld_of_gaussian(sigma, sampling_rate=rate, replace_one=replace_one, interval=1e-3)
    theirs = plain(step)
    assert_alike(step.self_compose(count), theirs.self_compose(count))
    # Beside another one, of either kind.
    other = from_gaussian_mechanism(2.0, value_discretization_interval=1e-3)
    assert_alike(step.compose(other), theirs.compose(other))


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_schedule_is_that_of_dp_accounting(delta: float) -> None:
    ledger, theirs = Ledger(), PLDAccountant()
    for sigma, rate, count in [(1.1, 0.01, 100), (1.5, 0.02, 1), (3.0, 0.1, 30), (2.0, 0.01, 7)]:
        ledger = ledger.charge(sigma, PoissonSampling(rate), count)
        step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        theirs.compose(step, count)
    assert ledger.epsilon(delta) == pytest.approx(theirs.get_epsilon(delta), rel=1e-3)


# ---- rounding -----------------------------------------------------------------------------------


def exact_sums(*terms: tuple[Masses, int]) -> list[Fraction]:
    """The masses of sums of places, in rational numbers."""
    sums = [Fraction(1)]
    for masses, count in terms:
        probs = [Fraction(float(each)) for each in masses.probs]
        for _ in range(count):
            wider = [Fraction(0)] * (len(sums) + len(probs) - 1)
            for i, one in enumerate(sums):
                for j, other in enumerate(probs):
                    wider[i + j] += one * other
            sums = wider
    return sums


def assert_hardly_above(found: Masses, exact: list[Fraction], first: int = 0) -> None:
    """Each is at least the truth; near it where it counts, far below the largest as well."""
    kept = exact[found.lower - first :][: found.size]
    least = Fraction(1e-300)  # where floats end
    pairs = zip(found.probs, kept, strict=True)
    assert all(Fraction(float(got)) + least >= true for got, true in pairs)
    tails = np.cumsum([float(each) for each in kept[::-1]])[::-1]
    ours = np.cumsum(found.probs[::-1])[::-1]
    counts = tails > 1e-13
    np.testing.assert_allclose(ours[counts], tails[counts], rtol=2e-3)


def random_masses(seed: int, size: int, smallest: float) -> Masses:
    """Of all magnitudes, in no order."""
    rng = np.random.default_rng(seed)
    probs = np.exp(rng.uniform(math.log(smallest), 0, size)) * rng.choice([0, 1, 1], size)
    probs[0] += 1e-3
    return Masses(0, probs / probs.sum(), 0.0, interval=1.0)


@pytest.mark.parametrize("smallest", [0.3, 1e-8, 1e-30])
@pytest.mark.parametrize(("size", "count"), [(2, 40), (7, 30), (12, 9), (100, 2)])
def test_no_mass_of_equal_releases_is_below_the_truth(
    size: int, count: int, smallest: float
) -> None:
    for seed in range(3):
        step = random_masses(seed, size, smallest)
        for tail in (0.0, 1e-15):
            found = step.self_compose(count, tail)
            assert_hardly_above(found, exact_sums((step, count)))
            assert found.get_delta_for_epsilon(1e9) == tail


@pytest.mark.parametrize("smallest", [0.3, 1e-8, 1e-30])
@pytest.mark.parametrize(("size", "other_size"), [(1, 5), (2, 40), (60, 60)])
def test_no_mass_of_two_releases_is_below_the_truth(
    size: int, other_size: int, smallest: float
) -> None:
    for seed in range(3):
        one, other = (random_masses(seed, each, smallest) for each in (size, other_size))
        assert_hardly_above(one.compose(other), exact_sums((one, 1), (other, 1)))


SUCCESSES = [(0.5, 2), (0.5, 100), (0.5, 10_000), (0.01, 100), (0.01, 1_000_000)]
SUCCESSES += [(1e-4, 2), (1e-4, 10_000), (1e-4, 10_000_000)]


@pytest.mark.parametrize(("chance", "count"), SUCCESSES)
def test_a_number_of_successes_has_the_binomial_law(chance: float, count: int) -> None:
    step = Masses(0, np.array([1 - chance, chance]), 0.0, interval=1.0)
    found = step.self_compose(count, 1e-15)
    places = found.lower + np.arange(found.size)
    outside = binom.cdf(places[0] - 1, count, chance) + binom.sf(places[-1], count, chance)
    assert outside <= 1e-15
    with workdps(40):
        p, n = mpf(float(step.probs[1])), count
        rest = mpf(float(step.probs[0]))
        first = int(places[0])
        true = rest ** (n - first) * p**first
        for k in range(first):
            true = true * (n - k) / (k + 1)
        for place, mass in zip(places.tolist(), found.probs.tolist(), strict=True):
            assert mass >= true
            if place > count * chance and true > 1e-14:
                assert mass <= true * (1 + 1e-4)
            true = true * (n - place) / (place + 1) * p / rest


def test_what_may_lie_outside_counts_as_infinite() -> None:
    beyond = 1e6
    certain = Masses(-2, np.array([0.5, 0.5]), 0.0, interval=0.5)
    assert certain.self_compose(7, 1e-15).get_delta_for_epsilon(beyond) == 1e-15
    release = Masses(-2, np.array([0.5, 0.4999]), 1e-4, interval=0.5).self_compose(5)
    assert release.get_delta_for_epsilon(beyond) == pytest.approx(1 - (1 - 1e-4) ** 5, rel=1e-9)
    alone = Masses(3, np.array([0.5]), 0.5, interval=0.5)
    assert alone.compose(alone).get_delta_for_epsilon(beyond) == 0.75


def test_without_a_tail_nothing_is_cut_off() -> None:
    step = Masses(0, np.array([0.5, 0.5]), 0.0, interval=1.0)
    assert step.self_compose(1000, tail_mass_truncation=0).size == 1001
    with pytest.raises(ValueError, match="num_times"):
        step.self_compose(0)


# ---- the answers --------------------------------------------------------------------------------


def some_output(epsilon: float, sigma: float, rate: float, steps: int) -> float:
    """A δ that is no more than the true one: of the event that some output is beyond t.

    P and e^ε Q of one event are all that δ(ε) is about.
    """
    with workdps(50):
        s, q, most = mpf(sigma), mpf(rate), mpf(0)
        for k in range(-2, 50):
            t = mpf(k) / 4 * s + mpf(1) / 2
            without = ncdf(-t / s)
            with_it = (1 - q) * without + q * ncdf((1 - t) / s)
            p, r = -expm1(steps * log1p(-with_it)), -expm1(steps * log1p(-without))
            most = max(most, p - exp(mpf(epsilon)) * r)
        return float(most)


RARE = [
    (0.5, 1e-5, 5_000_000, (1e-13, 1e-12, 1e-11, 1e-10)),
    (0.3, 1e-7, 100_000, (1e-13, 1e-12)),
    (0.4, 1e-5, 10_000, (1e-13,)),
    (0.4, 1e-6, 5_000_000, (1e-9,)),
    (0.3, 1e-16, 10, (1e-13,)),
]
# Of so few samples there is one large loss, or none: rounding leaves less than is known of it.
LOOSE = [(0.3, 1e-10, 10_000_000, (1e-9, 1e-12))]


@pytest.mark.parametrize(("sigma", "rate", "steps", "deltas"), [*RARE, *LOOSE])
def test_no_event_refutes_an_epsilon(
    sigma: float, rate: float, steps: int, deltas: tuple[float, ...]
) -> None:
    """Few samples, many steps: δ is far below what one transform is off by."""
    for delta in deltas:
        epsilon = accounting.epsilon(sigma, sampling_rate=rate, steps=steps, delta=delta)
        assert some_output(epsilon, sigma, rate, steps) <= delta
        # Nor is it far off: half of it is refuted, where it is not of the grid alone.
        near = epsilon < 0.2 or some_output(0.5 * epsilon, sigma, rate, steps) > delta
        assert near or (sigma, rate, steps, deltas) in LOOSE


@settings(max_examples=25, deadline=None)
@given(
    steps=st.floats(0, 6.3).map(lambda power: int(10**power)),
    mean=st.floats(-1, 0.8).map(lambda power: 10**power),
    delta=st.floats(-12.5, -2).map(lambda power: 10**power),
)
def test_samples_of_nearly_everybody_are_those_of_everybody(
    steps: int, mean: float, delta: float
) -> None:
    """A Gaussian of many steps has a closed form, which no sampling rate below 1 uses."""
    sigma = math.sqrt(steps) / mean
    found = accounting.epsilon(sigma, sampling_rate=1 - 1e-13, steps=steps, delta=delta)
    expected = gaussian_epsilon(mean, delta)
    # Each step is rounded up to the grid.
    assert expected * (1 - 1e-9) <= found <= 1.01 * expected + 1e-4 * math.sqrt(steps) + 1e-3


def exact_delta(
    of: Callable[..., Any], epsilon: Any, sigma: float, rate: float
) -> Any:
    """δ of one step, of which all digits are right."""
    s, q, e = mpf(sigma), mpf(rate), mpf(epsilon)
    if of is one_step._replaced:
        rest = (1 - q) / q * exp(1 / (2 * s**2)) * (exp(e / 2) - exp(-e / 2)) / 2
        x = s**2 * (e / 2 + log(rest + (rest**2 + 1) ** 0.5))
        mixtures = (
            (1 - q) * ncdf(-x / s) + q * ncdf((mean - x) / s) for mean in (mpf(1), mpf(-1))
        )
        with_it, moved = mixtures
        return with_it - exp(e) * moved
    removed = of is one_step._removed
    excess = (exp(e if removed else -e) - 1 + q) / q
    if excess <= 0:
        return 1 - exp(e) if removed else mpf(0)
    x = s**2 * log(excess) + mpf(1) / 2
    if removed:
        return (1 - q) * ncdf(-x / s) + q * ncdf((1 - x) / s) - exp(e) * ncdf(-x / s)
    return ncdf(x / s) - exp(e) * ((1 - q) * ncdf(x / s) + q * ncdf((x - 1) / s))


@pytest.mark.parametrize("rate", [1e-16, 1e-9, 0.01, 0.6, 1.0])
@pytest.mark.parametrize("of", [one_step._removed, one_step._added, one_step._replaced])
def test_no_delta_of_one_step_is_below_the_truth(of: Callable[..., Any], rate: float) -> None:
    for sigma in (0.2, 1.0, 30.0):
        reach = min(0.5 / sigma**2 + 6 / sigma, 30.0)
        at = np.concatenate([-np.geomspace(1e-6, reach, 12), [0.0], np.geomspace(1e-6, reach, 20)])
        found = of(at, sigma, rate)
        with workdps(200):
            exact = np.array([float(exact_delta(of, each, sigma, rate)) for each in at])
        # The exact one was rounded to a float, too.
        assert np.all(found + 1e-300 >= exact * (1 - 2**-52))
        np.testing.assert_allclose(found, exact, rtol=1e-7, atol=1e-13 * rate)
