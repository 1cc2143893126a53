"""A threshold chosen privately: what is counted, how it is chosen, what that costs."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jaxdp
from jaxdp import lipschitz, nn, training
from jaxdp.accounting import LedgerEntry, PureRelease

KEY = jax.random.key(0)
ROWS = 40
CANDIDATES = np.geomspace(0.01, 1.0, 12)
LEAF = "clip/clip_value"

BELOW, ABOVE = lipschitz.linear(4, 4), nn.sequential(jnp.tanh, nn.linear(4, 1))
MODEL = nn.sequential(BELOW, clip=lipschitz.adaptive_gradient_clip(0.3), head=ABOVE)
PARAMS = MODEL.init(KEY)


def head_loss(params: Any, hidden: jax.Array) -> jax.Array:
    return 3 * jnp.sum(jnp.square(ABOVE.apply(params["head"], hidden)))


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    return 3 * jnp.sum(jnp.square(MODEL.apply(params, x)))


def batch(count: int = ROWS) -> jax.Array:
    x = jax.random.normal(KEY, (count, 4))
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def norms(x: jax.Array) -> np.ndarray:
    """Of the cotangents where the clip stands, one sample at a time and without it."""
    hidden = [BELOW.apply(PARAMS["0"], row) for row in x]
    return np.array([jnp.linalg.norm(jax.grad(head_loss, 1)(PARAMS, row)) for row in hidden])


def brute_force(x: jax.Array) -> np.ndarray:
    return np.sum(norms(x)[:, None] <= CANDIDATES.astype(np.float32), axis=0)


COUNTS_FN = jax.jit(lipschitz.unclipped_counts(loss_fn, 1.0, CANDIDATES, leaf=LEAF))


# What is counted.


def test_the_counts_are_those_of_the_norms_of_cotangents() -> None:
    found = COUNTS_FN(PARAMS, batch())
    np.testing.assert_array_equal(found, brute_force(batch()))
    assert found.dtype == jnp.int32 and int(found[0]) < ROWS / 3 < int(found[-1])


def test_they_are_what_the_gradient_of_the_threshold_says() -> None:
    """One definition of the count: ½ for a sample within, -½ for a clipped one."""
    grads_fn = jax.jit(lipschitz.bounded_grads(loss_fn, 1.0))
    for candidate, count in zip(CANDIDATES, COUNTS_FN(PARAMS, batch()), strict=True):
        params = {**PARAMS, "clip": {"clip_value": jnp.float32(candidate)}}
        moved = grads_fn(params, batch()).value["clip"]["clip_value"]
        assert float(moved) == float(count) - ROWS / 2


def test_masked_rows_and_examples_that_are_not_finite_count_for_nothing() -> None:
    x, kept = batch(), jnp.arange(ROWS) % 3 != 0
    poisoned = jnp.where(kept[:, None], x, jnp.nan).at[1].set(jnp.inf)
    expected = brute_force(x[kept.at[1].set(False)])
    np.testing.assert_array_equal(COUNTS_FN(PARAMS, poisoned, kept), expected)
    np.testing.assert_array_equal(COUNTS_FN(PARAMS, poisoned), expected)
    assert not np.any(COUNTS_FN(PARAMS, x, jnp.zeros(ROWS, bool)))


def test_counts_of_disjoint_batches_add_up() -> None:
    x = batch()
    parts = [COUNTS_FN(PARAMS, x[start : start + 10]) for start in range(0, ROWS, 10)]
    np.testing.assert_array_equal(sum(parts), COUNTS_FN(PARAMS, x))


def test_examples_are_seen_as_training_sees_them() -> None:
    np.testing.assert_array_equal(COUNTS_FN(PARAMS, 7 * batch()), COUNTS_FN(PARAMS, batch()))


def test_a_sample_without_a_gradient_is_not_clipped() -> None:
    def factor_loss(params: Any, factor: jax.Array) -> jax.Array:
        return factor * lipschitz.adaptive_gradient_clip().apply(params, jnp.zeros_like(factor))

    counts_fn = lipschitz.unclipped_counts(factor_loss, 1.0, [0.1, 0.5], leaf="clip_value")
    factors = jnp.array([0.0, 0.0, 0.3, 0.9])
    assert counts_fn({"clip_value": jnp.ones(())}, factors).tolist() == [2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_counts_from_some_candidate_on_even_where_clips_share_a_threshold(
    seed: int,
) -> None:
    """The privacy of a selection rests on it: in a loop, a smaller threshold above may keep the
    cotangents below it from being clipped."""

    def shared(params: Any, rows: jax.Array) -> jax.Array:
        clip = lipschitz.adaptive_gradient_clip()

        def step(value: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
            return clip.apply(params, 3 * jnp.tanh(value * row)), None

        return jax.lax.scan(step, jnp.float32(0.3), rows)[0]

    counts_fn = jax.jit(
        lipschitz.unclipped_counts(shared, 10.0, np.geomspace(0.01, 30, 20), leaf="clip_value")
    )
    rows = 2 * jax.random.normal(jax.random.key(seed), (1, 5))
    found = counts_fn({"clip_value": jnp.ones(())}, rows)
    assert set(found.tolist()) <= {0, 1} and np.all(np.diff(found) >= 0)


@pytest.mark.anew
def test_all_candidates_share_the_passes_over_the_model() -> None:
    wide = nn.sequential(clip=lipschitz.adaptive_gradient_clip(), head=nn.linear(4, 2000))

    def wide_loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(wide.apply(params, x)))

    def work(count: int) -> tuple[float, int]:
        candidates = np.geomspace(0.01, 1, count)
        counts_fn = jax.jit(lipschitz.unclipped_counts(wide_loss, 1.0, candidates, leaf=LEAF))
        compiled = counts_fn.lower(wide.init(KEY), batch()).compile()
        analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
        assert analysis is not None and memory is not None
        return analysis["flops"], memory.temp_size_in_bytes

    (many, many_bytes), (one, one_bytes) = work(64), work(1)
    assert many < 1.1 * one and many_bytes < 1.1 * one_bytes


def test_a_threshold_that_is_not_trained_releases_nothing_of_its_own() -> None:
    frozen = {"0": True, "clip": False, "head": True}
    total = jax.jit(lipschitz.bounded_grads(loss_fn, 1.0, trainable=frozen))(PARAMS, batch())
    whole = jax.jit(lipschitz.bounded_grads(loss_fn, 1.0))(PARAMS, batch())
    assert total.sensitivity.shape[0] == whole.sensitivity.shape[0] - 1
    assert float(total.value["clip"]["clip_value"]) == 0
    np.testing.assert_allclose(total.value["0"]["kernel"], whole.value["0"]["kernel"], rtol=1e-6)
    tx = jaxdp.add_noise(2.0, KEY, allocation="per_layer")
    noised, _ = tx.update(total, tx.init(PARAMS), PARAMS)  # pyright: ignore[reportArgumentType]
    assert float(noised["clip"]["clip_value"]) == 0  # pyright: ignore


# How it is chosen.


def select(counts: Any, *, epsilon: float = 1.0, target: int = 50, **options: Any) -> jax.Array:
    """The index of the candidate."""
    candidates = np.arange(1.0, len(counts) + 1)
    given = {"quantile": 0.5, "expected_count": 2 * target, "key": KEY, "step": 0} | options
    chosen = lipschitz.select_clip_value(counts, candidates, epsilon=epsilon, **given)
    return chosen.astype(jnp.int32) - 1


@functools.cache
def selections(epsilon: float) -> Any:
    """One for each step, compiled once."""
    return jax.jit(
        jax.vmap(lambda counts, step: select(counts, epsilon=epsilon, step=step), (None, 0))
    )


def sampled(counts: Sequence[int], draws: int, epsilon: float = 1.0) -> np.ndarray:
    """How often each candidate is chosen, over that many selections with one key."""
    chosen = selections(epsilon)(jnp.asarray(counts), jnp.arange(draws))
    return np.bincount(chosen, minlength=len(counts))


def exact(counts: Sequence[int], scale: float = 1.0, target: int = 50) -> np.ndarray:
    """The chances of each candidate, by integration over the noise of the threshold."""
    rho, width = np.linspace(-40, 40, 16_001, retstep=True)
    density = stats.laplace.pdf(rho, scale=scale) * width
    density /= np.sum(density)
    chances = []
    for count in counts[:-1]:
        reached = stats.laplace.sf(target + rho - count, scale=scale)
        chances.append(np.sum(density * reached))
        density = density * (1 - reached)
    return np.array([*chances, np.sum(density)])


def test_without_noise_it_is_the_first_candidate_that_enough_samples_stay_below() -> None:
    def chosen(*counts: int) -> int:
        return int(select(jnp.array(counts), epsilon=1e6))

    assert chosen(10, 49, 51, 90) == 2
    assert chosen(51, 49, 51, 90) == 0
    assert chosen(10, 20, 30, 49) == 3  # none: the last one
    assert chosen(0) == 0


def test_large_counts_are_compared_exactly() -> None:
    """A float32 would round 2²⁴ + 1 to 2²⁴, and move by two where one example comes."""
    n = 2**25
    for count, index in ((n + 4, 0), (n + 2, 1)):
        counts = jnp.array([count, 2 * n])
        assert int(select(counts, epsilon=1e6, target=n + 3)) == index
    assert int(select(jnp.array([0, 0, 2**31 - 1, 2**31 - 1]), target=n)) == 2
    assert int(select(np.array([3, 60], np.uint8), epsilon=1e6)) == 1


def test_a_selection_is_distributed_as_computed() -> None:
    """Accepts the true distribution with probability 1 - 1e-4, and rejects 5% less noise."""
    counts, draws = [46, 48, 50, 60], 200_000
    found = sampled(counts, draws)
    assert stats.chisquare(found, draws * exact(counts)).pvalue > 1e-4
    assert stats.chisquare(found, draws * exact(counts, 0.95)).pvalue < 1e-8


def test_a_key_serves_the_noise_too_and_every_step_has_its_own() -> None:
    chosen = [int(select(jnp.array([49, 49, 49, 49]), epsilon=0.1, step=step)) for step in range(9)]
    assert len(set(chosen)) > 1
    assert chosen[0] == int(select(jnp.array([49, 49, 49, 49]), epsilon=0.1, step=0))


def test_a_selection_is_named_by_its_key_and_step() -> None:
    """Two with both draw the same noise; a ledger can tell."""
    [(purpose, name, step)] = lipschitz.selection_draws(KEY, 4)
    assert (purpose, step) == ("selection noise", 4)
    assert lipschitz.selection_draws(jax.random.key(0), 5) == ((purpose, name, 5),)
    assert lipschitz.selection_draws(jax.random.key(1), 4)[0][1] != name
    assert jaxdp.noise_draws(jaxdp.add_noise(1.0, KEY).init(jnp.ones(1)))[0][1] != name


def test_members_of_a_vmap_need_draws_of_their_own() -> None:
    counts = jnp.array([[40, 50, 60], [41, 51, 61]])
    with pytest.raises(ValueError, match="must have a noise key of its own"):
        jax.vmap(select)(counts)
    keys = jax.random.split(KEY, 2)
    for key, repeated in ((keys, False), (jnp.stack([KEY, KEY]), True)):
        chosen = jax.vmap(
            lambda counts, key: lipschitz.select_clip_value(
                counts, [1.0, 2.0, 3.0], quantile=0.5, expected_count=100, epsilon=1.0, key=key,
                step=0,
            )
        )(counts, key)
        assert np.all(np.isnan(chosen)) == np.any(np.isnan(chosen)) == repeated


def test_counts_beyond_32_bits_do_not_come_round() -> None:
    for counts in (np.array([3, 2**32 - 1], np.uint32), np.array([3, 2**31 + 5], np.uint32)):
        assert int(select(np.append(counts, counts[-1]), epsilon=1e6, target=2**29)) == 1


# What it costs.

# Counts of neighbours: one example more, from some candidate on.
ADDED = [
    ([48, 60, 70, 80], [49, 61, 71, 81]),
    ([47, 52, 60, 70], [47, 53, 61, 71]),
    ([51, 51, 51, 51], [52, 52, 52, 52]),
    ([52, 53, 54, 60], [52, 53, 54, 61]),
]
# The smaller of two norms is within at candidates where the larger one is not.
REPLACED = [([52, 52, 53, 54], [53, 53, 53, 54])]


def violations(pairs: Any, claimed: float, epsilon: float, draws: int = 100_000) -> int:
    """Outcomes whose likelihood ratio is above e^claimed for certain.

    Bounds of Clopper and Pearson on both chances: an honest mechanism shows one in any of the
    comparisons of a test with probability 1e-5 at most.
    """
    level = 1e-5 / (len(pairs) * 2 * 4)
    found = 0
    for pair in pairs:
        one, other = (sampled(counts, draws, epsilon) for counts in pair)
        for a, b in ((one, other), (other, one)):
            least = stats.beta.ppf(level / 2, a, draws - a + 1)
            most = stats.beta.ppf(1 - level / 2, b + 1, draws - b)
            found += int(np.sum(least > np.exp(claimed) * most))
    return found


def test_an_audit_finds_no_more_than_the_claimed_epsilon() -> None:
    assert violations(ADDED, claimed=1.0, epsilon=1.0) == 0
    assert violations(REPLACED, claimed=2.0, epsilon=1.0) == 0


def test_the_same_audit_finds_half_the_noise_and_what_a_replacement_costs() -> None:
    assert violations(ADDED, claimed=1.0, epsilon=2.0) > 0
    assert violations(REPLACED, claimed=1.0, epsilon=1.0) > 0


def test_the_constants_are_right_and_could_not_be_smaller() -> None:
    """By integration: the cost is ε and no less, and more than that where one is replaced."""

    def cost(one: Any, other: Any) -> float:
        return float(np.max(np.abs(np.log(exact(one) / exact(other)))))

    rng = np.random.default_rng(0)
    costs = []
    for _ in range(60):
        counts = np.sort(rng.integers(38, 62, rng.integers(2, 6)))
        more = np.arange(counts.size) >= rng.integers(0, counts.size)
        costs.append(cost(counts, counts + more))
    assert 0.999 < max(costs) <= 1 + 1e-4
    [pair] = REPLACED
    assert 1.4 < cost(*pair) <= 2


# A run that chooses between its epochs.


def test_a_run_that_is_resumed_keeps_what_was_chosen_and_its_charge(tmp_path: Path) -> None:
    frozen = {"0": True, "clip": False, "head": True}
    grads_fn = lipschitz.bounded_grads(loss_fn, 1.0, with_losses=True, trainable=frozen)
    tx = optax.chain(jaxdp.add_noise(2.0, KEY), optax.sgd(1e-4))
    sampler = jaxdp.PoissonSampler(ROWS, expected_batch_size=10, seed=0, physical_batch_size=ROWS)
    step, data = training.make_step(grads_fn, tx), np.asarray(batch())
    options: dict[str, Any] = {"delta": 1e-5, "accountant": "rdp", "progress": False}
    store = training.Checkpoints(tmp_path)

    run = training.fit(
        training.init(PARAMS, tx), step, sampler, data, steps=4, checkpoints=store, **options
    )
    counts = COUNTS_FN(run.state.params, data)
    chosen = lipschitz.select_clip_value(
        counts, CANDIDATES, quantile=0.6, expected_count=ROWS, epsilon=5.0, key=KEY,
        step=run.state.step,
    )  # fmt: skip
    value, params = float(chosen), {**run.state.params, "clip": {"clip_value": chosen}}
    ledger = run.ledger.charge_pure(5.0)
    run = training.fit(
        run.state._replace(params=params), step, sampler, data, steps=8, ledger=ledger,
        checkpoints=store, **options,
    )  # fmt: skip
    first, release, second = run.ledger.entries
    steps = LedgerEntry((2.0,), sampler.scheme, 4)
    assert (dataclasses.replace(first, draws=()), release) == (steps, PureRelease(5.0))
    assert dataclasses.replace(second, draws=()) == steps
    assert run.ledger.steps == int(run.state.step) == 8
    assert float(run.state.params["clip"]["clip_value"]) == value
    assert [row["step"] for row in run.history] == [4, 8]
    assert run.history[1]["epsilon"] == run.ledger.epsilon(1e-5, accountant="rdp")

    again = training.fit(
        training.init(PARAMS, tx), step, sampler, data, steps=8, checkpoints=store, **options
    )
    store.close()
    assert again.ledger == run.ledger
    assert float(again.state.params["clip"]["clip_value"]) == value


# Errors.

SELECT: Any = lipschitz.select_clip_value
COUNTS: Any = lipschitz.unclipped_counts


def selecting(**changes: Any) -> Any:
    given = {
        "counts": jnp.arange(3), "candidates": [1.0, 2.0, 3.0], "quantile": 0.5,
        "expected_count": 10.0, "epsilon": 1.0, "key": KEY, "step": 0,
    }  # fmt: skip
    return lambda: SELECT(**(given | changes))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (selecting(counts=jnp.ones(3)), TypeError, "counts must be integers, got float32"),
        (selecting(counts=jnp.arange(4)), ValueError, "each of the 3 candidates, got shape .4,"),
        (selecting(candidates=[1.0, 3.0, 3.0]), ValueError, "above 0 and ascending in float32"),
        (selecting(candidates=[0.0, 1.0, 2.0]), ValueError, "candidates must be finite, > 0"),
        (selecting(candidates=[1.0, 2.0, np.inf]), ValueError, "candidates must be finite"),
        (selecting(candidates=1.0), ValueError, "one entry for each of the 1 candidates"),
        (selecting(candidates=[]), ValueError, "candidates must hold at least one number"),
        (selecting(quantile=1.0), ValueError, "quantile must be finite, > 0, < 1, got 1.0"),
        (selecting(expected_count=0.0), ValueError, "expected_count must be finite, > 0"),
        (selecting(epsilon=0.0), ValueError, "epsilon must be finite, > 0"),
        (selecting(epsilon=1e-8), ValueError, "epsilon must be finite, >= 1e-07, got 1e-08"),
        (selecting(expected_count=2.0**31), ValueError, "expected_count must be finite, <= 1.07"),
        (lambda: COUNTS(3, 1.0, [1.0], leaf=LEAF), TypeError, "loss_fn must be a function"),
        (lambda: COUNTS(loss_fn, 1.0, [2.0, 1.0], leaf=LEAF), ValueError, "ascending"),
        (
            lambda: COUNTS(loss_fn, 1.0, [1.0], leaf="clip")(PARAMS, batch()),
            ValueError,
            "got 'clip'. The scalars here are .'clip/clip_value'",
        ),
        (
            lambda: COUNTS(loss_fn, 1.0, [1.0], leaf="0/kernel")(PARAMS, batch()),
            ValueError,
            "leaf must name a scalar parameter",
        ),
    ],
)
def test_errors_name_the_rule(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
