"""Whole models, as other libraries write them and deep ones: bounds that hold, at the start and
after noised updates, and a bounded gradient that is the plain one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxdp
from jaxdp import lipschitz, nn
from tests import helpers

KEY = jax.random.key(0)
SHAPE, CLASSES, ROWS = (6, 6, 2), 3, 32


class Network(NamedTuple):
    """`apply(params, image) -> logits`, and what brings parameters back after an update."""

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    project: Callable[[Any], Any] = lambda params: params


# ---- as other libraries write them ---------------------------------------------------------------


def of_linen(module: linen.Module) -> Network:
    params = jax.jit(module.init)(KEY, jnp.zeros(SHAPE))
    return Network(lambda params, x: jnp.asarray(module.apply(params, x)), params)


class LinenDense(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Dense(8)(x.reshape(-1)))
        return linen.Dense(CLASSES)(jnp.tanh(linen.Dense(6)(x)))


class LinenConv(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(linen.Conv(4, (3, 3), strides=2)(x))
        x = linen.max_pool(linen.relu(linen.Conv(4, (2, 2), padding="VALID")(x)), (2, 2))
        return linen.Dense(CLASSES)(x.reshape(-1))


class LinenResidual(linen.Module):
    """Padded around the edges; channels in groups; a shortcut with a window of one pixel."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = linen.relu(linen.Conv(4, (3, 3), padding="CIRCULAR", feature_group_count=2)(x))
        y = linen.Conv(4, (3, 3), use_bias=False)(y)
        return linen.Dense(CLASSES)(jnp.mean(linen.relu(y + linen.Conv(4, (1, 1))(x)), (0, 1)))


def of_nnx(make: Callable[[nnx.Rngs], Any]) -> Network:
    graph, params = nnx.split(make(nnx.Rngs(0)), nnx.Param)
    return Network(lambda params, x: nnx.merge(graph, params)(x), params)


def nnx_dense(rngs: nnx.Rngs) -> Any:
    return nnx.Sequential(
        jnp.ravel, nnx.Linear(72, 8, rngs=rngs), nnx.relu, nnx.Linear(8, CLASSES, rngs=rngs)
    )


def nnx_conv(rngs: nnx.Rngs) -> Any:
    return nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), rngs=rngs),
        jnp.tanh,
        lambda x: nnx.max_pool(x, (2, 2), strides=(2, 2)),
        jnp.ravel,
        nnx.Linear(36, CLASSES, rngs=rngs),
    )


def of_haiku(build: Callable[[Any, jax.Array], jax.Array]) -> Network:
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: build(hk, x)))
    return Network(model.apply, jax.jit(model.init)(KEY, jnp.zeros(SHAPE)))


def haiku_dense(hk: Any, x: jax.Array) -> jax.Array:
    return hk.nets.MLP([8, CLASSES], activation=jnp.tanh)(x.reshape(-1))


def haiku_conv(hk: Any, x: jax.Array) -> jax.Array:
    x = hk.MaxPool((2, 2, 1), (2, 2, 1), "VALID")(jax.nn.relu(hk.Conv2D(4, 3)(x)))
    return hk.Linear(CLASSES)(x.reshape(-1))


def of_equinox(make: Callable[[Any], tuple[Any, Callable[[Any, jax.Array], jax.Array]]]) -> Network:
    eqx = pytest.importorskip("equinox")
    modules, call = make(eqx)
    params, static = eqx.partition(modules, eqx.is_inexact_array)
    return Network(lambda params, x: call(eqx.combine(params, static), x), params)


def equinox_dense(eqx: Any) -> Any:
    return eqx.nn.MLP(72, CLASSES, 8, 2, key=KEY), lambda model, x: model(x.reshape(-1))


def equinox_conv(eqx: Any) -> Any:
    modules = {
        "conv": eqx.nn.Conv2d(2, 4, 3, stride=2, key=KEY),
        "head": eqx.nn.Linear(4, CLASSES, key=KEY),
    }

    def call(modules: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(modules["conv"](jnp.moveaxis(x, 2, 0)))
        return modules["head"](eqx.nn.AvgPool2d(2)(hidden).reshape(-1))

    return modules, call


# ---- deep ----------------------------------------------------------------------------------------


def deep(blocks: int) -> nn.Layer:
    """Orthogonal: residual blocks of convolutions, then of matrices, with a pooling between;
    2 · blocks + 3 layers with a kernel."""
    convolution = nn.sequential(lipschitz.conv2d(4, 4, 3, padding=1), lipschitz.group_sort())
    matrix = nn.sequential(lipschitz.linear(36, 36), lipschitz.group_sort())
    return nn.sequential(
        lipschitz.conv2d(2, 4, 3, padding=1),
        lipschitz.group_sort(),
        *[lipschitz.residual(convolution) for _ in range(blocks)],
        lipschitz.l2_norm_pool(2),
        nn.flatten(),
        *[lipschitz.residual(matrix) for _ in range(blocks)],
        lipschitz.linear(36, 36),
        lipschitz.group_sort(),
        lipschitz.linear(36, CLASSES),
    )


def chain(layers: int) -> nn.Layer:
    """Orthogonal, one layer behind the other: nothing loses length on the way up or down."""
    hidden = nn.sequential(lipschitz.linear(72, 72), lipschitz.group_sort())
    return nn.sequential(nn.flatten(), *[hidden] * layers, lipschitz.linear(72, CLASSES))


def of_layer(layer: nn.Layer) -> Network:
    return Network(layer.apply, layer.init(KEY), layer.project)


NETWORKS: Mapping[str, Callable[[], Network]] = {
    "linen, dense": lambda: of_linen(LinenDense()),
    "linen, convolutions": lambda: of_linen(LinenConv()),
    "linen, residual": lambda: of_linen(LinenResidual()),
    "nnx, dense": lambda: of_nnx(nnx_dense),
    "nnx, convolutions": lambda: of_nnx(nnx_conv),
    "haiku, dense": lambda: of_haiku(haiku_dense),
    "haiku, convolutions": lambda: of_haiku(haiku_conv),
    "equinox, dense": lambda: of_equinox(equinox_dense),
    "equinox, convolutions": lambda: of_equinox(equinox_conv),
    "deep, orthogonal": lambda: of_layer(deep(5)),
}


def loss_of(network: Network) -> Callable[[Any, Any], jax.Array]:
    def loss_fn(params: Any, example: Any) -> jax.Array:
        logits = network.apply(params, example[0])
        return lipschitz.softmax_cross_entropy(logits, example[1], temperature=4.0)

    return loss_fn


def batch() -> tuple[jax.Array, jax.Array]:
    """Within the bound of one: random, of one sign, with one entry."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(ROWS, *SHAPE))
    rows[::4] = np.abs(rows[::4])
    rows[1::4] = rng.choice([-1.0, 1.0], (ROWS // 4, 1, 1, 1))
    rows[2::8] *= np.eye(72)[rng.integers(0, 72, ROWS // 8)].reshape(-1, *SHAPE)
    rows /= 1.0001 * np.sqrt(np.square(rows).sum((1, 2, 3), keepdims=True))
    rows[3::4] *= rng.random((ROWS // 4, 1, 1, 1))
    return jnp.asarray(rows, jnp.float32), jnp.arange(ROWS) % CLASSES


EXAMPLE = (jnp.zeros(SHAPE), jnp.int32(0))


def norms_of(trees: Any) -> list[np.ndarray]:
    """Of each leaf, `[ROWS]`."""
    leaves = [np.asarray(leaf, np.float64).reshape(ROWS, -1) for leaf in jax.tree.leaves(trees)]
    return [np.linalg.norm(rows, axis=1) for rows in leaves]


def trained(network: Network, steps: int) -> Any:
    """The parameters after noised updates, projected."""
    tx = optax.chain(jaxdp.add_noise(0.2, KEY), optax.sgd(1 / ROWS))
    # Gradients and projections are not compiled as a whole: norms are, once for each shape.
    grads_fn = lipschitz.bounded_grads(loss_of(network), 1.0)
    update = jax.jit(tx.update)
    params, state = network.params, tx.init(network.params)
    for _ in range(steps):
        updates, state = update(grads_fn(params, batch()), state, params)
        params = network.project(optax.apply_updates(params, updates))
    assert not helpers.any_equal(params, network.params)
    return params


def networks(*quick: str) -> pytest.MarkDecorator:
    """All of them; those that are not named are slow."""
    cases = [
        pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in NETWORKS
    ]
    return pytest.mark.parametrize("name", cases)


@pytest.mark.sweep
@networks(
    "linen, convolutions",
    "linen, residual",
    "nnx, dense",
    "nnx, convolutions",
    "haiku, convolutions",
    "equinox, convolutions",
    "deep, orthogonal",
)
def test_the_bounds_of_a_model_hold_at_the_start_and_after_noised_updates(name: str) -> None:
    network = NETWORKS[name]()
    loss_fn = loss_of(network)
    each_fn = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))
    for params in (network.params, trained(network, 3)):
        bounded = lipschitz.bounded_grads(loss_fn, 1.0)(params, batch())
        each = each_fn(params, batch())
        plain = jax.tree.map(lambda leaf: leaf.sum(0), each)
        helpers.assert_trees_close(bounded.value, plain, rtol=1e-4, atol=1e-5)
        for norms, bound in zip(norms_of(each), bounded.sensitivity, strict=True):
            assert norms.max() <= float(bound) < 100


@pytest.mark.sweep
@networks("nnx, dense", "equinox, convolutions")
def test_no_attack_breaks_the_bounds_of_a_model(name: str) -> None:
    network = NETWORKS[name]()
    for params in (network.params, trained(network, 3)):
        attack = lipschitz.falsify(
            loss_of(network), params, EXAMPLE, 1.0, key=KEY, classes=CLASSES, count=12, steps=5
        )
        assert attack.survived, str(attack)


def test_depth_does_not_loosen_the_bounds_of_an_orthogonal_network() -> None:
    shallow, far = (
        lipschitz.bounds(loss_of(network), network.params, EXAMPLE, 1.0).by_name.values()
        for network in (of_layer(deep(1)), of_layer(deep(6)))
    )
    assert max(far) == pytest.approx(float(max(shallow)), rel=1e-2)
    assert min(far) == pytest.approx(float(min(shallow)), rel=1e-2)


@pytest.mark.parametrize("layers", [2, 12])
def test_the_bounds_of_an_orthogonal_chain_are_met_at_any_depth(layers: int) -> None:
    network = of_layer(chain(layers))
    found = lipschitz.bounds(loss_of(network), network.params, EXAMPLE, 1.0)
    images, _ = batch()
    unit = images / jnp.sqrt(jnp.sum(jnp.square(images), (1, 2, 3), keepdims=True))
    each_fn = jax.jit(jax.vmap(jax.grad(loss_of(network)), (None, 0)))
    each = each_fn(network.params, (unit, jnp.arange(ROWS) % CLASSES))
    for norms, bound in zip(norms_of(each), found.by_name.values(), strict=True):
        assert 0.6 < norms.max() / float(bound) <= 1
