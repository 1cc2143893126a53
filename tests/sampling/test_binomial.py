"""The number of members of a Poisson draw: against exact fractions, at the cuts, and frequency."""

import itertools
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy import stats

from jaxdp.sampling import binomial as module
from jaxdp.sampling.binomial import binomial, cells

ONE = 2**53
RATES = (0, 1, 2, 3, 2**26 + 1, 2**50, 2**51 + 12345, ONE // 3, 2**52 - 1, 2**52)
TOLERATED = 1e-6
"""Chance with which each statistical test below would reject a correct law."""


class Words:
    """A stream of given words, and how many of them are left."""

    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def random_raw(self) -> int:
        return self.left.pop(0)


def answer(trials: int, rate: int, *words: int) -> int:
    """What is drawn from these words, all of which must be read."""
    stream: Any = Words(*words)
    drawn = binomial(stream, trials, rate)
    assert stream.left == []
    return drawn


def masses(trials: int, rate: int) -> list[Fraction]:
    """The probabilities of 0..n successes, by their formula."""
    return [
        Fraction(math.comb(trials, k) * rate**k * (ONE - rate) ** (trials - k), ONE**trials)
        for k in range(trials + 1)
    ]


def cuts(trials: int, rate: int) -> list[Fraction]:
    """C_{-1} = 0, C_0, ..., C_n = 1."""
    return list(itertools.accumulate(masses(trials, rate), initial=Fraction(0)))


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 8, 64, 128])
@pytest.mark.parametrize("trials", [1, 2, 3, 7, 40])
def test_every_cut_is_enclosed_closely(trials: int, bits: int) -> None:
    for rate in RATES:
        exact, table = cuts(trials, rate), cells(trials, rate, bits)
        within = exact[table.first : table.first + len(table.lower)]
        assert len(within) == len(table.lower) == len(table.upper)
        for cut, low, high in zip(within, table.lower, table.upper, strict=True):
            assert low <= cut * 2**bits <= high <= low + 2
        # What is left out at either end is less than one unit.
        assert exact[table.first] * 2**bits < 1
        assert (1 - within[-1]) * 2**bits < 1


@pytest.mark.parametrize("guard_bits", [0, 1, 4])
def test_coarse_weights_enclose_the_cuts_all_the_same(
    guard_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rounding is outwards: here each is large, with guard bits none would be seen."""
    monkeypatch.setattr(module, "_GUARD_BITS", guard_bits)
    for trials, rate, bits in itertools.product((1, 3, 7, 40), RATES, (1, 4, 16)):
        exact, table = cuts(trials, rate), cells.__wrapped__(trials, rate, bits)
        for cut, low, high in zip(exact[table.first :], table.lower, table.upper, strict=False):
            assert low <= cut * 2**bits <= high


@pytest.mark.parametrize("bits", [1, 8, 64])
def test_what_a_side_of_the_table_leaves_out_is_bounded(bits: int) -> None:
    """Too little to be seen in the cuts: here are the weights of 400 fair coins themselves."""
    side = module._side(((400 - k, k + 1) for k in range(200, 400)), bits)
    first = 201 + len(side.high)
    left_out = Fraction(sum(math.comb(400, k) for k in range(first, 401)), math.comb(400, 200))
    assert 0 < left_out <= Fraction(side.rest, 2 ** (bits + module._GUARD_BITS)) < 2 * left_out


@pytest.mark.parametrize("trials", [1, 2, 3, 7, 40])
def test_a_cell_is_told_only_where_it_holds_the_whole_interval(trials: int) -> None:
    """Every number of eight bits: the answer is right for all that may follow them, and missing at
    no more than two intervals for each cut."""
    for rate in RATES:
        exact, table = cuts(trials, rate), cells(trials, rate, 8)
        told = {u: table.find(u) for u in range(256)}
        for u, k in told.items():
            if k is not None:
                assert exact[k] * 256 <= u and u + 1 <= exact[k + 1] * 256
        for u in (u for u, k in told.items() if k is None):
            assert any(abs(cut * 256 - u) < 2 for cut in exact)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [(60_000, 256), (10**9, 1e5), (10**9, 1e6), (10**12, 1e6), (10**12, 0.1)],
)
def test_large_tables_are_those_of_scipy(trials: int, expected: float) -> None:
    rate = int(expected / trials * ONE)
    table = cells(trials, rate, 64)
    successes = np.arange(len(table.lower)) + table.first - 1
    law = stats.binom(trials, rate / ONE)
    found = np.array(table.lower, float) / 2**64
    np.testing.assert_allclose(found, law.cdf(successes), atol=1e-9)
    assert np.abs(found - stats.binom(trials, 1.001 * rate / ONE).cdf(successes)).max() > 1e-5
    gaps = np.array([high - low for low, high in zip(table.lower, table.upper, strict=True)])
    assert gaps.max() <= 2
    # So few numbers of 64 bits are undecided, a thing that only the tests below get to see.
    assert gaps.sum() < 2**24


# --- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eighths", range(9))
@pytest.mark.parametrize("trials", [1, 2, 3])
def test_all_first_words_together_have_the_law(trials: int, eighths: int) -> None:
    """The cuts are multiples of 1/512: numbers evenly between them have the masses exactly."""
    rate = eighths * 2**50
    drawn = Counter(answer(trials, rate, (u << 55) + 2**54) for u in range(512))
    assert [Fraction(drawn[k], 512) for k in range(trials + 1)] == masses(trials, rate)


@pytest.mark.parametrize("above_half", [False, True])
@pytest.mark.parametrize(("trials", "rate"), [(3, ONE // 3), (7, 2**50 + 1), (40, ONE // 10)])
def test_a_number_at_a_cut_is_drawn_to_more_bits(trials: int, rate: int, above_half: bool) -> None:
    """128 bits around a cut: the answer changes there, and not at its first 64 bits."""
    exact = cuts(trials, rate)
    for k in range(trials):
        at = math.floor(exact[k + 1] * 2**128)
        if at >> 64 in (0, 2**64 - 1):
            continue  # Other cuts, which are not told apart here, are as close.
        for number, successes in ((at - 1, k), (at + 1, k + 1)):
            words = (number >> 64, number % 2**64)
            if above_half:
                assert answer(trials, ONE - rate, *words) == trials - successes
            else:
                assert answer(trials, rate, *words) == successes


def test_a_number_that_keeps_to_a_cut_is_drawn_until_it_leaves() -> None:
    """C_0 = 1/8 is a multiple of 2⁻⁶⁴, but not known exactly: its weights are thirds."""
    full = 2**64 - 1
    assert answer(3, 2**52, 2**61, 0, 0, 5) == 1
    assert answer(3, 2**52, 2**61 - 1, full, full, full - 5) == 0
    # 1/2 is known exactly, and so are the ends.
    assert answer(1, 2**52, 2**63) == 1
    assert answer(1, 2**52, 2**63 - 1) == 0
    assert (answer(5, 2**52, 0), answer(5, 2**52, full)) == (0, 5)


@pytest.mark.parametrize("trials", [1, 2, 1000, 10**9, 10**12])
def test_rates_of_zero_and_one_are_certain(trials: int) -> None:
    for word in (0, 12345, 2**63, 2**64 - 1):
        assert answer(trials, 0, word) == 0
        assert answer(trials, ONE, word) == trials


def fits(drawn: np.ndarray, trials: int, rate: float) -> bool:
    """χ² of the frequencies of twenty ranges."""
    law = stats.binom(trials, rate)
    edges = np.unique(law.ppf(np.linspace(0.05, 0.95, 19)))
    masses = np.diff(law.cdf(edges), prepend=0.0, append=1.0)
    counts = np.bincount(np.searchsorted(edges, drawn), minlength=len(masses))
    return bool(stats.chisquare(counts, masses * len(drawn)).pvalue > TOLERATED)


@pytest.mark.parametrize(
    ("trials", "expected", "factor"),
    [
        (10**9, 3.0, 1.1),
        (10**12, 0.4, 1.3),
        (60_000, 256.0, 1.01),
        (10**9, 1e5, 1.0005),
        (10**9, 9.9e8, 0.9999995),
        (20, 15.0, 0.98),
    ],
)
def test_frequencies_have_the_law_and_not_one_close_by(
    trials: int, expected: float, factor: float
) -> None:
    rate = int(expected / trials * ONE)
    words = np.random.PCG64(2024)
    drawn = np.array([binomial(words, trials, rate) for _ in range(20_000)])
    assert fits(drawn, trials, rate / ONE)
    # Off by 0.15 standard deviations or more; the mean of 20000 draws is known to 0.007 of them.
    assert not fits(drawn, trials, factor * rate / ONE)
    # The same mean, and another variance by a tenth.
    spread = drawn.mean() + 1.05 * (drawn - drawn.mean())
    assert expected < 100 or not fits(spread, trials, rate / ONE)
