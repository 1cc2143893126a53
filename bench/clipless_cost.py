"""Claim: a step without clipping costs at most 1.02 times the ordinary one, at any batch size.

    python bench/clipless_cost.py [--rounds N]

In one process and in turns, medians of compiled steps' times, and their temporary memory, as ratios
to the gradient of the summed loss on the same batch. Bounds and projections depend on the weights
alone, so that their cost does not grow with the batch: they are shown apart, in milliseconds.
"Prepared" is for data whose bound was enforced before, once; "clipless" enforces it at every step.
Written to `bench/results/clipless_cost_<device>.json`.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import timing
from rich.console import Console
from rich.table import Table

import jaxdp
from jaxdp import lipschitz, nn

GOAL = 1.02
INPUT_BOUND = (1.0, math.inf)
RATIOS = ("ordinary", "prepared", "clipless", "clipped")


class Case(NamedTuple):
    """A model, the shape of an image, and batch sizes."""

    model: Callable[[], nn.Layer]
    shape: tuple[int, ...]
    batch_sizes: tuple[int, ...]


def mlp() -> nn.Layer:
    """That of `bench/clipless.py`, behind its preparation of images."""
    return nn.sequential(
        nn.flatten(), lipschitz.linear(784, 128), lipschitz.group_sort(), lipschitz.linear(128, 10)
    )


def cnn() -> nn.Layer:
    """Two convolutions and two dense layers."""
    return nn.sequential(
        lipschitz.conv2d(1, 16, 5, stride=2, padding=2),
        lipschitz.group_sort(),
        lipschitz.conv2d(16, 32, 3, stride=2, padding=1),
        lipschitz.group_sort(),
        nn.flatten(),
        lipschitz.linear(1568, 64),
        lipschitz.group_sort(),
        lipschitz.linear(64, 10),
    )


CASES: Mapping[str, Case] = {
    "mlp": Case(mlp, (28, 28, 1), (256, 4096)),
    "cnn": Case(cnn, (28, 28, 1), (256, 2048)),
}


def temporary_bytes(compiled: Any) -> int:
    """What a step needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def measure(case: Case, batch_size: int, rounds: int) -> dict[str, float]:
    """Medians over rounds."""
    model = case.model()
    params = jax.jit(model.init)(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (batch_size, *case.shape))
    images = images / jnp.linalg.norm(images.reshape(batch_size, -1), axis=1).reshape(-1, 1, 1, 1)
    batch = (images, jnp.arange(batch_size) % 10)

    def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = model.apply(params, example[0])
        return lipschitz.softmax_cross_entropy(logits, example[1], temperature=30.0)

    def ordinary(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(jax.vmap(loss_fn, (None, 0))(p, batch)))(params)

    bounded = lipschitz.bounded_grads(loss_fn, INPUT_BOUND)
    trusting = lipschitz.bounded_grads(loss_fn, INPUT_BOUND, enforce_input_bound=False)
    example = jax.tree.map(lambda leaf: leaf[0], batch)
    clip: Any = jaxdp.clip_flat(0.3)
    per_sample = jaxdp.per_sample_grads(loss_fn)
    steps: dict[str, Callable[..., Any]] = {
        "ordinary": ordinary,
        # The value alone: what the bounds cost is measured below.
        "clipless": lambda params, batch: bounded(params, batch).value,
        "prepared": lambda params, batch: trusting(params, batch).value,
        "clipped": lambda params, batch: (
            clip.update(per_sample(params, batch), clip.init(params))[0].value
        ),
        "bounds": lambda params, batch: (
            lipschitz.bounds(loss_fn, params, example, INPUT_BOUND).total
        ),
        "projection": lambda params, batch: model.project(params),
    }
    compiled = {name: jax.jit(step).lower(params, batch).compile() for name, step in steps.items()}
    runs = {name: timing.waiting(step, params, batch) for name, step in compiled.items()}
    for run in runs.values():
        run()
    medians = timing.medians(timing.in_turns(runs, rounds))
    memory = {name: temporary_bytes(compiled[name]) for name in RATIOS}
    return {
        "batch_size": batch_size,
        "ordinary_ms": medians["ordinary"],
        **{f"{name}_time": medians[name] / medians["ordinary"] for name in RATIOS[1:]},
        **{f"{name}_memory": memory[name] / memory["ordinary"] for name in RATIOS[1:]},
        "bounds_ms": medians["bounds"],
        "projection_ms": medians["projection"],
    }


def main() -> None:
    """Measures every case, prints a table and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description="what a step without clipping costs")
    parser.add_argument("--rounds", type=int, default=40)
    device = jax.devices()[0].platform
    default = Path(f"bench/results/clipless_cost_{device}.json")
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    results = [
        {"model": name, **measure(case, size, options.rounds)}
        for name, case in CASES.items()
        for size in case.batch_sizes
    ]
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title=f"Ratios to the ordinary gradient (goal {GOAL})", title_justify="left")
    for column in results[0]:
        table.add_column(column.replace("_", " "))
    for row in results:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
