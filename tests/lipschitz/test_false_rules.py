"""Rules that were published, and are false: the falsifier breaks each of them when it is put back.

Every test runs the attack twice: the rule of jaxdp survives it, the false one does not. Where a
failure cannot be expressed here at all, the test shows what stops it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp import lipschitz, nn
from jaxdp.lipschitz.gradient_clipping import _clip_rule
from jaxdp.lipschitz.rules import elementwise, products, registry

KEY = jax.random.key(0)
SIZE = 4


def attack(
    loss_fn: Callable[..., jax.Array], params: Any, example: Any, bound: float = 1.0, **options: Any
) -> lipschitz.Falsification:
    return lipschitz.falsify(
        loss_fn, params, example, bound, key=KEY, count=16, steps=10, **options
    )


def broken(found: lipschitz.Falsification) -> dict[str, float]:
    """Leaves whose bound is false, with the ratio."""
    return {name: each.ratio for name, each in found.attacks.items() if not each.ratio <= 1.00001}


def convolution(kernel: jax.Array) -> tuple[Callable[..., jax.Array], Any]:
    """Image → convolution → weights, with the output as the gradient of the last."""
    channels = kernel.shape[-1]
    layer = nn.conv2d(1, channels, 3, padding=1, bias=False)
    above = jax.random.normal(KEY, (SIZE * SIZE * channels,))
    params = {"above": above / jnp.linalg.norm(above), "conv": {"kernel": kernel}}

    def loss_fn(params: Any, image: jax.Array) -> jax.Array:
        return params["above"] @ layer.apply(params["conv"], image).reshape(-1)

    return loss_fn, params


IMAGE = jnp.zeros((SIZE, SIZE, 1))
SUMS = jnp.ones((3, 3, 1, 1)) / 9


def test_1_the_gradient_of_a_kernel_counts_every_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_fn, params = convolution(SUMS)
    params["above"] = jnp.ones(SIZE * SIZE) / SIZE
    assert attack(loss_fn, params, IMAGE).survived
    monkeypatch.setattr(products, "patch_multiplicity", lambda *_: 1)
    assert broken(attack(loss_fn, params, IMAGE))["conv/kernel"] > 2


def test_2_the_average_patch_is_not_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    # Orthogonal as a matrix: every place of the window has an output of its own.
    loss_fn, params = convolution(jnp.eye(9).reshape(3, 3, 1, 9))
    assert attack(loss_fn, params, IMAGE).survived
    # A position at the border lies in fewer windows: 2.5² instead of 3² on average.
    average = sum(min(i + 2, 3, SIZE - i + 1) for i in range(SIZE)) / SIZE

    def averaged(kernel: jax.Array, *_: Any) -> jax.Array:
        return average * lipschitz.matrix_norm(kernel.reshape(-1, kernel.shape[-1]))

    assert average == 2.5
    monkeypatch.setattr(products, "convolution_norm", averaged)
    assert broken(attack(loss_fn, params, IMAGE))["above"] > 1.19


def test_3_a_bias_on_a_map_is_added_at_every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"bias": jnp.zeros(2)}
    image = jnp.zeros((SIZE, SIZE, 2))

    # The distance from a place that no image reaches.
    distance = lipschitz.declare(
        lambda y: jnp.linalg.norm(y.reshape(-1) - 2.0),
        lambda eqn, values: ([lipschitz.Range()], lambda bounds: bounds),
    )

    def loss_fn(params: Any, image: jax.Array) -> jax.Array:
        return distance(image + params["bias"].reshape(1, 1, 2))

    assert attack(loss_fn, params, image).survived
    # Newer versions of JAX broadcast within the sum, older ones before it.
    monkeypatch.setitem(registry._RULES, "broadcast_in_dim", registry._RULES["reshape"])
    monkeypatch.setattr(elementwise, "_copies", lambda eqn, values: [1.0 for _ in values])
    ratios = broken(attack(loss_fn, params, image))
    assert ratios["bias"] > 0.9 * SIZE


def test_4_nothing_can_be_centred_over_the_batch() -> None:
    def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(params * (x - jax.lax.pmean(x, "batch")))

    with pytest.raises(NameError, match="batch"):
        lipschitz.bounds(loss_fn, jnp.ones(3), jnp.ones(3), 1.0)

    # Even where the axis exists, there is no rule for what it brings from other samples.
    def over_rows(x: jax.Array) -> Any:
        return jax.vmap(
            lambda row: lipschitz.bounds(loss_fn, jnp.ones(3), row, 1.0).total, axis_name="batch"
        )(x)

    with pytest.raises(ValueError, match="communication over a named axis"):
        over_rows(jnp.ones((4, 3)))


def test_5_a_class_with_one_sample_weighs_as_much_as_its_share_is_small() -> None:
    shares = (0.99, 0.01)
    params = {"bias": jnp.zeros(2)}
    example = (jnp.zeros(2), jnp.int32(0))

    def with_loss(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda params, example: loss(example[0] + params["bias"], example[1])

    true = with_loss(functools.partial(lipschitz.kantorovich_rubinstein, proportions=shares))
    assert attack(true, params, example).survived
    # The published bound of the loss is one.
    claimed = lipschitz.declare(
        lambda logits, label: lipschitz.kantorovich_rubinstein(logits, label, proportions=shares),
        lambda eqn, values: ([lipschitz.Range()], lambda bounds: [bounds[0], None]),
    )
    assert broken(attack(with_loss(claimed), params, example))["bias"] > 50


def test_6_a_gradient_clipped_in_units_of_a_mean_is_not_clipped() -> None:
    batch_size = 100
    params = jnp.ones(3)

    def loss_with(clip: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
        return lambda params, x: 5 * jnp.sum(clip(params * x))

    true = loss_with(lambda y: lipschitz.clip_gradient(y, 0.1))
    assert attack(true, params, jnp.zeros(3)).survived
    # C of the mean's gradient acts on a sample's at batch_size times C, and is accounted for as C.
    in_mean_units = lipschitz.declare(
        lambda y, c: lipschitz.clip_gradient(y, batch_size * c), _clip_rule
    )
    false = loss_with(lambda y: in_mean_units(y, jnp.float32(0.1)))
    assert broken(attack(false, params, jnp.zeros(3)))[""] > 10


def test_7_a_normalised_weight_has_another_gradient_than_a_normal_one() -> None:
    params = {"kernel": 0.2 * jnp.eye(3)}

    def normalised(kernel: jax.Array) -> jax.Array:
        return kernel / jnp.sqrt(jnp.sum(jnp.square(kernel)))

    def loss_with(reparametrise: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
        return lambda params, x: jnp.sum(x @ reparametrise(params["kernel"])) / 3**0.5

    assert attack(loss_with(normalised), params, jnp.zeros(3)).survived
    # Published: the Jacobian of the normalisation counts as one.
    ignored = lipschitz.declare(
        normalised, lambda eqn, values: ([lipschitz.Range(1.0)], lambda bounds: bounds)
    )
    assert broken(attack(loss_with(ignored), params, jnp.zeros(3)))["kernel"] > 1.4
    # Singular value decompositions in the forward pass have no rule at all.
    spectral = loss_with(lambda kernel: kernel / jnp.linalg.norm(kernel, 2))
    with pytest.raises(NotImplementedError, match="svd"):
        lipschitz.bounds(spectral, params, jnp.zeros(3), 1.0)


# 8, the mean over the samples that came, is no bound of a model: see test_bounded_grads.


def power_iteration(matrix: jax.Array, steps: int = 1) -> jax.Array:
    """What approaches the largest singular value from below."""
    u = jnp.ones(matrix.shape[-2]) / matrix.shape[-2] ** 0.5
    for _ in range(steps):
        v = u @ matrix
        u = matrix @ (v / jnp.linalg.norm(v))
        u = u / jnp.linalg.norm(u)
    return jnp.linalg.norm(u @ matrix)


def test_9_power_iteration_underestimates(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"above": jnp.ones(12) / 12**0.5, "kernel": jax.random.normal(KEY, (12, 12))}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return params["above"] @ (params["kernel"] @ x)

    assert attack(loss_fn, params, jnp.zeros(12)).survived
    monkeypatch.setattr(products, "matrix_norm", lambda stack: jax.vmap(power_iteration)(stack))
    assert broken(attack(loss_fn, params, jnp.zeros(12)))["above"] > 1.01


def test_a_function_that_is_no_gnp_is_found_out() -> None:
    doubled = lipschitz.gradient_norm_preserving(lambda x: jnp.tanh(2 * x))

    def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(doubled.apply({}, params * x)) / math.sqrt(3)

    found = attack(loss_fn, 0.1 * jnp.ones(3), jnp.zeros(3))
    assert not found.survived
    assert "BROKEN" in str(found) and found.attacks[""].ratio > 1


def test_an_infinite_bound_does_not_survive() -> None:
    found = attack(lambda p, x: jnp.log(jnp.abs(p @ x)), jnp.ones(3), jnp.ones(3))
    assert not found.survived and np.isinf(found.attacks[""].bound)


def test_every_kind_of_example_can_be_attacked() -> None:
    """Ids, flags, keys and numbers; ids all equal reach the bound of a table."""
    example = {
        "ids": jnp.zeros(4, jnp.int32),
        "flag": jnp.array(True),
        "key": jax.random.key(0),
        "x": jnp.zeros(4),
    }
    params = {"table": jnp.ones((5, 3))}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        rows = params["table"].at[example["ids"]].get(mode="clip")
        kept = jax.random.bernoulli(example["key"], 0.9, (4,))
        weights = jnp.where(kept & example["flag"], example["x"], 0.0)
        return jnp.sum(weights @ rows) / 3**0.5

    found = attack(loss_fn, params, example, classes=5)
    assert found.survived
    assert found.attacks["table"].ratio > 0.99
    assert set(map(len, str(found).splitlines()[0].split())) == {4, 7, 5, 6}


def test_a_gradient_that_is_not_a_number_is_not_forgotten() -> None:
    """Whatever attacks follow on the one that found it: only inputs with a zero do here."""
    spoiled = lipschitz.declare(
        lambda p, x: jnp.where(x[0] == 0, jnp.nan, 1.0) * jnp.sum(p * x),
        lambda eqn, values: ([lipschitz.Range()], lambda bounds: [bounds[0], None]),
    )
    found = attack(spoiled, jnp.ones(3), jnp.zeros(3))
    assert not found.survived and np.isnan(found.attacks[""].ratio)
