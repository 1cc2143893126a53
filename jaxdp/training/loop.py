"""The training loop: draws, steps, charges, reports, checkpoints, and stops at the budget."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxdp.accounting import AccountantName, Ledger, RelationName
from jaxdp.accumulation import AccumulateState
from jaxdp.distributed import check_agreement, spread_rows, spread_state
from jaxdp.distributed.lost import every_process_needed
from jaxdp.engine.sharded import row_sharding
from jaxdp.sampling import Sampler
from jaxdp.training.budget import Budget
from jaxdp.training.checkpoints import Checkpoints, Saved
from jaxdp.training.logs import LogFn, log_function
from jaxdp.training.progress import progress_bar
from jaxdp.training.step import Step, StepMetrics, TrainState

# A pytree of host arrays [num_examples, ...], or a function from indices [P] to a batch [P, ...].
Data = Any | Callable[[np.ndarray], Any]


class Run(NamedTuple):
    """What `fit` leaves behind.

    Attributes:
      state: after the last step.
      ledger: what was executed, from the first step on.
      history: one dict per report: step, epoch, epsilon, delta, loss, nonfinite,
        samples_per_second, and what `evaluate` returned. Loss, nonfinite and samples_per_second
        come from raw training data and are NOT private.
      stopped_by: "steps" or "budget".
    """

    state: TrainState
    ledger: Ledger
    history: list[dict[str, Any]]
    stopped_by: str


def fit(
    state: TrainState,
    step: Step,
    sampler: Sampler,
    data: Data,
    *,
    steps: int,
    delta: float,
    budget: float | None = None,
    accountant: AccountantName = "pld",
    neighboring_relation: RelationName = "add_or_remove_one",
    ledger: Ledger = Ledger(),  # noqa: B008 - immutable
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    report_every: int | None = None,
    log_fn: str | LogFn | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
    sharding: NamedSharding | None = None,
    data_parts: int = 1,
) -> Run:
    """Trains until `steps` logical steps are executed or the next one would exceed the budget.

    Every logical step charges the ledger with the noise that the chain itself says it draws, and
    with the scheme of the sampler that drew the batch. With `checkpoints`, the run is saved at
    every report, and begins where the newest checkpoint ended: killed at any moment and started
    again, it executes the same steps with the same noise and ends in the same state. A state that
    has come as far as the checkpoint is continued as it is given, with its ledger: between two
    calls you may release something else, change the parameters by it, and charge it.

    Args:
      state: from `training.init`; consumed.
      step: from `training.make_step`.
      sampler: draws the batches, one draw per logical step.
      data: pytree of arrays `[sampler.num_examples, ...]`, or a function that loads the rows of
        an index array `[P]`.
      steps: total number of logical steps, those before a resume included.
      delta: δ in (0, 1), for what is reported and for the budget.
      budget: ε that must not be exceeded, or None.
      accountant: "pld" or "rdp".
      neighboring_relation: "add_or_remove_one" or "replace_one".
      ledger: what the data has been charged with before; where `state` comes from an earlier
        `fit`, the ledger of that run.
      evaluate: `params -> dict of numbers`, called at every report.
      report_every: logical steps between reports; default one epoch.
      log_fn: "logging", "wandb", "tensorboard", "all" or a callable; gets each report.
      checkpoints: where to save and resume.
      progress: show a bar with ε spent, loss and throughput.
      sharding: of the rows of a physical batch over several devices, of all processes of
        `jax.distributed` together: `jaxdp.distributed.data_parallel()`. The state goes to all of
        them, but for leaves that are spread over the mesh already. Every process runs the same
        script; each loads the rows of its own devices, and the first one alone reports.
      data_parts: in how many parts the data is kept, where a process can load its own part only
        (`Sampler.part`): `jax.process_count()` then.

    Returns:
      The `Run`.

    Raises:
      ValueError: a count out of range; the ledger misses steps of the state; the data does not
        fit the sampler; a logical batch may need several physical ones but the chain has no
        `jaxdp.accumulate`; the chain draws no noise; the accountant cannot account for the
        sampler's scheme; rows that do not divide among devices or parts of the data; processes
        that differ in state, sampler or arguments.
      ProcessLost: another process of the job has ended.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxdp
      >>> from jaxdp.training import init, make_step
      >>> loss_fn = lambda params, example: (params @ example) ** 2
      >>> sampler = jaxdp.PoissonSampler(100, expected_batch_size=10, seed=0)
      >>> tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(optax.chain(
      ...     jaxdp.add_noise(2.0, jax.random.key(0)), optax.sgd(0.1 / 10))))
      >>> run = fit(init(jnp.ones(3), tx), make_step(jaxdp.per_sample_grads(loss_fn), tx),
      ...           sampler, np.ones((100, 3), np.float32), steps=20, delta=1e-5, progress=False)
      >>> run.ledger.steps, [round(row["epsilon"], 2) for row in run.history]
      (20, [0.8, 1.08])
    """
    load = _loader(data, sampler, sharding, data_parts)
    first = jax.process_index() == 0
    log = log_function(log_fn if first else None)
    limit = None if budget is None else Budget(budget, delta, accountant, neighboring_relation)
    if report_every is None:
        report_every = max(round(sampler.num_examples / sampler.expected_batch_size), 1)
    _check_counts(steps, report_every)
    _check_overflow(state, sampler, data_parts)
    plan = [steps, delta, budget, accountant, neighboring_relation, report_every, data_parts]
    check_agreement(
        state=state, sampler=sampler.to_dict(), ledger=ledger.to_json(), arguments=plan
    )
    if sharding is not None:
        state = spread_state(state, sharding.mesh)

    def spent(ledger: Ledger) -> float:
        return ledger.epsilon(
            delta, accountant=accountant, neighboring_relation=neighboring_relation
        )

    # What the accountant cannot answer for fails before the first step, not at the first report.
    spent(ledger.charge(1.0, sampler.scheme))
    state, ledger, history = _begin(state, ledger, sampler, checkpoints)

    def report(seen: _Seen) -> None:
        epsilon = spent(ledger)
        epoch = done * sampler.expected_batch_size / sampler.num_examples
        row = {"step": done, "epoch": epoch, "epsilon": epsilon, "delta": delta, **seen.summary()}
        if evaluate is not None:
            row |= {name: float(value) for name, value in evaluate(state.params).items()}
        history.append(row)
        if checkpoints is not None:
            checkpoints.save(state, ledger, sampler, history)
        log(row)
        bar.show(epsilon=epsilon)

    done, reported, stopped_by, seen = int(state.step), int(state.step), "steps", _Seen.begin()
    with every_process_needed(_how_to_resume(checkpoints)), progress_bar(
        progress and first, total=steps, done=done, budget=budget
    ) as bar:
        drawn = load(done)
        while done < steps:
            released = _as_typed(step.noise_multipliers(state, drawn[0].batch))
            if limit is not None and not limit.allows(ledger, released, sampler.scheme):
                stopped_by = "budget"
                break
            metrics = []
            for part in drawn:
                state, part_metrics = step.run(state, part.batch, part.mask, part.is_last)
                metrics.append(part_metrics)
            done += 1
            ledger = ledger.charge(released, sampler.scheme)
            if done < steps:
                drawn = load(done)  # on the host, while the device computes the present batch
            seen = seen.add(jax.device_get(metrics))
            bar.advance(loss=seen.loss, samples_per_second=seen.samples_per_second)
            if done % report_every == 0:
                report(seen)
                reported, seen = done, _Seen.begin()
        if done > reported:
            report(seen)
    return Run(state, ledger, history, stopped_by)


def _how_to_resume(checkpoints: Checkpoints | None) -> str:
    if checkpoints is None:
        return "start all of them again, with checkpoints= to resume another time"
    return (
        "start any number of them again, to resume from the newest checkpoint in "
        f"{checkpoints.directory}"
    )


class _Part(NamedTuple):
    """A physical batch with its data."""

    batch: Any
    mask: np.ndarray | jax.Array
    is_last: bool


class _Seen(NamedTuple):
    """Sums since the last report."""

    loss_sum: float
    samples: int
    nonfinite: int
    since: float

    @classmethod
    def begin(cls) -> "_Seen":
        return cls(0.0, 0, 0, time.perf_counter())

    def add(self, metrics: Iterable[StepMetrics]) -> "_Seen":
        loss_sum, samples, nonfinite = self[:3]
        for part in metrics:
            loss_sum += float(part.loss_sum)
            samples += int(part.samples)
            nonfinite += int(part.nonfinite)
        return _Seen(loss_sum, samples, nonfinite, self.since)

    @property
    def loss(self) -> float:
        return self.loss_sum / max(self.samples, 1)

    @property
    def samples_per_second(self) -> float:
        return self.samples / max(time.perf_counter() - self.since, 1e-9)

    def summary(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "nonfinite": self.nonfinite,
            "samples_per_second": self.samples_per_second,
        }


def _as_typed(noise_multipliers: jax.Array) -> list[float]:
    """float32 on the device -> the decimal the user typed: 1.1, not 1.10000002384."""
    return [float(str(value)) for value in np.asarray(noise_multipliers)]


def _loader(
    data: Data, sampler: Sampler, sharding: NamedSharding | None, data_parts: int
) -> Callable[[int], list[_Part]]:
    """`logical step -> its physical batches`, checked against the sampler."""
    if not callable(data):
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
        if sizes != {(sampler.num_examples,)}:
            raise ValueError(
                f"every leaf of data must hold the {sampler.num_examples} examples that the "
                f"sampler draws from and the ledger accounts for, got leading axes {sorted(sizes)}"
            )

    def rows(indices: np.ndarray) -> Any:
        if callable(data):
            return data(indices)
        return jax.tree.map(lambda leaf: leaf[indices], data)

    _check_shards(sampler, sharding, data_parts)

    def load(step: int) -> list[_Part]:
        drawn = sampler.draw(step, data_parts)
        if sharding is None:
            return [_Part(rows(part.indices), part.mask, part.is_last) for part in drawn]
        return [
            _Part(
                spread_rows(rows, part.indices, sharding),
                spread_rows(lambda mask: mask, part.mask, sharding),
                part.is_last,
            )
            for part in drawn
        ]

    return load


def _check_shards(sampler: Sampler, sharding: NamedSharding | None, data_parts: int) -> None:
    """A row lies on one device, and a device in one place of the data."""
    rows_at = row_sharding(np.empty(sampler.physical_batch_size), sharding)
    devices = 1 if rows_at is None else rows_at.devices
    if devices % data_parts:
        raise ValueError(
            f"data_parts must divide the {devices} devices that rows are spread over, got "
            f"{data_parts}: pass the number of processes"
        )


def _check_counts(steps: int, report_every: int) -> None:
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if report_every < 1:
        raise ValueError(f"report_every must be at least 1 step, got {report_every}")


def _begin(
    state: TrainState, ledger: Ledger, sampler: Sampler, checkpoints: Checkpoints | None
) -> Saved:
    """Where the run begins: at the newest checkpoint, or at what `fit` was given."""
    saved = None if checkpoints is None else checkpoints.restore(state, sampler)
    done = int(state.step)
    # What a state that is as far was charged with since would be lost with it.
    if saved is not None and int(saved.state.step) > done:
        return saved
    if done == 0:
        # What the data was charged with before is closed: a new run begins its own epochs.
        return Saved(state, Ledger().merge(ledger), [])
    if ledger.steps < done:
        raise ValueError(
            f"ledger must hold every step that was executed, got {ledger.steps} steps for a state "
            f"after {done}: pass ledger=run.ledger with run.state"
        )
    return Saved(state, ledger, [] if saved is None else saved.history)


def _check_overflow(state: TrainState, sampler: Sampler, data_parts: int) -> None:
    """A logical batch in several physical ones, each with its own noise, would not be the
    mechanism that the ledger is charged with."""

    def accumulates(node: Any) -> bool:
        return isinstance(node, AccumulateState)

    nodes = jax.tree.leaves(state.opt_state, is_leaf=accumulates)
    # A part of the data may hold more of a draw than its share.
    rows = sampler.physical_batch_size // data_parts
    most = min(sampler.largest_draw, len(sampler.part(data_parts - 1, data_parts)))
    if most > rows and not any(map(accumulates, nodes)):
        raise ValueError(
            f"a draw of {type(sampler).__name__} may need several physical batches of "
            f"{sampler.physical_batch_size}: put what follows the clip into jaxdp.accumulate(...), "
            f"or set physical_batch_size={sampler.num_examples}"
        )
