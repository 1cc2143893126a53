"""A use that the analysis had missed costs a gradient, never a clip."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdp.engine.methods.taps import Taps, tapped_uses
from jaxdp.engine.plan import Plan, TracedLoss, one_example
from jaxdp.engine.reduction import Batch
from jaxdp.engine.weighting import GivenWeights

RNG = np.random.default_rng(0)
SHAPES = {
    "table": (5, 4),
    "kernel": (3, 4, 4),
    "stack": (2, 4, 4),
    "joined_a": (4, 2),
    "joined_b": (4, 3),
    "halves": (4, 8),
}
LEAVES = [jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in SHAPES.values()]
IDS = jnp.asarray(RNG.integers(0, 5, size=(4, 6)), jnp.int32)
BATCH = Batch(IDS, jnp.ones(4, bool), jnp.ones(4))


@jax.custom_vjp
def clipped_backward(x: jax.Array) -> jax.Array:
    return x


clipped_backward.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),))


def loss(leaves: list[jax.Array], ids: jax.Array) -> tuple[jax.Array, None]:
    table, kernel, stack, joined_a, joined_b, halves = leaves
    x = jnp.tanh(table[ids])
    x = lax.conv_general_dilated(
        x[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]
    x = clipped_backward(jnp.sin(x))

    @jax.checkpoint
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    x, _ = lax.scan(layer, x, stack)
    left, right = jnp.split(halves, 2, axis=1)
    x = jnp.sin(x @ left) + jnp.cos(x @ right)
    return jnp.sum(jnp.sin(x @ jnp.concatenate([joined_a, joined_b], axis=1))), None


@functools.cache
def plan() -> Plan:
    return TracedLoss.of(loss, LEAVES, one_example(IDS)).plan


def sums(uses: dict[int, Any]) -> list[np.ndarray]:
    """Σ_i g_i of every leaf by taps, as far as these uses see it."""
    taps = Taps(plan()._replace(uses=uses), LEAVES)
    weighting = GivenWeights((0,) * len(LEAVES))
    return [np.asarray(leaf) for leaf in jax.jit(lambda: taps.reduce(BATCH, weighting).sums)()]


@functools.cache
def whole() -> list[np.ndarray]:
    return sums(plan().uses)


def test_all_uses_give_the_gradient() -> None:
    def total(leaves: list[jax.Array]) -> jax.Array:
        return jnp.sum(jax.vmap(lambda ids: loss(leaves, ids)[0])(IDS))

    for got, want in zip(whole(), jax.jit(jax.grad(total))(LEAVES), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    # All of them by taps, or the test below would say little.
    assert tapped_uses(plan().uses, LEAVES, one_weight=True) == plan().uses


SLOW = ("kernel", "joined_b", "halves")


@pytest.mark.parametrize(
    "missed", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SHAPES]
)
def test_a_missed_use_has_no_gradient(missed: str) -> None:
    """All uses of one leaf: what the second pass gives for it is nothing at all."""
    index = list(SHAPES).index(missed)
    left = {number: use for number, use in plan().uses.items() if index not in use.sources}
    lost = frozenset().union(*(use.sources for use in plan().uses.values() if index in use.sources))
    found = sums(left)
    for leaf, (got, want) in enumerate(zip(found, whole(), strict=True)):
        np.testing.assert_allclose(got, 0 if leaf in lost else want, rtol=1e-4, atol=1e-5)


def test_without_uses_nothing_is_released() -> None:
    assert all(not np.any(leaf) for leaf in sums({}))
