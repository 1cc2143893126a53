"""Chains that would take the noise apart, or hide it from the ledger."""

# optax types updates as trees of arrays, and functions by the names of their parameters.
# pyright: reportArgumentType=false
# pyright: reportOperatorIssue=false

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import training

EXAMPLES = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
ALL = np.ones(6, bool)
KEY = jax.random.key(5)


def loss_fn(params: dict[str, jax.Array], example: jax.Array) -> jax.Array:
    return (example @ params["w"] + params["b"]) ** 2


def new_params() -> dict[str, jax.Array]:
    return {"w": jnp.arange(1.0, 4.0), "b": jnp.ones(())}


def made(tx: Any) -> tuple[training.Step, training.TrainState]:
    step = training.make_step(jaxdp.per_sample_grads(loss_fn), tx)
    return step, training.init(new_params(), tx)


# Wrappers of optax around the noise alone.
AROUND: dict[str, Any] = {
    "masked": lambda noise: optax.masked(noise, {"w": True, "b": False}),
    "masked by a function": lambda noise: optax.masked(
        noise, lambda params: jax.tree.map(lambda leaf: leaf.ndim > 0, params)
    ),
    "partition": lambda noise: optax.partition(
        {"noised": noise, "not": optax.set_to_zero()}, {"w": "noised", "b": "not"}
    ),
    "partition by a function": lambda noise: optax.partition(
        {"noised": noise}, lambda params: jax.tree.map(lambda _: "noised", params)
    ),
    "MultiSteps": lambda noise: optax.MultiSteps(noise, 2).gradient_transformation(),
    "MultiSteps that skips": lambda noise: optax.MultiSteps(
        noise, 2, should_skip_update_fn=lambda *_: (jnp.bool_(False), ())
    ).gradient_transformation(),
    "apply_if_finite": lambda noise: optax.apply_if_finite(noise, 2),
    "conditionally_mask": lambda noise: optax.conditionally_mask(noise, lambda step: step > 0),
    "conditionally_transform": lambda noise: optax.conditionally_transform(
        noise, lambda step: step > 0
    ),
    "flatten": optax.flatten,
    "behind a trace": lambda noise: optax.chain(optax.trace(0.9), noise),
}


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("around", AROUND)
def test_a_wrapper_of_optax_around_the_noise_alone_is_refused(
    around: str, accumulates: bool
) -> None:
    wrapped = AROUND[around](jaxdp.add_noise(1.0, KEY))
    behind = jaxdp.accumulate(wrapped) if accumulates else wrapped
    step, state = made(optax.chain(jaxdp.clip_flat(1.0), behind, optax.sgd(0.1)))
    said = r"^the jaxdp.Bounded of a clip must come .* whole, got .*\. Put jaxdp.add_noise"
    for ask in (
        lambda: step.noise_multipliers(state, EXAMPLES),
        lambda: step.run(state, EXAMPLES, ALL, True),
    ):
        with pytest.raises(TypeError, match=said):
            ask()


@pytest.mark.parametrize("around", [around for around in AROUND if around.startswith("Multi")])
def test_several_steps_around_the_whole_chain_are_refused(around: str) -> None:
    """Ahead of the clip, samples of several batches would be averaged to one."""
    whole = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, KEY), optax.sgd(0.1))
    step, state = made(AROUND[around](whole))
    with pytest.raises(TypeError, match="a lazy handle .*Give it to a clip .*whole"):
        step.run(state, EXAMPLES, ALL, True)
    grads = jax.vmap(jax.grad(loss_fn), (None, 0))(new_params(), EXAMPLES)
    with pytest.raises(ValueError, match="per-sample gradients must have a leading sample axis"):
        AROUND[around](whole).update(grads, state.opt_state, new_params())


def test_several_steps_behind_the_noise_are_post_processing() -> None:
    """Every step releases, and is charged."""
    slow = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(jaxdp.add_noise(1.5, KEY)), slow)
    step, state = made(tx)
    for count in range(1, 5):
        before = np.asarray(state.params["w"])
        with jax.numpy_dtype_promotion("standard"):
            assert step.noise_multipliers(state, EXAMPLES).tolist() == [1.5]
            state, _ = step.run(state, EXAMPLES, ALL, True)
        assert np.array_equal(state.params["w"], before) == bool(count % 2)
        assert jaxdp.noise_draws(state.opt_state)[0][2] == count


# States that hide what they hold of another one.
def hiding(inner: Any, hide: Any, whole: bool = False) -> Any:
    """Keeps the state of `inner` as `hide` makes it of its arrays; with `whole`, after the first
    update only."""
    within = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        state = within.init(params)
        return state if whole else hide(jax.tree.leaves(state))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        treedef = jax.tree.structure(jax.eval_shape(within.init, params))
        inner_state = jax.tree.unflatten(treedef, jax.tree.leaves(state))
        updates, inner_state = within.update(updates, inner_state, params, **extra)
        return updates, hide(jax.tree.leaves(inner_state))

    return optax.GradientTransformationExtraArgs(init, update)


HIDDEN: dict[str, Any] = {
    "tuple": tuple,
    "list": list,
    "dict": lambda leaves: {str(number): leaf for number, leaf in enumerate(leaves)},
}
HIDES = r"^the state of a chain must hold each Released that is begun, got {} of {} for '{} noise'"


def hidden_chain(place: str, hide: Any, whole: bool = False) -> tuple[Any, str]:
    """Beside an adaptive clip, whose noise alone would be charged."""
    clip: Any = jaxdp.clip_adaptive(
        1.0, key=KEY, count_noise_multiplier=6.0, expected_batch_size=4.0
    )
    noise, sgd = jaxdp.add_noise(1.5, KEY), optax.sgd(0.1, momentum=0.9)
    chains = {
        "noise": (optax.chain(clip, hiding(noise, hide, whole), sgd), "gradient"),
        "inside": (
            optax.chain(clip, jaxdp.accumulate(hiding(optax.chain(noise, sgd), hide, whole))),
            "gradient",
        ),
        "accumulate": (
            optax.chain(clip, hiding(jaxdp.accumulate(noise), hide, whole), sgd),
            "gradient",
        ),
        "clip": (optax.chain(hiding(clip, hide, whole), noise, sgd), "count"),
        "all": (hiding(optax.chain(clip, noise), hide, whole), "(count|gradient)"),
    }
    return chains[place]


@pytest.mark.parametrize("hide", HIDDEN)
@pytest.mark.parametrize("place", ["noise", "inside", "accumulate", "clip", "all"])
def test_a_state_that_hides_a_release_is_refused(place: str, hide: str) -> None:
    """Its noise would be charged to nobody."""
    tx, purpose = hidden_chain(place, HIDDEN[hide])
    with pytest.raises(ValueError, match=HIDES.format(0, 1, purpose)):
        training.init(new_params(), tx)
    if place == "inside":
        return  # which does not begin at all
    by_hand = training.TrainState(jnp.int32(0), new_params(), tx.init(new_params()), KEY)
    step = training.make_step(jaxdp.per_sample_grads(loss_fn), tx)
    for _ in range(2):
        with pytest.raises(ValueError, match=HIDES.format(0, 1, purpose)):
            step.noise_multipliers(by_hand, EXAMPLES)


@pytest.mark.parametrize("place", ["noise", "clip", "all"])
def test_a_state_that_hides_a_release_later_is_refused(place: str) -> None:
    tx, purpose = hidden_chain(place, tuple, whole=True)
    step, state = made(tx)
    with pytest.raises(ValueError, match=HIDES.format(0, 1, purpose)):
        step.noise_multipliers(state, EXAMPLES)


def test_one_of_two_releases_that_is_hidden_is_missed() -> None:
    """Two of one purpose, with keys of their own, such as two heads of one model have."""
    noises = [jaxdp.add_noise(1.5, key) for key in jax.random.split(KEY)]
    parts = {"w": hiding(noises[0], tuple), "b": noises[1]}
    chains = {name: optax.chain(jaxdp.clip_flat(1.0), noise) for name, noise in parts.items()}
    with pytest.raises(ValueError, match=HIDES.format(1, 2, "gradient")):
        training.init(new_params(), optax.partition(chains, {"w": "w", "b": "b"}))


def test_a_state_that_is_initialised_more_than_once_hides_nothing() -> None:
    """Some wrappers look at the shapes of an inner state first, or make the chain anew."""
    whole = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.5, KEY), optax.sgd(0.1))

    def init(params: Any) -> Any:
        jax.eval_shape(whole.init, params)
        return whole.init(params), jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, inner = whole.update(updates, state[0], params)
        return updates, (inner, state[1])

    def injected(learning_rate: Any) -> Any:
        noise = jaxdp.add_noise(1.5, jax.random.key(5))
        return optax.chain(jaxdp.clip_flat(1.0), noise, optax.sgd(learning_rate))

    for tx in (
        optax.GradientTransformation(init, update),
        optax.inject_hyperparams(injected)(learning_rate=0.1),
    ):
        step, state = made(tx)
        assert step.noise_multipliers(state, EXAMPLES).tolist() == [1.5]
        state, _ = step.run(state, EXAMPLES, ALL, True)
        assert step.noise_multipliers(state, EXAMPLES).tolist() == [1.5]
