"""Layers and example models: what they compute, and bounds that survive attack."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import lipschitz, nn

KEY = jax.random.key(0)


class Case(NamedTuple):
    """A layer and the shape of an example."""

    layer: Callable[[], nn.Layer]
    shape: tuple[int, ...]


LAYERS: Mapping[str, Case] = {
    "bounded_input": Case(lambda: lipschitz.bounded_input(0.7), (6,)),
    "linear": Case(lambda: lipschitz.linear(6, 4, bias=True), (6,)),
    "linear on rows": Case(lambda: lipschitz.linear(6, 4, bias=True), (3, 6)),
    "linear spectral": Case(lambda: lipschitz.linear(6, 8, constraint="spectral"), (6,)),
    "linear frobenius": Case(lambda: lipschitz.linear(6, 8, constraint="frobenius"), (6,)),
    "conv2d": Case(lambda: lipschitz.conv2d(2, 4, 3, padding=1, bias=True), (6, 6, 2)),
    "conv2d stride": Case(lambda: lipschitz.conv2d(1, 4, 4, stride=2), (8, 8, 1)),
    "conv2d spectral": Case(lambda: lipschitz.conv2d(2, 3, 3, constraint="spectral"), (5, 5, 2)),
    "conv2d frobenius": Case(lambda: lipschitz.conv2d(2, 3, 3, constraint="frobenius"), (5, 5, 2)),
    "bias": Case(lambda: lipschitz.bias(3, max_norm=0.5), (4, 3)),
    "gradient_clip": Case(lambda: lipschitz.gradient_clip(0.05), (6,)),
    "group_sort": Case(lambda: lipschitz.group_sort(), (4, 6)),
    "group_sort of three": Case(lambda: lipschitz.group_sort(3), (6,)),
    "householder": Case(lambda: lipschitz.householder(6), (4, 6)),
    "l2_norm_pool": Case(lambda: lipschitz.l2_norm_pool(2), (5, 4, 2)),
    "scaled_avg_pool": Case(lambda: lipschitz.scaled_avg_pool((2, 3)), (4, 6, 2)),
    "residual": Case(lambda: lipschitz.residual(lipschitz.linear(6, 6)), (6,)),
    "residual add": Case(lambda: lipschitz.residual(nn.tanh, merge="add"), (6,)),
    "declared": Case(lambda: lipschitz.gradient_norm_preserving(jnp.arctan), (6,)),
    "nn.conv2d": Case(lambda: nn.conv2d(2, 3, 3, stride=2, padding=1), (6, 6, 2)),
    "nn.conv2d circular": Case(
        lambda: nn.conv2d(1, 2, 3, padding=1, padding_mode="circular"), (4, 4, 1)
    ),
    "nn.avg_pool": Case(lambda: nn.avg_pool(3, stride=2, padding=1), (6, 2)),
    "nn.rnn": Case(lambda: nn.sequential(nn.rnn(3, 4), nn.function(lambda r: r[0])), (3, 3)),
    "nn.lstm": Case(lambda: nn.sequential(nn.lstm(3, 2), nn.function(lambda r: r[0])), (2, 3)),
}


def model_of(case: Case) -> tuple[Any, Any]:
    """A scale below the layer and a sum above it, so that both show its bounds."""
    layer = case.layer()
    params = {"below": jnp.ones(case.shape), "layer": jax.jit(layer.init)(KEY)}
    shape = jax.eval_shape(layer.apply, params["layer"], jnp.zeros(case.shape)).shape
    above = jax.random.normal(KEY, shape)
    params["above"] = above / jnp.linalg.norm(above)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.vdot(params["above"], layer.apply(params["layer"], params["below"] * x))

    return loss_fn, params


# Others by default run the same rules on another shape, or hold another constraint.
SLOW = (
    "linear spectral",
    "linear frobenius",
    "conv2d stride",
    "conv2d frobenius",
    "group_sort of three",
    "residual add",
    "nn.conv2d circular",
    "nn.lstm",
)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYERS]
)
def test_the_bounds_of_a_layer_survive(name: str) -> None:
    loss_fn, params = model_of(LAYERS[name])
    x = jnp.zeros(LAYERS[name].shape)
    found = lipschitz.falsify(loss_fn, params, x, 2.0, key=KEY, count=24, steps=10)
    assert found.survived, str(found)


# Whose output is no longer than the input, and whose cotangent no longer below than above.
PRESERVING = [
    "linear spectral",
    "linear frobenius",
    "conv2d stride",
    "conv2d spectral",
    "conv2d frobenius",
    "group_sort",
    "householder",
    "l2_norm_pool",
    "scaled_avg_pool",
    "residual",
    "declared",
]


@pytest.mark.sweep
@pytest.mark.parametrize("name", PRESERVING)
def test_a_layer_lengthens_nothing(name: str) -> None:
    loss_fn, params = model_of(LAYERS[name])
    found = lipschitz.bounds(loss_fn, params, jnp.zeros(LAYERS[name].shape), 2.0)
    assert float(found.by_name["above"]) <= 2.0 * 1.001
    assert float(found.by_name["below"]) <= 2.0 * 1.001


@pytest.mark.parametrize("name", list(LAYERS))
def test_parameters_have_a_dtype_of_their_own(name: str) -> None:
    """Else the second step of a training loop compiles again."""
    layer = LAYERS[name].layer()
    params = jax.eval_shape(lambda key: layer.project(layer.init(key)), KEY)
    assert all(leaf.dtype == jnp.float32 and not leaf.weak_type for leaf in jax.tree.leaves(params))


def singular_values(matrix: jax.Array) -> np.ndarray:
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def test_constraints_hold_after_any_update() -> None:
    wild = {"kernel": 5 * jax.random.normal(KEY, (6, 4)), "bias": jnp.ones(4)}
    orthogonal = lipschitz.linear(6, 4, bias=True).project(wild)
    np.testing.assert_allclose(singular_values(orthogonal["kernel"]), 1, atol=1e-3)
    assert orthogonal["bias"] is wild["bias"]
    spectral = lipschitz.linear(6, 4, constraint="spectral").project(wild)["kernel"]
    assert 0.99 <= singular_values(spectral).max() <= 1
    frobenius = lipschitz.linear(6, 4, constraint="frobenius").project(wild)["kernel"]
    assert float(jnp.linalg.norm(frobenius)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_square_matrix_is_orthogonal_from_the_start(seed: int) -> None:
    """Its smallest singular value is far below the others before."""
    params = lipschitz.linear(72, 72).init(jax.random.key(seed))
    np.testing.assert_allclose(singular_values(params["kernel"]), 1, atol=1e-3)
    assert 1 <= float(lipschitz.matrix_norm(params["kernel"])) < 1.001


@pytest.mark.parametrize("constraint", ["spectral", "frobenius"])
def test_small_weights_stay_as_they_are(constraint: str) -> None:
    small = {"kernel": 0.01 * jax.random.normal(KEY, (3, 3, 2, 4))}
    layer = lipschitz.conv2d(2, 4, 3, constraint=constraint)
    np.testing.assert_array_equal(layer.project(small)["kernel"], small["kernel"])


@pytest.mark.parametrize("constraint", ["orthogonal", "spectral", "frobenius"])
def test_a_projected_convolution_has_norm_one_at_most(constraint: str) -> None:
    wild = {"kernel": 3 * jax.random.normal(KEY, (3, 3, 2, 4))}
    layer = lipschitz.conv2d(2, 4, 3, padding=1, constraint=constraint)
    params = layer.project(wild)
    matrix = jax.jacobian(lambda x: layer.apply(params, x).reshape(-1))(jnp.zeros((7, 7, 2)))
    norm = singular_values(matrix.reshape(matrix.shape[0], -1)).max()
    assert norm <= 1
    assert constraint == "frobenius" or norm > 0.85


def test_projections_compose_with_the_layers_that_they_belong_to() -> None:
    model = nn.sequential(
        lipschitz.linear(4, 4),
        nn.relu,
        nn.residual(lipschitz.linear(4, 4, constraint="spectral")),
        nn.linear(4, 2),
    )
    params = jax.tree.map(lambda leaf: 10 * leaf, model.init(KEY))
    projected = model.project(params)
    assert jax.tree.structure(projected) == jax.tree.structure(params)
    assert singular_values(projected["0"]["kernel"]).max() <= 1.001
    assert singular_values(projected["2"]["layer"]["kernel"]).max() <= 1
    np.testing.assert_array_equal(projected["3"]["kernel"], params["3"]["kernel"])


def test_project_ends_a_chain_under_jit() -> None:
    layer = lipschitz.linear(4, 4)
    params = layer.init(KEY)
    tx = optax.chain(optax.sgd(1.0, momentum=0.9), lipschitz.project(layer.project))
    grads = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape), params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    np.testing.assert_allclose(singular_values(params["kernel"]), 1, atol=2e-3)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grads, state)


def test_group_sort_orders_within_groups() -> None:
    x = jnp.array([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, -1.0, 5.0]])
    assert lipschitz.group_sort(4).apply({}, x).tolist() == [[0, 1, 2, 3], [-1, 0, 1, 5]]
    assert lipschitz.group_sort(2).apply({}, x).tolist() == [[1, 3, 0, 2], [0, 1, -1, 5]]


def test_householder_keeps_the_norm_of_values_and_of_gradients() -> None:
    layer = lipschitz.householder(6)
    params = {"angle": jnp.array([0.3, 2.0, -1.0])}
    x = jax.random.normal(KEY, (50, 6))
    y, pull_back = jax.vjp(lambda x: jax.vmap(layer.apply, (None, 0))(params, x), x)
    (back,) = pull_back(jnp.ones_like(y))
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), jnp.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(back, axis=1), 6**0.5, rtol=1e-5)


def test_householder_is_continuous_across_its_mirror() -> None:
    layer, params = lipschitz.householder(2), {"angle": jnp.array([0.8])}
    mirror = jnp.array([jnp.cos(0.4), jnp.sin(0.4)])  # where v·z = 0
    near = 1e-4 * jnp.array([jnp.sin(0.4), -jnp.cos(0.4)])
    sides = [layer.apply(params, mirror + near), layer.apply(params, mirror - near)]
    np.testing.assert_allclose(*sides, atol=1e-3)


def test_pools_keep_what_their_names_say() -> None:
    x = jax.random.normal(KEY, (4, 6, 3))
    norms = lipschitz.l2_norm_pool(2).apply({}, x)
    assert norms.shape == (2, 3, 3)
    assert float(jnp.linalg.norm(norms)) == pytest.approx(float(jnp.linalg.norm(x)), rel=1e-5)
    means = lipschitz.scaled_avg_pool((2, 3)).apply({}, x)
    np.testing.assert_allclose(means[0, 1], x[:2, 3:].mean((0, 1)) * 6**0.5, rtol=1e-5)


def test_an_l2_norm_pool_of_zeros_has_the_gradient_zero() -> None:
    layer = lipschitz.l2_norm_pool(2)
    grad = jax.grad(lambda x: jnp.sum(layer.apply({}, x)))(jnp.zeros((4, 1)))
    assert not np.any(grad)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15, 1e30])
def test_a_bounded_input_has_a_finite_gradient_at_any_size(size: float) -> None:
    layer = lipschitz.bounded_input(2.0)
    x = size * jnp.array([3.0, 0.0, -4.0])
    y, pull_back = jax.vjp(lambda x: layer.apply({}, x), x)
    (back,) = pull_back(jnp.array([1.0, 1.0, 1.0]))
    assert float(jnp.linalg.norm(y)) == pytest.approx(min(5 * size, 2.0), rel=1e-5)
    assert float(jnp.linalg.norm(back)) <= 3**0.5 * 1.0001


def test_a_gradient_is_clipped_for_each_sample_alone() -> None:
    loss_fn = lambda x: 10 * jnp.sum(lipschitz.clip_gradient(x, 0.5))  # noqa: E731
    x = jnp.ones((3, 4))
    each = jax.vmap(jax.grad(loss_fn))(x)
    together = jax.grad(lambda x: jnp.sum(jax.vmap(loss_fn)(x)))(x)
    np.testing.assert_allclose(each, together)
    np.testing.assert_allclose(jnp.linalg.norm(each, axis=1), 0.5, rtol=1e-6)


def test_a_clip_value_may_be_an_array_but_not_of_the_example() -> None:
    def loss_fn(params: jax.Array, x: jax.Array, clip: jax.Array) -> jax.Array:
        return 10 * jnp.sum(lipschitz.clip_gradient(params * x, clip))

    ones = jnp.ones(3)
    found = jax.jit(lambda clip: lipschitz.bounds(loss_fn, ones, ones, 1.0, clip=clip).total)(
        jnp.float32(0.25)
    )
    assert float(found) == pytest.approx(0.25, rel=1e-4)
    with pytest.raises(NotImplementedError, match="threshold that depends on no example"):
        lipschitz.bounds(lambda p, x: loss_fn(p, x, x[0]), ones, ones, 1.0)


WRONG: Mapping[str, Callable[[], Any]] = {
    "constraint must be .*unitary": lambda: lipschitz.linear(2, 2, constraint="unitary"),
    "constraint must be .orthogonal.": lambda: lipschitz.conv2d(1, 2, 3, constraint="x"),
    "merge must be": lambda: lipschitz.residual(nn.tanh, merge="mean"),
    "features must be even": lambda: lipschitz.householder(3),
    "group_size must be": lambda: lipschitz.group_sort(0),
    "multiple of 2": lambda: lipschitz.group_sort(2).apply({}, jnp.ones(3)),
    "bound must be": lambda: lipschitz.bounded_input(0.0),
    "clip_value must be": lambda: lipschitz.gradient_clip(-1.0),
    "max_norm must be": lambda: lipschitz.bias(3, max_norm=0.0),
    "window": lambda: lipschitz.l2_norm_pool(0),
    "norm must be": lambda: lipschitz.onto_ball(jnp.ones(2), -1.0),
}


@pytest.mark.parametrize("message", list(WRONG))
def test_arguments_are_checked(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


def constrained() -> nn.Layer:
    return nn.sequential(
        lipschitz.conv2d(1, 8, 3, stride=2),
        lipschitz.group_sort(),
        lipschitz.l2_norm_pool(2),
        nn.flatten(),
        lipschitz.linear(72, 16),
        lipschitz.householder(16),
        lipschitz.residual(nn.sequential(lipschitz.linear(16, 16), nn.relu)),
        lipschitz.gradient_clip(0.5),
        lipschitz.linear(16, 5),
    )


def ordinary() -> nn.Layer:
    return nn.sequential(
        nn.conv2d(1, 4, 4, stride=2), nn.tanh, nn.max_pool(2), nn.flatten(), nn.linear(36, 5)
    )


MODELS = {"constrained": constrained, "ordinary": ordinary}


@pytest.mark.sweep
@pytest.mark.parametrize("name", list(MODELS))
def test_the_bounds_of_a_model_survive_at_the_start_and_after_training(name: str) -> None:
    model = MODELS[name]()

    def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = model.apply(params, example[0])
        return lipschitz.softmax_cross_entropy(logits, example[1], temperature=5.0)

    example = (jnp.zeros((14, 14, 1)), jnp.int32(0))
    params = jax.jit(model.init)(KEY)
    tx = optax.chain(jaxdp.add_noise(0.3, KEY), optax.sgd(0.3), lipschitz.project(model.project))
    grads_fn = lipschitz.bounded_grads(loss_fn, 1.0)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(grads_fn(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for round in range(2):
        attack = lipschitz.falsify(
            loss_fn, params, example, 1.0, key=KEY, classes=5, count=16, steps=8
        )
        assert attack.survived, str(attack)
        for _ in range(5):
            x = jax.random.normal(jax.random.fold_in(KEY, round), (32, 14, 14, 1))
            params, state = step(params, state, (x, jnp.arange(32) % 5))
