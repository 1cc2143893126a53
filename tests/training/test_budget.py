"""The budget: not one step beyond ε, and not one step short of it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from jaxdp.accounting import (
    AccountantName,
    FixedSizeSampling,
    Ledger,
    PoissonSampling,
    RelationName,
    SamplingScheme,
    ShuffledEpochs,
)
from jaxdp.accounting.mechanisms.base import Counted
from jaxdp.accounting.mechanisms.gaussian import SampledGaussian
from jaxdp.accounting.pld import grid_interval
from jaxdp.sampling import ShuffledSampler
from jaxdp.training import Budget
from jaxdp.training import budget as module

DELTA = 1e-5
POISSON = PoissonSampling(0.04)
GAUSSIAN = ShuffledEpochs(1)


SLOW = {"decreasing", "increasing"}


def spend(
    budget: Budget,
    sigma: Callable[[int], Any],
    scheme: SamplingScheme,
    *,
    ledger: Ledger,
    at_most: int,
) -> Ledger:
    """Charges step after step until the budget says no."""
    for step in range(at_most):
        releases = sigma(step)
        releases = releases if isinstance(releases, list) else [releases]
        if not budget.allows(ledger, releases, scheme):
            break
        ledger = ledger.charge(releases, scheme)
    return ledger


Case = tuple[Callable[[int], Any], SamplingScheme, AccountantName, RelationName, float]

# (σ of a step, scheme, accountant, relation, ε)
CASES: dict[str, Case] = {
    "constant": (lambda t: 1.1, POISSON, "pld", "add_or_remove_one", 1.5),
    "constant rdp": (lambda t: 1.1, POISSON, "rdp", "add_or_remove_one", 2.0),
    "replace one": (lambda t: 2.0, POISSON, "pld", "replace_one", 1.0),
    "fixed size": (lambda t: 3.0, FixedSizeSampling(100, 5), "rdp", "replace_one", 2.0),
    "shuffled": (lambda t: 5.0, ShuffledEpochs(7), "pld", "add_or_remove_one", 2.5),
    "several releases": (lambda t: [1.5, 8.0], POISSON, "rdp", "add_or_remove_one", 1.2),
    # Each value several times: the margin of the next steps is asked for and used up.
    "decreasing": (lambda t: 2.0 - 0.3 * (t // 25), POISSON, "pld", "add_or_remove_one", 1.5),
    "increasing": (lambda t: 1.0 + 0.3 * (t // 20), POISSON, "pld", "add_or_remove_one", 1.7),
    "one step down": (lambda t: 2.0 if t < 25 else 0.9, POISSON, "pld", "add_or_remove_one", 1.5),
    "one step up": (lambda t: 1.0 if t < 20 else 3.0, POISSON, "pld", "add_or_remove_one", 1.5),
    # Of plain Gaussians, whose accounting is instant: another value at every step.
    "always less": (lambda t: 20 * 0.99**t, GAUSSIAN, "rdp", "add_or_remove_one", 2.5),
    "always more": (lambda t: 10 * 1.01**t, GAUSSIAN, "rdp", "add_or_remove_one", 2.5),
    "to and fro": (lambda t: (10.0, 20.0)[t % 2], GAUSSIAN, "rdp", "add_or_remove_one", 2.5),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, case in CASES.items()
    ],
)
def test_the_last_step_fits_and_the_next_one_would_not(
    case: Case,
) -> None:
    sigma, scheme, accountant, relation, epsilon = case
    budget = Budget(epsilon, DELTA, accountant, relation)
    ledger = spend(budget, sigma, scheme, ledger=Ledger(), at_most=400)

    def spent(ledger: Ledger) -> float:
        return ledger.epsilon(DELTA, accountant=accountant, neighboring_relation=relation)

    assert 3 < ledger.steps < 400
    assert spent(ledger) <= epsilon < spent(ledger.charge(sigma(ledger.steps), scheme))


def test_a_refusal_holds_for_a_weaker_step_but_not_for_a_stronger_one() -> None:
    budget = Budget(2.0, DELTA, "rdp")
    ledger = spend(budget, lambda t: 10.0, GAUSSIAN, ledger=Ledger(), at_most=400)
    assert not budget.allows(ledger, [10.0], GAUSSIAN)
    assert not budget.allows(ledger, [8.0], GAUSSIAN)
    assert budget.allows(ledger, [100.0], GAUSSIAN)


def test_what_was_spent_before_counts() -> None:
    before = Ledger().charge(1.1, POISSON, steps=30)
    fresh, later = (
        spend(Budget(2.0, DELTA, "rdp"), lambda t: 1.1, POISSON, ledger=ledger, at_most=400)
        for ledger in (Ledger(), before)
    )
    assert later == fresh and later.steps > 30


def test_a_budget_made_anew_goes_on_as_the_old_one() -> None:
    """A resumed run makes a new one: it must stop at the same step."""
    sigma, scheme, accountant, relation, epsilon = CASES["always less"]
    whole = spend(Budget(epsilon, DELTA, accountant), sigma, scheme, ledger=Ledger(), at_most=400)
    for pause in (1, 13, whole.steps - 1):
        half = spend(
            Budget(epsilon, DELTA, accountant), sigma, scheme, ledger=Ledger(), at_most=pause
        )
        resumed = spend(
            Budget(epsilon, DELTA, accountant),
            lambda step, pause=pause: sigma(step + pause),
            scheme,
            ledger=half,
            at_most=400,
        )
        assert half.steps == pause and resumed == whole


def test_what_is_released_between_steps_counts() -> None:
    """Steps that fitted before it must not be granted after it."""
    budget, ledger = Budget(2.0, DELTA, "rdp"), Ledger()
    for _ in range(2):
        assert budget.allows(ledger, [1.1], POISSON)
        ledger = ledger.charge([1.1], POISSON)
    left = ledger.steps_left(1.1, POISSON, epsilon=2.0, delta=DELTA, accountant="rdp")
    ledger = ledger.charge_pure(0.3)
    ledger = spend(budget, lambda t: 1.1, POISSON, ledger=ledger, at_most=400)
    assert 2 < ledger.steps < 2 + left
    assert ledger.epsilon(DELTA, accountant="rdp") <= 2.0
    assert ledger.charge([1.1], POISSON).epsilon(DELTA, accountant="rdp") > 2.0


def test_a_change_of_the_scheme_is_noticed() -> None:
    """Steps that fit at a small rate must not be granted at a large one."""
    budget, ledger = Budget(2.0, DELTA, "rdp"), Ledger()
    small, large = PoissonSampling(0.001), PoissonSampling(0.5)
    assert budget.allows(ledger, [1.1], small)
    ledger = ledger.charge(1.1, small)
    ledger = spend(budget, lambda t: 1.1, large, ledger=ledger, at_most=400)
    assert ledger.epsilon(DELTA, accountant="rdp") <= 2.0
    assert ledger.charge(1.1, large).epsilon(DELTA, accountant="rdp") > 2.0


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_a_step_that_cannot_be_private_is_never_allowed(sigma: float) -> None:
    assert not Budget(8.0, DELTA).allows(Ledger(), [sigma], GAUSSIAN)
    assert not Budget(8.0, DELTA, "rdp").allows(Ledger(), [sigma, 10.0], GAUSSIAN)


def test_the_accountant_is_not_asked_for_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    steps_left = Ledger.steps_left

    def counted(*args: Any, **options: Any) -> int:
        asked.append(args)
        return steps_left(*args, **options)

    monkeypatch.setattr(Ledger, "steps_left", counted)
    ledger = spend(Budget(2.0, DELTA), lambda t: 1.1, POISSON, ledger=Ledger(), at_most=400)
    assert ledger.steps > 50 and len(asked) <= 2


def test_a_schedule_under_pld_composes_a_few_kinds_of_steps_for_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More noise multipliers than are composed exactly; and not a step too many or too few."""
    composed = 0
    compose = PrivacyLossDistribution.compose

    def counting(self: Any, *arguments: Any) -> Any:
        nonlocal composed
        composed += 1
        return compose(self, *arguments)

    def sigma(step: int) -> float:
        return 1.5 + 0.5 * math.sin(step / 10)

    monkeypatch.setattr(PrivacyLossDistribution, "compose", counting)
    scheme = PoissonSampling(0.03)
    ledger = spend(Budget(1.2, DELTA), sigma, scheme, ledger=Ledger(), at_most=100)
    assert composed <= 4 * ledger.steps
    assert 32 < ledger.steps < 100
    one_more = ledger.charge(sigma(ledger.steps), scheme)
    assert ledger.epsilon(DELTA) <= 1.2 < one_more.epsilon(DELTA)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epsilon": -1.0, "delta": DELTA}, "epsilon must be finite, > 0, got -1.0"),
        ({"epsilon": 1.0, "delta": 2.0}, "delta must be finite, > 0, < 1, got 2.0"),
        ({"epsilon": 1.0, "delta": DELTA, "accountant": "moments"}, "got 'moments'"),
        ({"epsilon": 1.0, "delta": DELTA, "neighboring_relation": "some"}, "got 'some'"),
    ],
)
def test_an_impossible_budget_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Budget(**options).allows(Ledger(), [1.0], POISSON)


def test_more_noise_multipliers_than_are_composed_exactly_never_break_the_budget() -> None:
    """Beyond 32 of them the ledger rounds, the past included: the answer jumps upwards once."""
    ledger = spend(
        Budget(2.0, DELTA, "rdp"),
        lambda t: 0.8 * 1.1**t,
        PoissonSampling(0.02),
        ledger=Ledger(),
        at_most=130,
    )
    assert ledger.steps > 32
    assert ledger.epsilon(DELTA, accountant="rdp") <= 2.0


def test_a_grant_ends_where_another_place_in_an_epoch_begins() -> None:
    """Steps that fit as the rest of an epoch must not be granted as pieces of others."""
    samplers = [ShuffledSampler(40, batch_size=10, seed=seed) for seed in range(8)]
    scheme = samplers[0].scheme
    limit = Ledger().charge(2.0, scheme, 3 * 4).epsilon(DELTA, accountant="rdp") * (1 + 1e-9)
    budget, ledger = Budget(limit, DELTA, "rdp"), Ledger()
    # Each sampler draws one step and is exchanged: a participation each.
    for step, sampler in enumerate(samplers):
        draws = sampler.draws(step)
        if not budget.allows(ledger, [2.0], scheme, draws):
            break
        ledger = ledger.charge(2.0, scheme, draws=draws)
    assert ledger.steps == 3 and ledger.epsilon(DELTA, accountant="rdp") <= limit
    # One sampler for the whole of it fits four times as many.
    budget, ledger = Budget(limit, DELTA, "rdp"), Ledger()
    while budget.allows(ledger, [2.0], scheme, samplers[0].draws(ledger.steps)):
        ledger = ledger.charge(2.0, scheme, draws=samplers[0].draws(ledger.steps))
    assert ledger.steps == 12


def test_a_bound_holds_for_a_number_of_new_noise_multipliers_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The grid of the ledger's answer grows coarser with the number of its mechanisms."""
    asked: list[int] = []
    seen = module.surely_fits

    def counting(ledger: Ledger, *question: Any, **options: Any) -> bool:
        asked.append(ledger.steps)
        return seen(ledger, *question, **options)

    monkeypatch.setattr(module, "surely_fits", counting)
    scheme, ledger, budget = PoissonSampling(0.001), Ledger(), Budget(8.0, 1e-5)
    for step in range(200):
        sigma = 2.0 * 2 ** ((step + 0.5) / 32)
        assert budget.allows(ledger, [sigma], scheme)
        ledger = ledger.charge(sigma, scheme)
        # Equal ones are no new ones.
        assert budget.allows(ledger, [sigma], scheme)
        ledger = ledger.charge(sigma, scheme)
    assert len(asked) == 4  # of the steps with new noise multipliers 0, 64, 128 and 192


def off_the_grid(k: int) -> float:
    """The k-th noise multiplier of a kind of its own, where they are rounded."""
    return 2.0 * 2 ** ((k + 0.9) / 32)


def test_a_step_that_makes_the_ledger_round_is_asked_about_as_it_is() -> None:
    """Rounded ahead of the question it would be one of the 32 that the ledger holds exactly."""
    scheme, sigma = PoissonSampling(0.001), 2.002
    ledger = Ledger().charge(2.0, scheme)
    for k in range(31):
        ledger = ledger.charge(off_the_grid(k), scheme)
    exact, rounded = (
        ledger.charge(each, scheme).epsilon(DELTA, accountant="rdp") for each in (2.0, sigma)
    )
    assert exact < rounded
    assert not Budget((exact + rounded) / 2, DELTA, "rdp").allows(ledger, [sigma], scheme)
    assert Budget(rounded, DELTA, "rdp").allows(ledger, [sigma], scheme)


def test_an_exact_answer_is_for_steps_that_are_rounded_alike_alone() -> None:
    """A kind more, of more noise, and the grid of the ledger's own answer is twice as coarse."""
    scheme, ledger = PoissonSampling(0.001), Ledger()
    for k in range(3, 66):
        ledger = ledger.charge(off_the_grid(k), scheme)
    twice = ledger.charge(off_the_grid(0), scheme, 2)
    fine, coarse = (twice.charge(off_the_grid(k), scheme).epsilon(DELTA) for k in range(2))
    assert fine < coarse
    budget = Budget((fine + coarse) / 2, DELTA)
    for _ in range(2):
        assert budget.allows(ledger, [off_the_grid(0)], scheme)
        ledger = ledger.charge(off_the_grid(0), scheme)
    assert not budget.allows(ledger, [off_the_grid(1)], scheme)
    assert budget.allows(ledger, [off_the_grid(0)], scheme)


def test_a_step_without_noise_is_not_allowed_where_noise_is_rounded() -> None:
    ledger = Ledger()
    for k in range(40):
        ledger = ledger.charge(off_the_grid(k), POISSON)
    assert not Budget(8.0, DELTA, "rdp").allows(ledger, [0.0], POISSON)


def test_the_grid_of_a_bound_is_no_finer_than_that_of_what_it_grants() -> None:
    """As the note at `_MOST_NEW` says, for every number of mechanisms in the bound."""
    for few in range(1, 1025):
        steps = [Counted(SampledGaussian(PoissonSampling(0.01), 1.0), 1)]
        bound = 16 * grid_interval(steps * few, "add_or_remove_one")
        answer = grid_interval(steps * (few + 32 + module._MOST_NEW), "add_or_remove_one")
        assert answer <= bound
