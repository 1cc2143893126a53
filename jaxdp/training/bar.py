"""The progress bar of a run, drawn by rich: for the operator's eyes, as what is raw in it says."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

# As often as rich draws it.
_SECONDS = 0.1


class Bar:
    """A bar that shows steps and ε spent, and, marked as not private, loss and throughput."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress = progress
        self._task = task
        self._moved = time.perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether somebody who watches would like it to move."""
        return not self._progress.disable and time.perf_counter() - self._moved > _SECONDS

    def advance(self, steps: int = 1, *, loss: float, samples_per_second: float) -> None:
        """Steps further, with the mean loss and the samples per second since the report."""
        self._moved = time.perf_counter()
        self._progress.update(
            self._task, advance=steps, loss=f"{loss:.3f}", rate=f"{samples_per_second:,.0f}"
        )

    def show(self, *, epsilon: float) -> None:
        """ε spent, as of the last report."""
        self._progress.update(self._task, epsilon=f"{epsilon:.2f}")


@contextmanager
def progress_bar(enabled: bool, *, total: int, done: int, budget: float | None) -> Iterator[Bar]:
    """A `Bar` for the duration of the block; off a terminal only its end is printed."""
    of_budget = "" if budget is None else f"/{budget:g}"
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ε {task.fields[epsilon]}" + of_budget),
        TimeRemainingColumn(),
        TextColumn("not private: loss {task.fields[loss]}, {task.fields[rate]} samples/s"),
    )
    with Progress(*columns, disable=not enabled) as progress:
        task = progress.add_task(
            "training", total=total, completed=done, epsilon="–", loss="–", rate="–"
        )
        yield Bar(progress, task)
