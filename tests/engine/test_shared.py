"""What all samples share: penalties on the parameters, which a loss adds to that of an example."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from jaxdp.engine.numerics import tracing_for
from jaxdp.engine.plan import TracedLoss
from tests.engine.test_norm_attacks import (
    ROWS,
    Attack,
    check_contributions,
    convolution,
    norms,
    ones,
    product,
    random,
    table,
    tied,
)

W = jnp.full((3, 3), 0.5)
X = jnp.ones((4, 3))


def data(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(x @ w))


def penalty(w: jax.Array) -> jax.Array:
    return 0.1 * jnp.sum(w**2)


LOSSES: dict[str, tuple[Callable[..., jax.Array], bool]] = {
    "added": (lambda w, x: data(w, x) + penalty(w), True),
    "subtracted": (lambda w, x: data(w, x) - penalty(w), True),
    "first": (lambda w, x: penalty(w) + data(w, x), True),
    "scaled with the loss": (lambda w, x: 3 * (data(w, x) + penalty(w)) / 7, True),
    "in a mean": (lambda w, x: jnp.mean(jnp.sin(x @ w) + penalty(w)), True),
    "in a jitted loss": (jax.jit(lambda w, x: data(w, x) + penalty(w)), True),
    "twice": (lambda w, x: penalty(w) + data(w, x) + penalty(2 * w), True),
    "weighed by the sample": (lambda w, x: data(w, x) + x[0, 0] * penalty(w), False),
    "under a root": (lambda w, x: jnp.sqrt(data(w, x) ** 2 + penalty(w)), False),
    "used twice": (lambda w, x: (s := data(w, x) + penalty(w)) + jnp.sin(s), False),
    "chosen by the sample": (
        lambda w, x: jnp.where(x[0, 0] > 0, data(w, x) + penalty(w), 0.0),
        False,
    ),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_what_the_sample_does_not_weigh_is_shared(name: str) -> None:
    loss_fn, shared = LOSSES[name]
    traced = TracedLoss.of(lambda leaves, x: (loss_fn(leaves[0], x), None), [W], X)
    derived = [use for use in traced.plan.uses.values() if use.view is None]
    assert derived
    assert all(use.shared == shared for use in derived)
    (leaf,) = jaxdp.explain(loss_fn, W, X[None]).leaves
    assert ("materialized" in leaf.form) != shared


def test_a_penalty_keeps_nothing_for_each_sample() -> None:
    """But what the products have kept before; its own gradient is kept once."""
    x = jnp.ones((50, 4, 3))
    (alone,) = jaxdp.explain(data, W, x).leaves
    (both,) = jaxdp.explain(lambda w, x: data(w, x) + penalty(w), W, x).leaves
    assert both.bytes == alone.bytes


def test_a_penalty_that_is_not_finite_leaves_no_sample_and_no_nan() -> None:
    w = jnp.zeros((3, 3))

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return data(w, x) + jnp.sum(jnp.sqrt(w))  # at zero the derivative is infinite

    clip = jaxdp.clip_flat(1.0)
    for method in ("slots", "taps", "fused"):
        grads = jaxdp.per_sample_grads(loss_fn, method=method)

        @jax.jit
        def total(w: jax.Array, grads: Any = grads) -> Any:
            return clip.update(grads(w, X[None]), clip.init(w))[0].value

        assert not np.any(np.asarray(total(w)))


# ---- attacks ------------------------------------------------------------------------------------


def nearly(values: np.ndarray) -> np.ndarray:
    """Rows that are all nearly the first one, apart by 1e-8 to 1 of it."""
    apart = np.logspace(-8, 0, ROWS).reshape(ROWS, *[1] * (values.ndim - 1))
    noise = np.random.default_rng(2).normal(size=values.shape)
    return (values[:1] * (1 + apart * noise)).astype(np.float32)


def cancelled(loss_fn: Callable[..., jax.Array], params: Any, batch: Any) -> Attack:
    """The loss, minus its own gradient at the first row as a penalty: what is left is small."""
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    gradient = jax.grad(loss_fn)(params, first)

    def with_penalty(w: Any, example: Any) -> jax.Array:
        return loss_fn(w, example) - jnp.vdot(w, gradient)

    return Attack(with_penalty, params, batch)


def repeated(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    *same, last = arrays
    return (*(np.repeat(array[:1], ROWS, axis=0) for array in same), nearly(last))


IDS = np.tile(np.arange(4, dtype=np.int32), (ROWS, 1))
AT = np.eye(30, dtype=np.float32)[IDS]
ATTACKS = {
    "outer product": lambda: cancelled(
        product, ones(30, 40), repeated(random(1, 30), random(1, 40, seed=1))
    ),
    "Gram": lambda: cancelled(
        product, ones(30, 40), repeated(random(4, 30), random(4, 40, seed=1))
    ),
    "rows": lambda: cancelled(product, ones(8, 8), repeated(random(64, 8), random(64, 8, seed=1))),
    "look-ups": lambda: cancelled(table, ones(6, 5), repeated(IDS, random(4, 5))),
    "tied": lambda: cancelled(
        tied, ones(30, 20), repeated(IDS, random(4, 20), AT, random(4, 20, seed=1))
    ),
    "convolution, rows": lambda: cancelled(
        convolution, ones(3, 2, 2), repeated(random(1, 16, 2), random(1, 16, 2, seed=1))
    ),
    "convolution, Gram": lambda: cancelled(
        convolution, ones(3, 30, 40), repeated(random(1, 4, 30), random(1, 4, 40, seed=1))
    ),
}


@pytest.mark.optimized
@pytest.mark.parametrize("platform", ["cpu", "tpu", pytest.param("gpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_penalty_that_cancels_a_gradient_stays_below_the_threshold(
    name: str, platform: str
) -> None:
    with tracing_for(platform):
        check_contributions(ATTACKS[name](), "slots")


@pytest.mark.optimized
@pytest.mark.parametrize(("platform", "stored"), [("tpu", 7), ("gpu", 10)])
def test_a_penalty_whose_gradient_is_rounded_up(platform: str, stored: int) -> None:
    """All of its entries are, where a matrix unit multiplies them, so that the inner product with
    an opposite gradient is too large, and the norm of the two too small."""
    unit = 2.0 ** -(stored + 1)
    entry = np.float32(2 * (1 + unit * (1 + 2.0**-6)))

    def loss_fn(w: Any, example: Any) -> jax.Array:
        return product(w, example) - entry * jnp.sum(w)

    batch = (np.ones((ROWS, 1, 30), np.float32), np.ones((ROWS, 1, 40), np.float32))
    with tracing_for(platform):
        check_contributions(Attack(loss_fn, ones(30, 40), batch), "slots")


@pytest.mark.optimized
@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_norm_with_a_penalty_is_that_of_both(name: str) -> None:
    """Not the sum of two norms, where nothing cancels beyond what single precision knows."""
    attack = ATTACKS[name]()
    grads = jax.jit(jax.vmap(jax.grad(attack.loss_fn), (None, 0)))(attack.params, attack.batch)
    true = np.linalg.norm(np.asarray(grads, np.float64).reshape(ROWS, -1), axis=1)
    found = norms(attack, "slots")
    known = true > 0.3 * true.max()
    assert np.all(found[known] >= true[known] * (1 - 1e-5))
    assert np.all(found[known] <= true[known] * 1.01)
