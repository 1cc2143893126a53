"""Bound rules of look-ups."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.rounding import divisor, gamma, times, up
from jaxdp.lipschitz.rules.registry import PullBack, register_bound_rule
from jaxdp.lipschitz.value import Range, Value, scaled


@register_bound_rule("gather", whole=True)
def _gather(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, index = values
    fill = eqn.params["fill_value"]
    if eqn.params["mode"] == GatherScatterMode.FILL_OR_DROP and not (
        fill is not None and math.isfinite(fill)
    ):
        raise NotImplementedError(
            f"no bound is known for a look-up that gives NaN outside of the table ({eqn.source}). "
            'Use x.at[index].get(mode="clip"), or fill_value=0.'
        )
    repeats = _repeats(eqn, x, index)
    low, high = x.low, x.high
    norm = times(repeats, x.norm)
    if fill is not None:
        low, high = jnp.minimum(low, fill), jnp.maximum(high, fill)
        norm += math.sqrt(eqn.outputs[0].size) * abs(fill)
    elif x.array is not None:
        norm = jnp.minimum(norm, math.sqrt(_windows(eqn)) * _longest_window(eqn, x.array))
    summed = times(repeats, 1 + gamma(_windows(eqn)))
    return [Range(norm, low, high)], lambda cotangents: [scaled(cotangents[0], summed), None]


def _windows(eqn: Equation) -> int:
    """The number of windows that are looked up."""
    return eqn.outputs[0].size // max(math.prod(eqn.params["slice_sizes"]), 1)


def _repeats(eqn: Equation, x: Value, index: Value) -> jax.Array:
    """The operator norm of the look-up: the root of how often an entry can be looked up."""
    if index.array is None:
        return jnp.sqrt(jnp.float32(_windows(eqn)))
    ones = jnp.ones(x.shape, jnp.float32)
    found, transposed = jax.vjp(lambda table: eqn.bind([table, index.array])[0], ones)
    (counts,) = transposed(jnp.ones_like(found))
    return jnp.sqrt(jnp.max(counts, initial=0.0))


def _longest_window(eqn: Equation, table: jax.Array) -> jax.Array:
    """The largest norm of one window that is whole along some axes; else the norm of the table."""
    sizes = eqn.params["slice_sizes"]
    whole = tuple(axis for axis, size in enumerate(sizes) if size == table.shape[axis])
    if any(size != 1 for axis, size in enumerate(sizes) if axis not in whole):
        whole = tuple(range(table.ndim))
    terms = math.prod(table.shape[axis] for axis in whole)
    # Divided by the largest entry first, since squares vanish.
    sizes = jnp.abs(table)
    most = jnp.max(sizes, initial=0)
    squares = jnp.sum(jnp.square((sizes / divisor(most)).astype(jnp.float32)), whole)
    return up(times(divisor(most), jnp.sqrt(jnp.max(squares, initial=0))), terms)
