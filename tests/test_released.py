"""What a release under noise leaves in a state is found wherever it lies, and by nothing but its
type."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# pyright: reportIndexIssue=false

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxdp
from jaxdp.bounded import Bounded
from jaxdp.distributions import normal
from jaxdp.released import Released, executed_noise_multipliers, noise_draws
from tests import helpers
from tests.helpers import KEY, PARAMS

CHAINS: Mapping[str, tuple[Callable[[Any], Any], list[float]]] = {
    "chain": (lambda n: optax.chain(jaxdp.clip_flat(1.0), n, optax.sgd(0.1)), [1.5]),
    "adaptive": (
        lambda n: optax.chain(helpers.adaptive(1.0, count_noise_multiplier=4.0), n),
        [4.0, 1.5],
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
    assert [float(s) for s in executed_noise_multipliers(state)] == expected


def test_the_multiplier_of_a_partitioned_optimizer_is_found() -> None:
    """Each part of the parameters with its own clip and noise: two releases of one batch."""
    parts = {
        "body": optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.5, jax.random.key(1))),
        "head": optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(2.5, jax.random.key(2))),
    }
    tx = optax.partition(parts, {"body": "body", "head": "head"})
    updates, state = tx.update(helpers.small_grads(2), tx.init(PARAMS), PARAMS)
    assert sorted(float(s) for s in executed_noise_multipliers(state)) == [1.5, 2.5]
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


class Own(NamedTuple):
    """A state of the user's own, whose fields have the names of ours."""

    step: Any
    noise_multiplier: Any
    key: Any
    purpose: Any
    inner: Any


def around(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation of the user's own that says 99, around one that draws."""
    within = optax.with_extra_args_support(inner)
    key = jax.random.key(9)

    def init(params: Any) -> Own:
        return Own(jnp.int32(7), jnp.float32(99.0), key, jnp.float32(0.0), within.init(params))

    def update(updates: Any, state: Own, params: Any = None, **extra: Any) -> tuple[Any, Own]:
        updates, inner_state = within.update(updates, state.inner, params, **extra)
        return updates, state._replace(inner=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def beside(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.chain(around(optax.identity()), inner, around(optax.identity()))


def clipped(noise: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.chain(jaxdp.clip_flat(1.0), noise)


def first_alone(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """For one leaf; of the others there is a gradient of zero."""
    paths, treedef = jax.tree.flatten(PARAMS)
    first = jax.tree.unflatten(treedef, [leaf is paths[0] for leaf in paths])
    rest = jax.tree.map(lambda one: not one, first)
    return optax.chain(optax.masked(inner, first), optax.masked(optax.set_to_zero(), rest))


NESTED: Mapping[str, Callable[[Any], Any]] = {
    "around": lambda noise: clipped(around(noise)),
    "around twice": lambda noise: clipped(around(around(noise))),
    "around the chain": lambda noise: around(clipped(noise)),
    "beside": lambda noise: clipped(beside(noise)),
    "accumulated": lambda noise: clipped(jaxdp.accumulate(around(optax.chain(noise)))),
    "accumulated inside": lambda noise: clipped(around(jaxdp.accumulate(beside(noise)))),
    "masked": lambda noise: around(first_alone(clipped(around(noise)))),
    "partition": lambda noise: around(
        optax.partition({"all": around(clipped(beside(noise)))}, lambda p: "all")
    ),
    "nested chains": lambda noise: optax.chain(
        optax.chain(around(clipped(optax.chain(optax.chain(around(noise)))))), optax.sgd(0.1)
    ),
}


@pytest.mark.parametrize("name", list(NESTED))
def test_a_state_with_the_same_names_hides_nothing(name: str) -> None:
    """0.5 is drawn: a ledger that is told 99 would be charged next to nothing."""
    tx = optax.with_extra_args_support(NESTED[name](jaxdp.add_noise(0.5, KEY)))
    state = tx.init(PARAMS)
    [(purpose, fingerprint, step)] = noise_draws(state)
    assert (purpose, step) == ("gradient noise", 0)
    _, state = tx.update(helpers.small_grads(2), state, PARAMS, is_last=True)
    assert [float(sigma) for sigma in executed_noise_multipliers(state)] == [0.5]
    assert noise_draws(state) == ((purpose, fingerprint, 1),)


def test_an_adaptive_clip_is_found_around_a_state_of_the_users_own() -> None:
    clip = helpers.adaptive(1.0, key=KEY, count_noise_multiplier=4.0)
    tx = around(optax.chain(around(clip), around(jaxdp.add_noise(0.5, KEY))))
    state = tx.init(PARAMS)
    assert [draw[0] for draw in noise_draws(state)] == ["count noise", "gradient noise"]
    _, state = tx.update(helpers.small_grads(2), state, PARAMS)
    assert [float(sigma) for sigma in executed_noise_multipliers(state)] == [4.0, 0.5]


def test_names_alone_are_no_release() -> None:
    state = around(optax.sgd(0.1)).init(PARAMS)
    assert executed_noise_multipliers(state) == [] and noise_draws(state) == ()


def test_the_step_of_training_charges_what_lies_inside() -> None:
    loss_fn = lambda params, example: jnp.sum(params * example)  # noqa: E731
    tx = clipped(around(optax.chain(jaxdp.add_noise(0.5, KEY), optax.sgd(0.1))))
    step = jaxdp.training.make_step(jaxdp.per_sample_grads(loss_fn), tx)
    state, batch = jaxdp.training.init(jnp.ones(2), tx), jnp.ones((3, 2))
    assert step.noise_multipliers(state, batch).tolist() == [0.5]


def test_a_mechanism_of_ones_own_is_charged_as_the_others() -> None:
    """As the module says: `Released` is all that the ledger asks for."""

    def counted(sigma: float, key: jax.Array) -> optax.GradientTransformationExtraArgs:
        def init(params: Any) -> Any:
            return Released.begin(key, "my noise", params), jnp.zeros(())

        def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
            released, _total = state
            total = 1.0 + sigma * normal(released.coming_key(), ())
            return updates, (released.after(jnp.float32(sigma)), total)

        return optax.GradientTransformationExtraArgs(init, update)

    tx = optax.chain(counted(2.5, KEY), clipped(jaxdp.add_noise(0.5, KEY)))
    state = tx.init(PARAMS)
    assert [draw[0] for draw in noise_draws(state)] == ["my noise", "gradient noise"]
    _, state = tx.update(helpers.small_grads(2), state, PARAMS)
    assert [float(sigma) for sigma in executed_noise_multipliers(state)] == [2.5, 0.5]
    assert {step for _, _, step in noise_draws(state)} == {1}


def test_a_release_waits_for_the_end_of_its_logical_batch() -> None:
    released = Released.begin(KEY, "my noise", PARAMS)
    same = jax.jit(lambda r, last: r.after(jnp.float32(2.0), last))(released, False)
    assert int(same.step) == 0 and jnp.isnan(same.noise_multiplier)
    after = released.after(jnp.float32(2.0), jnp.bool_(True))
    assert (int(after.step), float(after.noise_multiplier)) == (1, 2.0)
    helpers.assert_trees_equal(jax.random.key_data(after.key), jax.random.key_data(released.key))
    assert not jnp.array_equal(
        *(jax.random.key_data(each.coming_key()) for each in (released, after))
    )


# Which numbers are drawn.


def test_the_draws_of_a_state_are_named_and_go_on_with_the_step() -> None:
    tx = optax.chain(helpers.adaptive(1.0, key=KEY), jaxdp.add_noise(1.5, KEY), optax.sgd(0.1))
    state = tx.init(PARAMS)
    first = noise_draws(state)
    assert [(purpose, step) for purpose, _, step in first] == [
        ("count noise", 0),
        ("gradient noise", 0),
    ]
    assert len({name for _, name, _ in first}) == 2 and all(len(name) == 64 for _, name, _ in first)
    for step in range(1, 3):
        _, state = tx.update(helpers.small_grads(2), state, PARAMS)
        assert noise_draws(state) == tuple((p, name, step) for p, name, _ in first)
    # Begun anew, the noise is that of step 0 again, and says so.
    assert noise_draws(tx.init(PARAMS)) == first
    assert noise_draws(optax.sgd(0.1).init(PARAMS)) == ()


def test_draws_are_the_same_exactly_where_the_noise_is() -> None:
    def noise_and_draws(key: jax.Array, params: Any) -> tuple[Any, Any]:
        tx = jaxdp.add_noise(1.0, key)
        state = tx.init(params)
        total = Bounded(jax.tree.map(jnp.zeros_like, params), 1.0)
        return tx.update(total, state)[0], noise_draws(state)

    noise, draws = noise_and_draws(KEY, PARAMS)
    for other in (jax.random.key(0), jax.random.PRNGKey(0)):
        again, named = noise_and_draws(other, PARAMS)
        helpers.assert_trees_equal(again, noise)
        assert named == draws
    for other in (jax.random.key(1), jax.random.key(0, impl="rbg"), jax.random.fold_in(KEY, 0)):
        different, named = noise_and_draws(other, PARAMS)
        assert not helpers.any_equal(different, noise)
        assert named[0][:2] != draws[0][:2]


def test_parts_of_the_parameters_may_share_a_key() -> None:
    """`optax.partition` with one key: other leaves, hence other draws, and other names."""

    def part() -> Any:
        return optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, KEY))

    tx = optax.partition({"a": part(), "b": part()}, {"x": "a", "y": "b"})
    params = {"x": jnp.zeros(64), "y": jnp.zeros(64)}
    state = tx.init(params)
    updates, _ = tx.update(jax.tree.map(lambda leaf: leaf[None], params), state, params)
    assert not helpers.any_equal(updates["x"], updates["y"])
    assert len({name for _, name, _ in noise_draws(state)}) == 2
