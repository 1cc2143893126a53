"""One sample changes a sum of thousands by its own contribution, and by hardly more."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportReturnType=false

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp.engine.sums import BLOCK, Running, in_blocks

U = 2.0**-24
# Above the norm of every row, which is 1 at most: all weights are 1, and the attack is exact.
CLIP = 1.01
# Of a gradient with one entry alone XLA adds up several totals side by side.
WIDTH = 16


def attack(count: int) -> np.ndarray:
    """Contributions of norm at most 1 that a running total rounds in another binade where the
    first one is missing: with it every pair that follows is lost, without it none (Casacuberta et
    al. 2022, section 5)."""
    ones = 2 ** int(math.log2(count) - 1)
    ulp = 2.0 ** (math.log2(ones) - 23)
    head = np.concatenate([[1.0, 0.5], np.ones(ones - 1)])
    pairs = np.tile([0.51 * ulp, -1.49 * ulp], count)[: count - len(head)]
    return np.concatenate([head, pairs]).astype(np.float32)


def without_first(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(rows[:1]), rows[1:]])


def widened(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows[:, None], [(0, 0), (0, WIDTH - 1)])


def spaced(rows: np.ndarray) -> np.ndarray:
    """Each at the head of a part of four, whose sum it is."""
    return np.pad(rows[:, None], [(0, 0), (0, 3)]).ravel()


def running_total(rows: np.ndarray) -> float:
    return float(np.cumsum(rows, dtype=np.float32)[-1])


def gamma(count: int) -> float:
    return count * U / (1 - count * U)


def bound(count: int) -> float:
    """The theorem of `jaxdp.engine.sums`, at C = 1."""
    size = min(count, BLOCK)
    depth = math.ceil(math.log2(max(count / size, 1)))
    return 1 + 2 * size * gamma(size) + 4 * count * U * (1 + gamma(size + depth))


def clipped(rows: np.ndarray, method: str, **options: Any) -> float:
    """The clipped sum of a loss whose gradients are the rows themselves."""
    params = jnp.zeros(WIDTH)
    grads_fn = jaxdp.per_sample_grads(lambda p, x: p @ x, method=method, **options)
    clip = jaxdp.clip_flat(CLIP)

    @jax.jit
    def total(batch: jax.Array) -> jax.Array:
        bounded, _ = clip.update(grads_fn(params, batch), clip.init(params), params)
        return bounded.value

    return float(total(widened(rows))[0])


def accumulated(rows: np.ndarray, physical: int) -> float:
    """The same in physical batches."""
    params = jnp.zeros(WIDTH)
    grads_fn = jaxdp.per_sample_grads(lambda p, x: p @ x)
    tx = optax.chain(
        jaxdp.clip_flat(CLIP), jaxdp.accumulate(jaxdp.add_noise(0.0, jax.random.key(0)))
    )

    @jax.jit
    def total(parts: jax.Array) -> jax.Array:
        def step(state: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            batch, is_last = part
            updates, state = tx.update(grads_fn(params, batch), state, params, is_last=is_last)
            return state, updates

        last = jnp.arange(len(parts)) == len(parts) - 1
        return jax.lax.scan(step, tx.init(params), (parts, last))[1][-1]

    return float(total(widened(rows).reshape(-1, physical, WIDTH))[0])


def looked_up(rows: np.ndarray) -> float:
    """The clipped sum of rows of a table that all samples look up; every other one looks up a
    second row too, with nothing in it."""
    table = jnp.zeros((3, WIDTH))
    grads_fn = jaxdp.per_sample_grads(lambda p, e: jnp.sum(p[e[0]] * e[1]), method="slots")
    clip = jaxdp.clip_flat(CLIP)
    ids = np.stack([np.ones(len(rows), np.int32), np.arange(len(rows)) % 2 * 2], axis=1)
    cotangents = np.stack([widened(rows), np.zeros((len(rows), WIDTH), np.float32)], axis=1)

    @jax.jit
    def total(batch: Any) -> jax.Array:
        bounded, _ = clip.update(grads_fn(table, batch), clip.init(table), table)
        return bounded.value

    found = np.asarray(total((ids, cotangents)))
    assert not found[[0, 2]].any() and not found[:, 1:].any()
    return float(found[1, 0])


WAYS = {
    "look-ups": looked_up,
    "dense": lambda rows: clipped(rows, "dense"),
    "slots": lambda rows: clipped(rows, "slots"),
    "taps": lambda rows: clipped(rows, "taps"),
    "fused": lambda rows: clipped(rows, "fused"),
    "microbatches": lambda rows: clipped(spaced(rows), "dense", microbatch_size=4),
    "physical batches": lambda rows: accumulated(spaced(rows), 4),
}


@pytest.mark.optimized
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("count", [4096, 16384, pytest.param(65536, marks=pytest.mark.slow)])
def test_a_sample_changes_the_sum_by_its_own_contribution(way: str, count: int) -> None:
    rows = attack(count)
    shorter = without_first(rows)
    assert abs(running_total(rows) - running_total(shorter)) > 1.2, "the attack has lost its force"
    assert abs(WAYS[way](rows) - WAYS[way](shorter)) <= bound(count) < 1.05


@pytest.mark.optimized
def test_microbatches_of_one_block_are_a_block_and_need_no_second_copy_of_the_sums() -> None:
    rows = spaced(attack(BLOCK))
    changed = clipped(rows, "dense", microbatch_size=4) - clipped(
        spaced(without_first(attack(BLOCK))), "dense", microbatch_size=4
    )
    assert abs(changed) <= bound(BLOCK)

    def carried(count: int) -> int:
        grads_fn = jaxdp.per_sample_grads(lambda p, x: p @ x, method="dense", microbatch_size=4)
        clip = jaxdp.clip_flat(CLIP)

        def total(params: jax.Array, batch: jax.Array) -> Any:
            return clip.update(grads_fn(params, batch), clip.init(params))[0].value

        jaxpr = jax.make_jaxpr(total)(jnp.zeros(WIDTH), jnp.zeros((count, WIDTH)))
        (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        return sum(variable.aval.shape == (WIDTH,) for variable in scan.outvars)

    assert carried(BLOCK) == 1
    assert carried(BLOCK + 4) == 2


@pytest.mark.optimized
def test_in_blocks_is_the_sum_for_any_number_of_samples() -> None:
    rng = np.random.default_rng(0)
    for count in (1, BLOCK, BLOCK + 1, 3 * BLOCK, 1009, 5 * 400):
        rows = rng.normal(size=(count, 3)).astype(np.float32)
        weights = rng.uniform(size=count).astype(np.float32)
        found = jax.jit(lambda w, x: in_blocks(lambda w, x: w @ x, w, x))(weights, rows)
        exact = weights.astype(np.float64) @ rows.astype(np.float64)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4 * math.sqrt(count) * 0.1)


@pytest.mark.optimized
def test_a_running_sum_keeps_what_its_additions_round_away() -> None:
    terms = np.array([2.0**24, 1.0, 1.0, 1.0, -(2.0**24)], np.float32)

    @jax.jit
    def total(terms: jax.Array) -> jax.Array:
        start = Running.start(jnp.zeros(()))
        return jax.lax.scan(lambda s, x: (s.add(x), None), start, terms)[0].value

    assert float(total(terms)) == 3.0
    assert float(np.cumsum(terms)[-1]) == 0.0


@pytest.mark.optimized
def test_a_running_sum_stays_infinite() -> None:
    running = Running.start(jnp.zeros(())).add(jnp.asarray(jnp.inf)).add(jnp.asarray(1.0))
    assert float(running.value) == jnp.inf
