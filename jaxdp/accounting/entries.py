"""The entries of a run: how steps join, whether one run begins with another, and all as JSON.

Example:
  >>> from jaxdp.accounting.schemes import PoissonSampling
  >>> step = LedgerEntry((1.1,), PoissonSampling(0.04), steps=1)
  >>> appended((step,), step)
  (LedgerEntry(noise_multipliers=(1.1,), sampling=PoissonSampling(sampling_rate=0.04), steps=2),)
"""

from collections.abc import Mapping
from dataclasses import fields, replace

from jaxdp.accounting.draws import continued, draws_from_list
from jaxdp.accounting.mechanisms import KINDS
from jaxdp.accounting.mechanisms.base import Entry
from jaxdp.accounting.mechanisms.gaussian import LedgerEntry
from jaxdp.accounting.strict_json import check_keys


def appended(run: tuple[Entry, ...], entry: Entry) -> tuple[Entry, ...]:
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


def _joined(last: Entry, entry: Entry) -> LedgerEntry | None:
    if not isinstance(last, LedgerEntry) or not isinstance(entry, LedgerEntry):
        return None
    if (last.noise_multipliers, last.sampling) != (entry.noise_multipliers, entry.sampling):
        return None
    draws = continued(last.draws, entry.draws)
    return None if draws is None else replace(last, steps=last.steps + entry.steps, draws=draws)


def begins_with(run: tuple[Entry, ...], begin: tuple[Entry, ...]) -> bool:
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
    if not begin:
        return True
    *before, last = begin
    here = run[len(before)] if len(run) > len(before) else None
    return run[: len(before)] == tuple(before) and (last == here or _goes_on(last, here))


def _goes_on(last: Entry, here: Entry | None) -> bool:
    if not isinstance(last, LedgerEntry) or not isinstance(here, LedgerEntry):
        return False
    if here.steps <= last.steps or len(here.draws) != len(last.draws):
        return False
    shorter = tuple(replace(each, count=last.steps) for each in here.draws)
    return replace(here, steps=last.steps, draws=shorter) == last


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
