"""The progress bar: what it shows, and that it can be silent."""

import io
from collections.abc import Iterator

import pytest
import rich

from jaxdp.training.bar import progress_bar


def console(*, terminal: bool) -> io.StringIO:
    """Makes rich's own console write here."""
    output = io.StringIO()
    rich.reconfigure(file=output, force_terminal=terminal, width=120, color_system=None)
    return output


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    rich.reconfigure()


def shown(output: io.StringIO) -> str:
    """The last picture of the bar."""
    return output.getvalue().split("training")[-1]


def test_it_shows_steps_epsilon_of_the_budget_loss_and_throughput() -> None:
    output = console(terminal=True)
    with progress_bar(True, total=100, done=0, budget=3.0) as bar:
        for _ in range(25):
            bar.advance(loss=1.23456, samples_per_second=12_345.6)
        bar.show(epsilon=1.2345)
    for part in ("25/100", "ε 1.23/3", "not private: loss 1.235, 12,346 samples/s"):
        assert part in shown(output)


def test_it_shows_epsilon_alone_without_a_budget() -> None:
    output = console(terminal=True)
    with progress_bar(True, total=10, done=0, budget=None) as bar:
        bar.advance(loss=1.0, samples_per_second=1.0)
        bar.show(epsilon=0.5)
    assert "ε 0.50" in shown(output) and "ε 0.50/" not in shown(output)


def test_a_resumed_run_starts_where_it_stopped() -> None:
    output = console(terminal=True)
    with progress_bar(True, total=10, done=7, budget=None) as bar:
        bar.advance(loss=1.0, samples_per_second=1.0)
    assert " 8/10" in shown(output)


def test_what_is_not_known_yet_is_a_dash() -> None:
    output = console(terminal=True)
    with progress_bar(True, total=10, done=0, budget=2.0):
        pass
    assert "ε –/2" in shown(output) and "not private: loss –, – samples/s" in shown(output)


def test_disabled_it_writes_nothing() -> None:
    output = console(terminal=True)
    with progress_bar(False, total=10, done=0, budget=2.0) as bar:
        bar.advance(loss=1.0, samples_per_second=1.0)
        bar.show(epsilon=1.0)
    assert output.getvalue() == ""


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -1e30])
def test_a_diverging_loss_is_shown_and_does_not_raise(loss: float) -> None:
    output = console(terminal=True)
    with progress_bar(True, total=10, done=0, budget=None) as bar:
        bar.advance(loss=loss, samples_per_second=0.0)
    assert "loss" in shown(output)


def test_it_closes_when_the_block_raises() -> None:
    output = console(terminal=True)
    with pytest.raises(KeyError), progress_bar(True, total=10, done=0, budget=None):
        raise KeyError
    hidden, visible = "\x1b[?25l", "\x1b[?25h"
    assert output.getvalue().rindex(visible) > output.getvalue().rindex(hidden)
