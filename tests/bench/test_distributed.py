"""`bench/operations.py` against XLA's own count, and what `bench/distributed.py` claims, on a small
model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxdp.shares
from jaxdp import nn
from tests.bench.scripts import as_users_run_it, script

operations = script("operations")
distributed = script("distributed")

pytestmark = [pytest.mark.optimized, pytest.mark.anew]


def gradient(layer: nn.Layer) -> Callable[..., Any]:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(lambda x: layer.apply(params, x))(x) ** 2)

    return jax.grad(loss)


LOOPLESS = {
    "dense": (nn.sequential(nn.linear(40, 60), jnp.tanh, nn.linear(60, 5)), (8, 40)),
    "convolutions": (
        nn.sequential(
            nn.conv2d(3, 8, 3, padding=1),
            jnp.tanh,
            nn.conv2d(8, 16, 3, stride=2, padding=1, groups=2),
            nn.flatten(),
        ),
        (4, 8, 8, 3),
    ),
}


@pytest.mark.parametrize("model", list(LOOPLESS))
def test_without_loops_the_count_is_that_of_xla(model: str) -> None:
    layer, shape = LOOPLESS[model]
    params = layer.init(jax.random.key(0))
    compiled = jax.jit(gradient(layer)).lower(params, jnp.ones(shape)).compile()
    known = compiled.cost_analysis()
    assert known is not None
    found = operations.cost(compiled)
    theirs = known["flops"] + known.get("transcendentals", 0.0)
    assert found.operations == pytest.approx(theirs, rel=0.02)
    assert found.bytes == pytest.approx(known["bytes accessed"], rel=0.02)


def test_a_loop_counts_as_often_as_it_runs() -> None:
    def run(x: jax.Array, steps: int) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=steps)[0]

    x = jnp.ones((32, 32))

    def count(steps: int) -> float:
        return operations.cost(jax.jit(run, static_argnums=1).lower(x, steps).compile()).operations

    assert count(30) / count(10) == pytest.approx(3, rel=0.02)
    assert count(10) >= 10 * (2 * 32**3 + 32**2)


@pytest.mark.slow
def test_noise_on_eight_devices_costs_each_an_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with noise takes 1.10 of the operations of the ordinary one; with all of the noise
    drawn by all it would take more."""
    layer = nn.sequential(nn.linear(128, 512), jnp.tanh, nn.linear(512, 10))
    case = distributed.Case(layer, (128,), weak=256, strong=2048)

    def ratios() -> dict[str, float]:
        with as_users_run_it():
            found = distributed.measure(case, 8, case.strong, rounds=0)["operations"]
        return {name: count / found["ordinary"] for name, count in found.items()}

    sizes = [leaf.size for leaf in jax.tree.leaves(layer.init(jax.random.key(0)))]
    drawn = sum(size / (8 if size >= jaxdp.shares.WORTH_SHARING else 1) for size in sizes)
    shared = ratios()
    assert shared["noised"] <= distributed.GOAL
    monkeypatch.setattr(jaxdp.shares, "WORTH_SHARING", 10**9)
    whole = ratios()
    assert whole["clipped"] == pytest.approx(shared["clipped"], rel=1e-6)
    assert whole["noised"] > 1.3
    extra = (shared["noised"] - shared["clipped"]) / (whole["noised"] - whole["clipped"])
    assert extra == pytest.approx(drawn / sum(sizes), rel=0.05)
