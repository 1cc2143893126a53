"""Gradients that are formed in the backward pass: what the program keeps, and in which order."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jaxdp
from jaxdp.engine.methods.formed import formed_uses
from jaxdp.engine.plan import TracedLoss

B, SIZE, CHANNELS, LAYERS = 16, 16, 16, 4


def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def loss(params: Any, x: jax.Array) -> jax.Array:
    h = x[None]
    for kernel, bias in params:
        h = jax.nn.relu(convolved(h, kernel) + jnp.broadcast_to(bias, h.shape))
    return jnp.sum(h**2)


def parameters(layers: int = LAYERS) -> Any:
    rng = np.random.default_rng(0)
    shape = (3, 3, CHANNELS, CHANNELS)
    kernels = rng.normal(size=(layers, *shape)).astype(np.float32) / 12
    return [(jnp.asarray(kernel), jnp.zeros(CHANNELS)) for kernel in kernels]


def images(count: int = B) -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(count, SIZE, SIZE, CHANNELS)), jnp.float32)


def sum_of(grads: Any, params: Any) -> Any:
    clip: Any = jaxdp.clip_flat(0.5)
    return clip.update(grads, clip.init(params))[0].value


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a program, and of the programs within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def formed(loss_fn: Any, params: Any, example: Any) -> set[int]:
    """The leaves whose gradients are formed in the backward pass."""
    leaves, tree = jax.tree.flatten(params)

    def of_leaves(leaves: list[Any], example: Any) -> Any:
        return loss_fn(jax.tree.unflatten(tree, leaves), example), None

    uses = TracedLoss.of(of_leaves, leaves, example).plan.uses
    return {leaf for number in formed_uses(uses, leaves) for leaf in uses[number].sources}


def test_kernels_are_formed_where_they_are_used_once_and_outside_of_loops() -> None:
    params, x = parameters(2), images()[0]
    kernels = {0, 2}
    assert formed(loss, params, x) == kernels

    def twice(params: Any, x: jax.Array) -> jax.Array:
        return loss([*params, (params[0][0], params[1][1])], x)

    assert formed(twice, params, x) == {2}

    def again(params: Any, x: jax.Array) -> jax.Array:
        return loss([(jax.lax.stop_gradient(params[0][0]), params[0][1]), params[1]], x)

    assert formed(again, params, x) == {2}

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

    def scanned(params: Any, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, each: Any) -> tuple[jax.Array, None]:
            return jnp.tanh(convolved(h, each[0]) + jnp.broadcast_to(each[1], h.shape)), None

        return jnp.sum(jax.lax.scan(layer, x[None], params)[0])

    assert formed(scanned, stacked, x) == set()
    assert formed(jax.checkpoint(loss), params, x) == set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_and_sums_are_those_of_rows(dtype: str) -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters(2))
    x = images(3).astype(dtype)

    def clipped(method: str) -> Any:
        grads = jaxdp.per_sample_grads(loss, method=method)(params, x)
        return sum_of(grads, params), grads.norms()

    sums, norms = clipped("slots")
    expected, expected_norms = clipped("dense")
    rtol, atol = (1e-4, 1e-6) if dtype == "float32" else (2e-2, 2e-3)
    np.testing.assert_allclose(norms, expected_norms, rtol=rtol)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), sums, expected)


def test_the_backward_pass_goes_on_when_a_kernel_is_formed() -> None:
    """Or else a compiler is free to keep the cotangents of all layers."""
    params, x = parameters(2), images()

    def private(params: Any, x: Any) -> Any:
        return sum_of(jaxdp.per_sample_grads(loss, method="slots")(params, x), params)

    barriers = [
        {var.aval.size for var in eqn.outvars}
        for eqn in equations(jax.make_jaxpr(private)(params, x).jaxpr)
        if eqn.primitive.name == "optimization_barrier"
    ]
    both = {B * 9 * CHANNELS**2, B * SIZE**2 * CHANNELS}
    assert sum(both == sizes for sizes in barriers) == len(params)
