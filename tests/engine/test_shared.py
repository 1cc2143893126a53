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

# One half with the oldest JAX, the other half with newer ones (tests/conftest.py).
pytestmark = pytest.mark.sweep

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


@pytest.mark.optimized
@pytest.mark.parametrize("method", ["slots", "fused"])
@pytest.mark.parametrize("count", [16384, pytest.param(65536, marks=pytest.mark.slow)])
def test_a_sample_changes_the_sum_by_its_own_contribution_beside_a_penalty(
    count: int, method: str
) -> None:
    """The sum of what all share is large, and the sum of the rest nearly its opposite."""

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return x[0] * w[0] + 0.5 * jnp.sum(w**2)

    w, worst = jnp.ones(1), 0.0
    grads_fn = jaxdp.per_sample_grads(loss_fn, method=method)

    @jax.jit
    def total(x: jax.Array, mask: jax.Array, threshold: jax.Array) -> Any:
        clip = jaxdp.clip_flat(threshold)
        return clip.update(grads_fn(w, x, mask), clip.init(w))[0].value

    for seed in range(3):
        rng = np.random.default_rng(seed)
        size = 0.01 * rng.uniform(0.8, 1.2)
        x = jnp.asarray(-1 + size * rng.uniform(0.5, 2, size=(count, 1)), jnp.float32)
        threshold = jnp.float32(size * rng.uniform(0.4, 0.7))
        whole = float(total(x, jnp.ones(count, bool), threshold)[0])
        for row in rng.integers(0, count, 5):
            part = float(total(x, jnp.ones(count, bool).at[row].set(False), threshold)[0])
            worst = max(worst, abs(whole - part) / float(threshold))
    assert worst <= 1.03


@pytest.mark.parametrize(
    ("scale", "factor", "dtype"),
    [
        (70000.0, 1e-2, jnp.float16),
        (1e-4, 1e-2, jnp.float16),
        (0.3, 1.0, jnp.bfloat16),
        (1e30, 1e-30, jnp.float32),
    ],
)
@pytest.mark.parametrize("method", ["slots", "taps"])
def test_a_scale_in_single_precision_of_a_product_in_half(
    scale: float, factor: float, dtype: Any, method: str
) -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return factor * jnp.sum((x.astype(dtype) @ (w * scale).astype(dtype)).astype(jnp.float32))

    w, x = jnp.full((8, 6), 1e-2), random(8)[:3]
    want = np.asarray(jax.vmap(jax.grad(loss_fn), (None, 0))(w, x), np.float64)
    grads = jaxdp.per_sample_grads(loss_fn, method=method)

    @jax.jit
    def clipped(w: jax.Array, x: jax.Array) -> Any:
        found, clip = grads(w, x), jaxdp.clip_flat(1e9)
        return found.norms(), clip.update(found, clip.init(w))[0].value

    got, total = clipped(w, x)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-3 if dtype == jnp.float16 else 2e-2
    largest = np.abs(want).sum(0).max()
    np.testing.assert_allclose(total, want.sum(0), rtol=0, atol=tolerance * largest)
    np.testing.assert_allclose(got, np.linalg.norm(want.reshape(3, -1), axis=1), rtol=tolerance)
