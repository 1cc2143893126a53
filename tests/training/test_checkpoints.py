"""Checkpoints: a run that is killed at any moment and started again ends where it would have."""

import contextlib
import errno
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import training
from jaxdp.accounting import Ledger
from jaxdp.sampling import Sampler
from jaxdp.training.checkpoints import Saved
from jaxdp.training.files import seal

STEPS, REPORT_EVERY = 12, 3
DELTA = 1e-5
FEATURES, EXAMPLES = 5, 48
ROOT = Path(__file__).parents[2]

DATA = np.random.default_rng(0).normal(size=(EXAMPLES, FEATURES)).astype(np.float32)


def sampler(seed: int = 3) -> jaxdp.PoissonSampler:
    # Physical batches so small that most draws need several: a kill may come between two parts.
    return jaxdp.PoissonSampler(EXAMPLES, sampling_rate=0.25, physical_batch_size=8, seed=seed)


def loss_fn(params: dict[str, jax.Array], example: jax.Array) -> jax.Array:
    return (example @ params["w"] + params["b"] - 1.0) ** 2


def chain() -> optax.GradientTransformation:
    """Everything that has a state: an adaptive clip, accumulation, two noise keys, momentum."""
    clip = jaxdp.clip_adaptive(
        1.0, key=jax.random.key(1), count_noise_multiplier=4.0, expected_batch_size=12.0
    )
    noise = jaxdp.add_noise(lambda step: jnp.where(step < 5, 2.0, 2.25), jax.random.key(2))
    inner = optax.chain(noise, optax.scale(1 / 12), optax.sgd(0.1, momentum=0.9))
    return optax.chain(clip, jaxdp.accumulate(inner))


@functools.cache
def step() -> training.Step:
    """Compiled once for all tests."""
    return training.make_step(jaxdp.per_sample_grads(loss_fn), chain())


def initial() -> training.TrainState:
    return training.init({"w": jnp.zeros(FEATURES), "b": jnp.zeros(())}, chain())


def train(
    directory: Path | None,
    *,
    steps: int = STEPS,
    keep: int = 2,
    on_rows: Callable[[], None] = lambda: None,
    on_evaluate: Callable[[], None] = lambda: None,
) -> training.Run:
    def rows(indices: np.ndarray) -> np.ndarray:
        on_rows()
        return DATA[indices]

    def evaluate(params: Any) -> dict[str, float]:
        on_evaluate()
        return {"norm": float(optax.tree.norm(params))}

    checkpoints = None if directory is None else training.Checkpoints(directory, keep=keep)
    run = training.fit(
        initial(),
        step(),
        sampler(),
        rows,
        steps=steps,
        delta=DELTA,
        accountant="rdp",
        report_every=REPORT_EVERY,
        evaluate=evaluate,
        checkpoints=checkpoints,
        progress=False,
    )
    if checkpoints is not None:
        checkpoints.close()
    return run


# The run that is killed.


class Fuse:
    """Kills this process with SIGKILL when it has been lit `count` times."""

    def __init__(self, count: int):
        self.left = count

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main(directory: Path, where: str, count: int) -> None:
    """Trains, and dies at the count-th time that it loads rows, evaluates or touches a file, or
    after so many milliseconds."""
    fuse = Fuse(count)

    def touched(event: str, arguments: tuple[Any, ...]) -> None:
        # Python reports every open, mkdir, rename and remove before it happens.
        if event.startswith(("open", "os.")) and arguments and str(directory) in str(arguments[0]):
            fuse()

    if where == "file":
        sys.addaudithook(touched)
    if where == "clock":
        threading.Timer(count / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
    moments: dict[str, Any] = {"rows": {"on_rows": fuse}, "evaluate": {"on_evaluate": fuse}}
    train(directory, **moments.get(where, {}))
    os._exit(0)  # ahead of the clock


def killed(directory: Path, where: str, count: int) -> bool:
    """Runs `main` in a process of its own; whether it was killed."""
    command = [sys.executable, __file__, str(directory), where, str(count)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=300
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode != 0


def leaves(state: training.TrainState) -> dict[str, np.ndarray]:
    def plain(leaf: jax.Array) -> np.ndarray:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): plain(leaf) for path, leaf in flat}


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name != "samples_per_second"}
        for row in history
    ]


def assert_same(
    state: training.TrainState,
    ledger: Ledger,
    history: list[dict[str, Any]],
    expected: training.Run,
) -> None:
    """Equal bit for bit: parameters, momentum, noise keys, thresholds, ledger and history."""
    got, want = leaves(state), leaves(expected.state)
    assert got.keys() == want.keys()
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name, strict=True)
    assert ledger.to_json() == expected.ledger.to_json()
    assert timeless(history) == timeless(expected.history)


def visible(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if not path.name.startswith(".")]


def assert_saved_is(directory: Path, expected: training.Run) -> None:
    store = training.Checkpoints(directory)
    saved = store.restore(initial(), sampler())
    store.close()
    assert saved is not None and saved.report is None
    assert_same(saved.state, saved.ledger, saved.history, expected)


@pytest.fixture(scope="module")
def uninterrupted() -> training.Run:
    return train(None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run that nobody disturbed: steps 9 and 12."""
    directory = tmp_path_factory.mktemp("finished")
    train(directory)
    return directory


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(
    tmp_path: Path, uninterrupted: training.Run
) -> None:
    # Amid the second save (one touches about thirty files), between two parts of a batch, and at a
    # moment that the clock chooses; the test below has every moment of a save.
    for where, count in [("file", 45), ("rows", 9), ("clock", 1)]:
        assert killed(tmp_path, where, count)
    assert not killed(tmp_path, "never", 0)
    assert_saved_is(tmp_path, uninterrupted)


def test_what_a_killed_run_has_shown_is_saved(tmp_path: Path, uninterrupted: training.Run) -> None:
    """Killed while it evaluates step 6: to execute that step once more, with the same noise and
    another clip, say, would show what the noise hides."""
    assert killed(tmp_path, "evaluate", 2)
    saved = restored(tmp_path, sampler())
    assert saved is not None and int(saved.state.step) == saved.ledger.steps == 6
    assert saved.report is not None and [row["step"] for row in saved.history] == [3]
    assert not killed(tmp_path, "never", 0)
    assert_saved_is(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_runs_killed_at_random_moments_end_like_one_that_was_not(
    tmp_path: Path, uninterrupted: training.Run, seed: int
) -> None:
    """204 kills over all seeds; a run that comes to its end is followed by another one."""
    random = np.random.default_rng(seed)
    kills, runs = 0, 1
    while kills < 34:
        # Few enough of each to hit every part of the run, also when little of it is left.
        where = random.choice(["file", "file", "rows", "evaluate", "clock"])
        most = {"file": 60, "rows": 12, "evaluate": 4, "clock": 4000}[where]
        if killed(tmp_path / str(runs), str(where), int(random.integers(1, most))):
            kills += 1
        else:
            assert_saved_is(tmp_path / str(runs), uninterrupted)
            runs += 1
    assert not killed(tmp_path / str(runs), "never", 0)
    assert_saved_is(tmp_path / str(runs), uninterrupted)


def test_every_moment_of_a_save_leaves_a_whole_checkpoint_or_none(
    tmp_path: Path, uninterrupted: training.Run
) -> None:
    """What a kill would leave on the disk, without a process for each moment.

    The directory is copied before every file operation of a run that saves twice, keeping one.
    """
    directory, copies = tmp_path / "run", tmp_path / "copies"
    copies.mkdir()
    seen: list[Path] = []
    lock = threading.Lock()
    watching = True

    def touched(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree")
        if not (watching and changes and str(directory) in str(arguments[0])):
            return
        if directory.exists() and lock.acquire(blocking=False):
            copy = copies / str(len(seen))
            # Orbax writes from several threads: what vanishes amid the copying is not there.
            with contextlib.suppress(OSError):
                shutil.copytree(directory, copy)
            seen.append(copy)
            lock.release()

    sys.addaudithook(touched)  # for good: Python has no way to remove one
    try:
        train(directory, steps=2 * REPORT_EVERY, keep=1)
    finally:
        watching = False

    found = []
    for copy in seen:
        store = training.Checkpoints(copy)
        saved = store.restore(initial(), sampler())
        store.close()
        found.append(0 if saved is None else int(saved.state.step))
        if saved is not None:
            assert saved.ledger.steps == found[-1]
            reports = found[-1] // REPORT_EVERY
            *earlier, last = uninterrupted.history[:reports]
            told = saved.history
            if saved.report is not None:  # nobody has seen it: it is made again
                told = [*told, saved.report | {"norm": last["norm"]}]
            assert timeless(told) == timeless([*earlier, last])
    assert set(found) == {0, REPORT_EVERY, 2 * REPORT_EVERY} and found == sorted(found)


# What is refused.


@pytest.mark.parametrize(
    "other",
    [
        sampler(seed=4),
        jaxdp.PoissonSampler(EXAMPLES, sampling_rate=0.5, physical_batch_size=8, seed=3),
        jaxdp.FixedSizeSampler(EXAMPLES, batch_size=12, physical_batch_size=8, seed=3),
    ],
    ids=["seed", "rate", "kind"],
)
def test_a_checkpoint_of_another_sampler_is_refused(finished: Path, other: Sampler) -> None:
    store = training.Checkpoints(finished)
    with pytest.raises(ValueError, match="another sampler"):
        store.restore(initial(), other)
    store.close()


def test_a_checkpoint_whose_sampler_drew_other_batches_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps after the checkpoint, executed again, would have their noise on other examples."""
    monkeypatch.setattr(jaxdp.PoissonSampler, "stream", 99)
    store = training.Checkpoints(finished)
    with pytest.raises(ValueError, match="or by an earlier jaxdp with other batches"):
        store.restore(initial(), sampler())
    with pytest.raises(ValueError, match="stream must be 99 for PoissonSampler, got 10"):
        store.sampler()
    store.close()


def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(finished: Path) -> None:
    store = training.Checkpoints(finished)
    other = training.init({"w": jnp.zeros(FEATURES + 1), "b": jnp.zeros(())}, chain())
    with pytest.raises(ValueError, match="holds another model, clip or optimizer") as refused:
        store.restore(other, sampler())
    assert "\n" not in str(refused.value)
    store.close()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="checkpoints must be in a directory, got the file"):
        training.Checkpoints(tmp_path / "file")


def test_the_sampler_can_be_read_from_the_checkpoint(finished: Path, tmp_path: Path) -> None:
    for directory, expected in [(finished, sampler()), (tmp_path, None)]:
        store = training.Checkpoints(directory)
        assert store.sampler() == expected
        store.close()


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_no_checkpoint_is_refused(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep must be at least 1, got {keep}"):
        training.Checkpoints(tmp_path, keep=keep)


# What a mishap or a hand may do to a directory that holds the intact checkpoints 9 and 12: flipped
# bits, truncations, swaps, edits. Each takes the directory and what is random about it.


def files(directory: Path) -> list[Path]:
    """Those of the checkpoints; the note beside them is no part of any."""
    return sorted(
        path for path in directory.rglob("*") if path.is_file() and path.parent != directory
    )


def any_of(random: np.random.Generator, paths: list[Path]) -> Path:
    return paths[random.integers(len(paths))]


def flip(directory: Path, random: np.random.Generator) -> None:
    path = any_of(random, [path for path in files(directory) if path.stat().st_size])
    content = bytearray(path.read_bytes())
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    path.write_bytes(content)


def truncate(directory: Path, random: np.random.Generator) -> None:
    path = any_of(random, [path for path in files(directory) if path.stat().st_size])
    path.write_bytes(path.read_bytes()[: random.integers(path.stat().st_size)])


def append(directory: Path, random: np.random.Generator) -> None:
    with any_of(random, files(directory)).open("ab") as file:
        file.write(random.bytes(8))


def delete(directory: Path, random: np.random.Generator) -> None:
    any_of(random, files(directory)).unlink()


def rename(directory: Path, random: np.random.Generator) -> None:
    path = any_of(random, files(directory))
    path.rename(path.with_name(path.name + "~"))


def add(directory: Path, random: np.random.Generator) -> None:
    (any_of(random, files(directory)).parent / "extra").write_bytes(b"")


def swap(directory: Path, random: np.random.Generator) -> None:
    one, two = (any_of(random, files(directory)) for _ in range(2))
    contents = two.read_bytes(), one.read_bytes()
    one.write_bytes(contents[0])
    two.write_bytes(contents[1])


def make_a_folder_of_a_file(directory: Path, random: np.random.Generator) -> None:
    path = any_of(random, files(directory))
    path.unlink()
    path.mkdir()


def make_a_pipe_of_a_file(directory: Path, random: np.random.Generator) -> None:
    path = any_of(random, files(directory))
    path.unlink()
    os.mkfifo(path)


def make_a_file_of_a_folder(directory: Path, random: np.random.Generator) -> None:
    folder = any_of(random, sorted(path for path in directory.rglob("*") if path.is_dir()))
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def delete_a_folder(directory: Path, random: np.random.Generator) -> None:
    shutil.rmtree(any_of(random, sorted(path for path in directory.rglob("*") if path.is_dir())))


def take_from_the_other(directory: Path, random: np.random.Generator) -> None:
    """The state, the run or the listing of another step."""
    part = ("state", "run.json", "SHA256SUMS")[random.integers(3)]
    one, two = random.permutation(["9", "12"])
    source, target = directory / one / part, directory / two / part
    if source.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def rename_a_checkpoint(directory: Path, random: np.random.Generator) -> None:
    names = ("1000", "13", "0", "10", "12 (copy)", "012", "12.0", "12.x", "-12", "\u0661", "best")
    path = directory / ("9", "12")[random.integers(2)]
    path.rename(directory / names[random.integers(len(names))])


def copy_a_checkpoint(directory: Path, random: np.random.Generator) -> None:
    names = ("1000", "13", "9.1", "12 (copy)", "latest", "3")
    path = directory / ("9", "12")[random.integers(2)]
    shutil.copytree(path, directory / names[random.integers(len(names))])


def exchange_checkpoints(directory: Path, random: np.random.Generator) -> None:
    (directory / "9").rename(directory / ".other")
    (directory / "12").rename(directory / "9")
    (directory / ".other").rename(directory / "12")


def put_an_empty_one(directory: Path, random: np.random.Generator) -> None:
    (directory / str(random.integers(13, 2000))).mkdir()


def edit_the_run(directory: Path, random: np.random.Generator) -> None:
    """Claims fewer steps, or another seed, in the words of the file."""
    path = directory / "12" / "run.json"
    text = path.read_text()
    edits = [
        text.replace('\\"steps\\": 7', '\\"steps\\": 1'),
        text.replace('\\"steps\\"', '\\"steps\\": 1, \\"steps\\"'),
        text.replace('"step": 12', '"step": 9'),
        text.replace('"seed": 3', '"seed": 4'),
        text.replace('"history": [', '"history": [], "history": ['),
        text.replace('"ledger": ', '"ledger": "{}", "ledger": '),
    ]
    assert all(edit != text for edit in edits), text
    path.write_text(edits[random.integers(len(edits))])


MUTATIONS = (
    *(flip,) * 6,
    *(truncate, swap, delete) * 2,
    append,
    rename,
    add,
    make_a_folder_of_a_file,
    make_a_pipe_of_a_file,
    make_a_file_of_a_folder,
    delete_a_folder,
    take_from_the_other,
    rename_a_checkpoint,
    copy_a_checkpoint,
    exchange_checkpoints,
    put_an_empty_one,
    edit_the_run,
)


def restored(directory: Path, sampler: Sampler) -> Saved | None:
    with contextlib.closing(training.Checkpoints(directory)) as store:
        assert store.sampler() in (sampler, None)
        return store.restore(initial(), sampler)


def assert_whole_or_refused(directory: Path, intact: dict[int, Saved]) -> bool:
    """Whether it was refused, in one sentence; otherwise it is a checkpoint as it was saved."""
    try:
        saved = restored(directory, sampler())
    except (ValueError, OSError) as refused:
        assert "\n" not in str(refused) and str(directory) in str(refused), refused
        return True
    # Never the beginning: what was executed has been charged.
    assert saved is not None
    want = intact[int(saved.state.step)]
    assert saved.report == want.report
    run = training.Run(want.state, want.ledger, want.history, stopped_by="steps")
    assert_same(saved.state, saved.ledger, saved.history, run)
    return False


# Two of each kind, 400 in all; the first part by default.
PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))]


@pytest.mark.parametrize("part", PARTS)
def test_a_mutated_checkpoint_is_refused_or_as_it_was(
    tmp_path: Path, finished: Path, part: int
) -> None:
    shutil.copytree(finished, tmp_path / "nine")
    shutil.rmtree(tmp_path / "nine" / "12")
    both = (restored(finished, sampler()), restored(tmp_path / "nine", sampler()))
    intact = {int(saved.state.step): saved for saved in both if saved is not None}
    assert intact.keys() == {9, 12}
    random = np.random.default_rng(part)
    refused = []
    for number in range(2 * len(MUTATIONS)):
        mutate, directory = MUTATIONS[number % len(MUTATIONS)], tmp_path / str(number)
        shutil.copytree(finished, directory)
        mutate(directory, random)
        refused.append(assert_whole_or_refused(directory, intact))
        shutil.rmtree(directory)
    # The others hit a file that Orbax does not need, or leave the older checkpoint to begin from.
    assert sum(refused) > len(refused) / 3


def test_a_ledger_edited_to_one_step_is_refused_whoever_seals_it(
    tmp_path: Path, finished: Path
) -> None:
    """From 12 steps to 1, with a listing that vouches for it: the state has come further."""
    directory = tmp_path / "forged"
    shutil.copytree(finished, directory)
    path = directory / "12" / "run.json"
    run = json.loads(path.read_text())
    [*_, entry] = json.loads(run["ledger"])["current"]
    one = Ledger().charge(entry["noise_multipliers"], sampler().scheme)
    path.write_text(json.dumps(run | {"ledger": one.to_json()}))
    seal(directory / "12")
    with pytest.raises(ValueError, match="its state is of step 12, its ledger of 1 steps"):
        restored(directory, sampler())


def test_a_state_of_another_step_is_refused_whoever_seals_it(
    tmp_path: Path, finished: Path
) -> None:
    directory = tmp_path / "forged"
    shutil.copytree(finished, directory)
    shutil.rmtree(directory / "12" / "state")
    shutil.copytree(directory / "9" / "state", directory / "12" / "state")
    seal(directory / "12")
    with pytest.raises(ValueError, match="its state is of step 9, its ledger of 12 steps"):
        restored(directory, sampler())


def test_what_a_killed_save_leaves_behind_is_ignored(
    tmp_path: Path, finished: Path, uninterrupted: training.Run
) -> None:
    directory = tmp_path / "interrupted"
    shutil.copytree(finished, directory)
    shutil.copytree(directory / "9", directory / ".saving")
    assert_saved_is(directory, uninterrupted)
    assert not (directory / ".saving").exists()


# What is noticed before anything is spent.


def forbidden() -> None:
    raise AssertionError("nothing may be executed")


def test_a_copy_of_a_later_step_does_not_end_the_saving_unnoticed(
    tmp_path: Path, finished: Path
) -> None:
    directory = tmp_path / "copied"
    shutil.copytree(finished, directory)
    shutil.copytree(directory / "12", directory / "1000")
    says = "1000 is damaged .*of step 12.*resume from step 12"
    with pytest.raises(ValueError, match=says):
        train(directory, steps=15, on_rows=forbidden)
    with contextlib.closing(training.Checkpoints(directory)) as store:
        with pytest.raises(ValueError, match=says):
            store.sampler()
        with pytest.raises(ValueError, match=says):
            store.configuration()


def test_the_only_checkpoint_that_is_damaged_says_what_to_begin_anew_means(
    tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished / "12", tmp_path / "12")
    (tmp_path / "12" / "run.json").unlink()
    with pytest.raises(ValueError, match="run.json cannot be read.*begin anew, which spends"):
        restored(tmp_path, sampler())


def test_what_appears_amid_a_run_does_not_end_it(tmp_path: Path) -> None:
    with contextlib.closing(training.Checkpoints(tmp_path)) as store:
        (tmp_path / "a note").touch()
        store.save(initial(), Ledger(), sampler(), [])
        assert store.restore(initial(), sampler()) is not None


def test_a_history_of_numbers_that_are_not_finite_is_resumed(tmp_path: Path) -> None:
    history = [{"step": 0, "loss": math.inf}, {"step": 0, "loss": math.nan, "epsilon": 0.1}]
    with contextlib.closing(training.Checkpoints(tmp_path)) as store:
        store.save(initial(), Ledger(), sampler(), history)
        saved = store.restore(initial(), sampler())
    assert saved is not None
    np.testing.assert_equal(saved.history, history)


def test_a_later_checkpoint_that_appears_amid_a_run_is_an_error(
    tmp_path: Path, finished: Path
) -> None:
    with contextlib.closing(training.Checkpoints(tmp_path)) as store:
        shutil.copytree(finished / "12", tmp_path / "12")
        with pytest.raises(ValueError, match="holds a checkpoint of step 12, .* of step 0 would"):
            store.save(initial(), Ledger(), sampler(), [])


def test_two_live_runs_cannot_share_a_directory(tmp_path: Path) -> None:
    first = training.Checkpoints(tmp_path)
    with pytest.raises(OSError, match="another run has the checkpoints in .* open"):
        training.Checkpoints(tmp_path)
    first.close()
    second = training.Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="checkpoints must be open, got closed ones"):
        first.save(initial(), Ledger(), sampler(), [])
    del second  # as when a script forgets to close
    training.Checkpoints(tmp_path).close()


def test_a_directory_that_cannot_be_written_is_noticed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever the tests run as may write everywhere, so the system's refusal is acted."""
    (tmp_path / ".lock").touch()  # one that was there before says nothing
    mkdir = Path.mkdir

    def refused(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == ".saving":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OSError, match="cannot be written in .*Read-only file system"):
        training.Checkpoints(tmp_path)
    with pytest.raises(OSError, match="checkpoints cannot be written in /proc/none"):
        training.Checkpoints("/proc/none")


def test_a_save_that_fails_is_one_sentence_and_spares_the_older_checkpoints(
    tmp_path: Path, finished: Path, uninterrupted: training.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "full"
    shutil.copytree(finished, directory)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with contextlib.closing(training.Checkpoints(directory)) as store:
        monkeypatch.setattr(os, "fsync", full)
        ledger = uninterrupted.ledger
        with pytest.raises(OSError, match="step 12 cannot be written in .*No space left") as failed:
            store.save(uninterrupted.state, ledger, sampler(), [])
        assert "\n" not in str(failed.value)
        monkeypatch.undo()
    assert_saved_is(directory, uninterrupted)


def test_steps_that_were_not_charged_are_not_saved(
    tmp_path: Path, uninterrupted: training.Run
) -> None:
    with contextlib.closing(training.Checkpoints(tmp_path)) as store:
        with pytest.raises(ValueError, match="got 0 steps for a state after 12"):
            store.save(uninterrupted.state, Ledger(), sampler(), [])
        assert store.restore(initial(), sampler()) is None


@pytest.mark.parametrize("name", ["notes.txt", "12 (copy)", "15.orbax-checkpoint-tmp", "best"])
def test_a_directory_of_other_things_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="must hold checkpoints alone, got .*Move it away"):
        training.Checkpoints(tmp_path)
    training.Checkpoints(tmp_path / name).close()


WRONG_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "no path": ({"directory": 3}, "directory must be a path, got 3"),
    "a fraction": ({"keep": 1.5}, "keep must be an integer, got 1.5"),
    "a set": ({"configuration": {1, 2}}, "configuration must be data for JSON"),
    "an array": ({"configuration": {"C": np.float32(1)}}, "configuration must be data for JSON"),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG_TYPES.values(), ids=WRONG_TYPES.keys())
def test_arguments_of_other_types_are_refused(
    tmp_path: Path, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(TypeError, match=says):
        training.Checkpoints(**{"directory": tmp_path / "new", **arguments})
    assert not (tmp_path / "new").exists()


# What a run was, beside its state.

CONFIGURATION = {"clip": "flat", "threshold": 0.1, "model": {"width": 3, "name": "mlp"}}
OTHERS: list[tuple[Any, str]] = [
    (CONFIGURATION | {"threshold": 0.2}, "threshold is 0.1 there and 0.2 here"),
    (CONFIGURATION | {"clip": None}, 'clip is "flat" there and null here'),
    (CONFIGURATION | {"threshold": 1}, "threshold is 0.1 there and 1 here"),
    (CONFIGURATION | {"new": True}, "new is null there and true here"),
    (CONFIGURATION | {"model": {"width": 4, "name": "mlp"}}, "width is 3 there and 4 here"),
    (None, "configuration is .* there and null here"),
    ([1, 2], r"configuration is .* there and \[1, 2\] here"),
]


@pytest.mark.parametrize(("other", "says"), OTHERS)
def test_a_checkpoint_of_another_configuration_is_refused_by_what_differs(
    tmp_path: Path, other: Any, says: str
) -> None:
    with contextlib.closing(training.Checkpoints(tmp_path, configuration=CONFIGURATION)) as store:
        assert store.configuration() is None
        store.save(initial(), Ledger(), sampler(), [])
        assert store.configuration() == CONFIGURATION
        assert store.restore(initial(), sampler()) is not None
    with contextlib.closing(training.Checkpoints(tmp_path, configuration=other)) as store:
        assert store.configuration() == CONFIGURATION
        with pytest.raises(ValueError, match=f"another configuration: {says}"):
            store.restore(initial(), sampler())


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    more = Ledger().charge_pure(0.5)
    with contextlib.closing(training.Checkpoints(tmp_path, keep=2)) as store:
        for ledger in (Ledger(), more, more.charge_pure(0.25)):
            store.save(initial(), ledger, sampler(), [])
        assert sorted(visible(tmp_path)) == ["0.1", "0.2"]
        saved = store.restore(initial(), sampler())
    assert saved is not None and saved.ledger == more.charge_pure(0.25)


# What a checkpoint is for.


def test_keeping_one_keeps_the_newest(tmp_path: Path, uninterrupted: training.Run) -> None:
    train(tmp_path, keep=1)
    assert visible(tmp_path) == [str(STEPS)]
    assert_saved_is(tmp_path, uninterrupted)


def test_an_empty_directory_holds_no_checkpoint(tmp_path: Path) -> None:
    store = training.Checkpoints(tmp_path / "new")
    assert store.restore(initial(), sampler()) is None
    store.close()


def test_a_finished_run_started_again_does_nothing(
    finished: Path, uninterrupted: training.Run
) -> None:
    before = sorted(visible(finished))
    run = train(finished, on_evaluate=forbidden)
    assert run.stopped_by == "steps"
    assert_same(run.state, run.ledger, run.history, uninterrupted)
    assert sorted(visible(finished)) == before


def test_a_run_goes_on_from_its_checkpoint_to_more_steps(
    tmp_path: Path, uninterrupted: training.Run
) -> None:
    train(tmp_path, steps=6)
    run = train(tmp_path)
    assert_same(run.state, run.ledger, run.history, uninterrupted)


def test_what_was_released_after_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    """To begin at the checkpoint again would undo the release and forget its charge."""
    first = train(tmp_path, steps=6)
    state = first.state._replace(params={"w": jnp.ones(FEATURES), "b": jnp.ones(())})
    ledger, store = first.ledger.charge_pure(0.5), training.Checkpoints(tmp_path)

    def go_on(state: training.TrainState, ledger: Ledger, steps: int) -> training.Run:
        return training.fit(
            state,
            step(),
            sampler(),
            DATA,
            steps=steps,
            delta=DELTA,
            accountant="rdp",
            ledger=ledger,
            report_every=REPORT_EVERY,
            checkpoints=store,
            progress=False,
        )

    run = go_on(state, ledger, 6)
    assert run.ledger == ledger and run.history == first.history
    assert float(run.state.params["b"]) == 1
    run = go_on(run.state, run.ledger, 9)
    again = go_on(initial(), Ledger(), 9)
    store.close()
    assert run.ledger.entries[:-1] == ledger.entries
    assert_same(again.state, again.ledger, again.history, run)


def test_a_saved_state_outlives_the_steps_that_reuse_its_buffers(tmp_path: Path) -> None:
    """A step donates the state that was just saved: what is on the disk must be a copy of then."""
    run = train(tmp_path, steps=3)
    at_three = leaves(run.state)
    train(tmp_path, steps=6)
    shutil.rmtree(tmp_path / "6")
    store = training.Checkpoints(tmp_path)
    saved = store.restore(initial(), sampler())
    store.close()
    assert saved is not None
    for name, leaf in leaves(saved.state).items():
        np.testing.assert_array_equal(leaf, at_three[name], err_msg=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
