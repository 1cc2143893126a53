"""Attacks on bounds: trust a bound only after an attack has failed to break it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.checks import check_integer
from jaxdp.lipschitz.bounds import input_limits, leaf_bounds, pose_one
from jaxdp.lipschitz.gradients import admitted
from jaxdp.per_sample import per_sample_grads
from jaxdp.problem import LossFn, merged_tree, with_gradient
from jaxdp.tables import aligned
from jaxdp.trees import is_float

_STEP = 0.3
"""The length of a step of the gradient ascent, relative to the norm of the input."""

_UNBOUNDED = 1000.0
"""The largest norm of inputs without a bound."""

TOLERANCE = 1e-5
"""How far a ratio may exceed one, since norms are rounded, too."""


# The largest number of examples of an attack, and of its steps: more take gigabytes, or hours.
_MOST = 100_000


class Attack(NamedTuple):
    """The largest gradient found for one parameter.

    Attributes:
      ratio: the norm of the gradient over the bound; above 1 the bound is false.
      norm: the norm of the gradient.
      bound: Δ, the bound on that norm.
      by: the attack that found the gradient.

    Example:
      >>> loss_fn = lambda params, x: jnp.tanh(params @ x)
      >>> found = falsify(loss_fn, jnp.zeros(3), jnp.zeros(3), 2.0, key=jax.random.key(0))
      >>> attack = found.attacks[""]
      >>> round(attack.norm, 2), round(attack.bound, 2)
      (2.0, 2.0)
    """

    ratio: float
    norm: float
    bound: float
    by: str


class Falsification(NamedTuple):
    """What `lipschitz.falsify` found; printing it gives a table.

    Attributes:
      attacks: the best attack for each leaf, by path.
      reason: why a bound is infinite; "" if none is.

    Example:
      >>> loss_fn = lambda params, x: jnp.tanh(params @ x)
      >>> found = falsify(loss_fn, jnp.zeros(3), jnp.zeros(3), 2.0, key=jax.random.key(0))
      >>> found.survived, list(found.attacks)
      (True, [''])
    """

    attacks: dict[str, Attack]
    reason: str = ""

    @property
    def survived(self) -> bool:
        """Whether every ratio is at most 1 + 1e-5. NaN breaks a bound, and so does infinity."""
        return all(
            attack.ratio <= 1 + TOLERANCE and math.isfinite(attack.bound)
            for attack in self.attacks.values()
        )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("leaf", "largest", "bound", "ratio", "attack")]
        for name, attack in self.attacks.items():
            numbers = (f"{attack.norm:.4g}", f"{attack.bound:.4g}", f"{attack.ratio:.3f}")
            rows.append((name, *numbers, attack.by))
        verdict = "survived" if self.survived else "BROKEN: a bound is false"
        if self.reason:
            verdict = f"BROKEN: a bound is infinite, because {self.reason}"
        return "\n".join([*aligned(rows), verdict])


def falsify(
    loss_fn: LossFn,
    params: Any,
    example: Any,
    input_bound: Any,
    *,
    key: jax.Array,
    classes: int = 2,
    count: int = 64,
    steps: int = 20,
    trainable: Any = True,
    **kwargs: Any,
) -> Falsification:
    """Tries to break the bounds of `lipschitz.bounds` by examples.

    For each leaf k it searches the largest ‖∇_k ℓ(θ, x)‖ / Δ_k over inputs x on the sphere and
    within the ball of radius X. It tries random, sparse and constant inputs, impulses and waves of
    either sign, improves them by gradient ascent on the norm, and combines them with random and
    equal labels. Norms come from `jaxdp.per_sample_grads`, which shares no rule with the bounds.

    An attack that fails proves nothing; one that succeeds refutes the bound. Run it after training,
    too: bounds depend on the weights.

    Args:
      loss_fn, params, example, input_bound, trainable: as for `lipschitz.bounds`. Leaves whose
        bound is infinite are attacked with norms up to 1000.
      key: the JAX key of the random inputs.
      classes: integer leaves of the example get values in 0..classes-1.
      count: number of examples for each kind of attack, at most 100,000.
      steps: number of steps of gradient ascent, at most 100,000.
      **kwargs: further arguments of the loss.

    Returns:
      The `Falsification`. Nothing in it is private: it looks at no data.

    Raises:
      TypeError, ValueError, NotImplementedError: as `lipschitz.bounds`; a count out of range.

    Example:
      >>> loss_fn = lambda params, x: jnp.tanh(params @ x)
      >>> found = falsify(loss_fn, jnp.zeros(3), jnp.zeros(3), 2.0, key=jax.random.key(0))
      >>> print(found.survived, round(found.attacks[""].ratio, 2))
      True 1.0
    """
    advice = "A few dozen are usual."
    classes = check_integer("classes", classes, minimum=1, maximum=2**31 - 1, advice=advice)
    count = check_integer("count", count, minimum=1, maximum=_MOST, advice=advice)
    steps = check_integer("steps", steps, minimum=0, maximum=_MOST, advice=advice)
    limits = input_limits(input_bound, example)
    names = pose_one(loss_fn, params, example, kwargs, trainable).names
    grads_fn = per_sample_grads(loss_fn, trainable=trainable)

    @jax.jit
    def found(params: Any) -> list[jax.Array]:
        return leaf_bounds(pose_one(loss_fn, params, example, kwargs, trainable), limits).arrays

    @jax.jit
    def norms(batch: Any) -> jax.Array:
        """The norms of each leaf with a gradient, `[count, K]`."""
        grads = grads_fn(params, batch, **kwargs)
        ranks = iter(range(len(names)))
        return grads.norms(tuple(None if g is None else next(ranks) for g in grads.groups))

    bounds = dict(zip(names, map(float, found(params)), strict=True))
    ascend = _ascent(norms, limits)
    ratios: dict[str, Attack] = {}
    for kind, batch in _starts(example, limits, classes, count, key).items():
        contenders = {kind: batch}
        if any(map(is_float, jax.tree.leaves(batch))):
            for index, name in enumerate(names):
                contenders[f"{kind}, ascent on {name}"] = ascend(batch, index, steps)
        for by, candidates in contenders.items():
            largest = np.asarray(jnp.max(norms(candidates), axis=0))
            for name, norm in zip(names, largest, strict=True):
                attack = Attack(_ratio(float(norm), bounds[name]), float(norm), bounds[name], by)
                if name not in ratios or _worse(attack, ratios[name]):
                    ratios[name] = attack
    reason = ""
    if not all(map(math.isfinite, bounds.values())):
        problem = pose_one(loss_fn, params, example, kwargs, trainable)
        reason = leaf_bounds(problem, limits).reason()
    return Falsification({name: ratios[name] for name in names}, reason)


def _worse(attack: Attack, best: Attack) -> bool:
    """The larger of two ratios; NaN counts as the largest."""
    return not np.isnan(best.ratio) and not attack.ratio <= best.ratio


def _ratio(norm: float, bound: float) -> float:
    return norm / bound if bound > 0 else (0.0 if norm == 0 else np.inf)


def _starts(
    example: Any, limits: list[float], classes: int, count: int, key: jax.Array
) -> dict[str, Any]:
    """Maps each kind of attack to a batch of examples, on the host."""
    leaves, treedef = jax.tree.flatten(example)
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))

    def leaf_of(leaf: Any, limit: float, directions: Callable[..., np.ndarray]) -> Any:
        shape = (count, *jnp.shape(leaf))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(rng.integers(2**32)), count)
        if is_float(leaf):
            rows = directions(rng, count, math.prod(shape[1:]))
            # Half of them on the sphere, the others within.
            radii = min(limit, _UNBOUNDED) * np.linspace(0, 2, count).clip(0, 1)
            lengths = np.linalg.norm(rows, axis=1).clip(1e-30)
            return jnp.asarray((rows * (radii / lengths)[:, None]).reshape(shape), leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            values = rng.integers(0, classes, (count, math.prod(shape[1:])))
            values[::2] = values[::2, :1]  # the most repeats of a token
            return jnp.asarray(values.reshape(shape), leaf.dtype)
        return jnp.asarray(rng.random(shape) < 0.5)

    return {
        name: treedef.unflatten(
            [leaf_of(*pair, directions) for pair in zip(leaves, limits, strict=True)]
        )
        for name, directions in _DIRECTIONS.items()
    }


def _random(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return rng.normal(size=(count, size))


def _sparse(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return rng.normal(size=(count, size)) * (rng.random((count, size)) < 0.1)


def _constant(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return _signs(rng, count, 1) * np.ones(size)


def _impulse(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return _signs(rng, count, 1) * np.eye(size)[rng.integers(0, size, count)]


def _signs(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return rng.choice([-1.0, 1.0], size=(count, size))


_DIRECTIONS: Mapping[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "random": _random,
    "sparse": _sparse,
    "constant": _constant,
    "impulse": _impulse,
    "signs": _signs,
}


def _ascent(
    norms: Callable[[Any], jax.Array], limits: list[float]
) -> Callable[[Any, int, int], Any]:
    """`(batch, leaf, steps) -> batch`: inputs that make the gradient of that leaf longer."""

    def ascend(batch: Any, index: jax.Array, steps: int) -> Any:
        leaves = jax.tree.leaves(batch)
        groups = tuple(0 if is_float(leaf) else None for leaf in leaves)
        mask = jnp.ones(leaves[0].shape[0], bool)

        def rebuilt(floats: list[jax.Array]) -> Any:
            return merged_tree(batch, groups, floats, lambda leaf: leaf)

        def size(floats: list[jax.Array]) -> jax.Array:
            return jnp.sum(norms(rebuilt(floats))[:, index])

        def step(floats: list[jax.Array], _: Any) -> tuple[list[jax.Array], None]:
            return [
                _moved(*pair) for pair in zip(floats, jax.grad(size)(floats), strict=True)
            ], None

        floats, _ = jax.lax.scan(step, with_gradient(leaves, groups), None, length=steps)
        finite = [min(limit, _UNBOUNDED) for limit in limits]
        return admitted(rebuilt(floats), mask, finite)[0]

    return jax.jit(ascend, static_argnums=2)


def _moved(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """One step along the gradient, on the sphere of x: a fixed share of its norm."""
    rows, slopes = x.reshape(x.shape[0], -1), gradient.reshape(x.shape[0], -1)
    slopes = jnp.where(jnp.isfinite(slopes), slopes, 0)
    size = jnp.linalg.norm(rows, axis=1, keepdims=True)
    slope = jnp.linalg.norm(slopes, axis=1, keepdims=True)
    moved = rows + _STEP * size * slopes / jnp.maximum(slope, 1e-30)
    length = jnp.maximum(jnp.linalg.norm(moved, axis=1, keepdims=True), 1e-30)
    return (moved * size / length).reshape(x.shape)
