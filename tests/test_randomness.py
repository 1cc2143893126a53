"""Keys that never repeat."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false
# pyright: reportReturnType=false

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxdp
from jaxdp.randomness import COUNT_NOISE, GRADIENT_NOISE, SELECTION_NOISE, step_key
from tests import helpers
from tests.helpers import PARAMS


def words(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_keys_of_the_system_differ_and_fill_all_their_bits() -> None:
    """A 31-bit seed would repeat or leave a word at zero; these have 64 bits."""
    keys = [words(jaxdp.random_key()) for _ in range(64)]
    assert len(set(keys)) == 64
    seen = np.bitwise_or.reduce(np.array(keys, np.uint64), axis=0)
    assert np.all(seen == 2**32 - 1)


def test_a_key_of_the_system_is_a_jax_key() -> None:
    key = jaxdp.random_key()
    assert jax.random.normal(key, (3,)).shape == (3,)
    assert jax.random.key_impl(key) == jax.random.key_impl(jax.random.key(0))


def test_every_use_and_every_step_has_its_own_key() -> None:
    base = jax.random.key(0)
    steps = jnp.arange(500)
    keys = {
        words(key)
        for use in (GRADIENT_NOISE, COUNT_NOISE, SELECTION_NOISE)
        for key in jax.vmap(lambda step, use=use: step_key(base, use, step))(steps)
    }
    assert len(keys) == 1500
    assert words(base) not in keys


def test_one_key_given_to_noise_and_adaptive_clip_gives_independent_draws() -> None:
    """The count's noise tells nothing of the gradients' noise. The correlation of n = 10 000 pairs
    exceeds 5/√n with probability 6·10⁻⁷ when they are independent, and is 1 when they are equal."""
    count = 10_000
    rows = jnp.ones((1, 1))

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        clip = helpers.adaptive(
            1.0, key=key, count_noise_multiplier=1.0, expected_batch_size=1.0, learning_rate=1.0
        )
        noise = jaxdp.add_noise(1.0, key)
        empty = jaxdp.PerSampleGrads.from_arrays(rows, jnp.zeros(1, bool))
        total, state = clip.update(empty, clip.init(jnp.zeros(1)))
        released, _ = noise.update(total, noise.init(jnp.zeros(1)))
        return -jnp.log(state.thresholds), released[0]

    keys = jax.random.split(jax.random.key(5), count)
    of_counts, of_gradients = jax.jit(jax.vmap(draw))(keys)
    assert abs(np.corrcoef(of_counts, of_gradients)[0, 1]) < 5 / np.sqrt(count)


def test_the_key_in_the_state_continues_the_noise_exactly() -> None:
    """What a checkpoint saves is enough: state copied out and in again gives the next draw."""
    tx = helpers.private(jaxdp.clip_flat(1.0))
    update = jax.jit(tx.update)
    rows = helpers.small_grads(3)

    def steps(state: Any, count: int) -> tuple[list[Any], Any]:
        seen = []
        for _ in range(count):
            updates, state = update(rows, state, PARAMS)
            seen.append(updates)
        return seen, state

    whole, _ = steps(tx.init(PARAMS), 4)
    first, state = steps(tx.init(PARAMS), 2)
    restored = jax.tree.map(jnp.copy, state)
    second, _ = steps(restored, 2)
    helpers.assert_trees_equal(first + second, whole)
