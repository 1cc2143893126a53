"""Where randomness comes from: keys that never repeat."""

import secrets
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

# Each use of a user's key folds in its own tag: the same key given twice by mistake, to the noise
# and to an adaptive clip, still gives independent draws.
GRADIENT_NOISE = 0x6E6F6973
COUNT_NOISE = 0x636F756E
SELECTION_NOISE = 0x73656C65


def random_key() -> jax.Array:
    """A JAX key from the operating system's entropy.

    Noise protects only as long as nobody can draw it again: whoever knows the key subtracts it.
    Use this for models that are released, and a fixed `jax.random.key(seed)` for experiments. On
    several processes (`jax.distributed`) all must call it, and get the same key: else each would
    add noise of its own.

    Example:
      >>> random_key().shape
      ()
    """
    impl = jax.random.key_impl(jax.random.key(0))
    words = jax.random.key_data(jax.random.key(0)).shape[0]
    entropy = np.array([secrets.randbits(32) for _ in range(words)], np.uint32)
    if jax.process_count() > 1:
        entropy = np.asarray(multihost_utils.broadcast_one_to_all(entropy))
    return jax.random.wrap_key_data(jnp.asarray(entropy), impl=impl)


def step_key(key: jax.Array, use: int, step: jax.Array) -> jax.Array:
    """The key of one use at one logical step: distinct for every (use, step)."""
    return jax.random.fold_in(jax.random.fold_in(key, use), step)


def leaf_key(key: jax.Array, index: int, path: Any) -> jax.Array:
    """The key of one leaf at one step: distinct for every (index, path).

    The path counts, too: where `optax.partition` gives two chains the same key by mistake, each
    sees its own leaves only, and their indices alone would coincide.
    """
    name = jax.tree_util.keystr(path).encode()
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name)), index)
