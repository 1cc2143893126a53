"""Bounds that count roundings, against sums in double precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.engine import rounding, walker
from jaxdp.engine.factors import gram
from jaxdp.engine.numerics import scale_rows
from jaxdp.engine.precision import FLOAT32

# What is compiled must round as it does for users.
pytestmark = pytest.mark.optimized

U = 2.0**-24
LENGTHS = [1, 2, 63, 64, 65, 4095, 4097, 300_000]


def equal(length: int) -> np.ndarray:
    """Rows of equal entries: all rounding errors of a row go one way."""
    entries = np.random.default_rng(length).uniform(0.5, 2, (16, 1))
    return np.repeat(entries, length, axis=1).astype(np.float32)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_total_is_off_by_no_more_than_its_roundings(length: int) -> None:
    rows = equal(length)
    got = np.asarray(jax.jit(rounding.total)(np.square(rows)), np.float64)
    true = np.sum(np.square(rows).astype(np.float64), axis=1)
    assert np.all(
        np.abs(got - true) <= rounding.gamma(rounding.roundings(length), np.float32) * true
    )


def test_no_sum_is_longer_than_a_block() -> None:
    """XLA on CPU sums in blocks of its own accord; another backend need not."""
    program, _ = walker.trace(rounding.total, jnp.ones((2, 70_000)))
    lengths = []
    for eqn in program.equations():
        if eqn.name == "reduce_sum":
            lengths.append(math.prod(eqn.operands[0].shape[axis] for axis in eqn.params["axes"]))
        elif eqn.name == "reduce_window_sum":
            lengths.append(math.prod(eqn.params["window_dimensions"]))
    assert len(lengths) == 3
    assert max(lengths) <= 64
    assert rounding.roundings(70_000) <= 3 * 64


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1.0, 1e15])
@pytest.mark.parametrize("length", LENGTHS)
def test_norms_are_not_below_the_true_ones(length: int, scale: float) -> None:
    rows = equal(length) * np.float32(scale)
    got = np.asarray(jax.jit(rounding.norms)(rows), np.float64)
    true = np.linalg.norm(rows.astype(np.float64), axis=1)
    assert np.all(got >= true)
    if scale >= 1:
        assert np.all(got <= true * (1 + 2e-5))


@pytest.mark.parametrize("roundings", [0, 1, 10, 1000, 10**6])
def test_rounding_up_makes_good_for_rounding_down(roundings: int) -> None:
    """So many roundings, each as far down as it goes, and two more of the factor itself."""
    true = np.random.default_rng(0).uniform(1, 2, 1000)
    low = (true * (1 - U) ** roundings).astype(np.float32)
    low = np.where(low > true * (1 - U) ** roundings, np.nextafter(low, np.float32(0)), low)
    got = jax.jit(lambda x: rounding.rounded_up(x, roundings + 1))(low)
    assert np.all(np.asarray(got, np.float64) >= true)


def test_a_bound_that_does_not_hold_is_infinite() -> None:
    assert rounding.gamma(2**24, jnp.float32) == math.inf
    assert rounding.gamma(2**23, jnp.float32) == 1.0
    assert np.isinf(rounding.rounded_up(jnp.float32(1), 2**24))


def test_every_backend_has_a_unit_roundoff(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounding.unit_roundoff(jnp.float32) == U
    assert rounding.unit_roundoff(jnp.float64) == 2.0**-53
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert rounding.unit_roundoff(jnp.float32) == 2.0**-22


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_joint_norm_knows_no_scale(scale: float) -> None:
    parts = (scale * np.random.default_rng(0).uniform(0, 2, (50, 7))).astype(np.float32)
    got = np.asarray(jax.jit(rounding.joint_norm)(parts), np.float64)
    true = np.linalg.norm(parts.astype(np.float64), axis=1)
    assert np.all((true <= got) & (got <= true * (1 + 5e-6)))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_joint_norm_is_finite_if_all_of_its_parts_are(bad: float) -> None:
    got = rounding.joint_norm(jnp.array([[1.0, bad], [0.0, 0.0], [3.0, 4.0]]))
    assert np.isfinite(got).tolist() == [False, True, True]
    assert float(got[1]) == 0.0


def test_a_certificate_is_infinite_where_the_sum_is_not_finite() -> None:
    """A floor under −∞ would be a norm of next to nothing."""
    squared = jnp.array([-jnp.inf, jnp.inf, jnp.nan, -1.0, 0.0])
    got = gram.certificate(squared, jnp.ones(5), 100, 4, FLOAT32)
    assert np.isfinite(got).tolist() == [False, False, False, True, True]
    assert np.all(np.asarray(got[3:]) >= math.sqrt(100 * U))


@pytest.mark.parametrize("length", [1, 64, 1000, 50_000])
@pytest.mark.parametrize("positions", [1, 8, 300])
def test_inner_products_have_the_roundings_that_they_say(positions: int, length: int) -> None:
    """In blocks where T·d is large: then few follow each other."""
    if positions * length > 3_000_000:
        length //= 10
    vectors = jnp.asarray(equal(length)[:1].repeat(positions, axis=0))
    (products,), off = gram.inner_products(vectors, FLOAT32)
    true = float(np.float64(vectors[0, 0]) ** 2 * length)
    error = np.max(np.abs(np.asarray(products, np.float64) - true)) / true
    assert error <= rounding.gamma(off, jnp.float32)
    assert off <= length + 1
    assert positions * off <= max(2**17 + 32 * positions, positions * length / 32 + 33 * positions)


@pytest.mark.parametrize("weight", 10.0 ** np.arange(-44.0, 1.0, 2.0))
def test_a_weight_takes_all_entries_or_no_more_than_the_theorem_allows(weight: float) -> None:
    """Of entries of many sizes some would vanish: w·4u·√e of them may (`engine.factors.gram`,
    underflow), with e = 2·tiny/u at least."""
    rows = (10.0 ** np.arange(-30.0, 11.0, 0.5)).astype(np.float32)
    weight = float(np.float32(weight))
    with np.errstate(over="ignore", under="ignore"):
        scaled = scale_rows(jnp.full(1, weight, jnp.float32), jnp.asarray(rows[None]))
    off = np.asarray(scaled[0], np.float64) - weight * rows.astype(np.float64)
    # The largest entries are rounded as well: compare where nothing but underflow can count.
    small = rows < 1e-9
    allowed = 4 * U * math.sqrt(2 * float(np.finfo(np.float32).tiny) / U) * weight
    rounded = U * weight * rows[small].astype(np.float64)
    assert not np.any(scaled) or np.all(np.abs(off[small]) <= allowed + rounded)
