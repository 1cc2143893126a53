"""Configurations are compared by what they say, as JSON says it."""

import math
from typing import Any

import pytest

from jaxdp.training.configuration import as_json, differences

# (saved, given, what differs)
PAIRS: list[tuple[Any, Any, list[str]]] = [
    (None, None, []),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, []),
    ({"a": math.nan}, {"a": math.nan}, []),
    ({"a": True}, {"a": 1}, ["a is true there and 1 here"]),
    ({"a": 1}, {"a": 1.0}, ["a is 1 there and 1.0 here"]),
    ({"a": 1}, {}, ["a is 1 there and null here"]),
    (None, {"a": 1}, ['configuration is null there and {"a": 1} here']),
    ({"a": {"b": [1]}}, {"a": {"b": [2]}}, ["b is [1] there and [2] here"]),
    ({"a": 1, "b": 1}, {"a": 2, "b": 2}, ["a is 1 there and 2 here", "b is 1 there and 2 here"]),
]


@pytest.mark.parametrize(("saved", "given", "expected"), PAIRS)
def test_what_differs_is_told_by_name(saved: Any, given: Any, expected: list[str]) -> None:
    assert differences(saved, given) == expected


def test_a_long_value_is_cut() -> None:
    (clause,) = differences({"a": "x" * 1000}, {"a": ""})
    assert len(clause) < 120 and "..." in clause


@pytest.mark.parametrize("value", [object(), {1: object()}, {(1, 2): 3}, 3j])
def test_what_is_no_data_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="settings must be data for JSON, got something else"):
        as_json("settings", value)


def test_what_is_compared_is_what_will_be_read_back() -> None:
    assert as_json("settings", {1: (2, 3)}) == {"1": [2, 3]}
