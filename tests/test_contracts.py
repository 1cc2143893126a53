"""The contracts that every transformation keeps, whichever clip, allocation or tree."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false

import functools
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

# A part with the oldest JAX, another with newer ones (tests/conftest.py).
pytestmark = pytest.mark.sweep

ROWS = 5
STEPS = 3


def clip(name: str) -> Transformation:
    return CLIPS[name](THRESHOLDS)


def falling(step: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.float32(step))


# Whole chains, from per-sample gradients to updates.
CHAINS: Mapping[str, Callable[[], Transformation]] = {
    **{name: lambda name=name: helpers.private(clip(name)) for name in CLIPS},
    "noise_per_layer": lambda: helpers.private(clip("per_layer"), allocation="per_layer"),
    "noise_optimal": lambda: helpers.private(clip("by_group"), allocation="optimal"),
    "noise_coefficients": lambda: helpers.private(clip("per_layer"), allocation=(1.0, 2.0, 0.5)),
    "schedules": lambda: optax.chain(
        clip("flat_schedule"),
        jaxdp.add_noise(falling, KEY),
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
}

chains = pytest.mark.parametrize("chain", list(CHAINS))
clips = pytest.mark.parametrize("name", list(CLIPS))


def step_of(tx: Transformation) -> Callable[[Any, Any], Any]:
    """One training step, as a user writes it."""
    grads_fn = jaxdp.per_sample_grads(helpers.small_loss)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads_fn(params, batch), state, params, is_last=True)
        return optax.apply_updates(params, updates), state

    return step


BATCHES = [helpers.small_batch(ROWS, seed) for seed in range(STEPS)]


@functools.cache
def trained(chain: str) -> tuple[list[Any], int]:
    """(parameters, state) before and after each step under jit, and how often it compiled."""
    tx = CHAINS[chain]()
    step = jax.jit(step_of(tx))
    history = [(PARAMS, tx.init(PARAMS))]
    for batch in BATCHES:
        history.append(step(history[-1], batch))
    return history, step._cache_size()


@chains
def test_the_state_keeps_its_structure_shapes_and_dtypes_over_steps(chain: str) -> None:
    history, _ = trained(chain)
    for carry in history[1:]:
        assert jax.tree.structure(carry) == jax.tree.structure(history[0])
        assert helpers.structure(carry) == helpers.structure(history[0])


@chains
def test_the_second_step_does_not_compile_again(chain: str) -> None:
    assert trained(chain)[1] == 1


@chains
def test_init_works_on_shapes_alone(chain: str) -> None:
    tx = CHAINS[chain]()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    assert helpers.structure(tx.init(shapes)) == helpers.structure(tx.init(PARAMS))
    assert helpers.structure(jax.eval_shape(tx.init, PARAMS)) == helpers.structure(tx.init(PARAMS))


@chains
def test_eager_computes_what_jit_computes(chain: str) -> None:
    tx = CHAINS[chain]()
    grads = helpers.small_grads(ROWS)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, is_last=True)
    eager = (optax.apply_updates(PARAMS, updates), state)
    helpers.assert_trees_close(eager, trained(chain)[0][1], rtol=1e-5, atol=1e-5)


# One chain for each kind of state: the clips that are left out differ in their rule alone.
LOOPS = ("flat", "schedules", "adaptive_per_layer", "noise_optimal", "accumulate_adaptive")


@pytest.mark.parametrize("chain", LOOPS)
def test_a_training_loop_in_scan_equals_one_in_python(chain: str) -> None:
    tx = CHAINS[chain]()

    # The cond skips every second entry: a step inside cond is a step, a skipped one is none.
    def body(carry: Any, entry: Any) -> tuple[Any, None]:
        run, batch = entry
        return jax.lax.cond(run, lambda: step_of(tx)(carry, batch), lambda: carry), None

    run = jnp.tile(jnp.array([True, False]), STEPS)
    twice = [batch for batch in BATCHES for _ in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *twice)
    scanned, _ = jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), (run, stacked))
    helpers.assert_trees_close(scanned, trained(chain)[0][-1], rtol=1e-5, atol=1e-5)


@functools.cache
def clipped(name: str, kind: str) -> Callable[[Any, jax.Array], Any]:
    """Compiled `(batch, mask) -> (Bounded, state)`."""
    tx = clip(name)

    def update(batch: Any, mask: jax.Array) -> Any:
        size = 2 if kind == "microbatches" else None
        grads_fn = jaxdp.per_sample_grads(helpers.small_loss, microbatch_size=size)
        return tx.update(grads_fn(PARAMS, batch, mask), tx.init(PARAMS), PARAMS)

    return jax.jit(update)


EVERYONE = jnp.ones(ROWS, bool)
SOME = jnp.array([True, False, True, True, False])


def kinds(name: str) -> tuple[str, ...]:
    """Microbatches for one clip of each rule; test_per_sample.py has every size of them."""
    both = name in ("flat", "per_layer_tree", "automatic_per_layer", "adaptive_per_layer")
    return ("whole", "microbatches") if both else ("whole",)


@pytest.mark.parametrize("name", [name for name in CLIPS if len(kinds(name)) > 1])
def test_microbatches_give_the_sums_of_the_whole_batch(name: str) -> None:
    for mask in (EVERYONE, SOME):
        whole = clipped(name, "whole")(BATCHES[0], mask)
        helpers.assert_trees_close(clipped(name, "microbatches")(BATCHES[0], mask), whole)


@clips
def test_the_bare_output_of_vmap_grad_is_accepted(name: str) -> None:
    tx, rows = clip(name), helpers.small_grads(ROWS)
    got = tx.update(rows, tx.init(PARAMS), PARAMS)
    helpers.assert_trees_close(got, clipped(name, "whole")(BATCHES[0], EVERYONE))
    helpers.assert_trees_equal(tx.update(rows, tx.init(PARAMS)), got)


@clips
def test_masked_rows_count_for_nothing_whatever_they_hold(name: str) -> None:
    x, y = BATCHES[0]
    # The sum over the kept rows alone, in a batch of their number.
    tx, rows = clip(name), helpers.small_grads(ROWS)
    kept = jax.tree.map(lambda leaf: leaf[SOME], rows)
    expected = tx.update(kept, tx.init(PARAMS), PARAMS)
    for garbage in (0.0, 1e30, jnp.inf, jnp.nan):
        batch = (jnp.where(SOME[:, None], x, garbage), jnp.where(SOME, y, garbage))
        for kind in kinds(name):
            helpers.assert_trees_close(clipped(name, kind)(batch, SOME), expected)


@clips
def test_a_batch_without_samples_sums_to_zero_with_the_same_sensitivity(name: str) -> None:
    for kind in kinds(name):
        full, _ = clipped(name, kind)(BATCHES[0], EVERYONE)
        empty, _ = clipped(name, kind)(BATCHES[0], ~EVERYONE)
        helpers.assert_trees_equal(empty.value, jax.tree.map(jnp.zeros_like, PARAMS))
        helpers.assert_trees_equal(empty.sensitivity, full.sensitivity)


@clips
def test_rows_are_clipped_one_by_one(name: str) -> None:
    """The sum of the batch is the sum of what each row gives alone."""
    alone = [clipped(name, "whole")(BATCHES[0], jnp.arange(ROWS) == row)[0] for row in range(ROWS)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *[one.value for one in alone])
    together, _ = clipped(name, "whole")(BATCHES[0], EVERYONE)
    helpers.assert_trees_close(together.value, total)


@pytest.mark.parametrize("tree", list(TREES))
def test_every_kind_of_parameters_trains(tree: str) -> None:
    params, batch = TREES[tree], jnp.array([0.5, -1.0, 2.0])
    # The clip that has the most to do with the tree: a state and a threshold for every leaf.
    tx = optax.chain(clip("adaptive_per_layer"), jaxdp.accumulate(jaxdp.add_noise(1.0, KEY)))
    grads_fn = jaxdp.per_sample_grads(helpers.tree_loss)

    @jax.jit
    def update(state: Any) -> Any:
        return tx.update(grads_fn(params, batch), state, params, is_last=True)

    updates, state = update(tx.init(params))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert helpers.structure(state) == helpers.structure(tx.init(params))
    for got, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert (got.shape, got.dtype) == (param.shape, param.dtype)
        moved = helpers.is_float(param) and param.size > 0
        assert bool(np.any(np.asarray(got) != 0)) == moved
    new = optax.apply_updates(params, updates)
    assert helpers.structure(new) == helpers.structure(params)


@pytest.mark.parametrize("name", helpers.ANY_TREE)
def test_bfloat16_parameters_sum_in_float32_and_keep_their_dtype(name: str) -> None:
    params = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(2)}
    # Standard promotion: sums in float32 mix with a bfloat16 parameter on purpose.
    with jax.numpy_dtype_promotion("standard"):
        grads = jaxdp.per_sample_grads(helpers.tree_loss)(params, jnp.array([0.5, -1.0]))
        tx = clip(name)
        bounded, _ = tx.update(grads, tx.init(params), params)
        assert bounded.value["half"].dtype == jnp.float32
        chain = helpers.private(tx)
        updates, state = chain.update(grads, chain.init(params), params)
        assert updates["half"].dtype == jnp.bfloat16
        assert helpers.structure(state) == helpers.structure(chain.init(params))


@pytest.mark.parametrize(
    "trainable", [{"body": False, "head": True}, {"body": True, "head": False}]
)
@pytest.mark.parametrize("name", helpers.ANY_TREE)
def test_frozen_leaves_get_no_gradient_no_noise_and_no_update(name: str, trainable: Any) -> None:
    grads_fn = jaxdp.per_sample_grads(helpers.small_loss, trainable=trainable)
    tx = optax.chain(clip(name), jaxdp.accumulate(jaxdp.add_noise(1.0, KEY)))

    @jax.jit
    def update(state: Any) -> Any:
        grads = grads_fn(PARAMS, BATCHES[0])
        updates, _ = tx.update(grads, state, PARAMS, is_last=True)
        bounded, _ = clip(name).update(grads, state[0], PARAMS)
        return updates, grads.materialize(), bounded

    updates, rows, bounded = update(tx.init(PARAMS))
    everything = jaxdp.per_sample_grads(helpers.small_loss)(PARAMS, BATCHES[0]).materialize()
    for part, moves in trainable.items():
        for leaf in jax.tree.leaves(updates[part]):
            assert bool(jnp.all(leaf != 0)) if moves else bool(jnp.all(leaf == 0))
        expected = everything[part] if moves else jax.tree.map(jnp.zeros_like, everything[part])
        helpers.assert_trees_close(rows[part], expected)
    trained_leaves = sum(len(jax.tree.leaves(PARAMS[part])) for part in PARAMS if trainable[part])
    assert bounded.sensitivity.size == (1 if bounded.sensitivity.ndim == 0 else trained_leaves)


def test_masked_optimizers_work_behind_the_noise() -> None:
    grads = helpers.small_grads(ROWS)
    base = optax.chain(clip("flat"), jaxdp.add_noise(1.0, KEY))
    tx = optax.chain(base, optax.masked(optax.scale(10.0), {"body": True, "head": False}))
    got = tx.update(grads, tx.init(PARAMS), PARAMS)[0]
    expected = base.update(grads, base.init(PARAMS), PARAMS)[0]
    helpers.assert_trees_close(got["head"], expected["head"])
    helpers.assert_trees_close(got["body"], jax.tree.map(lambda u: 10.0 * u, expected["body"]))


def test_partitioned_optimizers_work_behind_the_noise() -> None:
    rules = {"train": optax.sgd(0.1, momentum=0.9), "still": optax.set_to_zero()}
    inner = optax.chain(
        jaxdp.add_noise(1.0, KEY), optax.partition(rules, {"body": "train", "head": "still"})
    )
    tx = optax.chain(clip("per_layer"), jaxdp.accumulate(inner))
    grads = helpers.small_grads(ROWS)
    updates, state = jax.jit(lambda s: tx.update(grads, s, PARAMS, is_last=True))(tx.init(PARAMS))
    assert bool(jnp.all(updates["head"] == 0))
    assert all(bool(jnp.all(leaf != 0)) for leaf in jax.tree.leaves(updates["body"]))
    assert helpers.structure(state) == helpers.structure(tx.init(PARAMS))


def test_adam_trains_behind_the_noise() -> None:
    # optax.adam computes float ** int, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.chain(clip("flat"), jaxdp.add_noise(1.0, KEY), optax.adam(1e-2))
        step = jax.jit(step_of(tx))
        carry = (PARAMS, tx.init(PARAMS))
        for batch in BATCHES:
            carry = step(carry, batch)
        assert step._cache_size() == 1
        # Adam moves every entry by about the learning rate at each step.
        moved = jax.tree.map(lambda new, old: jnp.max(jnp.abs(new - old)), carry[0], PARAMS)
        assert all(0.005 < float(leaf) < 0.05 for leaf in jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ["per_layer", "adaptive_per_layer"])
def test_double_precision_stays_double(name: str) -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
        rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), helpers.small_grads(ROWS))
        tx = optax.chain(clip(name), jaxdp.accumulate(jaxdp.add_noise(1.0, KEY)))
        update = jax.jit(lambda s: tx.update(rows, s, params, is_last=True))
        updates, state = update(tx.init(params))
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {np.dtype(np.float64)}
        assert helpers.structure(state) == helpers.structure(tx.init(params))
        update(state)
        assert update._cache_size() == 1
