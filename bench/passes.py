"""Claim: a clipped step takes about as many passes through matrix units as the ordinary gradient.

    python bench/passes.py [--models mlp gpt2] [--clips flat per_layer]

For all models of `bench/zoo.py` and `bench/large.py`, on an H100 and a TPU v5p, from traced
programs (`bench/roofline.py`): no device is needed. Ratios to the ordinary gradient of the batch:
operations, passes, bytes moved, and the time of a roofline. Goals: passes at most 1.25 on every
model, 1.10 on transformers at T >= 512, 1.12 in the geometric mean; the time of a roofline at most
1.35, and 1.25 at T <= 256. Written to `bench/results/passes.json` for a run of all models.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import contestants
import jax
import large
import roofline
import zoo

import jaxdp
from jaxdp.engine.numerics import tracing_for

CLIPS = {"flat": jaxdp.clip_flat, "per_layer": jaxdp.clip_per_layer}
CASES = {**zoo.CASES, **large.CASES}
FIGURES = ("flops", "passes", "bytes", "seconds")


def ordinary(case: zoo.Case, machine: roofline.Machine) -> roofline.Cost:
    """Of the gradient of the mean loss."""
    gradient = contestants.non_private(case.loss_fn)
    with tracing_for(machine.platform):
        return roofline.cost(gradient, (case.params, case.batch), machine)


def clipped(
    case: zoo.Case, clip_name: str, machine: roofline.Machine, method: str = "auto"
) -> roofline.Cost:
    """Of the sum of clipped gradients."""
    step = contestants.clipped(case.loss_fn, CLIPS[clip_name](1.0), method=method)
    with tracing_for(machine.platform):
        return roofline.cost(step, (case.params, case.batch), machine)


def measure(name: str, clip_name: str, machine: roofline.Machine) -> dict[str, float]:
    """Ratios of the clipped step to the ordinary gradient."""
    case = CASES[name](1)
    private, plain = clipped(case, clip_name, machine), ordinary(case, machine)
    return {key: getattr(private, key) / getattr(plain, key) for key in FIGURES}


def main() -> None:
    """Counts, prints, and writes the figures."""
    parser = argparse.ArgumentParser(description="passes of clipped steps on accelerators")
    parser.add_argument("--models", nargs="+", metavar="MODEL", default=list(CASES))
    parser.add_argument("--clips", nargs="+", choices=list(CLIPS), default=list(CLIPS))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    print("| model | clip | machine | FLOPs | passes | bytes | time |")
    print("|---|---|---|---:|---:|---:|---:|")
    for machine_name, machine in roofline.MACHINES.items():
        for clip_name in options.clips:
            found = {name: measure(name, clip_name, machine) for name in options.models}
            for name, ratios in found.items():
                shown = " | ".join(f"{ratios[key]:.2f}" for key in FIGURES)
                print(f"| {name} | {clip_name} | {machine_name} | {shown} |", flush=True)
            means = {
                key: statistics.geometric_mean(ratios[key] for ratios in found.values())
                for key in FIGURES
            }
            shown = " | ".join(f"{means[key]:.2f}" for key in FIGURES)
            print(f"| geometric mean | {clip_name} | {machine_name} | {shown} |", flush=True)
            results.setdefault(machine_name, {})[clip_name] = {**found, "geometric mean": means}
    if options.models == list(CASES) and options.clips == list(CLIPS):
        path = Path(__file__).parent / "results" / "passes.json"
        rounded = jax.tree.map(lambda ratio: round(ratio, 3), results)
        path.write_text(json.dumps(rounded, indent=2) + "\n")


if __name__ == "__main__":
    main()
