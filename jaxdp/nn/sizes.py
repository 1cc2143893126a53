"""Sizes that may be given once for all axes."""

from collections.abc import Sequence
from numbers import Integral

Size = int | Sequence[int]


def sizes(name: str, value: Size, rank: int, least: int = 1) -> tuple[int, ...]:
    """One number for each of `rank` axes.

    Raises:
      ValueError: another count; a number below `least`.
    """
    found = (value,) * rank if isinstance(value, int | Integral) else tuple(value)
    if len(found) != rank or any(not isinstance(n, Integral) or n < least for n in found):
        raise ValueError(
            f"{name} must be an integer of at least {least}, or {rank} of them, got {value!r}"
        )
    return tuple(map(int, found))
