"""Bounds on the gradient of one example, from the program of its loss.

    print(lipschitz.bounds(loss_fn, params, example, input_bound=1.0))

Bounds are computed from the current weights, which are private already: no weight has to obey a
constraint for a bound to be true. Constraints (`lipschitz.project`) keep the bounds small.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.checks import check_real
from jaxdp.engine import effects, walker
from jaxdp.engine.rounding import roundings
from jaxdp.lipschitz.propagation import Cotangents, Step, Tape, culprit, propagate, pull_back
from jaxdp.lipschitz.rounding import root_of_squares, up
from jaxdp.lipschitz.value import UNKNOWN, Cotangent, Range, Value, known_infinite
from jaxdp.problem import LossFn, Problem, pose
from jaxdp.tables import aligned
from jaxdp.trees import is_float, path_name, prefix_leaves

LONGEST = 2.0**64
"""The norm of an example without a bound: the root of the largest number of float32, since an
example whose squared norm is larger counts for nothing."""

SHORTEST = 1e-12
"""The least bound on an input other than zero: squares of shorter inputs vanish."""


class LayerBound(NamedTuple):
    """The bounds at an equation in which a parameter meets the example.

    Attributes:
      name: the name of the primitive or of the declared function.
      source: its place in the user's code.
      input: bound on the norm of the operand that depends on the example.
      output: bound on the norm of the result.
      cotangent: bound on the norm of the gradient with respect to the result.

    Example:
      >>> loss_fn = lambda params, x: params @ x
      >>> [layer] = bounds(loss_fn, jnp.array([3.0, 4.0]), jnp.ones(2), 2.0).layers
      >>> print(layer.name, layer.input.round(3), layer.output.round(3), layer.cotangent)
      dot_general 2.0 10.0 1.0
    """

    name: str
    source: str
    input: jax.Array
    output: jax.Array
    cotangent: jax.Array


class Bounds(NamedTuple):
    """The result of `lipschitz.bounds`; printing gives three tables.

    Attributes:
      sensitivity: pytree like the parameters: for each leaf Δ, a scalar, the largest norm that
        its gradient of one example can have. Zero for integer and frozen leaves.
      by_name: the same bounds, by path, in the order of the leaves.
      layers: the equations in which parameters meet the example, in the order of the program.
      inputs: the norm that each floating-point leaf of the example is held to, by path.
      reason: why a bound is infinite, with its place in the code; "" if none is, or inside of
        `jax.jit`.

    Example:
      >>> found = bounds(lambda params, x: params @ x, jnp.ones(2), jnp.ones(2), 2.0)
      >>> print(found.total.round(3), found.inputs)
      2.0 {'': 2.0}
    """

    sensitivity: Any
    by_name: dict[str, jax.Array]
    layers: tuple[LayerBound, ...]
    inputs: dict[str, float]
    reason: str

    @property
    def total(self) -> jax.Array:
        """The bound on the whole gradient: sqrt(ΣΔ²)."""
        return root_of_squares(jnp.stack(list(self.by_name.values())))

    def __str__(self) -> str:
        leaves: list[tuple[str, ...]] = [("leaf", "gradient")]
        leaves += [(name, f"{float(bound):.4g}") for name, bound in self.by_name.items()]
        rows: list[tuple[str, ...]] = [("layer", "input", "output", "cotangent", "source")]
        for layer in self.layers:
            numbers = (layer.input, layer.output, layer.cotangent)
            rows.append((layer.name, *(f"{float(n):.4g}" for n in numbers), layer.source))
        total = [f"whole gradient: at most {float(self.total):.4g} for one example"]
        if self.reason:
            total.append(f"infinite, because {self.reason}")
        inputs: list[tuple[str, ...]] = [("input", "held to")]
        inputs += [(name or "example", f"{limit:.4g}") for name, limit in self.inputs.items()]
        return "\n".join([*aligned(leaves), *total, "", *aligned(rows), "", *aligned(inputs)])


def bounds(
    loss_fn: LossFn,
    params: Any,
    example: Any,
    input_bound: Any,
    *,
    trainable: Any = True,
    **kwargs: Any,
) -> Bounds:
    r"""Bounds on the gradient of one example that hold for every example.

    $$ \lVert \nabla_{\theta_k} \ell(\theta, x) \rVert_2 \le \Delta_k
       \qquad \text{for all } x \text{ with } \lVert x \rVert_2 \le X $$

    The loss is traced. Bounds on values are propagated forward through its program, and bounds on
    cotangents backward, by one rule for each primitive (`register_bound_rule`). Norms of the given
    parameters enter, so the bounds hold for these parameters. A `scan` is unrolled, since the
    bounds on its state change from step to step: tracing and compiling them takes time in
    proportion to the length of the scan.

    Args:
      loss_fn: the loss of one example, as for `jaxdp.per_sample_grads`.
      params: its parameters, in float32 at least.
      example: one example (arrays or shapes), without a batch axis.
      input_bound: X for each floating-point leaf of the example, zero or at least 1e-12: a pytree
        prefix of it, in which one number stands for one floating-point leaf. `math.inf` for a leaf
        that is not scaled, because the program bounds it or it is a target; its norm is at most
        2⁶⁴, as in `bounded_grads`. Integer and bool leaves, such as labels, may have any value.
      trainable: as for `per_sample_grads`.
      **kwargs: further arguments of the loss.

    Returns:
      The `Bounds`. A bound may be infinite; its `reason` says where it became so.

    Raises:
      NotImplementedError: a primitive without a rule, with its name and source line.
      TypeError: half precision; `loss_fn` does not return a real scalar; a bound that is no number.
      ValueError: a bound that is negative, too small or NaN, or one number for several
        floating-point leaves; nothing to differentiate.

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
    limits = input_limits(input_bound, example)
    found = leaf_bounds(problem, limits)
    return Bounds(
        problem.tree(found.arrays, lambda leaf: jnp.zeros(())),
        dict(zip(problem.names, found.arrays, strict=True)),
        found.layers,
        {name: limits[index] for index, name in float_leaves(example).items()},
        found.reason(),
    )


def pose_one(
    loss_fn: LossFn, params: Any, example: Any, kwargs: dict[str, Any], trainable: Any
) -> Problem:
    """The problem of one example, of which only shapes and dtypes are used."""
    batch = jax.tree.map(lambda leaf: jnp.zeros((1, *jnp.shape(leaf)), leaf.dtype), example)
    return pose(loss_fn, params, batch, None, kwargs, has_aux=False, trainable=trainable)


class LeafBounds(NamedTuple):
    """Bounds on the leaves that have a gradient.

    Attributes:
      bounds: Δ for each leaf, a float where it is infinite for all parameters.
      layers: see `Bounds`.
      tape, cotangents: the steps and the bounds on cotangents that Δ comes from.
    """

    bounds: Sequence[Cotangent]
    layers: tuple[LayerBound, ...]
    tape: Tape
    cotangents: Cotangents

    @property
    def arrays(self) -> list[jax.Array]:
        """The bounds as arrays."""
        return [jnp.asarray(bound, jnp.float32) for bound in self.bounds]

    def reason(self) -> str:
        """See `Bounds`."""
        if not any(known_infinite(bound) for bound in self.bounds):
            return ""
        return culprit(self.tape, self.cotangents) or "of a branch or a derivative of its own"


def leaf_bounds(problem: Problem, limits: list[float]) -> LeafBounds:
    """Δ for each leaf that has a gradient.

    Raises:
      TypeError: parameters in half precision.
      ValueError: the loss does anything but compute on one example.
    """
    for name, leaf in zip(problem.names, problem.leaves, strict=True):
        if jnp.finfo(leaf.dtype).bits < 32:
            raise TypeError(
                f"parameters must be float32 at least to have bounded gradients, but {name} is "
                f"{leaf.dtype}. Keep it in float32, or clip (jaxdp.clip_flat)."
            )
    example = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), problem.batch.examples
    )
    program, _ = walker.trace(lambda *args: problem.loss(*args)[0], problem.leaves, example)
    # The bound is on the gradient of an example that sees no other example.
    effects.check(program, problem.loss, problem.leaves, problem.batch)
    parameters = [Value.known(leaf, moves=True) for leaf in problem.leaves]
    inputs = [
        Value(leaf.shape, leaf.dtype, range=_input_range(leaf, limit), per_sample=True)
        for leaf, limit in zip(jax.tree.leaves(example), limits, strict=True)
    ]
    outputs, tape = propagate(program, [*parameters, *inputs])
    cotangents = pull_back(tape, outputs, [jnp.float32(1)])
    layers = [
        LayerBound(step.name, step.source, *_seen(step, cotangents))
        for step in tape
        if _meets_example(step)
    ]
    found = [cotangents[parameter] for parameter in parameters]
    nothing = jnp.zeros((), jnp.float32)
    bounds = [nothing if bound is None else bound for bound in found]
    return LeafBounds(bounds, tuple(layers), tape, cotangents)


def _input_range(leaf: Any, limit: float) -> Range:
    """The range of a leaf of an example that `bounded_grads` has scaled down."""
    if not is_float(leaf):
        return UNKNOWN  # any value of its dtype
    # Squares, their sum, the root, the quotient and the product are rounded.
    return Range(up(min(limit, LONGEST), roundings(math.prod(leaf.shape)) // 2 + 8))


def _meets_example(step: Step) -> bool:
    return any(value.array is None for value in step.operands) and any(
        value.array is not None and value.moves for value in step.operands
    )


def _seen(step: Step, cotangents: Cotangents) -> tuple[jax.Array, jax.Array, jax.Array]:
    incoming = [value.norm for value in step.operands if value.array is None]
    bound = cotangents[step.outputs[0]]
    return incoming[0], step.outputs[0].norm, jnp.zeros(()) if bound is None else jnp.asarray(bound)


def input_limits(input_bound: Any, example: Any) -> list[float]:
    """The input bound of each leaf, from a pytree prefix; infinite for leaves without a norm.

    Args:
      input_bound: as for `bounds`.
      example: one example or a batch: structure and dtypes matter.
    """
    names = float_leaves(example)
    which = prefix_leaves("input_bound", _numbered(input_bound), example, "the example")
    for number in dict.fromkeys(which):
        held = [name for index, name in names.items() if which[index] is number]
        if len(held) > 1:
            raise ValueError(
                "input_bound must say a norm for each floating-point leaf of the example, got one "
                f"number for {len(held)} of them ({', '.join(held)}). Pass a structure like the "
                "example, with math.inf for what is not to be scaled, as targets."
            )
    return [
        _limit(number.value) if index in names else math.inf for index, number in enumerate(which)
    ]


class _Number:
    """One entry of `input_bound`, compared by identity."""

    def __init__(self, value: Any):
        self.value = value


def _numbered(input_bound: Any) -> Any:
    return jax.tree.map(_Number, input_bound)


def _limit(value: Any) -> float:
    advice = "Pass the L2 norm that each example is held to, or math.inf for none."
    infinite = isinstance(value, float) and value == math.inf
    limit = math.inf if infinite else check_real("input_bound", value, minimum=0, advice=advice)
    if not (limit == 0 or limit >= SHORTEST):
        raise ValueError(
            f"input_bound must hold norms that are 0 or at least {SHORTEST:g}, got {limit}. "
            + advice
        )
    return limit


def float_leaves(example: Any) -> dict[int, str]:
    """Maps the index of each leaf of an example that has a norm to its path."""
    leaves = jax.tree.leaves_with_path(example)
    return {index: path_name(path) for index, (path, leaf) in enumerate(leaves) if is_float(leaf)}
