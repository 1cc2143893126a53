"""The registry of mechanisms: what may be charged, one file for each.

A file says everything about one mechanism: the entry that a ledger notes (its JSON included), and
how that composes (its dp-accounting event, privacy loss distribution and Rényi divergences).
`base.py` has the two protocols.

=========== ==================================================================================
file        mechanism
=========== ==================================================================================
gaussian    Gaussians of a batch, sampled or not: the steps of a run
pure        anything that is (ε, 0)-differentially private, such as the sparse vector technique
=========== ==================================================================================

Example:
  >>> from jaxdp.accounting.schemes import PoissonSampling
  >>> steps = [LedgerEntry((sigma,), PoissonSampling(0.1), steps=2) for sigma in (1.1, 1.2)]
  >>> [each.repeats for each in mechanisms_of([[*steps, PureRelease(0.5)]])]
  [1, 2, 2]
"""

# pyright: reportMissingTypeStubs=false

from collections.abc import Sequence

import dp_accounting

from jaxdp.accounting.mechanisms.base import Counted, Entry
from jaxdp.accounting.mechanisms.gaussian import LedgerEntry
from jaxdp.accounting.mechanisms.pure import PureRelease

KINDS: dict[str, type[Entry]] = {"epsilon": PureRelease, "noise_multipliers": LedgerEntry}
"""Every kind of entry, by a field that no other kind has. Mechanisms are composed in this order,
the steps last: what grows keeps its composed past, which is found again."""


def mechanisms_of(runs: Sequence[Sequence[Entry]]) -> tuple[Counted, ...]:
    """What everything that was executed comes to: distinct mechanisms, and how often each ran.

    Args:
      runs: for every run its entries, in the order of execution.

    Returns:
      The mechanisms, the one of the very last step last; empty if nothing was released.

    Example:
      >>> mechanisms_of([[], []])
      ()
    """
    return tuple(counted for kind in KINDS.values() for counted in kind.counted(runs))


def event_of(mechanisms: Sequence[Counted]) -> dp_accounting.DpEvent:
    """The DpEvent of several mechanisms together, in the convention of noise std / clip norm.

    Args:
      mechanisms: what was released.

    Returns:
      One event; `NoOpDpEvent` if there is none.

    Raises:
      ValueError: dp-accounting has no event for one of them.

    Example:
      >>> event_of(())
      NoOpDpEvent()
    """
    events = [
        each.event() if count == 1 else dp_accounting.SelfComposedDpEvent(each.event(), count)
        for each, count in mechanisms
    ]
    match events:
        case []:
            return dp_accounting.NoOpDpEvent()
        case [event]:
            return event
        case _:
            return dp_accounting.ComposedDpEvent(events)
