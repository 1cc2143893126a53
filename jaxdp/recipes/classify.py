"""The main job: train a classifier privately, from a configuration to a result."""

import contextlib
import dataclasses
import hashlib
import hmac
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdp import accounting, lipschitz, training
from jaxdp.accumulation import accumulate
from jaxdp.clipping import clip_adaptive, clip_automatic, clip_flat, clip_per_layer
from jaxdp.distributed import check_agreement, data_parallel, shared_seed
from jaxdp.noise import add_noise
from jaxdp.per_sample import per_sample_grads
from jaxdp.randomness import random_key
from jaxdp.recipes.configuration import Config
from jaxdp.recipes.data import Dataset
from jaxdp.recipes.models import LIPSCHITZ_MODELS, Model, build
from jaxdp.sampling import PoissonSampler, Sampler
from jaxdp.training.arguments import LARGEST_STEPS
from jaxdp.training.logs import LogFn

# Noise of the count of an adaptive clip, relative to the batch size: it costs little privacy.
_COUNT_NOISE = 0.05

# Inputs may have any norm: a Lipschitz model bounds them itself.
_INPUT_BOUND = math.inf


class Result(NamedTuple):
    """The result of a run.

    Attributes:
      params: trained parameters; private, they may be released.
      accuracy: accuracy on the test set, in [0, 1].
      epsilon: ε spent at `config.delta`, as the ledger says.
      noise_multiplier: σ of the gradients, as the ledger says; the smallest one if there are
        several, NaN if no step was executed.
      steps: logical steps executed, as the ledger says.
      stopped_by: the reason for the end: "steps" or "budget".
      history: the reports of the run, one dict per epoch.
      assumptions: the assumptions behind ε, in words.
    """

    params: Any
    accuracy: float
    epsilon: float
    noise_multiplier: float
    steps: int
    stopped_by: str
    history: list[dict[str, Any]]
    assumptions: dict[str, str]


def configuration(config: Config, dataset: Dataset) -> dict[str, Any]:
    """The settings that decide a run, without secrets: of the seed only whether there is one.

    Returns:
      Data for JSON.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "seed"}
    test_data = _digest(dataset.test_x, dataset.test_y)
    return settings | {"randomness": _randomness(config), "test_data": test_data}


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cross_entropy(model: Model) -> Callable[[Any, tuple[jax.Array, jax.Array]], jax.Array]:
    """Loss of one (image or text, label)."""

    def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, label = example
        logits = model.apply(params, x)
        return lipschitz.softmax_cross_entropy(logits, label, temperature=model.temperature)

    return loss_fn


def accuracy_fn(model: Model, examples: np.ndarray, labels: np.ndarray) -> Callable[[Any], float]:
    """`params -> accuracy` on fixed data, in batches."""

    @jax.jit
    def correct(params: Any, examples: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jax.vmap(model.apply, (None, 0))(params, examples)
        return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    def accuracy(params: Any) -> float:
        batches = range(0, len(labels), 1000)
        hits = [correct(params, examples[i : i + 1000], labels[i : i + 1000]) for i in batches]
        return sum(map(int, hits)) / len(labels)

    return accuracy


def train(
    config: Config,
    dataset: Dataset,
    *,
    log_fn: str | LogFn | None = None,
    checkpoints: str | Path | None = None,
    progress: bool = True,
    devices: int = 1,
) -> Result:
    """Trains `config.model` on `dataset` within (ε, δ) and evaluates it after every epoch.

    Args:
      config: the model, the guarantee and the hyperparameters.
      dataset: examples and labels.
      log_fn: as in `training.fit`.
      checkpoints: directory to save to and resume from, with the same configuration and data; or
        None.
      progress: whether to show a bar.
      devices: number of devices of this process over which the batches are spread; with several
        processes (`jaxdp.distributed.join`), of each.

    Returns:
      The `Result`.

    Raises:
      ProcessLost: another process has ended.
      ValueError: the configuration does not fit the data, or cannot be private; another process or
        the checkpoint has another one.
      OSError: the checkpoints cannot be written, or another run has them open.
    """
    settings = configuration(config, dataset)
    training_data = _digest(dataset.train_x, dataset.train_y)
    check_agreement(**settings, training_data=training_data)
    model = build(config.model, dataset.train_x.shape[1:], dataset.num_classes)
    grads_fn = _grads_fn(config, model)
    count = len(dataset.train_y)
    alone = devices == 1 and jax.process_count() == 1
    sharding = None if alone else data_parallel(devices)
    rows_at = 1 if sharding is None else sharding.num_devices
    sampler = _sampler(config, count, shared_seed() if config.seed is None else config.seed)
    sampler = _divided(sampler, sampler.physical_batch_size, rows_at)
    steps = _steps(config, count)
    total = _calibrated(config, sampler, steps)
    key = random_key() if config.seed is None else jax.random.key(config.seed)
    init_key, chain_key = jax.random.split(key)
    params = jax.jit(model.init)(init_key)
    tx = _chain(config, model, total, steps, params, chain_key)
    accuracy = accuracy_fn(model, dataset.test_x, dataset.test_y)
    seed = sampler.seed
    saved = _saved_sampler(checkpoints)
    if saved is not None:
        seed = saved.seed
        sampler = _sampler(config, count, seed if config.seed is None else config.seed)
        sampler = _divided(sampler, saved.physical_batch_size, rows_at)
    # Keyed, since a refusal shows it: as it is it would tell whoever guesses one example, and knows
    # the others, that the guess is right.
    keyed = hmac.new(f"{seed}".encode(), training_data.encode(), "sha256").hexdigest()
    with _opened(checkpoints, settings | {"training_data": keyed}) as store:
        run = training.fit(
            training.init(params, tx),
            training.make_step(grads_fn, tx),
            sampler,
            (dataset.train_x, dataset.train_y),
            steps=steps,
            delta=config.delta,
            budget=config.epsilon,
            accountant=config.accountant,
            evaluate=lambda params: {"test_accuracy": accuracy(params)},
            log_fn=log_fn,
            checkpoints=store,
            progress=progress,
            sharding=sharding,
        )
    return Result(
        params=run.state.params,
        accuracy=accuracy(run.state.params),
        epsilon=run.ledger.epsilon(config.delta, accountant=config.accountant),
        noise_multiplier=_drawn(run.ledger),
        steps=run.ledger.steps,
        stopped_by=run.stopped_by,
        history=run.history,
        assumptions=_assumptions(config, sampler, model, run.state.params, dataset),
    )


def _calibrated(config: Config, sampler: PoissonSampler, steps: int) -> float:
    """The noise multiplier that spends ε in these steps."""
    return accounting.calibrate_noise_multiplier(
        config.epsilon,
        delta=config.delta,
        steps=steps,
        sampling=sampler.scheme,
        accountant=config.accountant,
    )


def _assumptions(
    config: Config, sampler: PoissonSampler, model: Model, params: Any, dataset: Dataset
) -> dict[str, str]:
    return {
        "gradient of one example": _bounded_by(config, model, params, dataset),
        "unit of privacy": "one training example, added or removed",
        "sampling": f"Poisson, rate {sampler.scheme.sampling_rate:.4g} per step",
        "released": "every iterate, of which this shows the test accuracy (the test set "
        "counts as public)",
        "randomness": _randomness(config),
    }


def _saved_sampler(checkpoints: str | Path | None) -> Sampler | None:
    """The sampler of the newest checkpoint, if there is one."""
    if checkpoints is None:
        return None
    with contextlib.closing(training.Checkpoints(checkpoints)) as opened:
        return opened.sampler()


@contextlib.contextmanager
def _opened(
    checkpoints: str | Path | None, settings: dict[str, Any]
) -> Iterator[training.Checkpoints | None]:
    """The checkpoints of a run with these settings, closed at the end; None without a directory."""
    if checkpoints is None:
        yield None
        return
    with contextlib.closing(training.Checkpoints(checkpoints, configuration=settings)) as store:
        yield store


def _randomness(config: Config) -> str:
    if config.seed is None:
        return "operating system"
    return "a given seed (an experiment: who knows it can subtract the noise)"


def _steps(config: Config, count: int) -> int:
    """How many logical steps the epochs take, at least one."""
    steps = config.epochs * count / config.batch_size
    if not steps < LARGEST_STEPS:
        raise ValueError(
            f"epochs must be fewer than make {LARGEST_STEPS:,} steps, which is as far as steps are "
            f"counted, got {config.epochs:g} of {count / config.batch_size:g} steps each. Take "
            "fewer, or a larger batch_size."
        )
    return max(round(steps), 1)


def _drawn(ledger: accounting.Ledger) -> float:
    """The smallest σ of the gradients that was drawn; an adaptive clip's count comes before it."""
    entries = [entry for entry in ledger.entries if isinstance(entry, accounting.LedgerEntry)]
    return min((entry.noise_multipliers[-1] for entry in entries), default=math.nan)


def _grads_fn(config: Config, model: Model) -> Callable[..., Any]:
    """Gradients of a batch: of each sample, for a clip, or their sum, bounded by the model."""
    if config.clip != "none":
        return per_sample_grads(cross_entropy(model), microbatch_size=config.microbatch_size)
    if model.project is None:
        raise ValueError(
            "model must be one whose gradients have a small bound for clip 'none', one of "
            f"{', '.join(LIPSCHITZ_MODELS)}, got {config.model!r}. Choose such a model, or a clip."
        )
    return lipschitz.bounded_grads(cross_entropy(model), _INPUT_BOUND, with_losses=True)


def _bounded_by(config: Config, model: Model, params: Any, dataset: Dataset) -> str:
    """What keeps one example from mattering much, in words."""
    if config.clip != "none":
        changing = ", at first" if config.clip == "adaptive" else ""
        return f"norm at most {config.threshold:g}{changing}, by the clip ({config.clip})"
    example = (dataset.train_x[0], dataset.train_y[0])  # of which only shapes matter

    @jax.jit
    def total(params: Any) -> jax.Array:
        return lipschitz.bounds(cross_entropy(model), params, example, _INPUT_BOUND).total

    return f"norm at most {total(params):#.3g}, by the weights as they are (nothing is clipped)"


def _sampler(config: Config, count: int, seed: int) -> PoissonSampler:
    return PoissonSampler(count, expected_batch_size=config.batch_size, seed=seed)


def _divided(sampler: PoissonSampler, least: int, devices: int) -> PoissonSampler:
    """The same draws in physical batches of at least so many rows, which divide among devices."""
    return PoissonSampler(
        sampler.num_examples,
        sampling_rate=sampler.sampling_rate,
        physical_batch_size=-(-least // devices) * devices,
        seed=sampler.seed,
    )


def _chain(
    config: Config, model: Model, total: float, steps: int, params: Any, key: jax.Array
) -> optax.GradientTransformation:
    """The optax chain whose step costs `total`."""
    clip_key, noise_key = jax.random.split(key)
    clip, sigma = _clip(config, total, len(jax.tree.leaves(params)), clip_key)
    behind = [
        add_noise(sigma, noise_key),
        optax.scale(1 / config.batch_size),
        optax.sgd(_learning_rate(config, steps), momentum=config.momentum or None),
    ]
    if model.project is not None:
        behind.append(lipschitz.project(model.project))
    return optax.chain(clip, accumulate(optax.chain(*behind)))


def _learning_rate(config: Config, steps: int) -> optax.ScalarOrSchedule:
    if config.schedule == "constant":
        return config.learning_rate
    return optax.cosine_decay_schedule(config.learning_rate, steps)


def _clip(
    config: Config, total: float, leaves: int, key: jax.Array
) -> tuple[optax.GradientTransformation, float]:
    """The clip, and the σ of the gradients that makes the whole step cost `total`."""
    threshold = config.threshold
    if threshold is None:
        return optax.identity(), total
    if config.clip == "flat":
        return clip_flat(threshold), total
    if config.clip == "automatic":
        return clip_automatic(threshold), total
    if config.clip == "per-layer":
        return clip_per_layer(threshold / math.sqrt(leaves)), total
    count_sigma = max(_COUNT_NOISE * config.batch_size, 2 * total)
    sigma = (total**-2 - count_sigma**-2) ** -0.5
    clip = clip_adaptive(
        threshold,
        key=key,
        count_noise_multiplier=count_sigma,
        expected_batch_size=config.batch_size,
    )
    return clip, sigma
