"""`bench/accelerator.py` at sizes of a CPU: what it writes, and what becomes of failures."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxdp.engine.factors import gram, outer
from jaxdp.engine.numerics import tracing_for
from tests.bench.scripts import as_users_run_it, script
from tests.helpers import strict_json

accelerator = script("accelerator")
exactness = script("exactness")
workloads = script("workloads")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Short turns of few contestants."""
    visits = (
        ("mlp", ("flat", "vmap_grad")),
        ("lstm", ("per_layer",)),
        ("gpt2", accelerator.CLIPS),
    )
    monkeypatch.setattr(accelerator, "VISITS", visits)
    monkeypatch.setattr(accelerator, "TINY_SECONDS", 0.0)
    monkeypatch.setattr(accelerator, "ROUNDS", 2)
    monkeypatch.setattr(accelerator, "RUN_SECONDS", 0.0)
    with as_users_run_it():
        yield


def run(out: Path, *words: str) -> dict[str, Any]:
    accelerator.main(["--tiny", "--no-checks", "--out", str(out), *words])
    return strict_json(out.read_text())


@pytest.mark.parametrize(
    ("name", "unit"), [("lstm", "tokens"), pytest.param("gpt2", "tokens", marks=pytest.mark.slow)]
)
def test_every_contestant_has_its_figures(name: str, unit: str, tmp_path: Path) -> None:
    results = run(tmp_path / "found.json", "--models", "mlp", name)
    assert results["device"] == jax.devices()[0].device_kind and results["jax"] == jax.__version__
    assert set(results["models"]) == {"mlp", name}
    units = {"mlp": "images_per_second", name: f"{unit}_per_second"}
    for name, model in results["models"].items():
        assert len(model) >= 2
        assert model["non_private"]["speed"] == model["non_private"]["memory"] == 1
        for record in model.values():
            assert record[units[name]] > 0 and record["speed"] > 0 and record["memory"] > 0
            assert record["peak_bytes"] == sum(record["bytes"].values())
            assert set(record["counted"]) == {"flops", "passes", "bytes", "seconds"}
    assert set(results["models"]["mlp"]) == {"non_private", "flat", "vmap_grad"}


def test_a_failure_of_one_contestant_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = accelerator.compiled

    def compiled(workload: Any, contestant: str) -> Any:
        if contestant == "flat":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")
        return built(workload, contestant)

    monkeypatch.setattr(accelerator, "compiled", compiled)
    model = run(tmp_path / "found.json", "--models", "mlp")["models"]["mlp"]
    assert model["flat"] == {"not_run": "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"}
    assert model["vmap_grad"]["speed"] > 0


def test_what_does_not_fit_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator.Device, "memory", 10**6)
    model = run(tmp_path / "found.json", "--models", "mlp")["models"]["mlp"]
    assert model["non_private"] == {"not_run": "MemoryError: it needs 0.0 GiB of 0.0"}
    why = "there is no non-private step to compare it with"
    assert model["flat"] == model["vmap_grad"] == {"not_run": why}


def test_what_is_late_is_skipped_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(tmp_path / "found.json", "--models", "mlp", "lstm", "--minutes", "0")
    late = {"not_run": "the 0 minutes were over"}
    assert all(record == late for model in results["models"].values() for record in model.values())
    assert "lstm per_layer: skipped, the 0 minutes were over" in capsys.readouterr().out


def test_goals_are_judged(tmp_path: Path) -> None:
    bench = accelerator.Bench(1, False, tmp_path / "found.json")
    bench.results["models"]["gpt2"] = {
        "flat": {"speed": 0.98, "memory": 1.03},
        "per_layer": {"speed": 0.98, "memory": 1.03},
    }
    bench.judge()
    goals = json.loads((tmp_path / "found.json").read_text())["goals"]
    flat = "gpt2 flat: speed at least 0.97, memory at most 1.02"
    assert goals[flat] == "missed: 0.980, 1.030"
    assert goals["gpt2 per_layer: speed at least 0.98"] == "met: 0.980, 1.030"
    assert goals["lstm flat: speed at least 0.80"] == "not measured"


def test_a_clipped_sum_is_held_against_single_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exactness.check_sum("mlp", "slots")["passed"]
    rows = exactness.single_gradients("mlp")
    monkeypatch.setattr(exactness, "single_gradients", lambda name: np.abs(rows))
    assert not exactness.check_sum("mlp", "slots")["passed"]


@pytest.mark.optimized
def test_a_sample_that_adds_too_much_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Gram, bfloat16"
    with tracing_for("tpu"):
        assert exactness.check_alone(name, "fused")["passed"]
        for module in (gram, outer):
            monkeypatch.setattr(module, "weight_roundoff", lambda stored: 0.0)
        found = exactness.check_alone(name, "fused")
    assert not found["passed"] and found["worst"]["equal entries"] > 1.003
