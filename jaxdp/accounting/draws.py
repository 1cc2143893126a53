"""Which random numbers a release was made of, so that no two releases share theirs unnoticed.

Composition adds up what independent releases cost. Two releases with the same noise are not
independent (their difference has none), nor are two steps on the same drawn batch. So each stream
of random numbers has a name, and the ledger notes which of its steps were used.

Example:
  >>> once = Draws("gradient noise", "5eed", first=0, count=3)
  >>> joined((once,), (Draws("gradient noise", "5eed", first=3, count=2),))
  (Draws(purpose='gradient noise', fingerprint='5eed', first=0, count=5),)
"""

from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from jaxdp.accounting.strict_json import check_keys, check_list
from jaxdp.checks import (
    check_instance,
    check_integer,
    check_sequence,
    shown,
)

BATCHES = "batches"
"""Purpose of the draws of a sampler: who takes part in a step."""

EPOCHS = "epochs"
"""Purpose that tells which permutations the batches of shuffled epochs are cut from, and where."""

_ADVICE = (
    "Give the run a key of its own (jaxdp.random_key()) and its sampler another seed, or continue "
    "the run that has drawn them with its state and ledger."
)


@dataclass(frozen=True, slots=True, order=True)
class Draws:
    """Consecutive steps of one stream of random numbers.

    Args:
      purpose: what the numbers are for, such as "batches".
      fingerprint: tells one stream of that purpose from another: a one-way hash of its key or
        seed, which is as hard to undo as the key is to guess. Not empty.
      first: the first step, ≥ 0.
      count: how many steps, ≥ 1.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: a field is out of range.

    Example:
      >>> Draws("batches", "5eed", first=10, count=5).end
      15
    """

    purpose: str
    fingerprint: str
    first: int
    count: int = 1

    def __post_init__(self) -> None:
        # A step makes eight of them: those that are plainly right are not looked at any closer.
        plain = (type(self.purpose), type(self.fingerprint), type(self.first), type(self.count))
        if plain == (str, str, int, int) and self.purpose and self.fingerprint:
            if self.first >= 0 and self.count >= 1:
                return
        for name in ("purpose", "fingerprint"):
            value = check_instance(
                name,
                getattr(self, name),
                str,
                advice="Take it from sampler.draws or jaxdp.noise_draws.",
            )
            if not value:
                raise ValueError(f"{name} must not be empty, got ''. A stream needs a name.")
        for name, minimum in (("first", 0), ("count", 1)):
            value = check_integer(
                name,
                getattr(self, name),
                minimum=minimum,
                advice="Pass the steps that were drawn.",
            )
            object.__setattr__(self, name, value)

    @property
    def stream(self) -> tuple[str, str]:
        """What the steps are steps of.

        Returns:
          Purpose and fingerprint.

        Example:
          >>> Draws("batches", "5eed", first=0).stream
          ('batches', '5eed')
        """
        return self.purpose, self.fingerprint

    @property
    def end(self) -> int:
        """The step after the last one.

        Returns:
          first + count.

        Example:
          >>> Draws("batches", "5eed", first=0).end
          1
        """
        return self.first + self.count

    def to_dict(self) -> dict[str, object]:
        """Returns the draws as JSON-able data for `draws_from_list`.

        Returns:
          A dict of the four fields.

        Example:
          >>> Draws("batches", "5eed", first=7).to_dict()
          {'purpose': 'batches', 'fingerprint': '5eed', 'first': 7, 'count': 1}
        """
        return {
            "purpose": self.purpose,
            "fingerprint": self.fingerprint,
            "first": self.first,
            "count": self.count,
        }


DrawsLike = Draws | tuple[str, str, int]
"""Draws, or a tuple of purpose, fingerprint and step, as `jaxdp.noise_draws` gives them."""


def draws_from_list(data: object) -> tuple[Draws, ...]:
    """Rebuilds draws from a list of what `to_dict` returned.

    Args:
      data: parsed JSON.

    Returns:
      The equal draws.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: it is no list, a key is missing or unknown, or a field is out of range.

    Example:
      >>> draws_from_list([Draws("batches", "5eed", first=7).to_dict()])
      (Draws(purpose='batches', fingerprint='5eed', first=7, count=1),)
    """
    keys = {"purpose", "fingerprint", "first", "count"}
    return tuple(Draws(**check_keys("draws", each, keys)) for each in check_list("draws", data))


def check_draws(value: object) -> tuple[Draws, ...]:
    """Returns the draws of one release as a tuple, or says what they must be.

    Args:
      value: what the caller passed: draws, or tuples of purpose, fingerprint and step, as
        `jaxdp.noise_draws` gives them.

    Returns:
      Draws of distinct streams.

    Raises:
      TypeError: it is no sequence of such.
      ValueError: a stream comes twice.

    Example:
      >>> check_draws([("batches", "5eed", 7)])
      (Draws(purpose='batches', fingerprint='5eed', first=7, count=1),)
    """
    advice = "Pass those of sampler.draws(step) and of jaxdp.noise_draws(opt_state)."
    draws = tuple(
        check_instance("draws", _as_draws(each), Draws, advice=advice)
        for each in check_sequence("draws", value, advice=advice)
    )
    if len({each.stream for each in draws}) < len(draws):
        joined((), draws)
    samplers = [each.purpose for each in draws if each.purpose in (BATCHES, EPOCHS)]
    if len(set(samplers)) < len(samplers):
        raise ValueError(f"draws must be those of one sampler, got {shown(draws)}. {advice}")
    return draws


def _as_draws(value: object) -> object:
    if not isinstance(value, tuple):
        return value
    parts = cast(tuple[Any, ...], value)
    return Draws(*parts) if len(parts) in (3, 4) else parts


def joined(
    known: tuple[Draws, ...], new: Iterable[Draws], advice: str = _ADVICE
) -> tuple[Draws, ...]:
    """The union of draws, if no step of a stream is among them twice.

    Args:
      known: sorted, disjoint, and with a gap between any two of one stream.
      new: draws in any order.
      advice: what to do about a step that comes twice.

    Returns:
      All of them, sorted, and joined where they are contiguous.

    Raises:
      ValueError: a step of a stream comes twice.

    Example:
      >>> joined((), [Draws("noise", "5eed", 0, 4), Draws("noise", "5eed", 3, 2)])
      Traceback (most recent call last):
      ValueError: draws must be new to the ledger, got step 3 of 'noise' (fingerprint 5eed) a
      second time, so that the two releases are not independent. Give the run ...
    """
    # A step adds to the end of a few ranges: the rest of the tuple stays as it is.
    ranges = list(known)
    for each in new:
        place = bisect(ranges, each)
        before = ranges[place - 1] if place else None
        after = ranges[place] if place < len(ranges) else None
        before = before if before and before.stream == each.stream else None
        after = after if after and after.stream == each.stream else None
        if (before and before.end > each.first) or (after and after.first < each.end):
            raise ValueError(f"{_repeated(each, before, after)} {advice}")
        if before and before.end == each.first:
            each, place = _longer(before, each.count), place - 1
            del ranges[place]
        if after and after.first == each.end:
            each = _longer(each, after.count)
            del ranges[place]
        ranges.insert(place, each)
    return tuple(ranges)


def _longer(draws: Draws, more: int) -> Draws:
    # What `dataclasses.replace` would make, at a third of its price.
    return Draws(draws.purpose, draws.fingerprint, draws.first, draws.count + more)


def _repeated(new: Draws, before: Draws | None, after: Draws | None) -> str:
    other = before if before and before.end > new.first else after
    assert other is not None
    first, last = max(new.first, other.first), min(new.end, other.end) - 1
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return (
        f"draws must be new to the ledger, got {steps} of {new.purpose!r} (fingerprint "
        f"{new.fingerprint[:8]}) a second time, so that the two releases are not independent."
    )


def continued(earlier: tuple[Draws, ...], later: tuple[Draws, ...]) -> tuple[Draws, ...] | None:
    """Two draws as one, where the later ones go on with the streams of the earlier ones.

    Args:
      earlier: of some steps.
      later: of the steps after these.

    Returns:
      The draws of both, or None where they do not go on.

    Example:
      >>> continued((Draws("batches", "5eed", 0, 2),), (Draws("batches", "5eed", 2, 1),))
      (Draws(purpose='batches', fingerprint='5eed', first=0, count=3),)
    """
    goes_on = [(each.purpose, each.fingerprint, each.end) for each in earlier] == [
        (each.purpose, each.fingerprint, each.first) for each in later
    ]
    if not goes_on:
        return None
    pairs = zip(earlier, later, strict=True)
    return tuple(_longer(one, two.count) for one, two in pairs)
