"""What processes must have in common: a digest sees whatever decides what a step releases."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import training
from jaxdp.distributed.agreement import program_digest

FEATURES = 2000  # more than a text of an array shows
WEIGHTS = np.linspace(0, 1, FEATURES, dtype=np.float32)


def digest(
    *,
    clip: optax.GradientTransformation | None = None,
    sigma: Any = 1.0,
    rate: Any = 0.1,
    weights: np.ndarray = WEIGHTS,
    allocation: Any = "global",
    momentum: float = 0.9,
) -> str:
    """Of the step of a small job."""

    def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        # One constant in a branch of its own.
        branch = jax.lax.cond(x[0] > 0, lambda: jnp.asarray(weights), lambda: jnp.zeros(FEATURES))
        return jnp.sum(jnp.tanh(params * x) * branch)

    noise = jaxdp.add_noise(sigma, jax.random.key(0), allocation)
    behind = jaxdp.accumulate(optax.chain(noise, optax.sgd(rate, momentum=momentum)))
    tx = optax.chain(jaxdp.clip_flat(1.0) if clip is None else clip, behind)
    step = training.make_step(jaxdp.per_sample_grads(loss_fn), tx)
    batch = np.ones((4, FEATURES), np.float32)
    state = training.init(jnp.zeros(FEATURES), tx)
    return program_digest(step.run, state, batch, np.ones(4, bool), True)


plain = functools.cache(digest)


def one_weight_is_another() -> np.ndarray:
    changed = WEIGHTS.copy()
    changed[FEATURES // 2] += 1
    return changed


DIFFERENCES: dict[str, Callable[[], str]] = {
    "clip": lambda: digest(clip=jaxdp.clip_flat(10.0)),
    "a clip that is nearly the same": lambda: digest(clip=jaxdp.clip_flat(1.0 + 1e-6)),
    "kind of clip": lambda: digest(clip=jaxdp.clip_automatic(1.0)),
    "schedule of the clip": lambda: digest(clip=jaxdp.clip_flat(lambda step: 1.0 + step * 0.5)),
    "noise": lambda: digest(sigma=2.0),
    "schedule of the noise": lambda: digest(sigma=optax.linear_schedule(1.0, 2.0, 10)),
    "learning rate": lambda: digest(rate=0.2),
    "schedule of the learning rate": lambda: digest(
        rate=lambda step: 0.1 * jnp.asarray([1.0, 0.5, 0.2])[step]
    ),
    "momentum": lambda: digest(momentum=0.8),
    "allocation": lambda: digest(allocation=[2.0]),
    "an array in the loss": lambda: digest(weights=one_weight_is_another()),
}


@pytest.mark.parametrize("other", DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_a_difference_in_what_the_chain_closes_over_is_seen(other: Callable[[], str]) -> None:
    with jax.numpy_dtype_promotion("standard"):
        assert other() != plain()


def test_the_same_step_made_twice_is_the_same() -> None:
    assert digest() == digest()


def test_two_numbers_of_one_table_are_told_apart() -> None:
    """Equal programs, of constants that their text does not show."""

    def rate(table: list[float]) -> Callable[[jax.Array], jax.Array]:
        return lambda step: jnp.asarray(table)[step]

    tables = [[0.1] * 2000, [0.1] * 1000 + [0.2] + [0.1] * 999]
    assert digest(rate=rate(tables[0])) == digest(rate=rate(list(tables[0])))
    assert digest(rate=rate(tables[0])) != digest(rate=rate(tables[1]))


@pytest.mark.slow
def test_processes_that_hash_otherwise_agree() -> None:
    """Two processes of one job differ in addresses and in the order of sets."""
    script = (
        "from jax import config; config.update('jax_num_cpu_devices', 1)\n"
        "from tests.distributed.test_agreement import digest; print(digest())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONHASHSEED": seed, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] and len(found[0]) == 65
