"""Sums that another program or another pass computes: what one sample adds, and what it changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from jaxdp.engine.methods import taps

CLIP: Any = jaxdp.clip_flat(1.0)


def clipped(loss: Any, params: Any, method: str) -> Any:
    def sum_of(batch: Any, mask: Any) -> Any:
        grads = jaxdp.per_sample_grads(loss, method=method)(params, batch, mask)
        return CLIP.update(grads, CLIP.init(params), params)[0].value

    return jax.jit(sum_of)


def largest_change(loss: Any, params: Any, batch: Any, method: str = "auto") -> float:
    """By how much the sum changes with one sample, of some."""
    count = jax.tree.leaves(batch)[0].shape[0]
    run, mask = clipped(loss, params, method), np.ones(count, bool)
    whole = run(batch, mask)

    def change(index: int) -> float:
        without = mask.copy()
        without[index] = False
        return float(jnp.linalg.norm(whole - run(batch, without)))

    return max(change(index) for index in range(0, count, -(-count // 12)))


@pytest.mark.optimized
@pytest.mark.parametrize("method", ["auto", "taps"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_cotangent_rounded_in_another_way_is_not_released(method: str, count: int) -> None:
    """a·b − c·d is zero in one pass, and what rounding leaves of a·b in the other."""

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def block(w: jax.Array, x: jax.Array) -> jax.Array:
            y = x @ w
            return jnp.sum(x[:, :1] * (x[:, 1:2] * y) - x[:, 2:3] * (x[:, 3:4] * y))

        return block(w, x)

    rng = np.random.default_rng(0)
    x = 1e3 * rng.uniform(0.5, 1, (4, 16, 8)).astype(np.float32)
    x[..., :2] = 1e4 * rng.uniform(0.5, 2, (4, 16, 2))
    x[..., 2] = 1
    x[..., 3] = x[..., 0] * x[..., 1]
    released = clipped(loss, jnp.zeros((8, 32)), method)(x, np.arange(4) < count)
    assert float(jnp.linalg.norm(released)) <= count * (1 + 1e-6)


def test_what_the_second_pass_finds_larger_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever made it so."""

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x))

    true, calls = taps._certified_norms, []  # pyright: ignore[reportPrivateUsage]

    def larger_every_second_time(*args: Any) -> list[jax.Array]:
        calls.append(args)
        return [norms * (2 - len(calls) % 2) for norms in true(*args)]

    x, mask = np.ones((3, 4, 2), np.float32), np.ones(3, bool)
    assert float(jnp.linalg.norm(clipped(loss, jnp.ones((2, 2)), "taps")(x, mask))) > 0.9
    monkeypatch.setattr(taps, "_certified_norms", larger_every_second_time)
    assert not np.any(clipped(loss, jnp.ones((2, 2)), "taps")(x, mask))


@pytest.mark.optimized
@pytest.mark.parametrize("method", ["taps", "slots"])
def test_positions_that_cancel_change_no_other_sample(method: str) -> None:
    def loss(kernel: jax.Array, example: Any) -> jax.Array:
        x, scale = example

        @jax.checkpoint
        def convolved(kernel: jax.Array, x: jax.Array) -> jax.Array:
            layout = ("NWC", "WIO", "NWC")
            return jax.lax.conv_general_dilated(
                x[None], kernel, (2,), "VALID", dimension_numbers=layout
            )[0]

        return jnp.sum(scale * convolved(kernel, x))

    rng = np.random.default_rng(0)
    x, a = 1e7 * rng.uniform(0.5, 1, (256, 2, 8)), rng.uniform(0.5, 1, (256, 1, 1))
    scales = np.concatenate([np.ones((256, 1, 8)), np.broadcast_to(-1 / a, (256, 1, 8))], 1)
    batch = jax.tree.map(np.float32, (np.concatenate([x, x * a], 1), scales))
    assert largest_change(loss, jnp.zeros((2, 8, 8)), batch, method) < 1.01


@pytest.mark.optimized
def test_sums_of_a_tied_table_that_cancel_change_no_other_sample() -> None:
    """A look-up and a product, of which the gradients cancel."""

    def loss(table: jax.Array, example: Any) -> jax.Array:
        i, w, u, v = example
        return jnp.sum(w * table[i]) + jnp.sum(u * (v @ table.T))

    count = 16384
    v = 1e4 * np.random.default_rng(0).uniform(0.5, 1, (count, 1, 1)).astype(np.float32)
    batch = (np.zeros((count, 1), np.int32), v, -np.ones((count, 1, 1), np.float32), v)
    assert largest_change(loss, jnp.zeros((1, 1)), batch) < 0.2


@pytest.mark.optimized
def test_convolutions_of_many_samples_are_summed_in_blocks() -> None:
    def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
        layout = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=layout)
        return jnp.sum(y**2)

    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 16, 16)), jnp.float32)
    x = rng.normal(size=(1100, 2, 16)).astype(np.float32)
    run = clipped(loss, kernel, "slots")
    parts = [run(x[k : k + 100], np.ones(100, bool)) for k in range(0, 1100, 100)]
    whole = run(x, np.ones(1100, bool))
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-4, atol=1e-4)
