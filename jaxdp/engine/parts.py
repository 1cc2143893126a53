"""Parameters of which each device holds a part, gathered where they are used.

A device that computes from its own rows needs whole parameters, but not all of them at a time. So
its part of one goes through the program in the place of the whole: into loops, which take a slice
of it at each step, and into rematerialised blocks. The equation that computes with it gathers it,
and gathers it again for its derivative: nobody keeps the whole.

    with gathered_when_used(params, cuts) as wholes:
        ...         # `instrument.run` finds the parts of these wholes; who takes them gets wholes

Sums over the rows of all devices go the other way: each device keeps its part (`scattered`).

All devices must reach an exchange together: no loop or branch around one may depend on the rows of
one device alone (`on_any_device`).
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.walker import Equation
from jaxdp.varying import devices_along, sample_axes


class Cut(NamedTuple):
    """How an array is cut in parts.

    Attributes:
      axis: along which axis of it, counted from the last one, so that a slice of a stack is cut
        along the same one.
      names: of the axes of devices that hold a part each, the outermost first.
    """

    axis: int
    names: tuple[str, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InParts:
    """An array of which this device holds a part. It goes through transformations of JAX."""

    part: jax.Array
    cut: Cut = field(metadata={"static": True})

    def whole(self) -> jax.Array:
        """The whole of it, from all devices that hold a part."""
        axis = self.part.ndim + self.cut.axis
        return jax.lax.all_gather(self.part, self.cut.names, axis=axis, tiled=True)

    @classmethod
    def zeros(cls, shape: Sequence[int], dtype: Any, cut: Cut) -> "InParts":
        """Zeros, as a whole of this shape."""
        part = list(shape)
        part[cut.axis] //= devices_along(frozenset(cut.names))
        return cls(jnp.zeros(part, dtype), cut)


class _Known(NamedTuple):
    """A whole, and the part of it that this device holds."""

    whole: jax.Array
    part: InParts


# By the id of the whole, which is kept, so that no other array has its id.
_known: ContextVar[Mapping[int, _Known]] = ContextVar("known", default=MappingProxyType({}))


@contextlib.contextmanager
def gathered_when_used(params: Any, cuts: Sequence[Cut | None]) -> Generator[Any]:
    """Within, the wholes of these parameters are known by their parts.

    Args:
      params: pytree of what this device holds of each.
      cuts: for each leaf how it is cut; None for one that is whole.

    Yields:
      The same pytree with wholes. One that nobody takes is never gathered.
    """
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, cuts, strict=True)
    parts = [leaf if cut is None else InParts(leaf, cut) for leaf, cut in pairs]
    wholes = whole(parts)
    known = {
        id(array): _Known(array, part)
        for array, part in zip(wholes, parts, strict=True)
        if isinstance(part, InParts)
    }
    token = _known.set(known)
    try:
        yield jax.tree.unflatten(treedef, wholes)
    finally:
        _known.reset(token)


def part_of(value: Any) -> Any:
    """The part of a whole that is known by it; any other value is what it was."""
    known = _known.get().get(id(value))
    return value if known is None else known.part


def whole(values: Sequence[Any]) -> list[Any]:
    """The values, with the whole of each that is held in parts."""
    return [value.whole() if isinstance(value, InParts) else value for value in values]


def scattered(total: jax.Array, cut: Cut) -> InParts:
    """The sum of an array over all devices that hold a part of it: each keeps its own."""
    axis = total.ndim + cut.axis
    part = jax.lax.psum_scatter(total, cut.names, scatter_dimension=axis, tiled=True)
    return InParts(part, cut)


def sums_held(sums: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
    """Sums over the rows of a device for these parameters; of one that is held in parts the sum
    over all devices, in parts."""

    def held(total: Any, leaf: Any) -> Any:
        part = part_of(leaf)
        if isinstance(total, InParts) or not isinstance(part, InParts):
            return total
        return scattered(total, part.cut)

    return list(map(held, sums, leaves))


def slot(value: Any, counts: jax.Array) -> Any:
    """A whole of zeros for zeros in parts, which are sent to nobody; its cotangent is scattered.

    Args:
      value: zeros, in parts or whole.
      counts: whether the cotangent on this device counts; it is zero by selection where not.
    """
    if not isinstance(value, InParts):
        return value
    cut, shape = value.cut, jax.eval_shape(InParts.whole, value).shape

    @jax.custom_vjp
    def zeros(part: jax.Array, counts: jax.Array) -> jax.Array:
        del counts
        return jnp.zeros(shape, part.dtype)

    def forward(part: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        return zeros(part, counts), counts

    def backward(counts: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
        counted = jnp.where(counts, cotangent, jnp.zeros_like(cotangent))
        return scattered(counted, cut).part, None

    zeros.defvjp(forward, backward)
    return zeros(value.part, counts)


def is_stacked(value: Any) -> bool:
    """Whether a loop may take slices of it along its first axis: not if it is cut along that."""
    return not isinstance(value, InParts) or value.part.ndim + value.cut.axis > 0


def together(rows: Any) -> tuple[str, ...]:
    """The axes of devices that hold other rows and must go through loops and branches together,
    since they exchange something on the way: what is held in parts, or, where the mesh has further
    axes along which the model is spread, whatever the loss exchanges. A collective permute, for
    one, waits for every device of the mesh.

    Args:
      rows: an array of the rows of a batch.
    """
    cut = {name for known in _known.get().values() for name in known.part.cut.names}
    spread = sample_axes(rows)
    shared = frozenset(jax.sharding.get_abstract_mesh().axis_names) - spread
    return tuple(sorted(cut | spread if shared else cut))


def on_any_device(flags: jax.Array, rows: Any) -> jax.Array:
    """Which flags are set on one of the devices that must go together; where none must, each device
    has its own.

    Args:
      flags: `[...]` bool.
      rows: an array of the rows of a batch.
    """
    names = together(rows)
    return jax.lax.pmax(flags.astype(jnp.int32), names) > 0 if names else flags


def bind(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """The equation applied to these values; where parts are enough, its result is in parts, too."""
    view = _view(eqn, values)
    return gathered(eqn.bind, values) if view is None else [view]


def gathered(fun: Callable[..., Any], values: Sequence[Any], *others: Any) -> Any:
    """`fun(values, *others)`, with what is held in parts gathered for it, and once more for its
    derivative."""
    if not any(isinstance(value, InParts) for value in values):
        return fun(values, *others)

    def on_wholes(values: Sequence[Any], *others: Any) -> Any:
        return fun(whole(values), *others)

    return jax.checkpoint(on_wholes, prevent_cse=False)(values, *others)


def _view(eqn: Equation, values: Sequence[Any]) -> InParts | None:
    """What an equation makes of an array entry by entry, or by turning its axes."""
    (operand,) = values if len(values) == 1 else (None,)
    if not isinstance(operand, InParts):
        return None
    ndim, cut = operand.part.ndim, operand.cut
    if eqn.name == "transpose":
        cut = cut._replace(axis=eqn.params["permutation"].index(ndim + cut.axis) - ndim)
    elif eqn.name not in ("convert_element_type", "reduce_precision"):
        return None
    return replace(operand, part=eqn.bind([operand.part])[0], cut=cut)
