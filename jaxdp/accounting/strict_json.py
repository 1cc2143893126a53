"""JSON that says everything once, and nothing that is not known.

Example:
  >>> parse('{"steps": 3}')
  {'steps': 3}
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, cast

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


def check_keys(name: str, value: object, keys: Collection[str]) -> Mapping[str, Any]:
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
    rule = f"{name} must be a mapping with the keys {sorted(keys)}"
    advice = "It was not written by this version of jaxdp or has been altered."
    if not isinstance(value, Mapping):
        raise TypeError(f"{rule}, got {shown(value)}. {advice}")
    given = cast(Mapping[str, Any], value)
    if set(given) != set(keys):
        raise ValueError(f"{rule}, got {shown(sorted(map(str, given)))}. {advice}")
    return given


def check_list(name: str, value: object) -> list[Any]:
    """Returns `value` if it is a list.

    Args:
      name: what the list describes, for the message.
      value: parsed JSON.

    Returns:
      The list.

    Raises:
      ValueError: it is no list.

    Example:
      >>> check_list("draws", {})
      Traceback (most recent call last):
      ValueError: draws must be a JSON list, got {}.
    """
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a JSON list, got {shown(value)}.")
    return cast(list[Any], value)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"a JSON object must have each key once, got {key!r} twice.")
        found[key] = value
    return found
