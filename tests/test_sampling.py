"""Draws: exact properties on every case, frequencies against the law and against wrong laws."""

import itertools
import json
import math
import pathlib
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxdp import accounting, sampling
from jaxdp.sampling import FixedSizeSampler, PoissonSampler, Sampler, ShuffledSampler, poisson
from jaxdp.sampling.registry import SAMPLERS as SAMPLERS_BY_KIND
from jaxdp.sampling.sized import SizedSampler

SETTINGS = settings(derandomize=True, deadline=None, max_examples=40)

SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "poisson": lambda seed: PoissonSampler(101, expected_batch_size=20, seed=seed),
    "poisson_overflowing": lambda seed: PoissonSampler(
        101, sampling_rate=0.5, physical_batch_size=7, seed=seed
    ),
    "fixed_size": lambda seed: FixedSizeSampler(101, batch_size=20, seed=seed),
    "fixed_size_split": lambda seed: FixedSizeSampler(
        101, batch_size=20, physical_batch_size=6, seed=seed
    ),
    "shuffled": lambda seed: ShuffledSampler(101, batch_size=20, seed=seed),
    "shuffled_split": lambda seed: ShuffledSampler(
        101, batch_size=20, physical_batch_size=6, seed=seed
    ),
}
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())


def drawn(sampler: Sampler, step: int) -> list[int]:
    """The examples of one logical batch, duplicates kept."""
    batches = sampler.draw(step)
    return [int(i) for batch in batches for i in batch.indices[batch.mask]]


def inclusions(sampler: Sampler, steps: int) -> np.ndarray:
    """[steps, num_examples] of 0 and 1: who took part when."""
    table = np.zeros((steps, sampler.num_examples), np.int8)
    for step in range(steps):
        table[step, drawn(sampler, step)] += 1
    return table


# --- contract of every sampler ------------------------------------------------------------------


@every_sampler
def test_physical_batches_have_one_shape_and_end_once(make):
    sampler = make(3)
    for step in range(12):
        batches = sampler.draw(step)
        assert [batch.is_last for batch in batches] == [False] * (len(batches) - 1) + [True]
        for batch in batches:
            assert batch.indices.shape == batch.mask.shape == (sampler.physical_batch_size,)
            assert (batch.indices.dtype, batch.mask.dtype) == (np.int64, np.bool_)
            assert not batch.indices[~batch.mask].any()
            assert ((batch.indices >= 0) & (batch.indices < sampler.num_examples)).all()


@every_sampler
def test_nobody_is_drawn_twice_in_a_step(make):
    sampler = make(4)
    for step in range(12):
        examples = drawn(sampler, step)
        assert len(examples) == len(set(examples)) > 0


@every_sampler
def test_only_the_last_physical_batch_is_padded(make):
    sampler = make(5)
    for step in range(12):
        *full, _ = sampler.draw(step)
        assert all(batch.mask.all() for batch in full)


@every_sampler
def test_a_draw_is_a_function_of_seed_and_step(make):
    first = [drawn(make(6), step) for step in range(8)]
    # Another object, the steps in another order: as after a restart.
    again = {step: drawn(make(6), step) for step in reversed(range(8))}
    assert first == [again[step] for step in range(8)]
    assert first != [drawn(make(7), step) for step in range(8)]
    assert len({tuple(examples) for examples in first}) == 8


@every_sampler
def test_a_dict_through_json_rebuilds_the_sampler(make):
    sampler = make(2**128 - 1)
    rebuilt = sampling.sampler_from_dict(json.loads(json.dumps(sampler.to_dict())))
    assert rebuilt == sampler
    assert type(rebuilt) is type(sampler)
    assert drawn(rebuilt, 5) == drawn(sampler, 5)
    assert rebuilt.expected_batch_size == sampler.expected_batch_size


@every_sampler
def test_batches_iterates_the_draws(make):
    sampler = make(8)
    expected = [(step, batch) for step in (3, 4, 5) for batch in sampler.draw(step)]
    found = list(itertools.islice(sampler.batches(start=3), len(expected)))
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.indices, theirs.indices)
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        assert ours.is_last == theirs.is_last


def test_a_fingerprint_is_of_the_seed_alone():
    """Whatever else differs, batches of one seed depend on each other."""
    named = {
        sampler.fingerprint
        for sampler in (
            PoissonSampler(101, sampling_rate=0.1, seed=5),
            PoissonSampler(99, sampling_rate=0.2, physical_batch_size=8, seed=5),
            FixedSizeSampler(101, batch_size=7, seed=5),
            ShuffledSampler(101, batch_size=20, seed=np.int64(5)),  # pyright: ignore[reportArgumentType]
            sampling.sampler_from_dict(FixedSizeSampler(9, batch_size=2, seed=5).to_dict()),
        )
    }
    others = {FixedSizeSampler(9, batch_size=2, seed=seed).fingerprint for seed in (0, 6, 50, None)}
    assert len(named) == 1 and len(others) == 4 and not named & others
    assert all(len(name) == 64 and set(name) <= set("0123456789abcdef") for name in named | others)
    assert str(2**100) not in FixedSizeSampler(9, batch_size=2, seed=2**100).fingerprint


@every_sampler
def test_the_seed_is_random_by_default_and_never_shown(make):
    kind: Any = type(make(9))
    fields = make(9).to_dict()
    for name in ("kind", "stream", "seed"):
        fields.pop(name)
    one, two = kind(**fields), kind(**fields)
    assert one.seed != two.seed
    assert max(one.seed, two.seed) >= 2**64, "128 bits; fails by chance with probability 2**-128"
    assert str(one.seed) not in repr(one)


@every_sampler
def test_samplers_are_immutable_and_hashable(make):
    sampler = make(1)
    with pytest.raises(AttributeError):
        sampler.seed = 2
    assert len({sampler, make(1), make(2)}) == 2


@every_sampler
def test_a_drawn_batch_belongs_to_the_caller(make):
    sampler = make(1)
    before = drawn(sampler, 0)
    for batch in sampler.draw(0):
        batch.indices[:] = -1
    assert drawn(sampler, 0) == before


GOLDEN = {
    # Written down once: a change of machine, NumPy or code that moves a draw breaks resumed runs.
    "poisson": [2, 7, 17, 27, 28, 32, 37, 40, 46, 49, 59, 66, 79, 82, 91, 95],
    "fixed_size": [6, 8, 10, 16, 19, 20, 24, 39, 40, 50, 51, 52, 58, 59, 67, 72, 87, 90, 94, 96],
    "shuffled": [75, 92, 42, 59, 77, 20, 12, 11, 47, 17, 76, 8, 91, 49, 50, 69, 55, 54, 25, 80],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_draws_are_the_same_on_every_machine(name):
    assert drawn(SAMPLERS[name](12345), 7) == GOLDEN[name]


def test_neither_accounting_nor_sampling_imports_jax():
    # The package root may import jax, so it is replaced by an empty one with the same path.
    root = pathlib.Path(accounting.__file__).parent.parent
    code = (
        "import sys, types\n"
        "package = types.ModuleType('jaxdp')\n"
        f"package.__path__ = [{str(root)!r}]\n"
        "sys.modules['jaxdp'] = package\n"
        "import jaxdp.accounting, jaxdp.sampling\n"
        "sys.exit(any(name.split('.')[0] in ('jax', 'jaxlib') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_kind_and_a_stream_belong_to_one_sampler() -> None:
    """Two kinds of one stream would draw from the same random numbers, where seeds are the same."""
    before = dict(SAMPLERS_BY_KIND)
    for kind, stream, says in (
        ("poisson", 99, "kind must be the sampler's own, got 'poisson' for Other, which Poisson"),
        ("other", 11, "stream must be the sampler's own, got 11 for Other, which FixedSizeSampler"),
    ):
        other = type("Other", (FixedSizeSampler,), {"kind": kind, "stream": stream})
        with pytest.raises(ValueError, match=says):
            sampling.register(other)
    with pytest.raises(TypeError, match="got Nothing without expected_batch_size, largest_draw"):
        sampling.register(type("Nothing", (Sampler,), {"kind": "nothing", "stream": 99}))
    with pytest.raises(TypeError, match="got SizedSampler without members, scheme, kind, stream"):
        sampling.register(SizedSampler)
    assert SAMPLERS_BY_KIND == before
    assert set(before) == {make(0).kind for make in SAMPLERS.values()}


# --- schemes and sizes --------------------------------------------------------------------------


def test_schemes_are_what_the_accountant_knows():
    assert PoissonSampler(50, sampling_rate=0.3, seed=1).scheme == accounting.PoissonSampling(0.3)
    fixed = FixedSizeSampler(50, batch_size=4, seed=1)
    assert fixed.scheme == accounting.FixedSizeSampling(50, 4)
    shuffled = ShuffledSampler(50, batch_size=4, seed=1)
    assert shuffled.scheme == accounting.ShuffledEpochs(13)


@given(st.integers(1, 10**7), st.data())
@SETTINGS
def test_poisson_expected_batch_size_survives_exactly(size, data):
    batch = data.draw(st.integers(1, size))
    sampler = PoissonSampler(size, expected_batch_size=batch, seed=1)
    assert sampler.expected_batch_size == batch
    assert sampling.sampler_from_dict(sampler.to_dict()) == sampler


@pytest.mark.parametrize(
    ("size", "expected", "physical"),
    [(60_000, 256, 320), (1000, 32, 56), (101, 101, 104), (10, 9, 16), (5, 1, 8), (16, 15.9, 16)],
)
def test_poisson_default_physical_batch(size, expected, physical):
    sampler = PoissonSampler(size, expected_batch_size=expected, seed=1)
    assert sampler.physical_batch_size == physical


def test_fixed_size_default_physical_batch():
    assert FixedSizeSampler(101, batch_size=20, seed=1).physical_batch_size == 20
    large = FixedSizeSampler(10**12, batch_size=2 * 10**8, seed=1)
    assert large.physical_batch_size == 10**8


# --- Poisson ------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 300),
    rate=st.floats(0.01, 1.0),
    rows=st.integers(1, 40),
    step=st.integers(0, 2**40),
)
@SETTINGS
def test_overflow_neither_drops_nor_duplicates(size, rate, rows, step):
    whole = PoissonSampler(size, sampling_rate=rate, physical_batch_size=size, seed=11)
    split = PoissonSampler(size, sampling_rate=rate, physical_batch_size=rows, seed=11)
    [batch] = whole.draw(step)
    expected = np.flatnonzero(np.isin(np.arange(size), batch.indices[batch.mask])).tolist()
    assert drawn(split, step) == expected
    assert len(split.draw(step)) == max(1, math.ceil(len(expected) / rows))


def test_rate_one_takes_everyone():
    sampler = PoissonSampler(37, sampling_rate=1.0, seed=1)
    assert drawn(sampler, 0) == list(range(37))


def test_empty_draws_are_one_masked_batch_and_happen_at_their_rate():
    sampler = PoissonSampler(10, sampling_rate=0.05, seed=1)
    empty = 0
    for step in range(2000):
        batches = sampler.draw(step)
        if not any(batch.mask.any() for batch in batches):
            [batch] = batches
            assert batch.is_last
            assert not batch.indices.any()
            empty += 1
    # Mean 2000 * 0.95**10 = 1197, standard deviation 22: five of them are 6e-7 for chance.
    assert abs(empty - 1197) < 110


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_every_pattern_of_four_examples_has_its_probability(rate: float) -> None:
    """χ² of all sixteen."""
    table = inclusions(PoissonSampler(4, sampling_rate=rate, seed=8), 10_000)
    sizes = np.array([pattern.bit_count() for pattern in range(16)])

    def fits(table: np.ndarray, rate: float) -> bool:
        found = np.bincount(table @ [1, 2, 4, 8], minlength=16)
        law = rate**sizes * (1 - rate) ** (4 - sizes)
        return bool(stats.chisquare(found, len(table) * law).pvalue > TOLERATED)

    assert fits(table, rate)
    assert not fits(table, 0.9 * rate)
    # Two of the four, who go together in one step of six.
    together = table.copy()
    together[::6, 1] = table[::6, 0]
    assert not fits(together, rate)


def test_the_rate_is_rounded_down(monkeypatch):
    """The accountant is told the rate q: no draw has a higher one."""
    drawn = []
    monkeypatch.setattr(poisson, "binomial", lambda words, size, rate: drawn.append(rate) or 0)
    for rate in (2**-53, 1.9 * 2**-53, 0.1, 1 - 2**-53, 1.0):
        PoissonSampler(9, sampling_rate=rate, seed=1).members(0)
        assert 0 <= rate * 2**53 - drawn.pop() < 1


def test_a_poisson_draw_is_what_its_words_say() -> None:
    """The first word tells the size, by the exact law; the words after it the members."""
    size = 101
    sampler = PoissonSampler(size, expected_batch_size=20, seed=5)
    rate = math.floor(sampler.sampling_rate * 2**53)
    weights = [math.comb(size, k) * rate**k * (2**53 - rate) ** (size - k) for k in range(size)]
    cuts = list(itertools.accumulate(weights))
    for step in range(200):
        words = sampler.words(step)
        number = words.random_raw()
        count = sum(cut << 64 <= number * 2 ** (53 * size) for cut in cuts)
        members: set[int] = set()
        while len(members) < count:
            members.add(words.random_raw() % size)
        assert drawn(sampler, step) == sorted(members)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_draw_costs_what_it_holds(parts: int) -> None:
    """Of 10¹² examples: a bit for each would be 125 GB."""
    poisson = PoissonSampler(10**12, expected_batch_size=1000, physical_batch_size=1024, seed=1)
    fixed = FixedSizeSampler(10**12, batch_size=1000, physical_batch_size=1024, seed=1)
    tracemalloc.start()
    sizes = [
        sum(int(batch.mask.sum()) for batch in sampler.draw(3, parts))
        for sampler in (poisson, fixed)
    ]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert abs(sizes[0] - 1000) < 5 * math.sqrt(1000) and sizes[1] == 1000
    assert peak < 4_000_000


POISSON = PoissonSampler(500, sampling_rate=0.1, seed=2024)
STEPS = 12_000
TOLERATED = 1e-6
"""Chance with which each statistical test below would reject a correct sampler."""


def fits_rate(table: np.ndarray, rate: float) -> bool:
    """Two-sided exact binomial test on all inclusions together."""
    return bool(stats.binomtest(int(table.sum()), table.size, rate).pvalue > TOLERATED)


def fits_every_example(table: np.ndarray, rate: float) -> bool:
    """χ² over examples: each is included in Binomial(steps, q) of the steps."""
    steps, size = table.shape
    z = (table.sum(0) - steps * rate) / math.sqrt(steps * rate * (1 - rate))
    return TOLERATED / 2 < float(stats.chi2.sf((z**2).sum(), size)) < 1 - TOLERATED / 2


def fits_size_variance(table: np.ndarray, rate: float) -> bool:
    """χ² on the variance of the batch size against n q (1 - q)."""
    steps, size = table.shape
    statistic = table.sum(1).var() * steps / (size * rate * (1 - rate))
    return TOLERATED / 2 < float(stats.chi2.sf(statistic, steps - 1)) < 1 - TOLERATED / 2


def fits_independent_steps(table: np.ndarray, rate: float) -> bool:
    """Binomial test on joint inclusion in consecutive steps against q²."""
    both = int((table[::2] & table[1::2]).sum())
    return bool(stats.binomtest(both, table[::2].size, rate**2).pvalue > TOLERATED)


def fits_independent_examples(table: np.ndarray, rate: float) -> bool:
    """Binomial test on joint inclusion of neighbouring examples against q²."""
    both = int((table[:, ::2] & table[:, 1::2]).sum())
    return bool(stats.binomtest(both, table[:, ::2].size, rate**2).pvalue > TOLERATED)


@pytest.fixture(scope="module")
def poisson_table() -> np.ndarray:
    return inclusions(POISSON, STEPS)


@pytest.mark.parametrize("test", [fits_rate, fits_every_example, fits_size_variance])
def test_poisson_inclusions_have_the_rate_and_not_a_tenth_more(poisson_table, test):
    assert test(poisson_table, 0.1)
    # At a false alarm rate of 1e-6 a rate off by a tenth is missed with probability below 0.04: the
    # variance of 12000 sizes is known to 1.3% and moves by 8.8%; the other two are far stronger.
    assert not test(poisson_table, 0.1 * 1.1)


def test_poisson_steps_and_examples_are_independent(poisson_table):
    assert fits_independent_steps(poisson_table, 0.1)
    assert fits_independent_examples(poisson_table, 0.1)


def test_the_independence_tests_reject_dependent_draws(poisson_table):
    repeated = np.repeat(poisson_table[::2], 2, axis=0)
    assert not fits_independent_steps(repeated, 0.1)
    in_pairs = np.repeat(poisson_table[:, ::2], 2, axis=1)
    assert not fits_independent_examples(in_pairs, 0.1)


# --- fixed size ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixed_table() -> np.ndarray:
    return inclusions(FixedSizeSampler(500, batch_size=50, seed=2024), STEPS)


def test_fixed_size_batches_have_the_size_and_fail_the_poisson_variance(fixed_table):
    assert (fixed_table.sum(1) == 50).all()
    assert not fits_size_variance(fixed_table, 0.1)


def test_fixed_size_examples_are_uniform_and_steps_independent(fixed_table):
    # The fixed sum removes one degree of freedom and the factor (n - 1) / n: below the tolerance.
    assert fits_every_example(fixed_table, 0.1)
    assert not fits_every_example(fixed_table, 0.11)
    assert fits_independent_steps(fixed_table, 0.1)


def test_fixed_size_subsets_are_all_equally_likely():
    sampler = FixedSizeSampler(5, batch_size=2, seed=3)
    found = [tuple(drawn(sampler, step)) for step in range(4000)]
    counts = [found.count(pair) for pair in itertools.combinations(range(5), 2)]
    assert sum(counts) == 4000
    assert stats.chisquare(counts).pvalue > TOLERATED


def test_fixed_size_of_everyone_is_everyone():
    assert drawn(FixedSizeSampler(9, batch_size=9, seed=3), 4) == list(range(9))


# --- shuffled -----------------------------------------------------------------------------------


@given(st.integers(1, 200), st.data())
@SETTINGS
def test_an_epoch_is_a_permutation(size, data):
    batch = data.draw(st.integers(1, size))
    rows = data.draw(st.integers(1, batch + 3))
    sampler = ShuffledSampler(size, batch_size=batch, physical_batch_size=rows, seed=5)
    assert sampler.steps_per_epoch == math.ceil(size / batch)
    epoch = data.draw(st.integers(0, 1000)) * sampler.steps_per_epoch
    steps = [drawn(sampler, epoch + offset) for offset in range(sampler.steps_per_epoch)]
    assert sorted(itertools.chain(*steps)) == list(range(size))
    assert {len(step) for step in steps[:-1]} <= {batch}


def test_permutations_are_uniform_and_fresh():
    sampler = ShuffledSampler(4, batch_size=4, seed=6)
    orders = [tuple(drawn(sampler, epoch)) for epoch in range(4800)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert stats.chisquare(counts).pvalue > TOLERATED
    # 24 orders: the next epoch repeats the last one in 200 of 4799 cases, standard deviation 14.
    repeats = sum(one == two for one, two in itertools.pairwise(orders))
    assert abs(repeats - 200) < 70


def test_samplers_of_one_seed_do_not_share_their_randomness():
    poisson = PoissonSampler(400, sampling_rate=0.5, seed=1)
    fixed = FixedSizeSampler(400, batch_size=200, seed=1)
    common = sum(len(set(drawn(poisson, t)) & set(drawn(fixed, t))) for t in range(50))
    # 50 * 400 / 4 = 5000 with standard deviation below 71; shared words would give nearly 10000.
    assert abs(common - 5000) < 360


# --- errors -------------------------------------------------------------------------------------

# Typed as Any: the table passes wrong types on purpose.
P: Any = PoissonSampler
F: Any = FixedSizeSampler
S: Any = ShuffledSampler
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: P(0, sampling_rate=0.1), ValueError, "num_examples must be at least 1, got 0"),
    (lambda: P(2.0, sampling_rate=0.1), TypeError, "num_examples must be an integer, got 2.0"),
    (lambda: P(True, sampling_rate=0.1), TypeError, "num_examples must be an integer, got True"),
    (lambda: P(5), ValueError, "exactly one of expected_batch_size and sampling_rate"),
    (lambda: P(5, expected_batch_size=1, sampling_rate=0.2), ValueError, "exactly one of"),
    (lambda: P(5, expected_batch_size=6), ValueError, "expected_batch_size must be .* <= 5, got 6"),
    (lambda: P(5, expected_batch_size=0), ValueError, "expected_batch_size must be .* > 0"),
    (lambda: P(5, sampling_rate=1.5), ValueError, "sampling_rate must be .* <= 1, got 1.5"),
    (lambda: P(5, sampling_rate=math.nan), ValueError, "sampling_rate must be finite"),
    (lambda: P(5, sampling_rate="0.1"), TypeError, "sampling_rate must be a real number"),
    (lambda: P(5, sampling_rate=1e-20), ValueError, r"sampling_rate must be at least 2\*\*-53"),
    (
        lambda: P(5, sampling_rate=0.1, physical_batch_size=0),
        ValueError,
        "physical_batch_size must be at least 1, got 0",
    ),
    (lambda: P(5, sampling_rate=0.1, seed=-1), ValueError, r"seed must be in \[0, 2\*\*128\)"),
    (lambda: P(5, sampling_rate=0.1, seed=2**128), ValueError, r"seed must be in"),
    (lambda: P(5, sampling_rate=0.1, seed=1.0), TypeError, "seed must be an integer, got a float"),
    (lambda: F(5, batch_size=6), ValueError, "batch_size must be at most num_examples=5, got 6"),
    (lambda: F(5, batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    (lambda: S(5, batch_size=6), ValueError, "batch_size must be at most num_examples=5, got 6"),
    (lambda: S(5, batch_size=1.0), TypeError, "batch_size must be an integer, got 1.0"),
    (lambda: S(5, batch_size=1, seed=1).draw(-1), ValueError, "step must be at least 0, got -1"),
    (lambda: F(5, batch_size=1, seed=1).draw(0.0), TypeError, "step must be an integer, got 0.0"),
    (lambda: F(5, batch_size=1, seed=1).batches(-2), ValueError, "must be at least 0, got -2"),
    (lambda: sampling.sampler_from_dict(None), TypeError, "sampler kind must be 'fixed_size' or"),
    (lambda: sampling.sampler_from_dict({"kind": "sobol"}), ValueError, "got 'sobol'"),
    (lambda: sampling.sampler_from_dict({"kind": []}), TypeError, "sampler kind must be"),
    (lambda: sampling.sampler_from_dict({"kind": "poisson"}), ValueError, "sampler must be a map"),
    (
        lambda: sampling.sampler_from_dict(F(5, batch_size=1, seed=1).to_dict() | {"seed": None}),
        TypeError,
        "seed must be an integer, got None",
    ),
    (
        lambda: sampling.sampler_from_dict(F(5, batch_size=1, seed=1).to_dict() | {"extra": 1}),
        ValueError,
        "sampler must be a mapping with the keys .* got .*'extra'",
    ),
    (
        lambda: sampling.sampler_from_dict(P(5, sampling_rate=0.1).to_dict() | {"stream": 0}),
        ValueError,
        "stream must be 10 for PoissonSampler, got 0, which draws other batches. Finish the run",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_rule_and_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_bad_seed_is_not_printed():
    secret = 2**128 + 987654321
    with pytest.raises(ValueError, match="seed must be in") as caught:
        PoissonSampler(5, sampling_rate=0.1, seed=secret)
    assert str(secret) not in str(caught.value)


PARTED = {
    "poisson": PoissonSampler(101, expected_batch_size=30, physical_batch_size=24, seed=3),
    "fixed size": FixedSizeSampler(101, batch_size=30, physical_batch_size=24, seed=3),
    "shuffled": ShuffledSampler(101, batch_size=30, physical_batch_size=24, seed=3),
}


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", list(PARTED))
def test_a_draw_in_parts_is_the_same_draw(kind: str, parts: int) -> None:
    """The members do not change, no row of a block belongs to another part, masked ones included,
    and all parts go through the same number of physical batches."""
    sampler = PARTED[kind]
    for step in range(6):
        drawn = sampler.draw(step, parts)
        assert [batch.is_last for batch in drawn] == [False] * (len(drawn) - 1) + [True]
        members = [index for batch in drawn for index in batch.indices[batch.mask].tolist()]
        assert sorted(members) == sorted(sampler.members(step).tolist())
        for batch in drawn:
            for part, block in enumerate(batch.indices.reshape(parts, -1)):
                assert set(block.tolist()) <= set(sampler.part(part, parts))


def test_parts_are_the_data_in_order() -> None:
    sampler = PARTED["poisson"]
    for parts in (1, 2, 7, 101):
        ranges = [sampler.part(part, parts) for part in range(parts)]
        assert [index for part in ranges for index in part] == list(range(101))
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
        assert len(ranges[-1]) == max(map(len, ranges))


def test_a_part_without_members_keeps_in_step() -> None:
    """Among 200 draws there is one whose members all lie in one part, with a row for each batch."""
    sampler = FixedSizeSampler(40, batch_size=3, physical_batch_size=4, seed=0)
    assert max(len(sampler.draw(step, 4)) for step in range(200)) == 3
    for step in range(200):
        assert sum(int(batch.mask.sum()) for batch in sampler.draw(step, 4)) == 3


def test_errors_of_parts_say_what_to_do() -> None:
    sampler = PARTED["poisson"]
    with pytest.raises(ValueError, match="parts must divide physical_batch_size=24, got 5. Choose"):
        sampler.draw(0, 5)
    with pytest.raises(ValueError, match="index must be below parts, .* got index=2 and parts=2"):
        sampler.part(2, 2)
    with pytest.raises(ValueError, match="parts at most num_examples=101, got index=0 .*=102"):
        sampler.part(0, 102)
    with pytest.raises(TypeError, match="parts must be an integer, got 2.0"):
        sampler.draw(0, 2.0)  # pyright: ignore[reportArgumentType]
