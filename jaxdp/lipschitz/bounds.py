r"""How large the gradient of one example can be, from the program of its loss.

    print(lipschitz.bounds(loss_fn, params, example, input_bound=1.0))

Bounds are computed from the weights as they are, which are private already: no weight has to obey
a constraint for a bound to be true. Constraints (`lipschitz.project`) keep the bounds small.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine import walker
from jaxdp.lipschitz.propagation import propagate, pull_back
from jaxdp.lipschitz.value import Range, Value
from jaxdp.problem import LossFn, Problem, pose
from jaxdp.tables import aligned
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
        return "\n".join([*aligned(leaves), total, "", *aligned(rows)])


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
    parameters themselves enter as they are, so the bounds hold for these parameters. A `scan` is
    unrolled, since what is known of its state changes from step to step: tracing and compiling
    its bounds takes time in proportion to its length.

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
    algorithm 1; Barczewski and Ramon 2023, "DP-SGD with Weight Clipping", for bounds from the
    weights as they are.
    """
    problem = pose_one(loss_fn, params, example, kwargs, trainable)
    found, layers = leaf_bounds(problem, input_limits(input_bound, example))
    tree = problem.tree(found, lambda leaf: jnp.zeros(()))
    return Bounds(tree, dict(zip(problem.names, found, strict=True)), layers)


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
        Value(
            leaf.shape,
            leaf.dtype,
            range=Range(limit if is_float(leaf) else Range().norm),
            per_sample=True,
        )
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


def is_float(leaf: Any) -> bool:
    """Whether it has a norm."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)

