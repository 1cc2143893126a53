"""Clips: the numbers of each rule, the adaptive threshold, schedules and misuse.

What a clip must never do is attacked in test_sensitivity.py.
"""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

import functools
from collections.abc import Callable, Mapping
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
from jaxdp.clipping import SMALLEST_THRESHOLD
from tests import helpers
from tests.helpers import CLIPS, KEY, PARAMS, THRESHOLDS, TREES

ROWS = 6

# Name -> (groups, thresholds, weight of norm and threshold), by the definitions of the papers.
SHRINK = lambda norm, c: min(1.0, c / norm) if norm else 1.0  # noqa: E731
NORMALISE = lambda norm, c: c / (norm + 0.1)  # noqa: E731
DEFINITIONS: Mapping[str, tuple[tuple[int, ...], tuple[float, ...], Callable[..., float]]] = {
    "flat": ((0, 0, 0), (1.0,), SHRINK),
    "flat_schedule": ((0, 0, 0), (1.0,), SHRINK),
    "per_layer": ((0, 1, 2), (1.0, 1.0, 1.0), SHRINK),
    "per_layer_tree": ((0, 1, 2), (1.0, 0.5, 2.0), SHRINK),
    "per_layer_prefix": ((0, 1, 2), (1.0, 1.0, 0.5), SHRINK),
    "per_layer_list": ((0, 1, 2), (1.0, 0.5, 2.0), SHRINK),
    "by_group": ((1, 1, 0), (1.0, 0.5), SHRINK),
    "by_group_function": ((0, 1, 0), (1.0, 0.5), SHRINK),
    "automatic": ((0, 0, 0), (1.0,), NORMALISE),
    "automatic_per_layer": ((0, 1, 2), (1.0, 1.0, 1.0), NORMALISE),
    "adaptive": ((0, 0, 0), (1.0,), SHRINK),
    "adaptive_per_layer": ((0, 1, 2), (1.0, 1.0, 1.0), SHRINK),
}


def by_definition(name: str, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Σ_i w_ik g_ik in double precision, one sample and one group at a time."""
    groups, thresholds, weight = DEFINITIONS[name]
    sums = [np.zeros(leaf.shape[1:]) for leaf in rows]
    for i in range(ROWS):
        sample = [leaf[i].astype(np.float64) for leaf in rows]
        for k, threshold in enumerate(thresholds):
            members = [leaf for leaf, group in enumerate(groups) if group == k]
            norm = np.sqrt(sum(np.sum(sample[leaf] ** 2) for leaf in members))
            for leaf in members:
                sums[leaf] += weight(norm, threshold) * sample[leaf]
    return sums


@pytest.mark.parametrize("name", list(CLIPS))
def test_each_clip_computes_its_definition(name: str) -> None:
    for scale in (0.1, 1.0, 30.0):  # no sample clipped, some, all
        rows = jax.tree.map(lambda leaf, scale=scale: scale * leaf, helpers.small_grads(ROWS, 3))
        rows["head"] = rows["head"].at[0].set(0.0)
        tx = CLIPS[name](THRESHOLDS)
        got, _ = tx.update(rows, tx.init(PARAMS), PARAMS)
        expected = by_definition(name, [np.asarray(leaf) for leaf in jax.tree.leaves(rows)])
        for sums, reference in zip(jax.tree.leaves(got.value), expected, strict=True):
            np.testing.assert_allclose(sums, reference, rtol=1e-5, atol=1e-5)
        groups, thresholds, _ = DEFINITIONS[name]
        assert got.groups == groups
        np.testing.assert_allclose(np.atleast_1d(got.sensitivity), thresholds)
        np.testing.assert_allclose(
            got.total_sensitivity, np.linalg.norm(thresholds), rtol=1e-6
        )


def test_a_threshold_that_nobody_reaches_changes_nothing() -> None:
    rows = helpers.small_grads(ROWS)
    for clip in (jaxdp.clip_flat(1e6), jaxdp.clip_per_layer(1e6)):
        got, _ = clip.update(rows, clip.init(PARAMS))
        helpers.assert_trees_close(got.value, jax.tree.map(lambda leaf: leaf.sum(0), rows))


def test_thresholds_of_frozen_leaves_count_for_nothing() -> None:
    grads_fn = jaxdp.per_sample_grads(
        helpers.small_loss, trainable={"body": {"b": True, "w": False}, "head": True}
    )
    grads = grads_fn(PARAMS, helpers.small_batch(ROWS))
    for thresholds in ([1.0, 99.0, 2.0], {"body": {"b": 1.0, "w": 99.0}, "head": 2.0}):
        clip = jaxdp.clip_per_layer(thresholds)
        got, _ = clip.update(grads, clip.init(PARAMS), PARAMS)
        assert got.sensitivity.tolist() == [1.0, 2.0]
        assert got.groups == (0, None, 1)


def test_a_threshold_schedule_is_read_at_the_logical_step() -> None:
    """Physical batches of one logical batch share a step; the next logical batch has the next."""
    clips = (
        jaxdp.clip_flat(lambda step: 1.0 + jnp.float32(step)),
        jaxdp.clip_per_layer([1.0, lambda step: 1.0 + jnp.float32(step), 1.0]),
        jaxdp.clip_automatic(lambda step: 1.0 + jnp.float32(step)),
    )
    rows = helpers.small_grads(ROWS)
    for clip in clips:
        state, seen = clip.init(PARAMS), []
        for is_last in (False, False, True, True, False):
            total, state = clip.update(rows, state, PARAMS, is_last=is_last)
            seen.append(float(np.max(total.sensitivity)))
        assert seen == [1.0, 1.0, 1.0, 2.0, 3.0]


# The adaptive threshold.


def counts_of(rows: Any, mask: Any = None, **options: Any) -> jax.Array:
    """The counts of one physical batch, before noise."""
    mask = jnp.ones(len(jax.tree.leaves(rows)[0]), bool) if mask is None else mask
    return _counts_of(rows, mask, tuple(options.items()))


@functools.partial(jax.jit, static_argnums=2)
def _counts_of(rows: Any, mask: Any, options: Any) -> jax.Array:
    clip = helpers.adaptive(1.0, **dict(options))
    grads = jaxdp.PerSampleGrads.from_arrays(rows, mask)
    _, state = clip.update(grads, clip.init(grads.params), is_last=False)
    return state.counts


def test_the_count_is_half_of_those_below_less_half_of_those_above() -> None:
    rows = jnp.array([[0.2], [0.999], [-0.9], [3.0]])
    assert float(counts_of(rows)) == 1.5 - 0.5
    per_layer = counts_of({"a": rows, "b": 2.0 * rows}, per_layer=True)
    assert per_layer.tolist() == [1.5 - 0.5, 0.5 - 1.5]


def test_masked_and_non_finite_samples_are_not_counted() -> None:
    rows = {
        "a": jnp.array([[0.2], [0.2], [jnp.nan], [0.2], [1e30]]),
        "b": jnp.array([[0.3], [0.3], [0.3], [jnp.inf], [0.3]]),
    }
    mask = jnp.array([True, False, True, True, True])
    assert float(counts_of(rows, mask)) == 0.5
    assert counts_of(rows, mask, per_layer=True).tolist() == [0.5, 0.5]


@hypothesis.settings(max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), scale=st.floats(-3, 3))
def test_no_sample_moves_the_counts_by_more_than_their_sensitivity(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    rows = {name: (10.0**scale * rng.normal(size=(4, 2))).astype(np.float32) for name in "abc"}
    for sample in (rng.normal(size=2), np.full(2, np.nan), np.full(2, 1e30), np.zeros(2)):
        replaced = {name: leaf.copy() for name, leaf in rows.items()}
        replaced["b"][-1] = sample
        for per_layer, leaves in ((False, 1), (True, 3)):
            without = counts_of(rows, np.arange(4) < 3, per_layer=per_layer)
            for present in (rows, replaced):
                moved = np.linalg.norm(counts_of(present, per_layer=per_layer) - without)
                assert moved <= np.sqrt(leaves) / 2 + 1e-6


def noise_of_counts(count: int, sigma: float, leaves: int) -> np.ndarray:
    """Noise `[count, leaves]` of the counts of batches without samples, by many keys, in units of
    samples. With η = 1 and m = 1 the threshold moves by exp(−(1/2 + noise − γ))."""
    rows = {str(leaf): jnp.ones((2, 1)) for leaf in range(leaves)}

    def move(key: jax.Array) -> jax.Array:
        clip = jaxdp.clip_adaptive(
            1.0,
            key=key,
            count_noise_multiplier=sigma,
            expected_batch_size=1.0,
            learning_rate=1.0,
            per_layer=True,
        )
        grads = jaxdp.PerSampleGrads.from_arrays(rows, jnp.zeros(2, bool))
        _, state = clip.update(grads, clip.init(grads.params))
        return -jnp.log(state.thresholds)

    keys = jax.random.split(jax.random.key(3), count)
    return np.asarray(jax.jit(jax.vmap(move))(keys), np.float64)


@pytest.mark.parametrize("leaves", [1, 4])
def test_the_noise_of_the_counts_is_gaussian_of_the_stated_deviation(leaves: int) -> None:
    """σ_b·√K/2 for K counts. Wrong alarm 2·10⁻⁶ in each statement; a deviation of 1.05σ escapes
    with less than 10⁻⁶ (with n = 40 000 it stands 14 deviations away)."""
    sigma, count = 0.3, 40_000 // leaves
    noise = noise_of_counts(count, sigma, leaves) / (sigma * np.sqrt(leaves) / 2)
    total = noise.size
    limit = scipy.stats.norm.isf(1e-6)
    assert abs(noise.mean()) < limit / np.sqrt(total)
    assert abs(np.mean(noise**2) - 1) < limit * np.sqrt(2 / total)
    assert abs(np.mean((1.05 * noise) ** 2) - 1) > limit * np.sqrt(2 / total)
    if leaves > 1:
        correlations = np.corrcoef(noise.T)[np.triu_indices(leaves, 1)]
        assert np.max(np.abs(correlations)) < limit / np.sqrt(count)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_threshold_settles_at_the_quantile_of_the_norms(quantile: float) -> None:
    norms = np.geomspace(0.5, 50.0, 200)
    rows = {"a": jnp.asarray(norms[:, None], jnp.float32)}
    rows["b"] = 10.0 * rows["a"]
    clip = jaxdp.clip_adaptive(
        0.01,
        key=KEY,
        count_noise_multiplier=1.0,
        expected_batch_size=len(norms),
        quantile=quantile,
        learning_rate=0.5,
        per_layer=True,
    )

    def body(state: Any, _: Any) -> tuple[Any, jax.Array]:
        _, state = clip.update(rows, state)
        return state, state.thresholds

    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    _, history = jax.lax.scan(body, clip.init(params), None, length=200)
    settled = np.asarray(history)[-50:]
    expected = np.quantile(norms, quantile)
    for leaf, scale in enumerate((1.0, 10.0)):
        # The share of the norms below, not the norm itself, is what is steered.
        below = np.mean(norms[None] * scale <= settled[:, leaf, None])
        assert abs(below - quantile) < 0.03
        assert abs(np.log(np.mean(settled[:, leaf]) / (scale * expected))) < 0.2


def test_counts_add_up_over_physical_batches_and_move_the_threshold_once() -> None:
    rows = helpers.small_grads(6)
    parts = [jax.tree.map(lambda leaf, s=s: leaf[s], rows) for s in np.split(np.arange(6), 3)]
    for per_layer in (False, True):
        clip = helpers.adaptive(1.0, per_layer=per_layer)
        whole = clip.init(PARAMS)
        _, whole = clip.update(rows, whole, PARAMS)
        state = clip.init(PARAMS)
        for part in parts[:2]:
            bounded, state = clip.update(part, state, PARAMS, is_last=False)
            assert np.all(np.asarray(state.thresholds) == 1.0)
            assert np.all(np.asarray(bounded.sensitivity) == 1.0)
            assert int(state.released.step) == 0
            assert np.isnan(state.released.noise_multiplier)
        _, state = clip.update(parts[2], state, PARAMS, is_last=True)
        helpers.assert_trees_close(state, whole)
        assert np.all(np.asarray(state.counts) == 0)
        assert int(state.released.step) == 1


def test_the_clip_reports_the_noise_multiplier_of_its_counts() -> None:
    clip = helpers.adaptive(1.0, count_noise_multiplier=lambda step: 3.0 + jnp.float32(step))
    state = clip.init(PARAMS)
    for expected in (3.0, 4.0):
        _, state = clip.update(helpers.small_grads(ROWS), state, PARAMS)
        assert [float(s) for s in jaxdp.executed_noise_multipliers(state)] == [expected]


def test_the_adaptive_clip_uses_the_threshold_it_releases() -> None:
    clip = helpers.adaptive(0.5)
    state = clip.init(PARAMS)
    for seed in range(3):
        before = float(state.thresholds)
        bounded, state = clip.update(helpers.small_grads(ROWS, seed), state, PARAMS)
        assert float(bounded.sensitivity) == before
        assert float(state.thresholds) != before


def run(clip: Any, rows: Any = None, params: Any = PARAMS) -> Any:
    rows = helpers.small_grads(2) if rows is None else rows
    return clip.update(rows, clip.init(PARAMS), params)


MISUSES: Mapping[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "clip after clip": (
        lambda: run(optax.chain(jaxdp.clip_flat(1.0), jaxdp.clip_flat(1.0))),
        TypeError,
        "must get per-sample gradients, got a Bounded, whose samples are summed already",
    ),
    "adaptive clip after clip": (
        lambda: run(optax.chain(jaxdp.clip_flat(1.0), helpers.adaptive(1.0))),
        TypeError,
        "got a Bounded",
    ),
    "mean gradient": (
        lambda: run(jaxdp.clip_flat(1.0), PARAMS),
        ValueError,
        "not the gradient of a mean loss|same leading axis",
    ),
    "mean gradient of one matrix": (
        lambda: run(jaxdp.clip_flat(1.0), {"w": jnp.ones((3, 2))}, {"w": jnp.ones((3, 2))}),
        ValueError,
        "shapes without the sample axis",
    ),
    "scalar gradient": (
        lambda: run(jaxdp.clip_flat(1.0), jnp.ones(()), None),
        ValueError,
        "must have a leading sample axis",
    ),
    "rows disagree": (
        lambda: run(jaxdp.clip_flat(1.0), {"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}, None),
        ValueError,
        "same leading axis, the samples",
    ),
    "nothing to clip": (
        lambda: run(jaxdp.clip_flat(1.0), {"a": jnp.arange(3)}, None),
        ValueError,
        "at least one trainable",
    ),
    "complex gradients": (
        lambda: run(jaxdp.clip_flat(1.0), jnp.ones((3, 2), jnp.complex64), None),
        TypeError,
        "parameters must be real",
    ),
    "thresholds of another structure": (
        lambda: run(jaxdp.clip_per_layer({"tail": 1.0})),
        ValueError,
        "threshold must be a pytree prefix of the parameters",
    ),
    "too few thresholds": (
        lambda: run(jaxdp.clip_per_layer([1.0, 2.0])),
        ValueError,
        "one number for each of the 3 leaves of the parameters, got 2",
    ),
    "label without threshold": (
        lambda: run(jaxdp.clip_by_group({"body": "a", "head": "b"}, {"a": 1.0})),
        ValueError,
        r"must hold every label, got labels \[\"'b'\"\] without one; known: \[\"'a'\"\]",
    ),
    "threshold without label": (
        lambda: run(jaxdp.clip_by_group("a", {"a": 1.0, "b": 1.0})),
        ValueError,
        r"got \['b'\], which guard none and would only add noise. Remove them",
    ),
    "labels of another structure": (
        lambda: run(jaxdp.clip_by_group({"tail": "a"}, {"a": 1.0})),
        ValueError,
        "labels must be a pytree prefix of the parameters",
    ),
    "no groups": (
        lambda: jaxdp.clip_by_group({}, {}), ValueError, "must hold at least one label, got"
    ),
    "quantile": (lambda: helpers.adaptive(1.0, quantile=1.5), ValueError, "quantile .* got 1.5"),
    "quantile nan": (
        lambda: helpers.adaptive(1.0, quantile=float("nan")), ValueError, "quantile must be finite"
    ),
    "count noise": (
        lambda: helpers.adaptive(1.0, count_noise_multiplier=-1.0),
        ValueError,
        "count_noise_multiplier must be finite, >= 0, got -1.0",
    ),
    "batch size": (
        lambda: helpers.adaptive(1.0, expected_batch_size=0.0),
        ValueError,
        "expected_batch_size must be finite, > 0",
    ),
    "learning rate": (
        lambda: helpers.adaptive(1.0, learning_rate=0.0), ValueError, "learning_rate must be"
    ),
    "stability": (
        lambda: jaxdp.clip_automatic(stability=0.0), ValueError, "stability must be .* > 0"
    ),
}


@pytest.mark.parametrize("misuse", list(MISUSES))
def test_misuse_is_told_with_name_rule_and_value(misuse: str) -> None:
    action, error, message = MISUSES[misuse]
    with pytest.raises(error, match=message):
        action()


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf"), np.float32(-2.0)])
@pytest.mark.parametrize(
    "make",
    [
        jaxdp.clip_flat,
        jaxdp.clip_per_layer,
        lambda c: jaxdp.clip_per_layer([1.0, c]),
        lambda c: jaxdp.clip_per_layer({"body": 1.0, "head": c}),
        lambda c: jaxdp.clip_by_group("a", {"a": c}),
        jaxdp.clip_automatic,
        helpers.adaptive,
    ],
)
def test_a_threshold_must_be_a_finite_number_above_zero(make: Any, threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold.* must be finite, > 0, got"):
        make(threshold)


def test_gradients_of_every_tree_are_accepted_as_arrays() -> None:
    for params in TREES.values():
        rows = jax.tree.map(lambda leaf: jnp.ones((3, *leaf.shape), leaf.dtype), params)
        clip = jaxdp.clip_per_layer(1.0)
        total, _ = jax.eval_shape(clip.update, rows, clip.init(params), params)
        assert jax.tree.structure(total.value) == jax.tree.structure(params)
        shapes = zip(jax.tree.leaves(total.value), jax.tree.leaves(params), strict=True)
        assert all(got.shape == param.shape for got, param in shapes)


# Thresholds that neither vanish nor run away.

TINY = (9e-13, 1e-18, 1e-30, 1e-40)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("threshold", jaxdp.clip_flat),
        ("threshold", jaxdp.clip_per_layer),
        ("threshold", lambda c: jaxdp.clip_per_layer({"body": 1.0, "head": c})),
        (r"thresholds\['a'\]", lambda c: jaxdp.clip_by_group("a", {"a": c})),
        ("threshold", jaxdp.clip_automatic),
        ("initial_threshold", helpers.adaptive),
    ],
)
@pytest.mark.parametrize("threshold", TINY)
def test_a_number_below_the_floor_is_refused(name: str, make: Any, threshold: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be finite, .*, got .* Scale the loss up"):
        make(threshold)


SCHEDULED: Mapping[str, Callable[[Any], Any]] = {
    "flat": jaxdp.clip_flat,
    "per_layer": jaxdp.clip_per_layer,
    "per_layer_list": lambda c: jaxdp.clip_per_layer([c, c, c]),
    "by_group": lambda c: jaxdp.clip_by_group("a", {"a": c}),
    "automatic": jaxdp.clip_automatic,
}


@functools.cache
def scheduled(name: str) -> Any:
    """`(threshold, rows) -> Bounded`, and what is released of it with σ = 1."""

    @jax.jit
    def clipped(threshold: jax.Array, rows: Any) -> Any:
        clip = SCHEDULED[name](lambda step: threshold)
        bounded, _ = clip.update(rows, clip.init(PARAMS), PARAMS)
        noise = jaxdp.add_noise(1.0, KEY)
        return bounded, noise.update(bounded, noise.init(PARAMS), PARAMS)[0]

    return clipped


@pytest.mark.parametrize("name", list(SCHEDULED))
@pytest.mark.parametrize("threshold", [0.0, -1.0, *TINY])
def test_a_schedule_is_raised_to_the_floor_and_noised(name: str, threshold: float) -> None:
    """Below 1e-19 the noise used to vanish, and what was released was the sum itself."""
    rows = helpers.small_grads(ROWS)
    bounded, released = scheduled(name)(jnp.float32(threshold), rows)
    assert np.all(np.asarray(bounded.sensitivity) == np.float32(SMALLEST_THRESHOLD))
    noise = jax.tree.map(jnp.subtract, released, bounded.value)
    sizes = np.concatenate([np.ravel(np.abs(leaf)) for leaf in jax.tree.leaves(noise)])
    # Of ten normal numbers of this deviation, 1e-12 to 1.8e-12, all are below six, and one at least
    # above a third, except with probability 10⁻⁵.
    assert np.all(sizes < 6 * 1.8e-12) and np.max(sizes) > 1e-12 / 3


@pytest.mark.parametrize("name", list(SCHEDULED))
def test_a_schedule_of_nan_or_infinity_gives_nan_in_the_release(name: str) -> None:
    for threshold in (np.nan, np.inf):
        _, released = scheduled(name)(jnp.float32(threshold), helpers.small_grads(ROWS))
        assert all(bool(jnp.all(jnp.isnan(leaf))) for leaf in jax.tree.leaves(released))


def test_a_traced_threshold_is_that_of_a_number() -> None:
    rows = helpers.small_grads(ROWS)
    for threshold in (1e-12, 0.3, 1e30, 3e38):
        clip = jaxdp.clip_flat(threshold)
        number, _ = clip.update(rows, clip.init(PARAMS), PARAMS)
        traced, _ = scheduled("flat")(jnp.float32(threshold), rows)
        helpers.assert_trees_close(traced.value, number.value, atol=0)
        assert float(traced.sensitivity) == float(number.sensitivity)


@functools.cache
def followed(per_layer: bool, noise: float) -> Any:
    """`(state, rows, steps) -> (state, thresholds [steps], what was released [steps])`."""
    tx = optax.chain(
        helpers.adaptive(
            1.0, per_layer=per_layer, count_noise_multiplier=noise, learning_rate=0.5
        ),
        jaxdp.add_noise(1.0, KEY),
    )

    @functools.partial(jax.jit, static_argnums=2)
    def run(state: Any, rows: Any, steps: int) -> Any:
        def body(state: Any, _: Any) -> Any:
            released: Any
            released, state = tx.update(rows, state, PARAMS)
            return state, (state[0].thresholds, released["head"])

        return jax.lax.scan(body, state, None, length=steps)

    return tx, run


@pytest.mark.parametrize("per_layer", [False, True])
def test_an_adaptive_threshold_survives_gradients_that_vanish(per_layer: bool) -> None:
    """From some step on it was zero for ever, and there was no noise, which was charged all the
    same. It stops at a millionth, is noised there, and comes back with the gradients."""
    tx, run = followed(per_layer, 0.5)
    nothing = jax.tree.map(jnp.zeros_like, helpers.small_grads(4))
    state, (thresholds, released) = run(tx.init(PARAMS), nothing, 400)
    assert np.min(thresholds) == np.float32(1e-6)
    # Noise of deviation σ·C (√3·σ·C for three leaves), at the last 200 steps as well.
    scale = np.float64(released[200:]) / np.sqrt(3 if per_layer else 1)
    assert np.std(scale / 1e-6) == pytest.approx(1, abs=0.3)
    assert np.all(released != 0)
    state, (thresholds, _) = run(state, helpers.small_grads(4), 400)
    assert np.all((np.asarray(thresholds[-1]) > 1e-2) & (np.asarray(thresholds[-1]) < 1e2))


@pytest.mark.parametrize("per_layer", [False, True])
def test_an_adaptive_threshold_has_a_ceiling(per_layer: bool) -> None:
    tx, run = followed(per_layer, 0.5)
    huge = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e12), helpers.small_grads(4))
    state, (thresholds, released) = run(tx.init(PARAMS), huge, 400)
    assert np.max(thresholds) == np.float32(1e6) and np.all(np.isfinite(released))
    _, (thresholds, _) = run(state, helpers.small_grads(4), 400)
    assert np.all(np.asarray(thresholds[-1]) < 1e2)


def test_noise_of_any_size_leaves_an_adaptive_threshold_in_its_range() -> None:
    tx, run = followed(True, 1e6)
    _, (thresholds, released) = run(tx.init(PARAMS), helpers.small_grads(4), 400)
    assert np.min(thresholds) == np.float32(1e-6) and np.max(thresholds) == np.float32(1e6)
    assert np.all(np.isfinite(released))


def test_the_range_of_an_adaptive_threshold_is_one_of_float32() -> None:
    largest = float(np.finfo(np.float32).max)
    for initial, lowest, highest in (
        (2.0, 2e-6, 2e6), (1e-9, SMALLEST_THRESHOLD, 1e-3), (3e38, 3e32, largest)
    ):
        state = helpers.adaptive(initial).init(PARAMS)
        np.testing.assert_allclose([state.lowest, state.highest], [lowest, highest], rtol=1e-6)
        traced = jax.jit(lambda c: helpers.adaptive(c).init(PARAMS))(jnp.float32(initial))
        helpers.assert_trees_close(traced, state, atol=0)


@pytest.mark.parametrize("noise", [-1.0, np.nan])
def test_counts_without_their_noise_poison_the_threshold(noise: float) -> None:
    clip = helpers.adaptive(1.0, count_noise_multiplier=lambda step: jnp.float32(noise))
    _, state = clip.update(helpers.small_grads(2), clip.init(PARAMS), PARAMS)
    assert np.isnan(state.thresholds) and np.isnan(state.released.noise_multiplier)


def test_two_adaptive_clips_with_one_key_draw_counts_of_their_own() -> None:
    """With one noise for both counts, log(C_a/C_b) told the difference of the two exactly. A share
    of 10⁻⁶ of the noise would be as many bits of agreement as float32 has."""

    def thresholds(labels: Any, key: jax.Array) -> tuple[float, float]:
        parts = {
            name: optax.chain(
                helpers.adaptive(1.0, key=key, count_noise_multiplier=50.0, learning_rate=0.01),
                jaxdp.add_noise(1.0, KEY),
            )
            for name in ("a", "b")
        }
        clip = optax.partition(parts, labels)
        params = {"x": jnp.zeros(3), "y": jnp.zeros(3)}
        rows = jax.tree.map(lambda leaf: jnp.ones((4, *leaf.shape)), params)
        _, state = clip.update(rows, clip.init(params))
        inner = state.inner_states
        a, b = (inner[name].inner_state[0].thresholds for name in ("a", "b"))
        return float(jnp.log(a)), float(jnp.log(b))

    for seed in range(3):
        for labels in ({"x": "a", "y": "b"}, {"x": "b", "y": "a"}):
            a, b = thresholds(labels, jax.random.key(seed))
            assert abs(a - b) > 1e-4
