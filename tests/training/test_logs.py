"""Where metrics go: each name, a callable, and what is said when that cannot be."""

import importlib
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxdp.training.logs import log_function

ROW = {"step": 7, "epsilon": 0.5, "loss": 1.25, "test_accuracy": 0.75}


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], int]]:
    calls: list[tuple[dict[str, Any], int]] = []
    module = SimpleNamespace(log=lambda metrics, step: calls.append((metrics, step)))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.fixture
def fake_writer(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands for tensorboardX: what was written, and "flush" once it is safe."""
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def flush(self) -> None:
            calls.append(("flush",))

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    return calls


def test_none_logs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert log_function(None)(ROW) is None
    assert capsys.readouterr() == ("", "")


def test_a_callable_gets_the_row_as_it_is() -> None:
    seen: list[Any] = []
    log_function(seen.append)(ROW)
    assert seen == [ROW]


def test_logging_writes_one_line_with_every_metric(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="jaxdp"):
        log_function("logging")(ROW)
    [record] = caplog.records
    assert (record.name, record.levelname) == ("jaxdp", "INFO")
    assert record.getMessage() == "step=7 epsilon=0.5 loss=1.25 test_accuracy=0.75"


def test_wandb_gets_the_row_at_its_step(fake_wandb: list[Any]) -> None:
    log_function("wandb")(ROW)
    assert fake_wandb == [(ROW, 7)]
    assert fake_wandb[0][0] is not ROW  # wandb may keep and change what it is given


def test_tensorboard_gets_every_scalar_but_the_step(fake_writer: list[Any]) -> None:
    log_function("tensorboard")(ROW)
    expected = [(name, value, 7) for name, value in ROW.items() if name != "step"]
    assert fake_writer == [*expected, ("flush",)]


def test_tensorboard_writes_an_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    log, content = log_function("tensorboard"), b""
    for _ in range(100):  # a thread of tensorboardX writes when it likes
        log(ROW)
        [events] = (tmp_path / "runs").rglob("events.out.tfevents.*")
        content = events.read_bytes()
        if all(name.encode() in content for name in ROW if name != "step"):
            return
        time.sleep(0.1)
    raise AssertionError(f"of {ROW} the event file holds {content!r}")


def test_all_goes_everywhere(
    fake_wandb: list[Any], fake_writer: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="jaxdp"):
        assert log_function("all")(ROW) is None
    assert fake_wandb == [(ROW, 7)] and ("loss", 1.25, 7) in fake_writer
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["loging", "", "WANDB"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        log_function(name)
    message = str(caught.value)
    assert repr(name) in message
    assert all(known in message for known in ("logging", "wandb", "tensorboard", "all"))


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("wandb", "wandb", "wandb"),
        ("tensorboard", "tensorboardX", "tensorboard"),
        ("all", "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    real = importlib.import_module

    def import_module(wanted: str, *args: Any) -> Any:
        if wanted == module:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return real(wanted, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ImportError) as caught:
        log_function(name)
    assert module in str(caught.value) and f"pip install 'jaxdp[{extra}]'" in str(caught.value)


def test_the_extras_that_messages_name_exist() -> None:
    tomllib = importlib.import_module("tomllib")
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = pyproject["project"]["optional-dependencies"]
    assert any(line.startswith("wandb") for line in extras["wandb"])
    assert any(line.startswith("tensorboardX") for line in extras["tensorboard"])
