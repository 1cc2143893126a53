"""One sum over the samples of all devices, in the chain."""

from typing import Any

import jax
import optax

from jaxdp.bounded import Bounded
from jaxdp.checks import check_instance
from jaxdp.varying import untracked_axes, varying_axes


def all_reduce(*axis_names: str) -> optax.GradientTransformation:
    r"""Adds up the `Bounded` sums of all devices along axes of a mesh.

    $$ \sum_d v_d, \qquad \Delta = \max_d \Delta_d $$

    Every sample lies on one device, so that the sum moves by the sensitivity of one device. Use it
    inside `jax.shard_map` or `jax.pmap`, right behind the clip, so that noise is drawn once for the
    sum. Under `jit` with a sharded batch it is not needed.

    Args:
      axis_names: names of the axes along which the samples are spread, without the axes of a model
        that is spread itself (tensor parallelism), over which norms are summed already.

    Returns:
      A transformation from `Bounded` to `Bounded`. Devices exchange the tree of gradients, once,
      and where sensitivities differ one number for each group.

    Raises:
      ValueError: no axis is named.
      TypeError: (in `update`) the updates are no `Bounded`.
      ValueError: (in `update`) a sum that is the same on all devices already: each sample would
        count several times.

    Example:
      >>> import jax.numpy as jnp, jaxdp
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> tx = optax.chain(jaxdp.clip_flat(1.0), all_reduce("data"),
      ...                  jaxdp.add_noise(0.0, jax.random.key(0)))
      >>> grads_fn = jaxdp.per_sample_grads(lambda w, x: w @ x)
      >>> def step(w, batch):
      ...     return tx.update(grads_fn(w, batch), tx.init(w), w)[0]
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
      >>> total = spread(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 0.5]]))
      >>> [round(float(entry), 4) for entry in total]
      [0.6, 1.3]

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1, whose sum
    over the lot runs over all devices here.
    """
    if not axis_names:
        raise ValueError(
            "all_reduce needs the axis along which samples are spread, got none. Pass the name of "
            'that axis of the mesh, as "data".'
        )
    for name in axis_names:
        check_instance("axis_names", name, str, advice="Pass the names of the axes, one by one.")
    axes = frozenset(axis_names)

    def update(updates: Any, params: Any) -> Any:
        if not isinstance(updates, Bounded):
            raise TypeError(
                f"all_reduce takes the jaxdp.Bounded of a clip, got {type(updates).__name__}. Put "
                "it between the clip and jaxdp.add_noise."
            )
        _check_spread(updates, axes)
        leaves, treedef = jax.tree.flatten(updates.value)
        # All in one exchange. Leaves that no sample can change are the same everywhere.
        sums = iter(jax.lax.psum(updates.moving_leaves(), axis_names))
        added = [
            leaf if group is None else next(sums)
            for leaf, group in zip(leaves, updates.groups, strict=True)
        ]
        value = jax.tree.unflatten(treedef, added)
        return updates.with_value(value, _largest(updates.sensitivity, axes), summed_over=axes)

    return optax.stateless(update)


def _check_spread(updates: Bounded, axes: frozenset[str]) -> None:
    others = sorted(axes - updates.unsummed)
    if others:
        raise ValueError(
            f"all_reduce needs samples that are spread along {others}, but they are the same on "
            "all devices there, or added up already. Each would count several times, with the "
            "noise for one. Shard the batch along that axis (in_specs), and reduce once."
        )


def _largest(sensitivity: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Δ of the sum. Nothing is exchanged where the types say that it is the same on all devices."""
    along = axes & (varying_axes(sensitivity) | untracked_axes())
    return jax.lax.pmax(sensitivity, tuple(sorted(along))) if along else sensitivity
