"""What a run leaves for people: the table, the JSON and the plot."""

import errno
import io
import json
import math
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jaxdp.recipes import report
from jaxdp.recipes.classify import Config, Result
from jaxdp.recipes.data import Dataset
from tests.helpers import strict_json

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
    assumptions={"sampling": "Poisson, rate 0.1 per step", "randomness": "a given seed"},
)


def written(path: Path, result: Result) -> Any:
    report.write_metrics(path, CONFIG, DATASET, result)
    return strict_json(path.read_text())


def test_the_summary_holds_the_result_and_what_it_rests_on() -> None:
    rows = report.summary(CONFIG, DATASET, RESULT)
    assert rows["data"] == "toys, 1,200 training examples"
    assert rows["test accuracy"] == "81.25%"
    assert rows["ε"] == "2.988 (budget 3)" and rows["δ"] == "1e-06"
    assert rows["accountant"] == "RDP (dp-accounting)"
    assert rows["noise multiplier"] == "1.2345" and rows["steps"] == "1,234 (all of them)"
    stopped = report.summary(CONFIG, DATASET, RESULT._replace(stopped_by="budget"))
    assert stopped["steps"] == "1,234 (the next one would exceed the budget)"
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
    metrics = written(tmp_path / "metrics.json", RESULT)
    text = json.dumps(metrics)
    assert str(SECRET) not in text and "seed" not in metrics["config"]
    public = ("step", "epoch", "epsilon", "delta", "test_accuracy")
    assert metrics["history"] == [{k: row[k] for k in public} for row in RESULT.history]
    assert metrics["epsilon"] == RESULT.epsilon and metrics["delta"] == CONFIG.delta
    assert metrics["test_accuracy"] == RESULT.accuracy and metrics["steps"] == RESULT.steps
    assert metrics["noise_multiplier"] == RESULT.noise_multiplier and metrics["data"] == "toys"
    assert metrics["config"]["accountant"] == metrics["accountant"] == "rdp"
    assert metrics["stopped_by"] == "steps" and metrics["assumptions"] == RESULT.assumptions


def test_what_is_not_private_is_not_in_the_metrics_and_the_file_says_so(tmp_path: Path) -> None:
    """The raw quantities of the history have values that nothing else has."""
    raw = {"loss": 1234.5, "nonfinite": 6789, "samples_per_second": 9876.25}
    history = [row(10, 0.25, 1.0) | raw]
    metrics = written(tmp_path / "metrics.json", RESULT._replace(history=history))
    text = json.dumps(metrics)
    assert not any(
        name in text or str(value) in text for name, value in raw.items() if name != "loss"
    )
    assert "1234.5" not in text and '"loss"' not in text
    assert "no epsilon covers them" in metrics["left_out"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_do_not_cost_the_metrics(tmp_path: Path, value: float) -> None:
    history = [row(10, value, value) | {"loss": value}, *RESULT.history]
    result = RESULT._replace(history=history, noise_multiplier=value)
    metrics = written(tmp_path / "metrics.json", result)
    first = metrics["history"][0]
    for read in (first["epsilon"], first["test_accuracy"], metrics["noise_multiplier"]):
        np.testing.assert_equal(float(read), value)
    assert isinstance(first["epsilon"], str)


@pytest.mark.parametrize("fails", ["open", "fsync", "replace"])
def test_files_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, plot = tmp_path / "metrics.json", tmp_path / "training.png"
    before = written(path, RESULT)
    plot.write_bytes(b"a plot of before")
    with monkeypatch.context() as patch:
        patch.setattr(os if fails == "fsync" else Path, fails, full)
        with pytest.raises(OSError, match="No space left"):
            report.write_metrics(path, CONFIG, DATASET, RESULT._replace(steps=1))
        with pytest.raises(OSError, match="No space left"):
            report.write_plot(plot, CONFIG, DATASET, RESULT)
    assert strict_json(path.read_text()) == before and plot.read_bytes() == b"a plot of before"
    assert {*tmp_path.iterdir()} == {path, plot}


@given(st.floats(min_value=0, max_value=1e300), st.integers(0, 6))
def test_what_is_read_promises_no_more_than_the_number(value: float, digits: int) -> None:
    up, down = report.rounded_up(value, digits), report.rounded_down(value, digits)
    assert Decimal(down) <= Decimal(value) <= Decimal(up)
    assert Decimal(up) - Decimal(down) in (0, Decimal(1).scaleb(-digits))
    assert all(len(text.partition(".")[2]) == digits for text in (up, down))


def test_an_infinite_number_is_read_as_one() -> None:
    assert report.rounded_up(math.inf, 3) == "inf" and report.rounded_down(math.nan, 3) == "nan"


OUTPUTS: dict[str, tuple[str, str]] = {
    "a folder in its place": ("taken", "a folder"),
    "a file above it": ("file/metrics.json", "Choose another folder"),
    "no folder to be made": ("/proc/none/metrics.json", "Choose another folder"),
    "a folder that nobody can write to": ("/proc/metrics.json", "Choose another folder"),
}


@pytest.mark.parametrize(("path", "says"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_that_cannot_be_written_are_refused_beforehand(
    tmp_path: Path, path: str, says: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot write .*{says}"):
        report.check_outputs(tmp_path / path)


@pytest.mark.parametrize("reports", [0, 1, 3])
def test_the_plot_is_an_image_with_both_lines(tmp_path: Path, reports: int) -> None:
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "training.png"
    report.write_plot(path, CONFIG, DATASET, RESULT._replace(history=RESULT.history[:reports]))
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[:2] == (600, 1050)
    for colour in ([0x1F, 0x77, 0xB4], [0xFF, 0x7F, 0x0E]):  # accuracy blue, ε orange
        near = np.abs(pixels - np.array(colour) / 255).max(axis=-1) < 0.02
        assert near.sum() > 50
