"""The attack: can one sample change a clipped sum by more than its sensitivity?

Every clip is attacked with neighbouring batches, in float64, group by group. The same attack is
then turned on clips that are wrong on purpose, and must convict each of them.
"""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportReturnType=false

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from jaxdp.bounded import Bounded
from jaxdp.engine.weighting import ClipRule
from tests import helpers
from tests.helpers import CLIPS, PARAMS

# What is compiled must round as it does for users.
pytestmark = pytest.mark.optimized

ROWS = 4
SHAPES = [leaf.shape for leaf in jax.tree.leaves(PARAMS)]

# (per-sample gradients as a tree like PARAMS, mask, thresholds [3]) -> clipped sum
Clipped = Callable[[Any, Any, Any], Bounded]


class Batch(NamedTuple):
    """Per-sample gradients of a few samples, and thresholds."""

    rows: list[np.ndarray]
    thresholds: np.ndarray


class Violation(NamedTuple):
    neighbour: str
    group: int
    distance: float
    allowed: float


def poisoned(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """One entry of the first leaf is `value`, the rest as it was."""

    def poison(row: np.ndarray) -> np.ndarray:
        row = row.copy()
        row.flat[0] = value
        return row

    return poison


# What the attacker's sample may look like, leaf by leaf, given an ordinary one.
SAMPLES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "ordinary": lambda row: row,
    "zero": np.zeros_like,
    "nan": lambda row: np.full_like(row, np.nan),
    "one_nan": poisoned(np.nan),
    "infinite": lambda row: np.full_like(row, np.inf),
    "one_minus_infinity": poisoned(-np.inf),
    # The square of 1e30 overflows float32, that of 1e-30 underflows.
    "huge": lambda row: row * np.float32(1e30),
    "large": lambda row: row * np.float32(1e12),
    "tiny": lambda row: row * np.float32(1e-30),
    "denormal": lambda row: np.full_like(row, 1e-42),
    "one_huge": poisoned(3e38),
}


def with_last(batch: Batch, sample: str) -> Any:
    rows = [row.copy() for row in batch.rows]
    with np.errstate(over="ignore", under="ignore"):  # to infinity or to zero: both are welcome
        for row in rows:
            row[-1] = SAMPLES[sample](row[-1])
    return tree_of(rows)


def tree_of(leaves: list[Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(PARAMS), leaves)


def attack(clipped: Clipped, batch: Batch) -> list[Violation]:
    """Every neighbour that moves the sum by more than the sensitivity it claims."""
    everyone = np.ones(ROWS, bool)
    absent = everyone.copy()
    absent[-1] = False
    found = []

    def compare(name: str, one: Bounded, other: Bounded, times: float) -> None:
        claimed = np.atleast_1d(np.asarray(one.sensitivity, np.float64))
        # Adding up float32 numbers of at most the sensitivity each rounds; twice for two sums.
        rounding = 4 * ROWS * np.finfo(np.float32).eps
        difference = helpers.difference64(one, other)
        distances = helpers.group_norms64(difference, one.groups, claimed.size)
        allowed = np.append(times * claimed * (1 + 1e-5) + rounding * claimed, 0.0)
        total = np.linalg.norm(distances)
        distances = np.append(distances, total)
        allowed = np.append(allowed, np.linalg.norm(allowed))
        for group, (distance, limit) in enumerate(zip(distances, allowed, strict=True)):
            if not distance <= limit:  # NaN is a violation
                found.append(Violation(name, group, float(distance), float(limit)))

    def run(sample: str, mask: np.ndarray) -> Bounded:
        return jax.device_get(clipped(with_last(batch, sample), mask, batch.thresholds))

    without = run("zero", absent)
    ordinary = run("ordinary", everyone)
    for sample in SAMPLES:
        present = run(sample, everyone)
        compare(f"{sample} added", present, without, 1)
        compare(f"ordinary replaced by {sample}", present, ordinary, 2)
        compare(f"{sample} under the mask", run(sample, absent), without, 0)
    return found


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Rows and leaves of very different size, thresholds of all sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 1.0, 4.0]))
    decades = st.floats(-5, 5)
    thresholds = np.array([10.0 ** draw(decades) for _ in range(3)], np.float32)
    rows = []
    for shape in SHAPES:
        scale = 10.0 ** (draw(st.floats(-3, 3)) + spread * rng.normal(size=(ROWS, 1)))
        leaf = scale * rng.normal(size=(ROWS, math.prod(shape)))
        rows.append(leaf.reshape(ROWS, *shape).astype(np.float32))
    return Batch(rows, thresholds)


@functools.cache
def clipped_by(name: str) -> Clipped:
    def clipped(rows: Any, mask: Any, thresholds: Any) -> Bounded:
        tx = CLIPS[name](thresholds)
        grads = jaxdp.PerSampleGrads.from_arrays(rows, mask)
        return tx.update(grads, tx.init(PARAMS), PARAMS)[0]

    return jax.jit(clipped)


clips = pytest.mark.parametrize("name", list(CLIPS))


@clips
@hypothesis.settings(max_examples=12)
@hypothesis.given(batch=batches())
def test_no_sample_moves_the_sum_by_more_than_the_sensitivity(name: str, batch: Batch) -> None:
    assert attack(clipped_by(name), batch) == []


@pytest.mark.slow
@clips
@hypothesis.settings(max_examples=500)
@hypothesis.given(batch=batches())
def test_no_sample_moves_the_sum_in_a_long_search(name: str, batch: Batch) -> None:
    assert attack(clipped_by(name), batch) == []


def through_a_model(microbatch_size: int | None) -> Clipped:
    """The gradient of Σ p·x is x: any rows come out of a model, its microbatches and its mask."""

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return sum(jnp.vdot(p, x) for p, x in zip(jax.tree.leaves(params), example, strict=True))

    def clipped(rows: Any, mask: Any, thresholds: Any) -> Bounded:
        tx = CLIPS["by_group"](thresholds)
        grads_fn = jaxdp.per_sample_grads(loss_fn, microbatch_size=microbatch_size)
        grads = grads_fn(PARAMS, jax.tree.leaves(rows), mask)
        return tx.update(grads, tx.init(PARAMS), PARAMS)[0]

    return jax.jit(clipped)


@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
def test_no_sample_moves_the_sum_of_a_model_in_microbatches(microbatch_size: int | None) -> None:
    clipped = through_a_model(microbatch_size)

    @hypothesis.settings(max_examples=8)
    @hypothesis.given(batch=batches())
    def search(batch: Batch) -> None:
        assert attack(clipped, batch) == []

    search()


def wishing(wish: Callable[[jax.Array], jax.Array]) -> Clipped:
    """A rule that asks for weights of its own choosing."""

    def clipped(rows: Any, mask: Any, thresholds: Any) -> Bounded:
        rule = ClipRule((0, 1, 0), thresholds[:2], lambda norms, _: wish(norms))
        return jaxdp.PerSampleGrads.from_arrays(rows, mask).clipped_sum(rule)

    return jax.jit(clipped)


WISHES = {
    "a_million": lambda norms: jnp.full_like(norms, 1e6),
    "minus_a_million": lambda norms: jnp.full_like(norms, -1e6),
    "nan": lambda norms: jnp.full_like(norms, jnp.nan),
    "infinity": lambda norms: jnp.full_like(norms, jnp.inf),
    "nan_for_some": lambda norms: jnp.where(norms > 1.0, jnp.nan, 1e6),
    "the_norm_itself": lambda norms: norms,
}


@pytest.mark.parametrize("wish", list(WISHES))
def test_a_rule_gets_no_more_than_its_threshold_whatever_it_wishes(wish: str) -> None:
    clipped = wishing(WISHES[wish])

    @hypothesis.settings(max_examples=8)
    @hypothesis.given(batch=batches())
    def search(batch: Batch) -> None:
        assert attack(clipped, batch) == []

    search()


# Clips that are wrong on purpose. Each breaks one rule that the real ones keep.


def _rows(tree: Any) -> list[jax.Array]:
    return [jnp.reshape(leaf, (ROWS, -1)) for leaf in jax.tree.leaves(tree)]


def _sum(tree: Any, weights: jax.Array) -> Any:
    leaves = [
        jnp.einsum("b,b...->...", weights, leaf, precision="highest")
        for leaf in jax.tree.leaves(tree)
    ]
    return tree_of(leaves)


def _norms(tree: Any, leaves: slice = slice(None)) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(row), axis=1) for row in _rows(tree)[leaves]))


def _zeroed(tree: Any, keep: jax.Array) -> Any:
    """Rows that are masked or not finite selected away, so that other faults can be seen alone."""
    keep = keep & jnp.isfinite(_norms(tree))
    return jax.tree.map(
        lambda leaf: jnp.where(keep.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0.0), tree
    )


def _shrink(norms: jax.Array, threshold: Any) -> jax.Array:
    return jnp.minimum(1.0, threshold / jnp.maximum(norms, 1e-30))


def multiplies_by_the_mask(tree: Any, mask: Any, c: Any) -> Bounded:
    """0 · NaN is NaN: a masked or poisoned row spoils the sum."""
    return Bounded(_sum(tree, jnp.float32(mask) * _shrink(_norms(tree), c[0])), c[0])


def forgives_nan(tree: Any, mask: Any, c: Any) -> Bounded:
    """A NaN weight becomes 1."""
    weights = jnp.nan_to_num(_shrink(_norms(tree), c[0]), nan=1.0)
    return Bounded(_sum(tree, jnp.where(mask, weights, 0.0)), c[0])


def does_not_cap(tree: Any, mask: Any, c: Any) -> Bounded:
    """Believes the wish of the rule."""
    tree = _zeroed(tree, mask)
    return Bounded(_sum(tree, jnp.full(ROWS, 1e6)), c[0])


def forgets_a_leaf(tree: Any, mask: Any, c: Any) -> Bounded:
    """The norm of the group leaves out its last leaf."""
    tree = _zeroed(tree, mask)
    return Bounded(_sum(tree, _shrink(_norms(tree, slice(-1)), c[0])), c[0])


def claims_one_threshold_for_all_layers(tree: Any, mask: Any, c: Any) -> Bounded:
    """Clips each layer to C, and claims C, not √K·C, for the whole."""
    tree = _zeroed(tree, mask)
    leaves = [
        jnp.einsum("b,b...->...", _shrink(_norms([leaf]), c[0]), leaf, precision="highest")
        for leaf in jax.tree.leaves(tree)
    ]
    return Bounded(tree_of(leaves), c[0])


def divides_by_the_realised_count(tree: Any, mask: Any, c: Any) -> Bounded:
    """The mean: who is present changes everybody's weight."""
    tree, count = _zeroed(tree, mask), jnp.sum(jnp.float32(mask))
    return Bounded(_sum(tree, _shrink(_norms(tree), c[0]) / count), c[0] / ROWS)


def clips_the_sum(tree: Any, mask: Any, c: Any) -> Bounded:
    """Clips the batch's gradient, not the samples'."""
    total = _sum(_zeroed(tree, mask), jnp.ones(ROWS))
    norm = _norms(jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (ROWS, *leaf.shape)), total))
    return Bounded(jax.tree.map(lambda leaf: leaf * _shrink(norm, c[0])[0], total), 0.5 * c[0])


def weighs_by_the_largest(tree: Any, mask: Any, c: Any) -> Bounded:
    """Scales everybody by the largest norm of the batch."""
    tree = _zeroed(tree, mask)
    norms = _norms(tree)
    return Bounded(_sum(tree, jnp.full(ROWS, c[0]) / jnp.maximum(jnp.max(norms), 1e-30)), c[0])


BROKEN = (
    multiplies_by_the_mask,
    forgives_nan,
    does_not_cap,
    forgets_a_leaf,
    claims_one_threshold_for_all_layers,
    divides_by_the_realised_count,
    clips_the_sum,
    weighs_by_the_largest,
)


def some_batches() -> list[Batch]:
    """Ordinary batches: what is caught here needs no luck."""
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        scales = 10.0 ** rng.uniform(-1, 2, size=len(SHAPES))
        rows = [
            (scale * rng.normal(size=(ROWS, *shape))).astype(np.float32)
            for scale, shape in zip(scales, SHAPES, strict=True)
        ]
        found.append(Batch(rows, np.array([1.0, 0.5, 2.0], np.float32)))
    return found


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_the_attack_convicts_a_broken_clip(broken: Clipped) -> None:
    clipped = jax.jit(broken)
    assert any(attack(clipped, batch) for batch in some_batches())


def test_the_attack_acquits_a_correct_clip_written_by_hand() -> None:
    """Else the test above would prove nothing."""

    def correct(tree: Any, mask: Any, c: Any) -> Bounded:
        tree = _zeroed(tree, mask)
        return Bounded(_sum(tree, _shrink(_norms(tree), c[0])), c[0])

    assert [attack(jax.jit(correct), batch) for batch in some_batches()] == [[]] * 6


@clips
def test_the_sensitivity_is_reached(name: str) -> None:
    """A bound that no sample reaches would pass the attack and waste noise: a large sample moves
    each group by just its sensitivity."""
    batch = some_batches()[0]
    everyone = np.ones(ROWS, bool)
    absent = np.array([True] * (ROWS - 1) + [False])
    run = clipped_by(name)
    present = run(with_last(batch, "large"), everyone, batch.thresholds)
    without = run(with_last(batch, "large"), absent, batch.thresholds)
    claimed = np.atleast_1d(np.asarray(present.sensitivity, np.float64))
    distances = helpers.group_norms64(
        helpers.difference64(present, without), present.groups, claimed.size
    )
    np.testing.assert_allclose(distances[:-1], claimed, rtol=1e-4)


@clips
def test_removing_a_row_equals_masking_it(name: str) -> None:
    """The attack removes rows with the mask; taking them out of the arrays is the same."""
    batch = some_batches()[1]
    mask = np.array([True, True, False, True])
    masked = clipped_by(name)(tree_of(batch.rows), mask, batch.thresholds)
    shorter = clipped_by(name)(
        tree_of([row[mask] for row in batch.rows]), np.ones(3, bool), batch.thresholds
    )
    helpers.assert_trees_close(masked, shorter, rtol=1e-5, atol=1e-5)
