"""Checkpoints: a run that is killed at any moment and started again ends where it would have."""

import contextlib
import functools
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
    """Trains, and dies at the count-th time that it loads rows, evaluates or touches a file."""
    fuse = Fuse(count)

    def touched(event: str, arguments: tuple[Any, ...]) -> None:
        # Python reports every open, mkdir, rename and remove before it happens.
        if event.startswith(("open", "os.")) and arguments and str(directory) in str(arguments[0]):
            fuse()

    if where == "file":
        sys.addaudithook(touched)
    moments: dict[str, Any] = {"rows": {"on_rows": fuse}, "evaluate": {"on_evaluate": fuse}}
    train(directory, **moments.get(where, {}))


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


def assert_saved_is(directory: Path, expected: training.Run) -> None:
    store = training.Checkpoints(directory)
    saved = store.restore(initial(), sampler())
    store.close()
    assert saved is not None
    assert_same(*saved, expected)


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
    # Amid the second save (one touches about thirty files), then between two parts of a batch.
    for where, count in [("file", 45), ("rows", 9)]:
        assert killed(tmp_path, where, count)
    assert not killed(tmp_path, "never", 0)
    assert_saved_is(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(
    tmp_path: Path, uninterrupted: training.Run, seed: int
) -> None:
    random = np.random.default_rng(seed)
    kills = 0
    while kills < 40:
        # Few enough of each to hit every part of the run, also when little of it is left.
        where = random.choice(["file", "file", "rows", "evaluate"])
        count = int(random.integers(1, {"file": 60, "rows": 12, "evaluate": 4}[where]))
        if not killed(tmp_path, str(where), count):
            break
        kills += 1
    assert kills > 0
    assert not killed(tmp_path, "never", 0)
    assert_saved_is(tmp_path, uninterrupted)


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
            assert timeless(saved.history) == timeless(uninterrupted.history[:reports])
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


def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(finished: Path) -> None:
    store = training.Checkpoints(finished)
    other = training.init({"w": jnp.zeros(FEATURES + 1), "b": jnp.zeros(())}, chain())
    with pytest.raises(ValueError, match="holds another model, clip or optimizer") as refused:
        store.restore(other, sampler())
    assert "\n" not in str(refused.value)
    store.close()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="checkpoints need a directory, got the file"):
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


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# What may lie where a checkpoint should, made of the intact checkpoints 9 and 12.
DAMAGES: dict[str, Callable[[Path], None]] = {
    "an empty directory of a later step": lambda d: (d / "15").mkdir(),
    "no state": lambda d: shutil.rmtree(d / "12" / "state"),
    "no ledger": lambda d: shutil.rmtree(d / "12" / "run"),
    "half a ledger": lambda d: truncate(d / "12" / "run" / "metadata"),
    # Damaged arrays fail, too, but in threads of Orbax that outlive the test.
    "half a description of the state": lambda d: truncate(d / "12" / "state" / "_METADATA"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_never_taken_for_a_whole_one(
    tmp_path: Path, finished: Path, damage: Callable[[Path], None]
) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(finished, directory)
    damage(directory)
    # It may say so, or go back to the intact one; never go on from a part, or from the beginning.
    store = training.Checkpoints(directory)
    try:
        saved = store.restore(initial(), sampler())
    except (ValueError, KeyError, OSError):
        return
    finally:
        store.close()
    assert saved is not None
    assert int(saved.state.step) == saved.ledger.steps == 3 * len(saved.history) == 9


def test_what_a_killed_save_leaves_behind_is_ignored(
    tmp_path: Path, finished: Path, uninterrupted: training.Run
) -> None:
    directory = tmp_path / "interrupted"
    shutil.copytree(finished, directory)
    shutil.copytree(directory / "9", directory / "15.orbax-checkpoint-tmp")
    assert_saved_is(directory, uninterrupted)


# What a checkpoint is for.


def test_keeping_one_keeps_the_newest(tmp_path: Path, uninterrupted: training.Run) -> None:
    train(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [str(STEPS)]
    assert_saved_is(tmp_path, uninterrupted)


def test_an_empty_directory_holds_no_checkpoint(tmp_path: Path) -> None:
    store = training.Checkpoints(tmp_path / "new")
    assert store.restore(initial(), sampler()) is None
    store.close()


def test_a_finished_run_started_again_does_nothing(
    finished: Path, uninterrupted: training.Run
) -> None:
    def forbidden() -> None:
        raise AssertionError("a finished run must not evaluate again")

    before = sorted(path.name for path in finished.iterdir())
    run = train(finished, on_evaluate=forbidden)
    assert run.stopped_by == "steps"
    assert_same(run.state, run.ledger, run.history, uninterrupted)
    assert sorted(path.name for path in finished.iterdir()) == before


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
