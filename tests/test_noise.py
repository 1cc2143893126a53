"""Noise: its distribution, its spread over groups, its schedule, and what the ledger is told."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import jaxdp
from jaxdp.bounded import Bounded, Groups
from jaxdp.released import Released
from tests import helpers
from tests.helpers import KEY, PARAMS

ALLOCATIONS: Sequence[Any] = ("global", "per_layer", "optimal", (0.5, 2.0))

# Two groups of very different size and sensitivity; the third leaf belongs to the first group.
SIZES = ((100, 300), (50_000,), (20_000,))
GROUPS: Groups = (0, 1, 0)
SENSITIVITY = (3.0, 0.25)
SIGMA = 1.7

# Error rates of the tests of distribution below, n = 100 000 draws. Each statement raises a wrong
# alarm with probability 10⁻⁶. A deviation of 1.05σ moves the mean square by 0.1025, which is 23
# deviations of √(2/n), and the largest distance of the distribution functions by 0.012, where
# Kolmogorov–Smirnov's p-value is below 10⁻¹²: it escapes with probability below 10⁻⁶.
ALARM = 1e-6


def zero_sum(sensitivity: Any = SENSITIVITY, groups: Groups = GROUPS) -> Bounded:
    return Bounded([jnp.zeros(shape) for shape in SIZES], jnp.asarray(sensitivity), groups)


def deviations(allocation: Any) -> np.ndarray:
    """Standard deviation of each group, from the formulas of the documentation."""
    delta = np.array(SENSITIVITY)
    sizes = np.array([30_000 + 20_000, 50_000.0])
    if allocation == "global":
        return np.full(2, SIGMA * np.linalg.norm(delta))
    if allocation == "per_layer":
        return SIGMA * delta
    if allocation == "optimal":
        return SIGMA * np.sqrt(delta * np.sum(delta * np.sqrt(sizes)) / np.sqrt(sizes))
    return SIGMA * delta * np.array(allocation)


def is_standard_normal(draws: np.ndarray) -> bool:
    """Accepts N(0, 1) and nothing 5% wider or narrower; see ALARM."""
    limit = scipy.stats.norm.isf(ALARM / 2)
    count = draws.size
    mean = abs(draws.mean()) < limit / np.sqrt(count)
    variance = abs(np.mean(draws**2) - 1) < limit * np.sqrt(2 / count)
    shape = scipy.stats.kstest(draws, "norm").pvalue > ALARM
    return bool(mean and variance and shape)


def eagerly(update: Any) -> Any:
    return update


@functools.cache
def released(allocation: Any, run: Callable[..., Any]) -> Any:
    noise = jaxdp.add_noise(SIGMA, KEY, allocation)
    return run(noise.update)(zero_sum(), noise.init(zero_sum().value))


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
def test_the_noise_is_gaussian_of_the_stated_deviation(allocation: Any) -> None:
    values, _ = released(allocation, jax.jit)
    stds = deviations(allocation)
    standard = [
        np.asarray(leaf, np.float64).ravel() / stds[group]
        for leaf, group in zip(values, GROUPS, strict=True)
    ]
    draws = np.concatenate(standard)
    assert draws.size == 100_000
    assert is_standard_normal(draws)
    # Each leaf on its own: errors of two leaves could make up for each other.
    assert all(is_standard_normal(leaf) for leaf in standard)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_the_test_of_the_distribution_rejects_five_percent(factor: float) -> None:
    values, _ = released("global", eagerly)
    leaf = np.asarray(values[1], np.float64) / deviations("global")[1]
    assert is_standard_normal(leaf)
    assert not is_standard_normal(factor * leaf)
    # The two halves of the test on their own: a wrong shape of the right variance is caught, too.
    uniform = np.sqrt(12) * (scipy.stats.norm.cdf(leaf) - 0.5)
    assert not is_standard_normal(uniform)


@jax.jit
def draw(key: jax.Array) -> jax.Array:
    """Noise of four steps and three leaves, `[4, 3, 5000]`."""
    noise = jaxdp.add_noise(1.0, key)
    total = Bounded([jnp.zeros(5000)] * 3, 1.0)

    def body(state: Any, _: Any) -> tuple[Any, Any]:
        values, state = noise.update(total, state)
        return state, jnp.stack(values)

    _, values = jax.lax.scan(body, noise.init(total.value), None, length=4)
    return values


def test_the_noise_is_independent_across_leaves_and_steps() -> None:
    """No pair of the 12 draws of 5000 numbers correlates by more than 5.5/√n, which independent
    ones do with probability 66·4·10⁻⁸; equal ones have correlation 1."""
    draws = np.asarray(draw(KEY), np.float64).reshape(12, -1)
    correlations = np.corrcoef(draws)[np.triu_indices(12, 1)]
    assert np.max(np.abs(correlations)) < 5.5 / np.sqrt(draws.shape[1])
    # Nor does any number of one draw return, in another place, in another.
    assert len(np.unique(draws)) > 0.99 * draws.size


def test_the_same_key_gives_the_same_noise_and_another_key_other_noise() -> None:
    one, again, other = (np.ravel(draw(key)) for key in (KEY, jax.random.key(0), jax.random.key(1)))
    assert np.array_equal(one, again)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5.5 / np.sqrt(one.size)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
def test_jit_and_eager_draw_the_same_noise(allocation: Any) -> None:
    eager, jitted = released(allocation, eagerly), released(allocation, jax.jit)
    helpers.assert_trees_close(jitted, eager, rtol=1e-5)


def spread(
    allocation: Any, sensitivity: Sequence[float], sizes: Sequence[int], sigma: float = 1.0
) -> tuple[np.ndarray, float]:
    """Standard deviation of each group, as measured, and the multiplier that the state reports.

    The same key draws the same N(0, I): the ratio of two releases is the ratio of deviations.
    """
    total = Bounded([jnp.zeros(n) for n in sizes], jnp.asarray(sensitivity), range(len(sizes)))
    unit = Bounded(total.value, 1.0)

    def release(tx: Any, bounded: Bounded) -> Any:
        return tx.update(bounded, tx.init(bounded.value))

    values, state = release(jaxdp.add_noise(sigma, KEY, allocation), total)
    standard, _ = release(jaxdp.add_noise(1.0, KEY), unit)
    stds = [float(v[0]) / float(s[0]) for v, s in zip(values, standard, strict=True)]
    return np.array(stds), float(state.noise_multiplier)


SPREADS = st.integers(1, 4).flatmap(
    lambda k: st.tuples(
        st.lists(st.floats(1e-3, 1e3), min_size=k, max_size=k),
        st.lists(st.sampled_from([1, 2, 7, 50]), min_size=k, max_size=k),
        st.lists(st.floats(0.1, 10), min_size=k, max_size=k),
    )
)


@hypothesis.settings(max_examples=8)
@hypothesis.given(case=SPREADS)
def test_the_reported_multiplier_is_that_of_the_noise_drawn(case: Any) -> None:
    """σ_eff = (Σ (Δ_k/s_k)²)^(−1/2), from the deviations that were measured."""
    sensitivity, sizes, coefficients = case
    for allocation in ("global", "per_layer", "optimal", coefficients):
        stds, reported = spread(allocation, sensitivity, sizes, sigma=1.3)
        effective = np.sum((np.array(sensitivity) / stds) ** 2) ** -0.5
        np.testing.assert_allclose(reported, effective, rtol=1e-4)


@hypothesis.settings(max_examples=8)
@hypothesis.given(case=SPREADS, seed=st.integers(0, 2**31))
def test_the_optimal_allocation_has_the_least_power_at_its_privacy(case: Any, seed: int) -> None:
    sensitivity, sizes, _ = case
    delta, entries = np.array(sensitivity), np.array(sizes)
    optimal, reported = spread("optimal", sensitivity, sizes)
    everywhere, same = spread("global", sensitivity, sizes)
    np.testing.assert_allclose(reported, same, rtol=1e-6)
    power = np.sum(entries * optimal**2)
    assert power <= np.sum(entries * everywhere**2) * (1 + 1e-4)
    # Any other spread of the same privacy, near or far, has at least this power.
    rng = np.random.default_rng(seed)
    for size in (0.01, 0.3, 3.0):
        other = optimal * np.exp(size * rng.normal(size=len(optimal)))
        other *= np.sqrt(np.sum((delta / other) ** 2) / np.sum((delta / optimal) ** 2))
        assert power <= np.sum(entries * other**2) * (1 + 1e-4)


def test_one_group_gets_the_same_noise_from_every_named_allocation() -> None:
    for allocation in ("global", "per_layer", "optimal"):
        stds, reported = spread(allocation, [2.5], [7], sigma=1.2)
        np.testing.assert_allclose([stds[0], reported], [3.0, 1.2], rtol=1e-5)


def test_the_sum_is_released_under_the_noise() -> None:
    rows = helpers.small_grads(4)
    clip = jaxdp.clip_flat(1.0)
    total, _ = clip.update(rows, clip.init(PARAMS))
    noise = jaxdp.add_noise(0.0, KEY)
    exact, _ = noise.update(total, noise.init(PARAMS), PARAMS)
    helpers.assert_trees_equal(exact, total.value)
    noise = jaxdp.add_noise(1.0, KEY)
    noised, _ = noise.update(total, noise.init(PARAMS), PARAMS)
    empty = Bounded(jax.tree.map(jnp.zeros_like, PARAMS), 1.0)
    nothing, _ = noise.update(empty, noise.init(PARAMS))
    helpers.assert_trees_close(noised, jax.tree.map(jnp.add, total.value, nothing))


def test_leaves_without_a_group_get_zeros_and_no_noise() -> None:
    params = {"frozen": jnp.ones(3), "count": jnp.arange(4), "moving": jnp.ones(3)}
    grads = jaxdp.per_sample_grads(
        helpers.tree_loss, trainable={"frozen": False, "count": True, "moving": True}
    )(params, jnp.ones(2))
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(5.0, KEY))
    for given in (params, None):
        updates, _ = tx.update(grads, tx.init(params), given)
        assert updates["frozen"].tolist() == [0.0] * 3
        assert updates["count"].tolist() == [0] * 4
        assert updates["count"].dtype == params["count"].dtype
        assert np.all(np.asarray(updates["moving"]) != 0)


def test_without_sensitivity_there_is_no_noise() -> None:
    for allocation in ("global", "per_layer", "optimal"):
        noise = jaxdp.add_noise(1.0, KEY, allocation)
        total = Bounded([jnp.ones(3), jnp.ones(2)], jnp.zeros(2), (0, 1))
        values, _ = noise.update(total, noise.init(total.value))
        assert [leaf.tolist() for leaf in values] == [[1.0] * 3, [1.0] * 2]


def test_a_group_without_sensitivity_is_released_as_it_is() -> None:
    noise = jaxdp.add_noise(1.0, KEY, "optimal")
    total = Bounded([jnp.ones(3), jnp.ones(2)], jnp.array([0.0, 1.0]), (0, 1))
    values, _ = noise.update(total, noise.init(total.value))
    assert values[0].tolist() == [1.0] * 3
    assert np.all(np.isfinite(values[1])) and np.all(np.asarray(values[1]) != 1.0)


def test_the_noise_is_drawn_in_float32_and_cast_to_the_dtype_of_the_parameters() -> None:
    params = jnp.zeros(64, jnp.bfloat16)
    noise = jaxdp.add_noise(1.0, KEY)
    total = Bounded(jnp.zeros(64, jnp.float32), 1.0)
    cast, _ = noise.update(total, noise.init(params), params)
    plain, _ = noise.update(total, noise.init(params))
    assert plain.dtype == jnp.float32
    assert cast.dtype == jnp.bfloat16
    assert np.array_equal(cast, plain.astype(jnp.bfloat16))


# Schedules, and what the ledger is told.


def test_noise_clip_and_ledger_read_the_same_step() -> None:
    """The noise of step t has the deviation σ(t)·C(t), and the state says σ(t)."""
    clip = jaxdp.clip_flat(lambda step: 1.0 + jnp.float32(step))
    noise = jaxdp.add_noise(lambda step: 2.0 / (1.0 + jnp.float32(step)) ** 2.0, KEY)
    unit = jaxdp.add_noise(1.0, KEY)
    tx = optax.chain(clip, jaxdp.accumulate(noise))
    rows = jax.tree.map(jnp.zeros_like, helpers.small_grads(2))
    empty = Bounded(jax.tree.map(jnp.zeros_like, PARAMS), 1.0)
    update, state, unit_state = jax.jit(tx.update), tx.init(PARAMS), unit.init(PARAMS)
    assert np.isnan(jaxdp.executed_noise_multipliers(state)[0])
    for step in range(3):
        # An earlier physical batch of the same logical step moves neither.
        _, state = update(rows, state, PARAMS, is_last=False)
        values, state = update(rows, state, PARAMS, is_last=True)
        standard, unit_state = unit.update(empty, unit_state)
        sigma, threshold = 2.0 / (1 + step) ** 2, 1.0 + step
        expected = jax.tree.map(lambda z, scale=sigma * threshold: scale * z, standard)
        helpers.assert_trees_close(values, expected, rtol=1e-5)
        (executed,) = jaxdp.executed_noise_multipliers(state)
        np.testing.assert_allclose(executed, sigma, rtol=1e-6)


def test_the_reported_multiplier_does_not_wobble_from_step_to_step() -> None:
    """A threshold that adapts changes Δ at every step; σ_eff must stay the very same number, else
    each step would be a mechanism of its own to account."""
    for allocation in ("global", "per_layer", "optimal", (1.0, 2.0, 0.3)):
        tx = optax.chain(
            helpers.adaptive(1.0, per_layer=True, count_noise_multiplier=3.0),
            jaxdp.add_noise(1.1, KEY, allocation),
        )
        state, seen = tx.init(PARAMS), set()
        for seed in range(3):
            _, state = tx.update(helpers.small_grads(3, seed), state, PARAMS)
            seen.add(tuple(float(s) for s in jaxdp.executed_noise_multipliers(state)))
        assert len(seen) == 1


def noise_of(updates: Any, allocation: Any = "global") -> Any:
    noise = jaxdp.add_noise(1.0, KEY, allocation)
    return noise.update(updates, noise.init(PARAMS), PARAMS)


MISUSES: Mapping[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "arrays": (
        lambda: noise_of(PARAMS),
        TypeError,
        "must get a jaxdp.Bounded, .* got arrays. Put a clip",
    ),
    "per-sample arrays": (
        lambda: noise_of(helpers.small_grads(2)),
        TypeError,
        "got arrays. Put a clip",
    ),
    "handle": (
        lambda: noise_of(
            jaxdp.per_sample_grads(helpers.small_loss)(PARAMS, helpers.small_batch(2))
        ),
        TypeError,
        "got PerSampleGrads. Put a clip",
    ),
    "noise after noise": (
        lambda: optax.chain(jaxdp.add_noise(1.0, KEY), jaxdp.add_noise(1.0, KEY)).update(
            Bounded(PARAMS, 1.0), (jaxdp.add_noise(1.0, KEY).init(PARAMS),) * 2, PARAMS
        ),
        TypeError,
        "got arrays",
    ),
    "unknown allocation": (
        lambda: jaxdp.add_noise(1.0, KEY, "best"),
        ValueError,
        r"allocation must be one of .*, got 'best'",
    ),
    "too few coefficients": (
        lambda: noise_of(Bounded([jnp.ones(1)] * 2, jnp.ones(2), (0, 1)), (1.0,)),
        ValueError,
        "one coefficient for each of the 2 groups of the clip, got 1",
    ),
    "coefficient of zero": (
        lambda: jaxdp.add_noise(1.0, KEY, (1.0, 0.0)),
        ValueError,
        r"allocation\[1\] must be finite, > 0, got 0.0",
    ),
    "negative": (
        lambda: jaxdp.add_noise(-1.0, KEY),
        ValueError,
        "noise_multiplier must be finite, >= 0, got -1.0",
    ),
    "nan": (lambda: jaxdp.add_noise(float("nan"), KEY), ValueError, "must be finite"),
    "infinite": (lambda: jaxdp.add_noise(float("inf"), KEY), ValueError, "must be finite"),
    "not one number": (
        lambda: jaxdp.add_noise(jnp.ones(2), KEY),
        TypeError,
        r"noise_multiplier must be a real number, got Array.*or a schedule",
    ),
}


@pytest.mark.parametrize("misuse", list(MISUSES))
def test_misuse_is_told_with_name_rule_and_value(misuse: str) -> None:
    action, error, message = MISUSES[misuse]
    with pytest.raises(error, match=message):
        action()


# Deviations that neither vanish nor overflow.

WIDE = 4096


@functools.cache
def releases(allocation: Any, sigma: Any, dtype: Any = jnp.float32) -> Any:
    """`(Δ [2], factor) -> (release [2, WIDE], σ_eff)` of zeros that a sample can move by Δ."""
    noise = jaxdp.add_noise(sigma, KEY, allocation)

    @jax.jit
    def release(sensitivity: jax.Array, factor: jax.Array) -> Any:
        total = Bounded([jnp.zeros(WIDE, dtype)] * 2, sensitivity, (0, 1)) * factor
        values, state = noise.update(total, noise.init(total.value))
        return jnp.stack(values), state.noise_multiplier

    return release


SMALL_AND_LARGE = (1e-30, 1e-25, 1.2e-19, 1e-19, 1e-12, 1e12, 1e19, 3e19, 1e30, 1e37)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
@pytest.mark.parametrize("size", SMALL_AND_LARGE)
def test_the_deviation_is_as_stated_at_any_size_of_the_sensitivity(
    allocation: Any, size: float
) -> None:
    """Squares of the sensitivity would vanish below 1e-19, and the noise with them. n = 4096
    numbers have a deviation within 8% of the true one, except with probability 5·10⁻¹³."""
    released, _ = releases(allocation, SIGMA)(size * jnp.array([1.0, 0.25]), jnp.float32(1))
    unit, _ = releases(allocation, SIGMA)(jnp.array([1.0, 0.25]), jnp.float32(1))
    np.testing.assert_allclose(np.std(np.float64(released) / size, 1), np.std(unit, 1), rtol=1e-5)
    expected = {
        "global": np.full(2, np.sqrt(1 + 1 / 16)),
        "per_layer": np.array([1, 0.25]),
        "optimal": np.sqrt(np.array([1, 0.25]) * 1.25),
        (0.5, 2.0): np.array([0.5, 0.5]),
    }
    np.testing.assert_allclose(np.std(unit, 1), SIGMA * expected[allocation], rtol=0.08)


@pytest.mark.parametrize("allocation", ["global", "optimal"])
def test_one_sensitivity_may_be_far_from_another(allocation: str) -> None:
    released, _ = releases(allocation, SIGMA)(jnp.array([1e20, 1e-20]), jnp.float32(1))
    assert np.all(np.isfinite(released)) and np.all(np.asarray(released) != 0)


@pytest.mark.parametrize("factor", [1e-25, -1e-25, 1e-15, 1e25, 7.0])
def test_scaling_scales_the_noise(factor: float) -> None:
    """Of the same draw: `Bounded * 1e-25` released the sum itself."""
    sensitivity = jnp.array([1.0, 0.5])
    for allocation in ALLOCATIONS:
        scaled, _ = releases(allocation, SIGMA)(sensitivity, jnp.float32(factor))
        plain, _ = releases(allocation, SIGMA)(sensitivity, jnp.float32(1))
        np.testing.assert_allclose(scaled, abs(factor) * plain, rtol=1e-5)


# What a sample can move without the noise that is stated: Δ, and the factor of a scaling.
UNPROTECTED: Mapping[str, tuple[Sequence[float], float]] = {
    "subnormal": ([1e-40, 1e-40], 1.0),
    "almost subnormal": ([1e-33, 1e-33], 1.0),
    "subnormal beside another": ([1e-40, 1e-38], 1.0),
    "infinite": ([np.inf, 1.0], 1.0),
    "NaN": ([1.0, np.nan], 1.0),
    "overflows": ([3.3e38, 3.3e38], 1.0),
    "overflows by the factor": ([1e30, 1e30], 1e30),
    "vanishes by the factor": ([1e-25, 1e-25], 1e-25),
    "vanishes by the least factor": ([1.0, 1.0], 1e-45),
}


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
@pytest.mark.parametrize("case", list(UNPROTECTED))
def test_without_the_stated_noise_the_release_is_nan(allocation: Any, case: str) -> None:
    sensitivity, factor = UNPROTECTED[case]
    released, _ = releases(allocation, SIGMA)(jnp.array(sensitivity), jnp.float32(factor))
    unprotected = np.full(2, True)
    if case in ("infinite", "NaN") and allocation not in ("global", "optimal"):
        unprotected = ~np.isfinite(sensitivity)  # the other group has its own deviation
    if case == "overflows" and allocation == (0.5, 2.0):
        unprotected = np.array([False, True])  # half of it is a number still
    assert np.all(np.isnan(np.asarray(released)[unprotected]))


@pytest.mark.parametrize("sigma", [-1.0, np.nan, np.inf, 1e-40, 1e-33])
def test_a_schedule_that_leaves_its_range_gives_nan(sigma: float) -> None:
    for allocation in ALLOCATIONS:
        schedule = functools.partial(constantly, sigma)
        released, executed = releases(allocation, schedule)(jnp.ones(2), jnp.float32(1))
        assert np.all(np.isnan(released))
        assert not (np.isfinite(executed) and executed > 1e-30)


def constantly(value: float, step: jax.Array) -> jax.Array:
    return jnp.float32(value)


def test_a_schedule_that_comes_to_zero_releases_the_sum_there_and_says_so() -> None:
    tx = jaxdp.add_noise(lambda step: jnp.maximum(1.0 - 0.5 * jnp.float32(step), 0.0), KEY)
    state, seen = tx.init(PARAMS), []
    for _ in range(4):
        values, state = tx.update(Bounded(PARAMS, 1.0), state)
        same = jax.tree.map(lambda got, raw: bool(jnp.all(got == raw)), values, PARAMS)
        seen.append((float(state.noise_multiplier), all(jax.tree.leaves(same))))
    assert seen == [(1.0, False), (0.5, False), (0.0, True), (0.0, True)]
    epsilon = jaxdp.Ledger().charge(0.0, jaxdp.PoissonSampler(9, sampling_rate=0.5).scheme)
    assert epsilon.epsilon(1e-5) == np.inf


@pytest.mark.parametrize("allocation", ["global", "per_layer", "optimal", (1.0, 2.0, 3.0)], ids=str)
def test_without_noise_the_sum_itself_is_released_whatever_the_threshold(allocation: Any) -> None:
    """Thresholds up to the largest of float32: clipping that is turned off."""
    rows = helpers.small_grads(4)
    for threshold in (1.0, 1e30, 3e38, float(np.finfo(np.float32).max)):
        clip = jaxdp.clip_per_layer(threshold)
        total, _ = clip.update(rows, clip.init(PARAMS))
        noise = jaxdp.add_noise(0.0, KEY, allocation)
        exact, state = noise.update(total, noise.init(PARAMS), PARAMS)
        helpers.assert_trees_equal(exact, total.value)
        assert float(state.noise_multiplier) == 0
    plain = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), rows)
    helpers.assert_trees_close(exact, plain, rtol=1e-5)


def test_groups_without_entries_and_scalars() -> None:
    value = [jnp.zeros((0, 3)), jnp.zeros(()), jnp.zeros(5)]
    for allocation in ("global", "per_layer", "optimal", (1.0, 1.0, 1.0)):
        noise = jaxdp.add_noise(1.0, KEY, allocation)
        released, state = noise.update(Bounded(value, jnp.ones(3), (0, 1, 2)), noise.init(value))
        assert [leaf.shape for leaf in released] == [(0, 3), (), (5,)]
        assert all(bool(jnp.all(jnp.isfinite(leaf) & (leaf != 0))) for leaf in released)
        assert np.isfinite(state.noise_multiplier)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_noised_in_single(dtype: Any) -> None:
    """Deviations that float16 cannot hold are no reason to give up: it is cast after the noise."""
    released, _ = releases("global", SIGMA, dtype)(jnp.array([1e-12, 1e-12]), jnp.float32(1))
    assert released.dtype == jnp.float32
    assert np.std(np.asarray(released)) == pytest.approx(SIGMA * np.sqrt(2) * 1e-12, rel=0.08)


def test_double_precision_has_the_range_of_each_leaf() -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        value = [jnp.zeros(WIDE, jnp.float64), jnp.zeros(WIDE, jnp.float32)]
        noise = jaxdp.add_noise(1.0, KEY)
        total = Bounded(value, jnp.asarray(1e-60, jnp.float64), (0, 0))
        (double, single), _ = noise.update(total, noise.init(value))
        assert double.dtype == jnp.float64
        assert np.std(np.asarray(double)) == pytest.approx(1e-60, rel=0.08)
        assert np.all(np.isnan(single))


def test_noise_of_23_bits_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest noise of a step, from the smallest words: 5.42 is where the old one ended."""

    def bits(key: Any, shape: Any, dtype: Any, **_: Any) -> jax.Array:
        return jnp.zeros(shape, dtype)

    monkeypatch.setattr(jax.random, "bits", bits)
    noise = jaxdp.add_noise(1.0, KEY)
    released, _ = noise.update(Bounded(jnp.zeros(2), 1.0), noise.init(jnp.zeros(2)))
    assert float(jnp.max(released)) > 9.4


# Members of a `vmap`.

STACK = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 3 * leaf]), PARAMS)
KEYS = jax.random.split(jax.random.key(1), 3)


def chain_of(key: jax.Array, kind: str) -> Any:
    if kind == "noise":
        return optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, key))
    clip = helpers.adaptive(1.0, key=key, count_noise_multiplier=1.0, learning_rate=1.0)
    if kind == "accumulated":
        return optax.chain(clip, jaxdp.accumulate(optax.chain(jaxdp.add_noise(1.0, key))))
    return clip


def update_of(kind: str, key: jax.Array = KEY) -> Any:
    def update(rows: Any, state: Any, params: Any) -> Any:
        tx = optax.with_extra_args_support(chain_of(key, kind))
        return tx.update(rows, state, params, is_last=True)

    return update


ROWS = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 3 * leaf]), helpers.small_grads(4))
KINDS = ("noise", "adaptive", "accumulated")
OWN_KEY = r"every member of a vmap must have a noise key of its own.*split\(key, members\)"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("between", ["nothing", "jit", "scan"])
def test_members_of_a_vmap_with_one_key_are_refused(kind: str, between: str) -> None:
    """Their noise would be the same: the difference of two releases has none."""

    def through(function: Any) -> Any:
        if between == "scan":
            return lambda *args: jax.lax.scan(lambda _, __: (None, function(*args)), None, None, 1)
        return jax.jit(function) if between == "jit" else function

    with pytest.raises(ValueError, match=OWN_KEY):
        jax.vmap(through(chain_of(KEY, kind).init))(STACK)
    state = chain_of(KEY, kind).init(PARAMS)
    with pytest.raises(ValueError, match=OWN_KEY):
        jax.vmap(through(update_of(kind)), (0, None, None))(ROWS, state, PARAMS)
    with pytest.raises(ValueError, match=OWN_KEY):
        jax.jit(jax.vmap(through(update_of(kind)), (0, None, 0)))(ROWS, state, STACK)


def test_a_sweep_over_the_noise_multiplier_or_the_threshold_is_one_too() -> None:
    """Two multiples of one draw give the sum away."""

    def release(sigma: jax.Array, threshold: jax.Array) -> Any:
        tx = optax.chain(jaxdp.clip_flat(threshold), jaxdp.add_noise(sigma, KEY))
        return tx.update(helpers.small_grads(4), tx.init(PARAMS), PARAMS)[0]

    swept = jnp.array([1.0, 2.0])
    for axes in ((0, None), (None, 0)):
        with pytest.raises(ValueError, match=OWN_KEY):
            jax.vmap(release, axes)(*(swept if axis == 0 else swept[0] for axis in axes))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("kind", KINDS)
def test_members_with_keys_of_their_own_draw_what_each_draws_alone(kind: str, impl: str) -> None:
    """JAX draws for all members of a vmap at once by "rbg", from the key of the first."""
    keys = jax.random.split(jax.random.key(1, impl=impl), 3)
    states = jax.vmap(lambda key, params: chain_of(key, kind).init(params))(keys, STACK)
    together, after = jax.jit(jax.vmap(update_of(kind)))(ROWS, states, STACK)

    def of(member: int, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[member], tree)

    for member in range(3):
        rows, params = of(member, (ROWS, STACK))
        alone = update_of(kind)(rows, chain_of(keys[member], kind).init(params), params)
        helpers.assert_trees_close(of(member, (together, after)), alone, rtol=1e-5)
    draws = jaxdp.noise_draws(after)
    assert len(set(draws)) == len(draws) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_one_state_are_poisoned_and_their_draws_refused(kind: str) -> None:
    """Which keys a stack holds is known when it runs, not when it is traced."""
    one = chain_of(KEY, kind).init(PARAMS)
    other = chain_of(jax.random.key(5), kind).init(PARAMS)
    copies = jax.tree.map(lambda a, b: jnp.stack([a, b, a]), one, other)
    with pytest.raises(ValueError, match="every noised release must have a key of its own"):
        jaxdp.noise_draws(copies)
    updates, states = jax.jit(jax.vmap(update_of(kind)))(ROWS, copies, STACK)
    released = states.thresholds if kind == "adaptive" else updates["head"]
    wrong = np.asarray(jnp.isnan(released)).reshape(3, -1)
    assert wrong.all(axis=1).tolist() == [True, False, True]
    assert wrong.any(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_one_state_are_poisoned_whatever_their_steps(kind: str) -> None:
    """What one draws now another draws later, or has drawn."""
    one = chain_of(KEY, kind).init(PARAMS)
    counts = jnp.array([0, 0, 2], jnp.int32)

    def at_steps(node: Any) -> Any:
        if isinstance(node, Released):
            keys = jnp.stack([node.key, jax.random.key(5), node.key])
            return replace(node, step=counts, key=keys, noise_multiplier=jnp.zeros(3))
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), node)

    copies = jax.tree.map(at_steps, one, is_leaf=lambda node: isinstance(node, Released))
    updates, states = jax.jit(jax.vmap(update_of(kind)))(ROWS, copies, STACK)
    released = states.thresholds if kind == "adaptive" else updates["head"]
    assert jnp.isnan(released).reshape(3, -1).all(axis=1).tolist() == [True, False, True]


def test_a_vmap_around_a_vmap_is_seen_too() -> None:
    """Keys are mapped by the inner one, what is released by the outer one."""

    def member(key: jax.Array, total: jax.Array) -> Any:
        tx = jaxdp.add_noise(1.0, key)
        return tx.update(Bounded(total, 1.0), tx.init(jnp.zeros(2)))[0]

    with pytest.raises(ValueError, match=OWN_KEY):
        jax.vmap(lambda total: jax.vmap(member, (0, None))(KEYS, total))(jnp.ones((4, 2)))
    both = jax.vmap(jax.vmap(member, (0, None)))(jnp.stack([KEYS, KEYS]), jnp.ones((2, 2)))
    assert np.all(np.isnan(both))
    # One key in another row and another column.
    crossed = jnp.stack([KEYS[:2], KEYS[1:]])
    released = jax.jit(jax.vmap(jax.vmap(member)))(crossed, jnp.ones((2, 2, 2)))
    assert jnp.isnan(released).all(axis=2).tolist() == [[False, True], [True, False]]
