"""What a step has released, read from what it returned, and what of that was not charged.

A step is charged before it runs with the noise that the state tells of: multipliers, keys,
counters. What it returns tells of the state behind it. By the protocol of `jaxdp.released` a
counter stands one further than the last draw, and so says which one that was: a chain that begins
its noise anew in mid-run shows a small one. Noise that was drawn before hides nothing a second
time: it is charged as none.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxdp.accounting import Draws, Ledger
from jaxdp.training.charges import Charge
from jaxdp.training.identity import same_noise
from jaxdp.training.step import StepMetrics

# More draws of one noise in one step are not counted, but taken for no noise.
_MOST = 1000


class Release(NamedTuple):
    """What one physical batch has released.

    Attributes:
      noise_multipliers: of its Gaussians.
      draws: which noise each of them got; None where nothing was drawn yet, or nobody knows.
    """

    noise_multipliers: list[float]
    draws: list[Draws | None]

    @classmethod
    def of(cls, noise_multipliers: list[float], draws: list[Draws | None]) -> "Release":
        """With the draws, where there is one for each Gaussian."""
        same = len(draws) == len(noise_multipliers)
        return cls(noise_multipliers, draws if same else [None] * len(noise_multipliers))


def releases(charge: Charge, metrics: Iterable[StepMetrics], *, ended: bool) -> list[Release]:
    """What a step has released, as far as it came.

    Args:
      charge: of the step.
      metrics: of its physical batches, read.
      ended: whether these are all of them. The last one releases by what a logical batch is;
        another one does if it draws noise.

    Returns:
      One release for each physical batch that has made one, in order.
    """
    told = [(each.noise_multipliers.tolist(), each.noise_steps.tolist()) for each in metrics]
    before = [[each.first for each in charge.noise], *(steps for _, steps in told)]
    return [
        _release(charge, multipliers, before[number], steps)
        for number, (multipliers, steps) in enumerate(told)
        if steps != before[number] or (ended and number == len(told) - 1)
    ]


def _release(
    charge: Charge, multipliers: list[float], before: list[int], after: list[int]
) -> Release:
    """What was released while the steps of the noise went from here to there. Where that are
    several for one Gaussian, each may have been one, and where they are too many, anything."""
    if not len(multipliers) == len(before) == len(after) == len(charge.noise):
        return Release.of(multipliers, [])
    counts = [end - begin for begin, end in zip(before, after, strict=True)]
    if max(counts, default=0) > _MOST:
        return Release.of([0.0], [])
    drawn = [
        Draws(*each.stream, step - 1) if step else None
        for each, step in zip(charge.noise, after, strict=True)
    ]
    pairs = zip(multipliers, counts, strict=True)
    more = [sigma for sigma, count in pairs for _ in range(count - 1)]
    return Release(multipliers + more, [*drawn, *[None] * len(more)])


def otherwise(charge: Charge, found: Sequence[Release]) -> str:
    """What a step released other than what it was charged with, and what to do; "" if nothing.

    Args:
      charge: of the step.
      found: what it released.

    Returns:
      The rest of a sentence that says what a step must release, and another one.
    """
    if len(found) > 1:
        return (
            f"got {len(found)} releases for one logical batch. All are charged now. Let what draws "
            "the noise do so at its last physical batch, where is_last is true."
        )
    for noise_multipliers, draws in found:
        charged = charge.noise_multipliers
        if len(noise_multipliers) != len(charged) or not all(
            map(same_noise, noise_multipliers, charged)
        ):
            return (
                f"got noise multipliers {noise_multipliers} for {charged}. Both are charged now. "
                "Let the noise multiplier follow from the step, or from what earlier steps have "
                "left in the state."
            )
        if draws != list(charge.noise):
            drawn = [each and each.first for each in draws]
            return (
                f"got steps {drawn} of its noise for {[each.first for each in charge.noise]}. Both "
                "are charged now, noise that was drawn before as none. Let the chain keep the "
                "state of what draws its noise: one that begins anew draws the same again."
            )
    return ""


def with_releases(ledger: Ledger, charge: Charge, found: Iterable[Release]) -> Ledger:
    """A ledger that is charged with what a step released, beside what it was charged with before.

    Args:
      ledger: charged with the step, and perhaps with those behind it.
      charge: of the step.
      found: what it released.

    Returns:
      The longer ledger. All that was released of one batch counts as one step, and noise that
      another release has drawn as none.
    """
    noted, sigmas, new = set(charge.noise), list[float](), dict[tuple[str, str], Draws]()
    for sigma, draw in (each for release in found for each in zip(*release, strict=True)):
        if not 0 <= sigma < math.inf:  # NaN is neither
            sigma = 0.0
        if draw in noted:  # with the charge of the step
            noted.remove(draw)
        elif draw is not None and _holds(ledger, draw):
            sigma = 0.0
        elif draw is not None:
            new[draw.stream] = draw  # of several, a charge of one step names the last
        sigmas.append(sigma)
    return ledger.charge(sigmas or [0.0], charge.sampling, draws=list(new.values()))


def _holds(ledger: Ledger, draw: Draws) -> bool:
    ranges = [each for each in ledger.draws if each.stream == draw.stream]
    return any(each.first <= draw.first < each.end for each in ranges)
