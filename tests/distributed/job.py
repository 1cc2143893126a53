"""A small training job, run on one device by a test and on many by the processes it starts.

python -m tests.distributed.job '{"coordinator": "localhost:1234", "processes": 2, ...}'
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding

import jaxdp
from jaxdp import nn, training

COUNT, FEATURES, CLASSES, EVERY = 300, 12, 3, 2
# Three of four draws overflow the physical batch, whose blocks are ragged and often empty.
SAMPLER = jaxdp.PoissonSampler(COUNT, expected_batch_size=10, physical_batch_size=8, seed=5)
MODEL = nn.sequential(nn.linear(FEATURES, 8), jnp.tanh, nn.linear(8, CLASSES))


class Setting(NamedTuple):
    """What one process is told.

    Attributes:
      coordinator: address of process 0.
      processes, process: how many there are, and which one this is.
      devices: of each process.
      steps: of the run.
      out: where the result is written, as JSON.
      checkpoints: directory, or None.
      dies_at: the step before whose report this process is killed; 0 for never.
      seed: of the sampler; None for one of its own.
      clip, sigma, rate: of the chain.
      nudge: what is added to the parameters after the first step, behind the back of all.
    """

    coordinator: str
    processes: int
    process: int
    devices: int
    steps: int
    out: str
    checkpoints: str | None = None
    dies_at: int = 0
    seed: int | None = 5
    clip: float = 0.5
    sigma: float = 0.8
    rate: float = 0.01
    nudge: float = 0.0


def examples(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels, made from the index alone: a process needs no data that is not its."""
    rows = [np.random.default_rng(int(index)) for index in indices]
    features = np.stack([rng.normal(size=FEATURES) for rng in rows]).astype(np.float32)
    return features, np.asarray(indices % CLASSES)


def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Cross-entropy of one example."""
    features, label = example
    logits = MODEL.apply(params, features)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)


def train(
    *,
    sampler: jaxdp.PoissonSampler = SAMPLER,
    sharding: NamedSharding | None = None,
    data: Any = examples,
    parts: int = 1,
    steps: int = 6,
    checkpoints: str | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    clip: optax.GradientTransformation = jaxdp.clip_per_layer(0.5),  # noqa: B008 - immutable
    sigma: float = 0.8,
    rate: float = 0.01,
    nudge: float = 0.0,
    progress: bool = False,
    log_fn: Any = None,
) -> training.Run:
    """The job."""
    behind = optax.chain(
        jaxdp.add_noise(sigma, jax.random.key(3)), optax.scale(0.1), optax.adam(rate)
    )
    tx = optax.chain(clip, jaxdp.accumulate(behind))
    step = training.make_step(jaxdp.per_sample_grads(loss_fn), tx)
    return training.fit(
        training.init(MODEL.init(jax.random.key(0)), tx),
        step._replace(run=nudged(step.run, nudge)) if nudge else step,
        sampler,
        data,
        steps=steps,
        delta=1e-5,
        report_every=EVERY,
        checkpoints=None if checkpoints is None else training.Checkpoints(checkpoints),
        evaluate=evaluate,
        progress=progress,
        log_fn=log_fn,
        sharding=sharding,
        data_parts=parts,
    )


def nudged(run: Callable[..., Any], by: float) -> Callable[..., Any]:
    """A step on a machine that computes otherwise: the traced program is that of all others."""

    def other(state: training.TrainState, *arguments: Any) -> Any:
        state, metrics = run(state, *arguments)
        if not isinstance(state.step, Tracer):
            state = state._replace(params=jax.tree.map(lambda leaf: leaf + by, state.params))
        return state, metrics

    return other


def flat(params: Any) -> list[float]:
    """All parameters in one list."""
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(params)]).tolist()


def main(setting: Setting) -> None:
    """One process of many."""
    jax.config.update("jax_num_cpu_devices", setting.devices)
    jax.distributed.initialize(
        setting.coordinator,
        setting.processes,
        setting.process,
        heartbeat_timeout_seconds=10,
    )
    sampler = SAMPLER
    if setting.seed != SAMPLER.seed:
        sampler = jaxdp.PoissonSampler(COUNT, expected_batch_size=10, physical_batch_size=8)
    own, seen = sampler.part(setting.process, setting.processes), []

    def data(indices: np.ndarray) -> Any:
        assert set(indices.tolist()) <= set(own), "rows of another process"
        return examples(indices)

    def evaluate(params: Any) -> dict[str, float]:
        seen.append(flat(params))
        if len(seen) * EVERY == setting.dies_at:
            os._exit(1)
        return {}

    logged: list[Any] = []
    run = train(
        sampler=sampler,
        sharding=jaxdp.distributed.data_parallel(),
        data=data,
        parts=setting.processes,
        steps=setting.steps,
        checkpoints=setting.checkpoints,
        evaluate=evaluate,
        clip=jaxdp.clip_per_layer(setting.clip),
        sigma=setting.sigma,
        rate=setting.rate,
        nudge=setting.nudge,
        log_fn=logged.append,
        progress=True,
    )
    replicas = {np.asarray(shard.data).tobytes() for shard in _replicas(run.state.params)}
    found = {
        "params": flat(run.state.params),
        "replicas": len(replicas),
        "ledger": run.ledger.to_json(),
        "reports": len(logged),
        "seed": jaxdp.distributed.shared_seed(),
        "key": np.asarray(jax.random.key_data(jaxdp.random_key())).tolist(),
    }
    Path(setting.out).write_text(json.dumps(found))


def _replicas(params: Any) -> list[Any]:
    return jax.tree.leaves(params)[0].addressable_shards


if __name__ == "__main__":
    main(Setting(**json.loads(sys.argv[1])))
