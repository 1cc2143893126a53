"""What several test files need: clips, parameter trees, models, and norms in float64."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict

import jaxdp
from jaxdp.bounded import Bounded, Groups

Transformation = optax.GradientTransformationExtraArgs

KEY = jax.random.key(0)

# The tree that every clip of the table below fits. Leaves in order: body.b, body.w, head.
PARAMS = {
    "body": {"b": jnp.array([0.1, -0.2]), "w": jnp.array([[0.3, -0.4], [0.5, 0.6], [-0.7, 0.8]])},
    "head": jnp.array([1.0, -1.0]),
}
THRESHOLDS = (1.0, 0.5, 2.0)

# Name -> clip with thresholds c[0], c[1], c[2], which may be traced.
CLIPS: Mapping[str, Callable[[Any], Transformation]] = {
    "flat": lambda c: jaxdp.clip_flat(c[0]),
    "flat_schedule": lambda c: jaxdp.clip_flat(lambda step: c[0] / (1.0 + jnp.float32(step))),
    "per_layer": lambda c: jaxdp.clip_per_layer(c[0]),
    "per_layer_tree": lambda c: jaxdp.clip_per_layer(
        {"body": {"b": c[0], "w": c[1]}, "head": c[2]}
    ),
    "per_layer_prefix": lambda c: jaxdp.clip_per_layer({"body": c[0], "head": c[1]}),
    "per_layer_list": lambda c: jaxdp.clip_per_layer([c[0], c[1], c[2]]),
    "by_group": lambda c: jaxdp.clip_by_group(
        {"body": "slow", "head": "fast"}, {"fast": c[0], "slow": c[1]}
    ),
    "by_group_function": lambda c: jaxdp.clip_by_group(
        lambda params: jax.tree.map(lambda leaf: leaf.ndim, params), {1: c[0], 2: lambda _: c[1]}
    ),
    "automatic": lambda c: jaxdp.clip_automatic(c[0], stability=0.1),
    "automatic_per_layer": lambda c: jaxdp.clip_automatic(c[0], stability=0.1, per_layer=True),
    "adaptive": lambda c: adaptive(c[0]),
    "adaptive_per_layer": lambda c: adaptive(c[0], per_layer=True),
}

# Those that fit any tree; between them one group and many, with state and without.
ANY_TREE = ("flat", "adaptive_per_layer")


def strict_json(text: str) -> Any:
    """JSON as its standard has it: no NaN, no Infinity, no name twice."""

    def forbidden(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)

    return json.loads(text, parse_constant=forbidden, object_pairs_hook=once)


def adaptive(threshold: Any, **options: Any) -> Transformation:
    """A `clip_adaptive` with a little noise, unless `options` say otherwise."""
    defaults = {
        "key": jax.random.key(7),
        "count_noise_multiplier": 0.5,
        "expected_batch_size": 4.0,
    }
    return jaxdp.clip_adaptive(threshold, **(defaults | options))


def private(clip: Transformation, sigma: float = 1.0, **options: Any) -> Transformation:
    """clip → noise → sgd."""
    return optax.chain(clip, jaxdp.add_noise(sigma, KEY, **options), optax.sgd(0.1))


class Pair(NamedTuple):
    left: Any
    right: Any


# Every kind of parameters a user may bring.
TREES: Mapping[str, Any] = {
    "nested": {"a": [jnp.ones(2), (jnp.ones((2, 3)), {"z": jnp.ones(1)})]},
    "single_array": jnp.ones((2, 3)),
    "namedtuple": Pair(jnp.ones(2), [jnp.ones(3)]),
    "none_leaf": {"a": jnp.ones(2), "nothing": None, "b": (None, jnp.ones(3))},
    "integer_leaf": {"a": jnp.ones(2), "count": jnp.arange(3), "flag": jnp.array(True)},
    "scalar_leaf": {"a": jnp.ones(2), "scale": jnp.ones(())},
    "empty_leaf": {"a": jnp.ones(2), "z": jnp.zeros((0, 3))},
    "frozen_dict": FrozenDict({"a": jnp.ones(2), "b": FrozenDict({"c": jnp.ones(3)})}),
}


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def tree_loss(params: Any, example: jax.Array) -> jax.Array:
    """A loss for any tree: with t the sum of the floats, x·t + t²/2; its gradient is x + t."""
    leaves = jax.tree.leaves(params)
    total = sum(jnp.sum(jnp.float32(leaf)) for leaf in leaves if is_float(leaf))
    return example * total + 0.5 * total * total


def small_loss(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    """A two-layer network on `PARAMS`."""
    x, y = example
    hidden = jnp.tanh(x @ params["body"]["w"] + params["body"]["b"])
    return 0.5 * jnp.square(hidden @ params["head"] - y)


def small_batch(count: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        jnp.asarray(3 * rng.normal(size=count), jnp.float32),
    )


_small_grads = jax.jit(lambda batch: jax.vmap(jax.grad(small_loss), (None, 0))(PARAMS, batch))


def small_grads(count: int, seed: int = 0) -> Any:
    """Per-sample gradients of `small_loss`, as `vmap(grad)` gives them."""
    return _small_grads(small_batch(count, seed))


def structure(tree: Any) -> list[tuple[Any, Any, bool]]:
    """Shape, dtype and weak type of every leaf: what a compiled function depends on."""
    leaves = jax.tree.leaves(tree)
    return [(jnp.shape(leaf), leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves]


def plain(leaf: Any) -> np.ndarray:
    """NumPy, keys included; floats as float64."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def assert_trees_close(got: Any, expected: Any, *, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(plain(a), plain(b), rtol=rtol, atol=atol)


def assert_trees_equal(got: Any, expected: Any) -> None:
    assert_trees_close(got, expected, rtol=0, atol=0)


def any_equal(a: Any, b: Any) -> bool:
    """Whether two trees share a number: independent noise shares none."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(bool(np.any(np.asarray(x) == np.asarray(y))) for x, y in pairs)


def group_norms64(leaves: list[np.ndarray], groups: Groups, count: int) -> np.ndarray:
    """L2 norm `[K]` of each group of leaves, in float64; of leaves outside any group the maximum
    absolute value is added as a last entry, which must be zero."""
    squared, outside = np.zeros(count), 0.0
    for leaf, group in zip(leaves, groups, strict=True):
        leaf = np.asarray(leaf, np.float64)
        if group is None:
            outside = max(outside, float(np.max(np.abs(leaf), initial=0)))
        else:
            squared[group] += np.sum(leaf**2)
    return np.append(np.sqrt(squared), outside)


def difference64(a: Bounded, b: Bounded) -> list[np.ndarray]:
    pairs = zip(jax.tree.leaves(a.value), jax.tree.leaves(b.value), strict=True)
    return [np.asarray(x, np.float64) - np.asarray(y, np.float64) for x, y in pairs]

