"""A step that is repeated: as dp-accounting repeats it, and its moments are found once."""

from functools import cached_property
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant, common
from dp_accounting.pld.pld_pmf import DensePLDPmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, identity
from scipy.stats import binom

from jaxdp.accounting import Ledger, PoissonSampling
from jaxdp.accounting.mechanisms import gaussian
from jaxdp.accounting.one_step import pld_of_gaussian
from jaxdp.accounting.repeated import StepPmf

STEPS = [(0.6, 0.2, 3), (1.0, 0.01, 1), (1.1, 0.04, 250), (2.0, 0.5, 40), (8.0, 1.0, 20)]
STEPS += [(0.3, 0.001, 2), (1.0, 0.01, 10_000), (5.0, 0.1, 100_000)]


def sides(pld: PrivacyLossDistribution) -> list[Any]:
    """The masses for either direction of neighbours."""
    of: Any = pld
    return [of._pmf_remove, of._pmf_add]


def plain(pld: PrivacyLossDistribution) -> PrivacyLossDistribution:
    """The same masses, repeated by dp-accounting alone."""
    of: Any = pld
    dense = [
        DensePLDPmf(each.interval, each.lower, each.probs, each.infinite, True)
        for each in sides(pld)
    ]
    return PrivacyLossDistribution(dense[0], None if of._symmetric else dense[1])


def assert_alike(ours: PrivacyLossDistribution, theirs: PrivacyLossDistribution) -> None:
    """The same stretch of the grid is kept, and it is as private, in either direction."""
    for one, other in zip(sides(ours), sides(theirs), strict=True):
        assert (one.size, one._lower_loss) == (other.size, other._lower_loss)
        for delta in (1e-2, 1e-5, 1e-9, 1e-13):
            expected = other.get_epsilon_for_delta(delta)
            assert one.get_epsilon_for_delta(delta) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        for epsilon in (0.0, 0.5, 3.0):
            found, expected = (each.get_delta_for_epsilon(epsilon) for each in (one, other))
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-16)


@pytest.mark.parametrize("replace_one", [False, True])
@pytest.mark.parametrize(("sigma", "rate", "count"), STEPS)
def test_a_repeated_step_is_that_of_dp_accounting(
    sigma: float, rate: float, count: int, replace_one: bool
) -> None:
    """Equal numbers: neither rounding nor the tails that are cut off may make ours the lower."""
    step = pld_of_gaussian(sigma, sampling_rate=rate, replace_one=replace_one, interval=1e-3)
    theirs = plain(step)
    assert_alike(step.self_compose(count), theirs.self_compose(count))
    # One step beside others is composed as it is.
    before = identity(1e-3).compose(theirs)
    assert_alike(before.compose(step), before.compose(theirs))
    assert_alike(step.compose(before), theirs.compose(before))


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_schedule_is_never_below_dp_accounting(delta: float) -> None:
    ledger, theirs = Ledger(), PLDAccountant()
    for sigma, rate, count in [(1.1, 0.01, 100), (1.5, 0.02, 1), (3.0, 0.1, 30), (2.0, 0.01, 7)]:
        ledger = ledger.charge(sigma, PoissonSampling(rate), count)
        step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        theirs.compose(step, count)
    expected = theirs.get_epsilon(delta)
    assert expected <= ledger.epsilon(delta) <= expected * 1.001


@pytest.mark.parametrize("chance", [0.5, 0.01, 1e-4])
@pytest.mark.parametrize("count", [2, 100, 10_000, 1_000_000])
@pytest.mark.parametrize("tail", [1e-15, 1e-6])
def test_no_more_than_a_tail_lies_outside_the_window(
    chance: float, count: int, tail: float
) -> None:
    step = StepPmf(0, np.array([1 - chance, chance]), 0.0, interval=1.0)
    start, end = step.window(count, tail)
    # A number of successes, of which the law is known.
    outside = binom.cdf(start - 1, count, chance) + binom.sf(end, count, chance)
    assert outside <= tail


def test_what_may_lie_outside_counts_as_infinite() -> None:
    beyond = 1e6
    certain = StepPmf(-2, np.array([0.5, 0.5]), 0.0, interval=0.5).self_compose(7)
    assert certain.get_delta_for_epsilon(beyond) == 1e-15
    release = StepPmf(-2, np.array([0.5, 0.4999]), 1e-4, interval=0.5).self_compose(5)
    assert release.get_delta_for_epsilon(beyond) == pytest.approx(1 - (1 - 1e-4) ** 5, rel=1e-9)


def test_without_a_tail_nothing_is_cut_off() -> None:
    step = StepPmf(0, np.array([0.5, 0.5]), 0.0, interval=1.0)
    assert step.self_compose(1000, tail_mass_truncation=0).size == 1001
    with pytest.raises(ValueError, match="num_times"):
        step.self_compose(0)


def test_moments_are_found_once_for_a_step_however_often_it_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[StepPmf] = []
    moments: Any = StepPmf.moments

    def counting(self: StepPmf) -> Any:
        found.append(self)
        return moments.func(self)

    kept: Any = cached_property(counting)
    kept.__set_name__(StepPmf, "moments")
    monkeypatch.setattr(StepPmf, "moments", kept)
    # Nor does dp-accounting look for them.
    monkeypatch.setattr(common, "compute_self_convolve_bounds", None)
    gaussian._pld_of_step.cache_clear()
    first = Ledger().charge(1.3, PoissonSampling(0.02), 11)
    for more in range(2, 30):
        first.charge(1.7, PoissonSampling(0.02), more).epsilon(1e-5)
    # Either step, in either direction of neighbours.
    assert len(found) == 4
