"""From a logical step to its physical batches, with their data."""

import hashlib
import hmac
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxdp.accumulation import AccumulateState
from jaxdp.distributed import spread_rows
from jaxdp.engine.sharded import row_sharding
from jaxdp.sampling import PhysicalBatch, Sampler
from jaxdp.training.step import TrainState

# A pytree of host arrays [num_examples, ...], or a function from indices [P] to a batch [P, ...].
Data = Any | Callable[[np.ndarray], Any]


_ROWS_AT_ONCE = 2**14


class LoadedBatch(NamedTuple):
    """A physical batch with its data.

    Attributes:
      batch: pytree of `[P, ...]`.
      mask: bool `[P]`, True for the rows that hold a sample.
      is_last: whether it completes its logical batch.
    """

    batch: Any
    mask: np.ndarray | jax.Array
    is_last: bool


def loader(
    data: Data, sampler: Sampler, sharding: NamedSharding | None, data_parts: int
) -> Callable[[int], list[LoadedBatch]]:
    """`logical step -> its physical batches`, checked against the sampler.

    Args:
      data, sampler, sharding, data_parts: as `fit` takes them.

    Raises:
      ValueError: the data does not fit the sampler; rows that do not divide among the devices, or
        these not among the parts of the data.
    """
    if not callable(data):
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
        if sizes != {(sampler.num_examples,)}:
            raise ValueError(
                f"every leaf of data must hold the {sampler.num_examples} examples that the "
                "sampler draws from and the ledger accounts for, got leading axes "
                f"{sorted(sizes)}. Pass those examples, or make the sampler for these."
            )

    def rows(indices: np.ndarray) -> Any:
        if callable(data):
            return data(indices)
        return jax.tree.map(lambda leaf: leaf[indices], data)

    _check_shards(sampler, sharding, data_parts)

    def loaded(drawn: PhysicalBatch) -> LoadedBatch:
        if sharding is None:
            return LoadedBatch(rows(drawn.indices), drawn.mask, drawn.is_last)
        return LoadedBatch(
            spread_rows(rows, drawn.indices, sharding),
            spread_rows(lambda mask: mask, drawn.mask, sharding),
            drawn.is_last,
        )

    def load(step: int) -> list[LoadedBatch]:
        return [loaded(drawn) for drawn in sampler.draw(step, data_parts)]

    return load


def data_digest(data: Data, sampler: Sampler) -> str | None:
    """A digest by which other data of the same shape is noticed, if it differs in one entry.

    It is keyed by the secret seed of the sampler: of the rows alone it would tell whoever guesses
    one that the guess is right.

    Args:
      data: as `fit` takes it.
      sampler: of the run.

    Returns:
      64 hex digits; None for a function, which may return something else at every call.
    """
    if callable(data):
        return None
    digest = hmac.new(f"jaxdp data\n{sampler.seed}".encode(), digestmod=hashlib.sha256)
    for path, leaf in jax.tree.leaves_with_path(data):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {np.shape(leaf)}".encode())
        if leaf.dtype == object:  # of which an array holds addresses
            continue
        for start in range(0, len(leaf), _ROWS_AT_ONCE):  # files in memory are read once
            digest.update(np.asarray(leaf[start : start + _ROWS_AT_ONCE]).tobytes())
    return digest.hexdigest()


def _check_shards(sampler: Sampler, sharding: NamedSharding | None, data_parts: int) -> None:
    """A row lies on one device, and a device in one place of the data."""
    devices = 1
    if sharding is not None:
        rows = jax.ShapeDtypeStruct((sampler.physical_batch_size,), np.bool_)
        placed = row_sharding(rows, sharding)
        devices = 1 if placed is None else placed.devices
    if devices % data_parts:
        raise ValueError(
            f"data_parts must divide the {devices} devices that rows are spread over, got "
            f"{data_parts}. Pass the number of processes."
        )


def check_overflow(state: TrainState, sampler: Sampler, data_parts: int) -> None:
    """A logical batch in several physical ones, each with its own noise, would not be the
    mechanism that the ledger is charged with."""

    def accumulates(node: Any) -> bool:
        return isinstance(node, AccumulateState)

    nodes = jax.tree.leaves(state.opt_state, is_leaf=accumulates)
    # A part of the data may hold more of a draw than its share.
    rows = sampler.physical_batch_size // data_parts
    most = min(sampler.largest_draw, len(sampler.part(data_parts - 1, data_parts)))
    if most > rows and not any(map(accumulates, nodes)):
        raise ValueError(
            f"a draw of {type(sampler).__name__} may need several physical batches of "
            f"{sampler.physical_batch_size}. Put what follows the clip into jaxdp.accumulate(...), "
            f"or set physical_batch_size={sampler.num_examples}."
        )
