"""Claim: the char-LSTM trains privately at several times the throughput of Opacus.

    pip install '.[bench]' && python bench/char_lstm.py

One model, one data set, one process, in turns: names of at most 16 characters → embedding of 64 →
LSTM of 128 → two logits, flat clipping, Gaussian noise, SGD with momentum, batches of 512. jaxdp
runs `--model char-lstm` as the command line does; Opacus runs its DPLSTM with its default
per-sample gradients ("hooks"). Beside each stands the same model of the same library without
privacy. Written to `bench/results/char_lstm_<device>.json`: names per second (medians of the
turns) and ratios.
"""

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import timing
from rich import box
from rich.console import Console
from rich.table import Table

import jaxdp
from jaxdp.recipes import classify, data, models
from jaxdp.recipes.data import names

BATCH_SIZE, THRESHOLD, NOISE_MULTIPLIER, LEARNING_RATE, MOMENTUM = 512, 0.1, 1.0, 1.0, 0.9
WIDTH, HIDDEN, CLASSES = 64, 128, 2

Step = Callable[[np.ndarray, np.ndarray], Any]


def jax_steps() -> dict[str, Step]:
    """Steps of jaxdp, and of JAX without privacy."""
    model = models.build("char-lstm", (names.LENGTH,), CLASSES)
    loss_fn = classify.cross_entropy(model)
    sgd = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    private = optax.chain(
        jaxdp.clip_flat(THRESHOLD),
        jaxdp.add_noise(NOISE_MULTIPLIER, jax.random.key(1)),
        optax.scale(1 / BATCH_SIZE),
        sgd,
    )
    per_sample = jaxdp.per_sample_grads(loss_fn)

    def mean_gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: jax.numpy.mean(jax.vmap(loss_fn, (None, 0))(p, batch)))(params)

    def step(grads_fn: Any, tx: Any) -> Step:
        params = model.init(jax.random.key(0))
        state = [params, tx.init(params)]

        @jax.jit
        def update(params: Any, opt_state: Any, batch: Any) -> Any:
            updates, opt_state = tx.update(grads_fn(params, batch), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def run(texts: np.ndarray, labels: np.ndarray) -> None:
            state[:] = jax.block_until_ready(update(*state, (texts, labels)))

        return run

    return {"jaxdp": step(per_sample, private), "JAX, not private": step(mean_gradient, sgd)}


def torch_steps() -> dict[str, Step]:
    """Steps of Opacus, and of torch without privacy."""
    # By name, since type checkers run where these peers are not installed.
    torch, opacus = importlib.import_module("torch"), importlib.import_module("opacus")
    layers = importlib.import_module("opacus.layers")
    optimizers = importlib.import_module("opacus.optimizers")
    nn = torch.nn

    class CharLSTM(nn.Module):
        def __init__(self, lstm: Any):
            super().__init__()
            self.embed = nn.Embedding(names.VOCABULARY, WIDTH, padding_idx=0)
            self.lstm = lstm(WIDTH, HIDDEN, batch_first=True)
            self.head = nn.Linear(HIDDEN, CLASSES)

        def forward(self, texts: Any) -> Any:
            _, (state, _) = self.lstm(self.embed(texts))
            return self.head(state[-1])

    def step(module: Any, optimizer: Any) -> Step:
        def run(texts: np.ndarray, labels: np.ndarray) -> None:
            optimizer.zero_grad()
            logits = module(torch.from_numpy(texts))
            nn.functional.cross_entropy(logits, torch.from_numpy(labels).long()).backward()
            optimizer.step()

        return run

    def sgd(module: Any) -> Any:
        return torch.optim.SGD(module.parameters(), LEARNING_RATE, MOMENTUM)

    private = opacus.GradSampleModule(CharLSTM(layers.DPLSTM))
    private_sgd = optimizers.DPOptimizer(
        sgd(private),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=THRESHOLD,
        expected_batch_size=BATCH_SIZE,
    )
    plain = CharLSTM(nn.LSTM)
    return {"Opacus": step(private, private_sgd), "torch, not private": step(plain, sgd(plain))}


def measure(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Names per second of every turn."""
    dataset = data.load("names")
    texts, labels = dataset.train_x[:BATCH_SIZE], dataset.train_y[:BATCH_SIZE]
    runs = {name: functools.partial(step, texts, labels) for name, step in steps.items()}
    for run in runs.values():  # compiles, warms up
        run()
    seconds = timing.in_turns(runs, rounds, measure=timing.turn)
    return {name: [BATCH_SIZE / each for each in found] for name, found in seconds.items()}


def main() -> None:
    """Measures, prints a table, and writes the figures."""
    parser = argparse.ArgumentParser(description="char-LSTM: jaxdp against Opacus")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON; default: bench/results/char_lstm_<device>")
    options = parser.parse_args()
    speeds = measure(jax_steps() | torch_steps(), options.rounds)
    found = {name: timing.quartiles(values) for name, values in speeds.items()}
    table = Table(title="char-LSTM, batches of 512", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "names per second", "quartiles", "jaxdp in ratio"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    rows = {}
    for name, (low, median, high) in found.items():
        ratio = found["jaxdp"][1] / median
        rows[name] = {"names_per_second": median, "quartiles": (low, high)}
        table.add_row(name, f"{median:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{ratio:.2f}×")
    Console().print(table)
    packages = ("jax", "jaxlib", "jaxdp", "torch", "opacus")
    results = {
        "environment": {
            "device": jax.devices()[0].device_kind,
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "batch_size": BATCH_SIZE,
            "rounds": options.rounds,
        },
        "contestants": rows,
    }
    device = jax.devices()[0].device_kind.lower()
    out = options.out or Path("bench/results") / f"char_lstm_{device}.json"
    out.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(f"wrote {out}")


if __name__ == "__main__":
    main()
