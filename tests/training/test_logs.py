"""Where metrics go: each name, a callable, and what is said when that cannot be."""

import importlib
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxdp import training
from jaxdp.training.logs import NOT_PRIVATE, log_function, marked

ROW = {"step": 7, "epsilon": 0.5, "loss": 1.25, "test_accuracy": 0.75}
MARKED = {"step": 7, "epsilon": 0.5, "not_private/loss": 1.25, "test_accuracy": 0.75}
ROOT = Path(__file__).parents[2]


class FakeWandb(SimpleNamespace):
    """As strict as wandb 0.31: nothing can be logged before a run has begun."""

    def __init__(self) -> None:
        class Error(Exception):
            pass

        super().__init__(run=None, errors=SimpleNamespace(Error=Error), begun=[], calls=[])

    def init(self, *, project: str) -> None:
        self.begun.append(project)
        self.run = object()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self.run is None:
            raise self.errors.Error("You must call wandb.init() before wandb.log()")
        self.calls.append((metrics, step))


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


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
    assert record.getMessage() == "step=7 epsilon=0.5 not_private/loss=1.25 test_accuracy=0.75"


def test_wandb_begins_a_run_and_gets_the_row_at_its_step(fake_wandb: FakeWandb) -> None:
    log = log_function("wandb")
    assert fake_wandb.begun == ["jaxdp"]  # before anything is spent, not at the first report
    log(ROW)
    assert fake_wandb.calls == [(MARKED, 7)]
    log_function("wandb")(ROW)
    assert fake_wandb.begun == ["jaxdp"] and len(fake_wandb.calls) == 2


def test_wandb_gets_the_row_into_the_run_that_the_user_has_begun(fake_wandb: FakeWandb) -> None:
    fake_wandb.init(project="mine")
    log_function("wandb")(ROW)
    assert fake_wandb.begun == ["mine"] and fake_wandb.calls == [(MARKED, 7)]


def test_wandb_that_cannot_begin_a_run_is_one_sentence(
    fake_wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(project: str) -> None:
        raise fake_wandb.errors.Error("No API key configured.")

    monkeypatch.setattr(fake_wandb, "init", refused)
    with pytest.raises(OSError, match="cannot begin a run: No API key configured.*offline"):
        log_function("wandb")


def test_the_real_wandb_records_a_run(tmp_path: Path) -> None:
    """In a process of its own, since wandb leaves threads behind."""
    pytest.importorskip("wandb")
    script = f"from jaxdp.training.logs import log_function; log_function('wandb')({ROW})"
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    [record] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert all(name.encode() in record.read_bytes() for name in MARKED)


def test_what_is_not_private_is_marked_and_nothing_else_of_a_report() -> None:
    """The names are those that `Run.history` documents as raw."""
    document = training.Run.__doc__
    assert document is not None and "Loss, nonfinite and samples_per_second" in document
    row = {"step": 1, "epoch": 1.0, "epsilon": 0.5, "delta": 1e-5, "test_accuracy": 0.5}
    assert marked(row) == row
    raw = dict.fromkeys(NOT_PRIVATE, 1.0)
    assert set(marked(row | raw)) == {*row, *(f"not_private/{name}" for name in NOT_PRIVATE)}
    assert set(NOT_PRIVATE) == {"loss", "nonfinite", "samples_per_second"}


def test_tensorboard_gets_every_scalar_but_the_step(fake_writer: list[Any]) -> None:
    log_function("tensorboard")(ROW)
    expected = [(name, value, 7) for name, value in MARKED.items() if name != "step"]
    assert fake_writer == [*expected, ("flush",)]


def test_tensorboard_writes_an_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    log, content = log_function("tensorboard"), b""
    for _ in range(100):  # a thread of tensorboardX writes when it likes
        log(ROW)
        [events] = (tmp_path / "runs").rglob("events.out.tfevents.*")
        content = events.read_bytes()
        if all(name.encode() in content for name in MARKED if name != "step"):
            return
        time.sleep(0.1)
    raise AssertionError(f"of {MARKED} the event file holds {content!r}")


def test_all_goes_everywhere(
    fake_wandb: FakeWandb, fake_writer: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="jaxdp"):
        assert log_function("all")(ROW) is None
    assert fake_wandb.calls == [(MARKED, 7)] and ("not_private/loss", 1.25, 7) in fake_writer
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["loging", "", "WANDB"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        log_function(name)
    message = str(caught.value)
    assert repr(name) in message
    assert all(known in message for known in ("logging", "wandb", "tensorboard", "all"))


@pytest.mark.parametrize("name", [3, ["logging"], True])
def test_what_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match="log_fn must be one of"):
        log_function(name)


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
