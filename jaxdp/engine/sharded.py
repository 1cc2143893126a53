"""A batch whose rows lie on several devices, under `jit`.

Every device runs the method on its own rows, inside `jax.shard_map` over the axes of the mesh
along which rows are spread; sums are added up over the devices, once. XLA alone would give the same
numbers, but for loops over samples it gathers all rows on every device first. The other axes of the
mesh are left to XLA.
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P

from jaxdp.engine.methods.base import Reducer
from jaxdp.engine.parts import Cut, InParts, gathered_when_used, scattered
from jaxdp.engine.reduction import Batch, Reduction, Rows
from jaxdp.engine.weighting import Weighting
from jaxdp.shares import names_in


class RowSharding(NamedTuple):
    """Where the rows of a batch lie.

    Attributes:
      mesh: of devices.
      axes: those along which the first axis of the batch is spread.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]

    @property
    def devices(self) -> int:
        """How many parts the rows are spread over."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def cut_of(self, array: Any) -> Cut | None:
        """How an array is cut along these axes of the mesh, as its type says; None where each
        device has all of it."""
        entries = [names_in(entry) for entry in jax.typeof(array).sharding.spec]
        cut = [axis for axis, names in enumerate(entries) if set(names) & set(self.axes)]
        if len(cut) != 1 or not set(entries[cut[0]]) <= set(self.axes):
            return None
        return Cut(cut[0] - len(entries), entries[cut[0]])

    def spec_of_cut(self, array: Any) -> PartitionSpec:
        """The same as `jax.shard_map` takes it."""
        cut = self.cut_of(array)
        return P() if cut is None else P(*[None] * (jnp.ndim(array) + cut.axis), cut.names)

    def added_up(self, total: jax.Array | InParts, like: Any) -> jax.Array:
        """The sum over all devices; of what is cut the part of this device."""
        cut = self.cut_of(like)
        if cut is None:
            return jax.lax.psum(total, self.axes)
        part = (total if isinstance(total, InParts) else scattered(total, cut)).part
        others = tuple(name for name in self.axes if name not in cut.names)
        return jax.lax.psum(part, others) if others else part


def row_sharding(batch: Any, sharding: NamedSharding | None) -> RowSharding | None:
    """Where the rows of a batch lie: as the caller says, or as the types of a mesh with explicit
    axes say. None where nothing is known, or all rows are on each device.

    Raises:
      ValueError: leaves disagree; the sharding spreads other axes than the first, or the rows do
        not divide among the devices.
    """
    if sharding is None:
        placements = {rows for leaf in jax.tree.leaves(batch) if (rows := _typed(leaf)) is not None}
        if len(placements) > 1:
            raise ValueError(
                "all leaves of batch must have their rows on the same devices, got "
                f"{sorted(rows.axes for rows in placements)}. Shard their first axes alike."
            )
        return placements.pop() if placements else None
    first, *others = sharding.spec or (None,)
    if any(axis is not None for axis in others):
        raise ValueError(
            f"sharding must spread the rows of the batch alone, got {sharding.spec}. Name axes of "
            "the mesh in its first entry only."
        )
    rows = RowSharding(sharding.mesh, names_in(first))
    count = jax.tree.leaves(batch)[0].shape[0]
    if count % rows.devices:
        raise ValueError(
            f"the rows of a batch must divide among {rows.devices} devices, got {count}. Choose a "
            f"physical batch size that is a multiple of {rows.devices}."
        )
    return rows if rows.axes else None


def _typed(leaf: Any) -> RowSharding | None:
    sharding = jax.typeof(leaf).sharding
    axes = names_in(next(iter(sharding.spec), None))
    return RowSharding(sharding.mesh, axes) if axes else None


def on_each_device(
    run: Callable[[Any, Any], tuple[Any, Any]],
    rows: RowSharding,
    common: Any,
    by_row: Any,
    like: Any,
) -> tuple[Any, Any]:
    """Runs a function on every device with the rows that lie there.

    Args:
      run: `(common, its rows) -> (sums over its rows, results by row)`. What is cut may come in
        parts already, added up over all rows.
      rows: where they lie.
      common: arrays that all devices see in the same way, any pytree. What types say to be cut
        along the axes of the rows is gathered where `run` uses it (`engine.parts`).
      by_row: pytree of `[B, ...]`.
      like: what has the structure of the sums, to be spread over the mesh as these are.

    Returns:
      The sums over all rows, and the results `[B, ...]`.
    """

    def on_one(common: Any, by_row: Any) -> tuple[Any, Any]:
        with gathered_when_used(common, cuts) as wholes:
            sums, results = run(wholes, by_row)
        treedef = jax.tree.structure(like)
        added = map(rows.added_up, treedef.flatten_up_to(sums), jax.tree.leaves(like))
        return jax.tree.unflatten(treedef, added), results

    cuts = list(map(rows.cut_of, jax.tree.leaves(common)))
    split = P(rows.axes)
    explicit = tuple(
        name
        for name, kind in zip(rows.mesh.axis_names, rows.mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    mapped = jax.shard_map(
        on_one,
        mesh=None if explicit else rows.mesh,
        in_specs=(jax.tree.map(rows.spec_of_cut, common), split),
        out_specs=(jax.tree.map(rows.spec_of_cut, like), split),
        axis_names=frozenset(rows.axes),
        # A loss is written for one device: with types that tell what varies, every loop in it that
        # begins with zeros would have to say that they do.
        check_vma=False,
    )
    if explicit:
        # Within, the other axes are XLA's affair, too: few operations of a model can tell how
        # their results are to be spread.
        sums = jax.tree.map(lambda leaf: _spec(leaf, rows), like)
        out = (sums, NamedSharding(rows.mesh, split))
        mapped = jax.sharding.auto_axes(mapped, axes=explicit, out_sharding=out)
    return jax.jit(mapped)(common, by_row)


def _spec(leaf: Any, rows: RowSharding) -> NamedSharding:
    sharding = jax.typeof(leaf).sharding
    return NamedSharding(rows.mesh, P()) if sharding.mesh.empty else sharding


class Sharded(NamedTuple):
    """The whole batch, each device its own rows.

    Attributes:
      reducer_of: `(arrays, rows) -> reducer` of the rows of one device.
      arrays: parameters and other arrays of the loss.
      leaves: parameters that have a gradient.
      rows_at: where the rows lie.
    """

    reducer_of: Callable[[Any, Batch], Reducer]
    arrays: Any
    leaves: list[Any]
    rows_at: RowSharding

    def reduce(self, batch: Batch, weighting: Weighting | None) -> Reduction:
        """Norms, and weighted sums if `weighting` is given, added up over devices."""

        def on_one(
            common: tuple[Any, Weighting | None], rows: Batch
        ) -> tuple[list[jax.Array], Reduction]:
            arrays, weighting = common
            reduction = self.reducer_of(arrays, rows).reduce(rows, weighting)
            return reduction.sums, reduction._replace(sums=[])

        like = [] if weighting is None else self.leaves
        sums, by_row = on_each_device(on_one, self.rows_at, (self.arrays, weighting), batch, like)
        return by_row._replace(sums=sums)

    def rows(self, batch: Batch) -> Rows:
        """The gradients of the whole batch, each where its row lies."""

        def on_one(arrays: Any, rows: Batch) -> tuple[tuple[()], Rows]:
            return (), self.reducer_of(arrays, rows).rows(rows)

        return on_each_device(on_one, self.rows_at, self.arrays, batch, ())[1]
