"""Claim: who takes part in a step is drawn in time for the batch, whatever the size of the data.

    python bench/draws.py [--rounds N]

In one process and in turns, medians of the CPU time of a draw: Poisson and fixed-size ones beside
those that read one random word for each example of the data, as jaxdp did before. "table" is what
the first Poisson draw computes once. Written to `bench/results/draws.json`.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timing
from rich.console import Console
from rich.table import Table

from jaxdp.sampling import FixedSizeSampler, PoissonSampler, Sampler
from jaxdp.sampling.binomial import cells

# Examples, and how many of them are expected in a batch: a 234th, a 293rd, ..., and one half.
CASES = (
    (60_000, 256),
    (1_200_000, 4096),
    (50_000_000, 4096),
    (1_000_000_000, 100_000),
    (60_000, 30_000),
    (1_200_000, 600_000),
)
CHUNK = 1 << 20
MOST_KEYS = 100_000_000
"""The most examples that a fixed-size draw made keys for."""


def poisson_of_all(sampler: PoissonSampler, step: int) -> np.ndarray:
    """Those whose word is below the rate."""
    words, below = sampler.words(step), int(sampler.sampling_rate * 2**53)
    return np.concatenate(
        [
            start
            + np.flatnonzero(
                words.random_raw(min(CHUNK, sampler.num_examples - start)) >> 11 < below
            )
            for start in range(0, sampler.num_examples, CHUNK)
        ]
    )


def fixed_of_all(sampler: FixedSizeSampler, step: int) -> np.ndarray:
    """Those with the smallest words."""
    keys = sampler.words(step).random_raw(sampler.num_examples)
    return np.sort(np.argpartition(keys, sampler.batch_size - 1)[: sampler.batch_size])


def steps_of(draw: Callable[[Any, int], np.ndarray], sampler: Sampler) -> timing.Run:
    """The draw of the next step, at every call."""
    steps = itertools.count()
    return lambda: draw(sampler, next(steps))


def cpu_seconds(run: timing.Run) -> float:
    """CPU seconds of one call, in a turn of 0.1 s or more."""
    start = time.process_time()
    calls = 0
    while calls == 0 or time.process_time() - start < timing.TURN_SECONDS:
        run()
        calls += 1
    return (time.process_time() - start) / calls


def measure(size: int, batch: int, rounds: int) -> dict[str, Any]:
    """CPU milliseconds of one draw of each kind."""
    poisson = PoissonSampler(size, expected_batch_size=batch, seed=1)
    fixed = FixedSizeSampler(size, batch_size=batch, seed=1)
    rate = int(poisson.sampling_rate * 2**53)
    runs = {
        "poisson_before": steps_of(poisson_of_all, poisson),
        "poisson": steps_of(PoissonSampler.members, poisson),
        "fixed": steps_of(FixedSizeSampler.members, fixed),
        "table": lambda: cells.__wrapped__(size, rate, 64),
    }
    if size <= MOST_KEYS:
        runs["fixed_before"] = steps_of(fixed_of_all, fixed)
    for run in runs.values():
        run()
    slow = {name for name in ("poisson_before", "fixed_before") if size > 10**7}
    medians = timing.medians(timing.in_turns(runs, rounds, slow=slow, measure=cpu_seconds))
    order = ("poisson_before", "poisson", "fixed_before", "fixed", "table")
    return {"examples": size, "batch": batch} | {name: medians.get(name) for name in order}


def main() -> None:
    """Measures every size, prints a table and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description="what a draw costs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("bench/results/draws.json"))
    options = parser.parse_args()
    results = [measure(size, batch, options.rounds) for size, batch in CASES]
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title="CPU milliseconds of one draw", title_justify="left")
    for column in results[0]:
        table.add_column(column.replace("_", " "))
    for row in results:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
