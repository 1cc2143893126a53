"""From executed steps to epsilon: group equal mechanisms and let dp-accounting compose them.

Order does not matter for Poisson and fixed-size steps, so equal ones become one mechanism with a
count. Shuffled epochs become plain Gaussians. All composition is done by dp-accounting.

Example:
    >>> round(epsilon([2.0, 3.0, 4.0], steps=250, delta=1e-5, sampling_rate=0.04), 3)
    1.985
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, cast, get_args

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from jaxdp.accounting.checks import check_choice, check_integer, check_real
from jaxdp.accounting.schemes import (
    FixedSizeSampling,
    NoiseMultiplier,
    PoissonSampling,
    SamplingScheme,
    ShuffledEpochs,
    check_scheme,
    combined_noise_multiplier,
    combined_with_counts,
)

AccountantName = Literal["pld", "rdp"]
"""Privacy loss distributions (tight) or Rényi differential privacy (fast, looser)."""

RelationName = Literal["add_or_remove_one", "replace_one"]
"""Which datasets are neighbours."""

MAX_DISTINCT_SIGMAS = 32
"""More distinct noise multipliers than this, of one scheme, are rounded down before composing."""

# Outside this range the squares leave what floats can hold. Below it no noise is assumed, above it
# the largest multiplier: both only overstate epsilon.
_SMALLEST_SIGMA, _LARGEST_SIGMA = 1e-6, 1e6

_RELATIONS = {
    "add_or_remove_one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


class Release(NamedTuple):
    """`steps` consecutive steps of one run that released the same thing."""

    noise_multiplier: float
    sampling: SamplingScheme
    steps: int


class Mechanism(NamedTuple):
    """`repeats` equal mechanisms; without a sampling scheme they are plain Gaussians."""

    sampling: PoissonSampling | FixedSizeSampling | None
    noise_multiplier: float
    repeats: int


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


def mechanisms_of(runs: Iterable[Sequence[Release]]) -> tuple[Mechanism, ...]:
    """Groups the steps of all runs into distinct mechanisms with counts.

    Sorted, except that the mechanism of the very last step comes last: a run that grows then keeps
    its composed past, and `compose` finds it in the cache.

    Args:
        runs: for every run its releases, in the order of execution.

    Returns:
        The mechanisms; empty if nothing was released.

    Example:
        >>> poisson = PoissonSampling(0.5)
        >>> mechanisms_of([[Release(1.0, poisson, 2)], [Release(1.0, poisson, 3)]])
        (Mechanism(sampling=PoissonSampling(sampling_rate=0.5), noise_multiplier=1.0, repeats=5),)
    """
    counts: Counter[tuple[PoissonSampling | FixedSizeSampling | None, float]] = Counter()
    last = None
    for run in runs:
        shuffled: dict[ShuffledEpochs, list[Release]] = {}
        for release in run:
            if isinstance(release.sampling, ShuffledEpochs):
                shuffled.setdefault(release.sampling, []).append(release)
                last = (None, release.noise_multiplier)
            else:
                last = (release.sampling, release.noise_multiplier)
                counts[last] += release.steps
        for scheme, releases in shuffled.items():
            for sigma, count in _participations(releases, scheme.steps_per_epoch):
                counts[None, sigma] += count
    keys = sorted(counts, key=lambda key: (key == last, key[0] == (last and last[0]), repr(key)))
    return tuple(Mechanism(*key, counts[key]) for key in keys)


def _participations(releases: Sequence[Release], epoch: int) -> Iterator[tuple[float, int]]:
    """For every epoch begun, the smallest noise multiplier that one example may have met."""
    filled, worst = 0, math.inf
    for release in releases:
        head = min(release.steps, epoch - filled)
        filled, worst = filled + head, min(worst, release.noise_multiplier)
        whole, rest = divmod(release.steps - head, epoch)
        if filled == epoch:
            yield worst, 1
            filled, worst = 0, math.inf
        if whole:
            yield release.noise_multiplier, whole
        if rest:
            filled, worst = rest, release.noise_multiplier
    if filled:
        yield worst, 1


def coarsened(mechanisms: tuple[Mechanism, ...]) -> tuple[Mechanism, ...]:
    """The mechanisms that are really composed: fewer, and never more private.

    Plain Gaussians compose exactly into one. Of every sampling scheme with more than
    `MAX_DISTINCT_SIGMAS` noise multipliers, the range is cut into that many geometric bins and each
    multiplier falls to the smallest one of its bin. Less noise is less private, so this can only
    overstate epsilon.

    Args:
        mechanisms: distinct mechanisms, the most recent one last.

    Returns:
        Distinct mechanisms, the most recent one still last.

    Example:
        >>> coarsened((Mechanism(None, 2.0, 2), Mechanism(None, 2.0, 2)))
        (Mechanism(sampling=None, noise_multiplier=1.0, repeats=1),)
    """
    by_scheme: dict[PoissonSampling | FixedSizeSampling | None, list[Mechanism]] = {}
    for mechanism in mechanisms:
        # Reinserting keeps the scheme of the most recent mechanism at the end.
        capped = min(mechanism.noise_multiplier, _LARGEST_SIGMA)
        group = by_scheme.pop(mechanism.sampling, [])
        by_scheme[mechanism.sampling] = [*group, mechanism._replace(noise_multiplier=capped)]
    return tuple(
        coarse
        for sampling, group in by_scheme.items()
        for coarse in (_one_gaussian(group) if sampling is None else _rounded_down(group))
    )


def _one_gaussian(group: list[Mechanism]) -> list[Mechanism]:
    sigma = combined_with_counts(tuple((each.noise_multiplier, each.repeats) for each in group))
    return [Mechanism(None, sigma, 1)]


def _rounded_down(group: list[Mechanism]) -> list[Mechanism]:
    if len({each.noise_multiplier for each in group}) <= MAX_DISTINCT_SIGMAS:
        return group
    logs = [math.log(each.noise_multiplier) for each in group]
    low, width = min(logs), (max(logs) - min(logs)) / MAX_DISTINCT_SIGMAS
    bins: dict[int, Mechanism] = {}
    for log, each in zip(logs, group, strict=True):
        index = min(int((log - low) / width), MAX_DISTINCT_SIGMAS - 1)
        known = bins.pop(index, each._replace(repeats=0))
        bins[index] = Mechanism(
            each.sampling,
            min(known.noise_multiplier, each.noise_multiplier),
            known.repeats + each.repeats,
        )
    return list(bins.values())


def event_of(mechanism: Mechanism, scale: float = 1.0) -> dp_accounting.DpEvent:
    """The DpEvent of one mechanism, counted.

    Args:
        mechanism: what was released, how often.
        scale: factor on the noise multiplier, see `noise_scale`.

    Returns:
        The event; wrapped in `SelfComposedDpEvent` if it happened more than once.

    Example:
        >>> event_of(Mechanism(None, 1.5, 1))
        GaussianDpEvent(noise_multiplier=1.5)
    """
    event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier * scale)
    match mechanism.sampling:
        case PoissonSampling(rate):
            event = dp_accounting.PoissonSampledDpEvent(rate, event)
        case FixedSizeSampling(size, batch):
            event = dp_accounting.SampledWithoutReplacementDpEvent(size, batch, event)
    if mechanism.repeats == 1:
        return event
    return dp_accounting.SelfComposedDpEvent(event, mechanism.repeats)


def events_of(mechanisms: Sequence[Mechanism]) -> dp_accounting.DpEvent:
    """The DpEvent of several mechanisms together, in the convention of noise std / clip norm.

    Args:
        mechanisms: what was released.

    Returns:
        One event; `NoOpDpEvent` if there is none.

    Example:
        >>> events_of(())
        NoOpDpEvent()
    """
    events = [event_of(mechanism) for mechanism in mechanisms]
    match events:
        case []:
            return dp_accounting.NoOpDpEvent()
        case [event]:
            return event
        case _:
            return dp_accounting.ComposedDpEvent(events)


def dp_event(
    noise_multiplier: NoiseMultiplier, sampling: SamplingScheme, steps: int = 1
) -> dp_accounting.DpEvent:
    """The dp-accounting event of a run of equal steps.

    Its noise multipliers are noise std / clip norm. dp-accounting's RDP accountant reads them
    relative to the distance of the neighbours, 2 · clip norm under replace-one; `epsilon` and
    `Ledger` take care of that, a caller who feeds the event to that accountant must halve them.

    Args:
        noise_multiplier: σ ≥ 0, or one for each Gaussian released from the same batch.
        sampling: how the batches were drawn.
        steps: number of steps, ≥ 0.

    Returns:
        A `dp_accounting.DpEvent`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> dp_event(1.1, ShuffledEpochs(steps_per_epoch=100), steps=250)
        SelfComposedDpEvent(event=GaussianDpEvent(noise_multiplier=1.1), count=3)
    """
    return events_of(_run_of(noise_multiplier, sampling, steps))


def _run_of(
    noise_multiplier: NoiseMultiplier, sampling: SamplingScheme, steps: int
) -> tuple[Mechanism, ...]:
    steps = check_integer("steps", steps, minimum=0, advice="Pass the number of noised releases.")
    sigma = combined_noise_multiplier(noise_multiplier)
    check_scheme(sampling)
    return mechanisms_of([[Release(sigma, sampling, steps)]]) if steps else ()


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


def _fresh_accountant(
    question: Question, interval: float = 1e-4
) -> PLDAccountant | RdpAccountant:
    relation = _RELATIONS[question.relation]
    if question.accountant == "rdp":
        return RdpAccountant(neighboring_relation=relation)
    return PLDAccountant(relation, interval)


def _check_supported(mechanisms: Sequence[Mechanism], question: Question) -> None:
    accountant = _fresh_accountant(question)
    kinds = {type(mechanism.sampling) for mechanism in mechanisms}
    for mechanism in mechanisms:
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


def _grid_interval(mechanisms: Sequence[Mechanism], question: Question) -> float:
    """The PLD grid's step: dp-accounting's 1e-4, coarser once epsilon may reach a hundred.

    A step is rounded pessimistically, so this choice bounds memory and never the truth: at σ = 0.01
    the usual grid would need gigabytes to say that epsilon is about 5,000.
    """
    mean = widest = 0.0
    for mechanism in mechanisms:
        sampling, sigma, count = mechanism
        sigma = sigma / 2 if question.relation == "replace_one" else sigma
        rate = sampling.sampling_rate if isinstance(sampling, PoissonSampling) else 1.0
        # Mean loss of one step: convexity gives q/2σ², Jensen gives log of the χ² moment.
        linear, exponent = rate / (2 * sigma**2), 1 / sigma**2
        chi = math.log1p(rate**2 * math.expm1(exponent)) if exponent < 700 else math.inf
        mean += count * min(linear, chi)
        # The grid of one step reaches ten standard deviations of the noise.
        widest = max(widest, 1 / (2 * sigma**2) + 10 / sigma + math.log(rate))
    coarsening = max(1.0, (mean + 10 * math.sqrt(2 * mean) + widest) / 100)
    # Powers of two: points of the coarse grid are points of the fine one, so the pessimistic
    # rounding of the coarse one dominates.
    return 1e-4 * 2 ** math.ceil(math.log2(coarsening))


@lru_cache(maxsize=8)
def _composed_past(
    mechanisms: tuple[Mechanism, ...], question: Question, interval: float
) -> PLDAccountant | RdpAccountant:
    accountant = _fresh_accountant(question, interval)
    for mechanism in mechanisms:
        accountant.compose(event_of(mechanism, noise_scale(question)))
    return accountant


def _composed(
    mechanisms: tuple[Mechanism, ...], question: Question
) -> PLDAccountant | RdpAccountant:
    interval = _grid_interval(mechanisms, question) if question.accountant == "pld" else 0.0
    # Accountants are mutable: the cached one is copied before the last mechanism joins it.
    accountant = copy.deepcopy(_composed_past(mechanisms[:-1], question, interval))
    return accountant.compose(event_of(mechanisms[-1], noise_scale(question)))


@lru_cache(maxsize=4096)
def epsilon_of(mechanisms: tuple[Mechanism, ...], delta: float, question: Question) -> float:
    """The ε at which the composed mechanisms are (ε, δ) differentially private.

    Args:
        mechanisms: from `mechanisms_of`.
        delta: δ in (0, 1).
        question: accountant and neighbouring relation.

    Returns:
        ε ≥ 0; `math.inf` if something was released without noise.

    Raises:
        ValueError: dp-accounting does not support the combination.

    Example:
        >>> epsilon_of((), 1e-5, Question("pld", "replace_one"))
        0.0
    """
    if not mechanisms:
        return 0.0
    _check_supported(mechanisms, question)
    if any(mechanism.noise_multiplier < _SMALLEST_SIGMA for mechanism in mechanisms):
        return math.inf
    return float(_composed(coarsened(mechanisms), question).get_epsilon(delta))


@lru_cache(maxsize=4096)
def delta_of(mechanisms: tuple[Mechanism, ...], epsilon: float, question: Question) -> float:
    """The δ at which the composed mechanisms are (ε, δ) differentially private.

    Args:
        mechanisms: from `mechanisms_of`.
        epsilon: ε ≥ 0.
        question: accountant and neighbouring relation.

    Returns:
        δ in [0, 1]; 1.0 if something was released without noise.

    Raises:
        ValueError: dp-accounting does not support the combination.

    Example:
        >>> delta_of((), 1.0, Question("pld", "replace_one"))
        0.0
    """
    if not mechanisms:
        return 0.0
    _check_supported(mechanisms, question)
    if any(mechanism.noise_multiplier < _SMALLEST_SIGMA for mechanism in mechanisms):
        return 1.0
    return float(_composed(coarsened(mechanisms), question).get_delta(epsilon))


def sampling_of(sampling_rate: float | None, sampling: SamplingScheme | None) -> SamplingScheme:
    """The scheme meant by the two alternative arguments.

    Args:
        sampling_rate: shorthand for Poisson sampling.
        sampling: any scheme.

    Returns:
        The scheme.

    Raises:
        TypeError: `sampling` is no scheme, or the rate is no number.
        ValueError: none or both are given, or the rate is outside (0, 1].

    Example:
        >>> sampling_of(0.5, None)
        PoissonSampling(sampling_rate=0.5)
    """
    if (sampling_rate is None) == (sampling is None):
        raise ValueError(
            "exactly one of sampling_rate and sampling must be given, got "
            f"sampling_rate={sampling_rate!r} and sampling={sampling!r}. "
            "Pass sampling_rate for Poisson sampling, sampling for any other scheme."
        )
    return check_scheme(sampling) if sampling_rate is None else PoissonSampling(sampling_rate)


def epsilon(
    noise_multiplier: NoiseMultiplier,
    *,
    steps: int,
    delta: float,
    sampling_rate: float | None = None,
    sampling: SamplingScheme | None = None,
    accountant: AccountantName = "pld",
    neighboring_relation: RelationName = "add_or_remove_one",
) -> float:
    """The ε of a run of equal steps at a given δ.

    With M the composition of `steps` sampled Gaussians,
    ε = min {e ≥ 0 : P[M(D) ∈ E] ≤ exp(e) P[M(D') ∈ E] + δ for all neighbours D, D' and all E},
    up to the accountant's rounding, which is always upwards.

    Args:
        noise_multiplier: σ ≥ 0, noise std / clip norm, or one for each Gaussian that a step
            releases from the same batch (see `combined_noise_multiplier`).
        steps: number of steps, ≥ 0.
        delta: δ in (0, 1). "pld" resolves δ down to about 1e-14.
        sampling_rate: q in (0, 1], shorthand for `sampling=PoissonSampling(q)`.
        sampling: how the batches are drawn; exactly one of the two is given.
        accountant: "pld" or "rdp".
        neighboring_relation: "add_or_remove_one" or "replace_one".

    Returns:
        ε ≥ 0: 0.0 for no steps, `math.inf` for no noise (σ < 1e-6 counts as none).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or dp-accounting does not support the combination:
            fixed-size sampling needs "rdp" with "replace_one", Poisson sampling with "replace_one"
            needs "pld".

    Source: Doroshenko et al. 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy
    Loss Distributions" (pld); Mironov, Talwar, Zhang 2019, "Rényi Differential Privacy of the
    Sampled Gaussian Mechanism" (rdp).

    Example:
        >>> round(epsilon(1.1, steps=250, delta=1e-5, sampling_rate=0.04, accountant="rdp"), 3)
        3.895
    """
    mechanisms = _run_of(noise_multiplier, sampling_of(sampling_rate, sampling), steps)
    return epsilon_of(mechanisms, check_delta(delta), as_question(accountant, neighboring_relation))
