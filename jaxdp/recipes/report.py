"""What a run leaves for people: a table, a JSON file and a plot.

Whoever may see the trained parameters may see all three. Numbers are rounded so that what is read
promises no more than what was executed.
"""

import dataclasses
import io
import json
import math
import tempfile
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxdp.recipes.classify import Config, Result
from jaxdp.recipes.data import Dataset
from jaxdp.training.files import write_file
from jaxdp.training.logs import NOT_PRIVATE

# It has more digits than any float has, so that nothing is rounded twice.
_CONTEXT = Context(prec=1100)
_STOPPED_BY = {"steps": "all of them", "budget": "the next one would exceed the budget"}


def table(title: str, rows: dict[str, str]) -> Table:
    """A table of two columns, names and values."""
    drawn = Table(title=title, show_header=False, title_justify="left")
    drawn.add_column(style="bold")
    drawn.add_column(overflow="fold")
    for name, value in rows.items():
        drawn.add_row(name, value)
    return drawn


def print_table(title: str, rows: dict[str, str]) -> None:
    """Prints the `table` to the terminal."""
    Console().print(table(title, rows))


def summary(config: Config, dataset: Dataset, result: Result) -> dict[str, str]:
    """The rows of the final table: the result, the guarantee, and what it rests on."""
    return {
        "data": f"{dataset.name}, {len(dataset.train_y):,} training examples",
        "model": config.model,
        "test accuracy": f"{result.accuracy:.2%}",
        "ε": f"{rounded_up(result.epsilon, 3)} (budget {config.epsilon:g})",
        "δ": f"{config.delta:g}",
        "accountant": f"{config.accountant.upper()} (dp-accounting)",
        "noise multiplier": rounded_down(result.noise_multiplier, 4),
        "steps": f"{result.steps:,} ({_STOPPED_BY[result.stopped_by]})",
        **result.assumptions,
    }


def rounded_up(value: float, digits: int) -> str:
    """An ε or a σ to ask for, in so many decimals, never below the value.

    Example:
      >>> rounded_up(2.98701, 3), rounded_up(3.0, 3)
      ('2.988', '3.000')
    """
    return _rounded(value, digits, ROUND_CEILING)


def rounded_down(value: float, digits: int) -> str:
    """A σ that was drawn, in so many decimals, never above the value.

    Example:
      >>> rounded_down(1.23459, 4)
      '1.2345'
    """
    return _rounded(value, digits, ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding, _CONTEXT):f}"


def write_metrics(path: Path, config: Config, dataset: Dataset, result: Result) -> None:
    """Writes configuration, result and history as JSON that every reader understands (RFC 8259).

    The file is public: the seed, which is a secret, and what the history tells of raw training data
    are left out. A number that is not finite is written as a string: "Infinity", "-Infinity",
    "NaN".

    Raises:
      OSError: it cannot be written; what was there is untouched.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "seed"}
    content: dict[str, Any] = {
        "data": dataset.name,
        "config": settings,
        "test_accuracy": result.accuracy,
        "epsilon": result.epsilon,
        "delta": config.delta,
        "accountant": config.accountant,
        "noise_multiplier": result.noise_multiplier,
        "steps": result.steps,
        "stopped_by": result.stopped_by,
        "assumptions": result.assumptions,
        "left_out": "training losses, counts of examples that were not finite and the speed of "
        "training: they tell of raw training data, and no epsilon covers them",
        "history": [
            {name: value for name, value in row.items() if name not in NOT_PRIVATE}
            for row in result.history
        ],
    }
    text = json.dumps(_readable(content), indent=2, allow_nan=False) + "\n"
    write_file(path, text.encode())


def _readable(value: Any) -> Any:
    """Data for JSON with numbers that are not finite in words, for which JSON has none."""
    if isinstance(value, dict):
        return {name: _readable(of) for name, of in value.items()}
    if isinstance(value, list):
        return [_readable(of) for of in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


def check_outputs(*paths: Path) -> None:
    """Fails before a run, not after it, where its outputs could not be written.

    Raises:
      OSError: a folder cannot be made or written, or a path is taken by a folder.
      ImportError: matplotlib is not installed.
    """
    _figure_class()
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent) as file:
                file.write(b"as many bytes as a small file has")
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"cannot write {path} ({reason}). Choose another folder for the outputs."
            ) from error
        if path.is_dir():
            raise OSError(f"cannot write {path}, a folder. Choose another one for the outputs.")


def write_plot(path: Path, config: Config, dataset: Dataset, result: Result) -> None:
    """Draws test accuracy and ε over epochs as a PNG.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: it cannot be written; what was there is untouched.
    """
    epochs = [row["epoch"] for row in result.history]
    accuracies = [100 * row["test_accuracy"] for row in result.history]
    epsilons = [row["epsilon"] for row in result.history]

    figure = _figure_class()(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    (accuracy_line,) = left.plot(epochs, accuracies, color="tab:blue", marker="o", markersize=3)
    (epsilon_line,) = right.plot(
        epochs, epsilons, color="tab:orange", linestyle="--", marker="o", markersize=3
    )
    left.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100), xlim=(0, None))
    right.set(ylabel=f"ε spent (δ = {config.delta:g})", ylim=(0, None))
    spent = f"ε = {rounded_up(result.epsilon, 2)}"
    left.set_title(f"{dataset.name}: {result.accuracy:.1%} at {spent}")
    left.grid(alpha=0.3)
    left.legend([accuracy_line, epsilon_line], ["test accuracy", "ε"], loc="lower right")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_file(path, content.getvalue())


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib. Run pip install 'jaxdp[plot]'.") from error
    return Figure
