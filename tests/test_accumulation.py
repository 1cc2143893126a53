"""Accumulation: however a logical batch is split, it is one step with one noise."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false
# pyright: reportReturnType=false

from dataclasses import replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp.bounded import Bounded
from tests import helpers
from tests.helpers import CLIPS, KEY, PARAMS, THRESHOLDS

LOGICAL = 8
PHYSICAL = 4


def chain(clip: Any, sigma: float = 1.0) -> Any:
    inner = optax.chain(jaxdp.add_noise(sigma, KEY), optax.sgd(0.1, momentum=0.9))
    return optax.chain(clip, jaxdp.accumulate(inner))


def stepper(tx: Any) -> Any:
    @jax.jit
    def step(carry: Any, rows: Any, mask: jax.Array, is_last: jax.Array) -> Any:
        params, state = carry
        grads = jaxdp.PerSampleGrads.from_arrays(rows, mask)
        updates, state = tx.update(grads, state, params, is_last=is_last)
        return optax.apply_updates(params, updates), state

    return step


STEPS = {
    name: (lambda tx: (tx, stepper(tx)))(chain(CLIPS[name](THRESHOLDS)))
    for name in ("per_layer_tree", "adaptive_per_layer")
}


def padded(rows: Any, indices: np.ndarray) -> tuple[Any, np.ndarray]:
    """A physical batch: the rows of `indices`, filled up with garbage under the mask."""
    mask = np.arange(PHYSICAL) < len(indices)
    places = np.append(indices, np.zeros(PHYSICAL - len(indices), int)).astype(int)

    def fill(leaf: jax.Array) -> np.ndarray:
        leaf = np.array(leaf)[places]
        leaf[~mask] = np.nan
        return leaf

    return jax.tree.map(fill, rows), mask


@st.composite
def splits(draw: st.DrawFn) -> list[np.ndarray]:
    """The samples in any order, in physical batches of any size; some may be empty."""
    order = draw(st.permutations(range(LOGICAL)))
    parts, rest = [], list(order)
    while rest:
        size = draw(st.integers(0, min(PHYSICAL, len(rest)))) if len(parts) < 6 else PHYSICAL
        parts.append(np.array(rest[:size], int))
        rest = rest[size:]
    if draw(st.booleans()):
        parts.append(np.array([], int))
    return parts


@pytest.mark.parametrize("name", list(STEPS))
def test_any_split_of_a_logical_batch_gives_the_parameters_of_the_whole(name: str) -> None:
    tx, step = STEPS[name]
    rows = helpers.small_grads(LOGICAL)
    start = (PARAMS, tx.init(PARAMS))
    whole = step(start, rows, np.ones(LOGICAL, bool), True)

    @hypothesis.settings(max_examples=10)
    @hypothesis.given(parts=splits())
    def search(parts: list[np.ndarray]) -> None:
        carry = start
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            carry = step(carry, *padded(rows, part), last)
            if not last:
                # Nothing is released before the end: neither parameters nor inner state move.
                helpers.assert_trees_equal(carry[0], PARAMS)
                helpers.assert_trees_equal(carry[1][1].inner_state, start[1][1].inner_state)
        helpers.assert_trees_close(carry, whole, rtol=1e-5, atol=1e-5)

    search()


def test_noise_is_drawn_once_for_a_logical_batch() -> None:
    """With empty batches the update is the noise alone: that of one draw, whatever the number of
    physical batches, and another one at the next logical step."""
    noise = jaxdp.add_noise(1.0, KEY)
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(noise))
    update = jax.jit(tx.update)
    rows = jax.tree.map(jnp.zeros_like, helpers.small_grads(2))
    state, noise_state = tx.init(PARAMS), noise.init(PARAMS)
    empty = Bounded(jax.tree.map(jnp.zeros_like, PARAMS), 1.0)
    seen = []
    for parts in (1, 3, 2):
        for part in range(parts):
            updates, state = update(rows, state, PARAMS, is_last=part == parts - 1)
            if part < parts - 1:
                helpers.assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        alone, noise_state = noise.update(empty, noise_state)
        helpers.assert_trees_close(updates, alone)
        seen.append(updates)
    assert not helpers.any_equal(seen[0], seen[1])
    assert not helpers.any_equal(seen[1], seen[2])


def test_the_noise_adds_to_the_sum_of_all_physical_batches() -> None:
    rows = helpers.small_grads(6)
    clip = jaxdp.clip_per_layer(0.5)
    total, _ = clip.update(rows, clip.init(PARAMS))
    for sigma in (0.0, 2.0):
        tx = optax.chain(clip, jaxdp.accumulate(jaxdp.add_noise(sigma, KEY)))
        update, state = jax.jit(tx.update), tx.init(PARAMS)
        for start in (0, 2, 4):
            part = jax.tree.map(lambda leaf, s=start: leaf[s : s + 2], rows)
            updates, state = update(part, state, PARAMS, is_last=start == 4)
        noise = jaxdp.add_noise(sigma, KEY)
        expected, _ = noise.update(total, noise.init(PARAMS))
        helpers.assert_trees_close(updates, expected, rtol=1e-5, atol=1e-6)


def test_thresholds_that_change_within_a_logical_batch_count_with_their_maximum() -> None:
    unit = jaxdp.add_noise(1.0, KEY, "per_layer")
    tx = jaxdp.accumulate(unit)
    nothing = [jnp.zeros(3), jnp.zeros(2)]
    update, state = jax.jit(tx.update), tx.init(nothing)
    parts = (jnp.array([1.0, 5.0]), jnp.array([4.0, 2.0]), jnp.array([3.0, 1.0]))
    for number, sensitivity in enumerate(parts):
        part = Bounded(nothing, sensitivity, (0, 1))
        updates, state = update(part, state, nothing, is_last=number == 2)
    expected, _ = unit.update(Bounded(nothing, jnp.array([4.0, 5.0]), (0, 1)), unit.init(nothing))
    helpers.assert_trees_close(updates, expected)
    # The next logical batch begins anew.
    updates, _ = update(Bounded(nothing, jnp.ones(2), (0, 1)), state, nothing, is_last=True)
    again, _ = unit.update(
        Bounded(nothing, jnp.ones(2), (0, 1)), replace(unit.init(nothing), step=jnp.int32(1))
    )
    helpers.assert_trees_close(updates, again)


def test_after_the_end_nothing_of_the_logical_batch_remains() -> None:
    tx, step = STEPS["per_layer_tree"]
    carry = (PARAMS, tx.init(PARAMS))
    for number in range(3):
        carry = step(carry, *padded(helpers.small_grads(LOGICAL), np.arange(3)), number == 2)
    state = carry[1][1]
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    helpers.assert_trees_equal(state.sums.total, zeros)
    helpers.assert_trees_equal(state.sums.lost, zeros)
    assert np.all(np.asarray(state.sensitivities) == 0)


@pytest.mark.anew
def test_every_physical_batch_runs_the_same_compiled_step() -> None:
    tx = chain(jaxdp.clip_flat(1.0))
    step = stepper(tx)
    carry = (PARAMS, tx.init(PARAMS))
    for number in range(4):
        rows, mask = padded(helpers.small_grads(LOGICAL), np.arange(number))
        carry = step(carry, rows, mask, jnp.asarray(number % 2 == 1))
    assert step._cache_size() == 1


def accumulated(updates: Any, **options: Any) -> Any:
    tx = jaxdp.accumulate(jaxdp.add_noise(1.0, KEY))
    return tx.update(updates, tx.init(PARAMS), PARAMS, **options)


def test_the_end_of_the_logical_batch_must_be_said() -> None:
    with pytest.raises(TypeError, match="is_last must say whether .*, got None"):
        accumulated(Bounded(PARAMS, 1.0))


@pytest.mark.parametrize("updates", [PARAMS, helpers.small_grads(2)], ids=["mean", "per_sample"])
def test_only_the_bounded_sum_of_a_clip_is_accumulated(updates: Any) -> None:
    with pytest.raises(TypeError, match="must get the jaxdp.Bounded of a clip, got dict"):
        accumulated(updates, is_last=True)


def test_a_handle_is_not_accumulated() -> None:
    grads = jaxdp.per_sample_grads(helpers.small_loss)(PARAMS, helpers.small_batch(2))
    with pytest.raises(TypeError, match="got PerSampleGrads. Put it right behind the clip"):
        accumulated(grads, is_last=True)


def test_an_optimizer_without_noise_inside_says_what_is_missing() -> None:
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(optax.sgd(0.1)))
    with pytest.raises((TypeError, ValueError), match="jaxdp.*add_noise"):
        tx.update(helpers.small_grads(2), tx.init(PARAMS), PARAMS, is_last=True)


def test_a_state_inside_that_hides_the_noise_is_refused() -> None:
    """Its noise would be charged to nobody, and be drawn for members whose batch goes on."""
    noise = jaxdp.add_noise(1.0, KEY)
    hidden = optax.GradientTransformation(
        lambda params: tuple(jax.tree.leaves(noise.init(params))), noise.update
    )
    with pytest.raises(ValueError, match="must hold each Released that is begun, got 0 of 1 for"):
        jaxdp.accumulate(optax.chain(hidden, optax.sgd(0.1))).init(PARAMS)


def test_noise_outside_is_refused() -> None:
    """It would be drawn for every physical batch, while one step is charged."""
    tx = optax.chain(
        jaxdp.clip_flat(1.0), jaxdp.accumulate(optax.identity()), jaxdp.add_noise(1.0, KEY)
    )
    with pytest.raises(TypeError, match="Move jaxdp.add_noise and what follows it inside"):
        tx.update(helpers.small_grads(2), tx.init(PARAMS), PARAMS, is_last=True)


# Members of a `vmap` that end their batches at different times.

KEYS = jax.random.split(jax.random.key(3), 2)
ENDS = ((False, True), (False, False), (True, False))  # of each physical batch


def spied(seen: list[np.ndarray]) -> optax.GradientTransformation:
    """Tells what it is given to the host, as a log of the norms behind the noise would."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        jax.debug.callback(lambda values: seen.append(np.array(values, np.float64)), updates)
        return updates, state

    return optax.GradientTransformation(lambda params: (), update)


def summed(noise: Any, *behind: Any) -> Any:
    return jaxdp.accumulate(optax.chain(noise, *behind))


def members(keys: jax.Array, make: Any = jaxdp.add_noise) -> Any:
    """The states of an ensemble, and its update on sums of ones, of one sample each."""
    seen: list[np.ndarray] = []
    params = jnp.zeros(4)

    def init(key: jax.Array) -> Any:
        return summed(make(5.0, key), spied(seen)).init(params)

    @jax.jit
    def update(states: Any, ends: jax.Array) -> Any:
        def member(state: Any, is_last: jax.Array) -> Any:
            tx = summed(make(5.0, KEY), spied(seen))
            return tx.update(Bounded(jnp.ones(4), 1.0), state, params, is_last=is_last)

        return jax.vmap(member)(states, ends)

    return jax.vmap(init)(keys), update, seen


def test_members_end_their_batches_when_they_like() -> None:
    """Each releases what it would alone."""
    states, update, _ = members(KEYS)
    for ends in ENDS:
        updates, states = update(states, jnp.array(ends))
        for one, last in zip(updates, ends, strict=True):
            assert bool(jnp.any(one != 0)) == last
    alone = jaxdp.add_noise(5.0, KEYS[0])
    expected, _ = alone.update(Bounded(3 * jnp.ones(4), 1.0), alone.init(jnp.zeros(4)))
    helpers.assert_trees_close(updates[0], expected)
    released = states.inner_state[0]
    assert released.step.tolist() == [1, 1]
    helpers.assert_trees_equal(released.key, jax.vmap(alone_key)(KEYS))


def alone_key(key: jax.Array) -> jax.Array:
    return jaxdp.add_noise(5.0, key).init(jnp.zeros(4)).key


def test_what_stands_behind_the_noise_sees_nothing_of_a_batch_that_goes_on() -> None:
    """`lax.cond` runs both branches for all members of a `vmap`: what is not chosen would be the
    coming noise with a part of its sum."""
    states, update, seen = members(KEYS)
    for ends in ENDS:
        _, states = update(states, jnp.array(ends))
    jax.effects_barrier()

    def noise(member: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The one of a step, and the one that is drawn in its place."""
        tx = jaxdp.add_noise(5.0, KEYS[member])
        own = replace(tx.init(jnp.zeros(4)), step=jnp.int32(step))
        nothing = Bounded(jnp.zeros(4), 1.0)
        drawn, instead = (tx.update(nothing, state)[0] for state in (own, own.rehearsed()))
        return np.asarray(drawn), np.asarray(instead)

    first, first_instead = noise(0, 0)
    second, second_instead = noise(1, 0)[0], noise(1, 1)[1]
    expected = [second + 1, first + 3, *[first_instead] * 2, *[second_instead] * 2]
    np.testing.assert_allclose(sorted_rows(seen), sorted_rows(expected), rtol=1e-5)


def sorted_rows(rows: list[np.ndarray]) -> list[list[float]]:
    return sorted(row.tolist() for row in rows)


@pytest.mark.parametrize("ends", [(False, True), (True, True)])
def test_members_with_one_key_are_poisoned_when_one_of_them_ends(ends: tuple[bool, bool]) -> None:
    """Also where the others go on, and where they are at another step: each would draw in time what
    this one draws now."""
    states, update, _ = members(jnp.stack([KEY, KEY]))
    for step in (0, 3):
        noise, behind = states.inner_state
        noise = replace(noise, step=jnp.array([0, step], jnp.int32))
        later = states._replace(inner_state=(noise, behind))
        updates, _ = update(later, jnp.array(ends))
        for one, last in zip(updates, ends, strict=True):
            assert bool(jnp.all(jnp.isnan(one))) == last


def test_one_key_for_members_that_end_at_different_times_is_refused() -> None:
    tx = summed(jaxdp.add_noise(1.0, KEY))
    state, total = tx.init(PARAMS), Bounded(PARAMS, 1.0)

    def member(is_last: jax.Array) -> Any:
        return tx.update(total, state, PARAMS, is_last=is_last)

    with pytest.raises(ValueError, match="every member of a vmap must have a noise key of its own"):
        jax.vmap(member)(jnp.array([True, False]))


@pytest.mark.parametrize("sensitivity", [1e-60, 1e-40, 0.1, 1 + 2**-40])
def test_a_sensitivity_in_double_precision_is_never_rounded_down(sensitivity: float) -> None:
    tx = jaxdp.accumulate(jaxdp.add_noise(1.0, KEY))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        zeros = jnp.zeros(3, jnp.float64)
        state = tx.init(zeros)
        bounded = Bounded(zeros, jnp.asarray(sensitivity, jnp.float64))
        _, state = tx.update(bounded, state, zeros, is_last=False)
        assert float(state.sensitivities[0]) >= sensitivity
