"""The configuration of a run: data for JSON, compared by what it says."""

import json
from typing import Any


def as_json(name: str, value: Any) -> Any:
    """The value as it will be read back."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"{name} must be data for JSON, got something else: {error}. Use dicts, lists, "
            "strings, numbers, booleans and None."
        ) from error


def differences(saved: Any, given: Any, name: str = "configuration") -> list[str]:
    """What differs between two pieces of JSON data, by name, in words."""
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
    there, here = (text if len(text) <= 80 else f"{text[:77]}..." for text in texts)
    return [f"{name} is {there} there and {here} here"]
