"""Which examples a draw holds, given their number: a subset of which every one is equally likely.

It is the set of the first k different numbers in a sequence of independent uniform numbers of
range(n). Any permutation π of range(n) turns the sequence into another one of the same law, and its
set S into π(S). So S and π(S) have the same law; and as some permutation leads from any subset of k
elements to any other, all of them are equally likely.

Example:
  >>> uniform_subset(np.random.PCG64(1), size=1000, count=4)
  array([ 86, 127, 778, 885])
"""

import numpy as np
from numpy.typing import NDArray

# A subset of more than a 64th is found faster by marks in an array of bools than by sorting.
_SPARSE = 64
_MOST_WORDS = 1 << 24


def uniform_subset(words: np.random.BitGenerator, size: int, count: int) -> NDArray[np.intp]:
    """A uniformly random subset of range(n) with k elements.

    Time and memory are those of the result. The complement of a uniform subset is one, too: of
    more than half of the numbers, those that are left out are drawn.

    Args:
      words: a stream of uniform 64-bit words, of which as many are read as are needed.
      size: n, in 1..2⁶³-1.
      count: k, in 0..n.

    Returns:
      int64 [k], ascending.

    Example:
      >>> uniform_subset(np.random.PCG64(1), size=5, count=4)
      array([0, 1, 3, 4])
    """
    fewer = min(count, size - count)
    chosen = (_marked if fewer * _SPARSE > size else _sorted)(words, size, fewer)
    if fewer == count:
        return chosen
    is_left = np.ones(size, bool)
    is_left[chosen] = False
    return np.flatnonzero(is_left)


# Both of these read no more words at a time than there are elements missing. So the last word that
# they read is the one that completes the subset, wherever they pause to count.


def _sorted(words: np.random.BitGenerator, size: int, count: int) -> NDArray[np.intp]:
    """The first `count` different numbers, in memory for them alone."""
    chosen = np.empty(0, np.intp)
    while missing := count - len(chosen):
        coming = np.sort(_numbers(words, size, missing))
        # A stable sort merges two ascending runs.
        merged = np.sort(np.concatenate([chosen, coming]), kind="stable")
        chosen = merged[np.diff(merged, prepend=-1) > 0]
    return chosen


def _marked(words: np.random.BitGenerator, size: int, count: int) -> NDArray[np.intp]:
    """The first `count` different numbers, marked in an array of all."""
    is_chosen = np.zeros(size, bool)
    missing = count
    while missing:
        is_chosen[_numbers(words, size, missing)] = True
        missing = count - int(np.count_nonzero(is_chosen))
    return np.flatnonzero(is_chosen)


def _numbers(words: np.random.BitGenerator, size: int, most: int) -> NDArray[np.intp]:
    """Independent uniform numbers of range(size), from `most` words or fewer.

    Words from the largest multiple of `size` on are passed over: of those below it, each remainder
    has equally many.
    """
    drawn = words.random_raw(min(most, _MOST_WORDS))
    largest = (1 << 64) // size * size - 1
    return (drawn[drawn <= largest] % size).astype(np.intp)
