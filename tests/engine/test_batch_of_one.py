"""Normalisations over a batch, found by what they do to one example, whatever their class."""

from collections.abc import Callable, Iterator
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxdp
from tests.helpers import KEY

X = jax.random.normal(KEY, (4, 3))
W = jax.random.normal(jax.random.key(1), (3, 5))

Model = tuple[Callable[[Any, Any], jax.Array], Any]


@pytest.fixture(autouse=True)
def as_users_write() -> Iterator[None]:
    """Strictness is for what jaxdp writes; other houses promote."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.norm(x))


def of_nnx(train: bool, dtype: Any = jnp.float32) -> Model:
    """Nested in a sequence."""
    rngs = nnx.Rngs(0)
    whole = nnx.Sequential(nnx.Linear(3, 5, rngs=rngs), Block(rngs), nnx.Linear(5, 1, rngs=rngs))
    graph, params = nnx.split(whole)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        model.train() if train else model.eval()
        return jnp.sum(model(x[None].astype(dtype))).astype(jnp.float32)

    return loss, params


def of_haiku(train: bool) -> Model:
    """With its state among the parameters."""

    def forward(x: jax.Array, train: bool) -> jax.Array:
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(5)(x), is_training=train)
        return hk.Linear(1)(jax.nn.relu(x))

    model = hk.transform_with_state(forward)
    params, state = model.init(KEY, X[:1], True)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(model.apply(*params, None, x[None], train)[0])

    return loss, (params, state)


def by_hand(normalise: Callable[[jax.Array], jax.Array]) -> Model:
    return lambda w, x: jnp.sum(jnp.sin(normalise((x @ w)[None]))), W


def _in_scan(x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, _: (h - jnp.mean(h, axis=0), None), x, None, length=1)[0]


@jax.custom_vjp
def _own_rule(x: jax.Array) -> jax.Array:
    return x - jnp.mean(x, axis=0)


_own_rule.defvjp(lambda x: (_own_rule(x), None), lambda _, g: (g,))

DEGENERATE: dict[str, Model] = {
    "nnx": of_nnx(train=True),
    "nnx in half precision": of_nnx(train=True, dtype=jnp.bfloat16),
    "haiku": of_haiku(train=True),
    "mean and variance": by_hand(
        lambda x: (x - jnp.mean(x, axis=0)) / jnp.sqrt(jnp.var(x, axis=0) + 1e-5)
    ),
    "axis kept": by_hand(lambda x: x - jnp.mean(x, axis=0, keepdims=True)),
    "sum over count": by_hand(lambda x: x - jnp.sum(x, axis=0) / x.shape[0]),
    "mean square": by_hand(lambda x: x * lax.rsqrt(jnp.mean(x**2, axis=0) + 1e-5)),
    "variance of moments": by_hand(
        lambda x: x / jnp.sqrt(1e-5 + jnp.maximum(jnp.mean(jnp.square(x), axis=0), 0))
    ),
    "largest": by_hand(lambda x: x - jnp.max(x, axis=0)),
    "of a pixel": by_hand(
        lambda x: x.reshape(1, 1, 1, 5) - jnp.mean(x.reshape(1, 1, 1, 5), axis=(0, 1, 2))
    ),
    "in remat": by_hand(jax.checkpoint(lambda x: x - jnp.mean(x, axis=0))),
    "in a loop": by_hand(_in_scan),
    "in jit": by_hand(jax.jit(lambda x: jax.nn.standardize(x, axis=0))),
    "with a rule of its own": by_hand(_own_rule),
    "in a branch": by_hand(
        lambda x: lax.cond(x[0, 0] > 0, lambda x: x - jnp.mean(x, axis=0), jnp.sin, x)
    ),
}


def norms(loss: Any, params: Any, method: str = "auto") -> jax.Array:
    """Traced only."""
    grads_fn = jaxdp.per_sample_grads(loss, method=method)
    return jax.eval_shape(lambda params, x: grads_fn(params, x).norms(), params, X)


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_normalisation_over_a_batch_is_refused(name: str) -> None:
    loss, params = DEGENERATE[name]
    for method in ("auto", "dense"):
        with pytest.raises(ValueError, match="must not normalise over a batch.*py:.*GroupNorm"):
            norms(loss, params, method)
    found = jaxdp.validate(loss, params, X[0])
    assert not found.ok and "normalise over a batch" in str(found)


def test_what_the_refusal_is_about() -> None:
    """The loss does not depend on the example, and what lies before has no gradient."""
    loss, params = DEGENERATE["nnx"]
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(params, X)
    assert np.ptp(values) < 1e-6
    first = jax.tree.leaves(grads["layers"][0])
    assert all(not np.any(leaf) for leaf in first)


HARMLESS: dict[str, Model] = {
    "nnx with running averages": of_nnx(train=False),
    "haiku with running averages": of_haiku(train=False),
    "layer norm": by_hand(lambda x: jax.nn.standardize(x, axis=-1)),
    "layer norm of one feature": (
        lambda w, x: jnp.sum(jax.nn.standardize(x[:1] * w[0, :1], axis=0)),
        W,
    ),
    "softmax": by_hand(lambda x: jax.nn.softmax(x, axis=-1)),
    "softmax over one": by_hand(lambda x: jax.nn.softmax(x, axis=0)),
    "mean over a batch of one": by_hand(lambda x: jnp.mean(jnp.square(x), axis=0)),
    "mean of everything": by_hand(lambda x: x - jnp.mean(x)),
    "straight through": by_hand(lambda x: x + lax.stop_gradient(jnp.round(x) - x)),
    "gate": by_hand(lambda x: x * jax.nn.sigmoid(x)),
    "weights standardised": (
        lambda w, x: jnp.sum(x[:1] @ (w[:1] - jnp.mean(w[:1], axis=0))),
        W,
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_other_normalisations_are_left_alone(name: str) -> None:
    loss, params = HARMLESS[name]
    assert norms(loss, params).shape == (4,)
    assert "normalise over a batch" not in str(jaxdp.validate(loss, params, X[0]))


def _images(axes: tuple[int, ...]) -> Model:
    """A convolution and a normalisation over these axes of `[1, H, W, C]`."""

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        image = jnp.outer(x, x)[None, :, :, None] * w[0]
        mean = jnp.mean(image, axis=axes, keepdims=True)
        spread = jnp.mean(jnp.square(image), axis=axes, keepdims=True) - jnp.square(mean)
        return jnp.sum(jnp.sin((image - mean) * lax.rsqrt(spread + 1e-5)))

    return loss, W


def _images_of_nnx() -> Model:
    rngs = nnx.Rngs(0)
    whole = nnx.Sequential(
        nnx.Conv(1, 4, (2, 2), rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
    )
    graph, params = nnx.split(whole)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(nnx.merge(graph, params)(jnp.outer(x, x)[None, :, :, None])))

    return loss, params


def test_a_batch_normalisation_of_images_is_to_be_checked() -> None:
    """It is the example that is normalised, which nothing couples: training goes on."""
    for loss, params in (_images((0, 1, 2)), _images_of_nnx()):
        assert norms(loss, params).shape == (4,)
        found = jaxdp.validate(loss, params, X[0])
        assert found.ok and "over a leading axis of length one and others" in str(found)
    for axes in ((1, 2), (1, 2, 3), (0, 1, 2, 3), (3,)):
        loss, params = _images(axes)
        assert "leading axis" not in str(jaxdp.validate(loss, params, X[0]))
