"""Claim: noise with true tails costs at most 2 times what `jax.random.normal` does.

    python bench/noise.py [--rounds N]

In one process and in turns, medians of compiled draws' times as ratios to `jax.random.normal` of
the same shape and precision; "release" scales the noise and adds it to a sum, as a step does.
Written to `bench/results/noise_<device>.json`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import timing
from rich.console import Console
from rich.table import Table

from jaxdp.distributions import normal

GOAL = 2.0
SHAPES = ((768,), (768, 768), (3072, 768), (50_257, 128), (3, 3, 128, 257))


def draws(shape: tuple[int, ...], dtype: Any) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Each with the old noise and with the new one."""
    total = jnp.ones(shape, dtype)
    laws: dict[str, Callable[..., jax.Array]] = {"old": jax.random.normal, "new": normal}
    return {
        **{name: lambda key, law=law: law(key, shape, dtype) for name, law in laws.items()},
        **{
            f"{name} release": lambda key, law=law: total + 1.5 * law(key, shape, dtype)
            for name, law in laws.items()
        },
    }


def measure(shape: tuple[int, ...], dtype: Any, rounds: int) -> dict[str, Any]:
    """Times of one shape."""
    key = jax.random.key(0)
    runs = {name: timing.waiting(jax.jit(draw), key) for name, draw in draws(shape, dtype).items()}
    for run in runs.values():
        run()
    medians = timing.medians(timing.in_turns(runs, rounds))
    return {
        "shape": list(shape),
        "dtype": jnp.dtype(dtype).name,
        "jax_ms": medians["old"],
        "draw": medians["new"] / medians["old"],
        "release": medians["new release"] / medians["old release"],
    }


def main() -> None:
    """Measures every shape, prints a table and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description="what noise with true tails costs")
    parser.add_argument("--rounds", type=int, default=40)
    device = jax.devices()[0].platform
    parser.add_argument("--out", type=Path, default=Path(f"bench/results/noise_{device}.json"))
    options = parser.parse_args()
    results = [measure(shape, jnp.float32, options.rounds) for shape in SHAPES]
    with jax.enable_x64(True):
        results.append(measure((768, 768), jnp.float64, options.rounds))
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title=f"Ratios to jax.random.normal (goal {GOAL})", title_justify="left")
    for column in results[0]:
        table.add_column(column.replace("_", " "))
    for row in results:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
