"""The one place where norms become weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.engine.rule import ClipRule, finite_rows, group_norms
from jaxdp.engine.rule import sample_weights as weights_of_sizes

# What is compiled must round as it does for users.
pytestmark = pytest.mark.optimized

# Squared norms [B, L] of four samples in three leaves.
SQUARED = jnp.array([[9.0, 16.0, 4.0], [0.0, 0.0, 0.0], [0.01, 0.0, 0.04], [1e6, 1.0, 1e-6]])

SIZES = (6, 1, 3)


def sample_weights(rule: ClipRule, squared: jax.Array) -> jax.Array:
    return weights_of_sizes(rule, squared, SIZES)


def rule(
    wish: Callable[[jax.Array, jax.Array], jax.Array] = lambda norms, _: jnp.ones_like(norms),
    thresholds: jax.Array = jnp.array([1.0, 0.5]),  # noqa: B008
) -> ClipRule:
    return ClipRule((0, 0, 1), thresholds, wish)


def norms64() -> np.ndarray:
    squared = np.asarray(SQUARED, np.float64)
    return np.sqrt(np.stack([squared[:, 0] + squared[:, 1], squared[:, 2]], axis=1))


def test_the_norm_of_a_group_is_over_all_its_leaves() -> None:
    np.testing.assert_allclose(group_norms(SQUARED, (0, 0, 1)), norms64(), rtol=1e-6)
    np.testing.assert_allclose(group_norms(SQUARED, (1, 1, 0)), norms64()[:, ::-1], rtol=1e-6)


def test_every_leaf_of_a_group_gets_the_weight_of_the_group() -> None:
    weights = np.asarray(sample_weights(rule(), SQUARED))
    expected = np.minimum(1.0, np.array([1.0, 0.5]) / np.maximum(norms64(), 1e-30))
    np.testing.assert_allclose(weights, expected[:, [0, 0, 1]], rtol=1e-6)


def test_a_wish_below_the_cap_is_granted() -> None:
    weights = sample_weights(rule(lambda norms, _: jnp.full_like(norms, 1e-6)), SQUARED)
    np.testing.assert_allclose(weights, 1e-6, rtol=1e-6)


@pytest.mark.parametrize("wish", [1e6, jnp.finfo(jnp.float32).max])
def test_a_wish_above_the_cap_is_capped(wish: float) -> None:
    weights = sample_weights(rule(lambda norms, _: jnp.full_like(norms, wish)), SQUARED)
    contribution = np.asarray(weights, np.float64)[:, [0, 2]] * norms64()
    assert np.all(contribution <= np.array([1.0, 0.5]) * (1 + 1e-6))


def test_a_negative_wish_becomes_zero() -> None:
    weights = sample_weights(rule(lambda norms, _: -jnp.ones_like(norms)), SQUARED)
    assert np.all(np.asarray(weights) == 0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_sample_whose_wish_is_not_finite_in_one_group_counts_in_none(bad: float) -> None:
    def wish(norms: jax.Array, _: jax.Array) -> jax.Array:
        # Only the first sample has a norm of 2 in the second group.
        return jnp.where(norms == 2.0, bad, 1.0)

    weights = np.asarray(sample_weights(rule(wish), SQUARED))
    assert np.all(weights[0] == 0)
    assert np.all(weights[1:] > 0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_sample_that_is_not_finite_in_one_leaf_counts_in_none(bad: float) -> None:
    squared = SQUARED.at[2, 0].set(bad)
    assert finite_rows(squared).tolist() == [True, True, False, True]
    weights = np.asarray(sample_weights(rule(), squared))
    assert np.all(weights[2] == 0)
    assert np.all(weights[[0, 1, 3]] > 0)


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_of_a_schedule_that_is_not_positive_lets_nothing_through(
    threshold: float,
) -> None:
    weights = sample_weights(rule(thresholds=jnp.array([threshold, 0.5])), SQUARED)
    nonzero = np.asarray(norms64()[:, 0] > 0)
    assert np.all(np.asarray(weights)[nonzero][:, :2] == 0)
    assert np.all(np.asarray(weights)[:, 2] > 0)
