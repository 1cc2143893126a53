"""Tables as lines of text."""

from collections.abc import Sequence


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Formats each row as one line, with columns as wide as their longest cell.

    Example:
      >>> aligned([("leaf", "norm"), ("w", "1")])
      ['leaf  norm', 'w     1']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
