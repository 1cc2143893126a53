"""Claim: on an accelerator a clipped step costs what an ordinary one does.

    python bench/accelerator.py [--minutes 8] [--models gpt2 mlp] [--tiny] [--out FILE]

GPT-2 124M in bfloat16 at T 1024, clipped flat, processes at least 0.97 of the tokens per second of
the non-private step, at no more than 1.02 of its peak memory; clipped per layer at least 0.98. No
model of `bench/workloads.py` is below 0.80.

First of all clipped sums are checked at the device's own arithmetic (`bench/exactness.py`). Then
the steps of a model take turns, the most worthwhile models first; ratios are medians over rounds.
Beside each stands what `bench/roofline.py` counts of its program. What no longer fits into the
minutes, or into memory, is skipped and says so; `--tiny` shrinks all models to what a CPU runs.
Written to `bench/results/accelerator_<device>.json` after every measurement of a run of all models.
"""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import exactness
import jax
import roofline
import timing
import workloads

from jaxdp.engine.numerics import tracing_for

GIB = 2**30


class Goal(NamedTuple):
    """What a contestant shall reach, in ratios to the non-private step."""

    speed: float
    memory: float = math.inf


CLIPS = ("flat", "per_layer")
# What is measured together with the non-private step, by worth.
VISITS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gpt2", CLIPS),
    ("gpt2_remat", CLIPS),
    ("vit_b16", CLIPS),
    ("wrn_16_4", CLIPS),
    ("mlp", (*CLIPS, "vmap_grad")),
    ("lstm", (*CLIPS, "vmap_grad")),
    ("gpt2", ("vmap_grad", "flat_taps", "per_layer_fused")),
    ("gpt2_remat", ("vmap_grad", "flat_slots", "flat_taps")),
    ("vit_b16", ("vmap_grad", "flat_taps", "per_layer_fused")),
    ("wrn_16_4", ("vmap_grad", "flat_taps", "per_layer_fused")),
    ("mlp", ("flat_slots", "flat_taps", "per_layer_fused")),
    ("lstm", ("flat_slots", "flat_taps", "per_layer_fused")),
)
TINY_VISITS = 6  # the rest shows nothing new where no time is of interest

# Of no model less than a speed of 0.80.
GOALS = {
    **{(name, clip): Goal(0.80) for name in workloads.WORKLOADS for clip in CLIPS},
    ("gpt2", "flat"): Goal(0.97, 1.02),
    ("gpt2", "per_layer"): Goal(0.98),
}

# A check is a function of `exactness`, a case and a method; attacks are many and quick.
CHECKS: tuple[tuple[Callable[[str, str], dict[str, Any]], str, str], ...] = (
    *((exactness.check_alone, name, m) for name in exactness.FORMS for m in exactness.METHODS),
    *(
        (exactness.check_sum, name, method)
        for name in ("mlp", "gpt2", "wrn_16_4", "lstm", "vit_b16", "gpt2_remat")
        for method in exactness.METHODS
    ),
)
# Checks take so much of the time; those that are left come after the measurements.
SHARE_OF_CHECKS = 0.25

# A visit is timed for so many seconds, in a few rounds at least; steps are sent off in runs of so
# many seconds, so that a short step does not wait for the host.
SECONDS, TINY_SECONDS, ROUNDS, RUN_SECONDS = 8.0, 0.5, 5, 0.05


class Clock:
    """Time that is left."""

    def __init__(self, minutes: float):
        self.minutes, self.end = minutes, time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


class Device(NamedTuple):
    """What measures, and the machine of `bench/roofline.py` that is counted for."""

    device: Any  # of JAX
    machine_name: str

    @classmethod
    def at_hand(cls) -> "Device":
        """The machine of that name, else one of the same platform, else the first."""
        device = jax.devices()[0]
        names = list(roofline.MACHINES)
        named = [name for name in names if name in device.device_kind]
        alike = [name for name in names if roofline.MACHINES[name].platform == device.platform]
        return cls(device, [*named, *alike, *names][0])

    @property
    def stats(self) -> dict[str, int]:
        """Of its memory; empty where the device keeps none."""
        return self.device.memory_stats() or {}

    @property
    def memory(self) -> int:
        """Bytes that a step may take."""
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return self.stats.get("bytes_limit", host)


class Built(NamedTuple):
    """A compiled step and what is known of it before it runs."""

    executable: Callable[[Any, Any], Any]
    record: dict[str, Any]


class Bench:
    """Measurements, and the file that they are written to.

    Attributes:
      results: what is written.
      built: (model, contestant) -> its compiled step, for later visits.
    """

    def __init__(self, minutes: float, tiny: bool, out: Path | None):
        self.clock, self.tiny, self.out = Clock(minutes), tiny, out
        self.device = Device.at_hand()
        self.built: dict[tuple[str, str], Built] = {}
        self.results: dict[str, Any] = {
            "device": self.device.device.device_kind,
            "platform": self.device.device.platform,
            "jax": jax.__version__,
            "tiny": tiny,
            "counted_for": self.device.machine_name,
            "checks": {},
            "models": {},
        }

    def say(self, line: str) -> None:
        """Prints, and writes all results: a run may be killed at any time."""
        print(line, flush=True)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            part = self.out.with_suffix(".part")
            part.write_text(json.dumps(plain(self.results), indent=2, allow_nan=False) + "\n")
            part.replace(self.out)

    @property
    def over(self) -> str:
        """Why what is left is skipped."""
        return f"the {self.clock.minutes:g} minutes were over"

    def check(self, checks: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Runs checks for so long; returns those that are left."""
        start = time.monotonic()
        for done, (check, name, method) in enumerate(checks):
            if time.monotonic() - start > seconds:
                return checks[done:]
            found, error = attempt(lambda check=check, a=name, b=method: check(a, b))
            if found is None:
                found, verdict = {"not_run": error}, "not run"
            else:
                verdict = "right" if found["passed"] else "WRONG"
            self.results["checks"][f"{check.__name__}, {name}, {method}"] = found
            figures = json.dumps(plain({k: v for k, v in found.items() if k != "passed"}))
            self.say(f"{verdict}: {check.__name__}, {name}, {method}: {figures}")
        return ()

    def visit(self, name: str, contestants: Sequence[str]) -> None:
        """Measures contestants of one model in turns with the non-private step."""
        model = self.results["models"].setdefault(name, {})
        workload, reason = None, self.over
        if self.clock.left > 0:
            workload, reason = attempt(lambda: workloads.WORKLOADS[name](self.tiny))
        if workload is None:
            model.update({contestant: {"not_run": reason} for contestant in contestants})
            self.say(f"{name} {', '.join(contestants)}: skipped, {reason}")
            return
        runs: dict[str, timing.Run] = {}
        longest = 0.0
        for contestant in ("non_private", *contestants):
            start = time.monotonic()
            run, reason = None, self.over
            if contestant != "non_private" and "non_private" not in runs:
                reason = "there is no non-private step to compare it with"
            elif self.clock.left > longest:  # it will take about as long as the others did
                run, reason = attempt(lambda who=contestant: self._ready(name, who, workload))
            if run is None:
                model.setdefault(contestant, {"not_run": reason})
                self.say(f"{name} {contestant}: not run, {reason}")
            else:
                runs[contestant] = run
            longest = max(longest, time.monotonic() - start)
        if runs:
            self._time(name, workload, runs)

    def _ready(self, name: str, contestant: str, workload: workloads.Workload) -> timing.Run:
        """The step, compiled and warm: a function that returns the seconds of one of many."""
        params, batch = workload.case.params, workload.case.batch
        limit = self.device.memory
        rows = (workload.microbatch or workload.case.batch_size) * nbytes(params)
        if contestant == "vmap_grad" and rows > limit:
            raise MemoryError(f"its gradients are {rows / GIB:.1f} GiB of {limit / GIB:.1f}")
        if (name, contestant) not in self.built:
            self.built[name, contestant] = compiled(workload, contestant)
        executable, record = self.built[name, contestant]
        if record["peak_bytes"] > limit:
            needed = record["peak_bytes"] / GIB
            raise MemoryError(f"it needs {needed:.1f} GiB of {limit / GIB:.1f}")
        before = self.device.stats.get("peak_bytes_in_use", 0)
        jax.block_until_ready(executable(params, batch))
        after = self.device.stats.get("peak_bytes_in_use", 0)
        # The peak is one of the process so far: it tells of this step alone if it has risen.
        record["device_peak_bytes"] = after if after > before else None
        seconds = timing.once(timing.waiting(executable, params, batch))
        steps = max(1, round(RUN_SECONDS / seconds))

        def run() -> float:
            start, result = time.perf_counter(), None
            for _ in range(steps):
                result = executable(params, batch)
            jax.block_until_ready(result)
            return (time.perf_counter() - start) / steps

        return run

    def _time(self, name: str, workload: workloads.Workload, runs: dict[str, timing.Run]) -> None:
        """Takes turns, and records and counts each contestant."""
        budget = TINY_SECONDS if self.tiny else SECONDS

        def enough(rounds: int, spent: float) -> bool:
            return rounds >= ROUNDS and (spent >= budget or self.clock.left <= 0)

        seconds, error = attempt(lambda: timing.in_turns(runs, enough, measure=lambda run: run()))
        model = self.results["models"][name]
        if seconds is None:
            for contestant in runs:
                model.setdefault(contestant, {"not_run": error})
            self.say(f"{name}: not measured, {error}")
            return
        base = self.built[name, "non_private"].record
        for contestant, own in seconds.items():
            record = {**self.built[name, contestant].record}
            ratios = [a / b for a, b in zip(seconds["non_private"], own, strict=True)]
            low, speed, high = timing.quartiles(ratios)
            _, median, _ = timing.quartiles(own)
            record |= {
                "seconds": median,
                f"{workload.unit}_per_second": workload.units / median,
                "speed": speed,
                "speed_quartiles": [low, high],
                "rounds": len(own),
                "memory": record["peak_bytes"] / base["peak_bytes"],
            }
            model[contestant] = record
            self.say(
                f"{name} {contestant}: {workload.units / median:,.0f} {workload.unit}/s, "
                f"{speed:.3f} of non-private ({low:.3f} to {high:.3f}); peak memory "
                f"{record['peak_bytes'] / GIB:.3f} GiB, {record['memory']:.3f}"
            )
        self._count(name, workload, tuple(seconds))

    def _count(self, name: str, workload: workloads.Workload, names: Sequence[str]) -> None:
        """Counts the programs, beside their measured time."""
        machine = roofline.MACHINES[self.device.machine_name]
        args = jax.eval_shape(lambda: (workload.case.params, workload.case.batch))
        costs: dict[str, roofline.Cost] = {}
        for contestant in names:
            if self.clock.left <= 0:
                self.say(f"{name} {contestant}: not counted, {self.over}")
                return
            with tracing_for(machine.platform):
                step = workloads.step_of(workload, contestant)
                cost, error = attempt(lambda step=step: roofline.cost(step, args, machine))
            if cost is None:
                self.say(f"{name} {contestant}: not counted, {error}")
                continue
            costs[contestant] = cost
            if "non_private" not in costs:
                continue
            record = self.results["models"][name][contestant]
            record["counted"] = counted = {
                field: getattr(cost, field) / getattr(costs["non_private"], field)
                for field in roofline.Cost._fields
            }
            self.say(
                f"{name} {contestant}: counted passes {counted['passes']:.2f}, bytes "
                f"{counted['bytes']:.2f}, roofline time {counted['seconds']:.2f}, measured "
                f"{1 / record['speed']:.2f}"
            )

    def judge(self) -> None:
        """Says which goals are met."""
        self.results["goals"] = verdicts = {}
        for (name, contestant), goal in GOALS.items():
            found = self.results["models"].get(name, {}).get(contestant, {})
            text = f"{name} {contestant}: speed at least {goal.speed:.2f}"
            text += f", memory at most {goal.memory:.2f}" if goal.memory < math.inf else ""
            verdicts[text] = "not measured"
            if "speed" in found:
                met = found["speed"] >= goal.speed and found["memory"] <= goal.memory
                figures = f"{found['speed']:.3f}, {found['memory']:.3f}"
                verdicts[text] = f"{'met' if met else 'missed'}: {figures}"
            self.say(f"{text}: {verdicts[text]}")


def compiled(workload: workloads.Workload, contestant: str) -> Built:
    """The step and what its memory is, by the compiler."""
    start = time.monotonic()
    step = workloads.step_of(workload, contestant)
    executable = jax.jit(step).lower(workload.case.params, workload.case.batch).compile()
    record: dict[str, Any] = {"compile_seconds": time.monotonic() - start}
    memory: Any = executable.memory_analysis()
    names = ("argument", "output", "temp", "alias")
    record["bytes"] = sizes = {name: getattr(memory, f"{name}_size_in_bytes", 0) for name in names}
    record["peak_bytes"] = sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    return Built(executable, record)


def attempt(fun: Callable[[], Any]) -> tuple[Any, str]:
    """The result, or None and why there is none: a failure must not end the run."""
    try:
        return fun(), ""
    except Exception as error:  # a device that is out of memory raises an error of the runtime
        sentence = str(error).partition("\n")[0]
        return None, f"{type(error).__name__}: {sentence[:300]}"


def nbytes(tree: Any) -> int:
    """Of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def plain(results: Any) -> Any:
    """With words for the numbers that JSON lacks."""
    if isinstance(results, dict):
        return {key: plain(value) for key, value in results.items()}
    if isinstance(results, float) and not math.isfinite(results):
        return str(results)
    return results


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="clipped steps on the accelerator at hand")
    parser.add_argument("--minutes", type=float, default=8.0, help="the rest is skipped")
    parser.add_argument("--models", nargs="*", choices=workloads.WORKLOADS, metavar="MODEL")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs")
    parser.add_argument("--no-checks", action="store_true", help="measures alone")
    parser.add_argument("--out", type=Path, help="JSON; default: bench/results/accelerator_…")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Checks, measures, prints and writes."""
    options = parsed(words)
    out = options.out
    if out is None and options.models is None and not options.no_checks:
        kind = jax.devices()[0].device_kind + (" tiny" if options.tiny else "")
        word = re.sub(r"[^a-z0-9]+", "_", kind.lower())
        out = Path(__file__).parent / "results" / f"accelerator_{word}.json"
    bench = Bench(options.minutes, options.tiny, out)
    bench.say(f"{bench.results['device']}, JAX {jax.__version__}")
    checks: Sequence[Any] = () if options.no_checks else CHECKS
    if options.tiny:  # a few of each, methods in turn
        checks = checks[:: 2 * len(exactness.METHODS) + 1]
    left = bench.check(checks, SHARE_OF_CHECKS * bench.clock.left)
    wanted = workloads.WORKLOADS if options.models is None else options.models
    for name, contestants in VISITS[: TINY_VISITS if options.tiny else None]:
        if name in wanted:
            bench.visit(name, contestants)
    left = bench.check(left, bench.clock.left)
    bench.results["checks_left"] = [f"{check.__name__}, {a}, {b}" for check, a, b in left]
    for skipped in bench.results["checks_left"]:
        bench.say(f"{skipped}: skipped, {bench.over}")
    if not options.tiny:
        bench.judge()
    if out:
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
