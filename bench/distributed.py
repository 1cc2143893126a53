"""Claim: across devices a private step costs what it costs on one, and exchanges what an ordinary
one does.

    python bench/distributed.py [--rounds N]

On eight virtual devices of this machine's CPU: per-layer clipping under `jit` with the batch spread
over 1, 2 and 8 of them, as a ratio to the ordinary all-reduced gradient of the same batch on the
same devices. "Weak" keeps the rows of each device, "strong" those of the batch. "Noise" adds what
`add_noise` draws, each device its share, which is gathered.

First counts, in operations of one device (`bench/operations.py`). Then times, in one process and in
turns, medians: virtual devices share the cores of this machine, so that a number drawn by each of
them takes eight times what it takes a device of its own. `--rounds 0` counts alone. What devices
exchange is read off the compiled program, in numbers per step. Written to
`bench/results/distributed_<device>.json`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

DEVICES = (1, 2, 8)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={max(DEVICES)}"
).strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import operations  # noqa: E402
import optax  # noqa: E402
import timing  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import jaxdp  # noqa: E402
from jaxdp import nn  # noqa: E402

GOAL = 1.10
CLASSES = 10


class Case(NamedTuple):
    """A model, the shape of an example, and rows: of each device (weak), of all (strong)."""

    layer: nn.Layer
    shape: tuple[int, ...]
    weak: int
    strong: int


def sequence_model() -> nn.Layer:
    """Its last state as logits of an LSTM."""
    lstm, head = nn.lstm(32, 64), nn.linear(64, CLASSES)

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key)
        return {"lstm": lstm.init(keys[0]), "head": head.init(keys[1])}

    def apply(params: Any, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        _, (state, _) = lstm.apply(params["lstm"], x)
        return head.apply(params["head"], state[0])

    return nn.Layer(init=init, apply=apply)


def cases() -> dict[str, Case]:
    """Dense, convolutional and recurrent."""
    dense = nn.sequential(
        nn.linear(784, 512), jnp.tanh, nn.linear(512, 512), jnp.tanh, nn.linear(512, CLASSES)
    )
    conv = nn.sequential(
        nn.conv2d(3, 32, 3, padding=1),
        jnp.tanh,
        nn.conv2d(32, 32, 3, stride=2, padding=1),
        jnp.tanh,
        nn.flatten(),
        nn.linear(2048, CLASSES),
    )
    return {
        "MLP 784-512-512-10": Case(dense, (784,), 128, 512),
        "two convolutions on 16×16": Case(conv, (16, 16, 3), 16, 64),
        "LSTM 32/64, T 32": Case(sequence_model(), (32, 32), 32, 128),
    }


def steps_of(case: Case, sharding: NamedSharding) -> dict[str, Any]:
    """The ordinary gradient, the clipped one, and that with noise: functions of the same."""

    def loss_fn(params: Any, example: Any) -> jax.Array:
        logits = case.layer.apply(params, example[0])
        return optax.losses.softmax_cross_entropy(logits, example[1])

    clip = jaxdp.clip_per_layer(1.0)
    noise = jaxdp.add_noise(1.0, jax.random.key(0), sharding=sharding)
    grads_fn = jaxdp.per_sample_grads(loss_fn, sharding=sharding)

    def ordinary(params: Any, batch: Any) -> Any:
        return jax.grad(lambda params: jnp.sum(jax.vmap(loss_fn, (None, 0))(params, batch)))(params)

    def clipped(params: Any, batch: Any) -> Any:
        return clip.update(grads_fn(params, batch), clip.init(params))[0]  # pyright: ignore[reportArgumentType]

    def noised(params: Any, batch: Any) -> Any:
        return noise.update(clipped(params, batch), noise.init(params), params)[0]  # pyright: ignore[reportArgumentType]

    found = {"ordinary": ordinary, "clipped": clipped, "noised": noised}
    return {name: jax.jit(step) for name, step in found.items()}


def measure(case: Case, devices: int, rows: int, rounds: int) -> dict[str, Any]:
    """Operations and bytes of a device, what is exchanged, and milliseconds: medians in turns."""
    # Axes are automatic: with explicit ones JAX cannot differentiate every ordinary model.
    some = jax.devices()[:devices]
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=some)
    sharding = NamedSharding(mesh, P("data"))
    params = jax.device_put(case.layer.init(jax.random.key(0)), NamedSharding(sharding.mesh, P()))
    x = jax.random.normal(jax.random.key(1), (rows, *case.shape))
    y = jax.nn.one_hot(jnp.arange(rows) % CLASSES, CLASSES)
    batch = jax.device_put((x, y), sharding)
    compiled = {
        name: step.lower(params, batch).compile() for name, step in steps_of(case, sharding).items()
    }
    costs = {name: operations.cost(step) for name, step in compiled.items()}
    times: dict[str, float] = {}
    if rounds:
        runs = {name: timing.waiting(step, params, batch) for name, step in compiled.items()}
        for run in runs.values():
            run()
        times = timing.medians(timing.in_turns(runs, rounds))
    return {
        "devices": devices,
        "rows": rows,
        "operations": {name: found.operations for name, found in costs.items()},
        "bytes": {name: found.bytes for name, found in costs.items()},
        "milliseconds": times,
        "exchanged": {name: jaxdp.distributed.exchanged(step) for name, step in compiled.items()},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }


def table_of(results: list[dict[str, Any]]) -> Table:
    """One row for each measurement."""
    drawn = Table(
        title=f"Against the ordinary all-reduced gradient (goal {GOAL}), clipped and with noise",
        title_justify="left",
    )
    columns = ("model", "scaling", "devices", "rows", "operations", "bytes", "ordinary", "time")
    for column in (*columns, "exchanged, ordinary", "private"):
        drawn.add_column(column)

    def ratios(of: dict[str, float]) -> str:
        return ", ".join(f"{of[name] / of['ordinary']:.2f}" for name in ("clipped", "noised"))

    for row in results:
        times = row["milliseconds"]
        numbers = [
            ", ".join(f"{kind} {count:,}" for kind, count in row["exchanged"][name].items()) or "–"
            for name in ("ordinary", "noised")
        ]
        drawn.add_row(
            row["model"],
            row["scaling"],
            str(row["devices"]),
            str(row["rows"]),
            ratios(row["operations"]),
            ratios(row["bytes"]),
            f"{times['ordinary']:.1f} ms" if times else "–",
            ratios(times) if times else "–",
            *numbers,
        )
    return drawn


def main() -> None:
    """Measures, prints the table and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description="private steps across devices")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or Path(f"bench/results/distributed_{jax.default_backend()}.json")
    results = []
    for name, case in cases().items():
        for scaling in ("weak", "strong"):
            for devices in DEVICES:
                rows = case.weak * devices if scaling == "weak" else case.strong
                found = measure(case, devices, rows, options.rounds)
                results.append({"model": name, "scaling": scaling} | found)
    Console(width=220).print(table_of(results))
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
