"""What two ledgers of the same data hold together, where one may know of the other.

A run that is started again finds the ledger that it has saved, and is told once more what the data
was charged with before. What both hold is charged once:

* A charge with draws is known by them, wherever it stands.
* Charges without draws are known by their numbers. Those that follow each other in a run, with
  nothing between them that says what it drew, are a row. A row that is equal to one of the other
  ledger, or its beginning, is the same; one that goes on where the other ends is the same, longer.
  Each row is taken for one of the other ledger at most.

Everything else is a charge of its own, and is added. Rows that begin alike, where each ledger then
has something else, may be of one run or of two: nobody can tell, and they are refused.

Example:
  >>> from jaxdp.accounting import PoissonSampling
  >>> before = Ledger().charge(1.0, PoissonSampling(0.1), steps=3)
  >>> saved = Ledger().merge(before).charge(2.0, PoissonSampling(0.2), steps=5)
  >>> found = united(saved, before.charge_pure(0.5))
  >>> found.steps, len(found.closed[0]), found.current == saved.current
  (8, 2, True)
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from jaxdp.accounting.draws import joined
from jaxdp.accounting.entries import Run, as_run, parted, size, split
from jaxdp.accounting.ledger import Ledger
from jaxdp.accounting.mechanisms.base import Entry
from jaxdp.accounting.mechanisms.gaussian import LedgerEntry

_WHAT_NEXT = (
    "Pass the ledger that this run was started with, or the saved one, from Checkpoints.restore, "
    "with what was charged since."
)


def united(saved: Ledger, given: Ledger) -> Ledger:
    """A ledger that holds everything that either of two ledgers holds, and what both hold once.

    Args:
      saved: the record of a run, which goes on.
      given: what the data is said to have been charged with.

    Returns:
      The longer ledger. Its current run is that of `saved`, or goes on where that ends. What
      `saved` knew nothing of follows what it followed, or is a closed run.

    Raises:
      ValueError: nobody can tell whether both hold something; both hold a draw, and charged it
        otherwise.
    """
    union, same = _Union(saved), _same_rows(_rows(given.runs), _rows(saved.runs))
    for number, run in enumerate(given.runs):
        place = None
        for part, stretch in enumerate(_stretches(run)):
            if stretch[0].draws:
                place = union.with_draws(stretch, place)
            else:
                place = union.with_row(stretch, place, same.get((number, part)))
    return union.ledger()


class _Row(NamedTuple):
    """Charges without draws that follow each other in a run.

    Attributes:
      at: the number of the run in its ledger, and of the stretch in that run.
      entries: the charges.
      behind: where the draws end that it follows; None where it begins the run.
      ends: whether the run ends with it.
    """

    at: tuple[int, int]
    entries: Run
    behind: Any
    ends: bool


def _stretches(run: Run) -> list[Run]:
    """A run, cut between what says what it drew and what does not. No epoch goes on from the one to
    the other."""
    return [tuple(entries) for _, entries in groupby(run, key=lambda entry: bool(entry.draws))]


def _rows(runs: Iterable[Run]) -> list[_Row]:
    """All rows of a ledger."""
    found = list[_Row]()
    for number, run in enumerate(runs):
        behind = None
        stretches = _stretches(run)
        for part, stretch in enumerate(stretches):
            if not stretch[0].draws:
                found.append(_Row((number, part), stretch, behind, part == len(stretches) - 1))
            behind = _end(stretch[-1])
    return found


def _same_rows(given: list[_Row], saved: list[_Row]) -> dict[tuple[int, int], _Row]:
    """Run and stretch of given rows -> the saved rows that they are taken for: equal ones, behind
    the same draws if there are such, or else those that begin like them for longest."""
    found = dict[tuple[int, int], _Row]()
    for pairs in (_equal_rows, _rows_that_begin_alike):
        taken = {each.at for each in found.values()}
        wanted = [row for row in given if row.at not in found]
        free = [row for row in saved if row.at not in taken]
        for one, two in pairs(wanted, free):
            if one.at not in found and two.at not in taken:
                found[one.at] = two
                taken.add(two.at)
    return found


def _equal_rows(given: list[_Row], saved: list[_Row]) -> Iterator[tuple[_Row, _Row]]:
    """Pairs of rows that are equal, those behind the same draws first."""
    by_entries = defaultdict[Run, list[_Row]](list)
    for row in saved:
        by_entries[row.entries].append(row)
    for placed in (True, False):
        for one in given:
            for two in by_entries[one.entries]:
                if not placed or one.behind == two.behind:
                    yield one, two


def _rows_that_begin_alike(given: list[_Row], saved: list[_Row]) -> Iterator[tuple[_Row, _Row]]:
    """Pairs of rows that begin alike, those that do so for longest first."""
    pairs = [
        (_length(common), one.behind == two.behind, one, two)
        for one in given
        for two in saved
        if (common := parted(one.entries, two.entries)[0])
    ]
    for *_, one, two in sorted(pairs, key=lambda pair: pair[:2], reverse=True):
        yield one, two


class _Union:
    """A ledger that grows by what another one holds besides.

    Where that stands is told by a place: the number of the run that has come as far, or None.
    """

    def __init__(self, saved: Ledger):
        """Begins with what was saved."""
        self._runs = [list(run) for run in saved.runs]
        self._current = len(self._runs) - 1
        self._held = _Held(saved.entries)
        self._ends = {_end(run[-1]): place for place, run in enumerate(saved.runs) if run}

    def with_draws(self, stretch: Run, place: int | None) -> int | None:
        """Adds what the draws do not tell to be held; where it has come to then."""
        for entry in stretch:
            for part, is_held in self._held.parts(entry):
                place = self._ends.get(_end(part)) if is_held else self._add(place, part)
        return place

    def with_row(self, row: Run, place: int | None, same: _Row | None) -> int | None:
        """Adds what the saved row does not hold that a row is taken for; where it has come to."""
        if same is None:
            return self._add(place, *row)
        common, rest, beyond = parted(row, same.entries)
        if rest and (beyond or not same.ends):
            raise ValueError(
                "ledger must go on where it begins like the saved one, got charges without draws "
                f"that go on otherwise behind the first {_length(common)} of a row, so that nobody "
                f"can tell whether these were made once or twice. {_WHAT_NEXT}"
            )
        run, _ = same.at
        if rest:
            return self._add(run, *rest)
        return run if same.ends and not beyond else None

    def ledger(self) -> Ledger:
        """As it is now."""
        entries = (entry for run in self._runs for entry in run)
        drawn = joined((), (each for entry in entries for each in entry.draws), _WHAT_NEXT)
        runs = [as_run(run) for run in self._runs]
        current = runs.pop(self._current)
        return Ledger(tuple(runs), current, drawn)

    def _add(self, place: int | None, *entries: Entry) -> int:
        if place is None:
            place = len(self._runs)
            self._runs.append([])
        self._runs[place] += entries
        return place


class _Held:
    """What a ledger knows by its draws."""

    def __init__(self, entries: Iterable[Entry]):
        """Of these entries: kind of step and streams -> the ranges of steps that are held."""
        self._steps = defaultdict[Any, list[tuple[int, int]]](list)
        self._others = set[Entry]()
        for entry in entries:
            if not isinstance(entry, LedgerEntry):
                self._others.add(entry)
            elif entry.draws:
                kind, first = _placed(entry)
                self._steps[kind].append((first, first + entry.steps))
        for ranges in self._steps.values():
            ranges.sort()

    def parts(self, entry: Entry) -> Iterator[tuple[Entry, bool]]:
        """An entry with draws, cut where what is held begins or ends; whether each part is."""
        if not isinstance(entry, LedgerEntry):
            yield entry, entry in self._others
            return
        kind, at = _placed(entry)
        end = at + entry.steps
        ranges = self._steps.get(kind, [])
        for begin, behind in ranges[bisect_right(ranges, at, key=lambda pair: pair[1]) :]:
            for edge, is_held in ((min(begin, end), False), (min(behind, end), True)):
                if at < edge:
                    part, *rest = split(entry, edge - at)
                    yield part, is_held
                    if not rest:
                        return
                    [entry], at = rest, edge
        yield entry, False


def _placed(entry: LedgerEntry) -> tuple[Any, int]:
    """What tells steps from others but their place in their streams, and the first place. Streams
    that go on side by side keep their distance."""
    draws = sorted(entry.draws)
    begin = draws[0].first
    streams = tuple((*each.stream, each.first - begin) for each in draws)
    return (entry.noise_multipliers, entry.sampling, streams), begin


def _end(entry: Entry) -> Any:
    """Where the draws of an entry end; nothing where it has none."""
    return tuple(sorted((*each.stream, each.end) for each in entry.draws))


def _length(run: Run) -> int:
    return sum(map(size, run))
