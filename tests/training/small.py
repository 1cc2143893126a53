"""A training job so small that a test may run it many times; its steps are compiled once."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxdp
from jaxdp import training
from jaxdp.sampling import Sampler

COUNT, FEATURES, DELTA = 24, 3, 1e-5
DATA = np.random.default_rng(0).normal(size=(COUNT, FEATURES)).astype(np.float32)
INITIAL = (0.0, 0.0, 0.0)

Chain = optax.GradientTransformation


def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
    return (params @ x - 1.0) ** 2


@functools.cache
def chain(
    key: int = 0, *, sigma: float = 2.0, clip: float = 1.0, rate: float = 0.1, adaptive: int = -1
) -> Chain:
    """Noise from a key, and of an adaptive clip from another one where that is not negative."""
    bound = jaxdp.clip_flat(clip)
    if adaptive >= 0:
        bound = jaxdp.clip_adaptive(
            clip,
            key=jax.random.key(adaptive),
            count_noise_multiplier=4.0,
            expected_batch_size=6.0,
        )
    noise = jaxdp.add_noise(sigma, jax.random.key(key))
    return optax.chain(bound, jaxdp.accumulate(optax.chain(noise, optax.sgd(rate, momentum=0.5))))


@functools.cache
def step_of(tx: Chain) -> training.Step:
    return training.make_step(jaxdp.per_sample_grads(loss_fn), tx)


def foreseen(step: training.Step) -> training.Step:
    """A step that runs something else, and is believed to release what the chain's program says: so
    nothing of it is read before a report."""
    assert step.ahead is not None
    return step._replace(ahead=dataclasses.replace(step.ahead, run=step.run))


def start(tx: Chain, params: tuple[float, ...] = INITIAL) -> training.TrainState:
    return training.init(jnp.asarray(params), tx)


def poisson(seed: int = 1, **options: Any) -> jaxdp.PoissonSampler:
    # Physical batches so small that most draws need several.
    return jaxdp.PoissonSampler(
        COUNT, **({"sampling_rate": 0.25, "physical_batch_size": 4, "seed": seed} | options)
    )


def shuffled(seed: int = 1, batch_size: int = 6) -> jaxdp.ShuffledSampler:
    """Four steps an epoch."""
    return jaxdp.ShuffledSampler(COUNT, batch_size=batch_size, physical_batch_size=6, seed=seed)


def fit(
    tx: Chain | None = None,
    sampler: Sampler | None = None,
    *,
    state: training.TrainState | None = None,
    step: training.Step | None = None,
    data: Any = DATA,
    steps: int = 4,
    report_every: int = 2,
    **options: Any,
) -> training.Run:
    """`training.fit` with defaults; from the start unless a state is given."""
    tx = chain() if tx is None else tx
    return training.fit(
        start(tx) if state is None else state,
        step_of(tx) if step is None else step,
        poisson() if sampler is None else sampler,
        data,
        steps=steps,
        report_every=report_every,
        **({"delta": DELTA, "progress": False, "accountant": "rdp"} | options),
    )


def going_on(directory: Path, **options: Any) -> training.Run:
    """A script that is started: the same state, the same sampler, what is in the directory."""
    store = training.Checkpoints(directory)
    try:
        return fit(checkpoints=store, **options)
    finally:
        store.close()


def forbidden(*arguments: Any) -> Any:
    raise AssertionError("nothing may be executed")


def assert_same(got: training.Run, want: training.Run) -> None:
    """Equal bit for bit but for time: state, noise keys, ledger and history."""
    assert got.ledger == want.ledger and got.stopped_by == want.stopped_by

    def plain(leaf: jax.Array) -> np.ndarray:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    for one, two in zip(jax.tree.leaves(got.state), jax.tree.leaves(want.state), strict=True):
        np.testing.assert_array_equal(plain(one), plain(two))
    assert timeless(got.history) == timeless(want.history)


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "samples_per_second"} for row in history]
