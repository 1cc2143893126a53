"""Claim: jaxdp's clipped gradient costs little more than a plain one, and less than its peers'.

    python bench/engine.py [--models mlp lstm] [--contestants ...] [--method METHOD] [--scale N]
    python bench/engine.py --markdown bench/results/engine_cpu.json

For every model of `bench/zoo.py` and every contestant of `bench/contestants.py`, in one process:
wall time of a compiled step, its temporary memory and its compile time, each as a ratio to the
non-private gradient of the mean loss on the same batch. The steps take turns, so that a machine
that slows down slows all of them alike. Every clipped sum is held against one `jax.grad` per
example. What needs more memory than the cap is not run, and the table says how much it needs.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import contestants as field
import jax
import jax.numpy as jnp
import timing
import zoo
from rich import box
from rich.console import Console
from rich.table import Table

MIB, GIB = 2**20, 2**30

# At least this many rounds, unless they take PATIENCE times the seconds asked for.
MIN_ROUNDS = 7
PATIENCE = 4
# A contestant this many times slower than the typical one takes part in few rounds: it would eat
# the time of all others.
SLOW_FACTOR = 10

MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one contestant on one model.

    Attributes:
      variant: the one that competed; empty where there is only one.
      compile_seconds: of lowering and compiling, once.
      temp_bytes: temporary memory of the compiled step; None where the backend does not tell.
      median_seconds: of a step, over the rounds.
      quartile_seconds: the first and third quartile of the same.
      rounds: in how many rounds it was timed.
      error: largest deviation from the oracle, relative to the oracle's largest entry.
      not_run: why it was not run; empty where it was.
      tried: variant -> seconds of one step, where there were several to choose from.
    """

    variant: str = ""
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    median_seconds: float | None = None
    quartile_seconds: tuple[float, float] | None = None
    rounds: int = 0
    error: float | None = None
    not_run: str = ""
    tried: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Compiled(NamedTuple):
    """A compiled step on its inputs. `run` waits for the result."""

    run: Callable[[], Any]
    seconds: float
    temp_bytes: int | None


class Options(NamedTuple):
    """The settings of a measurement; see the command line."""

    seconds: float
    rounds: int | None
    memory_cap: float


def compiled(step: field.Step, case: zoo.Case) -> Compiled:
    """Lowers and compiles, with the gradient as output and nothing as a constant."""
    start = time.perf_counter()
    executable = jax.jit(step).lower(case.params, case.batch).compile()
    seconds = time.perf_counter() - start

    # Some backends return no analysis, or one without this field.
    temp_bytes = getattr(executable.memory_analysis(), "temp_size_in_bytes", None)
    return Compiled(timing.waiting(executable, case.params, case.batch), seconds, temp_bytes)


def prepare(
    contestant: field.Contestant, case: zoo.Case, memory_cap: float
) -> tuple[Compiled | None, Row]:
    """The contestant's fastest variant, ready to run, unless all need more than the cap."""
    variants = {}
    for label, step in contestant.variants.items():
        try:
            variants[label] = compiled(step, case)
        except Exception as error:  # one contestant that refuses a model must not end the run
            sentence = str(error).partition("\n")[0]
            return None, Row(variant=label, not_run=f"{type(error).__name__}: {sentence}")

    fitting = {label: v for label, v in variants.items() if (v.temp_bytes or 0) <= memory_cap}
    if not fitting:
        label, least = min(variants.items(), key=lambda item: item[1].temp_bytes or 0)
        reason = f"needs {(least.temp_bytes or 0) / GIB:.1f} GiB"
        return None, Row(label, least.seconds, least.temp_bytes, not_run=reason)

    tried = {}
    if len(variants) > 1:
        tried = {label: timing.turn(variant.run) for label, variant in fitting.items()}
    label = min(tried, key=tried.__getitem__, default=next(iter(fitting)))
    chosen = fitting[label]
    return chosen, Row(label, chosen.seconds, chosen.temp_bytes, tried=tried)


def relative_error(result: Any, expected: Any) -> float:
    """Largest absolute difference in the tree, relative to the largest entry expected."""

    def largest(tree: Any) -> jax.Array:
        return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))

    return float(largest(jax.tree.map(jnp.subtract, result, expected)) / largest(expected))


def enough(rounds: int, spent: float, options: Options) -> bool:
    """Whether that many rounds, which took that many seconds, will do."""
    if options.rounds is not None:
        return rounds >= options.rounds
    satisfied = rounds >= MIN_ROUNDS and spent >= options.seconds
    exhausted = rounds >= timing.FEW_ROUNDS and spent >= PATIENCE * options.seconds
    return satisfied or exhausted


def measure(
    case: zoo.Case, contestants: Mapping[str, field.Contestant], options: Options
) -> dict[str, Row]:
    """All contestants on one model."""
    # The first trace of a model fills caches in JAX, which must not count as the first
    # contestant's compile time.
    jax.eval_shape(jax.vmap(jax.grad(case.loss_fn), (None, 0)), case.params, case.batch)
    ready: dict[str, Compiled] = {}
    rows: dict[str, Row] = {}
    for name, contestant in contestants.items():
        step, rows[name] = prepare(contestant, case, options.memory_cap)
        if step is not None:
            ready[name] = step

    expected = field.oracle(case.loss_fn, case.params, case.batch)
    first: dict[str, float] = {}
    for name, step in ready.items():  # warms up; no timing of this round is reported
        first[name], result = timing.timed(step.run)
        if contestants[name].clip in expected:
            error = relative_error(result, expected[contestants[name].clip])
            rows[name] = dataclasses.replace(rows[name], error=error)
    del expected

    limit = SLOW_FACTOR * statistics.median(first.values())
    slow = {name for name, seconds in first.items() if seconds > limit}
    runs = {name: step.run for name, step in ready.items()}
    turns = timing.in_turns(
        runs, functools.partial(enough, options=options), measure=timing.turn, slow=slow
    )
    for name, seconds in turns.items():
        rows[name] = dataclasses.replace(rows[name], **summary(seconds))
    return rows


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and number of the rounds, as fields of a `Row`."""
    low, median, high = timing.quartiles(seconds)
    return {"median_seconds": median, "quartile_seconds": (low, high), "rounds": len(seconds)}


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures rest on."""
    packages = ("jax", "jaxlib", "flax", "optax", "jaxdp", "jax-privacy")
    versions = {name: _version(name) for name in packages}
    return {
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "method": options.method,
        "scale": options.scale,
        "clip_norm": field.CLIP_NORM,
        "memory_cap_gib": options.memory_cap,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# Column -> key of a row, unit to show it in, and the size of that unit.
MEASURES = {
    "time": ("median_seconds", "ms", 1e-3),
    "memory": ("temp_bytes", "MiB", MIB),
    "compile": ("compile_seconds", "s", 1.0),
}

Rows = Mapping[str, Mapping[str, Any]]


def figure(rows: Rows, name: str, measure: str) -> str:
    """The non-private step's measure in its unit, another contestant's as a ratio to that."""
    key, unit, size = MEASURES[measure]
    value, base = rows[name][key], rows["non_private"][key]
    if not value or not base:
        return MISSING
    return f"{_short(value / size)} {unit}" if name == "non_private" else f"{_short(value / base)}×"


def deviation(rows: Rows, name: str) -> str:
    """How far a contestant is from the oracle."""
    value = rows[name]["error"]
    return MISSING if value is None else f"{value:.0e}"


def _short(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:,.0f}"


def console_table(title: str, rows: Rows) -> Table:
    """Everything about one model, for the terminal."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in (*MEASURES, "error", "rounds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for name, row in rows.items():
        figures = [figure(rows, name, measure) for measure in MEASURES]
        note = f"not run: {row['not_run']}" if row["not_run"] else row["variant"]
        table.add_row(name, *figures, deviation(rows, name), str(row["rounds"]), note)
    return table


def markdown(results: Mapping[str, Any]) -> str:
    """The tables for `bench/README.md`: one for each measure, and one for the errors."""
    models = results["models"].items()
    present = {name for _, model in models for name in model["contestants"]}
    names = [name for name in field.NAMES if name in present]

    def time_and_variant(rows: Rows, name: str) -> str:
        row = rows[name]
        variant = f" ({row['variant']})" if row["variant"] else ""
        return row["not_run"] or figure(rows, name, "time") + variant

    cells: dict[str, Callable[[Rows, str], str]] = {
        measure: functools.partial(figure, measure=measure) for measure in MEASURES
    }
    cells |= {"time": time_and_variant, "error": deviation}
    tables = []
    for title, cell in cells.items():
        lines = [[title, *names], ["---", *["---:"] * len(names)]]
        for model_name, model in models:
            rows = model["contestants"]
            texts = [cell(rows, name) if name in rows else MISSING for name in names]
            lines.append([f"{model_name}, B {model['batch_size']:,}", *texts])
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables) + "\n"


def default_path(options: argparse.Namespace) -> Path | None:
    """Where a complete run writes. A partial one would replace its figures, so it writes nothing
    unless it is told where."""
    if options.models or options.contestants:
        return None
    words = [jax.devices()[0].device_kind, *([options.method] if options.method else [])]
    name = re.sub(r"[^a-z0-9]+", "_", " ".join(["engine", *words]).lower())
    return Path("bench/results") / f"{name}.json"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="clipped gradients against a non-private one")
    parser.add_argument("--models", nargs="+", choices=zoo.CASES, metavar="MODEL")
    parser.add_argument("--contestants", nargs="+", choices=field.NAMES, metavar="CONTESTANT")
    parser.add_argument("--rounds", type=int, help="timed rounds, at least 2; default: adaptive")
    parser.add_argument("--seconds", type=float, default=15.0, help="timed, for each model")
    parser.add_argument("--method", help="method of jaxdp.per_sample_grads")
    parser.add_argument("--scale", type=int, default=1, help="factor of every batch size")
    parser.add_argument("--memory-cap", type=float, default=8.0, help="GiB of temporary memory")
    parser.add_argument("--out", type=Path, help="JSON; default: bench/results/engine_<device>")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print its tables and stop")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    return options


def main() -> None:
    """Measures, prints a table for each model, and writes the figures as JSON."""
    options = parsed()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())), end="")
        return
    out = options.out or default_path(options)
    console = Console()
    wanted = {"non_private", *(options.contestants or field.NAMES)}
    settings = Options(options.seconds, options.rounds, options.memory_cap * GIB)
    results: dict[str, Any] = {"environment": environment(options), "models": {}}
    if not field.jax_privacy_installed():
        console.print("jax-privacy is not installed and left out: pip install jax-privacy")
    for name in options.models or zoo.CASES:
        case = zoo.CASES[name](options.scale)
        built = field.build(case.loss_fn, case.batch_size, options.method)
        chosen = {who: contestant for who, contestant in built.items() if who in wanted}
        rows = measure(case, chosen, settings)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(case.params))
        model = {
            "batch_size": case.batch_size,
            "parameters": parameters,
            "contestants": {who: dataclasses.asdict(row) for who, row in rows.items()},
        }
        results["models"][name] = model
        title = f"{name}, batch {case.batch_size:,}, {parameters:,} parameters"
        console.print(console_table(title, model["contestants"]))
        if out:  # after every model: a complete run is long, and may be stopped
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=2) + "\n")
    if out:
        console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
