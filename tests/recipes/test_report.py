"""What a run leaves for people: the table, the JSON and the plot."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jaxdp.recipes import report
from jaxdp.recipes.classify import Config, Result
from jaxdp.recipes.data import Dataset

SECRET = 123_456_789

CONFIG = Config(
    model="linear", epsilon=3.0, delta=1e-6, threshold=1.0, accountant="rdp", seed=SECRET
)
IMAGES, LABELS = np.zeros((1200, 2, 2, 1), np.float32), np.zeros(1200, np.int32)
DATASET = Dataset("toys", IMAGES, LABELS, IMAGES[:3], LABELS[:3], 10)


def row(step: int, accuracy: float, epsilon: float) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 10,
        "epsilon": epsilon,
        "delta": 1e-6,
        "loss": 1.5,
        "nonfinite": 0,
        "samples_per_second": 1000.0,
        "test_accuracy": accuracy,
    }


RESULT = Result(
    params={},
    accuracy=0.8125,
    epsilon=2.98765,
    noise_multiplier=1.23456,
    steps=1234,
    stopped_by="steps",
    history=[row(10, 0.25, 1.0), row(20, 0.5, 2.0), row(30, 0.8125, 2.98765)],
    assumptions={"sampling": "Poisson, rate 0.1 per step", "randomness": f"seed {SECRET}"},
)


def test_the_summary_holds_the_result_and_what_it_rests_on() -> None:
    rows = report.summary(CONFIG, DATASET, RESULT)
    assert rows["data"] == "toys, 1,200 training examples"
    assert rows["test accuracy"] == "81.25%"
    assert rows["ε"] == "2.988 (budget 3)" and rows["δ"] == "1e-06"
    assert rows["accountant"] == "RDP (dp-accounting)"
    assert rows["noise multiplier"] == "1.2346" and rows["steps"] == "1,234"
    assert rows["sampling"] == "Poisson, rate 0.1 per step"


def test_the_table_shows_every_row_also_where_it_is_narrow() -> None:
    for width in (40, 120):
        output = io.StringIO()
        rows = {"name": "value", "long": " ".join(["words"] * 30)}
        Console(file=output, width=width).print(report.table("Title", rows))
        text = output.getvalue()
        assert text.startswith("Title") and "name" in text and "value" in text
        assert text.count("words") == 30
        assert max(map(len, text.splitlines())) <= width


def test_the_metrics_are_json_without_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    report.write_metrics(path, CONFIG, DATASET, RESULT)
    text = path.read_text()
    assert str(SECRET) not in text and "seed" not in text
    metrics = json.loads(text)
    assert metrics["history"] == RESULT.history
    assert metrics["epsilon"] == RESULT.epsilon and metrics["delta"] == CONFIG.delta
    assert metrics["test_accuracy"] == RESULT.accuracy and metrics["steps"] == RESULT.steps
    assert metrics["noise_multiplier"] == RESULT.noise_multiplier and metrics["data"] == "toys"
    assert metrics["config"]["accountant"] == "rdp"
    assert metrics["assumptions"] == {"sampling": "Poisson, rate 0.1 per step"}


@pytest.mark.parametrize("reports", [1, 3])
def test_the_plot_is_an_image_with_both_lines(tmp_path: Path, reports: int) -> None:
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "training.png"
    report.write_plot(path, DATASET, RESULT._replace(history=RESULT.history[:reports]))
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[:2] == (600, 1050)
    for colour in ([0x1F, 0x77, 0xB4], [0xFF, 0x7F, 0x0E]):  # accuracy blue, ε orange
        near = np.abs(pixels - np.array(colour) / 255).max(axis=-1) < 0.02
        assert near.sum() > 50
