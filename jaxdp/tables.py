"""Tables as lines of text, for what is printed by hand."""

from collections.abc import Sequence


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """One line for each row, columns as wide as their longest cell.

    Example:
      >>> aligned([("leaf", "norm"), ("w", "1")])
      ['leaf  norm', 'w     1']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
