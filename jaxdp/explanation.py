"""Tells how the per-sample gradients of a loss are computed, leaf by leaf.

print(jaxdp.explain(loss_fn, params, batch))
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from jaxdp.engine.explanation import LeafExplanation
from jaxdp.engine.sharded import row_sharding
from jaxdp.options import Options
from jaxdp.problem import LossFn, Problem, taken_apart
from jaxdp.tables import aligned

_HEADER = ("leaf", "shape", "sites", "form", "MFLOP", "KiB", "reason")


class Explanation(NamedTuple):
    """What `jaxdp.explain` found; printing it gives a table.

    Attributes:
      method: its name: "slots", "taps", "fused" or "dense".
      microbatch_size: how many samples at a time; None for all.
      reason: why this method.
      leaves: one row for each leaf that has a gradient.
      devices: how many devices the rows of the batch are spread over. All else is of one of them,
        and of its rows.

    Example:
      >>> import jax.numpy as jnp
      >>> found = explain(lambda params, x: params @ x, jnp.ones(3), jnp.ones((2, 3)))
      >>> isinstance(found, Explanation), len(found.leaves)
      (True, 1)
    """

    method: str
    microbatch_size: int | None
    reason: str
    leaves: tuple[LeafExplanation, ...]
    devices: int = 1

    def __str__(self) -> str:
        lines = aligned([_HEADER, *map(_cells, self.leaves)])
        at_once = f", {self.microbatch_size} samples at a time" if self.microbatch_size else ""
        each = f", on each of {self.devices} devices" if self.devices > 1 else ""
        return "\n".join([f"method {self.method} ({self.reason}){at_once}{each}", *lines])


def explain(
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    mask: jax.Array | None = None,
    *,
    has_aux: bool = False,
    method: str = "auto",
    memory_budget: int | None = None,
    microbatch_size: int | None = None,
    trainable: Any = True,
    sharding: NamedSharding | None = None,
    **kwargs: Any,
) -> Explanation:
    """How `jaxdp.per_sample_grads` computes with these arguments; nothing is computed.

    Every leaf that is materialised is named with the reason. A bias or a scale is promoted as a
    rule: its gradient is no larger than the activation that it meets.

    Args:
      loss_fn: the loss of one example, as for `per_sample_grads`.
      params: its parameters.
      batch: pytree of `[B, ...]`.
      mask: bool `[B]`.
      has_aux, method, memory_budget, microbatch_size, trainable: as for `per_sample_grads`.
      sharding: as for `per_sample_grads`. Every device chooses for its own rows, so that the budget
        and what is told are those of one device.
      **kwargs: for the loss.

    Returns:
      The method, and for each leaf its sites, the form of its gradients that the norms are
      computed from, floating-point operations and bytes beyond the ordinary gradient of the whole
      batch (of the rows of one device, where these lie on several), and the reason if it is
      materialised.

    Raises:
      TypeError, ValueError: as `per_sample_grads`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> print(explain(loss_fn, params, jnp.ones((4, 3))))
      method slots (the fastest)
      leaf  shape  sites        form           MFLOP   KiB   reason
      b     2      add          materialized   0.0000  0.03  promoted: add
      w     3×2    dot_general  outer product  0.0000  0.08
      >>> explain(loss_fn, params, jnp.ones((4, 3))).leaves[1].form
      'outer product'
    """
    options = Options(loss_fn, has_aux, method, memory_budget, microbatch_size, trainable, sharding)
    options.check()
    problem = options.problem(params, batch, mask, kwargs)
    placed = row_sharding(problem.batch.examples, sharding)
    if placed is None:
        return _explained(options, problem)
    arrays, problem_of = taken_apart(problem, kwargs, options.problem)
    shapes = jax.tree.map(_shape, arrays)
    rows = jax.tree.map(lambda leaf: _shape(leaf, placed.devices), problem.batch)
    explanations = []
    jax.eval_shape(
        lambda arrays, rows: explanations.append(_explained(options, problem_of(arrays, rows))),
        shapes,
        rows,
    )
    return explanations[0]._replace(devices=placed.devices)


def _shape(leaf: Any, devices: int = 1) -> jax.ShapeDtypeStruct:
    """The shape of an array, or of its rows on one of several devices."""
    if devices == 1:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct((leaf.shape[0] // devices, *leaf.shape[1:]), leaf.dtype)


def _explained(options: Options, problem: Problem) -> Explanation:
    """What is told of a batch on one device."""
    choice = options.choice(problem)
    leaves = choice.method.explained(problem.names, problem.batch)
    return Explanation(choice.name, choice.microbatch_size, choice.reason, tuple(leaves))


def _cells(leaf: LeafExplanation) -> tuple[str, ...]:
    shape = "×".join(map(str, leaf.shape)) or "scalar"
    numbers = (f"{leaf.flops / 1e6:.4f}", f"{leaf.bytes / 1024:.2f}")
    return (leaf.leaf, shape, leaf.sites, leaf.form, *numbers, leaf.reason)
