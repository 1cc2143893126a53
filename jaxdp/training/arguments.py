"""The arguments of `fit`, checked before anything is read or drawn."""

import dataclasses
from typing import Any, NamedTuple

from jax.sharding import NamedSharding

from jaxdp.accounting import Guarantee, Ledger
from jaxdp.checks import (
    LARGEST_COUNT,
    check_bool,
    check_callable,
    check_instance,
    check_integer,
    check_real,
)
from jaxdp.sampling import Sampler
from jaxdp.training.budget import Budget
from jaxdp.training.checkpoints import Checkpoints
from jaxdp.training.step import Step, TrainState

LARGEST_STEPS = 2**31 - 1
"""The most logical steps of a run: the counters of a state are of int32."""


class Plan(NamedTuple):
    """How long a run goes, what is asked of its ledger, and how often.

    Attributes:
      steps: logical steps in total.
      guarantee: what ε is stated with, in reports and in the budget.
      budget: ε, or None.
      report_every: logical steps between reports.
      data_parts: in how many parts the data is kept.
    """

    steps: int
    guarantee: Guarantee
    budget: float | None
    report_every: int
    data_parts: int

    def spent(self, ledger: Ledger) -> float:
        """The ε that a ledger states."""
        return ledger.epsilon(self.guarantee)

    def limit(self) -> Budget | None:
        """The budget that is asked before each step."""
        if self.budget is None:
            return None
        return Budget(self.budget, self.guarantee)

    def to_dict(self) -> dict[str, Any]:
        """As data for JSON."""
        return self._asdict() | {"guarantee": dataclasses.asdict(self.guarantee)}


def check_plan(
    sampler: Sampler,
    *,
    steps: object,
    guarantee: Guarantee,
    budget: object,
    report_every: object,
    data_parts: object,
) -> Plan:
    """The numbers and names that `fit` was given, checked."""
    if report_every is None:
        report_every = max(round(sampler.num_examples / sampler.expected_batch_size), 1)
    return Plan(
        check_integer(
            "steps", steps, minimum=0, maximum=LARGEST_STEPS, advice="Pass logical steps in total."
        ),
        guarantee,
        None
        if budget is None
        else check_real("budget", budget, above=0, advice="Pass ε, or None for no budget."),
        check_integer(
            "report_every",
            report_every,
            minimum=1,
            maximum=LARGEST_COUNT,
            advice="Pass steps, or None for an epoch.",
        ),
        check_integer(
            "data_parts",
            data_parts,
            minimum=1,
            maximum=LARGEST_COUNT,
            advice="Pass 1, or the number of processes.",
        ),
    )


def check_objects(
    state: object,
    step: object,
    sampler: object,
    *,
    ledger: object,
    checkpoints: object,
    sharding: object,
    evaluate: object,
    progress: object,
) -> None:
    """Refuses objects of another type than `fit` takes."""
    check_instance("state", state, TrainState, advice="Pass training.init(params, tx).")
    check_instance("step", step, Step, advice="Pass training.make_step(grads_fn, tx).")
    check_instance("sampler", sampler, Sampler, advice="Pass a jaxdp.PoissonSampler, say.")
    check_instance("ledger", ledger, Ledger, advice="Pass run.ledger, or leave it out.")
    if checkpoints is not None:
        advice = "Pass training.Checkpoints(directory)."
        check_instance("checkpoints", checkpoints, Checkpoints, advice=advice)
    if sharding is not None:
        advice = "Pass jaxdp.distributed.data_parallel()."
        check_instance("sharding", sharding, NamedSharding, advice=advice)
    if evaluate is not None:
        advice = "Pass a function of the parameters that returns a dict of numbers."
        check_callable("evaluate", evaluate, advice=advice)
    check_bool("progress", progress, advice="Pass False for no bar.")
