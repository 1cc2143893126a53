r"""Gradients that are bounded by what the network is, so that nothing is clipped.

    grads_fn = lipschitz.bounded_grads(loss_fn, input_bound=1.0)
    tx = optax.chain(jaxdp.add_noise(1.1, key), optax.scale(1 / 256), optax.adam(1e-3))
    updates, state = tx.update(grads_fn(params, batch, mask), state, params)

Bounds are computed from the weights as they are, which are private already: no weight has to obey
a constraint for a bound to be true. Constraints (`lipschitz.project`) keep the bounds small.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.bounded import Bounded
from jaxdp.engine import walker
from jaxdp.engine.numerics import select_rows, square_sums
from jaxdp.lipschitz.propagation import propagate, pull_back
from jaxdp.lipschitz.value import Range, Value
from jaxdp.problem import LossFn, Problem, check_function, pose
from jaxdp.trees import prefix_leaves

SLACK = 1 + 2.0**-16
"""Factor on every bound: what float32 may round a gradient, and the bound itself, by."""


class LayerBound(NamedTuple):
    """Where a parameter meets the example.

    Attributes:
      name: of the primitive, or of the declared function.
      source: where it stands in the user's code.
      input: bound on the norm of what comes in from the example.
      output: bound on the norm of what comes out.
      cotangent: bound on the norm of the gradient with respect to the output.
    """

    name: str
    source: str
    input: jax.Array
    output: jax.Array
    cotangent: jax.Array


class Bounds(NamedTuple):
    """What `lipschitz.bounds` found; printing it gives two tables.

    Attributes:
      sensitivity: pytree like the parameters: for each leaf Δ, a scalar, the largest norm that
        its gradient of one example can have. Zero for integer and frozen leaves.
      by_name: the same, by path, in the order of the leaves.
      layers: in the order of the program.
    """

    sensitivity: Any
    by_name: dict[str, jax.Array]
    layers: tuple[LayerBound, ...]

    @property
    def total(self) -> jax.Array:
        """Of the whole gradient: sqrt(ΣΔ²)."""
        return jnp.linalg.norm(jnp.stack(list(self.by_name.values())))

    def __str__(self) -> str:
        leaves: list[tuple[str, ...]] = [("leaf", "gradient")]
        leaves += [(name, f"{float(bound):.4g}") for name, bound in self.by_name.items()]
        rows: list[tuple[str, ...]] = [("layer", "input", "output", "cotangent", "source")]
        for layer in self.layers:
            numbers = (layer.input, layer.output, layer.cotangent)
            rows.append((layer.name, *(f"{float(n):.4g}" for n in numbers), layer.source))
        total = f"whole gradient: at most {float(self.total):.4g} for one example"
        return "\n".join([*_table(leaves), total, "", *_table(rows)])


def bounds(
    loss_fn: LossFn,
    params: Any,
    example: Any,
    input_bound: Any,
    *,
    trainable: Any = True,
    **kwargs: Any,
) -> Bounds:
    r"""Bounds on the gradient of one example, whatever the example is.

    $$ \lVert \nabla_{\theta_k} \ell(\theta, x) \rVert_2 \le \Delta_k
       \qquad \text{for all } x \text{ with } \lVert x \rVert_2 \le X $$

    The loss is traced; a bound X on values goes forward through its program and a bound G on
    cotangents backward, one rule for each primitive (`register_bound_rule`). Norms of the
    parameters themselves enter as they are, so the bounds hold for these parameters.

    Args:
      loss_fn: the loss of one example, as for `jaxdp.per_sample_grads`.
      params: its parameters, in float32 at least.
      example: one example (arrays or shapes), without a batch axis.
      input_bound: X ≥ 0 for each floating-point leaf of the example: a pytree prefix of it.
        `math.inf` for a leaf that is bounded in the program. Other leaves, as labels, may be
        anything.
      trainable: as for `per_sample_grads`.

    Returns:
      The `Bounds`. A bound may be infinite: the layers tell where it became so.

    Raises:
      NotImplementedError: a primitive without a rule, with its name and source line.
      TypeError: half precision; `loss_fn` does not return a real scalar.
      ValueError: a bound that is negative or NaN; nothing to differentiate.

    Example:
      >>> loss_fn = lambda params, x: jnp.tanh(params["w"] @ x + params["b"])
      >>> params = {"b": jnp.zeros(()), "w": jnp.array([3.0, 4.0])}
      >>> found = bounds(loss_fn, params, jnp.ones(2), input_bound=2.0)
      >>> [round(float(bound), 3) for bound in found.by_name.values()]
      [1.0, 2.0]

    Source: Béthune et al. 2023, "DP-SGD Without Clipping: The Lipschitz Neural Network Way",
    algorithm 1; Xiao et al. 2023, "A Theory to Instruct Differentially-Private Learning via
    Clipping Bias Reduction", for bounds from public weights.
    """
    problem = pose_one(loss_fn, params, example, kwargs, trainable)
    found, layers = leaf_bounds(problem, input_limits(input_bound, example))
    tree = problem.tree(found, lambda leaf: jnp.zeros(()))
    return Bounds(tree, dict(zip(problem.names, found, strict=True)), layers)


def bounded_grads(
    loss_fn: LossFn,
    input_bound: Any,
    *,
    with_losses: bool = False,
    trainable: Any = True,
) -> Callable[..., Any]:
    r"""Turns the loss of ONE example into a function that gives bounded gradients of a batch.

    $$ \sum_i \nabla_\theta\, \ell(\theta, x_i), \qquad \Delta_k \text{ as in } \texttt{bounds} $$

    computed by one ordinary gradient of the batch: nothing is clipped, no gradient of a single
    example exists. Every floating-point leaf of an example that is longer than its bound is
    scaled down to it first; an example that is not finite counts for nothing.

    Args:
      loss_fn: as for `jaxdp.per_sample_grads`.
      input_bound: as for `bounds`.
      with_losses: whether the losses are returned, too.
      trainable: as for `per_sample_grads`.

    Returns:
      `grads_fn(params, batch, mask=None, **kwargs) -> Bounded`, with one group for each leaf; with
      losses `(Bounded, losses [B])`. Losses are not private; they are zero in masked rows and NaN
      for examples that are not finite.

    Raises:
      (when called) what `bounds` raises, and what `per_sample_grads` raises of batch and mask.

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

    def grads_fn(params: Any, batch: Any, mask: jax.Array | None = None, **kwargs: Any) -> Any:
        problem = pose(loss_fn, params, batch, mask, kwargs, has_aux=False, trainable=trainable)
        limits = input_limits(input_bound, batch)
        sensitivity, _ = leaf_bounds(problem, limits)
        mask = problem.batch.mask
        examples, counted = admitted(problem.batch.examples, mask, limits)

        def total(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            losses, _ = jax.vmap(problem.loss, (None, 0))(leaves, examples)
            losses = jnp.where(counted, losses, jnp.zeros_like(losses))
            return jnp.sum(losses), losses

        grads, losses = jax.grad(total, has_aux=True)(problem.leaves)
        groups = iter(range(len(grads)))
        bounded = Bounded(
            problem.tree(grads, jnp.zeros_like),
            jnp.stack(sensitivity),
            [None if group is None else next(groups) for group in problem.groups],
        )
        return (bounded, jnp.where(mask & ~counted, jnp.nan, losses)) if with_losses else bounded

    return grads_fn


def admitted(examples: Any, mask: jax.Array, limits: list[float]) -> tuple[Any, jax.Array]:
    """Examples as the bounds assume them: each floating-point leaf finite and no longer than its
    limit, zero where there is no sample; and which rows count, bool `[B]`."""
    leaves, treedef = jax.tree.flatten(examples)
    floats = [_is_float(leaf) for leaf in leaves]
    finite = [
        jnp.all(jnp.isfinite(leaf.reshape(leaf.shape[0], -1)), axis=1)
        for leaf, is_float in zip(leaves, floats, strict=True)
        if is_float
    ]
    counted = functools.reduce(jnp.logical_and, finite, mask)

    def fitted(leaf: jax.Array, limit: float) -> jax.Array:
        leaf = select_rows(counted, leaf)
        norms = jnp.sqrt(square_sums(leaf.reshape(leaf.shape[0], -1)))
        factors = jnp.where(norms > limit, limit / norms, jnp.ones_like(norms))
        return leaf * factors.reshape(-1, *(1,) * (leaf.ndim - 1)).astype(leaf.dtype)

    kept = [
        fitted(leaf, limit) if is_float else leaf
        for leaf, limit, is_float in zip(leaves, limits, floats, strict=True)
    ]
    return jax.tree.unflatten(treedef, kept), counted


def pose_one(
    loss_fn: LossFn, params: Any, example: Any, kwargs: dict[str, Any], trainable: Any
) -> Problem:
    """The problem of one example, of which only shapes matter."""
    batch = jax.tree.map(lambda leaf: jnp.zeros((1, *jnp.shape(leaf)), leaf.dtype), example)
    return pose(loss_fn, params, batch, None, kwargs, has_aux=False, trainable=trainable)


def leaf_bounds(
    problem: Problem, limits: list[float]
) -> tuple[list[jax.Array], tuple[LayerBound, ...]]:
    """Δ of each leaf that has a gradient, and the layers."""
    for name, leaf in zip(problem.names, problem.leaves, strict=True):
        if jnp.finfo(leaf.dtype).bits < 32:
            raise TypeError(
                f"parameters must be float32 at least to have bounded gradients, but {name} is "
                f"{leaf.dtype}: keep it in float32, or clip (jaxdp.clip_flat)"
            )
    example = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), problem.batch.examples
    )
    program, _ = walker.trace(lambda *args: problem.loss(*args)[0], problem.leaves, example)
    parameters = [Value.known(leaf, moves=True) for leaf in problem.leaves]
    inputs = [
        Value(leaf.shape, leaf.dtype, range=Range(limit if _is_float(leaf) else Range().norm))
        for leaf, limit in zip(jax.tree.leaves(example), limits, strict=True)
    ]
    outputs, tape = propagate(program, [*parameters, *inputs])
    cotangents = pull_back(tape, outputs, [jnp.float32(1)])
    found = [cotangents[parameter] for parameter in parameters]
    layers = [
        LayerBound(step.name, step.source, *_seen(step, cotangents))
        for step in tape
        if _meets_example(step)
    ]
    nothing = jnp.zeros((), jnp.float32)
    return [nothing if bound is None else SLACK * bound for bound in found], tuple(layers)


def _meets_example(step: Any) -> bool:
    return any(value.array is None for value in step.operands) and any(
        value.array is not None and value.moves for value in step.operands
    )


def _seen(step: Any, cotangents: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    incoming = [value.norm for value in step.operands if value.array is None]
    bound = cotangents[step.outputs[0]]
    return incoming[0], step.outputs[0].norm, jnp.zeros(()) if bound is None else bound


def input_limits(input_bound: Any, examples: Any) -> list[float]:
    """The bound of each leaf, from a prefix of them."""
    limits = prefix_leaves("input_bound", input_bound, examples)
    for limit in limits:
        if not limit >= 0:
            raise ValueError(f"input_bound must hold norms of at least 0, got {limit}")
    return limits


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
