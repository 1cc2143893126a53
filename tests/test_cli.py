"""The command line: what it prints and writes, and the one sentence it says otherwise."""

import errno
import gzip
import json
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdp import accounting, training
from jaxdp.cli import main
from jaxdp.recipes import data, report
from jaxdp.recipes.configuration import CLIP_NAMES
from tests.helpers import strict_json

ROOT = Path(__file__).parents[1]
SECRET = 987_654_321
# A few steps on the smallest data set.
SMALL = ["train", "--data", "digits", "--model", "tanh-mlp", "--epochs", "0.3", "--quiet"]
SMALL += ["--batch-size", "128", "--accountant", "rdp"]
CLIPLESS = ["--model", "lipschitz-mlp", "--clip", "none"]


@pytest.fixture(autouse=True)
def as_on_a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "300")  # so that no row of a table is folded
    # optax's cosine schedule compares its int32 step with a float.
    with jax.numpy_dtype_promotion("standard"):
        yield


def rows(text: str) -> dict[str, str]:
    """The rows of the tables that were printed."""
    found = re.findall(r"^│ (.+?) +│ (.+?) +│$", text, re.MULTILINE)
    return {name.strip(): value.strip() for name, value in found}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert main(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return rows(out)


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that is said with exit code 2."""
    try:
        code = main(list(arguments))
    except SystemExit as exit:  # argparse leaves this way
        code = exit.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith(f"jaxdp {arguments[0]}: error: ") and err.count("\n") == 1, err
    assert err.endswith("\n") and "Traceback" not in err
    return err


# epsilon and calibrate.

RUN = ["--sampling-rate", "0.04", "--steps", "250"]
EPSILONS = [
    (["--noise-multiplier", "1.1", *RUN], "3.4715"),
    (["--noise-multiplier", "1.1", *RUN, "--accountant", "rdp"], "3.8951"),
    (["--noise-multiplier", "2", "3", "4", *RUN], "1.9851"),
    (["--noise-multiplier", "2", "3", "4", *RUN, "--accountant", "rdp"], "2.1970"),
]


@pytest.mark.parametrize(("arguments", "expected"), EPSILONS)
def test_epsilon_prints_the_reference_values_rounded_up(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    printed = call(capsys, "epsilon", *arguments)
    assert printed["ε"] == expected
    assert printed["δ"] == "1e-05" and printed["steps"] == "250"
    assert "Poisson" in printed["sampling"] and "0.04" in printed["sampling"]
    assert printed["accountant"].startswith("RDP" if "rdp" in arguments else "PLD")
    assert printed["neighbours"] == "add or remove one"


def test_epsilon_of_other_neighbours_is_larger(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["epsilon", "--noise-multiplier", "1.1", *RUN]
    one, two = (
        call(capsys, *arguments, "--neighboring-relation", relation)
        for relation in ("add_or_remove_one", "replace_one")
    )
    assert float(two["ε"]) > float(one["ε"])
    assert two["neighbours"] == "replace one"


@pytest.mark.parametrize("options", [[], ["--accountant", "rdp", "--delta", "1e-6"]])
def test_calibrate_inverts_epsilon(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    calibrated = call(capsys, "calibrate", "--epsilon", "3", *RUN, *options)
    sigma = calibrated["noise multiplier"]
    spent = call(capsys, "epsilon", "--noise-multiplier", sigma, *RUN, *options)
    # σ is rounded up to four digits, and ε as well: what is printed keeps the promise.
    assert 2.99 < float(spent["ε"]) <= 3.0001
    assert calibrated["ε"] == "at most 3"


# train.


def test_train_writes_metrics_and_a_plot_and_prints_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "new" / "out"
    options = ["--seed", str(SECRET), "--epsilon", "2", "--clip", "adaptive", "--out", str(out)]
    printed = call(capsys, *SMALL, *options)

    text = (out / "metrics.json").read_text()
    metrics = strict_json(text)
    assert str(SECRET) not in text
    assert 0 <= metrics["test_accuracy"] <= 1
    assert 1.96 < metrics["epsilon"] <= 2 and metrics["delta"] == 1e-5
    assert metrics["steps"] == 3 and metrics["noise_multiplier"] > 0
    last = metrics["history"][-1]
    assert last["epsilon"] == metrics["epsilon"]
    assert last["test_accuracy"] == metrics["test_accuracy"]
    assert metrics["config"]["model"] == "tanh-mlp" and metrics["assumptions"]

    pixels = image.imread(out / "training.png")
    assert min(pixels.shape[:2]) > 300 and np.ptp(pixels[..., :3]) > 0.5

    assert printed["test accuracy"] == f"{metrics['test_accuracy']:.2%}"
    assert printed["ε"] == f"{report.rounded_up(metrics['epsilon'], 3)} (budget 2)"
    assert printed["δ"] == "1e-05" and printed["accountant"].startswith("RDP")
    assert printed["noise multiplier"] == report.rounded_down(metrics["noise_multiplier"], 4)
    assert (
        printed["gradient of one example"] == "norm at most 0.1, at first, by the clip (adaptive)"
    )
    assert "added or removed" in printed["unit of privacy"] and "Poisson" in printed["sampling"]
    assert str(out / "metrics.json") in printed["written"]


@pytest.mark.slow
def test_a_text_model_trains_on_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Better than saying "female" to every name, which is right for 78 %."""
    options = ["--model", "char-lstm", "--epochs", "3", "--seed", "0", "--out", str(tmp_path)]
    options += ["--accountant", "rdp"]
    printed = call(capsys, "train", "--quiet", *options)
    assert printed["data"].startswith("names, 4,395")
    metrics = strict_json((tmp_path / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.79
    assert 7.8 < metrics["epsilon"] <= 8


def test_a_lipschitz_model_trains_without_a_clip(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = [*CLIPLESS, "--epochs", "3", "--seed", "0", "--out", str(tmp_path)]
    printed = call(capsys, *SMALL, *options)
    metrics = strict_json((tmp_path / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.7
    assert 7.8 < metrics["epsilon"] <= 8
    assert metrics["config"]["threshold"] is None and metrics["config"]["learning_rate"] == 0.2
    guard = printed["gradient of one example"]
    assert "2.00" in guard and "nothing is clipped" in guard
    assert metrics["assumptions"]["gradient of one example"] == guard


@pytest.mark.slow
def test_train_on_several_devices_trains_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def trained(*options: str) -> Any:
        call(capsys, *SMALL, "--seed", "0", "--out", str(tmp_path), *options)
        return strict_json((tmp_path / "metrics.json").read_text())

    one, three = trained(), trained("--devices", "3")
    assert one["epsilon"] == three["epsilon"]
    assert abs(one["test_accuracy"] - three["test_accuracy"]) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("clip", CLIP_NAMES)
def test_train_knows_every_clip(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, clip: str
) -> None:
    arguments = [*SMALL, "--clip", clip, "--out", str(tmp_path), "--epsilon", "2"]
    model = ["--model", "linear", "--microbatch-size", "50"]
    call(capsys, *arguments, *(CLIPLESS if clip == "none" else model))
    metrics = strict_json((tmp_path / "metrics.json").read_text())
    assert metrics["config"]["clip"] == clip
    assert 1.96 < metrics["epsilon"] <= 2


def test_train_resumes_from_its_checkpoints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [*SMALL, "--model", "linear", "--out", str(tmp_path / "out")]
    arguments += ["--checkpoints", str(tmp_path / "checkpoints")]
    # Without a seed: it is in the checkpoint, and nowhere else.
    first = call(capsys, *arguments)
    before = strict_json((tmp_path / "out" / "metrics.json").read_text())
    assert before["assumptions"]["randomness"] == "operating system"
    saved = sorted((tmp_path / "checkpoints").glob("[!.]*"))
    assert [path.name for path in saved] == ["3"]
    assert call(capsys, *arguments) == first
    assert strict_json((tmp_path / "out" / "metrics.json").read_text()) == before


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a whole run with seed 5."""
    directory = tmp_path_factory.mktemp("run")
    out = ["--out", str(directory / "out"), "--checkpoints", str(directory / "checkpoints")]
    with jax.numpy_dtype_promotion("standard"):
        assert main([*SMALL, "--model", "linear", "--seed", "5", *out]) == 0
    return directory / "checkpoints"


# Options that make a run another one, and what the sentence names.
OTHER_RUNS: dict[str, tuple[list[str], str]] = {
    "delta": (["--delta", "1e-9"], "delta is 1e-05 there and 1e-09 here"),
    "epsilon": (["--epsilon", "4"], "epsilon is 8.0 there and 4.0 here"),
    "accountant": (["--accountant", "pld"], 'accountant is "rdp" there and "pld" here'),
    "clip": (["--clip", "automatic"], 'clip is "flat" there and "automatic" here'),
    "threshold": (["--threshold", "0.2"], "threshold is 0.1 there and 0.2 here"),
    "epochs": (["--epochs", "0.6"], "epochs is 0.3 there and 0.6 here"),
    "batch size": (["--batch-size", "100"], "batch_size is 128.0 there and 100.0 here"),
    "learning rate": (["--learning-rate", "1"], "learning_rate is 8.0 there and 1.0 here"),
    "schedule": (["--schedule", "constant"], 'schedule is "cosine" there and "constant" here'),
    "momentum": (["--momentum", "0.5"], "momentum is 0.9 there and 0.5 here"),
    "microbatch size": (["--microbatch-size", "9"], "microbatch_size is null there and 9 here"),
    "model": (["--model", "tanh-mlp"], 'model is "linear" there and "tanh-mlp" here'),
    "seed": (["--seed", "6"], "another sampler"),
    "several": (["--delta", "1e-6", "--clip", "automatic"], 'automatic" here; delta is 1e-05'),
}


@pytest.mark.parametrize(("options", "says"), OTHER_RUNS.values(), ids=OTHER_RUNS.keys())
def test_another_run_than_the_saved_one_is_refused_by_what_differs(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    checkpoints: Path,
    options: list[str],
    says: str,
) -> None:
    """Or an ε would be stated that was never true, of a σ that was never drawn."""
    run = [*SMALL, "--model", "linear", "--seed", "5", "--checkpoints", str(checkpoints)]
    assert says in refuse(capsys, *run, "--out", str(tmp_path), *options)
    assert not (tmp_path / "metrics.json").exists()


def test_a_seeded_run_is_not_resumed_as_an_unseeded_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoints: Path
) -> None:
    run = [*SMALL, "--model", "linear", "--checkpoints", str(checkpoints), "--out", str(tmp_path)]
    message = refuse(capsys, *run)
    assert 'randomness is "a given seed' in message and '"operating system" here' in message


def test_other_data_of_the_same_shape_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    digits = data.load("digits")

    def but_for_one(images: np.ndarray) -> np.ndarray:
        images = images.copy()
        images[7] = 1 - images[7]
        return images

    for name, train_x, test_x in [
        ("same", digits.train_x, digits.test_x),
        ("other", but_for_one(digits.train_x), digits.test_x),
        ("test", digits.train_x, but_for_one(digits.test_x)),
    ]:
        np.savez(
            tmp_path / f"{name}.npz",
            x_train=np.round(train_x * 255).astype(np.uint8)[..., 0],
            y_train=digits.train_y,
            x_test=np.round(test_x * 255).astype(np.uint8)[..., 0],
            y_test=digits.test_y,
        )
    run = ["train", *SMALL[3:], "--model", "linear", "--seed", "5", "--out", str(tmp_path / "out")]
    run += ["--checkpoints", str(tmp_path / "checkpoints")]
    call(capsys, *run, "--data", str(tmp_path / "same.npz"))
    message = refuse(capsys, *run, "--data", str(tmp_path / "other.npz"))
    assert 'another configuration: training_data is "' in message
    message = refuse(capsys, *run, "--data", str(tmp_path / "test.npz"))
    assert 'another configuration: test_data is "' in message


def test_what_is_stated_after_a_resume_is_what_was_executed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after two epochs of three, and the rest; against a run that nobody interrupted."""

    def run(name: str) -> list[str]:
        to = ["--out", str(tmp_path / "out"), "--checkpoints", str(tmp_path / name)]
        return [*SMALL, "--model", "linear", "--seed", "5", "--epochs", "3", *to]

    whole = call(capsys, *run("whole"))
    expected = strict_json((tmp_path / "out" / "metrics.json").read_text())
    (tmp_path / "out" / "metrics.json").unlink()

    with monkeypatch.context() as patch:
        reports = []

        def pressed(store: training.Checkpoints, *arguments: Any) -> None:
            save(store, *arguments)
            reports.append(store)
            if len(reports) == 2:
                raise KeyboardInterrupt

        save = training.Checkpoints.save
        patch.setattr(training.Checkpoints, "save", pressed)
        assert main(run("cut")) == 130
    out, err = capsys.readouterr()
    spent = f"ε {report.rounded_up(expected['history'][1]['epsilon'], 3)} at δ 1e-05"
    assert out == "" and err == (
        f"jaxdp train: interrupted; 22 steps are executed and spent, {spent}; start it again to "
        f"resume from the newest checkpoint in {tmp_path / 'cut'}\n"
    )
    assert not (tmp_path / "out" / "metrics.json").exists()

    assert call(capsys, *run("cut")) == whole
    assert strict_json((tmp_path / "out" / "metrics.json").read_text()) == expected
    assert expected["steps"] == 34 and whole["steps"] == "34 (all of them)"
    assert expected["stopped_by"] == "steps"
    assert expected["assumptions"]["randomness"].startswith("a given seed")
    [entry] = ledger_of(tmp_path / "cut").entries
    assert isinstance(entry, accounting.LedgerEntry)
    assert entry.noise_multipliers == (expected["noise_multiplier"],)
    epsilon = ledger_of(tmp_path / "cut").epsilon(1e-5, accountant="rdp")
    assert expected["epsilon"] == epsilon == expected["history"][-1]["epsilon"]


def ledger_of(directory: Path) -> accounting.Ledger:
    newest = max(directory.glob("[!.]*"), key=lambda path: int(path.name))
    return accounting.Ledger.from_json(json.loads((newest / "run.json").read_text())["ledger"])


def test_a_run_that_fails_says_what_it_has_spent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training.Checkpoints, "_write", full)
    run = [*SMALL, "--out", str(tmp_path / "out"), "--checkpoints", str(tmp_path / "checkpoints")]
    message = refuse(capsys, *run)
    assert "the checkpoint of step 3 cannot be written" in message and "No space left" in message
    assert "; 3 steps are executed and spent, ε 7.9" in message


def test_a_disk_that_fills_up_at_the_end_does_not_take_the_result(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report, "write_file", full)
    assert main([*SMALL, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert rows(out)["ε"].startswith("7.9") and "written" not in rows(out)
    assert err.count("\n") == 1 and "No space left" in err


def test_a_run_that_diverges_keeps_its_metrics(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    call(capsys, *SMALL, "--learning-rate", "1e30", "--out", str(tmp_path))
    metrics = strict_json((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 3 and 7.8 < metrics["epsilon"] <= 8


def test_out_and_checkpoints_are_two_directories(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Metrics among checkpoints would keep the run from being resumed."""
    same = ["--out", str(tmp_path / "run"), "--checkpoints", str(tmp_path / "run")]
    assert "a directory of its own" in refuse(capsys, *SMALL, *same)
    below = ["--out", str(tmp_path / "run" / "out"), "--checkpoints", str(tmp_path / "run")]
    assert "must hold checkpoints alone, got 'out'" in refuse(capsys, *SMALL, *below)


@pytest.mark.parametrize("command", [[*SMALL], ["epsilon", "--noise-multiplier", "1", "--steps"]])
def test_ctrl_c_before_anything_is_executed_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    def pressed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", pressed)
    monkeypatch.setattr(accounting, "epsilon", pressed)
    rest = ["5", "--sampling-rate", "0.1"] if command[0] == "epsilon" else []
    try:
        code = main([*command, *rest])
    except KeyboardInterrupt:  # which would end the tests as well
        pytest.fail("Ctrl-C came through")
    assert code == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"jaxdp {command[0]}: interrupted\n")


def test_ctrl_c_while_all_is_imported_shows_no_traceback(tmp_path: Path) -> None:
    """JAX is stood for by a module in whose import Ctrl-C is pressed."""
    pressed = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    (tmp_path / "jax.py").write_text(pressed)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    commands = {"module": ["-m", "jaxdp", "epsilon"], "library": ["-c", "import jaxdp"]}
    # A shell that runs the tests in the background has its children ignore Ctrl-C.
    heard = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    for name, command in commands.items():
        done = subprocess.run(
            [sys.executable, "-c", heard, *command],
            env=environment,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == -signal.SIGINT  # which a shell calls 130
        assert (b"KeyboardInterrupt" in done.stderr) == (name == "library")


def test_ctrl_c_raises_again_when_all_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["jaxdp", "epsilon", "--noise-multiplier", "-1", *RUN])
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with pytest.raises(SystemExit):
            runpy.run_module("jaxdp", run_name="__main__")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


BEHIND_STDOUT = {
    "a full disk": (">/dev/full", "[Errno 28] No space left on device"),
    "nothing": (">&-", "standard output is closed. Send it to a file or a terminal"),
    "nobody": ("| true", "nobody reads standard output. Send it to a file or a terminal"),
}


@pytest.mark.parametrize("behind", list(BEHIND_STDOUT))
def test_what_stdout_cannot_take_is_one_line(behind: str, tmp_path: Path) -> None:
    """Python itself would show a traceback when it exits, and Rich nothing."""
    redirected, message = BEHIND_STDOUT[behind]
    command = [sys.executable, "-m", "jaxdp", "epsilon", "--noise-multiplier", "1.1", *RUN]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(command)} {redirected}; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.decode() == f"jaxdp epsilon: error: {message}\n"


def test_a_long_value_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["epsilon", "--noise-multiplier", "1.1", "--steps", "9" * 5000])
    assert error.value.code == 2 and len(capsys.readouterr().err) < 400


def test_no_data_set_is_named_by_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "missing" in refuse(capsys, *SMALL, "--data", "")


# No number that can be typed ends in a traceback. Each line goes as far as the first step.

NUMBERS = [
    "1e308",
    "-1",
    "inf",
    "nan",
    "5e-324",
    "0",
    "-0.0",
    "",
    "1e-20",
    "9" * 400,
    "1e18",
    "two",
]
NUMBERS += ["2147483648", "99999999999999999999", "\u0663", "0x10", "1_0", "1,5"]
TRAIN_OPTIONS = ["--epsilon", "--delta", "--epochs", "--batch-size", "--threshold"]
TRAIN_OPTIONS += ["--learning-rate", "--momentum", "--microbatch-size", "--seed", "--devices"]
lines = st.dictionaries(
    st.sampled_from(TRAIN_OPTIONS), st.sampled_from(NUMBERS), min_size=1, max_size=3
)


@pytest.mark.parametrize("count", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_no_command_line_ends_in_a_traceback(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    def begun(*arguments: Any, **options: Any) -> None:
        raise ValueError("it would train")

    monkeypatch.setattr(training, "fit", begun)

    @settings(max_examples=count)
    @given(line=lines)
    def search(line: dict[str, str]) -> None:
        options = [part for option in line.items() for part in option]
        refuse(capsys, *SMALL, "--out", str(tmp_path), *options)

    search()


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jaxdp", "epsilon", "--noise-multiplier", "1.1", *RUN]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    good = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert (good.returncode, good.stderr) == (0, b"")
    assert "3.4715" in good.stdout.decode()


def test_the_module_hands_the_exit_code_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["jaxdp", "epsilon", "--noise-multiplier", "-1", *RUN])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("jaxdp", run_name="__main__")
    assert exit.value.code == 2


@pytest.mark.parametrize("command", [[], ["train"], ["epsilon"], ["calibrate"]])
def test_help_is_printed(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    out, err = capsys.readouterr()
    assert "usage: jaxdp" in out and err == ""


# What is refused: (how to call it, given an empty directory; what the sentence must say).


def corrupt_gzip(directory: Path) -> str:
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (directory / f"{stem}-ubyte.gz").write_bytes(gzip.compress(bytes(64))[:-9])
    return str(directory)


def corrupt_idx(directory: Path) -> str:
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (directory / f"{stem}-ubyte").write_bytes(b"\0\0\x08\x03 and then nothing")
    return str(directory)


def wrong_shape(directory: Path) -> str:
    path = directory / "set.npz"
    images = np.zeros((6, 20), np.uint8)
    np.savez(path, x_train=images, y_train=np.zeros(6, int), x_test=images, y_test=np.zeros(6, int))
    return str(path)


def a_file(directory: Path) -> str:
    path = directory / "file"
    path.write_text("in the way")
    return str(path)


Arguments = Callable[[Path], list[str]]

REFUSED: dict[str, tuple[Arguments, str]] = {
    "missing path": (lambda d: [*SMALL, "--data", str(d / "none" / "set.npz")], "does not exist"),
    "unknown data": (lambda d: [*SMALL, "--data", "mnits"], "'mnits'"),
    "empty directory": (lambda d: [*SMALL, "--data", str(d)], "is missing"),
    "corrupt gzip": (lambda d: [*SMALL, "--data", corrupt_gzip(d)], "corrupt gzip"),
    "corrupt idx": (lambda d: [*SMALL, "--data", corrupt_idx(d)], "header"),
    "wrong shape": (lambda d: [*SMALL, "--data", wrong_shape(d)], "got [6, 20]"),
    "unknown model": (lambda d: [*SMALL, "--model", "resnet"], "resnet"),
    "unknown clip": (lambda d: [*SMALL, "--clip", "soft"], "soft"),
    "no clip and no bound": (lambda d: [*SMALL, "--clip", "none"], "lipschitz-mlp, got 'tanh-mlp'"),
    "no clip but its norm": (
        lambda d: [*SMALL, *CLIPLESS, "--threshold", "0.1"],
        "threshold must be left out where nothing is clipped",
    ),
    "texts for an image model": (lambda d: ["train", "--data", "names"], "must get images"),
    "too small for the model": (lambda d: [*SMALL, "--model", "tanh-cnn"], "Use tanh-mlp"),
    "negative epsilon": (lambda d: [*SMALL, "--epsilon", "-1"], "epsilon must be"),
    "no epsilon": (lambda d: [*SMALL, "--epsilon", "nan"], "epsilon must be"),
    "delta": (lambda d: [*SMALL, "--delta", "2"], "delta must be"),
    "batch size zero": (lambda d: [*SMALL, "--batch-size", "0"], "expected_batch_size must be"),
    "batch size beyond data": (
        lambda d: [*SMALL, "--batch-size", "1439"],
        "expected_batch_size must be",
    ),
    "microbatch size zero": (lambda d: [*SMALL, "--microbatch-size", "0"], "microbatch_size must"),
    "threshold": (lambda d: [*SMALL, "--threshold", "-1"], "threshold must be"),
    "seed": (lambda d: [*SMALL, "--seed", "-1"], "seed must be"),
    "seed too large": (lambda d: [*SMALL, "--seed", str(10**20)], "seed must be"),
    "negative epochs": (lambda d: [*SMALL, "--epochs", "-3"], "epochs must be"),
    "absurd epochs": (lambda d: [*SMALL, "--epochs", "1e308"], "epochs must be"),
    "epochs beyond counting": (lambda d: [*SMALL, "--epochs", "1e30"], "2,147,483,647 steps"),
    "absurd devices": (lambda d: [*SMALL, "--devices", str(10**9)], "devices must be at most 1024"),
    "out cannot be made": (lambda d: [*SMALL, "--out", "/proc/none"], "cannot write /proc/none"),
    "out cannot be written": (lambda d: [*SMALL, "--out", "/proc"], "cannot write /proc/metrics"),
    "checkpoints cannot be written": (
        lambda d: [*SMALL, "--checkpoints", "/proc/none"],
        "cannot be written in /proc/none",
    ),
    "endless epochs": (lambda d: [*SMALL, "--epochs", "inf"], "epochs must be"),
    "no epochs": (lambda d: [*SMALL, "--epochs", "nan"], "epochs must be"),
    "no learning rate": (lambda d: [*SMALL, "--learning-rate", "nan"], "learning_rate must be"),
    "momentum": (lambda d: [*SMALL, "--momentum", "2"], "momentum must be"),
    "checkpoints are a file": (lambda d: [*SMALL, "--checkpoints", a_file(d)], "be in a directory"),
    "no number": (lambda d: [*SMALL, "--epochs", "many"], "invalid float value: 'many'"),
    "out is a file": (lambda d: [*SMALL, "--out", a_file(d)], "file"),
    "out below a file": (lambda d: [*SMALL, "--out", a_file(d) + "/out"], "file/out"),
    "epsilon: rate": (
        lambda d: ["epsilon", "--noise-multiplier", "1", "--sampling-rate", "2", "--steps", "1"],
        "sampling_rate must be",
    ),
    "epsilon: steps": (
        lambda d: ["epsilon", "--noise-multiplier", "1", "--sampling-rate", "0.1", "--steps", "-1"],
        "steps must be",
    ),
    "epsilon: noise": (
        lambda d: ["epsilon", "--noise-multiplier", "-1", *RUN],
        "noise_multiplier must be",
    ),
    "train: devices": (lambda d: [*SMALL, "--devices", "9"], "devices must be at most 8"),
    "train: no device": (lambda d: [*SMALL, "--devices", "0"], "devices must be at least 1"),
    "train: processes alone": (
        lambda d: [*SMALL, "--num-processes", "2"],
        "need a coordinator. Pass host:port of process 0",
    ),
    "epsilon: missing": (lambda d: ["epsilon", *RUN], "--noise-multiplier"),
    "epsilon: unsupported": (
        lambda d: [
            "epsilon",
            "--noise-multiplier",
            "1",
            *RUN,
            "--accountant",
            "rdp",
            "--neighboring-relation",
            "replace_one",
        ],
        "which it does not",
    ),
    "calibrate: negative epsilon": (
        lambda d: ["calibrate", "--epsilon", "-3", *RUN],
        "epsilon must be",
    ),
    "calibrate: beyond reach": (
        lambda d: ["calibrate", "--epsilon", "1e-9", *RUN, "--delta", "1e-15"],
        "epsilon must be reachable",
    ),
}


@pytest.mark.parametrize(("arguments", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: Arguments,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [*tmp_path.iterdir()]
    call = arguments(tmp_path)
    made = {*tmp_path.iterdir()} - {*before}
    assert says in refuse(capsys, *call)
    assert {*tmp_path.iterdir()} - made <= {tmp_path / "out"}  # nothing else is left behind
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("arguments", [[], ["fit"]])
def test_an_unknown_command_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert err.startswith("jaxdp: error: ") and err.count("\n") == 1


def test_a_missing_log_package_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it then fails
    message = refuse(capsys, *SMALL, "--out", str(tmp_path), "--log", "wandb")
    assert "pip install 'jaxdp[wandb]'" in message


def test_infinite_epsilon_is_a_number_people_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert math.isinf(float(call(capsys, "epsilon", "--noise-multiplier", "0", *RUN)["ε"]))
