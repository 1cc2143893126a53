"""Agreement of all processes on the samples that are drawn, and on the noise."""

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxdp.engine import walker


def shared_seed() -> int:
    """A seed from the operating system's entropy, the same on every process: for a sampler.

    All processes must call it. A sampler without a seed draws one of its own, and on several
    processes such samplers would draw different batches.

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
      **values: what must be equal, each under the name by which the error calls it: a pytree of
        arrays (keys included), or data for JSON. An array that is spread over several processes
        is left out, since they share it.

    Raises:
      ValueError: a value differs between the processes.

    Example:
      >>> check_agreement(threshold=1.0)  # one process agrees with itself
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
            f"all processes must have the same {' and '.join(different)}, got others on some. Give "
            "every process the same arguments, clip, noise and optimizer, a seed "
            "(jaxdp.distributed.shared_seed()) and keys (jaxdp.random_key())."
        )


def program_digest(fun: Callable[..., Any], *arguments: Any) -> str:
    """A digest of a function: of its traced program, and of the constants that it closes over.

    Two processes may hold closures that differ in one number, such as a clip norm or a learning
    rate. Then state and arguments are equal, but the releases are not.

    Args:
      fun: a function of pytrees of arrays; it is traced, not run.
      arguments: the arguments of the call.

    Returns:
      A digest of 64 hex digits, equal on two processes if program and constants are equal.

    Example:
      >>> program_digest(lambda x: 0.1 * x, 1.0) == program_digest(lambda x: 0.2 * x, 1.0)
      False
    """
    program, _ = walker.trace(fun, *arguments)
    # Where a closure lies in memory is no part of what it computes.
    found = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", str(program)).encode())
    # The text of a program cuts long arrays.
    for constant in (*walker.closed_over(program), *walker.literals(program)):
        found.update(_digest(constant).tobytes())
    return found.hexdigest()


def _digest(value: Any) -> np.ndarray:
    """A digest of the leaves of a value, uint32 `[8]`."""
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(value):
        found.update(jax.tree_util.keystr(path).encode())
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            found.update(json.dumps(leaf).encode())
            continue
        if isinstance(leaf, jax.Array):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            if not leaf.is_fully_addressable:
                # Each process has a replica of its own, which may differ from the others.
                if not leaf.is_fully_replicated:
                    continue
                leaf = leaf.addressable_shards[0].data
        array = np.asarray(leaf)
        found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return np.frombuffer(found.digest(), np.uint32)
