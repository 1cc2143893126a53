"""The one place where norms become weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.engine.reduction import Batch
from jaxdp.engine.weighting import (
    ClipRule,
    GivenWeights,
    Weighting,
    finite_rows,
    group_norms,
    sample_weights,
)
from jaxdp.per_sample import PerSampleGrads

# What is compiled must round as it does for users.
pytestmark = pytest.mark.optimized

# Certified norms [B, L] of four samples in three leaves.
NORMS = jnp.array([[3.0, 4.0, 2.0], [1e-19, 0.0, 0.0], [0.1, 0.0, 0.2], [1e3, 1.0, 1e-3]])

# What rounding up may add to the norm of a group, and take off its weight.
CLOSE: dict[str, Any] = {"rtol": 3e-6}


def rule(
    wish: Callable[[jax.Array, jax.Array], jax.Array] = lambda norms, _: jnp.ones_like(norms),
    thresholds: jax.Array = jnp.array([1.0, 0.5]),  # noqa: B008
) -> ClipRule:
    return ClipRule((0, 0, 1), thresholds, wish)


def norms64() -> np.ndarray:
    norms = np.asarray(NORMS, np.float64)
    return np.stack([np.hypot(norms[:, 0], norms[:, 1]), norms[:, 2]], axis=1)


def test_the_norm_of_a_group_is_over_all_its_leaves() -> None:
    np.testing.assert_allclose(group_norms(NORMS, (0, 0, 1)), norms64(), **CLOSE)
    np.testing.assert_allclose(group_norms(NORMS, (1, 1, 0)), norms64()[:, ::-1], **CLOSE)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("leaves", [1, 2, 3, 70, 1000])
def test_the_norm_of_a_group_is_never_below_that_of_its_leaves(leaves: int, scale: float) -> None:
    """Whatever their size: squares neither vanish nor overflow."""
    rng = np.random.default_rng(leaves)
    norms = (scale * rng.uniform(0.5, 2, (50, leaves))).astype(np.float32)
    norms[::2] = norms[::2, :1]  # equal ones, whose rounding errors go one way
    got = np.asarray(jax.jit(lambda n: group_norms(n, (0,) * leaves))(norms), np.float64)[:, 0]
    true = np.sqrt(np.sum(norms.astype(np.float64) ** 2, axis=1))
    assert np.all((true <= got) & (got <= true * (1 + 1e-5)))


def test_every_leaf_of_a_group_gets_the_weight_of_the_group() -> None:
    weights = np.asarray(sample_weights(rule(), NORMS))
    expected = np.minimum(1.0, np.array([1.0, 0.5]) / np.maximum(norms64(), 1e-30))
    np.testing.assert_allclose(weights, expected[:, [0, 0, 1]], **CLOSE)


def test_a_wish_below_the_cap_is_granted() -> None:
    weights = sample_weights(rule(lambda norms, _: jnp.full_like(norms, 1e-6)), NORMS)
    np.testing.assert_allclose(weights, 1e-6, rtol=1e-6)


@pytest.mark.parametrize("wish", [1e6, jnp.finfo(jnp.float32).max])
def test_a_wish_above_the_cap_is_capped(wish: float) -> None:
    weights = sample_weights(rule(lambda norms, _: jnp.full_like(norms, wish)), NORMS)
    contribution = np.asarray(weights, np.float64)[:, [0, 2]] * norms64()
    assert np.all(contribution <= np.array([1.0, 0.5]))


def test_the_cap_leaves_room_for_the_rounding_of_the_quotient() -> None:
    """w · N in exact arithmetic, for many norms and thresholds: never above the threshold."""
    rng = np.random.default_rng(0)
    norms = jnp.float32(rng.uniform(1, 1000, (20_000, 1)))
    thresholds = rng.uniform(0.1, 1, 50).astype(np.float32)

    @jax.jit
    def weights_of(threshold: jax.Array) -> jax.Array:
        wish = lambda norms, _: jnp.ones_like(norms)  # noqa: E731
        return sample_weights(ClipRule((0,), threshold, wish), norms)

    for threshold in thresholds:
        weights = np.asarray(weights_of(threshold), np.float64)
        assert np.max(weights * np.asarray(norms, np.float64)) <= threshold


def test_a_negative_wish_becomes_zero() -> None:
    weights = sample_weights(rule(lambda norms, _: -jnp.ones_like(norms)), NORMS)
    assert np.all(np.asarray(weights) == 0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_sample_whose_wish_is_not_finite_in_one_group_counts_in_none(bad: float) -> None:
    def wish(norms: jax.Array, _: jax.Array) -> jax.Array:
        # Only the first sample has a norm of 2 in the second group.
        return jnp.where(norms == 2.0, bad, 1.0)

    weights = np.asarray(sample_weights(rule(wish), NORMS))
    assert np.all(weights[0] == 0)
    assert np.all(weights[1:] > 0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_sample_that_is_not_finite_in_one_leaf_counts_in_none(bad: float) -> None:
    norms = NORMS.at[2, 0].set(bad)
    assert finite_rows(norms).tolist() == [True, True, False, True]
    weights = np.asarray(sample_weights(rule(), norms))
    assert np.all(weights[2] == 0)
    assert np.all(weights[[0, 1, 3]] > 0)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1e-21])
def test_a_threshold_that_is_not_above_the_least_lets_nothing_through(threshold: float) -> None:
    weights = sample_weights(rule(thresholds=jnp.array([threshold, 0.5])), NORMS)
    assert np.all(np.asarray(weights)[:, :2] == 0)
    assert np.all(np.asarray(weights)[:, 2] > 0)


def test_a_threshold_that_is_not_a_number_shows() -> None:
    weights = sample_weights(rule(thresholds=jnp.array([jnp.nan, 0.5])), NORMS)
    assert np.all(np.isnan(np.asarray(weights)[:, :2]))


def test_the_largest_threshold_lets_everything_through() -> None:
    weights = sample_weights(rule(thresholds=jnp.array([3e38, 3e38])), NORMS)
    assert np.all(np.asarray(weights) == 1)


# Groups and thresholds that do not fit -> what is said.
UNFIT: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "gap": ((0, 2, 0), jnp.ones(2), ValueError, r"0, 1, ... without a gap, got \(0, 2, 0\)\. Num"),
    "from one": ((1, 1, 1), 1.0, ValueError, r"without a gap, got \(1, 1, 1\)\. Number"),
    "negative": ((0, -1, 0), jnp.ones(2), ValueError, r"groups\[1\] must be at least 0, got -1\. "),
    "float": ((0, 1.0, 0), jnp.ones(2), TypeError, r"groups\[1\] must be an integer, got 1\.0\. "),
    "bool": ((0, True, 0), jnp.ones(2), TypeError, r"groups\[1\] must be an integer, got True\. "),
    "label": (("a", 0, 0), 1.0, TypeError, r"groups\[0\] must be an integer, got 'a'\. Number"),
    "none": ((None, None, None), 1.0, ValueError, r"without a gap, got \(None, None, None\)\. "),
    "too few": ((0, 1, 2), jnp.ones(2), ValueError, r"each of its 3 groups, got shape \(2,\)\. "),
    "too many": ((0, 1, 0), jnp.ones(3), ValueError, r"each of its 2 groups, got shape \(3,\)\. "),
    "one for two": ((0, 1, 0), 1.0, ValueError, r"each of its 2 groups, got shape \(\)\. Pass"),
    "a column": ((0, 1, 0), jnp.ones((2, 1)), ValueError, r"got shape \(2, 1\)\. Pass an array"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_rule_that_does_not_fit_says_so(name: str) -> None:
    groups, thresholds, error, said = UNFIT[name]
    unfit = ClipRule(groups, thresholds, lambda norms, _: norms)
    rows = {str(leaf): jnp.ones((4, 2)) for leaf in range(3)}
    grads = PerSampleGrads.from_arrays(rows)
    with pytest.raises(error, match=said):
        grads.clipped_sum(unfit)
    if "of its" not in said and "shape" not in said:
        with pytest.raises(error, match=said):
            grads.norms(groups)


def test_what_is_no_rule_is_refused() -> None:
    grads = PerSampleGrads.from_arrays({"w": jnp.ones((4, 2))})
    with pytest.raises(TypeError, match="rule must be of type ClipRule, got 1.0. Pass"):
        grads.clipped_sum(1.0)  # pyright: ignore[reportArgumentType]
    constant: Any = 1.0
    with pytest.raises(TypeError, match="weight of a ClipRule must be a function, got 1.0. Pass"):
        grads.clipped_sum(ClipRule((0,), jnp.ones(()), constant))
    for thresholds in (jnp.ones(()), jnp.ones(1)):
        fits = ClipRule((0,), thresholds, lambda norms, _: jnp.ones_like(norms))
        assert grads.clipped_sum(fits).groups == (0,)


GIVEN = GivenWeights((0, 0, 0))
MASK = jnp.array([True, False, True, True])


@pytest.mark.parametrize("weighting", [rule(), GIVEN], ids=["rule", "given"])
def test_neither_padding_nor_a_sample_that_is_not_finite_has_a_weight(weighting: Weighting) -> None:
    """Whatever their norm, and whatever the caller gives them."""
    batch = Batch((), MASK, jnp.array([0.5, jnp.nan, jnp.inf, -2.0]))
    weights = np.asarray(weighting.weights(NORMS.at[2, 1].set(jnp.nan), batch))
    assert np.all(weights[[1, 2]] == 0)
    assert np.all(weights[[0, 3]] != 0)


def test_given_weights_are_the_same_in_every_leaf() -> None:
    weights = GIVEN.weights(NORMS, Batch((), MASK, jnp.array([0.5, 1.0, 3.0, -2.0])))
    assert weights.tolist() == [[0.5] * 3, [0.0] * 3, [3.0] * 3, [-2.0] * 3]


def test_the_thresholds_are_the_one_leaf_of_a_rule() -> None:
    """So that it can go to wherever the rows are, and its thresholds with it."""
    whole = rule()
    assert len(jax.tree.leaves(whole)) == 1 and jax.tree.leaves(GIVEN) == []
    doubled = jax.jit(lambda rule: jax.tree.map(lambda leaf: 2 * leaf, rule))(whole)
    assert (doubled.groups, doubled.weight) == (whole.groups, whole.weight)
    assert doubled.thresholds.tolist() == [2.0, 1.0]
