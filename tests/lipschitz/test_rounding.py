"""The model of the arithmetic: what it assumes of XLA, and bounds that are never rounded down."""

import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxdp.lipschitz import rounding
from jaxdp.lipschitz.operator_norm import matrix_norm
from jaxdp.lipschitz.value import Range

pytestmark = pytest.mark.optimized

# Of bounds: any size at which float32 has numbers of its own.
sizes = st.floats(-37.5, 37.5).map(lambda power: float(np.float32(10.0**power)))


@functools.cache
def compiled(fun: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(fun)


def test_the_error_of_a_sum_is_that_of_the_theorem() -> None:
    for count in (1, 7, 1000, 10**6):
        share = Fraction(count, 2**24)
        assert rounding.gamma(count) == pytest.approx(float(share / (1 - share)), rel=1e-12)
    assert rounding.gamma(2**23) == math.inf  # where it says nothing


@pytest.mark.parametrize("precision", [None, lax.Precision.DEFAULT, lax.Precision.HIGH])
def test_products_of_accelerators_round_their_operands_first(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for platform, least in {"cpu": 0.0, "gpu": 2.0**-10, "cuda": 2.0**-10, "tpu": 2.0**-7}.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        found = rounding.product(8, precision)
        assert least <= found <= least + 2.0**-18
        both = rounding.product(8, (precision, lax.Precision.HIGHEST))
        assert both >= least
        assert rounding.product(8, lax.Precision.HIGHEST) < 2.0**-18
        assert rounding.product(8, "BF16_BF16_F32") > 2.0**-8


@given(sizes, sizes, sizes)
@settings(max_examples=300)
def test_a_product_of_bounds_never_vanishes_and_is_never_short(a: float, b: float, c: float):
    found = float(rounding.up(compiled(rounding.times)(a, b, c)))
    exact = Fraction(a) * Fraction(b) * Fraction(c)
    assert found > 0
    assert found == math.inf or Fraction(found) >= exact or exact > Fraction(2) ** 127


@pytest.mark.parametrize("pair", [(0.0, math.inf), (math.inf, 0.0), (math.inf, 1.0)])
def test_a_product_with_infinity_says_nothing(pair: tuple[float, float]) -> None:
    assert float(rounding.times(*pair)) == math.inf
    assert float(rounding.times(0.0, 3.0)) == 0  # but what is zero for sure stays so


@given(st.lists(sizes, min_size=3, max_size=3), st.integers(1, 8))
@settings(max_examples=200)
def test_powers_and_roots_of_squares_are_not_short_at_any_scale(
    bounds: list[float], exponent: int
) -> None:
    found = float(compiled(rounding.root_of_squares)(jnp.asarray(bounds, jnp.float32)))
    exact = sum(Fraction(b) ** 2 for b in bounds)
    assert found == math.inf or Fraction(found) ** 2 >= exact
    assert found <= 1.0001 * math.hypot(*bounds) or found == math.inf
    power = float(rounding.power(jnp.float32(bounds[0]), exponent))
    assert power == math.inf or Fraction(power) >= Fraction(bounds[0]) ** exponent > 0


@pytest.mark.parametrize("length", [1, 3, 257, 70_000])
@pytest.mark.parametrize("scale", [1e-37, 1e-22, 1.0, 1e18, 1e34])
@pytest.mark.parametrize("kind", ["equal", "normal", "one"])
def test_a_norm_is_not_short_at_any_scale_and_length(length: int, scale: float, kind: str) -> None:
    rng = np.random.default_rng(0)
    rows = {
        "equal": np.full(length, 0.7),
        "normal": rng.normal(size=length),
        "one": np.eye(1, length)[0],
    }
    array = (scale * rows[kind]).astype(np.float32)
    array[np.abs(array) < rounding.TINY] = 0  # as a CPU takes them
    found = float(compiled(rounding.norm)(array))
    true = float(np.linalg.norm(array.astype(np.float64)))
    assert true <= found <= 1.0001 * true


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_norm_of_what_is_not_finite_is_infinite(bad: float) -> None:
    assert float(rounding.norm(jnp.array([1.0, bad, 0.0]))) == math.inf
    assert float(matrix_norm(jnp.array([[1.0, bad], [0.0, 1.0]]))) == math.inf


def test_numbers_too_small_for_float32_have_a_norm() -> None:
    with jax.enable_x64(True):
        assert float(rounding.norm(jnp.array([1e-300]))) > 0
        assert float(rounding.norm(jnp.array([1e300]))) == math.inf


Exact = Callable[[np.ndarray], np.ndarray]
FUNCTIONS: Mapping[str, tuple[Callable[..., Any], Exact, float, float]] = {
    "tanh": (jnp.tanh, np.tanh, -20, 20),
    "logistic": (lax.logistic, lambda x: 1 / (1 + np.exp(-x)), -80, 80),
    "erf": (lax.erf, np.vectorize(math.erf), -6, 6),
    "erfc": (lax.erfc, np.vectorize(math.erfc), -6, 8),
    "atan": (jnp.arctan, np.arctan, -1e6, 1e6),
    "asinh": (jnp.arcsinh, np.arcsinh, -1e6, 1e6),
    "exp": (jnp.exp, np.exp, -80, 80),
    "exp2": (jnp.exp2, np.exp2, -120, 120),
    "expm1": (jnp.expm1, np.expm1, -80, 80),
    "log": (jnp.log, np.log, 1e-30, 1e6),
    "log near one": (jnp.log, np.log, 0.5, 2),
    "log1p": (jnp.log1p, np.log1p, -0.99, 1e6),
    "sqrt": (jnp.sqrt, np.sqrt, 1e-30, 1e6),
    "rsqrt": (lax.rsqrt, lambda x: 1 / np.sqrt(x), 1e-30, 1e6),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions_are_as_accurate_as_the_model_says(name: str) -> None:
    fun, exact, low, high = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    small = rng.choice([-1, 1], 20_000) * 10 ** rng.uniform(-30, math.log10(high), 20_000)
    x = np.concatenate([rng.uniform(low, high, 20_000), small]).clip(low, high).astype(np.float32)
    found = np.asarray(jax.jit(fun)(x), np.float64)
    true = exact(x.astype(np.float64))
    units = 16 + (rounding.COMPOSED if name in ("exp2", "erfc") else 0)
    counted = np.abs(true) > 1e-36
    errors = np.abs(found - true)[counted] / np.abs(true)[counted]
    assert errors.max() <= units * rounding.UNIT


@pytest.mark.parametrize("low, high", [(-3.0, 2.0), (1e-30, 1e30), (0.0, 0.0)])
def test_an_interval_is_rounded_outward(low: float, high: float) -> None:
    outward = Range(low=np.float32(low), high=np.float32(high)).outward()
    below, above = float(np.asarray(outward.low)), float(np.asarray(outward.high))
    assert below < low or low == 0 == below
    assert above > high or high == 0 == above


@pytest.mark.parametrize("size", [130, 500])
@pytest.mark.parametrize("kind", ["equal", "flat", "signs"])
def test_matrices_whose_products_round_one_way_are_not_short(size: int, kind: str) -> None:
    """Entries of one sign, whose sums round most, and spectra that Gram iteration sees last."""
    rng = np.random.default_rng(0)
    matrix = {
        "equal": np.full((size, size), 0.1),
        "flat": np.linalg.qr(rng.normal(size=(size, size)))[0],
        "signs": rng.choice([-0.1, 0.1], size=(size, size)),
    }[kind].astype(np.float32)
    true = float(np.linalg.norm(matrix.astype(np.float64), 2))
    assert true <= float(compiled(matrix_norm)(matrix)) <= 1.01 * true
