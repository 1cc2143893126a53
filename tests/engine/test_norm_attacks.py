"""Gradients made to fool the norms: what a clip lets through must stay below its threshold.

Every loss here is linear in its parameters, so that the batch itself says what the gradient of a
sample is: Σ_t u_t v_tᵀ of vectors that the attacker chose. Such sums cancel down to their rounding
errors, or their factors over- and underflow where the gradient does not.
"""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxdp
from tests import helpers

# One half with the oldest JAX, the other half with newer ones (tests/conftest.py); and what is
# compiled must round as it does for users.
pytestmark = [pytest.mark.sweep, pytest.mark.optimized]

METHODS = ("slots", "taps", "fused", "dense")
ROWS = 24
TOLERANCE = 1e-5


class Attack(NamedTuple):
    """A linear loss and data. `params` has the value one everywhere."""

    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


@functools.cache
def clipped_alone(loss_fn: Any, method: str, make_clip: Any) -> Callable[..., Any]:
    """Compiled `(params, batch, masks, thresholds) -> sums`, one clipped sum for each mask."""
    grads_fn = jaxdp.per_sample_grads(loss_fn, method=method)

    def alone(params: Any, batch: Any, masks: jax.Array, thresholds: jax.Array) -> Any:
        def one(chosen: tuple[jax.Array, jax.Array]) -> Any:
            mask, threshold = chosen
            clip = make_clip(threshold)
            grads = grads_fn(params, batch, mask)
            return clip.update(grads, clip.init(params))[0].value

        return lax.map(one, (masks, thresholds))

    return jax.jit(alone)


def contributions(
    attack: Attack, method: str, thresholds: np.ndarray, make_clip: Any = jaxdp.clip_flat
) -> np.ndarray:
    """‖what a clip lets through of one sample‖ / C for every sample, alone in its batch."""
    count = len(thresholds)
    alone = clipped_alone(attack.loss_fn, method, make_clip)
    sums = alone(attack.params, attack.batch, np.eye(count, dtype=bool), jnp.float32(thresholds))
    leaves = [np.asarray(leaf, np.float64).reshape(count, -1) for leaf in jax.tree.leaves(sums)]
    return np.linalg.norm(np.concatenate(leaves, axis=1), axis=1) / np.float32(thresholds)


@functools.cache
def compiled_norms(loss_fn: Any, method: str) -> Callable[..., Any]:
    grads_fn = jaxdp.per_sample_grads(loss_fn, method=method)
    return jax.jit(lambda params, batch: grads_fn(params, batch).norms())


def norms(attack: Attack, method: str) -> np.ndarray:
    got = compiled_norms(attack.loss_fn, method)(attack.params, attack.batch)
    return np.asarray(got, np.float64)


@functools.cache
def compiled_gradients(loss_fn: Any) -> Callable[..., Any]:
    return jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))


def true_norms(attack: Attack, change: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Any:
    """In double precision, of the batch or of what `change` makes of it."""
    def double(leaf: Any) -> Any:
        return np.asarray(leaf, np.float64) if helpers.is_float(leaf) else leaf

    with jax.enable_x64(True):
        params = jax.tree.map(double, attack.params)
        batch = jax.tree.map(lambda leaf: change(double(leaf)), attack.batch)
        grads = compiled_gradients(attack.loss_fn)(params, batch)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(grads)]
    rows = [leaf.reshape(len(leaf), -1) for leaf in leaves]
    return np.linalg.norm(np.concatenate(rows, axis=1), axis=1)


def check_contributions(attack: Attack, method: str) -> None:
    """At thresholds below the norm that the engine sees, so that every sample is clipped, by a
    factor that is no power of two."""
    seen = norms(attack, method)
    assert np.all(np.isfinite(seen))
    factors = np.random.default_rng(1).uniform(0.3, 0.9, len(seen))
    thresholds = np.where(seen > 0, factors * seen, 1.0)
    worst = np.max(contributions(attack, method, thresholds))
    assert worst <= 1 + TOLERANCE, f"a sample contributes {worst:.7g} times its threshold"


def check_norms(attack: Attack, method: str) -> None:
    """Not below the true norm, nor, where terms cancel, below it by more than the rounding error
    of the terms: no sum in single precision knows better."""
    true, terms = true_norms(attack), true_norms(attack, np.abs)
    missing = true - norms(attack, method)
    assert np.all(missing <= TOLERANCE * true + 1e-6 * terms), np.max(missing / terms)


# ---- cancellation -------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype(np.float32)


def opposite(values: np.ndarray) -> np.ndarray:
    """Minus the values, but for a relative difference of 1e-8 to 1 that differs from row to row."""
    rng = np.random.default_rng(2)
    apart = np.logspace(-8, 0, ROWS).reshape(ROWS, *[1] * (values.ndim - 1))
    return (-values * (1 + apart * rng.normal(size=values.shape))).astype(np.float32)


def cancelling(length: int, width: int) -> np.ndarray:
    """`[ROWS, length, width]` whose sum over the length nearly cancels, in random order."""
    half = random(length // 2, width, seed=3)
    both = np.concatenate([half, opposite(half)], axis=1)
    return both[:, np.random.default_rng(4).permutation(length)]


def constant(length: int, width: int) -> np.ndarray:
    """The same vector at every position."""
    return np.repeat(random(1, width, seed=5), length, axis=1)


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape)


def product(w: Any, example: Any) -> jax.Array:
    u, v = example
    return jnp.vdot(v, u @ w)


def product_in_a_block(w: Any, example: Any) -> jax.Array:
    u, v = example
    return jnp.vdot(v, jax.checkpoint(jnp.matmul)(u, w))


def products_in_a_loop(w: Any, example: Any) -> jax.Array:
    u, v = example
    return jnp.sum(lax.map(lambda layer: jnp.vdot(v, u @ layer), w))


def product_over_steps(w: Any, example: Any) -> jax.Array:
    return jnp.sum(lax.map(lambda step: jnp.vdot(step[1], step[0] @ w), example))


def two_products(w: Any, example: Any) -> jax.Array:
    u, v, opposite = example
    return jnp.vdot(v, u @ w) + jnp.vdot(opposite, u @ w)


def two_products_of_one_cotangent(w: Any, example: Any) -> jax.Array:
    u, opposite, v = example
    return jnp.vdot(v, u @ w + opposite @ w)


def product_and_transposed(w: Any, example: Any) -> jax.Array:
    u, v, opposite = example
    return jnp.vdot(v, u @ w) + jnp.vdot(u, opposite @ w.T)


def derived_product(p: Any, example: Any) -> jax.Array:
    return product(p["down"] @ p["up"], example)


def bias(b: Any, v: Any) -> jax.Array:
    return jnp.sum(v * jnp.broadcast_to(b, v.shape))


def bias_row(b: Any, v: Any) -> jax.Array:
    return jnp.sum(v * b[None])


def bias_over_steps(b: Any, v: Any) -> jax.Array:
    return jnp.sum(lax.map(lambda v: jnp.vdot(v, b), v))


def table(t: Any, example: Any) -> jax.Array:
    ids, v = example
    return jnp.vdot(v, t[ids])


def table_twice(t: Any, example: Any) -> jax.Array:
    ids, v, opposite = example
    return jnp.vdot(v, t[ids]) + jnp.vdot(opposite, t[ids])


def table_over_steps(t: Any, example: Any) -> jax.Array:
    return jnp.sum(lax.map(lambda step: jnp.vdot(step[1], t[step[0]]), example))


def tied(t: Any, example: Any) -> jax.Array:
    ids, v, at, opposite = example
    return jnp.vdot(v, t[ids]) + jnp.vdot(at, opposite @ t.T)


def convolution(k: Any, example: Any) -> jax.Array:
    x, v = example
    numbers = ("NWC", "WIO", "NWC")
    return jnp.vdot(v, lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=numbers))


def halves(length: int, width: int) -> np.ndarray:
    """`[ROWS, length, width]` of equal entries, of opposite sign in the second half. All rounding
    errors go one way."""
    entry = 1 + np.random.default_rng(7).integers(2**12, size=(ROWS, 1, 1)) * 2.0**-23
    sign = np.where(np.arange(length) < length // 2, 1, -1 - 2.0**-15)[:, None]
    return (entry * sign * np.ones(width)).astype(np.float32)


def same_id(length: int) -> np.ndarray:
    return np.ones((ROWS, length), np.int32)


def distinct_ids(length: int, words: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and the same as one-hot vectors."""
    ids = np.tile(np.arange(length, dtype=np.int32) % words, (ROWS, 1))
    return ids, np.eye(words, dtype=np.float32)[ids]


def tied_data(length: int, words: int, width: int) -> Any:
    ids, at = distinct_ids(length, words)
    v = random(length, width)
    return ids, v, at, opposite(v)


def images(length: int, width: int, outputs: int) -> Any:
    """Two stretches that are equal under cotangents that are opposite, apart from each other."""
    x, v = random(length, width), random(length, outputs, seed=1)
    apart = [np.zeros((ROWS, 4, size), np.float32) for size in (width, outputs)]
    x = np.concatenate([x, apart[0], x], axis=1)
    v = np.concatenate([v, apart[1], opposite(v)], axis=1)
    return x[:, None], v[:, None]


def twice(inputs: np.ndarray, outputs: np.ndarray) -> Any:
    return inputs, outputs, opposite(outputs)


LARGER = np.float32(1e12)

# Small matrices are instantiated, for wide ones the norms come from Gram matrices.
CANCELLING = {
    "product, instantiated": Attack(product, ones(3, 3), (constant(8, 3), cancelling(8, 3))),
    "product, long": Attack(product, ones(8, 8), (constant(64, 8), cancelling(64, 8))),
    "product, Gram": Attack(product, ones(30, 40), (constant(4, 30), cancelling(4, 40))),
    "product, Gram, large and small factors": Attack(
        product, ones(30, 40), (constant(4, 30) * LARGER, cancelling(4, 40) / LARGER)
    ),
    "product, Gram, equal entries": Attack(
        product, ones(128, 128), (np.abs(halves(64, 128)), halves(64, 128))
    ),
    "product in a block": Attack(
        product_in_a_block, ones(3, 3), (constant(8, 3), cancelling(8, 3))
    ),
    "products in a loop": Attack(
        products_in_a_loop, ones(2, 3, 3), (constant(8, 3), cancelling(8, 3))
    ),
    "product over steps": Attack(
        product_over_steps, ones(3, 3), (constant(8, 3), cancelling(8, 3))
    ),
    "product over steps, Gram": Attack(
        product_over_steps, ones(30, 40), (constant(4, 30), cancelling(4, 40))
    ),
    "two products": Attack(two_products, ones(3, 3), twice(random(2, 3), random(2, 3, seed=1))),
    "two products, Gram": Attack(
        two_products, ones(30, 40), twice(random(2, 30), random(2, 40, seed=1))
    ),
    "two products of one cotangent": Attack(
        two_products_of_one_cotangent,
        ones(3, 4),
        (random(2, 3), opposite(random(2, 3)), random(2, 4, seed=1)),
    ),
    "product and transposed": Attack(
        product_and_transposed, ones(30, 40), twice(random(2, 30), random(2, 40, seed=1))
    ),
    "derived product": Attack(
        derived_product,
        {"down": ones(3, 2), "up": ones(2, 3)},
        (constant(8, 3), cancelling(8, 3)),
    ),
    "bias": Attack(bias, ones(5), cancelling(64, 5)),
    "bias, two terms": Attack(bias, ones(5), cancelling(2, 5)),
    "bias row": Attack(bias_row, ones(5), cancelling(64, 5)),
    "bias over steps": Attack(bias_over_steps, ones(5), cancelling(64, 5)),
    "table, few ids": Attack(table, ones(3, 5), (same_id(8), cancelling(8, 5))),
    "table, many ids": Attack(table, ones(3, 5), (same_id(300), cancelling(300, 5))),
    "table twice": Attack(table_twice, ones(6, 5), (same_id(1), *twice(*[random(1, 5)] * 2)[1:])),
    "table over steps": Attack(table_over_steps, ones(3, 5), (same_id(8), cancelling(8, 5))),
    "tied, instantiated": Attack(tied, ones(5, 4), tied_data(7, 5, 4)),
    "tied, Gram": Attack(tied, ones(30, 20), tied_data(4, 30, 20)),
    "convolution, instantiated": Attack(convolution, ones(3, 2, 2), images(16, 2, 2)),
    "convolution, Gram": Attack(convolution, ones(3, 30, 40), images(4, 30, 40)),
}


def scaled(attack: Attack, scale: float) -> Attack:
    batch = jax.tree.map(
        lambda leaf: leaf * np.float32(scale) if helpers.is_float(leaf) else leaf, attack.batch
    )
    return attack._replace(batch=batch)


def each_in_turn(names: Any) -> list[Any]:
    """Names with methods; the default run takes two methods of each, in turn."""
    return [
        pytest.param(
            name,
            method,
            id=f"{name}-{method}",
            marks=() if (index + shift) % 4 in (0, 1) else pytest.mark.slow,
        )
        for index, name in enumerate(names)
        for shift, method in enumerate(METHODS)
    ]


@pytest.mark.parametrize("scale", [1.0, pytest.param(1e4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "method"), [(name, m) for name in CANCELLING for m in ("slots", "taps")]
)
def test_sums_that_cancel_stay_below_the_threshold(name: str, method: str, scale: float) -> None:
    """Norm and contribution round differently unless they start from the same numbers."""
    check_contributions(scaled(CANCELLING[name], scale), method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fused", "dense"])
@pytest.mark.parametrize("name", list(CANCELLING))
def test_sums_that_cancel_stay_below_the_threshold_too(name: str, method: str) -> None:
    check_contributions(CANCELLING[name], method)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(CANCELLING))
def test_norms_of_sums_that_cancel(name: str, method: str, scale: float) -> None:
    check_norms(scaled(CANCELLING[name], scale), method)


# ---- factors out of range -----------------------------------------------------------------------


def spread(length: int, width: int, value: float) -> np.ndarray:
    return np.full((1, length, width), value, np.float32)


# Squares of 1e-19 are not normal numbers any more, those of 1e18 nearly overflow; the gradient
# itself is far from both ends.
LARGE, SMALL = 0.8e18, 1e-19

OUT_OF_RANGE = {
    "one position": Attack(product, ones(4, 64), (spread(1, 4, LARGE), spread(1, 64, SMALL))),
    "one position, other side": Attack(
        product, ones(64, 4), (spread(1, 64, SMALL), spread(1, 4, LARGE))
    ),
    "Gram": Attack(product, ones(40, 64), (spread(2, 40, LARGE), spread(2, 64, SMALL))),
    "instantiated": Attack(product, ones(3, 3), (spread(8, 3, LARGE), spread(8, 3, SMALL))),
    "vector": Attack(
        lambda w, example: jnp.vdot(example[0], w) * example[1],
        ones(8),
        (spread(1, 8, LARGE)[0], np.float32([SMALL])),
    ),
    "tied": Attack(
        tied,
        ones(30, 20),
        (
            np.zeros((1, 2), np.int32),
            spread(2, 20, 1.0),
            spread(2, 30, LARGE),
            spread(2, 20, SMALL),
        ),
    ),
    "convolution, instantiated": Attack(
        convolution, ones(1, 2, 2), (spread(8, 2, LARGE)[None], spread(8, 2, SMALL)[None])
    ),
    "convolution, Gram": Attack(
        convolution, ones(3, 30, 40), (spread(2, 30, LARGE)[None], spread(2, 40, SMALL)[None])
    ),
    "two slices": Attack(
        products_in_a_loop, ones(2, 4, 64), (spread(1, 4, LARGE), spread(1, 64, SMALL))
    ),
}


@pytest.mark.parametrize(("name", "method"), each_in_turn(OUT_OF_RANGE))
def test_factors_out_of_range_of_a_gradient_within(name: str, method: str) -> None:
    attack = OUT_OF_RANGE[name]
    (true,) = true_norms(attack)
    assert 0.1 < true < 1e4
    threshold = np.array([0.01])
    assert contributions(attack, method, threshold)[0] <= 1 + TOLERANCE
    (seen,) = norms(attack, method)
    assert np.isfinite(seen)
    assert seen >= true * (1 - TOLERANCE), f"{seen} instead of {true}"


@pytest.mark.parametrize("method", ["slots", "taps"])
def test_a_product_with_zeros_has_the_norm_zero(method: str) -> None:
    """A Gram matrix of zeros, of either factor."""
    u, v = random(4, 30), random(4, 40, seed=1)
    u[0], v[1] = 0, 0
    seen = norms(Attack(product, ones(30, 40), (u, v)), method)
    assert np.all(seen[:2] <= 1e-15)
    assert np.all(seen[2:] > 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-24, 1e-20, 1e20])
def test_doubles_that_floats_could_not_square(method: str, scale: float) -> None:
    """A wish above the cap is cut at C / norm, whatever precision the norm was kept in."""

    def clipped(w: jax.Array, x: jax.Array) -> jax.Array:
        grads_fn = jaxdp.per_sample_grads(lambda w, x: jnp.sum(x @ w), method=method)
        clip = jaxdp.clip_automatic(1.0, stability=1e-30)
        return clip.update(grads_fn(w, x), clip.init(w))[0].value

    with jax.enable_x64(True):
        x = scale * np.asarray(random(1, 9)[:1], np.float64)
        total = np.asarray(jax.jit(clipped)(jnp.ones((9, 7), jnp.float64), x))
    assert (0.99 if scale > 1 else 0) <= np.linalg.norm(total) <= 1 + TOLERANCE


# ---- a second pass that is not linear -----------------------------------------------------------


@jax.custom_vjp
def clip_cotangent(x: jax.Array) -> jax.Array:
    return x


clip_cotangent.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))


def half_between(w: Any, example: Any) -> jax.Array:
    u, v = example
    return jnp.vdot(v, (u @ w).astype(jnp.bfloat16).astype(jnp.float32))


def half_product(w: Any, example: Any) -> jax.Array:
    u, v = example
    numbers = (((1,), (0,)), ((), ()))
    out = lax.dot_general(u, w, numbers, preferred_element_type=jnp.bfloat16)
    return jnp.vdot(v, out.astype(jnp.float32))


NOT_LINEAR = {
    "cotangent clipped": lambda w, example: 100 * product_of_clipped(w, example),
    "loss in bfloat16": lambda w, example: product(w, example).astype(jnp.bfloat16),
    "loss in float16": lambda w, example: product(w, example).astype(jnp.float16),
    "bfloat16 after the product": half_between,
    "product in bfloat16": half_product,
}


def product_of_clipped(w: Any, example: Any) -> jax.Array:
    u, v = example
    return jnp.vdot(v, clip_cotangent(u @ w))


@pytest.mark.parametrize("clip", [jaxdp.clip_flat, jaxdp.clip_per_layer])
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0])
@pytest.mark.parametrize("name", list(NOT_LINEAR))
def test_taps_weigh_the_gradient_that_they_measured(name: str, scale: float, clip: Any) -> None:
    """The weight of a sample times its cotangent, sent back through what is not linear, would be
    another gradient: a clipped cotangent may be clipped no more, half precision rounds anew."""
    attack = Attack(NOT_LINEAR[name], ones(9, 7), (random(1, 9), random(1, 7, seed=1)))
    factors = scale * np.random.default_rng(1).uniform(0.3, 0.9, ROWS)
    worst = np.max(contributions(attack, "taps", factors * norms(attack, "taps"), clip))
    assert 0.99 <= worst <= 1 + TOLERANCE


def upcast(w: Any, example: Any) -> jax.Array:
    return product(w.astype(jnp.float32), example)


def there_and_back(w: Any, example: Any) -> jax.Array:
    return product(w.astype(jnp.bfloat16).astype(jnp.float32), example)


@pytest.mark.parametrize("method", ["auto", "taps", "slots", "fused"])
@pytest.mark.parametrize(
    ("loss_fn", "dtype"), [(upcast, jnp.bfloat16), (there_and_back, jnp.float32)]
)
def test_one_sample_more_moves_the_sum_by_no_more_than_the_threshold(
    loss_fn: Any, dtype: Any, method: str
) -> None:
    """A sum over the batch that is rounded to half precision moves by its last digit, or not."""
    u, v = random(1, 9)[:1], random(1, 7, seed=1)[:1]
    batch = (np.repeat(u, 1001, axis=0), np.repeat(v, 1001, axis=0))
    clip = jaxdp.clip_flat(1.0)
    grads_fn = jaxdp.per_sample_grads(jax.checkpoint(loss_fn), method=method)

    @jax.jit
    def total(w: jax.Array, mask: jax.Array) -> jax.Array:
        return clip.update(grads_fn(w, batch, mask), clip.init(w))[0].value

    w = jnp.ones((9, 7), dtype)
    fewer, more = total(w, np.arange(1001) < 1000), total(w, np.arange(1001) < 1001)
    moved = np.linalg.norm(np.asarray(more, np.float64) - np.asarray(fewer, np.float64))
    # Where values are in half precision, the weights of taps leave room for 2⁻⁸ of the norm.
    assert 1 - 2**-8 - 1e-3 <= moved <= 1 + 1e-3


# ---- half precision -----------------------------------------------------------------------------


def halved(attack: Attack, dtype: Any) -> Attack:
    """Parameters and floats of the batch in half precision, the loss in single."""
    def half(leaf: Any) -> Any:
        return jnp.asarray(leaf, dtype) if helpers.is_float(leaf) else leaf

    def loss_fn(params: Any, example: Any) -> jax.Array:
        loss = attack.loss_fn(params, example)
        return loss if loss.dtype == jnp.float64 else loss.astype(jnp.float32)

    params, batch = jax.tree.map(half, (attack.params, attack.batch))
    return Attack(loss_fn, params, batch)


def words(length: int) -> np.ndarray:
    return np.random.default_rng(6).integers(3, size=(ROWS, length)).astype(np.int32)


IN_HALF = {
    "product, instantiated": Attack(product, ones(3, 3), (random(8, 3), random(8, 3, seed=1))),
    "product, Gram": Attack(product, ones(30, 40), (random(4, 30), random(4, 40, seed=1))),
    "product, one position": Attack(product, ones(9, 7), (random(1, 9), random(1, 7, seed=1))),
    "bias": Attack(bias, ones(5), random(64, 5)),
    "table": Attack(table, ones(3, 5), (words(64), random(64, 5))),
    "convolution": Attack(
        convolution, ones(3, 2, 2), (random(1, 9, 2), random(1, 9, 2, seed=1))
    ),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "method"), each_in_turn(IN_HALF))
def test_half_precision(name: str, method: str, dtype: Any) -> None:
    """Norms and sums are those of the factors in half precision, themselves in single."""
    check_contributions(halved(IN_HALF[name], dtype), method)


# ---- length -------------------------------------------------------------------------------------

MANY = 2_000_000

LONG = {
    "long vector": Attack(jnp.vdot, ones(MANY), np.ones((1, MANY), np.float32)),
    "long bias": Attack(lambda b, v: jnp.sum(b * v), ones(MANY), np.ones((1, MANY), np.float32)),
    "long output": Attack(
        product, ones(1, MANY), (np.ones((1, 1, 1), np.float32), np.ones((1, 1, MANY), np.float32))
    ),
    "long matrix": Attack(
        product,
        ones(1000, 2000),
        (np.ones((1, 1, 1000), np.float32), np.ones((1, 1, 2000), np.float32)),
    ),
    "long row of a table": Attack(
        table, ones(2, MANY), (np.ones((1, 1), np.int32), np.ones((1, 1, MANY), np.float32))
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(LONG))
def test_long_gradients_of_ones(name: str, method: str) -> None:
    """Added up one by one in single precision, ones drift."""
    attack = LONG[name]
    np.testing.assert_allclose(norms(attack, method), true_norms(attack), rtol=TOLERANCE)
    assert contributions(attack, method, np.array([1.0]))[0] <= 1 + TOLERANCE


@pytest.mark.parametrize("method", ["slots", "taps"])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_norms_scale_with_the_gradient(method: str, scale: float) -> None:
    attack = Attack(product, ones(12, 11), (random(3, 12), random(3, 11, seed=1)))
    small = attack._replace(batch=(attack.batch[0], np.float32(scale) * attack.batch[1]))
    np.testing.assert_allclose(norms(small, method), true_norms(small), rtol=TOLERANCE)


# ---- ids out of range ---------------------------------------------------------------------------


def table_in_a_block(t: Any, example: Any) -> jax.Array:
    ids, v = example
    return jnp.vdot(v, jax.checkpoint(lambda t, ids: t[ids])(t, ids))


def table_of_mode(mode: Any) -> Callable[[Any, Any], jax.Array]:
    return lambda t, example: jnp.vdot(example[1], t.at[example[0]].get(mode=mode))


OUTSIDE = {
    "as indexing does": table,
    "in a block": table_in_a_block,
    "clipped": table_of_mode("clip"),
    "filled": table_of_mode("fill"),
    "taken": lambda t, example: jnp.vdot(example[1], jnp.take(t, example[0], axis=0)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(OUTSIDE))
def test_ids_out_of_range_hide_nothing(name: str, method: str) -> None:
    """The second id is beyond the table. Where JAX drops its gradient, it must not cancel that of
    the last row in the norm alone."""
    v = random(1, 5)[:1]
    batch = (np.array([[3, 7]], np.int32), np.concatenate([v, -v], axis=1))
    attack = Attack(OUTSIDE[name], ones(4, 5), batch)
    # Taps bound by 1/256 of the terms what is left of two rows that cancel.
    np.testing.assert_allclose(norms(attack, method), true_norms(attack), rtol=1e-5, atol=1e-2)
    assert contributions(attack, method, np.array([0.01]))[0] <= 1 + TOLERANCE
