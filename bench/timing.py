"""Times of several contestants in one process, who take turns so that a machine that slows down
slows all of them alike.

A contestant is a function without arguments that returns when its work is done; `waiting` makes one
of a function of JAX, which returns before that.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax

Run = Callable[[], Any]
# At least that many rounds for contestants that are slow.
FEW_ROUNDS = 2
# A turn is one step, and if that is not long another 0.1 s of steps.
LONG_STEP, TURN_SECONDS = 1.0, 0.1


def waiting(fun: Callable[..., Any], *args: Any) -> Run:
    """A call of a function, to the end of its work."""
    return lambda: jax.block_until_ready(fun(*args))


def timed(run: Run) -> tuple[float, Any]:
    """Wall seconds of one call, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def once(run: Run) -> float:
    """Wall seconds of one call."""
    return timed(run)[0]


def turn(run: Run) -> float:
    """Wall seconds of one call, in a turn of many."""
    first = once(run)
    # The first call pays for what the contestant before it left: cold caches, and up to 0.15 s
    # of memory given back. It counts only where that is small.
    if first >= LONG_STEP:
        return first
    start = time.perf_counter()
    steps = 0
    while steps == 0 or time.perf_counter() - start < TURN_SECONDS:
        run()
        steps += 1
    return (time.perf_counter() - start) / steps


def in_turns(
    runs: Mapping[str, Run],
    rounds: int | Callable[[int, float], bool],
    *,
    measure: Callable[[Run], float] = once,
    slow: Set[str] = frozenset(),
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round.

    Args:
      runs: name -> contestant, compiled and warm.
      rounds: how many; or `(rounds so far, seconds they took) -> whether they will do`.
      measure: the seconds of one contestant in one round.
      slow: contestants that take part in few rounds, and do not count in the seconds: they would
        eat the time of all others.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    generator, order = random.Random(0), list(runs)
    done, spent = 0, 0.0
    while not (rounds(done, spent) if callable(rounds) else done >= rounds):
        # What runs behind a short step is faster, so that the order changes. Every second round
        # runs backwards: of two contestants each is the first as often as the other.
        if done % 2 == 0:
            generator.shuffle(order)
        else:
            order.reverse()
        for name in order:
            if name in slow and done >= FEW_ROUNDS:
                continue
            whole, found = timed(lambda run=runs[name]: measure(run))
            seconds[name].append(found)
            spent += 0 if name in slow else whole
        done += 1
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of the rounds, in milliseconds."""
    return {name: 1e3 * statistics.median(found) for name, found in seconds.items()}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of the rounds."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
