"""The dense method, and what every method goes through: a batch whole or in microbatches."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.bounded import Groups
from jaxdp.engine.methods import dense
from jaxdp.engine.methods.base import Reducer
from jaxdp.engine.microbatches import Microbatched
from jaxdp.engine.numerics import select_rows, square_sums
from jaxdp.engine.reduction import Batch
from jaxdp.engine.weighting import GivenWeights
from tests import helpers

# What is compiled must round as it does for users.
pytestmark = pytest.mark.optimized

COUNT = 5
LEAVES = [jnp.array([1.0, -2.0]), jnp.array([[0.5], [1.5]])]
X = jnp.asarray(np.random.default_rng(0).normal(size=(COUNT, 2)), jnp.float32)
MASK = jnp.array([True, True, False, True, True])


def loss(leaves: list[jax.Array], x: jax.Array) -> tuple[jax.Array, Any]:
    hidden = jnp.sin(x * leaves[0]) @ leaves[1]
    return jnp.sum(jnp.square(hidden)), {"hidden": hidden}


DENSE = dense.Dense(loss, LEAVES)


ALL = Batch(X, MASK, jnp.arange(COUNT, dtype=jnp.float32))


REDUCERS: dict[str, Reducer] = {
    "dense": DENSE,
    **{f"microbatches of {size}": Microbatched(DENSE, LEAVES, size) for size in (1, 2, 5, 8)},
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByNormAndPlace:
    """Weights that know the norm and the place of each row: a mix-up would show."""

    one: jax.Array
    groups: Groups = field(metadata={"static": True})

    def weights(self, norms: jax.Array, batch: Batch) -> jax.Array:
        assert batch.weights is not None
        return select_rows(batch.mask, (self.one + batch.weights[:, None]) / (self.one + norms))


WEIGHTING = ByNormAndPlace(jnp.ones((1, 1)), (0, 1))


def counted(by_row: Any) -> Any:
    """Without masked rows: for a microbatch that holds no others, the loss does not run."""
    return jax.tree.map(partial(select_rows, ALL.mask), by_row)


@pytest.mark.parametrize("name", list(REDUCERS))
def test_every_reducer_gives_the_same_reduction_and_rows(name: str) -> None:
    reducer = REDUCERS[name]
    for weighting in (WEIGHTING, None):
        got, expected = reducer.reduce(ALL, weighting), DENSE.reduce(ALL, weighting)
        got, expected = (each._replace(aux=counted(each.aux)) for each in (got, expected))
        helpers.assert_trees_close(got, expected)
    helpers.assert_trees_close(counted(reducer.rows(ALL)), counted(DENSE.rows(ALL)))


def test_given_rows_are_those_of_the_batch() -> None:
    given = ALL._replace(examples=DENSE.rows(ALL))
    for weighting in (WEIGHTING, None):
        got, expected = dense.GivenRows().reduce(given, weighting), DENSE.reduce(ALL, weighting)
        helpers.assert_trees_close(got, expected)
    helpers.assert_trees_close(dense.GivenRows().rows(given), DENSE.rows(ALL))


def test_the_reduction_is_that_of_a_loop_over_the_rows() -> None:
    reduction = DENSE.reduce(ALL, WEIGHTING)
    sums = [np.zeros(leaf.shape) for leaf in LEAVES]
    for row in range(COUNT):
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(LEAVES, X[row])
        norms = [float(np.linalg.norm(np.asarray(grad, np.float64))) for grad in grads]
        np.testing.assert_allclose(reduction.aux["hidden"][row], aux["hidden"], rtol=1e-5)
        if not MASK[row]:
            assert reduction.norms[row].tolist() == [0.0, 0.0]
            assert reduction.losses is not None and float(reduction.losses[row]) == 0.0
            continue
        np.testing.assert_allclose(reduction.norms[row], norms, rtol=1e-5)
        assert reduction.losses is not None
        np.testing.assert_allclose(reduction.losses[row], value, rtol=1e-5)
        for leaf, grad in enumerate(grads):
            sums[leaf] += (1 + row) / (1 + norms[leaf]) * np.asarray(grad, np.float64)
    for got, expected in zip(reduction.sums, sums, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_padding_of_the_last_microbatch_is_never_counted() -> None:
    """Five rows in microbatches of four leave three places: copies, which must weigh nothing."""
    everyone = Batch(X, jnp.ones(COUNT, bool), jnp.ones(COUNT))
    by_four = Microbatched(DENSE, LEAVES, 4)
    seen = by_four.reduce(everyone, GivenWeights((0, 0)))
    expected = jax.tree.map(lambda rows: rows.sum(axis=0), by_four.rows(everyone).grads)
    helpers.assert_trees_close(seen.sums, expected)
    assert seen.norms.shape == (COUNT, 2)


@pytest.mark.anew
def test_microbatches_keep_only_one_of_them_in_memory() -> None:
    """The reason they exist: compiled memory falls with their size."""
    size, rows = 2000, 64
    leaves, x = [jnp.ones((size,))], jnp.ones((rows, size))

    def square(moving: list[jax.Array], example: jax.Array) -> tuple[jax.Array, None]:
        return jnp.square(jnp.vdot(moving[0], example)), None

    def temporary(microbatch: int) -> int:
        def total(x: jax.Array) -> Any:
            reducer = Microbatched(dense.Dense(square, leaves), leaves, microbatch)
            batch = Batch(x, jnp.ones(rows, bool), jnp.zeros(rows))
            return reducer.reduce(batch, ByNormAndPlace(jnp.ones((1, 1)), (0,))).sums

        analysis = jax.jit(total).lower(x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(4) < temporary(64) / 2


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_selection_removes_what_multiplication_would_keep(value: float) -> None:
    rows = jnp.array([[1.0, 2.0], [value, 3.0]])
    assert select_rows(jnp.array([True, False]), rows).tolist() == [[1.0, 2.0], [0.0, 0.0]]
    (total,) = dense.weighted_sums([rows], jnp.array([[2.0], [0.0]]))
    assert total.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 70_000, 2_000_001])
def test_a_sum_of_many_squares_loses_none_of_them(length: int) -> None:
    """The largest is beyond 256³/8: several levels of blocks, none of them full. Added up one by
    one in float32, ones stop counting at 2²⁴ and drift long before."""
    rows = np.random.default_rng(0).uniform(0.5, 1.5, size=(2, length)).astype(np.float32)
    expected = np.sum(np.asarray(rows, np.float64) ** 2, axis=1)
    np.testing.assert_allclose(square_sums(jnp.asarray(rows)), expected, rtol=2e-6)


