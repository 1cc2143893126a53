"""How often one example may have taken part in shuffled epochs.

Example:
  >>> from jaxdp.accounting.schemes import ShuffledEpochs
  >>> step = EpochSteps(2.0, 6, None)
  >>> list(participations([step], steps_per_epoch=4))
  [(2.0, 1), (2.0, 1)]
"""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from jaxdp.accounting.draws import Draws


class EpochSteps(NamedTuple):
    """Consecutive steps of shuffled epochs with one noise multiplier.

    Attributes:
      noise_multiplier: σ ≥ 0.
      steps: how many, ≥ 1.
      epochs: the draws that say which permutations the batches are cut from, and where the
        steps began; None where nobody said.
    """

    noise_multiplier: float
    steps: int
    epochs: Draws | None


def participations(
    steps: Iterable[EpochSteps], steps_per_epoch: int
) -> Iterator[tuple[float, int]]:
    """For every epoch that was entered, the least noise multiplier that an example may have met.

    Within one epoch of one permutation the batches are disjoint: an example takes part at most
    once, and then at the worst of the steps. Nothing is known of two permutations: an example may
    have been in the steps of both. So each (permutation, epoch) that was entered counts once. Where
    nobody said where steps began, they begin with an epoch, and steps that follow them go on.

    Args:
      steps: in the order of execution, all of one scheme.
      steps_per_epoch: of that scheme, ≥ 1.

    Yields:
      Pairs (noise multiplier, number of participations).

    Example:
      >>> half = [EpochSteps(2.0, 2, Draws("epochs", name, 2, 2)) for name in "ab"]
      >>> list(participations(half, steps_per_epoch=4))
      [(2.0, 1), (2.0, 1)]
    """
    entered: dict[tuple[str, int], float] = {}
    for placed, group in groupby(steps, key=lambda each: each.epochs is not None):
        if placed:
            yield from _placed(group, steps_per_epoch, entered)
        else:
            yield from _from_the_start(group, steps_per_epoch)
    yield from ((sigma, 1) for sigma in entered.values())


def _placed(
    steps: Iterable[EpochSteps], epoch: int, entered: dict[tuple[str, int], float]
) -> Iterator[tuple[float, int]]:
    """The epochs that one σ filled; those entered in part go into `entered`, by permutation."""
    for sigma, _, draws in steps:
        assert draws is not None
        # Of the epochs from `begin` to `end` all steps are here.
        begin, end = -(-draws.first // epoch), draws.end // epoch
        if begin < end:
            yield sigma, end - begin
        for edge in {draws.first // epoch, (draws.end - 1) // epoch}:
            if not begin <= edge < end:
                place = draws.fingerprint, edge
                entered[place] = min(entered.get(place, math.inf), sigma)


def _from_the_start(steps: Iterable[EpochSteps], epoch: int) -> Iterator[tuple[float, int]]:
    filled, worst = 0, math.inf
    for sigma, count, _ in steps:
        head = min(count, epoch - filled)
        filled, worst = filled + head, min(worst, sigma)
        whole, rest = divmod(count - head, epoch)
        if filled == epoch:
            yield worst, 1
            filled, worst = 0, math.inf
        if whole:
            yield sigma, whole
        if rest:
            filled, worst = rest, sigma
    if filled:
        yield worst, 1
