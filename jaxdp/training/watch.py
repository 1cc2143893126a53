"""Steps that the device was given, until somebody has looked at what they did."""

from collections import deque
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxdp.training.charges import Charge, released_otherwise
from jaxdp.training.reports import Totals
from jaxdp.training.run import Progress
from jaxdp.training.step import StepMetrics

IN_FLIGHT = 2
"""How many steps may be on their way behind the one that is waited for. One keeps the device busy
while the host prepares the next; each more holds a batch in its memory, and is one more that a
failure leaves charged."""

# The most steps that are not looked at: their metrics are small.
_MOST = 256


@dataclass
class Watch:
    """What a run has executed since it was last looked at.

    JAX returns before the device is done, and to read what a step did is to wait for it. So nothing
    is read at every step: the metrics stay on the device until a report, and the loop waits for the
    step before the last two alone, so that no more than these are under way.

    Args:
      run: how far it has come; loses its state where a step did other than it was charged with.
    """

    run: Progress
    totals: Totals = field(default_factory=Totals.begin)
    _steps: deque[tuple[Charge, list[StepMetrics]]] = field(default_factory=deque, init=False)

    def add(self, charge: Charge, metrics: list[StepMetrics]) -> None:
        """One more step, with what its physical batches return. Waits for an earlier one."""
        self._steps.append((charge, metrics))
        if len(self._steps) > IN_FLIGHT:
            jax.block_until_ready(self._steps[-1 - IN_FLIGHT][1][-1].samples)

    @property
    def is_full(self) -> bool:
        """Whether it is time to look, report or not."""
        return len(self._steps) >= _MOST

    def look(self, keep: int = 0) -> int:
        """Reads what all steps did but the last `keep`; returns how many these are.

        Raises:
          JaxRuntimeError: one of them has failed on the device.
          ValueError: one has released other noise than it was charged with.
        """
        count = max(len(self._steps) - keep, 0)
        for leaf in jax.tree.leaves([self._steps[index][1] for index in range(count)]):
            if isinstance(leaf, jax.Array):  # all are on their way before one is waited for
                leaf.copy_to_host_async()
        for _ in range(count):
            charge, metrics = self._steps[0]
            read: list[StepMetrics] = [jax.tree.map(np.asarray, batch) for batch in metrics]
            self._steps.popleft()
            self._check(charge, read[-1])
            self.totals = self.totals.add(read)
        return count

    def _check(self, charge: Charge, last: StepMetrics) -> None:
        executed = np.asarray(last.noise_multipliers).tolist()
        if not released_otherwise(charge, executed):
            return
        # What was executed is charged, too: nobody takes the first charge back.
        noise = [sigma if sigma >= 0 else 0.0 for sigma in executed]
        self.run.ledger = self.run.ledger.charge(noise or [0.0], charge.sampling)
        self.run.state = None
        raise ValueError(
            "a step must release the noise that it was charged with, got noise multipliers "
            f"{executed} for {charge.noise_multipliers}. Both are charged now. Let the noise "
            "multiplier follow from the step, or from what earlier steps have left in the state."
        )


def settled(watch: Watch) -> str:
    """Looks at everything behind an exception, as far as it can be read; what is wrong, or ""."""
    try:
        watch.look()
    except (ValueError, jax.errors.JaxRuntimeError) as problem:
        return str(problem)
    return ""
