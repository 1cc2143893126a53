"""What a run leaves for people: a table, a JSON file and a plot."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxdp.recipes.classify import Config, Result
from jaxdp.recipes.data import Dataset


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
        "ε": f"{result.epsilon:.3f} (budget {config.epsilon:g})",
        "δ": f"{config.delta:g}",
        "accountant": f"{config.accountant.upper()} (dp-accounting)",
        "noise multiplier": f"{result.noise_multiplier:.4f}",
        "steps": f"{result.steps:,}",
        **result.assumptions,
    }


def write_metrics(path: Path, config: Config, dataset: Dataset, result: Result) -> None:
    """Writes configuration, result and history as JSON. The seed is left out: it is a secret."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "seed"}
    content: dict[str, Any] = {
        "data": dataset.name,
        "config": settings,
        "test_accuracy": result.accuracy,
        "epsilon": result.epsilon,
        "delta": config.delta,
        "noise_multiplier": result.noise_multiplier,
        "steps": result.steps,
        "assumptions": {k: v for k, v in result.assumptions.items() if k != "randomness"},
        "history": result.history,
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_outputs(*paths: Path) -> None:
    """Fails before a run, not after it, where its outputs could not be written.

    Raises:
      OSError: a folder cannot be made, or a path is taken by a folder.
      ImportError: matplotlib is not installed.
    """
    _figure_class()
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise OSError(f"cannot write {path}: choose another folder for the outputs")


def write_plot(path: Path, dataset: Dataset, result: Result) -> None:
    """Draws test accuracy and ε over epochs as a PNG.

    Raises:
      ImportError: matplotlib is not installed.
    """
    epochs = [row["epoch"] for row in result.history]
    accuracies = [100 * row["test_accuracy"] for row in result.history]
    epsilons = [row["epsilon"] for row in result.history]

    figure = _figure_class()(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    (accuracy_line,) = left.plot(epochs, accuracies, color="tab:blue", marker="o", markersize=3)
    (epsilon_line,) = right.plot(epochs, epsilons, color="tab:orange", linestyle="--")
    left.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100), xlim=(0, None))
    right.set(ylabel=f"ε spent (δ = {result.history[-1]['delta']:g})", ylim=(0, None))
    left.set_title(f"{dataset.name}: {result.accuracy:.1%} at ε = {result.epsilon:.2f}")
    left.grid(alpha=0.3)
    left.legend([accuracy_line, epsilon_line], ["test accuracy", "ε"], loc="lower right")
    figure.savefig(path, dpi=150)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'jaxdp[plot]'") from error
    return Figure
