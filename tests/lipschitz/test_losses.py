"""The losses: values against other derivations, gradients against their bounds."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdp import lipschitz

CLASSES = 5
SHARES = (0.5, 0.2, 0.15, 0.1, 0.05)


class Loss(NamedTuple):
    """A loss of (prediction, target), its target's kind, and the bound on its gradient where the
    prediction is not bounded."""

    fun: Callable[[Any, Any], jax.Array]
    target: str
    bound: float


def kr_bound() -> float:
    own, other = 1 / np.array(SHARES), 1 / (1 - np.array(SHARES))
    rows = np.where(np.eye(CLASSES, dtype=bool), own, other)
    return float(np.linalg.norm(rows, axis=1).max() / CLASSES)


LOSSES: Mapping[str, Loss] = {
    "softmax": Loss(lipschitz.softmax_cross_entropy, "label", 2**0.5),
    "softmax, temperature": Loss(
        lambda z, y: lipschitz.softmax_cross_entropy(z, y, temperature=7.0), "label", 2**0.5
    ),
    "binary": Loss(lipschitz.binary_cross_entropy, "numbers", CLASSES**-0.5),
    "binary, temperature": Loss(
        lambda z, y: lipschitz.binary_cross_entropy(z, y, temperature=0.3), "numbers", CLASSES**-0.5
    ),
    "hinge": Loss(lipschitz.multiclass_hinge, "label", (1 - 1 / CLASSES) ** 0.5),
    "cosine": Loss(lipschitz.cosine_similarity, "numbers", 1.0),
    "cosine, least norm": Loss(
        lambda z, y: lipschitz.cosine_similarity(z, y, least_norm=0.2), "numbers", 5.0
    ),
    "absolute error": Loss(lipschitz.mean_absolute_error, "numbers", CLASSES**-0.5),
    "kr": Loss(
        lambda z, y: lipschitz.kantorovich_rubinstein(z, y, proportions=SHARES), "label", kr_bound()
    ),
    "hkr": Loss(
        lambda z, y: lipschitz.hinge_kantorovich_rubinstein(
            z, y, proportions=SHARES, alpha=3.0, margin=0.5
        ),
        "label",
        kr_bound() + 3 * (1 - 1 / CLASSES) ** 0.5,
    ),
}


def predictions(scale: float, count: int = 4000) -> tuple[jax.Array, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(count, CLASSES)) * scale * 10 ** rng.uniform(-2, 0, size=(count, 1))
    z[::7] = 0
    label = rng.integers(-1, CLASSES + 1, size=count)
    numbers = rng.normal(size=(count, CLASSES)) * 2
    targets = {"label": jnp.asarray(label), "numbers": jnp.asarray(numbers, jnp.float32)}
    return jnp.asarray(z, jnp.float32), targets


def bound_of(loss: Loss, limit: float) -> float:
    """On the gradient of a bias whose values are the predictions."""
    target = jnp.int32(0) if loss.target == "label" else jnp.zeros(CLASSES)
    shift = jnp.zeros(CLASSES)
    found = lipschitz.bounds(
        lambda b, example: loss.fun(example[0] + b, example[1]),
        shift,
        (shift, target),
        (limit, np.inf),
    )
    return float(found.total)


@pytest.mark.sweep
@pytest.mark.parametrize("limit", [0.1, 1.0, 30.0, np.inf])
@pytest.mark.parametrize("name", list(LOSSES))
def test_no_gradient_is_longer_than_its_bound(name: str, limit: float) -> None:
    loss = LOSSES[name]
    z, targets = predictions(min(limit, 1e4))
    norms = jnp.linalg.norm(z, axis=1, keepdims=True)
    z = z * jnp.minimum(1, limit / jnp.maximum(norms, 1e-9))
    grads = jax.jit(jax.vmap(jax.grad(loss.fun)))(z, targets[loss.target])
    longest = np.linalg.norm(np.asarray(grads, np.float64), axis=1).max()
    bound = bound_of(loss, limit)
    assert longest <= bound * (1 + 1e-5)
    if limit == np.inf:
        assert bound == pytest.approx(loss.bound, rel=1e-4)
        assert longest > 0.75 * bound


def test_bounded_logits_make_the_cross_entropy_tighter() -> None:
    # K = 10, τZ = 0.03: at most 0.964, against √2.
    def loss_fn(shift: jax.Array, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        return lipschitz.softmax_cross_entropy(example[0] + shift, example[1], temperature=0.03)

    zero = jnp.zeros(10)
    found = lipschitz.bounds(loss_fn, zero, (zero, jnp.int32(0)), 1.0)
    assert float(found.total) == pytest.approx(0.9538, abs=1e-3)


@pytest.mark.parametrize("reach, saved", [(0.5, 1.3), (1.0, 1.29), (2.0, 1.15), (4.0, 1.03)])
def test_the_cross_entropy_needs_less_noise_where_logits_are_bounded(
    reach: float, saved: float
) -> None:
    """Against the worst logits that a search finds, and against √2."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3000, 10)), jnp.float32)

    def size(z: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jax.nn.softmax(z, axis=1) - jax.nn.one_hot(0, 10)[None]))

    for _ in range(60):
        z = z + 0.3 * reach * jnp.sign(jax.grad(size)(z))
        z = reach * z / jnp.linalg.norm(z, axis=1, keepdims=True)
    worst = jnp.linalg.norm(jax.nn.softmax(z, axis=1) - jax.nn.one_hot(0, 10)[None], axis=1).max()

    def loss_fn(shift: jax.Array, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        return lipschitz.softmax_cross_entropy(example[0] + shift, example[1])

    zero = jnp.zeros(10)
    found = lipschitz.bounds(loss_fn, zero, (zero, jnp.int32(0)), reach)
    assert float(worst) <= float(found.total) <= 2**0.5 / saved


def test_values_are_those_of_other_libraries() -> None:
    z, targets = predictions(3.0, 50)
    label, numbers = jnp.clip(targets["label"], 0, CLASSES - 1), targets["numbers"]
    theirs = optax.losses
    pairs = [
        (
            jax.vmap(lipschitz.softmax_cross_entropy)(z, label),
            theirs.softmax_cross_entropy_with_integer_labels(z, label),
        ),
        (
            jax.vmap(lambda z, y: lipschitz.softmax_cross_entropy(z, y, temperature=2.0))(z, label),
            theirs.softmax_cross_entropy_with_integer_labels(2 * z, label) / 2,
        ),
        (
            jax.vmap(lipschitz.binary_cross_entropy)(z, jnp.clip(numbers, 0, 1)),
            theirs.sigmoid_binary_cross_entropy(z, jnp.clip(numbers, 0, 1)).mean(1),
        ),
        (
            jax.vmap(lambda z, t: lipschitz.cosine_similarity(z, t, least_norm=1e-6))(
                z + 1, numbers
            ),
            -theirs.cosine_similarity(z + 1, numbers),
        ),
        (jax.vmap(lipschitz.mean_absolute_error)(z, numbers), jnp.abs(z - numbers).mean(1)),
    ]
    for ours, other in pairs:
        np.testing.assert_allclose(ours, other, rtol=2e-5, atol=1e-6)


def test_the_hinge_counts_margins_that_are_missed() -> None:
    z = np.array([0.4, 1.0, 0.7, -2.0, 1.5])
    expected = sum(max(0, 0.5 - z[1] + z[k]) for k in range(CLASSES) if k != 1) / CLASSES
    found = lipschitz.multiclass_hinge(jnp.asarray(z, jnp.float32), 1, margin=0.5)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_per_sample_kr_loss_has_the_mean_of_the_batch_one() -> None:
    """Where the proportions are those of the batch."""
    z, _ = predictions(1.0, 1000)
    label = jnp.asarray(np.repeat(np.arange(CLASSES), (np.array(SHARES) * 1000).astype(int)))
    mine = jax.vmap(lambda z, y: lipschitz.kantorovich_rubinstein(z, y, proportions=SHARES))(
        z, label
    ).mean()
    per_class = [float(z[label != k, k].mean() - z[label == k, k].mean()) for k in range(CLASSES)]
    assert float(mine) == pytest.approx(np.mean(per_class), rel=1e-4, abs=1e-5)


WRONG = {
    "temperature": lambda z: lipschitz.softmax_cross_entropy(z, 0, temperature=0.0),
    "margin": lambda z: lipschitz.multiclass_hinge(z, 0, margin=-1.0),
    "least_norm": lambda z: lipschitz.cosine_similarity(z, z, least_norm=0.0),
    "proportions": lambda z: lipschitz.kantorovich_rubinstein(z, 0, proportions=(0.5, 0.5)),
    "proportions must be finite": lambda z: lipschitz.kantorovich_rubinstein(
        z, 0, proportions=(0.0, *SHARES[1:])
    ),
    "alpha": lambda z: lipschitz.hinge_kantorovich_rubinstein(z, 0, proportions=SHARES, alpha=-1.0),
}


@pytest.mark.parametrize("message", list(WRONG))
def test_arguments_are_checked(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WRONG[message](jnp.zeros(CLASSES))


def test_a_target_that_depends_on_parameters_is_refused() -> None:
    def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        return lipschitz.mean_absolute_error(params * x, params)

    with pytest.raises(NotImplementedError, match="stop_gradient"):
        lipschitz.bounds(loss_fn, jnp.ones(3), jnp.ones(3), 1.0)


# ---- what a declared bound assumes ---------------------------------------------------------------

LABELLED = {name: loss.fun for name, loss in LOSSES.items() if loss.target == "label"}
COMPARED = {name: loss.fun for name, loss in LOSSES.items() if loss.target == "numbers"}
Z = jnp.ones(CLASSES)

WRONG_LABELS: Mapping[str, tuple[Any, Any, type[Exception], str]] = {
    "a batch of logits": (jnp.ones((8, CLASSES)), 0, ValueError, "logits must be the .K."),
    "a batch of one": (jnp.ones((1, CLASSES)), 0, ValueError, "logits must be the .K."),
    "a scalar": (jnp.ones(()), 0, ValueError, "logits must be the .K."),
    "one logit": (jnp.ones(1), 0, ValueError, "K at least 2"),
    "no logit": (jnp.ones(0), 0, ValueError, "K at least 2"),
    "integer logits": (jnp.ones(CLASSES, jnp.int32), 0, TypeError, "logits must be floating-point"),
    "one-hot integers": (Z, jnp.eye(CLASSES, dtype=jnp.int32)[1], ValueError, "jnp.argmax"),
    "one-hot numbers": (Z, jnp.eye(CLASSES)[1], TypeError, "label must be one integer"),
    "a vector of one label": (Z, jnp.array([1]), ValueError, "label must be one integer"),
    "a label of each class": (Z, jnp.arange(CLASSES), ValueError, "label must be one integer"),
    "a float": (Z, 1.0, TypeError, "label must be one integer, got dtype float32"),
    "a traced float": (Z, jnp.float32(1), TypeError, "label must be one integer"),
    "a flag": (Z, True, TypeError, "label must be one integer, got dtype bool"),
    "a label that is too large": (Z, CLASSES, ValueError, "label must be in 0..4, got 5"),
    "a label below zero": (Z, -1, ValueError, "label must be in 0..4, got -1"),
    "a known array out of range": (Z, jnp.uint8(200), ValueError, "label must be in 0..4, got 200"),
}


@pytest.mark.parametrize("name", list(LABELLED))
@pytest.mark.parametrize("wrong", list(WRONG_LABELS))
def test_logits_and_labels_are_what_the_bound_assumes(name: str, wrong: str) -> None:
    logits, label, error, message = WRONG_LABELS[wrong]
    with pytest.raises(error, match=message):
        LABELLED[name](logits, label)


SHAPES = [((3,), (16, 3)), ((16, 3), (3,)), ((3,), ()), ((), (1,)), ((3, 1), (3,)), ((3,), (1,))]


@pytest.mark.parametrize("name", list(COMPARED))
@pytest.mark.parametrize("shapes", SHAPES)
def test_targets_are_as_large_as_predictions(name: str, shapes: Any) -> None:
    mine, other = shapes
    with pytest.raises(ValueError, match="must have the shape of the (logits|prediction)"):
        COMPARED[name](jnp.ones(mine), jnp.ones(other))


@pytest.mark.parametrize("name", list(COMPARED))
def test_predictions_and_targets_are_numbers(name: str) -> None:
    with pytest.raises(TypeError, match="must be floating-point numbers, got dtype int32"):
        COMPARED[name](jnp.ones(3, jnp.int32), jnp.ones(3))
    with pytest.raises(TypeError, match="must be real"):
        COMPARED[name](jnp.ones(3), jnp.ones(3, jnp.complex64))
    whole = COMPARED[name](jnp.ones(3), jnp.ones(3, jnp.int32))
    assert float(whole) == float(COMPARED[name](jnp.ones(3), jnp.ones(3)))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.uint32])
@pytest.mark.parametrize("name", list(LABELLED))
def test_a_traced_label_of_no_class_makes_the_loss_no_number_and_keeps_the_bound(
    name: str, dtype: Any
) -> None:
    """None of the examples is dropped on this road: their gradients stay within the bound."""
    loss = LOSSES[name]
    info = jnp.iinfo(dtype)
    labels = jnp.asarray([0, CLASSES - 1, CLASSES, 100, info.max, info.min], dtype)
    z = predictions(1e3, 1)[0][0] + 1

    @jax.jit
    def both(label: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(loss.fun)(z, label)

    for label in labels:
        value, gradient = both(label)
        assert np.isnan(value) == (not 0 <= int(label) < CLASSES)
        size = np.linalg.norm(np.asarray(gradient, np.float64))
        assert size <= loss.bound * (1 + 1e-5)  # NaN is not


def test_labels_fit_more_classes_than_their_dtype() -> None:
    logits = jnp.arange(300.0)
    assert float(lipschitz.multiclass_hinge(logits, jnp.int8(3))) > 0
    found = jax.jit(lipschitz.softmax_cross_entropy)(logits, jnp.uint8(255))
    assert float(found) == pytest.approx(300 - 255 - 1 + 0.4587, abs=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15, 1e37])
@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.optimized
def test_gradients_are_finite_and_bounded_for_logits_of_any_size(name: str, scale: float) -> None:
    """Products that are made twice, with and without a fused multiply-add, are no two numbers."""
    loss = LOSSES[name]
    target = jnp.int32(1) if loss.target == "label" else jnp.linspace(-2, 2, CLASSES)
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(20, CLASSES)), jnp.float32)

    def total(factor: jax.Array, rows: jax.Array) -> jax.Array:
        each = jax.vmap(lambda row: loss.fun(scale * factor * row, target))(rows)
        return jnp.sum(each)

    params = jnp.ones(CLASSES)
    gradient_fn = jax.jit(jax.grad(total))
    for row in rows:
        gradient = np.asarray(gradient_fn(params, row[None]), np.float64)
        longest = scale * np.abs(np.asarray(row, np.float64)).max()
        assert np.linalg.norm(gradient) <= loss.bound * longest * (1 + 1e-4)


RANGES = {
    "temperature": lambda value: lipschitz.softmax_cross_entropy(Z, 0, temperature=value),
    "margin": lambda value: lipschitz.multiclass_hinge(Z, 0, margin=value),
    "least_norm": lambda value: lipschitz.cosine_similarity(Z, Z, least_norm=value),
    "alpha": lambda value: lipschitz.hinge_kantorovich_rubinstein(
        Z, 0, proportions=SHARES, alpha=value
    ),
    "proportions": lambda value: lipschitz.kantorovich_rubinstein(
        Z, 0, proportions=(value, *SHARES[1:])
    ),
}


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30, 1e30, np.nan, np.inf, "1", True, None])
@pytest.mark.parametrize("name", list(RANGES))
def test_arguments_out_of_range_are_refused_with_their_name(name: str, value: Any) -> None:
    wrong_type = isinstance(value, str | bool) or value is None
    with pytest.raises(TypeError if wrong_type else ValueError, match=f"{name} must be"):
        RANGES[name](value)
