"""JSON that says everything once.

Example:
    >>> parse('{"steps": 3}')
    {'steps': 3}
"""

import json
from typing import Any


def parse(text: str | bytes) -> Any:
    """Parses JSON in which no key is repeated.

    Of a repeated key Python's own reader takes the last value: a record that says 1000 steps, and
    then 1, would be read as 1.

    Args:
        text: the JSON.

    Returns:
        Dicts, lists, strings, numbers, bools and None.

    Raises:
        TypeError: the text is none.
        ValueError: it is no JSON, or a key is repeated.

    Example:
        >>> parse('{"steps": 1000, "steps": 1}')
        Traceback (most recent call last):
        ValueError: a JSON object must have each key once, got 'steps' twice.
    """
    return json.loads(text, object_pairs_hook=_each_once)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"a JSON object must have each key once, got {key!r} twice.")
        found[key] = value
    return found
