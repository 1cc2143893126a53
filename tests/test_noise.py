"""Noise: its distribution, its spread over groups, its schedule, and what the ledger is told."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false

import functools
from collections.abc import Callable, Mapping, Sequence
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


CHAINS: Mapping[str, tuple[Callable[[Any], Any], list[float]]] = {
    "chain": (lambda n: optax.chain(jaxdp.clip_flat(1.0), n, optax.sgd(0.1)), [1.5]),
    "adaptive": (
        lambda n: optax.chain(helpers.adaptive(1.0, count_noise_multiplier=4.0), n), [4.0, 1.5]
    ),
    "accumulate": (
        lambda n: optax.chain(
            jaxdp.clip_flat(1.0), jaxdp.accumulate(optax.chain(n, optax.sgd(0.1, momentum=0.9)))
        ),
        [1.5],
    ),
    "nothing": (lambda n: jaxdp.clip_flat(1.0), []),
}


@pytest.mark.parametrize("name", list(CHAINS))
def test_the_executed_noise_multipliers_are_found_wherever_they_lie(name: str) -> None:
    chain, expected = CHAINS[name]
    tx = optax.with_extra_args_support(chain(jaxdp.add_noise(1.5, KEY)))
    _, state = tx.update(helpers.small_grads(2), tx.init(PARAMS), PARAMS, is_last=True)
    assert [float(s) for s in jaxdp.executed_noise_multipliers(state)] == expected


def test_the_multiplier_of_a_partitioned_optimizer_is_found() -> None:
    """Each part of the parameters with its own clip and noise: two releases of one batch."""
    parts = {
        "body": optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.5, jax.random.key(1))),
        "head": optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(2.5, jax.random.key(2))),
    }
    tx = optax.partition(parts, {"body": "body", "head": "head"})
    updates, state = tx.update(helpers.small_grads(2), tx.init(PARAMS), PARAMS)
    assert sorted(float(s) for s in jaxdp.executed_noise_multipliers(state)) == [1.5, 2.5]
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def noise_of(updates: Any, allocation: Any = "global") -> Any:
    noise = jaxdp.add_noise(1.0, KEY, allocation)
    return noise.update(updates, noise.init(PARAMS), PARAMS)


MISUSES: Mapping[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "arrays": (
        lambda: noise_of(PARAMS), TypeError, "takes a jaxdp.Bounded, .* got arrays: put a clip"
    ),
    "per-sample arrays": (
        lambda: noise_of(helpers.small_grads(2)), TypeError, "got arrays: put a clip"
    ),
    "handle": (
        lambda: noise_of(
            jaxdp.per_sample_grads(helpers.small_loss)(PARAMS, helpers.small_batch(2))
        ),
        TypeError,
        "got PerSampleGrads: put a clip",
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
        r"allocation must be one of \['global', 'optimal', 'per_layer'\] or .* got 'best'",
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
