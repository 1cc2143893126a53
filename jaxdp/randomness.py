"""Where randomness comes from: every draw belongs to (run, purpose, step, path).

The run is the user's key. A transformation that draws noise folds its purpose and the paths of its
leaves into it once, in `init` (`own_key`): what its state holds is the key of nothing else. From
there a draw is a function of the step and of the leaf. `fingerprint` names such a key without
telling it, so that a ledger can refuse to be charged twice for one draw.
"""

import hashlib
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental import multihost_utils

from jaxdp.checks import shown

# Purposes. The same key given by mistake to the noise and to an adaptive clip still gives
# independent draws.
GRADIENT_NOISE = "gradient noise"
COUNT_NOISE = "count noise"
SELECTION_NOISE = "selection noise"


# Generators whose `fold_in` is a hash. That of "unsafe_rbg" is an exclusive or: a member's key at
# another member's step would be the other's at its own.
_INDEPENDENT = {"threefry2x32", "rbg"}


def random_key() -> jax.Array:
    """A JAX key from the operating system's entropy: one for each run.

    Noise protects only as long as nobody can draw it again: whoever knows the key subtracts it, and
    of two runs with one key the difference has no noise. Use this for models that are released, and
    a fixed `jax.random.key(seed)` for experiments: draws are a function of the key, so that a run
    can be repeated bit for bit. On several processes (`jax.distributed`) all must call it, and get
    the same key: else each would add noise of its own.

    Returns:
      A key array of no axes.

    Example:
      >>> random_key().shape
      ()
    """
    like = jax.random.key(0)
    if str(jax.random.key_impl(like)) not in _INDEPENDENT:
        like = jax.random.key(0, impl="threefry2x32")
    words = jax.random.key_data(like).shape[0]
    entropy = np.array([secrets.randbits(32) for _ in range(words)], np.uint32)
    if jax.process_count() > 1:
        entropy = np.asarray(multihost_utils.broadcast_one_to_all(entropy))
    return jax.random.wrap_key_data(jnp.asarray(entropy), impl=jax.random.key_impl(like))


def own_key(key: jax.Array, purpose: str, tree: Any) -> jax.Array:
    """The key of one purpose in one tree: what the state of a transformation holds.

    The paths of the leaves count: where `optax.partition` gives two chains the same key by mistake,
    each sees leaves of its own only.

    Args:
      key: the user's, of one run.
      purpose: one of the constants above.
      tree: the parameters; leaves may be abstract, and only their paths are looked at.

    Raises:
      TypeError: `key` is no key.
      ValueError: a generator whose derived keys are not known to be independent.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (dtype == jnp.uint32 or jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key must be a JAX key, got {shown(key)}. Pass jaxdp.random_key().")
    if (impl := str(jax.random.key_impl(key))) not in _INDEPENDENT:
        raise ValueError(
            f"a noise key must be of one of {sorted(_INDEPENDENT)}, got {impl}, of which keys that "
            "are derived in another order are the same. Make it by jaxdp.random_key(), or by "
            'jax.random.key(seed, impl="threefry2x32").'
        )
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return _folded(key, "\n".join([purpose, *paths]))


def step_key(key: jax.Array, step: jax.Array) -> jax.Array:
    """The key of one logical step: distinct for every step."""
    return jax.random.fold_in(key, step)


def rehearsal_key(key: jax.Array) -> jax.Array:
    """A key whose draws are independent of all that a run draws from this one: for what is computed
    to see which noise is coming, without drawing it."""
    return _folded(key, "rehearsal")


def leaf_key(key: jax.Array, index: int, path: Any) -> jax.Array:
    """The key of one leaf at one step: distinct for every (index, path)."""
    return _folded(key, f"{index}{jax.tree_util.keystr(path)}")


def drawn_by_place(key: jax.Array) -> bool:
    """Whether what is drawn from a key at a place depends on nothing but that place: then devices
    can draw parts of an array, each its own, that are those of the whole."""
    by_place = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    return str(jax.random.key_impl(key)) == "threefry2x32" and by_place


def fingerprint(key: jax.Array) -> str:
    """Names a key without telling it: SHA-256 of its implementation and words, 64 hex digits.

    Equal keys have equal fingerprints, on every machine. It cannot be turned back, but a guess can
    be checked: the key of a small seed is found by trying them all, that of `random_key` is not.

    Args:
      key: one key, not traced.

    Raises:
      ValueError: more than one key.

    Example:
      >>> fingerprint(jax.random.key(0)) == fingerprint(jax.random.key(0))
      True
      >>> fingerprint(jax.random.key(0)) == fingerprint(jax.random.key(1))
      False
    """
    names = fingerprints(key)
    if len(names) != 1:
        raise ValueError(f"key must be one key, got {len(names)} of them. Name each of them alone.")
    return names[0]


def fingerprints(keys: jax.Array) -> list[str]:
    """The fingerprint of each key of an array, in its flat order.

    Example:
      >>> len(fingerprints(jax.random.split(jax.random.key(0), 3)))
      3
    """
    words = np.asarray(_words(keys))
    # A key that has no type is one of the default implementation, and draws the same.
    name = f"jaxdp key of {jax.random.key_impl(keys)}\n".encode()
    return [
        hashlib.sha256(name + row.astype(">u4").tobytes()).hexdigest()
        for row in words.reshape(-1, words.shape[-1])
    ]


def drawn_alone(key: jax.Array, released: Any) -> jax.Array:
    """Refuses to draw the same noise for all members of a `jax.vmap`.

    Their releases would differ by what the data says, without noise.

    Args:
      key: from which the noise is drawn. Of a release that keeps a state, the key of all its steps:
        what one member draws now another one may draw at another time.
      released: everything else that the release is computed from, a pytree.

    Returns:
      Bool: whether no other member of an enclosing `vmap` has this key. The caller poisons the
      noise where it is false: which values a stack of keys holds is not known to the tracer.

    Raises:
      ValueError: under a `vmap` that maps something in `released`, but not the key.
    """
    arrays = [leaf for leaf in jax.tree.leaves(released) if hasattr(leaf, "dtype")]
    # Nothing flows from here into a derivative.
    [alone] = _alone(_words(key)[None], [jax.lax.stop_gradient(array) for array in arrays])
    return alone


# That a `vmap` stands around is not seen where a `jit` stands between; a batching rule is called
# there, too.
@custom_vmap
def _alone(words: jax.Array, released: list[jax.Array]) -> jax.Array:
    """Which keys, of words `[keys, words]`, are like no other of them."""
    del released
    if len(words) == 1:
        return jnp.ones(1, bool)
    order = jnp.lexsort(list(words.T))
    repeats = jnp.all(words[order[1:]] == words[order[:-1]], axis=1)
    none = jnp.zeros(1, bool)
    repeated = jnp.concatenate([none, repeats]) | jnp.concatenate([repeats, none])
    return jnp.zeros(len(words), bool).at[order].set(~repeated)


@_alone.def_vmap
def _alone_among(
    size: int, mapped: Any, words: jax.Array, released: list[jax.Array]
) -> tuple[jax.Array, bool]:
    words_mapped, released_mapped = mapped
    if not words_mapped:
        if any(released_mapped):
            raise ValueError(
                "every member of a vmap must have a noise key of its own, got one key for all "
                f"{size}, so that their noise would be the same, and cancel in a difference. Make "
                "the chain of a member from its key: states = jax.vmap(lambda key, params: "
                "make_tx(key).init(params))(jax.random.split(key, members), params), then "
                "jax.vmap(make_tx(key).update)(grads, states, params)."
            )
        return _alone(words, released), False
    # The keys of all members are compared at once, also where one `vmap` stands around another:
    # two members may differ in both.
    every = _alone(words.reshape(-1, words.shape[-1]), released)
    return every.reshape(words.shape[:-1]), True


def _folded(key: jax.Array, name: str) -> jax.Array:
    """The key of a name: 64 bits of its hash are folded in."""
    digest = hashlib.sha256(name.encode()).digest()
    for word in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, np.uint32(int.from_bytes(word, "big")))
    return key


def _words(key: jax.Array) -> jax.Array:
    return jax.random.key_data(key) if _is_typed(key) else key


def _is_typed(key: jax.Array) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
