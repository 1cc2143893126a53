"""Sizes that are given for each axis, or once for all axes."""

from collections.abc import Sequence

import numpy as np

from jaxdp.checks import LARGEST_SIZE, check_integer, check_sequence, shown

Size = int | Sequence[int]


def sizes(name: str, value: Size, rank: int, least: int = 1) -> tuple[int, ...]:
    """One number for each of `rank` axes.

    Raises:
      TypeError: the value is neither an integer nor a sequence of integers.
      ValueError: the count is not `rank`; a number is below `least`.
    """
    advice = f"Pass one integer for all axes, or {rank} of them."
    several = isinstance(value, Sequence) or np.ndim(value) > 0
    found = check_sequence(name, value, advice=advice) if several else (value,) * rank
    if len(found) != rank:
        raise ValueError(f"{name} must have {rank} entries, got {shown(value)}. {advice}")
    return tuple(
        check_integer(name, n, minimum=least, maximum=LARGEST_SIZE, advice=advice) for n in found
    )
