"""Several processes of `jax.distributed` on this machine, for real."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxdp.distributed import ProcessLost
from jaxdp.distributed.lost import every_process_needed
from tests.distributed import job

TIMEOUT = 300  # of a process, seconds: generous, for machines that are busy


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(*arguments: str) -> subprocess.Popen[str]:
    """A Python process of its own, without the virtual devices of the tests."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(started: list[subprocess.Popen[str]]) -> tuple[list[str], list[int]]:
    """What they said, and their exit codes."""
    try:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return said, [process.returncode for process in started]


class Processes:
    """What several processes of the job said and returned; the last one is told `last`, too."""

    def __init__(self, count: int, folder: Path, last: Any = None, **options: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self.results = [folder / f"{index}.json" for index in range(count)]
        coordinator = f"localhost:{free_port()}"
        dies = options.pop("dies", None)
        started = []
        for index in range(count):
            own = dict(options, dies_at=options.get("dies_at", 0) if index == dies else 0)
            own |= (last or {}) if index == count - 1 else {}
            setting = job.Setting(coordinator, count, index, out=str(self.results[index]), **own)
            started.append(start("-m", "tests.distributed.job", json.dumps(setting._asdict())))
        self.said, self.codes = ended(started)

    def found(self) -> list[dict[str, Any]]:
        """The results; all processes must have ended well."""
        assert self.codes == [0] * len(self.codes), "\n".join(self.said)
        return [json.loads(path.read_text()) for path in self.results]


def check_equal_to_one_device(found: list[dict[str, Any]], expected: Any) -> None:
    """To rounding; replicas to the last bit; and the ledger exactly."""
    for each in found:
        np.testing.assert_allclose(each["params"], job.flat(expected.state.params), atol=2e-6)
        assert each["params"] == found[0]["params"]
        assert each["replicas"] == 1
        assert each["ledger"] == expected.ledger.to_json()


def test_two_processes_do_what_one_device_does(tmp_path: Path) -> None:
    processes = Processes(2, tmp_path, devices=2, steps=4)
    found = processes.found()
    check_equal_to_one_device(found, job.train(steps=4))
    assert [each["reports"] for each in found] == [2, 0]
    assert "ε" in processes.said[0] and "ε" not in processes.said[1]
    # What is drawn from the operating system is one draw for all.
    assert found[0]["seed"] == found[1]["seed"] and found[0]["key"] == found[1]["key"]


@pytest.mark.slow
def test_a_killed_process_ends_the_job_which_resumes_on_another_number(tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "checkpoints")
    job_of_four = Processes(
        4, tmp_path / "4", devices=1, steps=6, checkpoints=checkpoints, dies=2, dies_at=4
    )
    assert 0 not in job_of_four.codes
    for index in (0, 1, 3):
        # JAX ends a process itself where it waits for the lost one in a way that cannot raise.
        assert re.search("another of the 4 processes|another task died", job_of_four.said[index])
    found = Processes(2, tmp_path / "2", devices=2, steps=6, checkpoints=checkpoints).found()
    check_equal_to_one_device(found, job.train(steps=6))


def on_two_processes(tmp_path: Path, *own: list[str]) -> tuple[list[str], list[int]]:
    """What two processes of the command line say, and their exit codes; each with options of its
    own."""
    arguments = ["train", "--data", "digits", "--model", "tanh-mlp", "--epochs", "0.5", "--quiet"]
    arguments += ["--batch-size", "128", "--accountant", "rdp", "--coordinator"]
    arguments += [f"localhost:{free_port()}", "--num-processes", "2"]
    return ended(
        [
            start(
                *["-m", "jaxdp", *arguments, "--process-id", str(index)],
                *["--out", str(tmp_path / str(index)), *options],
            )
            for index, options in enumerate(own)
        ]
    )


@pytest.mark.slow
def test_command_lines_that_differ_are_refused_by_what_differs(tmp_path: Path) -> None:
    said, codes = on_two_processes(tmp_path, ["--threshold", "0.1"], ["--threshold", "10"])
    assert codes == [2, 2], "\n".join(said)
    assert all("must have the same threshold, got others on some" in each for each in said)


@pytest.mark.slow
def test_the_command_line_on_two_processes(tmp_path: Path) -> None:
    said, codes = on_two_processes(tmp_path, [], [])
    assert codes == [0, 0], "\n".join(said)
    assert "Private training" in said[0] and "Private training" not in said[1]
    assert json.loads((tmp_path / "0" / "metrics.json").read_text())["epsilon"] <= 8
    assert not (tmp_path / "1" / "metrics.json").exists()


def test_a_lost_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ProcessLost, match="another of the 4 processes .* has ended.*: start all"):
        with every_process_needed("start all of them again"):
            raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    with pytest.raises(ValueError, match="of another kind"):
        with every_process_needed("start all of them again"):
            raise ValueError("of another kind")


def test_processes_that_would_draw_other_samples_are_refused(tmp_path: Path) -> None:
    processes = Processes(2, tmp_path, devices=1, steps=2, seed=None)
    assert 0 not in processes.codes
    for said in processes.said:
        assert "all processes must have the same sampler" in said
        assert "jaxdp.distributed.shared_seed()" in said


# What the last process does otherwise, and what all of them say.
DIFFERENCES: dict[str, tuple[dict[str, float], str]] = {
    # One example of that process would move the release by 20 times what the noise is made for.
    "clip": ({"clip": 10.0}, "the same step, got others on some"),
    "noise": ({"sigma": 1.6}, "the same step, got others on some"),
    "learning rate": ({"rate": 0.02}, "the same step, got others on some"),
    # Nothing tells before it has happened.
    "parameters": ({"nudge": 0.01}, "the same parameters, got others on some"),
}


@pytest.mark.parametrize(
    ("last", "says"),
    [
        pytest.param(*case, id=name, marks=[] if name == "clip" else [pytest.mark.slow])
        for name, case in DIFFERENCES.items()
    ],
)
def test_processes_that_train_otherwise_are_refused(
    tmp_path: Path, last: dict[str, float], says: str
) -> None:
    processes = Processes(2, tmp_path, last, devices=1, steps=4)
    assert 0 not in processes.codes
    for said in processes.said:
        assert f"all processes must have {says}" in said


@pytest.fixture(autouse=True)
def _plain_promotion() -> Any:
    """The processes run without the strictness of the tests; so must what they are held against."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
