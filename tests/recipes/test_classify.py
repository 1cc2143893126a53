"""The main job: whatever the clip, the run spends what it was given and says so."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from jaxdp import accounting, training
from jaxdp.recipes import classify
from jaxdp.recipes.configuration import CLIP_NAMES, Config
from jaxdp.recipes.data import Dataset

GENERATOR = np.random.default_rng(0)
CENTRES = GENERATOR.uniform(0.1, 0.9, (3, 4, 4, 1))


def images_of(labels: np.ndarray) -> np.ndarray:
    noise = GENERATOR.normal(scale=0.05, size=(len(labels), 4, 4, 1))
    return np.clip(CENTRES[labels] + noise, 0, 1).astype(np.float32)


TRAIN_Y, TEST_Y = (np.arange(size, dtype=np.int32) % 3 for size in (600, 90))
DATASET = Dataset("clouds", images_of(TRAIN_Y), TRAIN_Y, images_of(TEST_Y), TEST_Y, 3)
CONFIG = Config(
    model="linear",
    epsilon=3.0,
    epochs=4.0,
    batch_size=100.0,
    threshold=1.0,
    accountant="rdp",
    seed=1,
)
CLIPLESS: Mapping[str, Any] = {"model": "lipschitz-mlp", "clip": "none", "threshold": None}


@pytest.fixture(autouse=True)
def optax_promotes() -> Iterator[None]:
    """optax's cosine schedule compares its int32 step with a float."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def train(dataset: Dataset = DATASET, **changed: Any) -> classify.Result:
    return classify.train(dataclasses.replace(CONFIG, **changed), dataset, progress=False)


@pytest.mark.parametrize("clip", CLIP_NAMES)
def test_the_whole_budget_is_spent_and_no_more(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[training.Run] = []
    fit = training.fit

    def watched(*arguments: Any, **options: Any) -> training.Run:
        runs.append(fit(*arguments, **options))
        return runs[-1]

    monkeypatch.setattr(training, "fit", watched)
    result = train(**(CLIPLESS if clip == "none" else {"clip": clip}))
    assert result.steps == 24 and result.stopped_by == "steps"  # all that were asked for
    assert 0.98 * 3.0 <= result.epsilon <= 3.0
    assert result.accuracy > 0.9
    assert result.accuracy == result.history[-1]["test_accuracy"]
    assert result.epsilon == result.history[-1]["epsilon"]
    assert [row["epoch"] for row in result.history] == pytest.approx([1, 2, 3, 4])

    # However many releases a step makes, together they are what the budget was calibrated to.
    rate = accounting.PoissonSampling(100 / 600)
    total = accounting.calibrate_noise_multiplier(
        3.0, delta=1e-5, steps=24, sampling=rate, accountant="rdp"
    )
    [run] = runs
    [entry] = run.ledger.entries
    assert isinstance(entry, accounting.LedgerEntry)
    assert entry.sampling == rate and entry.steps == 24
    assert len(entry.noise_multipliers) == (2 if clip == "adaptive" else 1)
    combined = accounting.combined_noise_multiplier(entry.noise_multipliers)
    assert combined == pytest.approx(total, rel=1e-6)
    assert result.noise_multiplier == pytest.approx(entry.noise_multipliers[-1], rel=1e-6)


# (what is trained, what its result must say of the gradient of one example)
GUARDS = [
    ({}, "norm at most 1, by the clip (flat)"),
    ({"clip": "adaptive"}, "norm at most 1, at first, by the clip (adaptive)"),
    (CLIPLESS, "norm at most 2.00, by the weights as they are (nothing is clipped)"),
]


@pytest.mark.parametrize(("changed", "says"), GUARDS, ids=["flat", "adaptive", "none"])
def test_the_result_says_what_bounds_the_gradients(changed: dict[str, Any], says: str) -> None:
    result = train(epochs=0.3, **changed)
    assert result.assumptions["gradient of one example"] == says


def test_a_lipschitz_model_that_is_clipped_is_projected_all_the_same() -> None:
    result = train(epochs=0.3, model="lipschitz-mlp", learning_rate=30.0)
    for kernel in jax.tree.leaves(result.params):
        singular = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)
        np.testing.assert_allclose(singular, 1, atol=5e-3)


@pytest.mark.slow
def test_the_seed_decides_everything() -> None:
    first, second, other = train(epochs=0.3), train(epochs=0.3), train(epochs=0.3, seed=2)
    first_w, second_w, other_w = (run.params["Dense_0"]["kernel"] for run in (first, second, other))
    np.testing.assert_array_equal(first_w, second_w)
    assert not np.array_equal(first_w, other_w)


def test_without_a_seed_no_two_runs_are_alike() -> None:
    one, two = (train(epochs=0.3, seed=None) for _ in range(2))
    assert not np.array_equal(one.params["Dense_0"]["kernel"], two.params["Dense_0"]["kernel"])
    assert one.assumptions["randomness"] == "operating system"


@pytest.mark.slow
def test_microbatches_change_nothing_but_rounding() -> None:
    whole, parts = train(epochs=1.0), train(epochs=1.0, microbatch_size=7)
    np.testing.assert_allclose(
        whole.params["Dense_0"]["kernel"], parts.params["Dense_0"]["kernel"], rtol=1e-4, atol=1e-6
    )


def test_processes_compare_the_whole_configuration_before_anything_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Compared(Exception):
        pass

    def compare(**values: Any) -> None:
        raise Compared(values)

    def compared(dataset: Dataset = DATASET, **changed: Any) -> dict[str, Any]:
        with pytest.raises(Compared) as found:
            train(dataset, **changed)
        [values] = found.value.args
        return values

    monkeypatch.setattr(classify, "check_agreement", compare)
    monkeypatch.setattr(classify, "shared_seed", None)
    usual = compared()
    fields = {field.name for field in dataclasses.fields(Config)} - {"seed"}
    assert usual.keys() == fields | {"randomness", "test_data", "training_data"}
    assert compared(threshold=10.0) == usual | {"threshold": 10.0}
    assert compared(seed=None)["randomness"] != usual["randomness"]
    other = images_of(TRAIN_Y)
    assert compared(DATASET._replace(train_x=other)).keys() == usual.keys()
    assert compared(DATASET._replace(train_x=other))["training_data"] != usual["training_data"]


def test_what_decides_a_run_tells_neither_the_seed_nor_the_training_data() -> None:
    config = dataclasses.replace(CONFIG, seed=123_456_789)
    one = classify.configuration(config, DATASET)
    assert "123456789" not in repr(one)
    other = DATASET._replace(train_x=images_of(TRAIN_Y))
    assert classify.configuration(config, other) == one


def test_the_accuracy_is_that_of_all_test_images() -> None:
    model = classify.build("linear", (4, 4, 1), 3)
    params = model.init(jax.random.key(0))
    labels = np.arange(2500, dtype=np.int32) % 3  # more than one batch of a thousand
    images = images_of(labels)
    dense = jax.device_get(params["Dense_0"])
    guesses = (images.reshape(2500, -1) @ dense["kernel"] + dense["bias"]).argmax(axis=1)
    expected = float((guesses == labels).mean())
    assert classify.accuracy_fn(model, images, labels)(params) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": "resnet"}, "model must be .*got 'resnet'"),
        ({"model": "tanh-cnn"}, "at least 16x16"),
        ({"clip": "soft"}, "clip must be 'flat' or 'per-layer' or 'automatic' or .*got 'soft'"),
        ({"clip": "none"}, "threshold must be left out where nothing is clipped .*, got 1.0"),
        ({"threshold": None}, "threshold must be a clip norm for clip 'flat', got None"),
        ({**CLIPLESS, "microbatch_size": 8}, "microbatch_size must be left out .*, got 8"),
        ({**CLIPLESS, "model": "linear"}, "model must be one .*one of lipschitz-mlp, got 'linear'"),
        ({**CLIPLESS, "model": "tanh-mlp"}, "Choose such a model, or a clip"),
        ({"schedule": "steep"}, "schedule must be .*got 'steep'"),
        ({"epsilon": 0.0}, "epsilon must be finite, > 0"),
        ({"epsilon": -1.0}, "epsilon must be finite, > 0"),
        ({"delta": 0.0}, "delta must be finite, > 0"),
        ({"delta": 2.0}, "delta must be"),
        ({"batch_size": 0.0}, "expected_batch_size must be"),
        ({"batch_size": 601.0}, "expected_batch_size must be"),
        ({"threshold": 0.0}, "threshold must be"),
        ({"microbatch_size": 0}, "microbatch_size must be at least 1"),
        ({"seed": -1}, "seed must be"),
        ({"accountant": "moments"}, "accountant must be"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        train(**changed)
