"""What all processes must have in common: who is drawn, and the noise."""

import hashlib
import json
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def shared_seed() -> int:
    """A seed from the operating system's entropy, the same on every process: for a sampler.

    To be called by all processes alike. Each sampler draws a seed of its own where it is given
    none; on several processes these would draw different batches.

    Returns:
      An integer of 128 bits, as secret as the data.

    Example:
      >>> 0 <= shared_seed() < 2**128
      True
    """
    words = np.frombuffer(secrets.token_bytes(16), np.uint32)
    if jax.process_count() > 1:
        words = np.asarray(multihost_utils.broadcast_one_to_all(words))
    return int.from_bytes(words.astype("<u4").tobytes(), "little")


def check_agreement(**values: Any) -> None:
    """Raises ValueError on every process unless all have the same values.

    Processes that draw other samples, or other noise, train something that no ledger describes.

    Args:
      values: by what to call them; pytrees of arrays (keys included), or data for JSON. What is
        spread over several processes is left out: these share it.
    """
    if jax.process_count() == 1:
        return
    digests = np.stack([_digest(value) for value in values.values()])
    everywhere = np.asarray(multihost_utils.process_allgather(digests))
    different = [
        name
        for name, column in zip(values, everywhere.swapaxes(0, 1), strict=True)
        if (column != column[0]).any()
    ]
    if different:
        raise ValueError(
            f"all processes must have the same {' and '.join(different)}, got others on some: give "
            "every process the same arguments, a seed (jaxdp.distributed.shared_seed()) and keys "
            "(jaxdp.random_key())"
        )


def _digest(value: Any) -> np.ndarray:
    """Of what a value holds, uint32 `[8]`."""
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(value):
        found.update(jax.tree_util.keystr(path).encode())
        if not isinstance(leaf, jax.Array):
            found.update(json.dumps(leaf).encode())
        elif leaf.is_fully_addressable:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            found.update(np.asarray(leaf).tobytes())
    return np.frombuffer(found.digest(), np.uint32)
