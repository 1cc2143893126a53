"""The contracts that every transformation keeps, whichever clip, allocation or tree."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from tests import helpers
from tests.helpers import CLIPS, KEY, PARAMS, THRESHOLDS, TREES, Transformation

ROWS = 5


def clip(name: str) -> Transformation:
    return CLIPS[name](THRESHOLDS)


def noise_schedule(step: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + step.astype(jnp.float32))


# Whole chains, from per-sample gradients to updates.
CHAINS: Mapping[str, Callable[[], Transformation]] = {
    **{name: lambda name=name: helpers.private(clip(name)) for name in CLIPS},
    "noise_per_layer": lambda: helpers.private(clip("per_layer"), allocation="per_layer"),
    "noise_optimal": lambda: helpers.private(clip("by_group"), allocation="optimal"),
    "noise_coefficients": lambda: helpers.private(clip("per_layer"), allocation=(1.0, 2.0, 0.5)),
    "noise_schedule": lambda: optax.chain(
        clip("flat"),
        jaxdp.add_noise(noise_schedule, KEY),
        optax.scale_by_schedule(optax.linear_schedule(-0.1, -0.01, 10)),
    ),
    "raw_key": lambda: optax.chain(clip("flat"), jaxdp.add_noise(1.0, jax.random.PRNGKey(0))),
    "accumulate": lambda: optax.chain(
        clip("per_layer"),
        jaxdp.accumulate(optax.chain(jaxdp.add_noise(1.0, KEY), optax.sgd(0.1, momentum=0.9))),
    ),
    "accumulate_adaptive": lambda: optax.chain(
        clip("adaptive_per_layer"), jaxdp.accumulate(jaxdp.add_noise(1.0, KEY, "optimal"))
    ),
    "momentum": lambda: optax.chain(
        clip("flat"), jaxdp.add_noise(1.0, KEY), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
}

chains = pytest.mark.parametrize("chain", list(CHAINS))
clips = pytest.mark.parametrize("name", list(CLIPS))


def handle(params: Any, seed: int = 0, **options: Any) -> jaxdp.PerSampleGrads:
    grads_fn = jaxdp.per_sample_grads(helpers.small_loss, **options)
    return grads_fn(params, helpers.small_batch(ROWS, seed))


def step_of(tx: Transformation) -> Callable[..., Any]:
    """One training step, data drawn from a seed, as a user writes it."""

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        grads = jaxdp.per_sample_grads(helpers.small_loss)(params, batch)
        updates, state = tx.update(grads, state, params, is_last=True)
        return optax.apply_updates(params, updates), state

    return step


@chains
def test_the_state_keeps_its_shapes_and_dtypes_over_steps(chain: str) -> None:
    tx = CHAINS[chain]()
    state = tx.init(PARAMS)
    before = helpers.structure(state)
    for seed in range(3):
        _, new_state = tx.update(handle(PARAMS, seed), state, PARAMS, is_last=True)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert helpers.structure(new_state) == before
        state = new_state


@chains
def test_jit_compiles_once_and_computes_what_eager_computes(chain: str) -> None:
    tx = CHAINS[chain]()
    step = step_of(tx)
    compiled = jax.jit(step)
    eager = jitted = (PARAMS, tx.init(PARAMS))
    for seed in range(3):
        batch = helpers.small_batch(ROWS, seed)
        eager, jitted = step(eager, batch), compiled(jitted, batch)
    assert compiled._cache_size() == 1
    helpers.assert_trees_close(jitted, eager, rtol=1e-5, atol=1e-5)


@chains
def test_init_works_on_shapes_alone(chain: str) -> None:
    tx = CHAINS[chain]()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    assert helpers.structure(tx.init(shapes)) == helpers.structure(tx.init(PARAMS))
    assert helpers.structure(jax.eval_shape(tx.init, PARAMS)) == helpers.structure(tx.init(PARAMS))


@chains
def test_a_training_loop_in_scan_equals_one_in_python(chain: str) -> None:
    tx = CHAINS[chain]()
    batches = [helpers.small_batch(ROWS, seed) for seed in range(3)]
    expected = (PARAMS, tx.init(PARAMS))
    compiled = jax.jit(step_of(tx))
    for batch in batches:
        expected = compiled(expected, batch)

    def body(carry: Any, batch: Any) -> tuple[Any, None]:
        return step_of(tx)(carry, batch), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    scanned, _ = jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), stacked)
    helpers.assert_trees_close(scanned, expected, rtol=1e-5, atol=1e-5)


@chains
def test_a_step_inside_cond_equals_one_outside(chain: str) -> None:
    tx = CHAINS[chain]()
    carry, batch = (PARAMS, tx.init(PARAMS)), helpers.small_batch(ROWS)

    @jax.jit
    def maybe(do: jax.Array) -> Any:
        return jax.lax.cond(do, lambda: step_of(tx)(carry, batch), lambda: carry)

    helpers.assert_trees_equal(maybe(jnp.array(False)), carry)
    helpers.assert_trees_close(
        maybe(jnp.array(True)), jax.jit(step_of(tx))(carry, batch), rtol=1e-5, atol=1e-5
    )


@clips
def test_plain_arrays_of_vmap_grad_equal_the_lazy_handle(name: str) -> None:
    tx = clip(name)
    lazy = tx.update(handle(PARAMS), tx.init(PARAMS), PARAMS)
    arrays = tx.update(helpers.small_grads(ROWS), tx.init(PARAMS), PARAMS)
    without_params = tx.update(helpers.small_grads(ROWS), tx.init(PARAMS))
    helpers.assert_trees_close(arrays, lazy)
    helpers.assert_trees_equal(without_params, arrays)


@clips
def test_the_microbatch_size_changes_nothing_but_memory(name: str) -> None:
    tx = clip(name)
    mask = jnp.array([True, False, True, True, False])
    batch = helpers.small_batch(ROWS)

    def clipped(size: int | None) -> Any:
        grads_fn = jaxdp.per_sample_grads(helpers.small_loss, microbatch_size=size)
        return tx.update(grads_fn(PARAMS, batch, mask), tx.init(PARAMS), PARAMS)

    whole = clipped(None)
    for size in (1, 3, 4, ROWS, ROWS + 2):
        helpers.assert_trees_close(clipped(size), whole)


@clips
def test_masked_rows_count_for_nothing_whatever_they_hold(name: str) -> None:
    tx = clip(name)
    x, y = helpers.small_batch(ROWS)
    mask = jnp.array([True, True, False, True, False])
    kept = (x[mask], y[mask])
    expected = tx.update(
        jaxdp.per_sample_grads(helpers.small_loss)(PARAMS, kept), tx.init(PARAMS), PARAMS
    )
    for garbage in (0.0, 1e30, jnp.inf, jnp.nan):
        batch = (jnp.where(mask[:, None], x, garbage), jnp.where(mask, y, garbage))
        for size in (None, 2):
            grads_fn = jaxdp.per_sample_grads(helpers.small_loss, microbatch_size=size)
            got = tx.update(grads_fn(PARAMS, batch, mask), tx.init(PARAMS), PARAMS)
            helpers.assert_trees_close(got, expected)


@clips
def test_a_batch_without_a_sample_gives_a_sum_of_zero_and_the_same_sensitivity(name: str) -> None:
    tx = clip(name)
    full = tx.update(handle(PARAMS), tx.init(PARAMS), PARAMS)[0]
    batch, nothing = helpers.small_batch(ROWS), jnp.zeros(ROWS, bool)
    for size in (None, 2):
        grads_fn = jaxdp.per_sample_grads(helpers.small_loss, microbatch_size=size)
        empty = tx.update(grads_fn(PARAMS, batch, nothing), tx.init(PARAMS), PARAMS)[0]
        helpers.assert_trees_equal(empty.value, jax.tree.map(jnp.zeros_like, PARAMS))
        helpers.assert_trees_equal(empty.sensitivity, full.sensitivity)


@clips
def test_a_batch_of_one_row_is_clipped_as_that_row_is_in_a_larger_batch(name: str) -> None:
    tx = clip(name)
    one = jax.tree.map(lambda leaf: leaf[:1], helpers.small_grads(ROWS))
    padded = jax.tree.map(lambda leaf: leaf.at[1:].set(0.0), helpers.small_grads(ROWS))
    got = tx.update(one, tx.init(PARAMS), PARAMS)[0]
    helpers.assert_trees_close(got, tx.update(padded, tx.init(PARAMS), PARAMS)[0])


@pytest.mark.parametrize("tree", list(TREES))
@pytest.mark.parametrize("name", helpers.ANY_TREE)
def test_every_kind_of_parameters_trains(name: str, tree: str) -> None:
    params, batch = TREES[tree], jnp.array([0.5, -1.0, 2.0])
    for accumulated in (False, True):
        noise: Any = optax.chain(jaxdp.add_noise(1.0, KEY), optax.scale(-0.1))
        tx = optax.chain(clip(name), jaxdp.accumulate(noise) if accumulated else noise)
        grads = jaxdp.per_sample_grads(helpers.tree_loss)(params, batch)
        updates, state = jax.jit(
            lambda state, tx=tx, grads_fn=jaxdp.per_sample_grads(helpers.tree_loss): tx.update(
                grads_fn(params, batch), state, params, is_last=True
            )
        )(tx.init(params))
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert helpers.structure(state) == helpers.structure(tx.init(params))
        for update, param, group in zip(
            jax.tree.leaves(updates), jax.tree.leaves(params), grads.groups, strict=True
        ):
            assert update.shape == param.shape
            assert update.dtype == param.dtype
            moves = group is not None and param.size > 0
            assert bool(jnp.any(update.astype(jnp.float32) != 0)) == moves
            assert bool(jnp.all(jnp.isfinite(update.astype(jnp.float32))))
        assert helpers.structure(optax.apply_updates(params, updates)) == helpers.structure(params)


def test_bfloat16_parameters_train_and_keep_their_dtype() -> None:
    # Standard promotion: sums in float32 mix with a bfloat16 parameter on purpose.
    params = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(2)}
    batch = jnp.array([0.5, -1.0, 2.0])
    with jax.numpy_dtype_promotion("standard"):
        for name in helpers.ANY_TREE:
            tx = clip(name)
            grads = jaxdp.per_sample_grads(helpers.tree_loss)(params, batch)
            bounded, _ = tx.update(grads, tx.init(params), params)
            assert bounded.value["half"].dtype == jnp.float32
            chain = helpers.private(tx)
            updates, state = chain.update(grads, chain.init(params), params)
            assert updates["half"].dtype == jnp.bfloat16
            assert helpers.structure(state) == helpers.structure(chain.init(params))


FROZEN = {
    "one_leaf": {"body": {"b": True, "w": False}, "head": True},
    "a_subtree": {"body": False, "head": True},
}


@pytest.mark.parametrize("frozen", list(FROZEN))
@pytest.mark.parametrize("name", helpers.ANY_TREE)
def test_frozen_leaves_get_no_gradient_no_noise_and_no_update(name: str, frozen: str) -> None:
    grads_fn = jaxdp.per_sample_grads(helpers.small_loss, trainable=FROZEN[frozen])
    tx = optax.chain(clip(name), jaxdp.accumulate(jaxdp.add_noise(1.0, KEY)))
    grads = grads_fn(PARAMS, helpers.small_batch(ROWS))
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, is_last=True)
    rows = grads.materialize()
    for update, per_row, group in zip(
        jax.tree.leaves(updates), jax.tree.leaves(rows), grads.groups, strict=True
    ):
        assert bool(jnp.all(update == 0)) == (group is None)
        assert bool(jnp.all(per_row == 0)) == (group is None)
    bounded, _ = clip(name).update(grads, clip(name).init(PARAMS), PARAMS)
    trained = sum(group is not None for group in grads.groups)
    assert bounded.sensitivity.size == (1 if bounded.sensitivity.ndim == 0 else trained)


def test_a_frozen_leaf_leaves_the_gradient_of_the_others_as_it_is() -> None:
    batch = helpers.small_batch(ROWS)
    rows = jaxdp.per_sample_grads(helpers.small_loss)(PARAMS, batch).materialize()
    frozen = jaxdp.per_sample_grads(helpers.small_loss, trainable={"body": False, "head": True})
    helpers.assert_trees_close(frozen(PARAMS, batch).materialize()["head"], rows["head"])


def test_masked_optimizers_work_behind_the_noise() -> None:
    mask = {"body": True, "head": False}
    tx = optax.chain(
        clip("flat"), jaxdp.add_noise(1.0, KEY), optax.masked(optax.scale(10.0), mask)
    )
    base = optax.chain(clip("flat"), jaxdp.add_noise(1.0, KEY))
    got = tx.update(handle(PARAMS), tx.init(PARAMS), PARAMS)[0]
    expected = base.update(handle(PARAMS), base.init(PARAMS), PARAMS)[0]
    helpers.assert_trees_close(got["head"], expected["head"])
    helpers.assert_trees_close(got["body"], jax.tree.map(lambda u: 10.0 * u, expected["body"]))


def test_partitioned_optimizers_work_behind_the_noise() -> None:
    split = optax.partition(
        {"train": optax.sgd(0.1, momentum=0.9), "still": optax.set_to_zero()},
        {"body": "train", "head": "still"},
    )
    tx = optax.chain(clip("per_layer"), jaxdp.accumulate(optax.chain(jaxdp.add_noise(1.0, KEY), split)))
    updates, state = jax.jit(
        lambda state: tx.update(handle(PARAMS), state, PARAMS, is_last=True)
    )(tx.init(PARAMS))
    assert bool(jnp.all(updates["head"] == 0))
    assert all(bool(jnp.all(leaf != 0)) for leaf in jax.tree.leaves(updates["body"]))
    assert helpers.structure(state) == helpers.structure(tx.init(PARAMS))


def test_adam_trains_behind_the_noise() -> None:
    # optax.adam computes float ** int, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.chain(clip("flat"), jaxdp.add_noise(1.0, KEY), optax.adam(1e-2))
        step = jax.jit(step_of(tx))
        carry = (PARAMS, tx.init(PARAMS))
        for seed in range(3):
            carry = step(carry, helpers.small_batch(ROWS, seed))
        assert step._cache_size() == 1
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(carry[0]))


def test_double_precision_stays_double() -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PARAMS)
        batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), helpers.small_batch(ROWS))
        for name in CLIPS:
            tx = optax.chain(clip(name), jaxdp.accumulate(jaxdp.add_noise(1.0, KEY)))
            grads = jaxdp.per_sample_grads(helpers.small_loss)(params, batch)
            updates, state = tx.update(grads, tx.init(params), params, is_last=True)
            assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {np.dtype(np.float64)}
            assert helpers.structure(state) == helpers.structure(tx.init(params))
