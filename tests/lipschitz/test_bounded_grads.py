"""Gradients that need no clip: what they are, what they do with bad rows, how they are used."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import lipschitz
from tests import helpers

KEY = jax.random.key(0)
ROWS = 6


def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, label = example
    hidden = jnp.tanh(x @ params["body"]["w"] + params["body"]["b"])
    return lipschitz.softmax_cross_entropy(hidden * params["head"], label)


PARAMS = helpers.PARAMS
BATCH = (0.3 * helpers.small_batch(ROWS)[0], jnp.arange(ROWS) % 2)
GRADS_FN = jax.jit(lipschitz.bounded_grads(loss_fn, 1.0, with_losses=True))


def summed(params: Any, batch: Any) -> Any:
    """One gradient at a time."""
    examples = [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(len(batch[1]))]
    grads = [jax.grad(loss_fn)(params, example) for example in examples]
    return jax.tree.map(lambda *leaves: sum(leaves), *grads)


def test_they_are_the_sum_of_ordinary_gradients() -> None:
    bounded, losses = GRADS_FN(PARAMS, BATCH)
    helpers.assert_trees_close(bounded.value, summed(PARAMS, BATCH), rtol=1e-5)
    np.testing.assert_allclose(losses, jax.vmap(loss_fn, (None, 0))(PARAMS, BATCH), rtol=1e-6)


def test_their_sensitivity_is_the_bound_of_each_leaf() -> None:
    bounded, _ = GRADS_FN(PARAMS, BATCH)
    found = lipschitz.bounds(loss_fn, PARAMS, jax.tree.map(lambda leaf: leaf[0], BATCH), 1.0)
    assert list(found.by_name) == ["body/b", "body/w", "head"]
    np.testing.assert_allclose(bounded.sensitivity, list(found.by_name.values()), rtol=1e-6)
    assert bounded.groups == (0, 1, 2)
    assert float(bounded.total_sensitivity) == pytest.approx(float(found.total), rel=1e-5)


def moved(with_sample: Any, without: Any) -> list[float]:
    """How far each leaf of a sum moves when a sample leaves."""
    pairs = zip(jax.tree.leaves(with_sample), jax.tree.leaves(without), strict=True)
    return [float(jnp.linalg.norm((a - b).reshape(-1))) for a, b in pairs]


@pytest.mark.parametrize("size", [0.1, 1.0, 1e4, 1e30, np.inf, np.nan])
def test_no_sample_moves_the_sum_by_more_than_the_sensitivity(size: float) -> None:
    x = BATCH[0].at[2].multiply(size)
    present = jnp.ones(ROWS, bool)
    bounded, _ = GRADS_FN(PARAMS, (x, BATCH[1]), present)
    without, _ = GRADS_FN(PARAMS, (x, BATCH[1]), present.at[2].set(False))
    for distance, bound in zip(
        moved(bounded.value, without.value), bounded.sensitivity, strict=True
    ):
        assert distance <= float(bound)


def test_a_mean_over_the_samples_that_came_would_move_by_more() -> None:
    """Why the sum is divided by a constant: the test above rejects the mean."""
    # One sample pulls one way, many pull the other: leaving, it moves what the others weigh.
    x, labels = jnp.ones((ROWS, 3)) / 3**0.5, jnp.zeros(ROWS, jnp.int32).at[0].set(1)
    present = jnp.ones(ROWS, bool)

    def mean(mask: jax.Array) -> Any:
        bounded, _ = GRADS_FN(PARAMS, (x, labels), mask)
        return jax.tree.map(lambda leaf: leaf / jnp.sum(mask, dtype=jnp.float32), bounded.value)

    one = summed(PARAMS, (x[:1], labels[:1]))
    allowed = [norm / ROWS for norm in moved(one, jax.tree.map(jnp.zeros_like, one))]
    distances = moved(mean(present), mean(present.at[0].set(False)))
    assert max(d / a for d, a in zip(distances, allowed, strict=True)) > 1.5


def crowd(count: int) -> np.ndarray:
    """Lengths of samples whose sum is rounded in another way, every time, without the first."""
    ones = 2 ** int(np.log2(count // 2))
    ulp = 2.0 ** (np.log2(ones) - 23)
    head, pairs = [1, 0.5, *[1.0] * (ones - 1)], [0.51 * ulp, -1.49 * ulp] * count
    return np.array([*head, *pairs][:count], np.float32)


CROWDED = {
    "a product": lambda p, x: p @ x,
    "a look-up": lambda p, x: p.at[(x[0] > 9).astype(int)].get(mode="clip") * x[0],
    "a matrix": lambda p, x: jnp.sum(p.reshape(1, -1) @ x),
}


# Of 4,099 samples the last block is filled up.
@pytest.mark.parametrize("count", [512, 2048, 4099, 65536])
@pytest.mark.parametrize("name", list(CROWDED))
def test_no_sample_changes_how_a_large_batch_is_rounded(name: str, count: int) -> None:
    """By more than docs/rounding.md says; in one running total by 65 times its own share."""
    rows = np.zeros((count, 4), np.float32)
    rows[:, 0] = crowd(count)
    grads_fn = jax.jit(lipschitz.bounded_grads(CROWDED[name], 1.0))
    present = jnp.ones(count, bool)
    whole = grads_fn(jnp.zeros(4), rows, present)
    without = grads_fn(jnp.zeros(4), rows, present.at[0].set(False))
    (distance,) = moved(whole.value, without.value)
    assert distance <= (1 + 2 * 512**2 * 2**-24 + 2 * count * 2**-24) * whole.sensitivity[0] < 1.05


@pytest.mark.parametrize("count", [1024, 1031])
def test_blocks_of_a_large_batch_give_its_sum_and_its_losses(count: int) -> None:
    rows = jnp.sin(jnp.arange(3.0 * count)).reshape(count, 3) / 2
    batch, mask = (rows, jnp.arange(count) % 2), jnp.arange(count) % 5 != 1
    bounded, losses = GRADS_FN(PARAMS, batch, mask)

    def expected(params: Any) -> Any:
        each = jnp.where(mask, jax.vmap(loss_fn, (None, 0))(params, batch), 0)
        return jnp.sum(each), each

    gradient, each = jax.grad(expected, has_aux=True)(PARAMS)
    helpers.assert_trees_close(bounded.value, gradient, rtol=1e-4)
    np.testing.assert_allclose(losses, each, rtol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e38])
def test_masked_rows_count_for_nothing_whatever_they_hold(garbage: float) -> None:
    mask = jnp.arange(ROWS) < 3
    x = jnp.where(mask[:, None], BATCH[0], garbage)
    bounded, losses = GRADS_FN(PARAMS, (x, BATCH[1]), mask)
    few = jax.tree.map(lambda leaf: leaf[:3], BATCH)
    helpers.assert_trees_close(bounded.value, summed(PARAMS, few), rtol=1e-5)
    assert losses[3:].tolist() == [0, 0, 0]


def test_a_sample_that_is_not_finite_counts_for_nothing_and_says_so() -> None:
    x = BATCH[0].at[0, 1].set(np.nan)
    bounded, losses = GRADS_FN(PARAMS, (x, BATCH[1]))
    rest = jax.tree.map(lambda leaf: leaf[1:], BATCH)
    helpers.assert_trees_close(bounded.value, summed(PARAMS, rest), rtol=1e-5)
    assert np.isnan(losses[0]) and np.all(np.isfinite(losses[1:]))


def test_a_sample_that_is_too_long_is_scaled_down() -> None:
    x = 100 * BATCH[0]
    unit = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    bounded, _ = GRADS_FN(PARAMS, (x, BATCH[1]))
    helpers.assert_trees_close(bounded.value, summed(PARAMS, (unit, BATCH[1])), rtol=1e-4)


def test_data_that_was_prepared_is_taken_as_it_is() -> None:
    grads_fn = lipschitz.bounded_grads(loss_fn, 1.0, enforce_input_bound=False)
    mask = jnp.arange(ROWS) < 4
    enforced, _ = GRADS_FN(PARAMS, BATCH, mask)
    trusted = jax.jit(grads_fn)(PARAMS, BATCH, mask)
    helpers.assert_trees_close(trusted.value, enforced.value, rtol=1e-5)
    np.testing.assert_allclose(trusted.sensitivity, enforced.sensitivity)
    longer = jax.jit(grads_fn)(PARAMS, (100 * BATCH[0], BATCH[1]), mask)
    assert not np.allclose(longer.value["head"], trusted.value["head"])


def test_an_empty_batch_is_zero_and_keeps_its_sensitivity() -> None:
    bounded, losses = GRADS_FN(PARAMS, BATCH, jnp.zeros(ROWS, bool))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(bounded.value))
    assert float(bounded.total_sensitivity) > 0
    assert not np.any(losses)


def test_frozen_and_integer_leaves_take_no_part() -> None:
    params = {**PARAMS, "count": jnp.arange(3)}
    frozen = {"body": {"b": False, "w": True}, "head": True, "count": True}
    bounded = lipschitz.bounded_grads(loss_fn, 1.0, trainable=frozen)(params, BATCH)
    # Leaves in order: body.b, body.w, count, head.
    assert bounded.groups == (None, 0, None, 1)
    assert not np.any(bounded.value["body"]["b"]) and not np.any(bounded.value["count"])
    found = lipschitz.bounds(loss_fn, params, (BATCH[0][0], BATCH[1][0]), 1.0, trainable=frozen)
    assert list(found.by_name) == ["body/w", "head"]
    assert float(found.sensitivity["body"]["b"]) == 0


@pytest.mark.parametrize("allocation", ["global", "per_layer", "optimal", (1.0, 2.0, 0.5)])
def test_they_go_into_a_chain_without_a_clip(allocation: Any) -> None:
    tx = optax.chain(jaxdp.add_noise(0.5, KEY, allocation), optax.sgd(0.1))
    grads_fn = lipschitz.bounded_grads(loss_fn, 1.0)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(grads_fn(params, BATCH), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(PARAMS, tx.init(PARAMS))
    assert helpers.structure(params) == helpers.structure(PARAMS)
    assert not helpers.any_equal(params, PARAMS)


def test_noise_follows_the_bound_of_the_weights_as_they_are() -> None:
    tx = jaxdp.add_noise(1.0, KEY)
    large = {**PARAMS, "head": 10 * PARAMS["head"]}

    def noise(params: Any) -> jax.Array:
        empty, _ = GRADS_FN(params, BATCH, jnp.zeros(ROWS, bool))
        noised: Any = tx.update(empty, tx.init(params))[0]
        return noised["body"]["w"]

    def total(params: Any) -> jax.Array:
        return GRADS_FN(params, BATCH)[0].total_sensitivity

    ratio = total(large) / total(PARAMS)
    assert float(ratio) > 3
    np.testing.assert_allclose(noise(large), ratio * noise(PARAMS), rtol=1e-4)


def test_physical_batches_add_up() -> None:
    whole, _ = GRADS_FN(PARAMS, BATCH)
    first, _ = GRADS_FN(PARAMS, BATCH, jnp.arange(ROWS) < 2)
    rest, _ = GRADS_FN(PARAMS, BATCH, jnp.arange(ROWS) >= 2)
    both = first + rest
    helpers.assert_trees_close(both.value, whole.value, rtol=1e-5)
    np.testing.assert_allclose(both.sensitivity, whole.sensitivity)


def test_arguments_of_the_loss_are_public_constants() -> None:
    def scaled(params: Any, example: Any, factor: Any) -> jax.Array:
        return factor * loss_fn(params, example)

    grads_fn = lipschitz.bounded_grads(scaled, 1.0)
    once = grads_fn(PARAMS, BATCH, factor=1.0)
    twice = jax.jit(grads_fn)(PARAMS, BATCH, factor=2.0)
    np.testing.assert_allclose(twice.sensitivity, 2 * once.sensitivity, rtol=1e-5)
    helpers.assert_trees_close(twice.value, jax.tree.map(lambda g: 2 * g, once.value), rtol=1e-4)


@pytest.mark.anew
@pytest.mark.optimized
def test_no_per_sample_gradient_is_materialised() -> None:
    """The compiled step holds no array of batch times parameter."""
    wide = {"w": jnp.ones((64, 48))}
    grads_fn = lipschitz.bounded_grads(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"])), 1.0)
    text = jax.jit(grads_fn).lower(wide, jnp.ones((96, 64))).compile().as_text()
    assert text is not None
    assert "64,48]" in text and "96,64,48]" not in text and "96,48,64]" not in text


WRONG = {
    "a bound below zero": (lambda: (PARAMS, BATCH, -1.0), ValueError, "finite, >= 0, got -1"),
    "a bound that is NaN": (lambda: (PARAMS, BATCH, np.nan), ValueError, ">= 0, got nan"),
    "a bound whose square vanishes": (lambda: (PARAMS, BATCH, 1e-20), ValueError, "got 1e-20"),
    "a bound that is no number": (lambda: (PARAMS, BATCH, "1"), TypeError, "real number, got '1'"),
    "a flag for a bound": (lambda: (PARAMS, BATCH, True), TypeError, "real number, got True"),
    "a bound of none": (lambda: (PARAMS, BATCH, (1.0, None)), ValueError, "prefix of the example"),
    "one bound for input and target": (
        lambda: (PARAMS, (BATCH[0], BATCH[1].astype(jnp.float32)), 1.0),
        ValueError,
        "one number for 2 of them .0, 1.*math.inf",
    ),
    "one bound for a part of two": (
        lambda: (
            PARAMS,
            {"x": {"a": BATCH[0], "b": BATCH[0]}, "y": BATCH[1]},
            {"x": 1.0, "y": 1.0},
        ),
        ValueError,
        "one number for 2 of them .x/a, x/b",
    ),
    "bounds of another structure": (
        lambda: (PARAMS, BATCH, {"x": 1.0}),
        ValueError,
        "input_bound must be a pytree prefix of the example",
    ),
    "rows that disagree": (
        lambda: (PARAMS, (BATCH[0], BATCH[1][1:]), 1.0),
        ValueError,
        "same leading axis",
    ),
    "half precision": (
        lambda: (jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS), BATCH, 1.0),
        TypeError,
        "float32 at least.*body/b",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_arguments_are_checked(name: str) -> None:
    make, error, message = WRONG[name]
    params, batch, bound = make()
    with pytest.raises(error, match=message):
        lipschitz.bounded_grads(loss_fn, bound)(params, batch)


def test_a_loss_that_is_no_function_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        lipschitz.bounded_grads(3.0, 1.0)  # pyright: ignore[reportArgumentType]


def test_what_bounds_prints_names_leaves_and_layers() -> None:
    text = str(lipschitz.bounds(loss_fn, PARAMS, (BATCH[0][0], BATCH[1][0]), 1.0))
    lines = text.splitlines()
    assert lines[0].split() == ["leaf", "gradient"]
    assert [line.split()[0] for line in lines[1:4]] == ["body/b", "body/w", "head"]
    assert "whole gradient: at most" in lines[4]
    assert [line.split()[0] for line in lines[7:10]] == ["dot_general", "add", "mul"]
    assert all("test_bounded_grads.py" in line for line in lines[7:10])
    assert lines[11].split() == ["input", "held", "to"] and lines[12].split() == ["0", "1"]


LOOSE = {"body": {"b": np.inf, "w": 0.02}, "head": 0.05}


def test_loose_leaves_are_clipped_and_the_others_are_not() -> None:
    mixed = lipschitz.bounded_grads(loss_fn, 1.0, thresholds=LOOSE)(PARAMS, BATCH)
    plain, _ = GRADS_FN(PARAMS, BATCH)
    grads = jax.vmap(jax.grad(loss_fn), (None, 0))(PARAMS, BATCH)

    def clipped(leaf: jax.Array, threshold: float) -> np.ndarray:
        rows = np.asarray(leaf, np.float64).reshape(ROWS, -1)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        assert (norms > threshold).any()
        return (rows * np.minimum(1, threshold / norms)).sum(0).reshape(leaf.shape[1:])

    expected = {
        "body": {"b": plain.value["body"]["b"], "w": clipped(grads["body"]["w"], 0.02)},
        "head": clipped(grads["head"], 0.05),
    }
    helpers.assert_trees_close(mixed.value, expected, rtol=1e-4)
    np.testing.assert_allclose(
        mixed.sensitivity, [float(plain.sensitivity[0]), 0.02, 0.05], rtol=1e-6
    )


def test_a_threshold_above_the_bound_changes_nothing() -> None:
    mixed = lipschitz.bounded_grads(loss_fn, 1.0, thresholds=100.0)(PARAMS, BATCH)
    plain, _ = GRADS_FN(PARAMS, BATCH)
    helpers.assert_trees_close(mixed.value, plain.value, rtol=1e-5)
    np.testing.assert_allclose(mixed.sensitivity, plain.sensitivity, rtol=1e-6)


def test_a_loose_leaf_with_an_infinite_bound_trains() -> None:
    def unbounded(params: Any, example: Any) -> jax.Array:
        return loss_fn(params, example) + 1e-3 * jnp.log(jnp.abs(jnp.sum(params["head"])))

    # The logarithm may be of zero for all that intervals know.
    shifted = {**PARAMS, "head": PARAMS["head"] + 1}
    found = lipschitz.bounds(unbounded, shifted, (BATCH[0][0], BATCH[1][0]), 1.0)
    mixed = lipschitz.bounded_grads(unbounded, 1.0, thresholds=LOOSE)(shifted, BATCH)
    assert float(found.by_name["head"]) > 0.05
    assert np.all(np.isfinite(mixed.sensitivity))


@pytest.mark.parametrize("threshold", [0.0, -1.0, np.nan])
def test_a_threshold_must_be_above_zero(threshold: float) -> None:
    with pytest.raises(ValueError, match="thresholds must be"):
        lipschitz.bounded_grads(loss_fn, 1.0, thresholds=threshold)(PARAMS, BATCH)


def target_fn(params: jax.Array, example: Any) -> jax.Array:
    return lipschitz.mean_absolute_error(jnp.atleast_1d(params @ example[0]), example[1])


def test_targets_are_left_as_they_are_where_that_is_said() -> None:
    batch = (jnp.ones((1, 3)), jnp.full((1, 1), 50.0))
    grads_fn = lipschitz.bounded_grads(target_fn, (1.0, np.inf), with_losses=True)
    _, losses = grads_fn(jnp.zeros(3), batch)
    assert losses.tolist() == [50.0]
    found = lipschitz.bounds(
        target_fn, jnp.zeros(3), jax.tree.map(lambda x: x[0], batch), (1.0, 7.0)
    )
    assert found.inputs == {"0": 1.0, "1": 7.0}
    assert "1      7" in str(found)


def test_a_bound_of_zero_leaves_nothing_of_an_input() -> None:
    grads_fn = lipschitz.bounded_grads(lambda p, x: p @ x, 0.0)
    for size in (1.0, 1e-25, 1e30):
        found = grads_fn(jnp.ones(3), jnp.full((1, 3), size))
        assert not np.any(found.value) and not np.any(found.sensitivity)


def test_no_batch_at_all_is_zero_and_keeps_its_sensitivity() -> None:
    """As drawn by a sampler whose physical batch has no row."""
    bounded, losses = lipschitz.bounded_grads(loss_fn, 1.0, with_losses=True)(
        PARAMS, (BATCH[0][:0], BATCH[1][:0])
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(bounded.value))
    assert losses.shape == (0,) and float(bounded.total_sensitivity) > 0


def pole(params: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(params / x))


def drawn(params: jax.Array, key: jax.Array) -> jax.Array:
    return params @ jax.random.uniform(key, (3,))


def test_a_leaf_without_a_bound_is_refused_with_the_place_that_made_it_so() -> None:
    with pytest.raises(
        ValueError, match=r"the gradient of '' must have a bound.*div .*test_bounded"
    ):
        lipschitz.bounded_grads(pole, 1.0)(jnp.ones(3), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="div"):
        lipschitz.signal_to_noise_average(pole, jnp.ones(3), jnp.ones((2, 3)), 1.0)
    found = lipschitz.falsify(pole, jnp.ones(3), jnp.ones(3), 1.0, key=KEY, count=4, steps=1)
    assert not found.survived and "infinite, because div" in str(found)
    keys = jax.random.split(KEY, 2)
    # What holds for all parameters is known inside of compiled code, too.
    with pytest.raises(ValueError, match="bitcast_convert_type.*test_bounded_grads"):
        jax.jit(lipschitz.bounded_grads(drawn, 1.0))(jnp.ones(3), keys)


def test_a_bound_that_these_parameters_make_infinite_makes_no_step_of_infinite_length() -> None:
    """In compiled code: no number, which optimizers can be told to skip, and an infinite
    sensitivity."""
    grads_fn = jax.jit(lipschitz.bounded_grads(lambda p, x: jnp.sum(x / p), 1.0))
    fine, lost = (grads_fn(jnp.full(3, value), jnp.ones((2, 3))) for value in (1.0, 0.0))
    assert np.all(np.isfinite(fine.value)) and np.all(np.isfinite(fine.sensitivity))
    assert np.all(np.isnan(lost.value)) and np.all(np.isinf(lost.sensitivity))
    with pytest.raises(ValueError, match="must have a bound"):
        lipschitz.bounded_grads(lambda p, x: jnp.sum(x / p), 1.0)(jnp.zeros(3), jnp.ones((2, 3)))


WHOLE_NUMBERS = {
    "bytes": (lambda p, x: p @ (x.astype(jnp.float32) / 255), jnp.uint8, 3**0.5),
    "cut": (lambda p, x: p @ jnp.clip(x, 0, 9).astype(jnp.float32), jnp.int32, 9 * 3**0.5),
    "flags": (lambda p, x: p @ x.astype(jnp.float32), jnp.bool_, 3**0.5),
}


@pytest.mark.parametrize("name", list(WHOLE_NUMBERS))
def test_whole_numbers_are_bounded_by_what_their_dtype_holds(name: str) -> None:
    fun, dtype, bound = WHOLE_NUMBERS[name]
    found = lipschitz.bounds(fun, jnp.ones(3), jnp.ones(3, dtype), 1.0)
    assert float(found.total) == pytest.approx(bound, rel=1e-4)
    largest = jnp.full((1, 3), 1 if dtype == jnp.bool_ else jnp.iinfo(dtype).max, dtype)
    added = jax.jit(lipschitz.bounded_grads(fun, 1.0))(jnp.ones(3), largest)
    assert float(jnp.linalg.norm(added.value)) == pytest.approx(bound, rel=1e-4)


def test_whole_numbers_that_wrap_around_have_any_value_of_their_dtype() -> None:
    """An int32 that becomes an int8, and 0 - x of what has no sign, leave the interval."""
    for fun in (
        lambda x: jnp.clip(x, 0, 200).astype(jnp.int8),
        lambda x: jnp.zeros(3, jnp.uint8) - jnp.clip(x, 0, 1).astype(jnp.uint8),
    ):
        x = jnp.full(3, 200, jnp.int32)
        worst = float(jnp.linalg.norm(fun(x).astype(jnp.float32)))
        bound = lipschitz.bounds(
            lambda p, x, fun=fun: p @ fun(x).astype(jnp.float32), jnp.ones(3), x, 1.0
        ).total
        assert worst > 50 and worst <= float(bound)


def test_a_capped_leaf_that_is_not_used_is_noised_as_its_clip_has_it() -> None:
    """Its bound is zero, and the least threshold of a clip its sensitivity."""
    params = {"used": jnp.ones(3), "unused": jnp.ones(3)}
    grads_fn = lipschitz.bounded_grads(
        lambda params, x: params["used"] @ x + 0 * params["unused"][0], 1.0, thresholds=0.5
    )
    bounded = grads_fn(params, jnp.eye(3))
    tx = jaxdp.add_noise(1.0, jax.random.key(0), allocation="per_layer")
    released: Any
    released, _ = tx.update(bounded, tx.init(params), params)  # pyright: ignore[reportArgumentType]
    assert float(jnp.max(jnp.abs(released["unused"]))) == pytest.approx(1e-12, rel=5)
    assert bool(jnp.all(jnp.isfinite(released["used"]) & (released["unused"] != 0)))
