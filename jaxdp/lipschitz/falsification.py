"""Attacks on bounds: a bound counts only when an attack has failed to break it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.lipschitz.bounds import admitted, bounds, input_limits
from jaxdp.per_sample import per_sample_grads
from jaxdp.problem import LossFn

_STEP = 0.3
"""Of the gradient ascent, relative to the norm of the input."""

TOLERANCE = 1e-5


class Attack(NamedTuple):
    """The largest gradient found for one parameter.

    Attributes:
      ratio: its norm over the bound; above 1 the bound is false.
      norm: its norm.
      bound: Δ.
      by: which attack found it.
    """

    ratio: float
    norm: float
    bound: float
    by: str


class Falsification(NamedTuple):
    """What `lipschitz.falsify` found; printing it gives a table.

    Attributes:
      attacks: the best one for each leaf, by path.
    """

    attacks: dict[str, Attack]

    @property
    def survived(self) -> bool:
        """Whether no bound was broken, to 1e-5. NaN breaks a bound, and so does infinity."""
        return all(
            attack.ratio <= 1 + TOLERANCE and np.isfinite(attack.bound)
            for attack in self.attacks.values()
        )

    def __str__(self) -> str:
        rows = [("leaf", "largest", "bound", "ratio", "attack")]
        for name, attack in self.attacks.items():
            numbers = (f"{attack.norm:.4g}", f"{attack.bound:.4g}", f"{attack.ratio:.3f}")
            rows.append((name, *numbers, attack.by))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, "survived" if self.survived else "BROKEN: a bound is false"])


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
    r"""Tries to break the bounds of `lipschitz.bounds` by examples.

    For each leaf, the largest $\lVert \nabla_{\theta_k} \ell(\theta, x) \rVert_2 / \Delta_k$
    over inputs x on the sphere and within the ball of radius X: random ones, sparse ones, constant
    ones, impulses, waves of either sign, and what gradient ascent on the norm makes of them; with
    random and equal labels. Norms come from `jaxdp.per_sample_grads`, which shares no rule with
    the bounds.

    A bound that survives is not proved by it; one that does not is refuted. Run it after training,
    too: bounds depend on the weights.

    Args:
      loss_fn, params, example, input_bound, trainable: as for `lipschitz.bounds`. Leaves whose
        bound is infinite are attacked with norms up to 1000.
      key: of the attacks.
      classes: integer leaves of the example get values in 0..classes-1.
      count: of examples for each kind of attack.
      steps: of gradient ascent.

    Returns:
      The `Falsification`. Nothing in it is private: it looks at no data.

    Raises:
      What `lipschitz.bounds` raises.

    Example:
      >>> loss_fn = lambda params, x: jnp.tanh(params @ x)
      >>> found = falsify(loss_fn, jnp.zeros(3), jnp.zeros(3), 2.0, key=jax.random.key(0))
      >>> print(found.survived, round(found.attacks[""].ratio, 2))
      True 1.0
    """
    found = bounds(loss_fn, params, example, input_bound, trainable=trainable, **kwargs)
    limits = input_limits(input_bound, example)
    grads_fn = per_sample_grads(loss_fn, trainable=trainable)
    names = list(found.by_name)

    @jax.jit
    def norms(batch: Any) -> jax.Array:
        """Of each leaf with a gradient, `[count, K]`."""
        grads = grads_fn(params, batch, **kwargs)
        ranks = iter(range(len(names)))
        return grads.norms(tuple(None if g is None else next(ranks) for g in grads.groups))

    ascend = _ascent(norms, limits)
    ratios: dict[str, Attack] = {}
    for kind, batch in _starts(example, limits, classes, count, key).items():
        contenders = {kind: batch}
        if any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(batch)):
            for index, name in enumerate(names):
                contenders[f"{kind}, ascent on {name}"] = ascend(batch, index, steps)
        for by, candidates in contenders.items():
            largest = np.asarray(jnp.max(norms(candidates), axis=0))
            for name, norm in zip(names, largest, strict=True):
                bound = float(found.by_name[name])
                ratio = _ratio(float(norm), bound)
                if name not in ratios or not ratio <= ratios[name].ratio:
                    ratios[name] = Attack(ratio, float(norm), bound, by)
    return Falsification({name: ratios[name] for name in names})


def _ratio(norm: float, bound: float) -> float:
    return norm / bound if bound > 0 else (0.0 if norm == 0 else np.inf)


def _starts(
    example: Any, limits: list[float], classes: int, count: int, key: jax.Array
) -> dict[str, Any]:
    """Kind of attack -> batch of examples."""
    leaves, treedef = jax.tree.flatten(example)

    def batch(kind: int, shape_of: Callable[..., jax.Array]) -> Any:
        filled = []
        for index, (leaf, limit) in enumerate(zip(leaves, limits, strict=True)):
            own = jax.random.fold_in(jax.random.fold_in(key, kind), index)
            shape = (count, *jnp.shape(leaf))
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                filled.append(jax.random.split(own, count))
            elif jnp.issubdtype(leaf.dtype, jnp.floating):
                rows = shape_of(own, shape).reshape(count, -1)
                radius = limit if np.isfinite(limit) else 1000.0
                # Half of them on the sphere, the others within.
                radii = radius * jnp.linspace(0, 2, count).clip(0, 1)[:, None]
                sizes = jnp.linalg.norm(rows, axis=1, keepdims=True)
                rows = radii * rows / jnp.maximum(sizes, 1e-30)
                filled.append(rows.reshape(shape).astype(leaf.dtype))
            elif jnp.issubdtype(leaf.dtype, jnp.integer):
                values = jax.random.randint(own, shape, 0, classes, leaf.dtype)
                # The last ones equal within the example: the most repeats of a token.
                first = values.reshape(count, -1)[:, :1].reshape(count, *(1,) * (values.ndim - 1))
                equal = jnp.arange(count).reshape(first.shape) % 2 == 0
                filled.append(jnp.where(equal, first, values))
            else:
                filled.append(jax.random.bernoulli(own, 0.5, shape))
        return jax.tree.unflatten(treedef, filled)

    def sparse(own: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        kept, values = jax.random.split(own)
        return jnp.where(jax.random.bernoulli(kept, 0.1, shape), jax.random.normal(values, shape), 0)

    def constant(own: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.ones(shape) * signs(own, (shape[0], *(1,) * (len(shape) - 1)))

    def impulse(own: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        size = int(np.prod(shape[1:]))
        place = jax.random.randint(own, (shape[0],), 0, size)
        sign = signs(own, (shape[0], *(1,) * (len(shape) - 1)))
        return jax.nn.one_hot(place, size).reshape(shape) * sign

    def signs(own: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.rademacher(own, shape, jnp.float32)

    kinds = {
        "random": jax.random.normal,
        "sparse": sparse,
        "constant": constant,
        "impulse": impulse,
        "signs": signs,
    }
    return {name: batch(kind, make) for kind, (name, make) in enumerate(kinds.items())}


def _ascent(
    norms: Callable[[Any], jax.Array], limits: list[float]
) -> Callable[[Any, int, int], Any]:
    """`(batch, leaf, steps) -> batch`: inputs that make the gradient of that leaf longer."""

    def ascend(batch: Any, index: jax.Array, steps: int) -> Any:
        leaves, treedef = jax.tree.flatten(batch)
        moving = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        mask = jnp.ones(leaves[0].shape[0], bool)

        def rebuilt(floats: list[jax.Array]) -> Any:
            rest = iter(floats)
            filled = [
                next(rest) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)
            ]
            return jax.tree.unflatten(treedef, filled)

        def size(floats: list[jax.Array]) -> jax.Array:
            return jnp.sum(norms(rebuilt(floats))[:, index])

        def step(floats: list[jax.Array], _: Any) -> tuple[list[jax.Array], None]:
            return [
                _moved(*pair) for pair in zip(floats, jax.grad(size)(floats), strict=True)
            ], None

        floats = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        floats, _ = jax.lax.scan(step, floats, None, length=steps)
        finite = [jnp.minimum(limit, 1000.0) for limit in limits]
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
