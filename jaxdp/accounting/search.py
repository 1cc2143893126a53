"""Searches in a monotone ε: a bracket for a number, narrowed; the largest count that fits.

They know nothing of privacy but that an accountant may refuse a count. Every answer fits: where it
is only near the best one, it is so on the safe side.

Example:
  >>> largest_count(lambda n: 0.5 * n, target=3.2, at_most=100)
  6
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from jaxdp.accounting.mechanisms.base import TooManyStepsError

_LOG_TOLERANCE = 8e-4
# Enough for a rough answer that is off by as much.
_LOG_ROUGH = 5e-3

EpsilonAt = Callable[[float], float]
"""ε at a number; cached by the caller, it may be asked twice."""


class Span(NamedTuple):
    """Where a number x is looked for.

    Attributes:
      safest: the x with the least ε that is asked about.
      boldest: the x with the largest.
      start: where to begin, between them.
      step: the factor, towards the safe end, by which a bracket is looked for.
    """

    safest: float
    boldest: float
    start: float
    step: float


def bracket(epsilon_at: EpsilonAt, target: float, span: Span) -> tuple[float, float]:
    """An x that fits and a bolder one that does not; twice an end where there are none.

    Strides grow: twice as far each time, on the scale of logarithms.

    Args:
      epsilon_at: ε at an x.
      target: the ε to stay within.
      span: where to look.

    Returns:
      The two.

    Example:
      >>> bracket(lambda x: x, target=5.0, span=Span(0.1, 100.0, start=1.0, step=0.5))
      (2.0, 8.0)
    """
    safest, boldest, start, step = span

    def inside(x: float) -> float:
        return min(max(x, min(safest, boldest)), max(safest, boldest))

    good = bad = start
    while epsilon_at(good) > target:
        if good == safest:
            return good, good
        bad, good, step = good, inside(good * step), step * step
    while epsilon_at(bad) <= target and bad != boldest:
        good, bad, step = bad, inside(bad / step), step * step
    return (bad, bad) if epsilon_at(bad) <= target else (good, bad)


def _between(epsilon_at: EpsilonAt, target: float, good: float, bad: float) -> float:
    """Log-log interpolation for the crossing, clamped to the middle half of a useless bracket."""
    ends = epsilon_at(good), epsilon_at(bad)
    low, high = math.log(good), math.log(bad)
    if ends[0] <= 0 or math.isinf(ends[1]):
        return (low + high) / 2
    share = math.log(target / ends[0]) / math.log(ends[1] / ends[0])
    return low + (high - low) * share


def narrowed(
    epsilon_at: EpsilonAt, target: float, good: float, bad: float, tolerance: float
) -> float:
    """The boldest x that fits, between one that does and one that does not.

    Args:
      epsilon_at: ε at an x, monotone; cached by the caller, it may be asked twice.
      target: the ε to stay within.
      good: an x > 0 that fits.
      bad: an x > 0 that does not, on either side of `good`.
      tolerance: how close the two must come, as the logarithm of their ratio.

    Returns:
      An x that fits, such that one within the tolerance does not.

    Example:
      >>> round(narrowed(lambda x: x**2, target=4.0, good=1.0, bad=5.0, tolerance=1e-4), 3)
      2.0
    """
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


def boldest_number(
    epsilon_at: EpsilonAt, roughly_at: EpsilonAt, target: float, span: Span
) -> float | None:
    """The boldest number that fits, within 0.1%.

    Args:
      epsilon_at: ε at an x.
      roughly_at: about that, and several times faster.
      target: the ε to stay within.
      span: where to look.

    Returns:
      An x that fits; None if not even the safest does.

    Example:
      >>> span = Span(0.1, 100.0, start=1.0, step=0.5)
      >>> 4.995 < boldest_number(lambda x: x, lambda x: 1.01 * x, target=5.0, span=span) <= 5.0
      True
    """
    good, bad = bracket(roughly_at, target, span)
    if good != bad:
        near = narrowed(roughly_at, target, good, bad, _LOG_ROUGH)
        span = span._replace(start=near, step=1 + 0.02 * math.copysign(1, span.step - 1))
    elif good == span.boldest:
        span = span._replace(start=good)
    elif epsilon_at(span.safest) > target:
        return None
    good, bad = bracket(epsilon_at, target, span)
    return good if good == bad else narrowed(epsilon_at, target, good, bad, _LOG_TOLERANCE)


def _along(epsilon_at: Callable[[int], float], target: float, before: int, good: int) -> float:
    """Where the line through two counts reaches the target: where much was spent before them, ε is
    about a line, of which its ratio to the target says nothing."""
    rise = epsilon_at(good) - epsilon_at(before)
    return good + (good - before) * (target - epsilon_at(good)) / rise if rise > 0 else 0.0


def largest_count(ask: Callable[[int], float], target: float, at_most: int, near: int = 1) -> int:
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
    before = good
    while good < at_most and bad > at_most:
        # ε grows between √n and n; quadrupling would overshoot the first and crawl on the second.
        step = 2.0 if epsilon_at(good) <= 0 else min(target / epsilon_at(good), 64.0) ** 2
        if epsilon_at(good) <= 0 and good == near:
            trial = good + 1  # no slope leads to where ε leaps up from 0, but `near` may lie there
        else:
            further = max(good * max(step, 1.05), _along(epsilon_at, target, before, good))
            trial = min(max(good + 1, math.ceil(further)), at_most)
        if epsilon_at(trial) > target:
            bad = trial
            break
        before, good = good, trial
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
