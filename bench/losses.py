"""Claim: what real losses contain costs no more than 1.3 times the ordinary gradient.

    python bench/losses.py [--rounds N]

Losses as public trainers write them (haiku's mnist, flax's imagenet, levanter, μP, keras), in
small: penalties on all parameters, weights that are named for `jax.checkpoint` or multiplied by a
number, blocks under remat. A flat clip against the ordinary gradient of the same loss, in one
process and in turns: medians of the ratio of times, and of the memory beside arguments. Written to
`bench/results/losses_<device>.json`.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contestants
import jax
import jax.numpy as jnp
import optax
import timing
import zoo
from jax.ad_checkpoint import checkpoint_name

import jaxdp

GOAL = 1.3


def penalised(case: zoo.Case) -> zoo.Case:
    """The same with an L2 penalty on every parameter, inside the loss."""

    def loss_fn(params: Any, example: Any) -> jax.Array:
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)]
        return case.loss_fn(params, example) + 1e-4 * 0.5 * jnp.sum(jnp.stack(squares))

    return zoo.Case(loss_fn, case.params, case.batch)


def _two_layers() -> zoo.Case:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w1": 0.03 * jax.random.normal(keys[0], (784, 1024)),
        "w2": 0.03 * jax.random.normal(keys[1], (1024, 10)),
    }
    batch = (jax.random.normal(keys[2], (256, 784)), jax.random.randint(keys[3], (256,), 0, 10))

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        logits = jax.nn.relu(x @ params["w1"]) @ params["w2"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)

    return zoo.Case(loss_fn, params, batch)


def _stacked(wrap: Callable[[jax.Array], jax.Array], *, remat: bool = False) -> zoo.Case:
    """Six residual blocks of two products whose weights are stacked, scanned and wrapped."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": 0.05 * jax.random.normal(keys[0], (6, 256, 1024)),
        "down": 0.05 * jax.random.normal(keys[1], (6, 1024, 256)),
    }
    batch = jax.random.normal(keys[2], (16, 64, 256))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return x + jax.nn.gelu(x @ wrap(layer["up"])) @ wrap(layer["down"]), None

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(jax.checkpoint(block) if remat else block, x, params)
        return jnp.mean(jnp.square(x))

    return zoo.Case(loss_fn, params, batch)


CASES: dict[str, Callable[[], zoo.Case]] = {
    "two layers": _two_layers,
    "two layers, penalty": lambda: penalised(_two_layers()),
    "transformer, penalty": lambda: penalised(zoo.CASES["transformer"](1)),
    "six convolutions, penalty": lambda: penalised(zoo.CASES["cifar_cnn"](1)),
    "stacked": lambda: _stacked(lambda w: w),
    "stacked, named": lambda: _stacked(lambda w: checkpoint_name(w, "weight")),
    "stacked, scaled": lambda: _stacked(lambda w: w * 0.25),
    "stacked, rounded": lambda: _stacked(lambda w: jax.lax.reduce_precision(w, 8, 7)),
    "stacked, penalty": lambda: penalised(_stacked(lambda w: w)),
    "stacked, remat": lambda: _stacked(lambda w: w, remat=True),
    "stacked, remat and penalty": lambda: penalised(_stacked(lambda w: w, remat=True)),
}


def measure(case: zoo.Case, rounds: int) -> dict[str, float]:
    """Ratios of a clipped step to the ordinary gradient: time and memory."""

    def compiled(fun: Callable[..., Any]) -> Any:
        return jax.jit(fun).lower(case.params, case.batch).compile()

    private = contestants.clipped(case.loss_fn, jaxdp.clip_flat(1.0))
    ordinary = contestants.non_private(case.loss_fn)
    steps = {"private": compiled(private), "ordinary": compiled(ordinary)}
    turns = {
        name: timing.waiting(step, case.params, case.batch) for name, step in steps.items()
    }
    for run in turns.values():
        run()
    seconds = timing.in_turns(turns, rounds)
    low, median, high = timing.quartiles(
        [a / b for a, b in zip(seconds["private"], seconds["ordinary"], strict=True)]
    )

    def memory(step: Any) -> int:
        figures = step.memory_analysis()
        return figures.temp_size_in_bytes + figures.output_size_in_bytes

    ratio = memory(steps["private"]) / memory(steps["ordinary"])
    return {"time": median, "low": low, "high": high, "memory": ratio}


def main() -> None:
    """Measures, prints, and writes the figures."""
    parser = argparse.ArgumentParser(description="clipped steps of losses that trainers write")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    print("| loss | time | memory |\n|---|---:|---:|")
    for name, build in CASES.items():
        found = measure(build(), options.rounds)
        results[name] = {key: round(value, 3) for key, value in found.items()}
        print(
            f"| {name} | {found['time']:.2f} ({found['low']:.2f} to {found['high']:.2f}) "
            f"| {found['memory']:.2f} |",
            flush=True,
        )
    word = re.sub(r"[^a-z0-9]+", "_", jax.devices()[0].device_kind.lower())
    path = Path(__file__).parent / "results" / f"losses_{word}.json"
    path.write_text(json.dumps({"goal": GOAL, "losses": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
