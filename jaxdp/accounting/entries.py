"""The entries of a run: how steps join, whether one run begins with another, and all as JSON.

Example:
  >>> from jaxdp.accounting.schemes import PoissonSampling
  >>> step = LedgerEntry((1.1,), PoissonSampling(0.04), steps=1)
  >>> appended((step,), step)
  (LedgerEntry(noise_multipliers=(1.1,), sampling=PoissonSampling(sampling_rate=0.04), steps=2),)
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

from jaxdp.accounting.draws import continued, draws_from_list
from jaxdp.accounting.mechanisms import KINDS
from jaxdp.accounting.mechanisms.base import Entry
from jaxdp.accounting.mechanisms.gaussian import LedgerEntry
from jaxdp.accounting.strict_json import check_keys

Run = tuple[Entry, ...]
"""The entries of a run, in order of execution."""


def appended(run: Run, entry: Entry) -> Run:
    """A run with one more entry.

    Args:
      run: the entries so far.
      entry: what follows.

    Returns:
      The longer run; steps that are equal to the last ones, and go on with their draws, join
      these.

    Example:
      >>> from jaxdp.accounting import PoissonSampling
      >>> step = LedgerEntry((1.0,), PoissonSampling(0.1), steps=1)
      >>> len(appended((step,), step))
      1
    """
    longer = _joined(run[-1], entry) if run else None
    return (*run, entry) if longer is None else (*run[:-1], longer)


def as_run(entries: Iterable[Entry]) -> Run:
    """Entries as the run that `appended` makes of them, one after the other.

    Args:
      entries: in order of execution.

    Returns:
      The run.

    Example:
      >>> from jaxdp.accounting import PoissonSampling
      >>> len(as_run([LedgerEntry((1.0,), PoissonSampling(0.1), steps=1)] * 2))
      1
    """
    run = list[Entry]()
    for entry in entries:
        longer = _joined(run[-1], entry) if run else None
        if longer is None:
            run.append(entry)
        else:
            run[-1] = longer
    return tuple(run)


def _joined(last: Entry, entry: Entry) -> LedgerEntry | None:
    if not isinstance(last, LedgerEntry) or not isinstance(entry, LedgerEntry):
        return None
    if (last.noise_multipliers, last.sampling) != (entry.noise_multipliers, entry.sampling):
        return None
    draws = continued(last.draws, entry.draws)
    return None if draws is None else replace(last, steps=last.steps + entry.steps, draws=draws)


def begins_with(run: Run, begin: Run) -> bool:
    """Whether a run is another one, or goes on where that one ended.

    Args:
      run: the entries of a run.
      begin: those of an earlier state of it, or of another run.

    Returns:
      Whether everything in `begin` comes first in `run`, draws included.

    Example:
      >>> from jaxdp.accounting import PoissonSampling
      >>> one, two = (LedgerEntry((1.0,), PoissonSampling(0.1), steps=n) for n in (1, 2))
      >>> begins_with((two,), (one,)), begins_with((one,), (two,))
      (True, False)
    """
    return not parted(run, begin)[2]


def parted(run: Run, other: Run) -> tuple[Run, Run, Run]:
    """Where two runs part.

    Args:
      run: the entries of a run.
      other: those of another one, or of an earlier or later state of it.

    Returns:
      What both begin with, draws included; how the first one goes on; and the other one.

    Example:
      >>> from jaxdp.accounting import PoissonSampling, PureRelease
      >>> one, two = (LedgerEntry((1.0,), PoissonSampling(0.1), steps=n) for n in (1, 3))
      >>> common, rest, other = parted((one, PureRelease(0.5)), (two,))
      >>> [size(entry) for entry in common], rest, [size(entry) for entry in other]
      ([1], (PureRelease(epsilon=0.5, sampling=None),), [2])
    """
    common = list[Entry]()
    mine, theirs = list(reversed(run)), list(reversed(other))
    while mine and theirs and (count := _alike(mine[-1], theirs[-1])):
        (head, *rest), (_, *others) = (split(each.pop(), count) for each in (mine, theirs))
        common.append(head)
        mine += rest
        theirs += others
    return as_run(common), tuple(reversed(mine)), tuple(reversed(theirs))


def _alike(one: Entry, two: Entry) -> int:
    """In how many steps two entries begin alike, draws included; of what is no step, 1 or 0."""
    if not isinstance(one, LedgerEntry) or not isinstance(two, LedgerEntry):
        return int(one == two)
    if (one.noise_multipliers, one.sampling) != (two.noise_multipliers, two.sampling):
        return 0
    begins = [[(*draws.stream, draws.first) for draws in each.draws] for each in (one, two)]
    return min(one.steps, two.steps) if begins[0] == begins[1] else 0


def size(entry: Entry) -> int:
    """How many steps an entry has; what is no step is one.

    Args:
      entry: of any kind.

    Returns:
      A count ≥ 1.

    Example:
      >>> from jaxdp.accounting import PureRelease
      >>> size(PureRelease(0.5))
      1
    """
    return entry.steps if isinstance(entry, LedgerEntry) else 1


def split(entry: Entry, count: int) -> tuple[Entry, ...]:
    """An entry in two, behind some of its steps.

    Args:
      entry: of any kind.
      count: how many steps the first part gets, ≥ 1 and at most all.

    Returns:
      The two parts; the entry alone where the first one gets all.

    Example:
      >>> from jaxdp.accounting import PoissonSampling
      >>> [each.steps for each in split(LedgerEntry((1.0,), PoissonSampling(0.1), steps=5), 2)]
      [2, 3]
    """
    if not isinstance(entry, LedgerEntry) or count == entry.steps:
        return (entry,)
    more = entry.steps - count
    heads = tuple(replace(each, count=count) for each in entry.draws)
    tails = tuple(replace(each, first=each.first + count, count=more) for each in entry.draws)
    return replace(entry, steps=count, draws=heads), replace(entry, steps=more, draws=tails)


def entry_to_dict(entry: Entry) -> dict[str, object]:
    """An entry as JSON-able data for `entry_from_dict`.

    Args:
      entry: of any kind.

    Returns:
      Its fields, the draws last.

    Example:
      >>> from jaxdp.accounting import PureRelease
      >>> entry_to_dict(PureRelease(0.5))
      {'epsilon': 0.5, 'sampling': None, 'draws': []}
    """
    return {**entry.to_dict(), "draws": [each.to_dict() for each in entry.draws]}


def entry_from_dict(data: object, *, with_draws: bool) -> Entry:
    """Rebuilds the entry that `entry_to_dict` wrote.

    Args:
      data: parsed JSON.
      with_draws: False for what was written before draws were noted.

    Returns:
      The equal entry.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: a field is missing, unknown or out of range.

    Example:
      >>> entry_from_dict({"epsilon": 0.5, "sampling": None}, with_draws=False)
      PureRelease(epsilon=0.5, sampling=None)
    """
    # Each kind of entry has keys of its own, so that a reader refuses a kind that it does not know.
    kind = next((KINDS[key] for key in KINDS if _has(data, key)), LedgerEntry)
    keys = {field.name for field in fields(kind)} - (set() if with_draws else {"draws"})
    given = check_keys(kind.__name__, data, keys)
    return kind.from_dict(given, draws_from_list(given["draws"]) if with_draws else ())


def _has(data: object, key: str) -> bool:
    return isinstance(data, Mapping) and key in data
