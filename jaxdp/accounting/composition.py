"""Composition: what counted mechanisms cost together. All of it is dp-accounting's work.

Example:
    >>> from jaxdp.accounting.schemes import PoissonSampling
    >>> steps = GaussianMechanism(PoissonSampling(0.04), 1.1, repeats=250)
    >>> round(epsilon_of((steps,), 1e-5, Question("pld", "add_or_remove_one")), 3)
    3.471
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, cast, get_args

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.common import DifferentialPrivacyParameters
from dp_accounting.pld.privacy_loss_distribution import (
    PrivacyLossDistribution,
    from_privacy_parameters,
    identity,
)
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_delta, compute_epsilon
from numpy.typing import NDArray

from jaxdp.accounting.mechanisms import (
    GaussianMechanism,
    Mechanism,
    PureMechanism,
    coarsened,
    event_of,
)
from jaxdp.accounting.one_step import pld_of_gaussian
from jaxdp.accounting.pure import PureRelease
from jaxdp.accounting.schemes import FixedSizeSampling, PoissonSampling
from jaxdp.checks import check_choice, check_real

AccountantName = Literal["pld", "rdp"]
"""Privacy loss distributions (tight) or Rényi differential privacy (fast, looser)."""

RelationName = Literal["add_or_remove_one", "replace_one"]
"""Which datasets are neighbours."""

# Less noise than this is counted as none: squares of smaller numbers leave what floats can hold,
# and assuming none only overstates epsilon.
_SMALLEST_SIGMA = 1e-6

# A pure release of a larger ε is counted as one without noise: e^2ε would leave the floats.
_LARGEST_PURE_EPSILON = 300.0

# Beyond this a privacy loss distribution says "infinite": its grid would be so coarse that nothing
# is resolved, and no such ε is a promise.
_LARGEST_RESOLVED = 1e5

# More mechanisms than this are composed on a grid that is coarser in proportion, so that an answer
# takes seconds however many there are.
_FINE_MECHANISMS = 8

# How much coarser the grid of a bound is. A power of two, as `_grid_interval` needs.
_BOUND_COARSENING = 16

MOST_SAMPLED_STEPS = 10_000_000
"""More equal sampled steps than this are not composed with "pld"."""


class TooManyStepsError(ValueError):
    """More equal sampled steps than "pld" composes."""


# What the floats of a composition may be off by: two ways to compute the same differ by 1e-11 or
# so, and ours is never to be below that of `dp_accounting.pld.PLDAccountant`.
_ROUNDING = 1e-9

_RELATIONS = {
    "add_or_remove_one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


class Question(NamedTuple):
    """What is asked about a run besides its steps: the accountant and the neighbours."""

    accountant: AccountantName
    relation: RelationName


def as_question(accountant: str, neighboring_relation: str) -> Question:
    """Checks the two names that every question about privacy carries.

    Args:
        accountant: "pld" or "rdp".
        neighboring_relation: "add_or_remove_one" or "replace_one".

    Returns:
        Both, checked.

    Raises:
        ValueError: a name is unknown.

    Example:
        >>> as_question("pld", "replace_one").relation
        'replace_one'
    """
    return Question(
        cast(AccountantName, check_choice("accountant", accountant, get_args(AccountantName))),
        cast(
            RelationName,
            check_choice("neighboring_relation", neighboring_relation, get_args(RelationName)),
        ),
    )


def check_delta(delta: object) -> float:
    """Returns δ as a float if it lies in (0, 1).

    Args:
        delta: what the caller passed.

    Returns:
        The value.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not in (0, 1).

    Example:
        >>> check_delta(1e-5)
        1e-05
    """
    return check_real(
        "delta", delta, above=0, below=1, advice="A value below 1 / number of examples is usual."
    )


def noise_scale(question: Question) -> float:
    """What our noise multiplier must be multiplied with before this accountant reads it.

    Ours is noise std / C with C the effect of adding or removing one example. Replacing one moves
    the sum by up to 2C. dp-accounting's PLD accountant knows that: under REPLACE_ONE it compares
    N(-1, σ²) with N(+1, σ²), sampled or not. Its RDP accountant compares N(0, σ²) with N(1, σ²)
    under every relation, so there σ means noise std / 2C. The tests hold both against the exact
    hockey-stick divergence.

    Args:
        question: accountant and neighbouring relation.

    Returns:
        0.5 for RDP with replace-one, else 1.0.

    Example:
        >>> noise_scale(Question("rdp", "replace_one"))
        0.5
    """
    return 0.5 if question == ("rdp", "replace_one") else 1.0


def _fresh_accountant(question: Question) -> PLDAccountant | RdpAccountant:
    relation = _RELATIONS[question.relation]
    if question.accountant == "rdp":
        return RdpAccountant(neighboring_relation=relation)
    return PLDAccountant(neighboring_relation=relation)


def _check_supported(mechanisms: Sequence[Mechanism], question: Question) -> None:
    accountant = _fresh_accountant(question)
    # Pure releases are (ε, 0)-private under every relation, which both accountants can compose.
    gaussians = [each for each in mechanisms if isinstance(each, GaussianMechanism)]
    kinds = {type(mechanism.sampling) for mechanism in gaussians}
    for mechanism in gaussians:
        if accountant.supports(event_of(mechanism)):
            continue
        if {PoissonSampling, FixedSizeSampling} <= kinds:
            advice = (
                "No accountant composes Poisson and fixed-size steps: keep one ledger for each and "
                "add their epsilons and their deltas."
            )
        elif isinstance(mechanism.sampling, FixedSizeSampling):
            advice = (
                'Use accountant="rdp" with neighboring_relation="replace_one", or draw the batches '
                "with PoissonSampling."
            )
        else:
            advice = (
                'Use accountant="pld" for "replace_one", or '
                'neighboring_relation="add_or_remove_one".'
            )
        raise ValueError(
            f"sampling={mechanism.sampling} must be one that dp-accounting supports with "
            f'accountant="{question.accountant}" and neighboring_relation="{question.relation}", '
            f"which it does not. {advice}"
        )


def _is_bare(mechanism: Mechanism) -> bool:
    """Whether it counts as a release without noise."""
    if isinstance(mechanism, PureMechanism):
        return mechanism.release.epsilon > _LARGEST_PURE_EPSILON
    return mechanism.noise_multiplier < _SMALLEST_SIGMA


def _pure_epsilon(release: PureRelease, relation: RelationName) -> float:
    return release.spent(replace_one=relation == "replace_one")


def _grid_interval(mechanisms: Sequence[Mechanism], relation: RelationName) -> float:
    """The PLD grid's step: dp-accounting's 1e-4, coarser once epsilon may reach 25 or where
    many mechanisms are composed; infinite where epsilon may be beyond what is resolved.

    A step is rounded pessimistically, so this choice bounds memory and time and never the truth: at
    σ = 0.01 the usual grid would need gigabytes to say that epsilon is about 5,000.
    """
    mean = widest = 0.0
    for mechanism in mechanisms:
        if isinstance(mechanism, PureMechanism):
            # A loss of ±ε, of which the mean is ε tanh(ε/2).
            epsilon = _pure_epsilon(mechanism.release, relation)
            mean += mechanism.repeats * epsilon * math.tanh(epsilon / 2)
            widest = max(widest, epsilon)
            continue
        sampling, sigma, count = mechanism
        sigma = sigma / 2 if relation == "replace_one" else sigma
        rate = sampling.sampling_rate if isinstance(sampling, PoissonSampling) else 1.0
        # Mean loss of one step: convexity gives q/2σ², Jensen gives log of the χ² moment.
        linear, exponent = rate / (2 * sigma**2), 1 / sigma**2
        chi = math.log1p(rate**2 * math.expm1(exponent)) if exponent < 700 else math.inf
        mean += count * min(linear, chi)
        # The grid of one step reaches ten standard deviations of the noise.
        widest = max(widest, 1 / (2 * sigma**2) + 10 / sigma + math.log(rate))
    reach = mean + 10 * math.sqrt(2 * mean) + widest
    if reach > _LARGEST_RESOLVED:
        return math.inf
    coarsening = max(1.0, reach / 25, len(mechanisms) / _FINE_MECHANISMS)
    # Powers of two: points of the coarse grid are points of the fine one, so the pessimistic
    # rounding of the coarse one dominates.
    return 1e-4 * 2 ** math.ceil(math.log2(coarsening))


@lru_cache(maxsize=64)
def _pld_of_step(
    rate: float, sigma: float, relation: RelationName, interval: float
) -> PrivacyLossDistribution:
    """Of one step: the same at every report."""
    return pld_of_gaussian(
        sigma, sampling_rate=rate, replace_one=relation == "replace_one", interval=interval
    )


def _pld_of(
    mechanism: Mechanism, relation: RelationName, interval: float
) -> PrivacyLossDistribution:
    if isinstance(mechanism, PureMechanism):
        epsilon = _pure_epsilon(mechanism.release, relation)
        parameters = DifferentialPrivacyParameters(epsilon, 0)
        return from_privacy_parameters(parameters, interval).self_compose(mechanism.repeats)
    sampling, sigma, repeats = mechanism
    if sampling is None:
        # Plain Gaussians add up exactly, without the rounding of a self-composition.
        return _pld_of_step(1.0, sigma / math.sqrt(repeats), relation, interval)
    if isinstance(sampling, FixedSizeSampling):
        raise TypeError(f"dp-accounting has no privacy loss distribution for {sampling}")
    if repeats > MOST_SAMPLED_STEPS:
        raise TooManyStepsError(
            f'steps must be at most {MOST_SAMPLED_STEPS} for accountant="pld", got {repeats} of '
            'one kind: the rounding errors of as many would show. Use accountant="rdp".'
        )
    step = _pld_of_step(sampling.sampling_rate, sigma, relation, interval)
    # To look for the tails of one step takes far longer than to compose it.
    return step if repeats == 1 else step.self_compose(repeats)


# What was composed last, the least recently used first.
_COMPOSED: dict[tuple[tuple[Mechanism, ...], RelationName, float], PrivacyLossDistribution] = {}
_MOST_COMPOSED = 8


def _keep(key: tuple[tuple[Mechanism, ...], RelationName, float], pld: PrivacyLossDistribution):
    _COMPOSED.pop(key, None)
    _COMPOSED[key] = pld
    if len(_COMPOSED) > _MOST_COMPOSED:
        del _COMPOSED[next(iter(_COMPOSED))]


def _composed_pld(
    mechanisms: tuple[Mechanism, ...], relation: RelationName, interval: float
) -> PrivacyLossDistribution:
    """Composed as `PLDAccountant` does.

    A ledger that grows adds to its last mechanism, or one more behind it: so both what stands
    before the last one and the whole are kept, and the longest beginning that is known is extended.
    """
    composed, done = identity(interval), 0
    for (known, *grid), pld in _COMPOSED.items():
        if done < len(known) and grid == [relation, interval]:
            if mechanisms[: len(known)] == known:
                composed, done = pld, len(known)
    for end in range(done, len(mechanisms)):
        if end == len(mechanisms) - 1:
            _keep((mechanisms[:end], relation, interval), composed)
        composed = composed.compose(_pld_of(mechanisms[end], relation, interval))
    _keep((mechanisms, relation, interval), composed)
    return composed


@lru_cache(maxsize=4096)
def _rdp_of_step(mechanism: Mechanism, question: Question) -> NDArray[np.float64]:
    """Of one step, at dp-accounting's default orders."""
    if isinstance(mechanism, PureMechanism):
        # Randomised response between two answers, of which the other's is e^ε times less likely.
        epsilon = _pure_epsilon(mechanism.release, question.relation)
        event = dp_accounting.RandomizedResponseDpEvent(2 / (1 + math.exp(epsilon)), 2)
        return RdpAccountant(neighboring_relation=_RELATIONS["replace_one"]).compose(event).rdp
    accountant = RdpAccountant(neighboring_relation=_RELATIONS[question.relation])
    return accountant.compose(event_of(mechanism, noise_scale(question))).rdp


def _composed_rdp(
    mechanisms: tuple[Mechanism, ...], question: Question
) -> tuple[list[float], list[float]]:
    """Orders and RDP of all the steps: it adds up."""
    steps = (each.repeats * _rdp_of_step(each._replace(repeats=1), question) for each in mechanisms)
    return RdpAccountant().orders.tolist(), np.sum(list(steps), axis=0).tolist()


def _epsilon(
    mechanisms: tuple[Mechanism, ...],
    delta: float,
    question: Question,
    coarsening: int = 1,
    *,
    rounded: bool = False,
) -> float:
    """Of all three below: on a grid that is so many times coarser, with noise multipliers that may
    be `rounded` however few they are."""
    if not mechanisms:
        return 0.0
    _check_supported(mechanisms, question)
    if delta <= 0 or any(map(_is_bare, mechanisms)):
        return math.inf
    mechanisms = coarsened(mechanisms, always=rounded)
    if any(map(_is_bare, mechanisms)):  # rounding may take the last of the noise
        return math.inf
    if question.accountant == "rdp":
        return float(compute_epsilon(*_composed_rdp(mechanisms, question), delta)[0])
    interval = coarsening * _grid_interval(mechanisms, question.relation)
    if math.isinf(interval):
        return math.inf
    pld = _composed_pld(mechanisms, question.relation, interval)
    epsilon = float(pld.get_epsilon_for_delta(delta))
    return epsilon * (1 + _ROUNDING) + _ROUNDING if epsilon > 0 else 0.0


@lru_cache(maxsize=4096)
def epsilon_of(mechanisms: tuple[Mechanism, ...], delta: float, question: Question) -> float:
    """The ε at which the composed mechanisms are (ε, δ) differentially private.

    Args:
        mechanisms: from `mechanisms_of`.
        delta: δ in (0, 1).
        question: accountant and neighbouring relation.

    Returns:
        ε ≥ 0; `math.inf` if something was released without noise, and where "pld" would have to
        resolve an ε beyond 10⁵.

    Raises:
        ValueError: dp-accounting does not support the combination, or it is more than can be
            composed.

    Example:
        >>> epsilon_of((), 1e-5, Question("pld", "replace_one"))
        0.0
    """
    return _epsilon(mechanisms, delta, question)


@lru_cache(maxsize=4096)
def epsilon_bound_of(
    mechanisms: tuple[Mechanism, ...], delta: float, question: Question, *, rounded: bool
) -> float:
    """At least `epsilon_of`, usually within 3%, and for "pld" in about a tenth of the time.

    An upper bound: it composes on a grid of losses that is sixteen times coarser, whose points are
    points of the fine one, and rounding a distribution up to a coarser grid can only raise every
    δ(ε). With `rounded` noise multipliers are rounded down however few they are, which raises δ(ε)
    as well, and makes the bound hold for all mechanisms that are `rounded_down` alike or to more.
    What tails a composition cuts off is counted as infinite: 1e-15 each, hence a δ that is smaller
    by what a thousand of them cut off.

    Args:
        mechanisms: from `mechanisms_of`.
        delta: δ in (0, 1).
        question: accountant and neighbouring relation.
        rounded: whether to round all noise multipliers down.

    Returns:
        ε ≥ 0, or `math.inf`.

    Raises:
        ValueError: dp-accounting does not support the combination, or it is more than can be
            composed.

    Example:
        >>> step = GaussianMechanism(PoissonSampling(0.04), 1.1, repeats=250)
        >>> question = Question("pld", "add_or_remove_one")
        >>> bound = epsilon_bound_of((step,), 1e-5, question, rounded=False)
        >>> 1 <= bound / epsilon_of((step,), 1e-5, question) < 1.01
        True
    """
    smaller = 0.999 * delta - 1e-12
    return _epsilon(mechanisms, smaller, question, _BOUND_COARSENING, rounded=rounded)


@lru_cache(maxsize=4096)
def rough_epsilon_of(mechanisms: tuple[Mechanism, ...], delta: float, question: Question) -> float:
    """About `epsilon_of`, for "pld" in a tenth of the time: to search with, never to answer with.

    It differs from `epsilon_bound_of` by not allowing for what tails a composition cuts off, and so
    tells something of every δ.

    Args:
        mechanisms: from `mechanisms_of`.
        delta: δ in (0, 1).
        question: accountant and neighbouring relation.

    Returns:
        ε ≥ 0, or `math.inf`.

    Raises:
        ValueError: dp-accounting does not support the combination, or it is more than can be
            composed.

    Example:
        >>> step = GaussianMechanism(PoissonSampling(0.04), 1.1, repeats=250)
        >>> question = Question("pld", "add_or_remove_one")
        >>> rough = rough_epsilon_of((step,), 1e-5, question)
        >>> abs(rough / epsilon_of((step,), 1e-5, question) - 1) < 0.01
        True
    """
    return _epsilon(mechanisms, delta, question, _BOUND_COARSENING)


@lru_cache(maxsize=4096)
def delta_of(mechanisms: tuple[Mechanism, ...], epsilon: float, question: Question) -> float:
    """The δ at which the composed mechanisms are (ε, δ) differentially private.

    Args:
        mechanisms: from `mechanisms_of`.
        epsilon: ε ≥ 0.
        question: accountant and neighbouring relation.

    Returns:
        δ in [0, 1]; 1.0 if something was released without noise, and where "pld" would have to
        resolve an ε beyond 10⁵.

    Raises:
        ValueError: dp-accounting does not support the combination, or it is more than can be
            composed.

    Example:
        >>> delta_of((), 1.0, Question("pld", "replace_one"))
        0.0
    """
    if not mechanisms:
        return 0.0
    _check_supported(mechanisms, question)
    if any(map(_is_bare, mechanisms)):
        return 1.0
    mechanisms = coarsened(mechanisms)
    if any(map(_is_bare, mechanisms)):
        return 1.0
    if question.accountant == "rdp":
        return float(compute_delta(*_composed_rdp(mechanisms, question), epsilon)[0])
    interval = _grid_interval(mechanisms, question.relation)
    if math.isinf(interval):
        return 1.0
    pld = _composed_pld(mechanisms, question.relation, interval)
    found = float(pld.get_delta_for_epsilon(epsilon)) * (1 + _ROUNDING)
    return min(max(found, 0.0), 1.0)  # a sum of masses may end below zero
