"""Products in the precision of the model: what a matrix unit multiplies is what is certified.

A CPU multiplies exactly what the engine has rounded for another platform, so that attacks on the
rounding of operands and weights run here as they would there.
"""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxdp
from jaxdp.engine import precision, walker
from jaxdp.engine.factors import gram, outer
from jaxdp.engine.kinds.base import multiplies, stored_bits
from jaxdp.engine.numerics import tracing_for
from tests.engine.test_norm_attacks import (
    CANCELLING,
    METHODS,
    ROWS,
    TOLERANCE,
    Attack,
    check_contributions,
    contributions,
    convolution,
    norms,
    ones,
    product,
    random,
)

# One half with the oldest JAX, the other half with newer ones (tests/conftest.py).
pytestmark = [pytest.mark.sweep, pytest.mark.optimized]

# Stored bits of float32 at its default precision.
STORED = {"tpu": 7, "gpu": 10}


# ---- which precision ----------------------------------------------------------------------------


def stored(fun: Callable[..., Any], *args: Any, operand: int = 1) -> int:
    """Of the one product of `fun`."""
    program, _ = walker.trace(fun, *args)
    (eqn,) = [e for e in walker.equations(program) if multiplies(e)]
    return stored_bits(eqn, operand)


def matmul(dtype: Any, asked: Any = None, result: Any = None) -> int:
    x = jnp.ones((4, 4), dtype)

    def multiplied(a: Any, b: Any) -> jax.Array:
        return jnp.matmul(a, b, precision=asked, preferred_element_type=result)

    return stored(multiplied, x, x)


HIGH, HIGHEST = lax.Precision.HIGH, lax.Precision.HIGHEST


@pytest.mark.parametrize(
    ("platform", "dtype", "asked", "result", "bits"),
    [
        ("cpu", jnp.float32, None, None, 23),
        ("cpu", jnp.bfloat16, None, None, 23),
        ("tpu", jnp.float32, None, None, 7),
        ("tpu", jnp.float32, HIGH, None, 23),
        ("tpu", jnp.float32, HIGHEST, None, 23),
        ("tpu", jnp.float32, (lax.Precision.DEFAULT, HIGHEST), None, 23),
        ("tpu", jnp.bfloat16, HIGHEST, None, 7),
        ("tpu", jnp.float16, None, None, 7),
        ("gpu", jnp.float32, None, None, 10),
        ("gpu", jnp.float32, HIGH, None, 10),
        ("gpu", jnp.float32, HIGHEST, None, 23),
        ("gpu", jnp.float32, lax.DotAlgorithmPreset.F32_F32_F32, None, 23),
        ("gpu", jnp.bfloat16, None, None, 7),
        ("gpu", jnp.bfloat16, None, jnp.float32, 10),
        ("gpu", jnp.float16, None, None, 10),
    ],
)
def test_operands_are_as_wide_as_the_model_multiplies_them(
    platform: str, dtype: Any, asked: Any, result: Any, bits: int
) -> None:
    with tracing_for(platform):
        assert matmul(dtype, asked, result) == bits


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_user_s_own_precision_holds(platform: str) -> None:
    with tracing_for(platform):
        with jax.default_matmul_precision("highest"):
            assert matmul(jnp.float32) == 23
        with jax.enable_x64(True):
            assert matmul(jnp.float64) == 52


def test_what_is_traced_for_a_platform_is_not_run_for_another() -> None:
    count = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        count.append(None)
        return x + 1

    f(1.0)
    with tracing_for("tpu"):
        f(1.0)
        with tracing_for("gpu"):
            f(1.0)
        f(1.0)
    f(1.0)
    assert len(count) == 3


def test_another_platform_is_refused() -> None:
    with pytest.raises(ValueError, match="platform must be 'cpu', 'gpu' or 'tpu', got 'cuda'"):
        with tracing_for("cuda"):
            pass


def test_on_a_cpu_nothing_is_rounded() -> None:
    u, v = random(4, 30), random(4, 40, seed=1)
    grads_fn = jaxdp.per_sample_grads(product, method="slots")

    def clipped(w: jax.Array, batch: Any) -> Any:
        clip = jaxdp.clip_flat(1.0)
        return clip.update(grads_fn(w, batch), clip.init(w))[0].value

    here = str(jax.make_jaxpr(clipped)(ones(30, 40), (u, v)))
    assert "bf16" not in here and "reduce_precision" not in here
    with tracing_for("tpu"):
        there = str(jax.make_jaxpr(clipped)(ones(30, 40), (u, v)))
    assert "bf16" in there and "HIGHEST" not in there


# ---- the gradient that is meant -----------------------------------------------------------------


def rounded(array: np.ndarray, bits: int) -> np.ndarray:
    """To so many stored bits, ties to even, by integers; in float64."""
    drop = 23 - bits
    word = np.asarray(array, np.float32).view(np.uint32).astype(np.uint64)
    half = (1 << (drop - 1)) - 1 + ((word >> drop) & 1)
    word = ((word + half) >> drop) << drop
    return word.astype(np.uint32).view(np.float32).astype(np.float64)


FORMS = {
    "outer product": (1, 30, 40),
    "Gram": (4, 30, 40),
    "rows": (64, 8, 8),
}


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("method", ["slots", "taps", "fused"])
@pytest.mark.parametrize("form", list(FORMS))
def test_sums_and_norms_are_of_the_rounded_operands(form: str, method: str, platform: str) -> None:
    length, inputs, outputs = FORMS[form]
    u, v = random(length, inputs), random(length, outputs, seed=1)
    bits = STORED[platform]
    rows = np.einsum("btd,btp->bdp", rounded(u, bits), rounded(v, bits))
    true = np.linalg.norm(rows.reshape(ROWS, -1), axis=1)
    attack = Attack(product, ones(inputs, outputs), (u, v))
    with tracing_for(platform):
        got = norms(attack, method)

        @jax.jit
        def total(w: jax.Array, batch: Any) -> jax.Array:
            clip = jaxdp.clip_flat(1e6)
            grads = jaxdp.per_sample_grads(product, method=method)(w, batch)
            return clip.update(grads, clip.init(w))[0].value

        found = np.asarray(total(ones(inputs, outputs), (u, v)))
    # Weights are one here: nothing is rounded but operands, and sums.
    np.testing.assert_allclose(found, rows.sum(0), rtol=0, atol=1e-5 * np.abs(rows).max())
    slack = 2.0 ** -(bits + 1) * np.sqrt(length) * 1.5
    assert np.all((true <= got) & (got <= true * (1 + slack) + 1e-5))


def half_precision_product(w: Any, example: Any) -> jax.Array:
    u, v = example
    out = u.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
    return jnp.vdot(v, out.astype(jnp.float32))


def half_precision_convolution(k: Any, example: Any) -> jax.Array:
    x, v = example
    numbers = ("NWC", "WIO", "NWC")
    out = lax.conv_general_dilated(
        x.astype(jnp.bfloat16), k.astype(jnp.bfloat16), (1,), "SAME", dimension_numbers=numbers
    )
    return jnp.vdot(v, out.astype(jnp.float32))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("loss_fn", [half_precision_product, half_precision_convolution])
def test_sums_of_half_precision_are_taken_in_single(loss_fn: Any, platform: str) -> None:
    """The sum over the batch, of what one pass multiplies exactly: in bfloat16 it would be off by
    2⁻⁸ for each sample that is added."""
    if loss_fn is half_precision_product:
        batch, params = (random(4, 30), random(4, 40, seed=1)), ones(30, 40)
    else:
        # Few positions of many channels: the sum is a convolution, not one of rows.
        batch, params = (random(1, 4, 30), random(1, 4, 40, seed=1)), ones(3, 30, 40)
    with tracing_for(platform):

        @jax.jit
        def total(w: jax.Array, batch: Any) -> jax.Array:
            clip = jaxdp.clip_flat(1e6)
            grads = jaxdp.per_sample_grads(loss_fn, method="slots")(w, batch)
            return clip.update(grads, clip.init(w))[0].value

        found = np.asarray(total(params, batch), np.float64)
    single = product if loss_fn is half_precision_product else convolution
    operands = [rounded(array, 7).astype(np.float32) for array in batch]
    exact = jax.grad(lambda w: sum(single(w, [a[i] for a in operands]) for i in range(ROWS)))
    np.testing.assert_allclose(found, exact(params), rtol=0, atol=2e-5 * np.abs(found).max())


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("positions", [64, 67, 130])
def test_panels_of_a_gram_matrix_give_its_norm(
    positions: int, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "_WORTH_PANELS_ELSEWHERE", 0.0)
    u, v = random(positions, 8), random(positions, 5, seed=1)
    bits = STORED[platform]
    u, v = (rounded(side, bits).astype(np.float32) for side in (u, v))
    true = np.linalg.norm(np.einsum("btd,btp->bdp", u, v).reshape(ROWS, -1), axis=1)
    with tracing_for(platform):
        left, right = (precision.as_operand(jnp.asarray(side), bits) for side in (u, v))
        inputs, cotangents = gram.grams(left, right, bits)
        assert len(inputs.panels) == len(cotangents.panels) == 4
        # As if the weight were not rounded, which is another test's.
        got = np.asarray(gram.gram_norms(inputs, cotangents, precision.FLOAT32))
    assert np.all((true <= got) & (got <= 1.01 * true))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_an_array_that_is_no_operand_is_multiplied_whole(platform: str) -> None:
    a, wide = random(5, 30)[0], random(7, 30, seed=1)[0]
    wide = wide * np.float32(10.0) ** np.arange(-15, 15, dtype=np.float32)
    bits = STORED[platform]
    with tracing_for(platform):
        operand = precision.as_operand(jnp.asarray(a), bits)
        got = precision.multiplied_wide("td,sd->ts", operand, jnp.asarray(wide), bits)
    exact = rounded(a, bits) @ wide.astype(np.float64).T
    terms = np.abs(rounded(a, bits)) @ np.abs(wide.astype(np.float64)).T
    assert np.all(np.abs(got - exact) <= 40 * 2.0**-24 * terms)


# ---- attacks ------------------------------------------------------------------------------------



def same(*shape: int) -> np.ndarray:
    return np.ones((ROWS, *shape), np.float32)


# One entry of weight w: all of its rounding goes one way.
ROUNDED_UP = {
    "outer product": Attack(product, ones(30, 40), (same(1, 30), same(1, 40))),
    "Gram": Attack(product, ones(30, 40), (same(4, 30), same(4, 40))),
    "convolution, Gram": Attack(convolution, ones(3, 30, 40), (same(1, 4, 30), same(1, 4, 40))),
}


def worst_weight(name: str, method: str) -> float:
    """The largest contribution over thresholds that make every weight w: 1 <= w < 1.01."""
    attack = ROUNDED_UP[name]
    seen = norms(attack, method)
    worst = [
        contributions(attack, method, seen * np.linspace(low, low + 0.001, ROWS)).max()
        for low in np.linspace(0.5, 0.51, 11)
    ]
    return float(max(worst))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("method", ["slots", "taps", "fused"])
@pytest.mark.parametrize("name", list(ROUNDED_UP))
def test_a_weight_that_is_rounded_up_stays_below_the_threshold(
    name: str, method: str, platform: str
) -> None:
    with tracing_for(platform):
        assert worst_weight(name, method) <= 1 + TOLERANCE


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("method", ["slots", "taps", "fused"])
def test_operands_are_rounded_before_they_are_weighed(
    method: str, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that are rounded down by themselves, as the norm sees them, and up with a weight."""
    unit = 2.0 ** -(STORED[platform] + 1)
    below = same(1, 40) * np.float32(1 + unit * (1 - 2.0**-6))
    monkeypatch.setitem(ROUNDED_UP, "below", Attack(product, ones(30, 40), (same(1, 30), below)))
    with tracing_for(platform):
        assert worst_weight("below", method) <= 1 + TOLERANCE


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("name", list(ROUNDED_UP))
def test_without_the_roundoff_of_the_weight_it_would_not(
    name: str, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roundoff of the table is the right one: an attack reaches nine tenths of it."""
    for module in (gram, outer):
        monkeypatch.setattr(module, "weight_roundoff", lambda stored: 0.0)
    jax.clear_caches()
    unit = 2.0 ** -(STORED[platform] + 1)
    # Losses of their own: what is compiled for the others has the roundoff in it.
    attack = ROUNDED_UP[name]
    fresh = attack._replace(loss_fn=lambda w, example: attack.loss_fn(w, example))
    monkeypatch.setitem(ROUNDED_UP, name, fresh)
    with tracing_for(platform):
        worst = worst_weight(name, "slots")
    assert 1 + 0.9 * unit <= worst <= 1 + 1.01 * unit


@pytest.mark.parametrize(
    ("name", "method", "platform"),
    [
        pytest.param(
            name,
            method,
            platform,
            marks=() if (index + 2 * shift) % 8 == turn else pytest.mark.slow,
        )
        for index, name in enumerate(CANCELLING)
        for shift, method in enumerate(METHODS)
        for turn, platform in enumerate(("tpu", "gpu"))
    ],
)
def test_sums_that_cancel_stay_below_the_threshold(name: str, method: str, platform: str) -> None:
    with tracing_for(platform):
        check_contributions(CANCELLING[name], method)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("loss_fn", [half_precision_product, half_precision_convolution])
def test_half_precision_stays_below_the_threshold(loss_fn: Any, platform: str) -> None:
    for seed in range(20):
        if loss_fn is half_precision_product:
            attack = Attack(
                loss_fn, ones(30, 40), (random(4, 30, seed=seed), random(4, 40, seed=seed + 1))
            )
        else:
            attack = Attack(
                loss_fn, ones(3, 5, 6), (random(1, 9, 5, seed=seed), random(1, 9, 6, seed=seed))
            )
        with tracing_for(platform):
            check_contributions(attack, "slots")
