"""Normal and Laplace draws: the map from words against exact arithmetic, and the law with tails."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdp.distributions import box_muller, exponential, laplace, normal
from tests.helpers import KEY

# Words at which something begins or ends: quadrants, signs, halves, the last bit.
EDGES = np.array(
    [0, 1, 2, 3, 2**29 - 1, 2**29, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1, 2**31]
    + [2**31 + 2**29, 3 * 2**30 - 1, 2**32 - 2**29, 2**32 - 2, 2**32 - 1],
    np.uint32,
)


@functools.cache
def words() -> np.ndarray:
    """`[4, n]`: all pairs of edges for U, each beside random others; and random words with any
    number of leading zeros."""
    rng = np.random.default_rng(0)
    count = 500
    near = rng.integers(0, 2**32, (4, count), dtype=np.uint32)
    near[:2] >>= rng.integers(0, 32, (2, count)).astype(np.uint32)
    near[0, ::5] = 0
    pairs = np.array(np.meshgrid(EDGES, EDGES)).reshape(2, -1).astype(np.uint32)
    angles = rng.choice(EDGES, (2, pairs.shape[1]))
    return np.concatenate([np.concatenate([pairs, angles]), near], axis=1)


def exact_pair(high: int, low: int, angle: int, fine: int | None) -> tuple[Any, Any]:
    """The definition, in forty digits."""
    with mpmath.workdps(40):
        r = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf((high << 32) + low | 1) / 2**64))
        point = (angle & 2**30 - 1) - (2**30 if angle & 2**29 else 0)
        within = mpmath.mpf("0.5") if fine is None else (fine + mpmath.mpf("0.5")) / 2**32
        theta = (point + within) * mpmath.pi / 2**31 + (angle >> 30) * mpmath.pi / 2
        return r * mpmath.cos(theta), r * mpmath.sin(theta)


@pytest.mark.optimized
@pytest.mark.parametrize("bits", [32, 64])
def test_every_pair_is_that_of_exact_arithmetic_to_the_error_of_the_lemma(bits: int) -> None:
    """15 roundings, relative, at every word: no value is cut off, flushed or repeated."""
    given = words() if bits == 64 else words()[:3]
    with jax.enable_x64(True):
        pairs = jax.jit(box_muller)(*map(jnp.asarray, given))
    assert {pair.dtype for pair in pairs} == {np.dtype(f"float{bits}")}
    rounding = 2.0**-24 if bits == 32 else 2.0**-53
    for index, row in enumerate(given.T.tolist()):
        for got, expected in zip(pairs, exact_pair(*row, *[None] * (bits == 32)), strict=True):
            assert abs(mpmath.mpf(float(got[index])) - expected) <= 15 * rounding * abs(expected)


def test_the_largest_and_the_smallest_numbers() -> None:
    def pair(*given: int) -> list[float]:
        return [float(x) for x in box_muller(*(jnp.uint32(word) for word in given))]

    largest = math.sqrt(128 * math.log(2))
    quadrants = [pair(0, 0, quadrant << 30) for quadrant in range(4)]
    assert [max(pair, key=abs) for pair in quadrants] == pytest.approx(
        [largest, largest, -largest, -largest], rel=1e-6
    )
    smallest = pair(2**32 - 1, 2**32 - 1, 0)
    assert smallest == pytest.approx([2.0**-31.5, 2.0**-31.5 * math.pi / 2**32], rel=1e-6)


def test_the_law_is_symmetric() -> None:
    """A quadrant further on is (x, y) → (-y, x), exactly."""
    high, low, angle = (jnp.asarray(word) for word in words()[:3])
    x, y = box_muller(high, low, angle)
    further_x, further_y = box_muller(high, low, angle + (1 << 30))
    np.testing.assert_array_equal([further_x, further_y], [-y, x])


def given_words(monkeypatch: pytest.MonkeyPatch, words: list[int]) -> None:
    """The generator gives these words to every number."""

    def bits(key: Any, shape: Any, dtype: Any, **_: Any) -> jax.Array:
        column = jnp.array(words[: shape[0]], jnp.uint32)
        return jnp.broadcast_to(column.reshape(-1, *[1] * (len(shape) - 1)), shape)

    monkeypatch.setattr(jax.random, "bits", bits)


def test_noise_does_not_end_where_that_of_23_bits_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """`jax.random.normal` in float32 lies between -5.42 and 5.2201 for every key."""
    given_words(monkeypatch, [0, 2**31, 0])
    assert float(normal(KEY, (2,))[0]) == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
    given_words(monkeypatch, [2**12, 0, 2 << 30])
    assert float(normal(KEY, (2,))[0]) == pytest.approx(-math.sqrt(40 * math.log(2)), rel=1e-6)


def test_laplace_noise_does_not_end_where_that_of_23_bits_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`jax.random.laplace` in float32 ends at 16.6."""
    for given, expected in (
        ([2**31, 0, 2**31], math.log(2)),
        ([1, 0, 2**32 - 1], 32 * math.log(2)),
        ([0, 2**30, 0], -34 * math.log(2)),
        ([0, 0, 2**31], 64 * math.log(2)),
    ):
        given_words(monkeypatch, given)
        assert float(laplace(KEY, (1,))[0]) == pytest.approx(expected, rel=1e-6)


def test_exponentials_are_those_of_exact_arithmetic() -> None:
    high, low = (jnp.asarray(word) for word in words()[:2])
    for index, got in enumerate(exponential(high, low)):
        with mpmath.workdps(40):
            u = mpmath.mpf((int(high[index]) << 32) + int(low[index]) | 1) / 2**64
            assert abs(mpmath.mpf(float(got)) / -mpmath.log(u) - 1) <= 11 * 2.0**-24


# The law. Each statement raises a wrong alarm with probability 10⁻⁶: the number of draws beyond an
# edge is binomial, and there are eleven edges on each side.
BEYOND = np.array([0.01, 0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.25, 5.6])
EDGES_OF_LAW = np.concatenate([BEYOND, -BEYOND])
ALARM = 1e-6
CHUNK = 2**22

Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def alarms(draw: Draw, chunks: int, scales: Sequence[float]) -> list[list[float]]:
    """For each scale the edges beyond which there are not as many of the draws, times the scale, as
    of a normal."""
    drawn = jax.jit(lambda index: draw(jax.random.fold_in(KEY, index), (CHUNK,)))
    found = np.zeros((len(scales), EDGES_OF_LAW.size), np.int64)
    for index in range(chunks):
        ordered = np.sort(np.asarray(drawn(index)))
        for row, scale in zip(found, scales, strict=True):
            below = np.searchsorted(ordered, np.float32(EDGES_OF_LAW / scale))
            row += np.where(EDGES_OF_LAW > 0, CHUNK - below, below)
    chance = scipy.stats.norm.sf(np.abs(EDGES_OF_LAW))
    law = scipy.stats.binom(chunks * CHUNK, chance)
    wrong = 2 * np.minimum(law.cdf(found), law.sf(found - 1)) < ALARM / EDGES_OF_LAW.size
    return [EDGES_OF_LAW[row].tolist() for row in wrong]


@pytest.mark.optimized
def test_a_sample_has_the_law_and_one_per_cent_more_or_less_has_not() -> None:
    """Of 2²² draws; 1% moves the number beyond 1.5 by 15 deviations."""
    right, narrow, wide = alarms(normal, 1, [1.0, 0.99, 1.01])
    assert right == [] and narrow and wide


@pytest.mark.slow
@pytest.mark.optimized
def test_the_law_of_a_billion_draws_has_its_tails() -> None:
    """2³⁰ draws. Beyond 5.25 are 82 of them on each side, give or take 9, and beyond 5.6 twelve.
    `jax.random.normal` has none above, of which the chance is e⁻⁸²; 1.001 deviations move the
    number beyond 1.5 by 25 deviations: the wrong ones are rejected with probability 1 - 10⁻⁶."""
    chunks = 2**30 // CHUNK
    right, narrow, wide = alarms(normal, chunks, [1.0, 1 / 1.001, 1.001])
    assert right == [] and narrow and wide
    (old,) = alarms(jax.random.normal, chunks, [1.0])
    assert 5.25 in old


@pytest.mark.optimized
def test_the_two_numbers_of_a_pair_are_independent() -> None:
    """Of 2²² pairs, products of x and y, of their squares and of their signs correlate by less than
    5.5/√n, except with probability 2·10⁻⁷; and both beyond 2 are as many as chance has it."""
    count = 2**22
    x, y = np.asarray(jax.jit(lambda key: normal(key, (count, 2)))(KEY), np.float64).T
    for of in (np.positive, np.square, np.sign, np.abs):
        assert abs(np.corrcoef(of(x), of(y))[0, 1]) < 5.5 / math.sqrt(count)
    both = int(np.sum((np.abs(x) > 2) & (np.abs(y) > 2)))
    chance = float(2 * scipy.stats.norm.sf(2)) ** 2
    assert scipy.stats.binomtest(both, count, chance).pvalue > ALARM


@pytest.mark.optimized
@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "float64", "untyped"])
def test_every_kind_of_key_and_precision_has_the_law(kind: str) -> None:
    """Kolmogorov and Smirnov on 2¹⁸ draws: accepts with probability 1 - 10⁻⁶, rejects 5%."""
    with jax.enable_x64(kind == "float64"):
        key = jax.random.PRNGKey(3) if kind == "untyped" else jax.random.key(
            3, impl="rbg" if kind == "rbg" else "threefry2x32"
        )
        dtype = jnp.float64 if kind == "float64" else jnp.float32
        draws = np.asarray(jax.jit(lambda key: normal(key, (2**9, 2**9), dtype))(key)).ravel()
    assert draws.dtype == dtype
    assert scipy.stats.kstest(draws, "norm").pvalue > ALARM
    assert scipy.stats.kstest(1.05 * draws, "norm").pvalue < ALARM
    # Double precision has more than the digits of single.
    if kind == "float64":
        assert np.mean(draws.astype(np.float32) == draws) < 1e-3


@pytest.mark.parametrize(
    "shape", [(), (1,), (3,), (2, 0), (0,), (5, 7), (4, 6), (3, 1), (1, 1, 8), (7, 2, 3)], ids=str
)
def test_every_shape_is_filled_with_numbers_of_its_own(shape: tuple[int, ...]) -> None:
    draws = np.asarray(normal(KEY, shape))
    assert draws.shape == shape
    # x and y of a pair differ in size, too.
    assert len(np.unique(np.abs(draws))) == draws.size


@functools.cache
def laid_out(shape: tuple[int, ...], spec: Any) -> jax.Array:
    if spec is None:
        return jax.jit(lambda: normal(KEY, shape))()
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        draws = jax.jit(lambda: normal(KEY, shape, jnp.float32, sharding))()
    assert draws.sharding.is_equivalent_to(sharding, len(shape))
    return draws


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 6), P("a", None)),
        ((8, 6), P("a", "b")),
        ((8, 6), P(None, "b")),
        ((4, 6), P("a", "b")),  # three pairs do not divide among two devices
        ((16, 2), P(("a", "b"))),
        ((12, 7), P("a")),
        ((8, 5), P(("b", "a"))),
        ((8,), P("a")),
        ((512, 256), P("a", "b")),  # drawn word by word
    ],
    ids=str,
)
def test_the_numbers_are_the_same_on_every_layout(shape: tuple[int, ...], spec: Any) -> None:
    np.testing.assert_allclose(laid_out(shape, spec), laid_out(shape, None), rtol=1e-6)


def test_another_precision_is_refused_with_what_to_do() -> None:
    for dtype in (jnp.float16, jnp.bfloat16, jnp.int32):
        with pytest.raises(TypeError, match="must be float32 or float64, got .* Draw in float32"):
            normal(KEY, (2,), dtype)


@pytest.mark.optimized
def test_the_laplace_law_far_out() -> None:
    """Each of these fails by chance with probability 10⁻⁴ or less; 1% is rejected."""
    draws = np.asarray(jax.jit(lambda: laplace(KEY, (2_000_000,)))(), np.float64)
    assert scipy.stats.kstest(draws, scipy.stats.laplace.cdf).pvalue > 1e-4
    assert scipy.stats.kstest(1.01 * draws, scipy.stats.laplace.cdf).pvalue < 1e-4
    beyond = int(np.sum(np.abs(draws) > 10))
    assert scipy.stats.binomtest(beyond, draws.size, math.exp(-10)).pvalue > 1e-4
