"""What a mechanism says of itself, so that a ledger can hold it and accountants can compose it.

There are two protocols, since what is recorded is not what is composed: an entry says what was
executed, a mechanism is one release of it as accountants read it. Entries of one kind tell which
mechanisms were run how often.

Example:
  >>> from jaxdp.accounting.mechanisms.pure import PureRelease
  >>> entry = PureRelease(0.5)
  >>> list(PureRelease.counted([[entry], [entry]]))
  [Counted(mechanism=PureMechanism(release=PureRelease(epsilon=0.5, sampling=None)), repeats=2)]
"""

# pyright: reportMissingTypeStubs=false

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

import dp_accounting
import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from numpy.typing import NDArray

from jaxdp.accounting.draws import Draws
from jaxdp.accounting.question import Question, RelationName


class TooManyStepsError(ValueError):
    """More equal releases than an accountant composes."""


class Losses(NamedTuple):
    """How far the privacy losses of one release reach.

    Attributes:
      mean: at least the mean of the loss.
      widest: the loss up to which a privacy loss distribution of one release is laid out.
    """

    mean: float
    widest: float


class Mechanism(Protocol):
    """One release as accountants read it: frozen, hashable, and equal to what costs the same."""

    def event(self) -> dp_accounting.DpEvent:
        """The dp-accounting event of one release, its noise in our convention: noise std / clip
        norm. Raises ValueError where dp-accounting has none that all of its accountants read alike.
        """
        ...

    def refusal(self, question: Question, beside: Sequence["Mechanism"]) -> str:
        """Why an accountant cannot compose it beside others, and what to do; "" where it can."""
        ...

    def is_bare(self) -> bool:
        """Whether it counts as a release without noise, of which no ε is a promise."""
        ...

    def losses(self, relation: RelationName) -> Losses:
        """How far its privacy losses reach. It decides how fine the grid of "pld" is: only time,
        memory and tightness depend on it."""
        ...

    def pld(self, count: int, relation: RelationName, interval: float) -> PrivacyLossDistribution:
        """At least the privacy loss distribution of `count` releases, on a grid of that step."""
        ...

    def rdp(self, relation: RelationName) -> NDArray[np.float64]:
        """At least the Rényi divergences of one release, at dp-accounting's default orders."""
        ...


class Counted(NamedTuple):
    """A mechanism and how often it ran."""

    mechanism: Mechanism
    repeats: int


class Entry(Protocol):
    """What a ledger notes of what was executed: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def draws(self) -> tuple[Draws, ...]:
        """The random numbers that it was made of; none where nobody knows."""
        ...

    def to_dict(self) -> dict[str, object]:
        """All fields but the draws as JSON-able data for `from_dict`, under their names."""
        ...

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], draws: tuple[Draws, ...]) -> Self:
        """Rebuilds the entry from what `to_dict` returned and its draws. The keys are checked
        already. Raises TypeError or ValueError where a value cannot be."""
        ...

    @classmethod
    def counted(cls, runs: Sequence[Sequence["Entry"]]) -> Iterable[Counted]:
        """The distinct mechanisms of all entries of this kind, and how often each ran, given the
        entries of all runs in the order of execution."""
        ...


Kind = TypeVar("Kind", bound=Entry)


def alike(runs: Sequence[Sequence[Entry]], kind: type[Kind]) -> list[tuple[Kind, int]]:
    """Counts the entries of a kind whose order does not matter.

    Args:
      runs: the entries of all runs.
      kind: the kind of entries to count.

    Returns:
      Distinct entries without their draws (equal releases are one mechanism, whatever they were
      drawn from) and how often each came, in an order that does not depend on when they came.

    Example:
      >>> from jaxdp.accounting.mechanisms.pure import PureRelease
      >>> alike([[PureRelease(0.5), PureRelease(0.1)], [PureRelease(0.5)]], PureRelease)
      [(PureRelease(epsilon=0.1, sampling=None), 1), (PureRelease(epsilon=0.5, sampling=None), 2)]
    """
    entries = (entry for run in runs for entry in run if isinstance(entry, kind))
    counts = Counter(replace(entry, draws=()) for entry in entries)
    return [(entry, counts[entry]) for entry in sorted(counts, key=repr)]
