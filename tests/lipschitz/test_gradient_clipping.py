"""Clips of cotangents: per sample, sound, and a threshold that finds its quantile."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import lipschitz, nn

KEY = jax.random.key(0)
ROWS = 40


def model_and_loss() -> tuple[nn.Layer, Any]:
    model = nn.sequential(
        lipschitz.linear(4, 4), clip=lipschitz.adaptive_gradient_clip(0.01), head=nn.linear(4, 1)
    )

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(model.apply(params, x))

    return model, loss_fn


def batch(count: int = ROWS) -> jax.Array:
    x = jax.random.normal(KEY, (count, 4))
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def test_the_count_of_a_sample_is_a_half_and_rows_without_one_count_for_nothing() -> None:
    model, loss_fn = model_and_loss()
    params = model.init(KEY)
    grads_fn = jax.jit(lipschitz.bounded_grads(loss_fn, 1.0))
    for kept in (0, 1, ROWS):
        total = grads_fn(params, batch(), jnp.arange(ROWS) < kept)
        # All cotangents are longer than 0.01.
        assert float(total.value["clip"]["clip_value"]) == -0.5 * kept
    params["clip"]["clip_value"] = jnp.float32(100.0)
    total = grads_fn(params, batch(), jnp.arange(ROWS) < 7)
    assert float(total.value["clip"]["clip_value"]) == 3.5


def test_its_sensitivity_is_that_of_counting_and_survives() -> None:
    model, loss_fn = model_and_loss()
    params = model.init(KEY)
    found = lipschitz.bounds(loss_fn, params, batch()[0], 1.0)
    assert float(found.by_name["clip/clip_value"]) == pytest.approx(0.5, rel=1e-4)
    assert float(found.by_name["0/kernel"]) == pytest.approx(0.01, rel=1e-3)
    attack = lipschitz.falsify(loss_fn, params, batch()[0], 1.0, key=KEY, count=16, steps=5)
    assert attack.survived, str(attack)


def test_a_threshold_below_zero_lets_nothing_through() -> None:
    model, loss_fn = model_and_loss()
    params = model.init(KEY)
    params["clip"]["clip_value"] = jnp.float32(-1.0)
    total = lipschitz.bounded_grads(loss_fn, 1.0)(params, batch())
    assert not np.any(total.value["0"]["kernel"])
    assert float(total.sensitivity[0]) == 0


@pytest.mark.parametrize("quantile", [0.25, 0.8])
def test_the_threshold_moves_to_the_quantile_of_the_norms(quantile: float) -> None:
    """Cotangents of a loss that is a factor, which the samples bring, times a value."""

    def loss_fn(params: Any, factor: jax.Array) -> jax.Array:
        value = params["w"] + 0 * factor
        clipped = lipschitz.adaptive_gradient_clip().apply(params["clip"], value)
        return factor * jnp.sum(clipped)

    params = {"clip": {"clip_value": jnp.float32(0.01)}, "w": jnp.ones(1)}
    factors = jnp.linspace(0.005, 1.0, 200)
    tx = optax.chain(
        jaxdp.add_noise(1.0, KEY, allocation="per_layer"),
        optax.partition(
            {
                "clip": lipschitz.track_quantile(quantile, expected_batch_size=200.0),
                "w": optax.set_to_zero(),
            },
            {"clip": {"clip_value": "clip"}, "w": "w"},
        ),
    )
    grads_fn = lipschitz.bounded_grads(loss_fn, 1.0)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads_fn(params, factors), state, params)
        return (optax.apply_updates(params, updates), state), params["clip"]["clip_value"]

    _, values = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=120))(
        (params, tx.init(params))
    )
    assert float(jnp.mean(values[-20:])) == pytest.approx(quantile, abs=0.05)


@pytest.mark.parametrize(("count", "end"), [(100.0, 2e-6), (-100.0, 2e6), (1e30, 2e-6)])
def test_a_threshold_stays_within_a_millionth_and_a_million(count: float, end: float) -> None:
    """Where all cotangents vanish, none is clipped; a threshold of zero would never come back."""
    tx = lipschitz.track_quantile(0.5, expected_batch_size=200.0)
    params = {"a": jnp.float32(2.0), "b": [jnp.float32(2.0)]}

    def step(carry: Any, count: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(jax.tree.map(lambda _: count, params), state, params)
        return (optax.apply_updates(params, updates), state), params["a"]

    run = jax.jit(lambda carry, counts: jax.lax.scan(step, carry, counts))
    (params, state), _ = run((params, tx.init(params)), jnp.full(400, count))
    np.testing.assert_allclose(jax.tree.leaves(params), end, rtol=1e-5)
    (params, _), values = run((params, state), jnp.full(400, -100.0 if count > 0 else 100.0))
    assert bool(jnp.any(jnp.abs(jnp.log(values)) < 0.2))


def test_a_value_that_samples_share_is_refused() -> None:
    """Its cotangents arrive as one sum, and the clip would act on that."""

    def loss_fn(params: jax.Array, factor: jax.Array) -> jax.Array:
        return factor * jnp.sum(lipschitz.clip_gradient(params, 0.1))

    ones, factors = jnp.ones(3), jnp.ones(50)
    together = jax.grad(lambda p: jnp.sum(jax.vmap(loss_fn, (None, 0))(p, factors)))(ones)
    assert float(jnp.linalg.norm(together)) < 0.11 < 0.1 * len(factors)
    with pytest.raises(NotImplementedError, match="added up before"):
        lipschitz.bounds(loss_fn, ones, factors[0], 1.0)


@jax.custom_vjp
def _forgetful(p: jax.Array, x: jax.Array) -> jax.Array:
    return p + 0 * x


# Where it is differentiated, its result does not depend on the example.
_forgetful.defvjp(lambda p, x: (p, x), lambda x, g: (g, 0 * x))


@jax.custom_jvp
def _forgetful_forward(p: jax.Array, x: jax.Array) -> jax.Array:
    return p + 0 * x


_forgetful_forward.defjvp(lambda primals, tangents: (primals[0], tangents[0]))


def _counted(p: jax.Array, x: jax.Array) -> jax.Array:
    """A loop over whole numbers, of which one alone depends on the example."""
    _, count, _ = jax.lax.while_loop(
        lambda state: state[0] < 2,
        lambda state: (state[0] + 1, state[1] + 1, state[2]),
        (0, 0, jnp.sign(x).astype(jnp.int32)),
    )
    return p * jnp.clip(count, 0, 9).astype(jnp.float32)


@pytest.mark.parametrize(
    "hidden",
    ["declared", "cond", "scan", "barrier", "whole numbers", "while", "custom_vjp", "custom_jvp"],
)
def test_a_value_that_only_seems_to_depend_on_the_example_is_refused(hidden: str) -> None:
    ignores = {
        "declared": lipschitz.declare(
            lambda p, x: p,
            lambda eqn, values: ([values[0].range], lambda bounds: [bounds[0], None]),
        ),
        "cond": lambda p, x: jax.lax.cond(p[0] > 0, lambda p, x: p, lambda p, x: 2 * p, p, x),
        "scan": lambda p, x: jax.lax.scan(lambda c, _: (c, x), p, None, length=2)[0],
        "barrier": lambda p, x: jax.lax.optimization_barrier((x, p))[1],
        "whole numbers": lambda p, x: (
            p * jax.lax.optimization_barrier((x.astype(int), 1))[1].astype(jnp.float32)
        ),
        "while": _counted,
        "custom_vjp": _forgetful,
        "custom_jvp": _forgetful_forward,
    }[hidden]

    def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        return x * jnp.sum(lipschitz.clip_gradient(ignores(params, x), 0.1))

    with pytest.raises(NotImplementedError, match="added up before"):
        lipschitz.bounds(loss_fn, jnp.ones(3), jnp.ones(()), 1.0)


def test_a_backward_pass_of_its_own_behind_a_barrier_is_refused() -> None:
    """It need not be linear, and would see the cotangent of the whole batch."""
    square = jax.custom_vjp(lambda q: q)
    square.defvjp(lambda q: (q, None), lambda _, g: (g * jnp.abs(g),))

    def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        x, params = jax.lax.optimization_barrier((x, params))
        return jnp.sum(square(params) * x)

    with pytest.raises(NotImplementedError, match="linear in the cotangent.*added up before"):
        lipschitz.bounds(loss_fn, jnp.ones(3), jnp.ones(3), 1.0)


def test_a_clip_may_stand_in_a_loop_over_the_example() -> None:
    def loss_fn(params: jax.Array, rows: jax.Array) -> jax.Array:
        def step(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
            return total + 5 * jnp.sum(lipschitz.clip_gradient(params * row, 0.1)), None

        return jax.lax.scan(step, jnp.zeros(()), rows)[0]

    ones, rows = jnp.ones(3), jnp.ones((4, 3))
    # Four steps, each with an input of norm one at most, and a cotangent of 0.1.
    assert float(lipschitz.bounds(loss_fn, ones, rows, 1.0).total) == pytest.approx(0.4, rel=1e-3)
    attack = lipschitz.falsify(loss_fn, ones, rows, 1.0, key=KEY, count=16, steps=5)
    assert attack.survived, str(attack)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="initial must be"):
        lipschitz.adaptive_gradient_clip(0.0)
    with pytest.raises(ValueError, match="quantile must be finite"):
        lipschitz.track_quantile(1.0, expected_batch_size=1.0)
    with pytest.raises(ValueError, match="expected_batch_size"):
        lipschitz.track_quantile(0.5, expected_batch_size=0.0)
    tx = lipschitz.track_quantile(expected_batch_size=1.0)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"c": jnp.ones(())}, tx.init({"c": jnp.ones(())}))
