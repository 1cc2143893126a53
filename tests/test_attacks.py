"""What attacks on the core have found, each held by the test that found it."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# pyright: reportIndexIssue=false
# pyright: reportReturnType=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp.bounded import Bounded
from jaxdp.clipping import SMALLEST_THRESHOLD
from jaxdp.engine.methods import dense
from jaxdp.engine.weighting import ClipRule
from tests import helpers
from tests.helpers import KEY, PARAMS

# What is compiled must round as it does for users.
pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("shape", ["gaussian", "one_large_then_small"])
def test_a_long_gradient_has_the_norm_it_has_in_double_precision(shape: str) -> None:
    size = 1_000_000
    if shape == "gaussian":
        row = np.random.default_rng(0).normal(size=size).astype(np.float32)
    else:  # squares just below half an ulp of 1: a single accumulator drops every one of them
        row = np.full(size, 2.4e-4, np.float32)
        row[:64] = 1.0
    expected = np.linalg.norm(row.astype(np.float64))
    (norm,) = dense.certified_norms([jnp.asarray(row)[None]], jnp.ones(1, bool)).T
    np.testing.assert_allclose(norm, expected, rtol=1e-5)
    assert norm >= expected


@pytest.mark.slow
def test_a_very_long_gradient_is_not_clipped_too_little() -> None:
    rows = jnp.ones((1, 60_000_000))
    clip = jaxdp.clip_flat(1.0)
    total, _ = clip.update(rows, clip.init(None))
    assert np.linalg.norm(np.asarray(total.value, np.float64)) <= 1 + 1e-4


@pytest.mark.parametrize(
    ("clip", "entry"),
    [
        (lambda: jaxdp.clip_flat(1e-12), 1e-25),
        (lambda: jaxdp.clip_automatic(1.0, stability=1e-25), 1e-20),
    ],
)
def test_gradients_whose_squares_underflow_are_bounded_too(clip: Any, entry: float) -> None:
    total, _ = clip().update(jnp.full((1, 4), entry), clip().init(None))
    moved = np.linalg.norm(np.asarray(total.value, np.float64))
    assert moved <= float(total.sensitivity) * (1 + 1e-5)


def test_a_wish_is_capped_where_squares_underflow() -> None:
    rule = ClipRule((0,), jnp.float32(1.0), lambda norms, _: jnp.full_like(norms, 1e30))
    total = jaxdp.PerSampleGrads.from_arrays(jnp.full((1, 4), 1e-20)).clipped_sum(rule)
    assert np.linalg.norm(np.asarray(total.value, np.float64)) <= 1 + 1e-5


def test_a_rule_sees_one_sample_at_a_time() -> None:
    """A weight that looks at the other samples' norms lets one sample move all of them."""
    rule = ClipRule((0,), jnp.float32(1.0), lambda norms, _: jnp.ones_like(norms) * jnp.max(norms))
    few = jnp.full((10, 1), 0.1)
    one_more = jnp.concatenate([few, jnp.full((1, 1), 5.0)])
    sums = [jaxdp.PerSampleGrads.from_arrays(g).clipped_sum(rule).value for g in (few, one_more)]
    assert abs(float(sums[1][0] - sums[0][0])) <= 1 + 1e-5


@pytest.mark.parametrize("select", ["masked", "partition"])
def test_a_transformation_of_matrices_alone_cannot_pass_the_seal(select: str) -> None:
    def matrix(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    between = (
        optax.masked(optax.scale(100.0), matrix)
        if select == "masked"
        else optax.partition({True: optax.scale(100.0), False: optax.identity()}, matrix)
    )
    params = {"w": jnp.zeros((2, 3))}
    tx = optax.chain(jaxdp.clip_flat(1.0), between, jaxdp.add_noise(0.0, KEY))
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        tx.update({"w": jnp.ones((5, 2, 3))}, tx.init(params))


def test_trainable_of_a_list_freezes_what_it_says() -> None:
    params = [jnp.ones(2), jnp.ones(3)]
    grads_fn = jaxdp.per_sample_grads(
        lambda p, x: jnp.sum(p[0]) * x + jnp.sum(p[1]) * x, trainable=[True, False]
    )
    assert grads_fn(params, jnp.ones(4)).groups == (0, None)


def test_thresholds_and_labels_of_a_list_are_read_leaf_by_leaf() -> None:
    params = [jnp.ones(2), {"a": [jnp.ones(3), jnp.ones(1)]}]
    rows = jax.tree.map(lambda leaf: jnp.ones((4, *leaf.shape)), params)
    clip = jaxdp.clip_per_layer([1.0, {"a": [2.0, 3.0]}])
    assert clip.update(rows, clip.init(params), params)[0].sensitivity.tolist() == [1.0, 2.0, 3.0]
    clip = jaxdp.clip_by_group(["x", {"a": ["y", "x"]}], {"x": 1.0, "y": 2.0})
    assert clip.update(rows, clip.init(params), params)[0].groups == (0, 1, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_works_under_strict_promotion(dtype: Any) -> None:
    params = {"half": jnp.ones(3, dtype), "single": jnp.ones(2)}
    tx = optax.chain(jaxdp.clip_per_layer(1.0), jaxdp.accumulate(jaxdp.add_noise(1.0, KEY)))
    grads = jaxdp.per_sample_grads(helpers.tree_loss)(params, jnp.array([0.5, -1.0]))
    updates, _ = tx.update(grads, tx.init(params), params, is_last=True)
    assert updates["half"].dtype == dtype


def test_a_frozen_half_precision_leaf_accumulates() -> None:
    params = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(2)}
    tx = optax.chain(jaxdp.clip_per_layer(1.0), jaxdp.accumulate(jaxdp.add_noise(1.0, KEY)))
    grads_fn = jaxdp.per_sample_grads(
        helpers.tree_loss, trainable={"half": False, "single": True}
    )
    grads = grads_fn(params, jnp.array([0.5, -1.0]))
    updates, _ = tx.update(grads, tx.init(params), params, is_last=True)
    assert updates["half"].tolist() == [0.0] * 3


def test_double_and_single_precision_mix_under_strict_promotion() -> None:
    with jax.enable_x64(True):
        rows = {"a": jnp.ones((2, 3), jnp.float32), "b": jnp.ones((2, 3), jnp.float64)}
        total, _ = jaxdp.clip_flat(1.0).update(rows, jaxdp.clip_flat(1.0).init(None))
        assert total.value["a"].dtype == jnp.float32


def test_gradients_in_double_precision_numpy_are_accepted() -> None:
    clip = jaxdp.clip_flat(1.0)
    total, _ = clip.update({"a": np.ones((2, 4))}, clip.init(None))
    np.testing.assert_allclose(total.value["a"], 1.0, rtol=1e-5)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_batch_of_no_rows_sums_to_zero(microbatch_size: int | None) -> None:
    grads_fn = jaxdp.per_sample_grads(helpers.small_loss, microbatch_size=microbatch_size)
    for grads in (
        grads_fn(PARAMS, (jnp.zeros((0, 3)), jnp.zeros(0))),
        jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape)), PARAMS),
    ):
        clip = helpers.adaptive(1.0, per_layer=True)
        total, _ = clip.update(grads, clip.init(PARAMS), PARAMS)
        helpers.assert_trees_equal(total.value, jax.tree.map(jnp.zeros_like, PARAMS))


class Module:
    """A pytree without equality, as modules of many libraries are."""

    def __init__(self, w: Any):
        self.w = w


jax.tree_util.register_pytree_node(Module, lambda m: ((m.w,), None), lambda _, c: Module(*c))


def test_parameters_of_a_class_without_equality_train() -> None:
    params = Module(jnp.ones(3))
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, KEY))
    grads = jaxdp.per_sample_grads(lambda p, x: jnp.sum(p.w * x))(params, jnp.ones((2, 3)))
    updates, _ = tx.update(grads, tx.init(params), params)
    assert isinstance(updates, Module)


def test_python_numbers_as_parameters_accumulate() -> None:
    params = {"w": 1.0}
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(jaxdp.add_noise(1.0, KEY)))
    grads = jaxdp.per_sample_grads(lambda p, x: p["w"] * x)(params, jnp.ones(3))
    updates, _ = tx.update(grads, tx.init(params), params, is_last=True)
    assert updates["w"].shape == ()


def test_a_schedule_below_zero_clips_to_the_smallest_threshold_and_claims_it() -> None:
    clip = jaxdp.clip_flat(lambda step: -1.0)
    total, _ = clip.update(jnp.ones((2, 3)), clip.init(None))
    assert float(total.sensitivity) == SMALLEST_THRESHOLD
    assert float(jnp.linalg.norm(total.value)) <= 2 * SMALLEST_THRESHOLD


def test_a_list_as_threshold_of_the_flat_clip_is_told() -> None:
    with pytest.raises(TypeError, match="threshold must be a real number, .* a schedule"):
        jaxdp.clip_flat([1.0])  # pyright: ignore[reportArgumentType]


def test_a_pair_without_has_aux_is_told() -> None:
    grads_fn = jaxdp.per_sample_grads(lambda p, e: (p["head"][0], e))
    with pytest.raises(TypeError, match="or pass has_aux=True if it returns a pair"):
        grads_fn(PARAMS, helpers.small_batch(3)).norms()


def test_noise_of_one_physical_batch_of_several_is_refused() -> None:
    """Without accumulate each physical batch would be released: more than the ledger charges."""
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, KEY))
    with pytest.raises((TypeError, ValueError), match="accumulate"):
        tx.update(helpers.small_grads(2), tx.init(PARAMS), PARAMS, is_last=False)


def test_two_noises_of_one_key_in_a_partition_are_independent() -> None:
    part = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, KEY))
    tx = optax.partition({"a": part, "b": part}, {"a": "a", "b": "b"})
    rows = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 3))}
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    updates, _ = tx.update(rows, tx.init(params), params)
    assert not helpers.any_equal(updates["a"], updates["b"])


def test_sums_clipped_under_vmap_are_no_bounded() -> None:
    """16 sums over the same sample, each of sensitivity 1, have 4 together, not 1."""
    clip = jaxdp.clip_flat(1.0)
    stacked = jax.vmap(lambda g: clip.update(g, clip.init(None))[0])(jnp.ones((16, 1, 400)))
    noise = jaxdp.add_noise(1.0, KEY, "optimal")
    with pytest.raises(ValueError, match=r"one number for each group of leaves, got shape \(16,\)"):
        noise.update(stacked, noise.init(None))


def test_a_multiplier_schedule_below_zero_is_no_noise_multiplier() -> None:
    noise = jaxdp.add_noise(lambda step: -1.0, KEY)
    _, state = noise.update(Bounded(jnp.ones(3), 1.0), noise.init(jnp.ones(3)))
    assert not float(state.noise_multiplier) < 0


def test_a_half_precision_bounded_is_noised_in_float32() -> None:
    noise = jaxdp.add_noise(1.0, KEY)
    values, _ = noise.update(Bounded(jnp.ones(3, jnp.bfloat16), 1.0), noise.init(None))
    assert values.dtype == jnp.float32


def test_a_sensitivity_without_leaves_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got shape \(2,\) for groups \[0\]"):
        Bounded(jnp.ones(3), jnp.array([1.0, 2.0]), (0,))


def test_accumulation_outside_of_jit_compiles_no_branches() -> None:
    """With a concrete `is_last` a `cond` would be traced and compiled anew at every call."""
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(jaxdp.add_noise(1.0, KEY)))

    def traced(is_last: Any) -> str:
        update = functools.partial(tx.update, params=PARAMS, is_last=is_last)
        return str(jax.make_jaxpr(update)(helpers.small_grads(2), tx.init(PARAMS)))

    assert "cond[" not in traced(True) and "cond[" not in traced(np.bool_(False))
    assert "cond[" in traced(jnp.array(True))
