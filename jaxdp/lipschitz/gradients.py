"""Gradients that are bounded by the design of the network, so that nothing is clipped.

grads_fn = lipschitz.bounded_grads(loss_fn, input_bound=1.0)
tx = optax.chain(jaxdp.add_noise(1.1, key), optax.scale(1 / 256), optax.adam(1e-3))
updates, state = tx.update(grads_fn(params, batch, mask), state, params)
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxdp.bounded import Bounded
from jaxdp.checks import check_bool
from jaxdp.clipping import clip_per_layer
from jaxdp.clipping.thresholds import SMALLEST_THRESHOLD, check_threshold
from jaxdp.engine.microbatches import added_up
from jaxdp.engine.numerics import once, select_rows, square_sums, widened
from jaxdp.engine.reduction import Batch, zero_sum, zero_sums
from jaxdp.engine.sharded import on_each_device, row_sharding
from jaxdp.engine.sums import BLOCK, block_size
from jaxdp.lipschitz.bounds import LeafBounds, input_limits, leaf_bounds
from jaxdp.lipschitz.value import known_infinite
from jaxdp.per_sample import per_sample_grads
from jaxdp.problem import LossFn, Problem, check_function, pose, taken_apart, with_gradient
from jaxdp.schedules import check_number
from jaxdp.trees import is_float, prefix_leaves
from jaxdp.varying import sample_axes


def bounded_grads(
    loss_fn: LossFn,
    input_bound: Any,
    *,
    thresholds: Any = math.inf,
    enforce_input_bound: bool = True,
    with_losses: bool = False,
    trainable: Any = True,
    sharding: NamedSharding | None = None,
) -> Callable[..., Any]:
    r"""Turns the loss of ONE example into a function that gives bounded gradients of a batch.

    $$ \sum_i \nabla_\theta\, \ell(\theta, x_i), \qquad \Delta_k \text{ as in } \texttt{bounds} $$

    The sum is computed by one ordinary gradient for every 512 examples of the batch: nothing is
    clipped, and no gradient of a single example exists. Before that, every floating-point leaf of
    an example that is longer than its bound is scaled down to it, targets included; `math.inf`
    leaves a leaf as it is. An example that is not finite in float32, or whose squared norm is not,
    counts for nothing.

    Δ bounds the term that one example adds, as float32 computes it (`jaxdp.lipschitz.rounding`).
    The sum over the examples of a batch is rounded as it is after a clip (docs/rounding.md): those
    of blocks of at most 512 examples are added up with compensation.

    Args:
      loss_fn: as for `jaxdp.per_sample_grads`.
      input_bound: as for `bounds`.
      thresholds: C > 0 for leaves whose bound is too loose to be of use: a pytree prefix of the
        parameters. Their gradients are clipped to min(C, Δ) for each sample, at the price of
        clipping; leaves with `math.inf`, the default, are not.
      enforce_input_bound: whether examples are scaled down. With False the caller guarantees that
        every row, masked ones included, is finite and within its bound (2⁶⁴ where the bound is
        infinite), and saves a pass over the batch.
      with_losses: whether the losses are returned, too.
      trainable, sharding: as for `per_sample_grads`.

    Returns:
      `grads_fn(params, batch, mask=None, **kwargs) -> Bounded`, with one group for each leaf; with
      losses `(Bounded, losses [B])`. Losses are not private; they are zero in masked rows and NaN
      for examples that are not finite.

    Raises:
      TypeError: `loss_fn` is no function.
      TypeError, ValueError: (when called) the errors of `bounds`, and those of `per_sample_grads`
        about batch and mask.
      ValueError: (when called) a threshold that is not positive; a leaf without a threshold whose
        bound is infinite, with the reason. Inside of `jax.jit` a bound is known to be infinite only
        where it is so for all parameters; elsewhere the sum of such a leaf is NaN and its
        sensitivity infinite.

    Example:
      >>> import jaxdp, optax
      >>> loss_fn = lambda params, x: jnp.tanh(params @ x)
      >>> grads_fn = bounded_grads(loss_fn, input_bound=1.0)
      >>> total = grads_fn(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 0.5]]))
      >>> print(total.value, total.sensitivity.round(3))
      [0.6 1.3] [1.]
      >>> tx = optax.chain(jaxdp.add_noise(1.0, jax.random.key(0)), optax.sgd(0.1))
      >>> updates, _ = tx.update(total, tx.init(jnp.zeros(2)))

    Source: as `bounds`.
    """
    check_function(loss_fn)
    check_bool("enforce_input_bound", enforce_input_bound, advice="Leave it out to be safe.")
    check_bool("with_losses", with_losses, advice="Say whether losses are returned, too.")

    def posed(params: Any, batch: Any, mask: jax.Array | None, kwargs: dict[str, Any]) -> Problem:
        return pose(loss_fn, params, batch, mask, kwargs, has_aux=False, trainable=trainable)

    def grads_fn(params: Any, batch: Any, mask: jax.Array | None = None, **kwargs: Any) -> Any:
        problem = posed(params, batch, mask, kwargs)
        limits = input_limits(input_bound, batch)
        found = leaf_bounds(problem, limits)
        caps = with_gradient(_caps(thresholds, problem.params), problem.groups)
        refuse_infinite(found, caps, problem.names)
        # The bound of a leaf that is not used is below the least threshold of a clip.
        sensitivity = [
            bound if cap == math.inf else jnp.clip(bound, SMALLEST_THRESHOLD, cap)
            for bound, cap in zip(found.arrays, caps, strict=True)
        ]
        loose = [cap < math.inf for cap in caps]

        def run(problem: Problem, thresholds: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
            examples, counted, given = problem.batch
            if enforce_input_bound:
                examples, counted = admitted(examples, counted, limits)
            kept = problem._replace(batch=Batch(examples, counted, given))
            sums, losses = _summed(kept, loose)
            if any(loose):
                # In each leaf one of the two sums is zero.
                sums = list(map(jnp.add, sums, _clipped(kept, loose, thresholds)))
            sums = [
                jnp.where(jnp.isfinite(bound), total, jnp.nan)
                for total, bound in zip(sums, thresholds, strict=True)
            ]
            return sums, jnp.where(problem.batch.mask & ~counted, jnp.nan, losses)

        rows_at = row_sharding(problem.batch.examples, sharding)
        if rows_at is None:
            sums, losses = run(problem, sensitivity)
        else:
            arrays, problem_of = taken_apart(problem, kwargs, posed)
            sums, losses = on_each_device(
                lambda common, part: run(problem_of(common[0], part), common[1]),
                rows_at,
                (arrays, sensitivity),
                problem.batch,
                problem.leaves,
            )
        groups = iter(range(len(sums)))
        bounded = Bounded(
            problem.tree(sums, zero_sum),
            jnp.stack(sensitivity),
            [None if group is None else next(groups) for group in problem.groups],
            sample_axes(problem.batch.mask),
        )
        return (bounded, losses) if with_losses else bounded

    return grads_fn


def refuse_infinite(found: LeafBounds, caps: Sequence[float], names: Sequence[str]) -> None:
    """Raises where a leaf has no bound and is not clipped, as far as that is known here."""
    without = [
        name
        for name, bound, cap in zip(names, found.bounds, caps, strict=True)
        if cap == math.inf and known_infinite(bound)
    ]
    if without:
        reason = found.reason()
        raise ValueError(
            f"the gradient of {', '.join(map(repr, without))} must have a bound, got infinity, "
            f"because {reason}. Use another function there, declare one with its bound "
            "(jaxdp.lipschitz.declare), clip the cotangent behind it (lipschitz.clip_gradient), or "
            "give these leaves a threshold (thresholds=)."
        )


def admitted(examples: Any, mask: jax.Array, limits: Sequence[float]) -> tuple[Any, jax.Array]:
    """Examples as the bounds assume them, and the rows that count, bool `[B]`.

    Each floating-point leaf is finite and no longer than its limit; it is zero in rows without a
    sample.
    """
    leaves, treedef = jax.tree.flatten(examples)
    leaves = [once(leaf) if is_float(leaf) else leaf for leaf in leaves]
    squared = [
        square_sums(widened(leaf).reshape(len(mask), math.prod(leaf.shape[1:])))
        if is_float(leaf)
        else jnp.zeros(mask.shape)
        for leaf in leaves
    ]
    # Where a square overflows, the row is lost with those that are not finite.
    finite = [jnp.isfinite(sums.astype(jnp.float32)) for sums in squared]
    counted = functools.reduce(jnp.logical_and, finite, mask)

    def fitted(leaf: jax.Array, squared: jax.Array, limit: float) -> jax.Array:
        if limit == 0:
            return jnp.zeros_like(leaf)
        if limit == math.inf:
            return select_rows(counted, leaf)
        longer = squared > limit * limit
        factors = jnp.where(longer, limit / jnp.sqrt(squared), jnp.ones_like(squared))
        return select_rows(counted, _shrunk(leaf, factors))

    kept = [
        fitted(leaf, sums, limit) if is_float(leaf) else leaf
        for leaf, sums, limit in zip(leaves, squared, limits, strict=True)
    ]
    return jax.tree.unflatten(treedef, kept), counted


def _shrunk(leaf: jax.Array, factors: jax.Array) -> jax.Array:
    """Multiplies every row by its factor of at most one, in float32 at least. The result in half
    precision is rounded towards zero, so that no row becomes longer."""
    wide = widened(leaf)
    scaled = wide * factors.reshape(-1, *(1,) * (leaf.ndim - 1))
    if leaf.dtype == wide.dtype:
        return scaled
    nearest = scaled.astype(leaf.dtype)
    too_long = jnp.abs(widened(nearest)) > jnp.abs(scaled)
    return jnp.where(too_long, jnp.nextafter(nearest, jnp.zeros_like(nearest)), nearest)


def _summed(problem: Problem, skipped: Sequence[bool]) -> tuple[list[jax.Array], jax.Array]:
    """Sums of per-sample gradients, zero for leaves that are skipped; and losses.

    In the ordinary gradient of a large batch, one sample could change how all the others are
    rounded by many times its own contribution (`engine.sums`). So no more than a block of samples
    shares one. The blocks come one after the other: side by side they were no faster on a CPU, and
    would keep a gradient for each of them.
    """

    def total(leaves: list[jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
        held = [
            jax.lax.stop_gradient(leaf) if skip else leaf
            for leaf, skip in zip(leaves, skipped, strict=True)
        ]
        losses, _ = jax.vmap(problem.loss, (None, 0))(held, batch.examples)
        losses = select_rows(batch.mask, losses)
        return jnp.sum(losses), losses

    def of_block(batch: Batch) -> tuple[list[jax.Array], jax.Array]:
        return jax.grad(total, has_aux=True)(problem.leaves, batch)

    batch = problem.batch
    count = batch.mask.shape[0]
    if count <= BLOCK:
        return of_block(batch)
    zeros = zero_sums(problem.leaves, batch.mask)
    return added_up(of_block, batch, block_size(count), zeros)


def _clipped(
    problem: Problem, clipped: Sequence[bool], thresholds: Sequence[jax.Array]
) -> list[jax.Array]:
    """Sums of per-sample gradients, clipped leaf by leaf; zero for the other leaves."""

    def loss_fn(leaves: list[jax.Array], example: Any) -> jax.Array:
        return problem.loss(leaves, example)[0]

    grads_fn = per_sample_grads(loss_fn, trainable=list(clipped))
    grads = grads_fn(problem.leaves, problem.batch.examples, problem.batch.mask)
    clip = clip_per_layer(list(thresholds))
    bounded, _ = clip.update(grads, clip.init(problem.leaves))  # pyright: ignore[reportArgumentType]
    return bounded.value  # pyright: ignore[reportAttributeAccessIssue]


def _caps(thresholds: Any, params: Any) -> list[float]:
    caps = prefix_leaves("thresholds", thresholds, params)
    return [cap if _is_infinite(cap) else _threshold(cap) for cap in caps]


def _is_infinite(cap: Any) -> bool:
    return isinstance(cap, float) and cap == math.inf


def _threshold(cap: Any) -> Any:
    check_threshold("thresholds", cap)
    return check_number("thresholds", cap)
