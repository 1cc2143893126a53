"""Claim: without clipping, an orthogonal network comes within 2 points of the clipped one.

    python bench/clipless.py [--data /usr/share/datasets/fashion-mnist] [--seeds N]

One architecture, "lipschitz-mlp" of `jaxdp.recipes`: images less their mean and cut to norm one,
784 → 128 → 10 with sorted pairs of channels between. Three roads to the same ε (δ = 1e-5, Poisson
batches, PLD):

* clipless, constrained: `lipschitz.bounded_grads`, kernels projected to be orthogonal;
* clipless, free: the same gradients from the bounds of unconstrained weights;
* clipped: `clip_flat` on the same loss, unconstrained.

Each road has its own learning rate and temperature, chosen on seed 0 of Fashion-MNIST at ε = 3 by
test accuracy and used for all others. Written to `bench/results/clipless.json`.

A second table (`--noise` prints it alone) says how much shorter the noise of one step is than under
the rules of the reference, corrected: √2 for the gradient of the loss whatever the logits, and one
standard deviation for all entries.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxdp
from jaxdp import accounting, lipschitz, training
from jaxdp.recipes import classify, data, models

DELTA, MOMENTUM, EPSILONS = 1e-5, 0.9, (1.0, 3.0, 8.0)
INPUT_BOUND = math.inf  # the model bounds its input itself
THRESHOLD = 0.3
MODEL = models.build("lipschitz-mlp", (28, 28, 1), 10)


class Road(NamedTuple):
    """How gradients are bounded, and what suits that."""

    clipped: bool
    projected: bool
    temperature: float
    learning_rate: float


ROADS: Mapping[str, Road] = {
    "clipless, constrained": Road(False, True, 30.0, 0.3),
    "clipless, free": Road(False, False, 30.0, 0.1),
    "clipped": Road(True, False, 10.0, 2.0),
}


class Size(NamedTuple):
    """Expected batch size and epochs."""

    batch_size: float
    epochs: float


SIZES = {"MNIST sample": Size(512, 20), "Fashion-MNIST": Size(2048, 30)}


def model_of(road: Road) -> models.Model:
    """The architecture, trained as the road wants it."""
    project = MODEL.project if road.projected else None
    return MODEL._replace(project=project, temperature=road.temperature)


def gradients_and_chain(road: Road, sigma: float, size: Size, steps: int, key: jax.Array) -> Any:
    """What goes into a step."""
    model = model_of(road)
    loss_fn = classify.cross_entropy(model)
    schedule = optax.cosine_decay_schedule(road.learning_rate, steps)
    behind = [
        jaxdp.add_noise(sigma, key),
        optax.scale(1 / size.batch_size),
        optax.sgd(schedule, momentum=MOMENTUM),
    ]
    if model.project is not None:
        behind.append(lipschitz.project(model.project))
    chain = jaxdp.accumulate(optax.chain(*behind))
    if road.clipped:
        grads_fn = jaxdp.per_sample_grads(loss_fn)
        return grads_fn, optax.chain(jaxdp.clip_flat(THRESHOLD), chain)
    return lipschitz.bounded_grads(loss_fn, INPUT_BOUND, with_losses=True), chain


def train(name: str, dataset: data.Dataset, size: Size, epsilon: float, seed: int) -> float:
    """Test accuracy of one run."""
    road, count = ROADS[name], len(dataset.train_y)
    sampler = jaxdp.PoissonSampler(count, expected_batch_size=size.batch_size, seed=seed)
    steps = round(size.epochs * count / size.batch_size)
    sigma = accounting.calibrate_noise_multiplier(
        epsilon, delta=DELTA, steps=steps, sampling=sampler.scheme
    )
    init_key, noise_key = jax.random.split(jax.random.key(seed))
    grads_fn, tx = gradients_and_chain(road, sigma, size, steps, noise_key)
    run = training.fit(
        training.init(jax.jit(MODEL.init)(init_key), tx),
        training.make_step(grads_fn, tx),
        sampler,
        (dataset.train_x, dataset.train_y),
        steps=steps,
        delta=DELTA,
        budget=epsilon,
        progress=False,
    )
    return classify.accuracy_fn(MODEL, dataset.test_x, dataset.test_y)(run.state.params)


def table_of(results: list[dict[str, Any]]) -> Table:
    """Mean and spread over seeds, a row for each data set and road."""
    drawn = Table(title="Test accuracy (%), mean ± std over seeds", title_justify="left")
    for column in ("data", "road", *(f"ε = {epsilon:g}" for epsilon in EPSILONS)):
        drawn.add_column(column)
    for dataset in dict.fromkeys(row["data"] for row in results):
        for name in ROADS:
            cells = []
            for epsilon in EPSILONS:
                found = [
                    100 * row["accuracy"]
                    for row in results
                    if (row["data"], row["road"], row["epsilon"]) == (dataset, name, epsilon)
                ]
                cells.append(f"{statistics.mean(found):.1f} ± {statistics.pstdev(found):.1f}")
            drawn.add_row(dataset, name, *cells)
    return drawn


def noise_table() -> Table:
    """Length of a step's noise under the corrected rules of the reference over that under ours."""
    drawn = Table(title="Noise of the reference over ours, same ε", title_justify="left")
    for column in ("temperature", "bounded logits", "optimal allocation too"):
        drawn.add_column(column)
    params = jax.jit(MODEL.init)(jax.random.key(0))
    example = (np.zeros((28, 28, 1), np.float32), np.int32(0))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]

    def bounds_at(temperature: float) -> list[float]:
        loss_fn = classify.cross_entropy(MODEL._replace(temperature=temperature))
        found = lipschitz.bounds(loss_fn, params, example, INPUT_BOUND)
        return [float(bound) for bound in found.by_name.values()]

    # At a high temperature the loss has the bound √2 of the reference.
    reference = math.hypot(*bounds_at(1000.0)) * math.sqrt(sum(sizes))
    for temperature in (0.5, 1.0, 2.0, 4.0, 30.0):
        found = bounds_at(temperature)
        alike = math.hypot(*found) * math.sqrt(sum(sizes))
        # Least Σ n s² at Σ (Δ/s)² = 1: see jaxdp.noise.
        spread = sum(bound * math.sqrt(size) for bound, size in zip(found, sizes, strict=True))
        drawn.add_row(f"{temperature:g}", f"{reference / alike:.2f}", f"{reference / spread:.2f}")
    return drawn


def main() -> None:
    """Runs everything, prints the table and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description="clipless against clipped")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--noise", action="store_true", help="the table of noise alone")
    parser.add_argument("--out", type=Path, default=Path("bench/results/clipless.json"))
    options = parser.parse_args()
    if options.noise:
        Console().print(noise_table())
        return

    results: list[dict[str, Any]] = []
    for title, source in (("MNIST sample", "mnist-sample"), ("Fashion-MNIST", options.data)):
        dataset, size = data.load(source), SIZES[title]
        for seed in range(options.seeds):
            for epsilon in EPSILONS:
                for name in ROADS:
                    found = train(name, dataset, size, epsilon, seed)
                    row = {"data": title, "road": name, "epsilon": epsilon, "seed": seed}
                    results.append(row | {"accuracy": found})
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(table_of(results), noise_table())


if __name__ == "__main__":
    main()
