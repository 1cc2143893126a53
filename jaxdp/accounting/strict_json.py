"""JSON that says everything once, and nothing that is not known.

Example:
    >>> parse('{"steps": 3}')
    {'steps': 3}
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from jaxdp.checks import shown


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


def check_keys(name: str, value: object, keys: Collection[str]) -> Mapping[str, object]:
    """Returns `value` if it is a mapping with exactly the given keys.

    Args:
        name: what the mapping describes, for the message.
        value: parsed JSON.
        keys: the keys it must have, no more and no fewer.

    Returns:
        The mapping.

    Raises:
        TypeError: it is no mapping.
        ValueError: its keys differ.

    Example:
        >>> check_keys("point", {"x": 1}, {"x"})
        {'x': 1}
    """
    if not isinstance(value, Mapping) or set(value) != set(keys):
        is_mapping = isinstance(value, Mapping)
        found = shown(sorted(map(str, value)) if is_mapping else value)
        raise (ValueError if is_mapping else TypeError)(
            f"{name} must be a mapping with the keys {sorted(keys)}, got {found}. "
            "It was not written by this version of jaxdp or has been altered."
        )
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"a JSON object must have each key once, got {key!r} twice.")
        found[key] = value
    return found
