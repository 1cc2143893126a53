"""The inverse questions: how much noise, how many steps, which rate reach a target epsilon.

Every answer is on the safe side: `epsilon(answer) <= target` holds exactly, and the answer is
within 0.1% of the best one (for steps: one more step exceeds the target).

Example:
    >>> calibrate_steps(3.0, noise_multiplier=1.1, delta=1e-5, sampling_rate=0.04)
    183
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from jaxdp.accounting.composition import (
    AccountantName,
    Question,
    RelationName,
    TooManyStepsError,
    as_question,
    check_delta,
    epsilon_of,
    rough_epsilon_of,
)
from jaxdp.accounting.mechanisms import Mechanism, Release, mechanisms_of
from jaxdp.accounting.run import sampling_of
from jaxdp.accounting.schemes import (
    NoiseMultiplier,
    PoissonSampling,
    SamplingScheme,
    combined_noise_multiplier,
)
from jaxdp.checks import LARGEST_COUNT, check_integer, check_real

_LOG_TOLERANCE = 8e-4
# Enough for a rough answer that is off by as much.
_LOG_ROUGH = 5e-3
_SMALLEST_SIGMA, _LARGEST_SIGMA = 2.0**-4, 2.0**19
_SMALLEST_RATE = 2.0**-40


def check_epsilon(epsilon: object) -> float:
    """Returns a target ε as a float if it is positive and finite.

    Args:
        epsilon: what the caller passed.

    Returns:
        The value.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not positive and finite.

    Example:
        >>> check_epsilon(3)
        3.0
    """
    return check_real("epsilon", epsilon, above=0, advice="Pass the privacy budget, say 3.0.")


def check_at_most(at_most: object) -> int:
    """Returns where to stop a search for a number of steps, if it is one.

    Args:
        at_most: what the caller passed.

    Returns:
        The value.

    Raises:
        TypeError: it is no integer.
        ValueError: it is negative, or more than `LARGEST_COUNT`.

    Example:
        >>> check_at_most(10)
        10
    """
    advice = "Pass a number of steps."
    return check_integer("at_most", at_most, minimum=0, maximum=LARGEST_COUNT, advice=advice)


def _check_steps(steps: object, advice: str) -> int:
    return check_integer("steps", steps, minimum=1, maximum=LARGEST_COUNT, advice=advice)


def _between(
    epsilon_at: Callable[[float], float], target: float, good: float, bad: float
) -> float:
    """Log-log interpolation for the crossing, clamped to the middle half of a useless bracket."""
    ends = epsilon_at(good), epsilon_at(bad)
    low, high = math.log(good), math.log(bad)
    if ends[0] <= 0 or math.isinf(ends[1]):
        return (low + high) / 2
    share = math.log(target / ends[0]) / math.log(ends[1] / ends[0])
    return low + (high - low) * share


def _narrowed(
    epsilon_at: Callable[[float], float], target: float, good: float, bad: float, tolerance: float
) -> float:
    """Moves `good` (fits) and `bad` (does not fit) together to a ratio of 1 ± `tolerance`."""
    rounds = 0
    while abs(math.log(bad / good)) > tolerance:
        low, high = math.log(good), math.log(bad)
        guess = _between(epsilon_at, target, good, bad)
        # A guess next to one end is stepped across the crossing, so that the other end moves too.
        pad = math.copysign(min(tolerance / 3, abs(high - low) / 4), high - low)
        guess += pad if abs(guess - low) < abs(guess - high) else -pad
        rounds += 1
        # Every third round bisects: interpolation alone can creep along a curved end.
        trial = math.exp((low + high) / 2 if rounds % 3 == 0 else guess)
        if epsilon_at(trial) <= target:
            good = trial
        else:
            bad = trial
    return good


def largest_count(
    ask: Callable[[int], float], target: float, at_most: int, near: int = 1
) -> int:
    """The largest n with `epsilon_at(n) <= target`, for an increasing function.

    Args:
        ask: ε after n steps; cached by the caller, it may be asked twice.
        target: the ε to stay within.
        at_most: where to stop looking, ≥ 0.
        near: where to look first, ≥ 1.

    Returns:
        n in [0, at_most] such that n fits and n + 1 does not, or `at_most` if that fits; 0 also if
        nothing fits.

    Raises:
        TooManyStepsError: n fits, and n + 1 is more than the accountant composes.

    Example:
        >>> largest_count(lambda n: 0.5 * n, target=3.2, at_most=100)
        6
    """
    refused: dict[int, TooManyStepsError] = {}

    def epsilon_at(steps: int) -> float:
        try:
            return ask(steps)
        except TooManyStepsError as error:
            refused[steps] = error
            return math.inf

    if at_most == 0 or epsilon_at(1) > target:
        return 0
    good, bad, trial, stride = 1, at_most + 1, min(near, at_most), 1.01
    while trial > good:
        if epsilon_at(trial) <= target:
            good = trial
        else:
            bad, trial, stride = trial, min(trial - 1, math.floor(trial / stride)), stride**2
    while good < at_most and bad > at_most:
        # ε grows between √n and n; quadrupling would overshoot the first and crawl on the second.
        step = 2.0 if epsilon_at(good) <= 0 else min(target / epsilon_at(good), 64.0) ** 2
        trial = min(max(good + 1, math.ceil(good * max(step, 1.05))), at_most)
        if epsilon_at(trial) > target:
            bad = trial
            break
        good = trial
    rounds = 0
    while bad - good > 1:
        rounds += 1
        guess = (
            (good + bad) / 2
            if rounds % 3 == 0
            else math.exp(_between(lambda n: epsilon_at(round(n)), target, good, bad))
        )
        # Below the middle the crossing is likelier just above the guess, so round towards it.
        rounded = math.floor(guess) + (1 if guess < (good + bad) / 2 else 0)
        trial = min(max(rounded, good + 1), bad - 1)
        if epsilon_at(trial) <= target:
            good = trial
        else:
            bad = trial
    if bad in refused:
        raise refused[bad]
    return good


class _Search(NamedTuple):
    """A run of which one number is searched, x: σ, or the sampling rate.

    Attributes:
        mechanisms_at: what the run executes with a given x.
        target: the ε to stay within.
        delta: δ in (0, 1).
        question: accountant and neighbouring relation.
        ends: the x that is the safest to ask about, and the boldest.
        start: where to begin, between them.
        step: the factor, towards the safe end, by which a bracket is looked for.
    """

    mechanisms_at: Callable[[float], tuple[Mechanism, ...]]
    target: float
    delta: float
    question: Question
    ends: tuple[float, float]
    start: float
    step: float

    def epsilon_at(self, x: float) -> float:
        """The accountant's answer."""
        return epsilon_of(self.mechanisms_at(x), self.delta, self.question)

    def roughly_at(self, x: float) -> float:
        """About that, and several times faster."""
        return rough_epsilon_of(self.mechanisms_at(x), self.delta, self.question)

    def bracket(
        self, at: Callable[[float], float], start: float, step: float
    ) -> tuple[float, float]:
        """An x that fits and a bolder one that does not; twice an end where there are none.

        Strides grow: twice as far each time, on the scale of logarithms.
        """
        safest, boldest = self.ends

        def inside(x: float) -> float:
            return min(max(x, min(self.ends)), max(self.ends))

        good = bad = start
        while at(good) > self.target:
            if good == safest:
                return good, good
            bad, good, step = good, inside(good * step), step * step
        while at(bad) <= self.target and bad != boldest:
            good, bad, step = bad, inside(bad / step), step * step
        return (bad, bad) if at(bad) <= self.target else (good, bad)

    def solve(self) -> float | None:
        """The boldest x that fits, within 0.1%; None if not even the safest does."""
        start, step = self.start, self.step
        good, bad = self.bracket(self.roughly_at, start, step)
        if good != bad:
            start = _narrowed(self.roughly_at, self.target, good, bad, _LOG_ROUGH)
            step = 1 + 0.02 * math.copysign(1, step - 1)
        elif good == self.ends[1]:
            start = good
        elif self.epsilon_at(self.ends[0]) > self.target:
            return None
        good, bad = self.bracket(self.epsilon_at, start, step)
        if good == bad:
            return good
        return _narrowed(self.epsilon_at, self.target, good, bad, _LOG_TOLERANCE)


def calibrate_noise_multiplier(
    epsilon: float,
    *,
    delta: float,
    steps: int,
    sampling_rate: float | None = None,
    sampling: SamplingScheme | None = None,
    accountant: AccountantName = "pld",
    neighboring_relation: RelationName = "add_or_remove_one",
) -> float:
    """The smallest noise multiplier with which a run stays within a target ε.

    σ* = min {σ : epsilon(σ, steps, δ, sampling) ≤ ε}, answered from above within 0.1%.

    Args:
        epsilon: target ε > 0.
        delta: δ in (0, 1).
        steps: number of steps, ≥ 1.
        sampling_rate: q in (0, 1], shorthand for Poisson sampling.
        sampling: how the batches are drawn; exactly one of the two is given.
        accountant: "pld" or "rdp".
        neighboring_relation: "add_or_remove_one" or "replace_one".

    Returns:
        σ in [σ*, 1.001 σ*], noise std / clip norm. For layers with multipliers in the proportion
        r_k, scale r by σ / combined_noise_multiplier(r).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, the combination is not supported, or no noise
            multiplier between 2⁻⁴ and 2¹⁹ is the answer.

    Example:
        >>> round(calibrate_noise_multiplier(3.0, delta=1e-5, steps=250, sampling_rate=0.04), 2)
        1.19
    """
    target, delta = check_epsilon(epsilon), check_delta(delta)
    steps = _check_steps(steps, "Without a step there is no noise.")
    scheme = sampling_of(sampling_rate, sampling)
    question = as_question(accountant, neighboring_relation)

    search = _Search(
        lambda sigma: mechanisms_of([[Release(sigma, scheme, steps)]]),
        target,
        delta,
        question,
        ends=(_LARGEST_SIGMA, _SMALLEST_SIGMA),
        start=1.0,
        step=2.0,
    )
    sigma = search.solve()
    if sigma is None:
        raise ValueError(
            f"epsilon must be reachable, got epsilon={target:g} at delta={delta:g}: "
            f"noise_multiplier={_LARGEST_SIGMA:g} still gives "
            f"{search.epsilon_at(_LARGEST_SIGMA):g}. "
            'Raise epsilon or delta; accountant="rdp" resolves smaller deltas than "pld".'
        )
    if sigma == _SMALLEST_SIGMA:
        raise ValueError(
            f"epsilon must need noise, got epsilon={target:g} at delta={delta:g}, which "
            f"noise_multiplier={sigma:g} already meets. Lower epsilon, or delta, which "
            "may not exceed the chance that an example is drawn at all."
        )
    return sigma


def calibrate_steps(
    epsilon: float,
    *,
    noise_multiplier: NoiseMultiplier,
    delta: float,
    sampling_rate: float | None = None,
    sampling: SamplingScheme | None = None,
    accountant: AccountantName = "pld",
    neighboring_relation: RelationName = "add_or_remove_one",
    at_most: int = 10_000_000,
) -> int:
    """The largest number of steps that stays within a target ε.

    T* = max {T : epsilon(σ, T, δ, sampling) ≤ ε}.

    Args:
        epsilon: target ε > 0.
        noise_multiplier: σ ≥ 0, or one for each Gaussian released from the same batch.
        delta: δ in (0, 1).
        sampling_rate: q in (0, 1], shorthand for Poisson sampling.
        sampling: how the batches are drawn; exactly one of the two is given.
        accountant: "pld" or "rdp".
        neighboring_relation: "add_or_remove_one" or "replace_one".
        at_most: the largest answer of interest, ≥ 0.

    Returns:
        T*, exactly: T* fits and T* + 1 does not. 0 if no step fits, `at_most` if T* is larger.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the combination is not supported.

    Example:
        >>> calibrate_steps(1.0, noise_multiplier=0.0, delta=1e-5, sampling_rate=0.04)
        0
    """
    target, delta = check_epsilon(epsilon), check_delta(delta)
    at_most = check_at_most(at_most)
    scheme = sampling_of(sampling_rate, sampling)
    question = as_question(accountant, neighboring_relation)
    sigma = combined_noise_multiplier(noise_multiplier)

    def epsilon_after(steps: int) -> float:
        return epsilon_of(mechanisms_of([[Release(sigma, scheme, steps)]]), delta, question)

    def roughly_after(steps: int) -> float:
        return rough_epsilon_of(mechanisms_of([[Release(sigma, scheme, steps)]]), delta, question)

    try:
        near = max(largest_count(roughly_after, target, at_most), 1)
    except TooManyStepsError:
        near = 1
    return largest_count(epsilon_after, target, at_most, near)


def calibrate_sampling_rate(
    epsilon: float,
    *,
    noise_multiplier: NoiseMultiplier,
    steps: int,
    delta: float,
    accountant: AccountantName = "pld",
    neighboring_relation: RelationName = "add_or_remove_one",
) -> float:
    """The largest Poisson sampling rate with which a run stays within a target ε.

    q* = max {q : epsilon(σ, steps, δ, q) ≤ ε}, answered from below within 0.1%.

    Args:
        epsilon: target ε > 0.
        noise_multiplier: σ ≥ 0, or one for each Gaussian released from the same batch.
        steps: number of steps, ≥ 1.
        delta: δ in (0, 1).
        accountant: "pld" or "rdp".
        neighboring_relation: "add_or_remove_one" or "replace_one".

    Returns:
        q in [0.999 q*, q*]; exactly 1.0 if every example may join every step.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, the combination is not supported, or not even a
            rate of 2⁻⁴⁰ fits.

    Example:
        >>> round(calibrate_sampling_rate(3.0, noise_multiplier=1.1, steps=250, delta=1e-5), 4)
        0.0349
    """
    target, delta = check_epsilon(epsilon), check_delta(delta)
    steps = _check_steps(steps, "Without a step no rate is too large.")
    question = as_question(accountant, neighboring_relation)
    sigma = combined_noise_multiplier(noise_multiplier)

    search = _Search(
        lambda rate: mechanisms_of([[Release(sigma, PoissonSampling(rate), steps)]]),
        target,
        delta,
        question,
        ends=(_SMALLEST_RATE, 1.0),
        start=1.0,
        step=1 / 8,
    )
    rate = search.solve()
    if rate is None:
        raise ValueError(
            f"epsilon must be reachable, got epsilon={target:g} at delta={delta:g}: "
            f"noise_multiplier={sigma:g} gives {search.epsilon_at(_SMALLEST_RATE):g} even at "
            f"sampling_rate={_SMALLEST_RATE:g}. Raise noise_multiplier, epsilon or delta."
        )
    return rate
