"""The training loop: draws, charges, steps, reports, checkpoints, and stops at the budget."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxdp.accounting import AccountantName, Draws, Ledger, RelationName
from jaxdp.distributed import check_agreement, spread_state
from jaxdp.distributed.agreement import program_digest
from jaxdp.distributed.lost import every_process_needed
from jaxdp.sampling import Sampler
from jaxdp.training.arguments import Plan, check_objects, check_plan
from jaxdp.training.budget import Budget
from jaxdp.training.checkpoints import Checkpoints
from jaxdp.training.identity import step_draws
from jaxdp.training.loading import Data, Part, check_overflow, data_digest, loader
from jaxdp.training.logs import LogFn, log_function
from jaxdp.training.progress import progress_bar
from jaxdp.training.reports import Evaluate, Seen, report_row
from jaxdp.training.resume import begin
from jaxdp.training.run import Live, Run, can_be_read, consumed, interrupts_wait, kept
from jaxdp.training.step import Step, StepMetrics, TrainState


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
    evaluate: Evaluate | None = None,
    report_every: int | None = None,
    log_fn: str | LogFn | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
    sharding: NamedSharding | None = None,
    data_parts: int = 1,
) -> Run:
    """Trains until `steps` logical steps are executed or the next one would exceed the budget.

    Every logical step charges the ledger, before it runs, with the noise that the chain itself says
    it draws, with the scheme of the sampler that drew the batch, and with the random numbers of
    both (`Ledger.draws`). Two runs on one ledger with the same noise key or the same sampler seed
    are refused; a run that goes on from its state and ledger draws new ones.

    With `checkpoints`, the run is saved at every report, and begins where the newest checkpoint
    ended: killed at any moment and started again, it executes the same steps with the same noise
    and ends in the same state. What `ledger` holds beyond the saved one is added to it; what the
    saved one was given before is not added again, unless its draws tell that it was released once
    more: charge a release that every start makes anew, such as a clip value that is selected, with
    its draws. If `state` has
    executed as many steps as the checkpoint, the run continues from `state` and `ledger` instead:
    between two calls you may release something else, change the parameters by it, and charge it.
    Other data than that of the checkpoint is refused where `data` are arrays, all of
    which are read for it.

    An exception, Ctrl-C included, leaves state, ledger and history in reach:
    `jaxdp.training.run_of(error)`. After whole steps the run is saved where there are checkpoints,
    since whoever caught it may have seen them. Ctrl-C waits for the end of a step; pressed again,
    it acts at once.

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
      evaluate: `params -> dict of numbers`, called at every report. Its names must be others than
        those of the report.
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
      TypeError: an argument of the wrong type.
      ValueError: an argument out of range; the ledger misses steps of the state, or what the
        checkpoint holds; noise or batches that the ledger was charged with before; the data does
        not fit the sampler; a logical batch may need several physical ones but the chain has no
        `jaxdp.accumulate`; the chain draws no noise; the accountant cannot account for the
        sampler's scheme; rows that do not divide among devices or parts of the data; processes
        that differ in state, sampler, arguments, step (its clip, noise or optimizer), or in what
        they have reached at a report.
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
    check_objects(
        state,
        step,
        sampler,
        ledger=ledger,
        checkpoints=checkpoints,
        sharding=sharding,
        evaluate=evaluate,
        progress=progress,
    )
    plan = check_plan(
        sampler,
        steps=steps,
        delta=delta,
        budget=budget,
        accountant=accountant,
        relation=neighboring_relation,
        report_every=report_every,
        data_parts=data_parts,
    )
    load = loader(data, sampler, sharding, plan.data_parts)
    first = jax.process_index() == 0
    log = log_function(log_fn if first else None)
    check_overflow(state, sampler, plan.data_parts)
    where = checkpoints is not None
    check_agreement(
        state=state, sampler=sampler.to_dict(), ledger=ledger.to_json(), arguments=[*plan, where]
    )
    if sharding is not None:
        state = spread_state(state, sharding.mesh)
    # What the accountant cannot answer for fails before the first step, not at the first report.
    plan.spent(ledger.charge(1.0, sampler.scheme))
    # Where each process has a part of the data alone, none can tell for all.
    of_data = data_digest(data, sampler) if checkpoints and plan.data_parts == 1 else None
    live = Live(*begin(state, ledger, sampler, checkpoints, of_data))
    if jax.process_count() > 1:
        check_agreement(checkpoint=live.whole, charges=live.ledger.to_json())
    done = saved = int(live.whole.step)

    def save() -> None:
        nonlocal saved
        if checkpoints is not None and saved < done:
            saved = done
            with interrupts_wait():
                checkpoints.save(live.whole, live.ledger, sampler, live.history, of_data)

    def report(seen: Seen) -> None:
        if jax.process_count() > 1:
            check_agreement(parameters=live.whole.params, charges=live.ledger.to_json())
        row = report_row(live.whole, live.ledger, sampler, plan, seen, evaluate)
        live.history.append(row)
        save()
        log(dict(row))
        bar.show(epsilon=row["epsilon"])

    reported, stopped_by, seen = done, "steps", Seen.begin()
    limit = _budget(plan)
    with (
        kept(live),
        every_process_needed(_how_to_resume(checkpoints)),
        progress_bar(progress and first, total=plan.steps, done=done, budget=plan.budget) as bar,
        _saved_in_the_end(live, save),
    ):
        drawn = load(done)
        if jax.process_count() > 1:
            check_agreement(step=_program(step, live.whole, drawn[0]))
        while done < plan.steps:
            released = _as_typed(step.noise_multipliers(live.whole, drawn[0].batch))
            draws = step_draws(live.whole, sampler, done)
            if limit is not None and not limit.allows(live.ledger, released, sampler.scheme, draws):
                stopped_by = "budget"
                break
            with interrupts_wait():
                metrics = _execute(live, step, sampler, drawn, released, draws)
                done += 1
            if done < plan.steps:
                drawn = load(done)  # on the host, while the device computes the present batch
            seen = seen.add(jax.device_get(metrics))
            bar.advance(loss=seen.loss, samples_per_second=seen.samples_per_second)
            if done % plan.report_every == 0:
                report(seen)
                reported, seen = done, Seen.begin()
        if done > reported:
            report(seen)
    return Run(live.whole, live.ledger, live.history, stopped_by)


def _execute(
    live: Live,
    step: Step,
    sampler: Sampler,
    drawn: list[Part],
    released: list[float],
    draws: tuple[Draws, ...],
) -> list[StepMetrics]:
    """One logical step, charged before anything of it can be released."""
    state, before = live.whole, live.ledger
    live.ledger = before.charge(released, sampler.scheme, draws=draws)
    live.state, metrics = None, []
    try:
        for part in drawn:
            state, part_metrics = step.run(state, part.batch, part.mask, part.is_last)
            metrics.append(part_metrics)
    except BaseException:
        # A program consumes the state it is given: it did not run where the state is still there.
        if not metrics and not consumed(state):
            live.state, live.ledger = state, before
        raise
    live.state = state
    return metrics


@contextlib.contextmanager
def _saved_in_the_end(live: Live, save: Callable[[], None]) -> Iterator[None]:
    """After an exception no step is lost, Ctrl-C included. Its parameters may have been seen: to
    execute it once more, with the same noise and another chain, would show what the noise hides.
    Processes save together, so one of them alone cannot."""
    try:
        yield
    except BaseException as error:
        if can_be_read(live.state) and jax.process_count() == 1:
            try:
                save()
            except Exception as problem:  # of any kind: the user is to see the first one
                error.add_note(f"jaxdp: the run could not be saved: {problem}")
        raise


def _budget(plan: Plan) -> Budget | None:
    if plan.budget is None:
        return None
    return Budget(plan.budget, plan.delta, plan.accountant, plan.relation)


def _program(step: Step, state: TrainState, part: Part) -> str:
    """What a step computes, with the constants that its chain closes over."""
    return program_digest(step.run, state, part.batch, part.mask, part.is_last)


def _how_to_resume(checkpoints: Checkpoints | None) -> str:
    if checkpoints is None:
        return "start all of them again, with checkpoints= to resume another time"
    return (
        "start any number of them again, to resume from the newest checkpoint in "
        f"{checkpoints.directory}"
    )


def _as_typed(noise_multipliers: jax.Array) -> list[float]:
    """float32 on the device -> the decimal the user typed: 1.1, not 1.10000002384."""
    return [float(str(value)) for value in np.asarray(noise_multipliers)]
