"""The configuration of a run: data for JSON, compared by what it says."""

import json
from typing import Any


def as_json(name: str, value: Any) -> Any:
    """The value as it will be read back.

    Args:
      name: of the argument, for the message.
      value: anything.

    Raises:
      TypeError: it is no data for JSON.

    Example:
      >>> as_json("configuration", {"rates": (0.1, 0.2)})
      {'rates': [0.1, 0.2]}
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"{name} must be data for JSON, got something else: {error}. Use dicts, lists, "
            "strings, numbers, booleans and None."
        ) from error


def differences(saved: Any, given: Any, name: str = "configuration") -> list[str]:
    """What differs between two pieces of JSON data, by name, in words.

    Args:
      saved, given: the two.
      name: what to call them.

    Returns:
      A clause for each difference; none where they are the same.

    Example:
      >>> differences({"rate": 0.1, "steps": 3}, {"rate": 0.2, "steps": 3})
      ['rate is 0.1 there and 0.2 here']
    """
    if isinstance(saved, dict) and isinstance(given, dict):
        return [
            difference
            for key in sorted(saved.keys() | given.keys())
            for difference in differences(saved.get(key), given.get(key), key)
        ]
    # As text, in which true is not 1 and NaN is NaN.
    texts = [json.dumps(value, sort_keys=True) for value in (saved, given)]
    if texts[0] == texts[1]:
        return []
    old, new = (text if len(text) <= 80 else f"{text[:77]}..." for text in texts)
    return [f"{name} is {old} there and {new} here"]
