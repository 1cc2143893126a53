"""The dense lowering: whole, in microbatches, or of gradients that are given, it answers alike."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.engine import dense
from tests import helpers

COUNT = 5
LEAVES = [jnp.array([1.0, -2.0]), jnp.array([[0.5], [1.5]])]
X = jnp.asarray(np.random.default_rng(0).normal(size=(COUNT, 2)), jnp.float32)
MASK = jnp.array([True, True, False, True, True])


def loss(leaves: list[jax.Array], x: jax.Array) -> tuple[jax.Array, Any]:
    hidden = jnp.sin(x * leaves[0]) @ leaves[1]
    return jnp.sum(jnp.square(hidden)), {"hidden": hidden}


def lowerings() -> dict[str, Any]:
    rows = dense.per_sample_rows(loss, LEAVES, X)
    made: dict[str, Any] = {
        "dense": dense.Dense(loss, LEAVES, X, MASK),
        "given": dense.Given(rows, MASK),
    }
    for size in (1, 2, 5, 8):
        made[f"microbatches of {size}"] = dense.Microbatched(loss, LEAVES, X, MASK, size)
    return made


def weigh(squared: jax.Array, rows: jax.Array) -> jax.Array:
    """Weights that know the norm and the place of each row: a mix-up would show."""
    place = (1.0 + rows.astype(squared.dtype))[:, None]
    return place / (1.0 + squared)


@pytest.mark.parametrize("name", list(lowerings()))
def test_every_lowering_gives_the_same_reduction_and_rows(name: str) -> None:
    everything = lowerings()
    expected, got = everything["dense"], everything[name]
    helpers.assert_trees_close(got.reduce(weigh), expected.reduce(weigh))
    helpers.assert_trees_close(got.reduce(None), expected.reduce(None))
    helpers.assert_trees_close(got.materialize(), expected.materialize())


def test_the_reduction_is_that_of_a_loop_over_the_rows() -> None:
    reduction = dense.Dense(loss, LEAVES, X, MASK).reduce(weigh)
    sums = [np.zeros(leaf.shape) for leaf in LEAVES]
    for row in range(COUNT):
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(LEAVES, X[row])
        squared = [float(np.sum(np.asarray(grad, np.float64) ** 2)) for grad in grads]
        np.testing.assert_allclose(reduction.aux["hidden"][row], aux["hidden"], rtol=1e-5)
        if not MASK[row]:
            assert reduction.squared_norms[row].tolist() == [0.0, 0.0]
            assert reduction.losses is not None and float(reduction.losses[row]) == 0.0
            continue
        np.testing.assert_allclose(reduction.squared_norms[row], squared, rtol=1e-5)
        assert reduction.losses is not None
        np.testing.assert_allclose(reduction.losses[row], value, rtol=1e-5)
        for leaf, grad in enumerate(grads):
            sums[leaf] += (1 + row) / (1 + squared[leaf]) * np.asarray(grad, np.float64)
    for got, expected in zip(reduction.sums, sums, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_padding_of_the_last_microbatch_is_never_counted() -> None:
    """Five rows in microbatches of four leave three places: copies, which must weigh nothing."""
    ones = dense.Microbatched(loss, LEAVES, X, jnp.ones(COUNT, bool), 4)
    seen = ones.reduce(lambda squared, rows: jnp.ones_like(squared))
    expected = jax.tree.map(lambda rows: rows.sum(axis=0), ones.materialize().grads)
    helpers.assert_trees_close(seen.sums, expected)
    assert seen.squared_norms.shape == (COUNT, 2)


def test_microbatches_keep_only_one_of_them_in_memory() -> None:
    """The reason they exist: compiled memory falls with their size."""
    size, rows = 2000, 64
    leaves, x = [jnp.ones((size,))], jnp.ones((rows, size))

    def square(moving: list[jax.Array], example: jax.Array) -> tuple[jax.Array, None]:
        return jnp.square(jnp.vdot(moving[0], example)), None

    def temporary(microbatch: int) -> int:
        def total(x: jax.Array) -> Any:
            mask = jnp.ones(rows, bool)
            lowering = dense.Microbatched(square, leaves, x, mask, microbatch)
            return lowering.reduce(lambda squared, _: 1.0 / (1.0 + squared)).sums

        analysis = jax.jit(total).lower(x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(4) < temporary(64) / 2


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_selection_removes_what_multiplication_would_keep(value: float) -> None:
    rows = jnp.array([[1.0, 2.0], [value, 3.0]])
    assert dense.select_rows(jnp.array([True, False]), rows).tolist() == [[1.0, 2.0], [0.0, 0.0]]
    (total,) = dense.weighted_sums([rows], jnp.array([[2.0], [0.0]]))
    assert total.tolist() == [2.0, 4.0]
