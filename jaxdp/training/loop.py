"""The training loop: draws, charges, steps, reports, checkpoints, and stops at the budget."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.stages import Wrapped

from jaxdp.accounting import AccountantName, Guarantee, Ledger, RelationName
from jaxdp.accounting.guarantee import as_guarantee
from jaxdp.distributed import check_agreement, spread_state
from jaxdp.distributed.agreement import program_digest
from jaxdp.distributed.lost import every_process_needed
from jaxdp.sampling import Sampler
from jaxdp.training.arguments import Plan, check_objects, check_plan
from jaxdp.training.bar import Bar, progress_bar
from jaxdp.training.budget import Budget
from jaxdp.training.charges import Charge, Charges
from jaxdp.training.checkpoints import Checkpoints
from jaxdp.training.identity import check_charged
from jaxdp.training.loading import Data, LoadedBatch, check_overflow, data_digest, loader
from jaxdp.training.logs import LogFn, log_function
from jaxdp.training.reports import Evaluate, Totals, evaluated, report_row
from jaxdp.training.resume import begin
from jaxdp.training.run import Due, Progress, Run, can_be_read, interrupts_wait, kept
from jaxdp.training.step import Step, StepMetrics, TrainState
from jaxdp.training.watch import IN_FLIGHT, Watch, settled


def fit(
    state: TrainState,
    step: Step,
    sampler: Sampler,
    data: Data,
    *,
    steps: int,
    delta: float | Guarantee,
    budget: float | None = None,
    accountant: AccountantName | None = None,
    neighboring_relation: RelationName | None = None,
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
    are refused; a run that goes on from its state and ledger draws new ones. The first step is
    compiled ahead of its charge; once a step is charged, whatever it raises, it stays charged. Up
    to two steps are charged and begun while one is under way. What every step released, with which
    noise, is held against what it was charged with, before anybody sees a report and however the
    run ends: all that was not charged is charged then, and the run ends.

    With `checkpoints`, the run is saved at every report, before anything of it is shown, and begins
    where the newest checkpoint ended: killed at any moment and started again, it executes the same
    steps with the same noise and ends in the same state and history. A report that nobody may have
    seen is made again first. What `ledger` holds beyond the saved one is added to it, and what both
    hold counts once (`jaxdp.accounting.union`): charge a release that every start makes anew, such
    as a clip value that is selected, with its draws. If `state` has executed as many steps as the
    checkpoint, the run continues from `state` and `ledger` instead: between two calls you may
    release something else, change the parameters by it, and charge it. Other data than that of the
    checkpoint is refused where `data` are arrays, all of which are read for it.

    An exception, Ctrl-C included, leaves state, ledger and history in reach:
    `jaxdp.training.run_of(error)`. After whole steps the run is saved where there are checkpoints,
    since whoever caught it may have seen them. Ctrl-C waits for the end of a step; pressed again,
    it acts at once.

    Args:
      state: from `training.init`, or between two logical batches; consumed.
      step: from `training.make_step`.
      sampler: draws the batches, one draw per logical step.
      data: pytree of arrays `[sampler.num_examples, ...]`, or a function that loads the rows of
        an index array `[P]`.
      steps: total number of logical steps, those before a resume included.
      delta: δ in (0, 1), for what is reported and for the budget; or a
        `jaxdp.accounting.Guarantee`, which names accountant and relation as well.
      budget: ε that must not be exceeded, or None.
      accountant: "pld", the default, or "rdp".
      neighboring_relation: "add_or_remove_one", the default, or "replace_one".
      ledger: what the data has been charged with before; where `state` comes from an earlier
        `fit`, the ledger of that run.
      evaluate: `params -> dict of numbers`, called at every report. Its names must be others than
        those of the report. The parameters are a copy, to be kept or given away.
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
      ValueError: an argument out of range; a state amid a logical batch; the ledger misses steps of
        the state, or what the checkpoint holds, or nobody can tell whether it does; noise or
        batches that the ledger was charged with before; the data does not fit the sampler; a
        logical batch may need several physical ones but the chain has no `jaxdp.accumulate`; the
        chain draws no noise; the accountant cannot account for the sampler's scheme; rows that do
        not divide among devices or parts of the data; processes that differ in state, sampler,
        arguments, step (its clip, noise or optimizer), or in what they have reached at a report; a
        step released other noise than it was charged with.
      ProcessLost: another process of the job has ended.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax, jaxdp
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
        guarantee=as_guarantee(delta, accountant, neighboring_relation),
        budget=budget,
        report_every=report_every,
        data_parts=data_parts,
    )
    load = loader(data, sampler, sharding, plan.data_parts)
    first = jax.process_index() == 0
    log, is_shown = log_function(log_fn if first else None), progress and first
    check_overflow(state, sampler, plan.data_parts)
    _check_same_everywhere(state, sampler, ledger, plan, checkpoints)
    if sharding is not None:
        state = spread_state(state, sharding.mesh)
    # What the accountant cannot answer for fails before the first step, not at the first report.
    plan.spent(ledger.charge(1.0, sampler.scheme))
    # Where each process has a part of the data alone, none can tell for all.
    of_data = data_digest(data, sampler) if checkpoints and plan.data_parts == 1 else None
    run = begin(state, ledger, sampler, checkpoints, of_data)
    _check_same_begin(run)
    with (
        kept(run),
        every_process_needed(_how_to_resume(checkpoints)),
        progress_bar(is_shown, total=plan.steps, done=run.done, budget=plan.budget) as bar,
    ):
        loop = _Loop(step, sampler, plan, load, checkpoints, of_data, evaluate, log, bar)
        watch = Watch(run)
        with _saved_in_the_end(run, loop, watch):
            _catch_up(run, loop)
            stopped_by = _executed(run, loop, watch)
    return Run(run.whole, run.ledger, run.history, stopped_by)


class _Loop(NamedTuple):
    """What stays the same while a run goes on: see the arguments of `fit`.

    Attributes:
      load: `logical step -> its physical batches`.
      data: a digest of what it trains on, where there is one.
      log: where reports go.
      bar: where they are shown.
    """

    step: Step
    sampler: Sampler
    plan: Plan
    load: Callable[[int], list[LoadedBatch]]
    checkpoints: Checkpoints | None
    data: str | None
    evaluate: Evaluate | None
    log: LogFn
    bar: Bar


def _check_same_everywhere(
    state: TrainState,
    sampler: Sampler,
    ledger: Ledger,
    plan: Plan,
    checkpoints: Checkpoints | None,
) -> None:
    """Refuses processes that were not given the same."""
    check_agreement(
        state=state,
        sampler=sampler.to_dict(),
        ledger=ledger.to_json(),
        arguments=plan.to_dict() | {"checkpoints": checkpoints is not None},
    )


def _check_same_begin(run: Progress) -> None:
    """Refuses processes that have read different checkpoints."""
    if jax.process_count() > 1:
        due = None if run.due is None else run.due.row
        check_agreement(checkpoint=run.whole, charges=run.ledger.to_json(), report=due)


def _executed(run: Progress, loop: _Loop, watch: Watch) -> str:
    """Executes the steps that are left; why it has stopped, "steps" or "budget"."""
    plan, limit = loop.plan, loop.plan.limit()
    begun = reported = run.done
    charges = Charges(loop.step, loop.sampler, plan.steps)
    batches = loop.load(begun)
    if jax.process_count() > 1:
        check_agreement(step=_program(loop.step, run.whole, batches[0]))
    stopped_by = "steps"
    while run.done < plan.steps:
        charge = charges.coming(run.whole, batches[0].batch, run.done)
        if charges.waits:  # to look at the steps before it, too, costs nothing more
            watch.look()
        watch.compare(charge.noise)
        charged = charge.added(run.ledger)
        if limit is not None and not _allows(limit, run.ledger, charge, charged):
            stopped_by = "budget"
            break
        if run.done == begun:
            _compile(loop.step, run.whole, batches[0])
        with interrupts_wait():
            _advance(run, loop.step, batches, charged, watch.begin(charge, len(batches)))
            watch.wait()
        if run.done < plan.steps:
            batches = loop.load(run.done)  # on the host, while the device computes the present ones
        if run.done % plan.report_every == 0:
            _report(run, loop, watch)
            reported = run.done
        elif watch.is_full or loop.bar.is_due:
            watch.look(keep=IN_FLIGHT)
            _show(loop.bar, watch)
    if run.done > reported:
        _report(run, loop, watch)
    return stopped_by


def _allows(limit: Budget, ledger: Ledger, charge: Charge, charged: Ledger) -> bool:
    return limit.allows(
        ledger, charge.noise_multipliers, charge.sampling, charge.draws, after=charged
    )


def _compile(step: Step, state: TrainState, loaded: LoadedBatch) -> None:
    """What cannot be traced or compiled raises here, before it is charged and with its state. The
    step then finds its program made. A step that is no function of `jax.jit` has none."""
    if isinstance(step.run, Wrapped):
        step.run.lower(state, loaded.batch, loaded.mask, loaded.is_last).compile()


def _advance(
    run: Progress,
    step: Step,
    batches: Sequence[LoadedBatch],
    charged: Ledger,
    metrics: list[StepMetrics],
) -> None:
    """Executes one logical step, charged before anything of it can be released.

    Args:
      run: how far it has come; one step further afterwards. Charged, and without a state, where the
        step raises.
      step: what is executed.
      batches: the physical batches of the logical step.
      charged: the ledger with this step.
      metrics: gets what each physical batch looked like, as far as it comes.
    """
    state = run.whole
    run.ledger = charged
    # From here on nobody can tell how much of it has run, whatever it raises: a state that is still
    # there may be a copy. So the charge stays, and there is no state to draw the same noise again.
    run.state = None
    for each in batches:
        state, batch_metrics = step.run(state, each.batch, each.mask, each.is_last)
        metrics.append(batch_metrics)
    run.state = state
    run.done += 1


def _catch_up(run: Progress, loop: _Loop) -> None:
    """What is left from before: a report that nobody may have seen, and charges that are not saved.

    A release that was made before this run shows nothing of its steps. But the run may end before
    it is saved again, and the release is made.
    """
    if run.due is not None:
        _tell(run, loop, run.due)
    _save(run, loop)


def _report(run: Progress, loop: _Loop, watch: Watch) -> None:
    """Looks at everything, saves it, and only then tells whoever listens.

    What was shown must be charged for good. A run that is killed goes on from what it has saved,
    and draws the same noise again for what is not: by other settings of the clip, say, so that the
    difference to what was shown has none.
    """
    if jax.process_count() > 1:
        check_agreement(parameters=run.whole.params, charges=run.ledger.to_json())
    watch.look()
    watch.check_state()
    check_charged(run.whole, run.ledger, loop.sampler)
    row = report_row(run.whole, run.ledger, loop.sampler, loop.plan, watch.totals)
    run.due = Due(row, run.whole.params)
    _save(run, loop)
    _show(loop.bar, watch)
    _tell(run, loop, run.due)
    watch.totals = Totals.begin()


def _tell(run: Progress, loop: _Loop, due: Due) -> None:
    """Completes a report on what is saved, and adds it to the history."""
    row = evaluated(due.row, loop.evaluate, due.params)
    run.history.append(row)
    run.due = None
    loop.log(dict(row))
    if loop.checkpoints is not None:
        loop.checkpoints.complete(run.history)
    loop.bar.show(epsilon=row["epsilon"])


def _show(bar: Bar, watch: Watch) -> None:
    """What was looked at."""
    totals, count = watch.totals, watch.seen
    watch.seen = 0
    bar.advance(count, loss=totals.loss, samples_per_second=totals.samples_per_second)


def _save(run: Progress, loop: _Loop) -> None:
    """Once for each step that was come to, with the report that is to be made of it."""
    if loop.checkpoints is not None and run.saved < run.done:
        report = None if run.due is None else run.due.row
        with interrupts_wait():
            loop.checkpoints.save(
                run.whole, run.ledger, loop.sampler, run.history, loop.data, report
            )
            run.saved = run.done


@contextlib.contextmanager
def _saved_in_the_end(run: Progress, loop: _Loop, watch: Watch) -> Iterator[None]:
    """After an exception no step is lost, Ctrl-C included. Its parameters may have been seen: to
    execute it once more, with the same noise and another chain, would show what the noise hides.
    Processes save together, so one of them alone cannot."""
    try:
        yield
    except BaseException as error:
        with interrupts_wait():
            if problem := settled(watch):
                error.add_note(f"jaxdp: {problem}")
            if can_be_read(run.state) and jax.process_count() == 1:
                try:
                    _save(run, loop)
                except Exception as problem:  # of any kind: the user is to see the first one
                    error.add_note(f"jaxdp: the run could not be saved: {problem}")
        raise


def _program(step: Step, state: TrainState, loaded: LoadedBatch) -> str:
    """What a step computes, with the constants that its chain closes over."""
    return program_digest(step.run, state, loaded.batch, loaded.mask, loaded.is_last)


def _how_to_resume(checkpoints: Checkpoints | None) -> str:
    if checkpoints is None:
        return "start all of them again, with checkpoints= to resume another time"
    return (
        "start any number of them again, to resume from the newest checkpoint in "
        f"{checkpoints.directory}"
    )
