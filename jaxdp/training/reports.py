"""What a report says: read from the ledger, the state and what steps returned."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.accounting import Ledger
from jaxdp.checks import shown
from jaxdp.sampling import Sampler
from jaxdp.training.arguments import Plan
from jaxdp.training.step import StepMetrics, TrainState

Evaluate = Callable[[Any], Mapping[str, float]]


class Totals(NamedTuple):
    """Sums over the steps since the last report. NOT private.

    Attributes:
      loss_sum: of the losses of samples.
      samples: how many there were.
      nonfinite: how many of them counted for nothing.
      since: when they began, by the clock of `time.perf_counter`.
    """

    loss_sum: float
    samples: int
    nonfinite: int
    since: float

    @classmethod
    def begin(cls) -> "Totals":
        """The totals before the first step."""
        return cls(0.0, 0, 0, time.perf_counter())

    def add(self, metrics: Iterable[StepMetrics]) -> "Totals":
        """One more logical step, in its physical batches."""
        loss_sum, samples, nonfinite = self[:3]
        for batch in metrics:
            loss_sum += float(batch.loss_sum)
            samples += int(batch.samples)
            nonfinite += int(batch.nonfinite)
        return Totals(loss_sum, samples, nonfinite, self.since)

    @property
    def loss(self) -> float:
        """The mean over the samples."""
        return self.loss_sum / max(self.samples, 1)

    @property
    def samples_per_second(self) -> float:
        """Since the last report."""
        return self.samples / max(time.perf_counter() - self.since, 1e-9)


def report_row(
    state: TrainState, ledger: Ledger, sampler: Sampler, plan: Plan, totals: Totals
) -> dict[str, Any]:
    """One row of the history, without what `evaluate` adds to it.

    Args:
      state: after the step that is reported.
      ledger: charged with it.
      sampler: of the run.
      plan: what ε is stated with.
      totals: of the steps since the last report.
    """
    step = int(state.step)
    return {
        "step": step,
        "epoch": step * sampler.expected_batch_size / sampler.num_examples,
        "epsilon": plan.spent(ledger),
        "delta": plan.guarantee.delta,
        "loss": totals.loss,
        "nonfinite": totals.nonfinite,
        "samples_per_second": totals.samples_per_second,
    }


def evaluated(row: Mapping[str, Any], evaluate: Evaluate | None, params: Any) -> dict[str, Any]:
    """The same row with what `evaluate` says of the parameters.

    It gets a copy: the next step reuses the buffers of the state, so that whoever keeps what he was
    given, or gives it away, would lose it or end the run. Memory for it is there, since no step is
    under way, and a step needs as much for its gradient.

    Args:
      row: without it.
      evaluate: of the parameters, or None.
      params: the parameters that are reported.

    Raises:
      TypeError: what `evaluate` returns is no mapping from names to numbers.
      ValueError: it has a name that the row has already.
    """
    if evaluate is None:
        return dict(row)
    metrics = evaluate(jax.tree.map(jnp.copy, params))
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise TypeError(
            f"evaluate must return a dict of numbers by name, got {shown(metrics)}. Return "
            '{"accuracy": ...}, or {} for nothing.'
        )
    taken = sorted(set(metrics) & set(row))
    if taken:
        raise ValueError(
            f"evaluate must return names that the report has not, got {taken}, which come from the "
            f'ledger and the steps. Call yours "test_{taken[0]}", say.'
        )
    return {**row, **{name: _number(name, value) for name, value in metrics.items()}}


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"evaluate must return numbers, got {shown(value)} for {name!r}. Return a float for "
            "each name."
        ) from error
