"""Subsets: against the first different numbers of the stream one by one, and by frequency."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxdp.sampling import subsets
from jaxdp.sampling.subsets import uniform_subset

SETTINGS = settings(derandomize=True, deadline=None, max_examples=60)
TOLERATED = 1e-6
"""Chance with which each statistical test below would reject a correct law."""


class Words:
    """A stream of given words."""

    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def random_raw(self, count: int) -> np.ndarray:
        taken, self.left = self.left[:count], self.left[count:]
        return np.array(taken, np.uint64)


def one_by_one(words: np.random.PCG64, size: int, count: int) -> list[int]:
    """The first different numbers of a stream."""
    found: set[int] = set()
    while len(found) < count:
        word = words.random_raw()
        if word < 2**64 // size * size:
            found.add(word % size)
    return sorted(found)


@given(st.integers(1, 300), st.data())
@SETTINGS
def test_a_subset_is_the_first_different_numbers(size: int, data: Any) -> None:
    count, seed = data.draw(st.integers(0, size)), data.draw(st.integers(0, 2**32))
    sparse, most = (
        data.draw(st.sampled_from([0, 64, 10**6])),
        data.draw(st.sampled_from([7, 2**24])),
    )
    words, again = np.random.PCG64(seed), np.random.PCG64(seed)
    expected = one_by_one(again, size, min(count, size - count))
    if count > size - count:
        expected = sorted(set(range(size)) - set(expected))
    # Neither the way that a subset is found nor where it pauses is seen in the result.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subsets, "_SPARSE", sparse)
        patch.setattr(subsets, "_MOST_WORDS", most)
        found = uniform_subset(words, size, count)
    assert found.dtype == np.int64
    assert found.tolist() == expected
    # No word was read for nothing.
    assert words.random_raw() == again.random_raw()


@pytest.mark.parametrize("sparse", [0, 10**6])
def test_words_beyond_the_largest_multiple_are_passed_over(
    sparse: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subsets, "_SPARSE", sparse)
    last = 2**64 - 1  # 2⁶⁴ = 3 · 6148914691236517205 + 1
    words: Any = Words(last, last, last - 2, 7)
    assert uniform_subset(words, 3, 1).tolist() == [1]
    assert words.left == [7]
    words = Words(last, 7)
    assert uniform_subset(words, 4, 1).tolist() == [3]
    assert words.left == [7]


def fits_two_thirds(below: int, draws: int) -> bool:
    return bool(stats.binomtest(below, draws, 2 / 3).pvalue > TOLERATED)


def test_remainders_are_not_biased() -> None:
    """Of range(3 · 2⁶¹), the lower two thirds are remainders of three words of 64 bits each, the
    others of two: taken as they come, they would make up three quarters."""
    words, size, draws = np.random.PCG64(5), 3 * 2**61, 4000
    found = [int(uniform_subset(words, size, 1)[0]) for _ in range(draws)]
    assert fits_two_thirds(sum(number < 2**62 for number in found), draws)
    biased = (np.random.PCG64(5).random_raw(draws) % np.uint64(size)).tolist()
    assert not fits_two_thirds(sum(number < 2**62 for number in biased), draws)


def equally_likely(found: list[tuple[int, ...]], size: int, count: int) -> bool:
    """χ² of the frequencies of all subsets."""
    counts = Counter(found)
    frequencies = [counts[subset] for subset in itertools.combinations(range(size), count)]
    assert sum(frequencies) == len(found)
    return bool(stats.chisquare(frequencies).pvalue > TOLERATED)


@pytest.mark.parametrize("sparse", [0, 10**6])
@pytest.mark.parametrize(("size", "count"), [(2, 1), (3, 1), (5, 2), (6, 3), (6, 4), (7, 6)])
def test_all_subsets_are_equally_likely(
    size: int, count: int, sparse: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subsets, "_SPARSE", sparse)
    words = np.random.PCG64(7)
    found = [tuple(uniform_subset(words, size, count).tolist()) for _ in range(6000)]
    assert equally_likely(found, size, count)


def test_the_test_rejects_subsets_of_other_laws() -> None:
    words = np.random.PCG64(7)

    def filled_up() -> tuple[int, ...]:
        """Three numbers, and where two of them are the same, the smallest that is missing."""
        found = set((words.random_raw(3) % np.uint64(6)).tolist())
        return tuple(sorted([*found, *sorted(set(range(6)) - found)][:3]))

    def sorted_before_the_cut() -> tuple[int, ...]:
        """The three smallest of the first four different numbers."""
        return tuple(uniform_subset(words, 6, 4).tolist()[:3])

    for wrong in (filled_up, sorted_before_the_cut):
        assert not equally_likely([wrong() for _ in range(6000)], 6, 3)


def test_sparse_subsets_of_a_large_range_are_uniform_and_ascending() -> None:
    size, count = 10**12, 100_000
    found = uniform_subset(np.random.PCG64(9), size, count)
    assert len(found) == count and (np.diff(found) > 0).all()
    assert 0 <= found[0] and found[-1] < size
    pvalue = stats.kstest(found / size, "uniform").pvalue
    assert pvalue > TOLERATED
    assert stats.kstest((found / size) ** 1.05, "uniform").pvalue < TOLERATED
