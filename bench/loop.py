"""Claim: `training.fit` costs at most 1.05 times a bare loop where a step takes 1 ms.

    python bench/loop.py [--rounds N] [--out PATH]

In one process and in turns, seconds of as many logical steps by `fit` and by a bare Python loop
that does the same work and accounts for nothing: the same draws of the same sampler, the same rows,
the same compiled step with its noise, and one wait at the end. Both begin from a copy of one state.
`fit` charges, holds what it executed against what it charged, and reports twice. The steps are a
dense model with 256 rows, whose width makes a step last about 0.5 and about 1 ms on two CPU cores.
Medians of the rounds' ratios are written to `bench/results/loop_<device>.json`.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from rich.console import Console
from rich.table import Table

import jaxdp
from jaxdp import nn, training

GOAL = 1.05
EXAMPLES, BATCH, CLASSES, FEATURES = 20_000, 256, 10, 64
# Name -> hidden width.
SIZES = {"0.5 ms": 64, "1 ms": 192}
STEPS = 400


def job(width: int) -> tuple[training.Step, training.TrainState, Any, Any]:
    """A step, its first state, a sampler and data."""
    layer = nn.sequential(nn.linear(FEATURES, width), jnp.tanh, nn.linear(width, CLASSES))

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, y = example
        return optax.losses.softmax_cross_entropy_with_integer_labels(layer.apply(params, x), y)

    sampler = jaxdp.PoissonSampler(EXAMPLES, expected_batch_size=BATCH, seed=1)
    noise = jaxdp.add_noise(1.0, jax.random.key(0))
    behind = optax.chain(noise, optax.scale(1 / BATCH), optax.sgd(0.1, momentum=0.9))
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(behind))
    step = training.make_step(jaxdp.per_sample_grads(loss_fn), tx)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    y = generator.integers(0, CLASSES, size=EXAMPLES, dtype=np.int32)
    return step, training.init(layer.init(jax.random.key(1)), tx), sampler, (x, y)


def bare(step: training.Step, state: Any, sampler: Any, data: Any) -> Any:
    """The same steps, and nothing else."""
    for number in range(STEPS):
        for drawn in sampler.draw(number):
            batch = jax.tree.map(lambda leaf, rows=drawn.indices: leaf[rows], data)
            state, _ = step.run(state, batch, drawn.mask, drawn.is_last)
    return jax.block_until_ready(state)


def fitted(
    step: training.Step, state: Any, sampler: Any, data: Any, budget: float | None = None
) -> Any:
    """By `fit`, without a bar."""
    run = training.fit(
        state,
        step,
        sampler,
        data,
        steps=STEPS,
        delta=1e-5,
        accountant="rdp",
        report_every=STEPS // 2,
        progress=False,
        budget=budget,
    )
    return jax.block_until_ready(run.state)


def measure(width: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a step of each, and the median of the rounds' ratios."""
    step, state, sampler, data = job(width)

    def copied() -> Any:
        return jax.tree.map(jnp.copy, state)

    runs = {
        "bare": lambda: bare(step, copied(), sampler, data),
        "fit": lambda: fitted(step, copied(), sampler, data),
        "fit, budget": lambda: fitted(step, copied(), sampler, data, 50.0),
    }
    results = [run() for run in runs.values()]
    for other in results[1:]:  # they did the same work
        jax.tree.map(np.testing.assert_array_equal, results[0].params, other.params)
    seconds = timing.in_turns(runs, rounds)
    ratios = {
        name: [one / base for one, base in zip(found, seconds["bare"], strict=True)]
        for name, found in seconds.items()
    }
    return {
        "milliseconds": {
            name: 1e3 * statistics.median(found) / STEPS for name, found in seconds.items()
        },
        "ratio": {
            name: dict(zip(("low", "median", "high"), timing.quartiles(found), strict=True))
            for name, found in ratios.items()
        },
    }


def main() -> None:
    """Measures both steps, prints a table and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description="what the loop costs")
    parser.add_argument("--rounds", type=int, default=20)
    device = jax.devices()[0].platform
    parser.add_argument("--out", type=Path, default=Path(f"bench/results/loop_{device}.json"))
    options = parser.parse_args()
    results = {name: measure(width, options.rounds) for name, width in SIZES.items()}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title=f"Against a bare loop (goal {GOAL} at 1 ms)", title_justify="left")
    for column in ("step", "contestant", "ms a step", "ratio", "quartiles"):
        table.add_column(column)
    for name, row in results.items():
        for contestant, ratio in row["ratio"].items():
            table.add_row(
                name,
                contestant,
                f"{row['milliseconds'][contestant]:.2f}",
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
