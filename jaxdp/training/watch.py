"""Steps that the device was given, until somebody has looked at what they did."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import numpy as np

from jaxdp.accounting import Draws
from jaxdp.accounting.draws import check_draws, continued
from jaxdp.released import noise_draws
from jaxdp.training.charges import Charge
from jaxdp.training.executed import Release, otherwise, releases, with_releases
from jaxdp.training.reports import Totals
from jaxdp.training.run import Progress, can_be_read
from jaxdp.training.step import StepMetrics

IN_FLIGHT = 2
"""How many steps may be on their way behind the one that is waited for. One keeps the device busy
while the host prepares the next; each more holds a batch in its memory, and is one more that a
failure leaves charged."""

# The most steps that are not looked at: their metrics are small.
_MOST = 256


class _Begun(NamedTuple):
    """A step that was begun.

    Attributes:
      charge: what it was charged with.
      parts: how many physical batches it has.
      metrics: what those have returned that were executed.
    """

    charge: Charge
    parts: int
    metrics: list[StepMetrics]


@dataclass
class Watch:
    """What a run has executed since it was last looked at.

    JAX returns before the device is done, and to read what a step did is to wait for it. So nothing
    is read at every step: the metrics stay on the device until a report, and the loop waits for the
    step before the last two alone, so that no more than these are under way.

    Args:
      run: how far it has come; loses its state where a step did other than it was charged with, or
        where nobody can tell.
    """

    run: Progress
    totals: Totals = field(default_factory=Totals.begin)
    seen: int = field(default=0, init=False)
    """Steps that were looked at since somebody has set this to zero."""
    _steps: deque[_Begun] = field(default_factory=deque, init=False)
    _last: Charge | None = field(default=None, init=False)

    def begin(self, charge: Charge, parts: int) -> list[StepMetrics]:
        """One more step, of so many physical batches; what they return goes into the list."""
        self._steps.append(_Begun(charge, parts, []))
        self._last = charge
        return self._steps[-1].metrics

    def wait(self) -> None:
        """Waits for an earlier step, so that no more than the last ones are under way."""
        if len(self._steps) > IN_FLIGHT:
            jax.block_until_ready(self._steps[-1 - IN_FLIGHT].metrics[-1].samples)

    @property
    def is_full(self) -> bool:
        """Whether it is time to look, report or not."""
        return len(self._steps) >= _MOST

    def look(self, keep: int = 0) -> int:
        """Reads what all steps did but the last `keep`, and charges what they were not charged
        with; returns how many these are.

        Once one of them did other than it was charged with, all are read, so that none of them goes
        uncharged.

        Raises:
          JaxRuntimeError: one of them has failed on the device.
          ValueError: one has released other noise than it was charged with.
        """
        wanted = max(len(self._steps) - keep, 0)
        for leaf in jax.tree.leaves([self._steps[index].metrics for index in range(wanted)]):
            if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                leaf.copy_to_host_async()  # all are on their way before one is waited for
        count, problems = 0, list[Exception]()
        while len(self._steps) > (0 if problems else keep):
            try:
                self._settle(self._steps[0])
            except Exception as problem:  # of any kind: a step of the user's returns what it likes
                problems.append(problem)
            self._steps.popleft()
            count += 1
        self.seen += count
        if problems:
            self.run.state = None
            if len(problems) > 1:
                problems[0].add_note(f"jaxdp: so it is with {len(problems) - 1} more steps.")
            raise problems[0]
        return count

    def compare(self, noise: Sequence[Draws]) -> None:
        """Holds the noise that comes next against what the last step was charged with.

        Args:
          noise: the coming draw of every release, as the state behind that step tells it.

        Raises:
          ValueError: it is not what that step goes on with.
        """
        if self._last is None or continued(self._last.noise, tuple(noise)) is not None:
            return
        # Another key may be the one that the step has drawn from. Where counters alone differ, the
        # step has told itself what it drew.
        if [each.stream for each in noise] != [each.stream for each in self._last.noise]:
            drawn = [replace(each, first=each.first - 1) if each.first else None for each in noise]
            release = Release.of(self._last.noise_multipliers, drawn)
            self.run.ledger = with_releases(self.run.ledger, self._last, [release])
        self.run.state = None
        expected = [replace(each, first=each.end) for each in self._last.noise]
        raise ValueError(
            "the state behind a step must go on with the noise that the step was charged with, got "
            f"{_named(noise)} for {_named(expected)}. Let it keep the keys of its noise, and count "
            "each step once."
        )

    def check_state(self) -> None:
        """The same, where the noise that comes next is read off the state.

        Raises:
          ValueError: as above; two noised releases have one key.
        """
        self.compare(check_draws(noise_draws(self.run.whole.opt_state)))

    def _settle(self, step: _Begun) -> None:
        """Adds one step to the totals, and charges it if need be."""
        read: list[StepMetrics] = [jax.tree.map(np.asarray, batch) for batch in step.metrics]
        found = releases(step.charge, read, ended=len(read) == step.parts)
        if sentence := otherwise(step.charge, found):
            self.run.ledger = with_releases(self.run.ledger, step.charge, found)
            raise ValueError(f"a step must release the noise that it was charged with, {sentence}")
        self.totals = self.totals.add(read)


def settled(watch: Watch) -> str:
    """Looks at everything behind an exception, as far as it can be read; what is wrong, or ""."""
    run = watch.run
    try:
        watch.look()
        # One of several processes cannot read keys that all of them hold.
        if can_be_read(run.state) and jax.process_count() == 1:
            watch.check_state()
    except Exception as problem:  # of any kind: the user is to see the exception before it
        run.state = None
        return " ".join([str(problem), *getattr(problem, "__notes__", [])])
    return ""


def _named(noise: Sequence[Draws]) -> str:
    return ", ".join(
        f"step {each.first} of {each.purpose!r} (fingerprint {each.fingerprint[:8]})"
        for each in noise
    )
