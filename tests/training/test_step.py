"""The train state and the jitted step."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import jaxdp
from jaxdp import training
from jaxdp.recipes import classify, models
from jaxdp.released import executed_noise_multipliers

EXAMPLES = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
KEY = jax.random.key(5)

Chain = optax.GradientTransformationExtraArgs


def loss_fn(params: dict[str, jax.Array], example: jax.Array) -> jax.Array:
    return (example @ params["w"] + params["b"]) ** 2


def new_params() -> dict[str, jax.Array]:
    return {"w": jnp.arange(1.0, 4.0), "b": jnp.ones(())}


def chain(sigma: Any = 1.5, key: jax.Array = KEY, **options: Any) -> Chain:
    inner = optax.chain(jaxdp.add_noise(sigma, key, **options), optax.sgd(0.1, momentum=0.9))
    return optax.chain(jaxdp.clip_per_layer(1.0), jaxdp.accumulate(inner))


def adaptive(key: jax.Array = KEY) -> Chain:
    clip = jaxdp.clip_adaptive(1.0, key=key, count_noise_multiplier=6.0, expected_batch_size=4.0)
    return optax.chain(clip, jaxdp.accumulate(jaxdp.add_noise(1.5, key)), optax.sgd(0.1))


def made(tx: Chain) -> tuple[training.Step, training.TrainState]:
    step = training.make_step(jaxdp.per_sample_grads(loss_fn), tx)
    return step, training.init(new_params(), tx)


def mask(*rows: int) -> np.ndarray:
    return np.isin(np.arange(len(EXAMPLES)), rows)


ALL = mask(*range(6))


def test_the_update_is_that_of_the_chain() -> None:
    tx = chain()
    step, state = made(tx)

    @jax.jit
    def by_hand(params: Any) -> Any:
        grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, EXAMPLES)
        updates, _ = tx.update(grads, tx.init(params), params, is_last=True)
        return optax.apply_updates(params, updates)

    expected = by_hand(new_params())
    state, _ = step.run(state, EXAMPLES, ALL, True)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5), state.params, expected
    )


def test_only_the_last_part_of_a_logical_batch_is_a_step() -> None:
    step, state = made(chain())
    before = jax.device_get(state.params)
    for is_last, count in [(False, 0), (False, 0), (True, 1), (False, 1), (True, 2)]:
        state, metrics = step.run(state, EXAMPLES, ALL, is_last)
        assert state.step.dtype == jnp.int32 and int(state.step) == count
        assert metrics.noise_steps.tolist() == [count]
        moved = not np.array_equal(state.params["w"], before["w"])
        assert moved == (count > 0)  # nothing is released before the end


def test_what_a_step_reports() -> None:
    step, state = made(chain())
    batch = EXAMPLES.copy()
    batch[1] = np.nan  # masked: counts for nothing, nowhere
    batch[2] = 1e30  # its gradient overflows
    _, metrics = step.run(state, batch, mask(0, 2, 4), True)
    assert (int(metrics.samples), int(metrics.nonfinite)) == (3, 1)
    _, metrics = step.run(training.init(new_params(), chain()), batch, mask(0, 4), True)
    losses = [float(loss_fn(new_params(), jnp.asarray(batch[row]))) for row in (0, 4)]
    assert (int(metrics.samples), int(metrics.nonfinite)) == (2, 0)
    np.testing.assert_allclose(metrics.loss_sum, sum(losses), rtol=1e-6)


def test_the_state_that_is_given_is_consumed_but_what_the_user_holds_survives() -> None:
    params, key = new_params(), jax.random.key(11)
    tx = adaptive(key)  # one key in two states: donating it twice would fail
    step = training.make_step(jaxdp.per_sample_grads(loss_fn), tx)
    for _ in range(2):  # a second run from the same pieces
        first = training.init(params, tx)
        state, _ = step.run(first, EXAMPLES, ALL, True)
        state, _ = step.run(state, EXAMPLES, ALL, True)
        assert first.params["w"].is_deleted()
    np.testing.assert_array_equal(params["w"], new_params()["w"])
    assert jax.random.key_data(key).tolist() == jax.random.key_data(jax.random.key(11)).tolist()


def test_every_sample_of_every_physical_batch_gets_a_key_of_its_own() -> None:
    def loss_and_key(params: Any, example: Any) -> tuple[jax.Array, jax.Array]:
        row, key = example
        return loss_fn(params, row), jax.random.bits(key)

    seen: list[int] = []
    keyed = jaxdp.per_sample_grads(loss_and_key, has_aux=True)

    def grads_fn(params: Any, batch: Any, mask: jax.Array) -> Any:
        grads = keyed(params, batch, mask)
        jax.debug.callback(lambda bits: seen.extend(bits.tolist()), grads.aux)
        return grads

    step = training.make_step(grads_fn, chain(), example_keys=True)

    def three_parts(key: jax.Array) -> list[int]:
        seen.clear()
        state = training.init(new_params(), chain(), key)
        for is_last in (False, True, True):
            state, _ = step.run(state, EXAMPLES, ALL, is_last)
        jax.effects_barrier()
        return list(seen)

    first = three_parts(jax.random.key(1))
    assert len(set(first)) == 3 * len(EXAMPLES)
    assert three_parts(jax.random.key(1)) == first
    assert not set(three_parts(jax.random.key(2))) & set(first)


def test_asking_for_the_noise_consumes_nothing() -> None:
    step, state = made(adaptive())
    step.noise_multipliers(state, EXAMPLES)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(state.step) == 0


@pytest.mark.anew
def test_it_compiles_once() -> None:
    step, state = made(adaptive())
    for index in range(6):
        step.noise_multipliers(state, EXAMPLES)
        rows = mask(*range(index))
        state, _ = step.run(state, EXAMPLES + np.float32(index), rows, index % 3 == 2)
    assert step.run._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
    assert step.noise_multipliers._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


# Chain -> the noise multipliers of steps 0, 1, 2.
RELEASES: dict[str, tuple[Chain, list[list[float]]]] = {
    "schedule": (chain(lambda step: 2.0 / (1 + step.astype(float))), [[2.0], [1.0], [2 / 3]]),
    "per layer": (chain(1.1, allocation="per_layer"), [[1.1 / 2**0.5]] * 3),
    "adaptive": (adaptive(), [[6.0, 1.5]] * 3),
    "without accumulation": (
        optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(0.7, KEY), optax.sgd(0.1)),
        [[0.7]] * 3,
    ),
}


@pytest.mark.parametrize(("tx", "expected"), RELEASES.values(), ids=RELEASES.keys())
def test_the_noise_that_is_announced_is_the_noise_that_is_drawn(
    tx: Chain, expected: list[list[float]]
) -> None:
    step, state = made(tx)
    for want in expected:
        announced = step.noise_multipliers(state, EXAMPLES)
        np.testing.assert_allclose(announced, want, rtol=1e-6)
        state, _ = step.run(state, EXAMPLES, ALL, True)
        drawn = executed_noise_multipliers(state.opt_state)
        np.testing.assert_array_equal(announced, jnp.stack(drawn))


def test_the_announced_noise_does_not_depend_on_the_rows() -> None:
    step, state = made(adaptive())
    nothing = np.full_like(EXAMPLES, np.nan)
    np.testing.assert_array_equal(
        step.noise_multipliers(state, EXAMPLES), step.noise_multipliers(state, nothing)
    )


def test_a_chain_without_noise_is_refused() -> None:
    step, state = made(optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(_strip())))
    with pytest.raises(ValueError, match="Put jaxdp.add_noise"):
        step.noise_multipliers(state, EXAMPLES)


def _strip() -> optax.GradientTransformation:
    """Takes the value out of a Bounded: what nobody should do."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates.value, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("params", [new_params(), jnp.zeros(3)], ids=["dict", "array"])
@pytest.mark.parametrize("behind", [(), (optax.identity(),)], ids=["alone", "with another"])
def test_a_chain_whose_counts_alone_have_noise_has_none(params: Any, behind: Any) -> None:
    """An adaptive clip draws noise, but none for the gradients."""
    clip = jaxdp.clip_adaptive(1.0, key=KEY, count_noise_multiplier=6.0, expected_batch_size=4.0)
    tx = optax.chain(clip, *behind)
    loss: Any = loss_fn if isinstance(params, dict) else lambda params, x: params @ x
    step, state = training.make_step(jaxdp.per_sample_grads(loss), tx), training.init(params, tx)
    for ask in (
        lambda: step.noise_multipliers(state, EXAMPLES),
        lambda: step.run(state, EXAMPLES, ALL, True),
    ):
        with pytest.raises(ValueError, match="^the chain must draw noise to be private, got neith"):
            ask()


@pytest.mark.anew
@pytest.mark.optimized
def test_announcing_the_noise_costs_next_to_nothing() -> None:
    model = models.build("tanh-cnn", (28, 28, 1), 10)
    clip = jaxdp.clip_adaptive(0.1, key=KEY, count_noise_multiplier=6.0, expected_batch_size=8.0)
    noise = jaxdp.add_noise(lambda step: 1.0 + step.astype(float), KEY)
    tx = optax.chain(clip, jaxdp.accumulate(optax.chain(noise, optax.sgd(0.1, momentum=0.9))))
    step = training.make_step(jaxdp.per_sample_grads(classify.cross_entropy(model)), tx)
    state = jax.eval_shape(lambda: training.init(model.init(KEY), tx))
    batch = (np.zeros((8, 28, 28, 1), np.float32), np.zeros(8, np.int32))

    def flops(stage: Any) -> float:
        return stage.cost_analysis().get("flops", 0.0)

    whole = flops(step.run.lower(state, batch, np.ones(8, bool), True))  # pyright: ignore[reportFunctionMemberAccess]
    asked = step.noise_multipliers.lower(state, batch)  # pyright: ignore[reportFunctionMemberAccess]
    assert whole > 1e6
    assert flops(asked.compile()) < 1e-4 * whole


def test_init_makes_a_state_of_stable_shapes() -> None:
    step, state = made(adaptive())
    after = jax.eval_shape(step.run, state, EXAMPLES, ALL, True)[0]
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


def test_bounded_gradients_train_without_a_clip() -> None:
    tx = optax.chain(
        jaxdp.accumulate(jaxdp.add_noise(1.5, KEY, "per_layer")), optax.sgd(0.1)
    )
    grads_fn = jaxdp.lipschitz.bounded_grads(
        lambda params, x: jnp.tanh(loss_fn(params, x)), 2.0, with_losses=True
    )
    step = training.make_step(grads_fn, tx)
    state = training.init(new_params(), tx)
    examples = np.where(np.arange(6)[:, None] == 1, np.nan, EXAMPLES).astype(np.float32)
    sigmas = step.noise_multipliers(state, examples)
    assert sigmas.tolist() == pytest.approx([1.5 / 2**0.5])
    state, metrics = step.run(state, examples, mask(0, 1, 2), True)
    assert (int(metrics.samples), int(metrics.nonfinite), int(state.step)) == (3, 1, 1)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.params))


# What follows the noise and moves parameters by themselves.
DECAYS = {
    "adamw": optax.adamw(0.1, weight_decay=0.5),
    "decayed weights": optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)),
    "lion": optax.lion(0.1, weight_decay=0.5),
    "signs": optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.sign_sgd(0.1)),
}


@pytest.mark.parametrize("clip", [jaxdp.clip_flat(1.0), jaxdp.clip_per_layer(1.0)])
@pytest.mark.parametrize("decay", DECAYS)
def test_frozen_leaves_stay_whatever_stands_behind_the_noise(decay: str, clip: Chain) -> None:
    params = {"w": jnp.arange(1.0, 4.0), "b": jnp.ones(()), "base": {"k": jnp.array([2.0, -3.0])}}
    tx = optax.chain(clip, jaxdp.accumulate(optax.chain(jaxdp.add_noise(1.0, KEY), DECAYS[decay])))
    trainable = {"w": True, "b": False, "base": False}
    step = training.make_step(jaxdp.per_sample_grads(loss_fn, trainable=trainable), tx)
    state = training.init(params, tx)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            state, _ = step.run(state, EXAMPLES, ALL, True)
    assert not np.any(np.asarray(state.params["w"]) == params["w"])
    for name in ("b", "base"):
        jax.tree.map(np.testing.assert_array_equal, state.params[name], params[name])


def test_integers_stay() -> None:
    params = {**new_params(), "count": jnp.array(3), "flag": jnp.array(True)}
    behind = optax.chain(jaxdp.add_noise(1.0, KEY), optax.add_decayed_weights(0.9), optax.sgd(0.5))
    tx = optax.chain(jaxdp.clip_flat(1.0), behind)
    step = training.make_step(jaxdp.per_sample_grads(loss_fn), tx)
    with jax.numpy_dtype_promotion("standard"):
        state, _ = step.run(training.init(params, tx), EXAMPLES, ALL, True)
    assert int(state.params["count"]) == 3 and bool(state.params["flag"])
    assert state.params["count"].dtype == jnp.int32


def test_bounded_gradients_leave_frozen_leaves_alone() -> None:
    behind = optax.chain(jaxdp.add_noise(1.5, KEY), optax.add_decayed_weights(0.5), optax.sgd(0.1))
    grads_fn = jaxdp.lipschitz.bounded_grads(
        lambda params, x: jnp.tanh(loss_fn(params, x)),
        2.0,
        with_losses=True,
        trainable={"w": True, "b": False},
    )
    step = training.make_step(grads_fn, behind)
    state, _ = step.run(training.init(new_params(), behind), EXAMPLES, ALL, True)
    assert float(state.params["b"]) == 1.0 and float(state.params["w"][0]) != 1.0


def test_a_loop_of_ones_own_keeps_frozen_leaves_by_a_mask() -> None:
    """As the documentation of `trainable` says."""
    params, frozen = new_params(), {"w": False, "b": True}
    tx: Any = optax.chain(
        jaxdp.clip_flat(1.0),
        jaxdp.add_noise(1.0, KEY),
        optax.adamw(0.1, weight_decay=0.5),
        optax.masked(optax.set_to_zero(), frozen),
    )
    grads_fn = jaxdp.per_sample_grads(loss_fn, trainable={"w": True, "b": False})
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(grads_fn(params, EXAMPLES), tx.init(params), params)
    moved: Any = optax.apply_updates(params, updates)
    assert float(moved["b"]) == 1.0 and float(moved["w"][0]) != 1.0


def test_updates_of_another_shape_are_refused() -> None:
    """A branch without clip and noise would hand over the rows of single samples."""

    def rows(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), updates)

    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, KEY), optax.stateless(rows))
    step, state = made(tx)
    with pytest.raises(ValueError, match=r"shape of its parameter, got \(6,\) for b of shape \(\)"):
        step.run(state, EXAMPLES, ALL, True)


@pytest.mark.parametrize("plain", ["w", "b"])
@pytest.mark.parametrize("given", [False, True])
def test_nothing_goes_past_a_clip_or_ahead_of_it(plain: str, given: bool) -> None:
    """Not from a handle; arrays become one."""

    def grads_fn(params: Any, batch: Any, mask: Any) -> Any:
        if not given:
            return jaxdp.per_sample_grads(loss_fn)(params, batch, mask)
        rows = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        return jaxdp.PerSampleGrads.from_arrays(rows, mask)

    private = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, KEY), optax.sgd(0.1))
    labels = {name: "plain" if name == plain else "dp" for name in ("w", "b")}
    chains = [
        optax.partition({"plain": optax.identity(), "dp": private}, labels),
        optax.masked(private, {name: name != plain for name in ("w", "b")}),
        optax.chain(optax.clip_by_global_norm(1.0), private),
        optax.chain(optax.normalize_by_update_norm(), private),
        optax.chain(optax.trace(0.9), private),
    ]
    for tx in chains:
        step = training.make_step(grads_fn, tx)
        with pytest.raises(TypeError, match="lazy handle.*ahead of the clip.*whole") as error:
            step.run(training.init(new_params(), tx), EXAMPLES, ALL, True)
        assert "materialize" not in str(error.value)


@pytest.mark.parametrize("what", ["arrays", "Bounded"])
def test_gradients_of_another_kind_are_refused(what: str) -> None:
    def grads_fn(params: Any, batch: Any, mask: Any) -> Any:
        if what == "arrays":
            return jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        return jaxdp.Bounded(params, 1.0)

    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, KEY))
    step = training.make_step(grads_fn, tx)
    with pytest.raises(TypeError, match="grads_fn must return jaxdp.PerSampleGrads"):
        step.run(training.init(new_params(), tx), EXAMPLES, ALL, True)


class Settings(NamedTuple):
    dropout: float


# What optimizers cannot train, or should not.
NO_PARAMETERS: dict[str, tuple[Any, str]] = {
    "number": (Settings(0.1), "must be arrays, got the number 0.1 for rate/dropout"),
    "key": (jax.random.key(0), "parameters must hold no random keys, got one for rate"),
    "keys": (jax.random.split(jax.random.key(0), 3), "random keys, got one for rate"),
}


@pytest.mark.parametrize("name", NO_PARAMETERS)
def test_settings_and_keys_among_the_parameters_are_refused(name: str) -> None:
    leaf, said = NO_PARAMETERS[name]
    params = {**new_params(), "rate": leaf}
    with pytest.raises(TypeError, match=said):
        training.init(params, chain())
    with pytest.raises(TypeError, match=said):
        jaxdp.per_sample_grads(loss_fn)(params, EXAMPLES)
    with pytest.raises(TypeError, match=said):
        jaxdp.lipschitz.bounded_grads(loss_fn, 1.0)(params, EXAMPLES)


def test_the_rate_of_a_dropout_layer_is_no_parameter() -> None:
    keys = jax.random.split(KEY, 2)
    model = eqx.nn.Sequential(
        [eqx.nn.Linear(3, 2, key=keys[0]), eqx.nn.Dropout(0.1), eqx.nn.Linear(2, 1, key=keys[1])]
    )

    def loss(model: Any, example: Any) -> jax.Array:
        row, key = example
        return jnp.sum(model(row, key=key))

    batch = (jnp.asarray(EXAMPLES), jax.random.split(KEY, 6))
    with pytest.raises(TypeError, match="got the number 0.1 for layers/1/p.*eqx.partition"):
        jaxdp.per_sample_grads(loss)(model, batch)
    # Both ways that the sentence names.
    flags = jax.tree.map(eqx.is_inexact_array, model)
    frozen = jaxdp.per_sample_grads(loss, trainable=flags)(model, batch)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    apart = jaxdp.per_sample_grads(lambda p, example: loss(eqx.combine(p, static), example))
    np.testing.assert_array_equal(frozen.norms(), apart(params, batch).norms())


def spy(tell: Any) -> optax.GradientTransformation:
    """Behind the noise: gives what it sees to the host."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        tell(updates)
        return updates, state

    return optax.GradientTransformation(lambda params: (), update)


def in_a_branch(inner: Any) -> Any:
    """Where effects cannot be taken away from what the branch computes."""
    within = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def chosen() -> Any:
            return within.update(updates, state, params, **extra)

        return jax.lax.cond(jnp.sum(params) < jnp.inf, chosen, chosen)

    return optax.GradientTransformationExtraArgs(inner.init, update)


BATCH, PRESENT = jnp.zeros((4, 3)).at[1, 0].set(7.0), jnp.ones(4, bool)


def asked_and_executed(tx: Any, accumulates: bool) -> list[float]:
    """Asks before a step, asks amid its batch where it accumulates, and executes it."""
    grads_fn = jaxdp.per_sample_grads(lambda params, x: 0.5 * (params @ x - 1) ** 2)
    step, state = training.make_step(grads_fn, tx), training.init(jnp.zeros(3), tx)
    announced = step.noise_multipliers(state, BATCH).tolist()
    if accumulates:
        state, _ = step.run(state, BATCH, PRESENT, False)
    assert step.noise_multipliers(state, BATCH).tolist() == announced
    step.run(state, BATCH, PRESENT, True)
    jax.effects_barrier()
    return announced


@pytest.mark.parametrize("accumulates", [False, True])
def test_what_stands_behind_the_noise_never_sees_the_coming_noise_alone(accumulates: bool) -> None:
    """The question which noise is coming runs what the noise comes out of, with its effects: the
    noise of the coming step, and later the same noise with the sum, would tell the sum."""
    seen: list[np.ndarray] = []

    def tell(updates: Any) -> None:
        jax.debug.callback(lambda values: seen.append(np.array(values)), updates)

    noise = in_a_branch(optax.chain(jaxdp.add_noise(5.0, KEY), spy(tell)))
    behind = optax.chain(noise, optax.sgd(0.1))
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(behind) if accumulates else behind)
    assert asked_and_executed(tx, accumulates) == [5.0]
    first, asked, executed = (values.astype(np.float64) for values in seen)
    total = np.array([-2.0 if accumulates else -1.0, 0.0, 0.0])
    assert np.max(np.abs(asked - (executed - total))) > 1
    np.testing.assert_array_equal(asked, first)  # whatever sums the state holds


def test_what_stands_around_an_adaptive_clip_never_sees_its_counts() -> None:
    """Twice the same noise, amid a batch, with other counts of samples."""
    seen: list[np.ndarray] = []
    clip: Any = jaxdp.clip_adaptive(
        1e-3, key=KEY, count_noise_multiplier=6.0, expected_batch_size=4.0
    )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        bounded, state = clip.update(updates, state, params, **extra)
        jax.debug.callback(lambda value: seen.append(np.array(value)), state.thresholds)
        return bounded, state

    told = in_a_branch(optax.GradientTransformationExtraArgs(clip.init, update))
    tx = optax.chain(told, jaxdp.accumulate(jaxdp.add_noise(5.0, KEY)))
    assert asked_and_executed(tx, True) == [6.0, 5.0]
    first, _, asked, executed = seen  # the second one amid the batch, where nothing moves
    np.testing.assert_array_equal(asked, first)
    assert executed != asked


def to_the_host(seen: list[Any]) -> dict[str, Any]:
    """What users do with what they want to see."""

    def note(*values: Any) -> None:
        seen.append(values)

    def counted(values: Any) -> Any:
        seen.append(values)
        return np.float32(0.0)

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return {
        "callback": lambda updates: jax.debug.callback(note, updates),
        "ordered callback": lambda updates: jax.debug.callback(note, updates, ordered=True),
        "io": lambda updates: io_callback(counted, scalar, updates),
        "ordered io": lambda updates: io_callback(counted, scalar, updates, ordered=True),
        "pure": lambda updates: jax.pure_callback(counted, scalar, updates),
        "jitted": jax.jit(lambda updates: jax.debug.callback(note, updates)),
    }


@pytest.mark.parametrize("how", to_the_host([]))
def test_what_stands_behind_the_noise_runs_once_for_a_step(how: str) -> None:
    """A counter, a log or a plot of the user's tells of steps, not of questions."""
    seen: list[Any] = []
    behind = [jaxdp.add_noise(5.0, KEY), spy(to_the_host(seen)[how]), optax.sgd(0.1)]
    assert asked_and_executed(optax.chain(jaxdp.clip_flat(1.0), *behind), False) == [5.0]
    assert len(seen) == (how != "pure")  # of which JAX itself knows that nobody needs it


def test_a_schedule_that_asks_the_host_is_asked() -> None:
    """The noise does depend on it."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def sigma(step: jax.Array) -> Any:
        return io_callback(lambda step: np.float32(2 + step), scalar, step)

    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(sigma, KEY))
    step, state = made(tx)
    for expected in (2.0, 3.0):
        assert step.noise_multipliers(state, EXAMPLES).tolist() == [expected]
        state, _ = step.run(state, EXAMPLES, ALL, True)
