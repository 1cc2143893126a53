"""How many examples a Poisson draw holds: a binomial number with exactly its law.

The law is inverted: the unit interval is cut into cells, cell k from C_{k-1} to C_k with

$$ C_k = \\Pr[K \\le k], \\qquad K \\sim \\mathrm{Binomial}(n, t / 2^{53}), $$

and a uniform number falls into cell k with the probability of k successes. The number is drawn 64
bits at a time, and the cuts are known as integers that enclose them, so that both are intervals.
An answer is given once the interval of the number lies within one cell for certain, and then it is
the cell of the number itself, whatever bits would follow. Where it is not certain, more bits of the
number are drawn and closer enclosures computed. So the precision decides how long a draw takes and
never what is drawn: the law is exact, with no floating-point number in it.

The draws end with probability one: after m bits an interval of length 2⁻ᵐ is undecided only where
it meets an enclosure, and the lengths of both go to zero. Fewer than one in 2⁴⁰ draws needs more
than one word.

Example:
  >>> import numpy as np
  >>> words = np.random.PCG64(1)
  >>> [binomial(words, trials=10**9, rate=2**53 // 10**7) for _ in range(8)]
  [100, 117, 89, 117, 95, 98, 109, 98]
"""

from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

RATE_BITS = 53
"""Rates are integers t of this many bits, and stand for the probability t / 2⁵³."""

_ONE = 1 << RATE_BITS
_WORD_BITS = 64
# Further bits of the weights: roundings add up over a million of them, and stay far below one unit.
_GUARD_BITS = 64


def binomial(words: np.random.BitGenerator, trials: int, rate: int) -> int:
    """A number with the law Binomial(n, t / 2⁵³).

    Args:
      words: a stream of uniform 64-bit words, of which as many are read as are needed.
      trials: n ≥ 1.
      rate: t in [0, 2⁵³].

    Returns:
      An integer in 0..n.

    Example:
      >>> binomial(np.random.PCG64(1), trials=7, rate=2**53)
      7
    """
    if 2 * rate > _ONE:
        return trials - binomial(words, trials, _ONE - rate)
    uniform, bits = 0, 0
    while True:
        uniform, bits = uniform << _WORD_BITS | int(words.random_raw()), bits + _WORD_BITS
        successes = cells(trials, rate, bits).find(uniform)
        if successes is not None:
            return successes


class Cells(NamedTuple):
    """The cuts C_k between the cells of a binomial law, enclosed in units of 2⁻ᵐ.

    Attributes:
      first: the smallest number of successes whose cell is in the table. The cells beyond either
        end of the table are not told apart.
      lower: integers ≤ 2ᵐ C_k for k = first - 1, first, ..., in ascending order, from 0 on.
      upper: integers ≥ 2ᵐ C_k for the same k.
    """

    first: int
    lower: list[int]
    upper: list[int]

    def find(self, uniform: int) -> int | None:
        """The cell that holds all of [u, u + 1) in units of 2⁻ᵐ.

        Args:
          uniform: u, the first m bits of a uniform number.

        Returns:
          The number of successes; None where the table cannot tell.

        Example:
          >>> cells(1, 2**52, 64).find(2**63 - 1), cells(1, 2**52, 64).find(2**63)
          (0, 1)
        """
        cut = bisect_right(self.lower, uniform)
        if cut == len(self.lower) or uniform < self.upper[cut - 1]:
            return None
        return self.first + cut - 1


# The weights w_k = P[K = k] / P[K = mode] follow from their neighbours by the ratios
#
#     w_{k+1} / w_k = (n - k) t / ((k + 1) (2⁵³ - t)),
#
# which fall as k grows, and are at most 1 from the mode on: (n - k) t ≤ (k + 1) (2⁵³ - t) says
# (n + 1) t ≤ (k + 1) 2⁵³, and the mode is floor((n + 1) t / 2⁵³). Downwards it is the same with the
# ratios the other way up. Rounded down at every step the weights are lower bounds, rounded up they
# are upper ones. With A the weights up to k and B those beyond, C_k = A / (A + B) grows with A and
# falls with B: the bounds of A and B give those of C_k, and exactly 0 and 1 where a side is empty.
@lru_cache(maxsize=4)
def cells(trials: int, rate: int, bits: int) -> Cells:
    """The cells of Binomial(n, t / 2⁵³), fine enough for a uniform number of m bits.

    Args:
      trials: n ≥ 1.
      rate: t in [0, 2⁵²].
      bits: m ≥ 1.

    Returns:
      The cells of all numbers of successes but those whose probability is below 2⁻ᵐ times the
      largest.

    Example:
      >>> cells(2, 2**52, bits=4)
      Cells(first=0, lower=[0, 4, 12, 16], upper=[0, 4, 12, 16])
    """
    mode, other = (trials + 1) * rate >> RATE_BITS, _ONE - rate
    up = (((trials - k) * rate, (k + 1) * other) for k in range(mode, trials))
    down = ((k * other, (trials - k + 1) * rate) for k in range(mode, 0, -1))
    above, below = _side(up, bits), _side(down, bits)
    of_mode = 1 << bits + _GUARD_BITS
    low = list(accumulate([*reversed(below.low), of_mode, *above.low], initial=0))
    high = list(accumulate([*reversed(below.high), of_mode, *above.high], initial=below.rest))
    all_low, all_high = low[-1], high[-1] + above.rest
    pairs = list(zip(low, high, strict=True))
    return Cells(
        mode - len(below.low),
        [(a << bits) // (a + all_high - b) for a, b in pairs],
        [-(-(b << bits) // (b + all_low - a)) for a, b in pairs],
    )


class _Side(NamedTuple):
    """Bounds of the weights on one side of the mode, the nearest first, and of the rest's sum."""

    low: list[int]
    high: list[int]
    rest: int


def _side(ratios: Iterable[tuple[int, int]], bits: int) -> _Side:
    """The weights by the ratios of each to the one before, in units of 2^-(bits + guard bits).

    It ends at a weight below 2^-bits. A ratio below 1 has led there, and the later ones are smaller
    still, so that the rest is below a geometric series: w r + w r² + ... = w r / (1 - r).
    """
    low = high = 1 << bits + _GUARD_BITS
    lows: list[int] = []
    highs: list[int] = []
    for over, under in ratios:
        if not high >> _GUARD_BITS:
            return _Side(lows, highs, -(-high * over // (under - over)))
        low, high = low * over // under, -(-high * over // under)
        lows.append(low)
        highs.append(high)
    return _Side(lows, highs, 0)
