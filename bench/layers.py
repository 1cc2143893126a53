"""Claim: a layer of `jaxdp.nn` costs at most 1.15 times as much with clipped gradients as without.

    python bench/layers.py [--layers lstm conv2d] [--rounds N]
    python bench/layers.py --markdown bench/results/layers_cpu.json

Each layer stands where it stands in a network: above one that wants the gradient of its input,
here a scale of every feature (nothing stands below an embedding). In one process and in turns, time
and temporary memory of a compiled step as ratios to the gradient of the mean loss on the same
batch. Clipped sums are held against one `jax.grad` per example, as in `bench/engine.py`.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import contestants as field
import engine
import jax
import jax.numpy as jnp
import zoo
from rich.console import Console

from jaxdp import nn

GOAL = 1.15
CONTESTANTS = ("non_private", "jaxdp_flat", "jaxdp_per_layer")
HEADER = ("", "plain", "time, flat", "per-layer", "memory, flat", "per-layer")


class Sized(NamedTuple):
    """A layer, the shape of an example (a number of ids for an embedding), and a batch size."""

    layer: Callable[[], nn.Layer]
    shape: tuple[int, ...]
    batch_size: int

    def case(self) -> zoo.Case:
        """The mean square of its outputs, on random inputs."""
        layer, key = self.layer(), jax.random.key(1)
        params: dict[str, Any] = {"layer": layer.init(jax.random.key(0))}
        if ids := "embedding" in params["layer"]:
            rows = len(params["layer"]["embedding"])
            batch = jax.random.randint(key, (self.batch_size, *self.shape), 0, rows)
        else:
            params["below"] = jnp.ones((1,) * (len(self.shape) - 1) + self.shape[-1:])
            batch = jax.random.normal(key, (self.batch_size, *self.shape))

        def loss_fn(params: Any, x: jax.Array) -> jax.Array:
            y = layer.apply(params["layer"], x if ids else x * params["below"])
            return jnp.mean(jnp.square(y[0] if isinstance(y, tuple) else y))

        return zoo.Case(loss_fn, params, batch)


LAYERS: Mapping[str, Sized] = {
    "linear 512→512": Sized(lambda: nn.linear(512, 512), (512,), 512),
    "linear 256→256, T 64": Sized(lambda: nn.linear(256, 256), (64, 256), 64),
    "conv_linear 256→256, T 64": Sized(lambda: nn.conv_linear(256, 256), (64, 256), 64),
    "conv1d 64→64, k 5, W 128": Sized(lambda: nn.conv1d(64, 64, 5, padding="same"), (128, 64), 64),
    "conv2d 64→64, k 3, 16×16": Sized(
        lambda: nn.conv2d(64, 64, 3, padding="same"), (16, 16, 64), 64
    ),
    "conv2d depthwise 64, k 3, 32×32": Sized(
        lambda: nn.conv2d(64, 64, 3, padding="same", groups=64), (32, 32, 64), 32
    ),
    "conv3d 16→16, k 3, 8×16×16": Sized(
        lambda: nn.conv3d(16, 16, 3, padding="same"), (8, 16, 16, 16), 16
    ),
    "conv_transpose2d 64→32, k 4, 16×16": Sized(
        lambda: nn.conv_transpose2d(64, 32, 4, stride=2, padding=1), (16, 16, 64), 32
    ),
    "embedding 10000×128, T 64": Sized(lambda: nn.embedding(10_000, 128), (64,), 256),
    "layer_norm 256, T 64": Sized(lambda: nn.layer_norm(256), (64, 256), 128),
    "rms_norm 256, T 64": Sized(lambda: nn.rms_norm(256), (64, 256), 128),
    "group_norm 8 of 64, 32×32": Sized(lambda: nn.group_norm(8, 64), (32, 32, 64), 64),
    "instance_norm 64, 32×32": Sized(lambda: nn.instance_norm(64, affine=True), (32, 32, 64), 64),
    "lstm 100→128, T 64": Sized(lambda: nn.lstm(100, 128), (64, 100), 256),
    "lstm 64→64, 2 layers, bidirectional, T 32": Sized(
        lambda: nn.lstm(64, 64, num_layers=2, bidirectional=True), (32, 64), 128
    ),
    "gru 100→128, T 64": Sized(lambda: nn.gru(100, 128), (64, 100), 256),
    "rnn 100→128, T 64": Sized(lambda: nn.rnn(100, 128), (64, 100), 256),
    "attention 128, 4 heads, T 64": Sized(lambda: nn.multi_head_attention(128, 4), (64, 128), 64),
    "sequence_bias 256, T 64": Sized(lambda: nn.sequence_bias(256), (64, 256), 128),
    "prelu 64, 32×32": Sized(lambda: nn.prelu(64), (32, 32, 64), 64),
}


def cells(name: str, rows: engine.Rows) -> list[str]:
    """One line of the table: ratios beyond the goal are marked."""

    def ratio(who: str, measure: str) -> str:
        text = engine.figure(rows, who, measure)
        return text if text == engine.MISSING or float(text[:-1]) <= GOAL else f"**{text}**"

    plain = f"{engine.figure(rows, 'non_private', 'time')}, "
    plain += engine.figure(rows, "non_private", "memory")
    private = CONTESTANTS[1:]
    ratios = [ratio(who, measure) for measure in ("time", "memory") for who in private]
    return [name, plain, *ratios]


def markdown(results: Mapping[str, Any]) -> str:
    """The table for `bench/README.md`."""
    lines = [[*HEADER], ["---", *["---:"] * (len(HEADER) - 1)]]
    lines += [cells(name, rows) for name, rows in results["layers"].items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measures every layer, prints the table, and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description="layers with clipped gradients, and without")
    parser.add_argument("--layers", nargs="+", help="only those whose names start so")
    parser.add_argument("--rounds", type=int, help="timed rounds; default: adaptive")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed, for each layer")
    parser.add_argument("--out", type=Path, help="JSON; default: bench/results/layers_<device>")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print its table and stop")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())))
        return
    options.method, options.scale, options.memory_cap = None, 1, 8.0
    settings = engine.Options(options.seconds, options.rounds, options.memory_cap * engine.GIB)
    results: dict[str, Any] = {"environment": engine.environment(options), "layers": {}}
    wanted = tuple(options.layers or ("",))
    console = Console()
    for name, sized in LAYERS.items():
        if not name.startswith(wanted):
            continue
        case = sized.case()
        built = field.build(case.loss_fn, case.batch_size, None)
        rows = engine.measure(case, {who: built[who] for who in CONTESTANTS}, settings)
        plain = {who: dataclasses.asdict(row) for who, row in rows.items()}
        results["layers"][f"{name}, B {case.batch_size}"] = plain
        console.print(engine.console_table(name, plain))
    device = jax.devices()[0].device_kind.lower()
    out = options.out or (None if options.layers else Path(f"bench/results/layers_{device}.json"))
    if out:  # a part would replace the figures of the whole
        out.write_text(json.dumps(results, indent=2) + "\n")
        console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
