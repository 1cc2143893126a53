"""Keys that never repeat, and what they are called."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# pyright: reportIndexIssue=false
# pyright: reportReturnType=false

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from jaxdp.randomness import (
    COUNT_NOISE,
    GRADIENT_NOISE,
    SELECTION_NOISE,
    fingerprint,
    fingerprints,
    leaf_key,
    own_key,
    step_key,
)
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


PURPOSES = (GRADIENT_NOISE, COUNT_NOISE, SELECTION_NOISE)


def test_every_purpose_tree_and_step_has_its_own_key() -> None:
    base = jax.random.key(0)
    steps = jnp.arange(500)
    trees = (PARAMS, {"body": PARAMS["body"]}, {"head": PARAMS["head"]}, [jnp.ones(1)], ())
    keys = {
        words(key)
        for purpose in PURPOSES
        for tree in trees
        for key in jax.vmap(
            lambda step, purpose=purpose, tree=tree: step_key(own_key(base, purpose, tree), step)
        )(steps)
    }
    assert len(keys) == 3 * 5 * 500
    assert words(base) not in keys


def test_the_key_of_a_tree_is_that_of_its_paths() -> None:
    """Shapes and values are nothing to it: two models with the same names draw the same."""
    key = jax.random.key(0)
    abstract = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf * 2, PARAMS))
    assert words(own_key(key, GRADIENT_NOISE, PARAMS)) == words(
        own_key(key, GRADIENT_NOISE, abstract)
    )


def test_every_leaf_has_its_own_key() -> None:
    key = jax.random.key(0)
    tree = {"a": [1, 2, {"b": 3}], "a'][0": 4, "c": {str(n): n for n in range(300)}}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    keys = {words(leaf_key(key, index, path)) for index, path in enumerate(paths)}
    assert len(keys) == len(paths)
    assert len({words(leaf_key(key, index, paths[0])) for index in range(50)}) == 50


def test_a_fingerprint_names_a_key_and_its_stream() -> None:
    names = [
        fingerprint(key)
        for key in (
            *jax.random.split(jax.random.key(0), 20),
            jax.random.key(0),
            jax.random.key(1),
            jax.random.key(0, impl="rbg"),
            jax.random.key(0, impl="unsafe_rbg"),
        )
    ]
    assert len(set(names)) == len(names)
    assert all(len(name) == 64 and set(name) <= set("0123456789abcdef") for name in names)
    # A key without a type draws what one of the default implementation does.
    assert fingerprint(jax.random.PRNGKey(7)) == fingerprint(jax.random.key(7))
    # The same on every machine and in every version: ledgers are kept.
    assert fingerprint(jax.random.key(0)).startswith("ae26ca0b")


def test_a_fingerprint_is_of_one_key() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match="key must be one key, got 3 of them"):
        fingerprint(keys)
    assert fingerprints(keys) == [fingerprint(key) for key in keys]


def test_nothing_private_is_drawn_from_23_bits() -> None:
    """Beside the initial values of layers, every draw is from `jaxdp.distributions`."""
    cut_off = re.compile(
        r"random\.(normal|laplace|exponential|gumbel|uniform|truncated_normal|logistic|cauchy)\b"
    )
    root = Path(jaxdp.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if cut_off.search(line) and "`" not in line and ">>>" not in line
    }
    assert all(name.startswith("nn/") for name in found)


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


def test_a_generator_whose_derived_keys_meet_is_refused() -> None:
    """Folding in is an exclusive or in unsafe_rbg: in any order it gives the same key."""
    key = jax.random.key(3, impl="unsafe_rbg")
    one, other = (jax.random.fold_in(jax.random.fold_in(key, a), b) for a, b in ((1, 2), (2, 1)))
    assert words(one) == words(other)
    with pytest.raises(ValueError, match="a noise key must be of one of .* got unsafe_rbg"):
        jaxdp.add_noise(1.0, key).init(jnp.zeros(2))
    with jax.default_prng_impl("unsafe_rbg"):
        jaxdp.add_noise(1.0, jaxdp.random_key()).init(jnp.zeros(2))
        with pytest.raises(ValueError, match="got unsafe_rbg"):
            jaxdp.add_noise(1.0, jax.random.PRNGKey(0)).init(jnp.zeros(2))
