"""How the gradients of a batch compare with their bounds. NOT private: for the operator's eyes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.lipschitz.bounds import input_limits, leaf_bounds
from jaxdp.lipschitz.gradients import admitted, refuse_infinite
from jaxdp.per_sample import PerSampleGrads, per_sample_grads
from jaxdp.problem import LossFn, pose


class SignalToNoise(NamedTuple):
    """Norms of gradients beside their bounds, to which noise is proportional. NOT private.

    Attributes:
      ratios: norm over bound for each leaf, by path.
      norms: the norms, by path.
      bounds: the bounds Δ, by path. They alone are private.

    Example:
      >>> loss_fn = lambda params, x: params @ x
      >>> found = signal_to_noise_average(loss_fn, jnp.ones(2), jnp.array([[0.6, 0.8]]), 2.0)
      >>> print(*(table[""].round(3) for table in found))
      0.5 1.0 2.0
    """

    ratios: dict[str, jax.Array]
    norms: dict[str, jax.Array]
    bounds: dict[str, jax.Array]


def signal_to_noise_average(
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    input_bound: Any,
    *,
    mask: jax.Array | None = None,
    trainable: Any = True,
    **kwargs: Any,
) -> SignalToNoise:
    """The mean gradient over the bound, ‖Σ_i g_ik / n‖ / Δ_k, for each leaf k. NOT private.

    The noise of a step is σ Δ/n per entry, times the factor of the allocation. So the signal of
    leaf k stands out where the ratio is large against σ√(entries)/n.

    Args:
      loss_fn, input_bound, trainable: as for `lipschitz.bounded_grads`.
      params: the parameters.
      batch: pytree of `[B, ...]`.
      mask: bool `[B]`; rows that are False count for nothing.
      **kwargs: further arguments of the loss.

    Returns:
      Ratios, norms and bounds, scalars, for each leaf that has a gradient.

    Raises:
      TypeError, ValueError, NotImplementedError: as `lipschitz.bounded_grads`.

    Example:
      >>> loss_fn = lambda params, x: params["w"] @ x
      >>> x = jnp.array([[0.6, 0.8], [-0.6, -0.8], [0.6, 0.8]])
      >>> found = signal_to_noise_average(loss_fn, {"w": jnp.ones(2)}, x, 1.0)
      >>> print(found.ratios["w"].round(3))
      0.333
    """

    def mean(grads: PerSampleGrads) -> list[jax.Array]:
        weights = grads.counted.astype(jnp.float32)
        count = jnp.maximum(jnp.sum(weights), 1)
        sums = jax.tree.leaves(grads.weighted_sum(weights))
        return [jnp.linalg.norm(leaf.reshape(-1)) / count for leaf in sums]

    return _compared(mean, loss_fn, params, batch, input_bound, mask, trainable, kwargs)


def signal_to_noise_elementwise(
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    input_bound: Any,
    *,
    mask: jax.Array | None = None,
    trainable: Any = True,
    **kwargs: Any,
) -> SignalToNoise:
    """The gradient of each sample over the bound, ‖g_ik‖ / Δ_k, for each leaf k. NOT private.

    The ratios show how tight the bounds are on data.

    Args:
      loss_fn, params, batch, input_bound, mask, trainable: as for `signal_to_noise_average`.
      **kwargs: further arguments of the loss.

    Returns:
      Ratios and norms `[B]`, zero in masked rows, and bounds, scalars, for each leaf that has a
      gradient.

    Raises:
      TypeError, ValueError, NotImplementedError: as `lipschitz.bounded_grads`.

    Example:
      >>> loss_fn = lambda params, x: params["w"] @ x
      >>> x = jnp.array([[0.6, 0.8], [0.0, 0.5]])
      >>> found = signal_to_noise_elementwise(loss_fn, {"w": jnp.ones(2)}, x, 1.0)
      >>> print(found.ratios["w"].round(3))
      [1.  0.5]
    """

    def each(grads: PerSampleGrads) -> list[jax.Array]:
        groups = tuple(range(len(grads.groups)))
        norms = jnp.where(grads.counted[:, None], grads.norms(groups), 0)
        return list(norms.T)

    return _compared(each, loss_fn, params, batch, input_bound, mask, trainable, kwargs)


def _compared(
    norms_of: Callable[[PerSampleGrads], list[jax.Array]],
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    input_bound: Any,
    mask: jax.Array | None,
    trainable: Any,
    kwargs: dict[str, Any],
) -> SignalToNoise:
    problem = pose(loss_fn, params, batch, mask, kwargs, has_aux=False, trainable=trainable)
    limits = input_limits(input_bound, batch)
    found = leaf_bounds(problem, limits)
    refuse_infinite(found, [math.inf] * len(problem.names), problem.names)
    bounds = found.arrays
    examples, counted = admitted(problem.batch.examples, problem.batch.mask, limits)
    grads_fn = per_sample_grads(lambda leaves, example: problem.loss(leaves, example)[0])
    norms = norms_of(grads_fn(problem.leaves, examples, counted))
    ratios = [norm / bound for norm, bound in zip(norms, bounds, strict=True)]
    tables = (dict(zip(problem.names, column, strict=True)) for column in (ratios, norms, bounds))
    return SignalToNoise(*tables)
