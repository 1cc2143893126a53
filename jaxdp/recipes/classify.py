"""The main job: train a classifier privately, from a configuration to a result."""

import contextlib
import dataclasses
import hashlib
import hmac
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdp import accounting, lipschitz, training
from jaxdp.accounting.checks import check_choice
from jaxdp.accumulation import accumulate
from jaxdp.clipping import clip_adaptive, clip_automatic, clip_flat, clip_per_layer
from jaxdp.distributed import check_agreement, data_parallel, shared_seed
from jaxdp.noise import add_noise
from jaxdp.per_sample import per_sample_grads
from jaxdp.randomness import random_key
from jaxdp.recipes.data import Dataset
from jaxdp.recipes.models import LIPSCHITZ_MODELS, Model, build
from jaxdp.sampling import PoissonSampler, Sampler
from jaxdp.schedules import checked_number
from jaxdp.training.arguments import LARGEST_STEPS
from jaxdp.training.logs import LogFn

CLIP_NAMES = ("flat", "per-layer", "automatic", "adaptive", "none")
SCHEDULE_NAMES = ("cosine", "constant")

# The noise of an adaptive clip's count, relative to the batch size: it costs next to nothing.
_COUNT_NOISE = 0.05

# Any input may come: a Lipschitz model bounds it itself.
_INPUT_BOUND = math.inf


@dataclass(frozen=True)
class Config:
    """What to train, and with which guarantee.

    Attributes:
      model: one of `recipes.models.MODEL_NAMES`.
      epsilon: ε of the whole run; the noise multiplier is calibrated to it.
      delta: δ.
      epochs: passes over the data, in expectation.
      batch_size: expected number of examples per step.
      clip: one of `CLIP_NAMES`. "none" is for Lipschitz models, whose gradients are bounded by
        what the model is.
      threshold: clip norm C of the whole gradient (initial, if adaptive); None for "none", and
        only there.
      learning_rate: of SGD with momentum, for gradients averaged over the expected batch.
      schedule: of the learning rate, one of `SCHEDULE_NAMES`; "cosine" falls to zero over the
        run, which averages the noise of the last steps away.
      momentum: in [0, 1).
      accountant: "pld" or "rdp".
      microbatch_size: per-sample gradients held at a time; None for a whole physical batch, and
        where nothing is clipped.
      seed: in [0, 2³²), for initialisation, sampling and noise. None draws all of them from the
        operating system: needed for a model that is released, since whoever knows the seed can
        subtract the noise.
    """

    model: str
    epsilon: float
    delta: float = 1e-5
    epochs: float = 20.0
    batch_size: float = 256.0
    clip: str = "flat"
    threshold: float | None = None
    learning_rate: float = 1.0
    schedule: str = "cosine"
    momentum: float = 0.9
    accountant: accounting.AccountantName = "pld"
    microbatch_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        checked_number("epochs", self.epochs)
        checked_number("learning_rate", self.learning_rate)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        check_choice("clip", self.clip, CLIP_NAMES)
        check_choice("schedule", self.schedule, SCHEDULE_NAMES)
        if self.clip != "none" and self.threshold is None:
            raise ValueError(f"threshold must be a clip norm for clip {self.clip!r}, got None")
        for field in ("threshold", "microbatch_size"):
            if self.clip == "none" and (given := getattr(self, field)) is not None:
                raise ValueError(
                    f"{field} must be left out where nothing is clipped (clip 'none'), got {given}"
                )


class Result(NamedTuple):
    """What came out.

    Attributes:
      params: trained parameters; private, they may be released.
      accuracy: on the test set, in [0, 1].
      epsilon: ε spent at `config.delta`, as the ledger says.
      noise_multiplier: σ of the gradients, as the ledger says; the smallest if there were several,
        NaN where no step was executed.
      steps: logical steps executed, as the ledger says.
      stopped_by: why no more were: "steps" or "budget".
      history: of the run, one dict per epoch.
      assumptions: what ε rests on, in words.
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
    """What decides a run and is no secret: of the seed it tells whether there is one.

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
      config: what to train.
      dataset: examples and labels.
      log_fn: as in `training.fit`.
      checkpoints: directory to save to and resume from, with the same configuration and data; or
        None.
      progress: show a bar.
      devices: over how many of this process the batches are spread; where there are several
        processes (`jaxdp.distributed.join`), over as many of each.

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
    num_devices = 1 if sharding is None else sharding.num_devices
    seed = shared_seed() if config.seed is None else config.seed
    sampler = _sampler(config, count, seed, devices=num_devices)
    steps = _steps(config, count)
    total = accounting.calibrate_noise_multiplier(
        config.epsilon,
        delta=config.delta,
        steps=steps,
        sampling=sampler.scheme,
        accountant=config.accountant,
    )
    key = random_key() if config.seed is None else jax.random.key(config.seed)
    init_key, chain_key = jax.random.split(key)
    params = jax.jit(model.init)(init_key)
    tx = _chain(config, model, total, steps, params, chain_key)
    accuracy = accuracy_fn(model, dataset.test_x, dataset.test_y)
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoints is not None:
            saved = _saved_sampler(checkpoints)
            secret = seed if saved is None else saved.seed
            if saved is not None:
                seed, least = secret if config.seed is None else seed, saved.physical_batch_size
                sampler = _sampler(config, count, seed, devices=num_devices, least=least)
            store = stack.enter_context(_opened(checkpoints, settings, training_data, secret))
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
    assumptions = _assumptions(config, model, run.state.params, dataset, sampler)
    return _result(config, run, accuracy(run.state.params), assumptions)


def _saved_sampler(checkpoints: str | Path) -> Sampler | None:
    """The sampler of the newest checkpoint, whose seed is written nowhere else."""
    with contextlib.closing(training.Checkpoints(checkpoints)) as opened:
        return opened.sampler()


def _opened(
    checkpoints: str | Path, settings: dict[str, Any], training_data: str, secret: int
) -> contextlib.closing[training.Checkpoints]:
    """The checkpoints of a run with these settings, on data of this digest."""
    # Keyed, since a refusal shows it: as it is it would tell whoever guesses one example, and knows
    # the others, that the guess is right.
    keyed = hmac.new(f"{secret}".encode(), training_data.encode(), "sha256").hexdigest()
    configuration = settings | {"training_data": keyed}
    return contextlib.closing(training.Checkpoints(checkpoints, configuration=configuration))


def _result(
    config: Config, run: training.Run, accuracy: float, assumptions: dict[str, str]
) -> Result:
    return Result(
        params=run.state.params,
        accuracy=accuracy,
        epsilon=run.ledger.epsilon(config.delta, accountant=config.accountant),
        noise_multiplier=_drawn(run.ledger),
        steps=run.ledger.steps,
        stopped_by=run.stopped_by,
        history=run.history,
        assumptions=assumptions,
    )


def _assumptions(
    config: Config, model: Model, params: Any, dataset: Dataset, sampler: PoissonSampler
) -> dict[str, str]:
    """What ε rests on, in words."""
    return {
        "gradient of one example": _bounded_by(config, model, params, dataset),
        "unit of privacy": "one training example, added or removed",
        "sampling": f"Poisson, rate {sampler.scheme.sampling_rate:.4g} per step",
        "released": "every iterate, of which this shows the test accuracy (the test set "
        "counts as public)",
        "randomness": _randomness(config),
    }


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
            f"clip 'none' needs a model whose gradients have a small bound, one of "
            f"{', '.join(LIPSCHITZ_MODELS)}, got {config.model!r}: choose such a model, or a clip"
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


def _sampler(
    config: Config, count: int, seed: int, *, devices: int, least: int | None = None
) -> PoissonSampler:
    """In physical batches of at least so many rows, which divide among devices."""
    sampler = PoissonSampler(count, expected_batch_size=config.batch_size, seed=seed)
    least = sampler.physical_batch_size if least is None else least
    rate, rows = sampler.sampling_rate, -(-least // devices) * devices
    return PoissonSampler(count, sampling_rate=rate, physical_batch_size=rows, seed=seed)


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
