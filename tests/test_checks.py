"""The checks of arguments: what passes, and what each refusal says."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.accounting.strict_json import check_keys
from jaxdp.checks import (
    check_bool,
    check_callable,
    check_choice,
    check_instance,
    check_integer,
    check_real,
    check_reals,
    check_sequence,
    shown,
)
from jaxdp.schedules import check_schedule

ADVICE = "Pass another."


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


INTEGERS = [3, np.int8(3), np.uint64(3), np.array(3), jnp.array(3), jnp.uint8(3)]
FLOATS = [3.0, 3, Fraction(3), np.float16(3), np.array(3.0), jnp.array(3.0), jnp.bfloat16(3)]
REALS = [*FLOATS, *INTEGERS]
NO_NUMBERS: list[Any] = [
    None, "3", b"3", True, np.True_, np.array(True), jnp.array(False), 3j, np.array(3j), [], {},
    object(), np.array("3"), np.ones((2, 2)), jnp.ones((1, 2)), Unprintable(), jax.random.key(0),
]  # fmt: skip


@pytest.mark.parametrize("value", INTEGERS, ids=lambda value: type(value).__name__)
def test_integers_of_every_library_pass(value: Any) -> None:
    found = check_integer("n", value, minimum=3, maximum=3, advice=ADVICE)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize("value", REALS, ids=lambda value: type(value).__name__)
def test_reals_of_every_library_pass(value: Any) -> None:
    found = check_real("x", value, minimum=3, maximum=3, advice=ADVICE)
    assert found == 3 and type(found) is float
    assert check_reals("x", value, advice=ADVICE) == (3.0,)
    check_schedule("x", value)


@pytest.mark.parametrize("make", [list, tuple, np.asarray, jnp.asarray, iter, set])
def test_sequences_of_reals_of_every_library_pass(make: Callable[[Any], Any]) -> None:
    assert check_reals("x", make([0.5, 2.0]), advice=ADVICE) == (0.5, 2.0)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_a_type_error_that_says_so(value: Any) -> None:
    with pytest.raises(TypeError, match="n must be an integer, got .*. Pass another."):
        check_integer("n", value, minimum=0, advice=ADVICE)
    with pytest.raises(TypeError, match="x must be a real number, got .*. Pass another."):
        check_real("x", value, advice=ADVICE)
    with pytest.raises((TypeError, ValueError), match="x must (be|hold) .*, got .*. Pass another."):
        check_reals("x", value, advice=ADVICE)
    with pytest.raises(TypeError, match="x must be a real number, got .*a schedule"):
        check_schedule("x", value)


@pytest.mark.parametrize("value", [2.5, "3", None, float("nan"), np.float32(3)], ids=repr)
def test_a_float_is_no_integer(value: Any) -> None:
    with pytest.raises(TypeError, match="n must be an integer, got"):
        check_integer("n", value, minimum=0, advice=ADVICE)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (-1, "n must be at least 0, got -1. Pass another."),
        (9, "n must be at most 8, got 9. Pass another."),
        (10**30, "n must be at most 8, got 1000000000"),
        (10**6000, "n must be at most 8, got a value of type int. Pass another."),
    ],
    ids=["low", "high", "huge", "unprintable"],
)
def test_an_integer_out_of_bounds_is_a_value_error(value: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_integer("n", value, minimum=0, maximum=8, advice=ADVICE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, 0, -1, 1])
def test_a_real_out_of_bounds_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError, match="x must be finite, > 0, < 1, got .*. Pass another."):
        check_real("x", value, above=0, below=1, advice=ADVICE)
    with pytest.raises(ValueError, match="x must be finite, > 1, got"):
        check_reals("x", [2.0, value], above=1, advice=ADVICE)


@pytest.mark.parametrize(
    "value", [[], (), np.ones(0), iter(())], ids=lambda value: type(value).__name__
)
def test_an_empty_sequence_holds_no_number(value: Any) -> None:
    with pytest.raises(ValueError, match="x must hold at least one number, got an empty"):
        check_reals("x", value, advice=ADVICE)


def test_an_endless_sequence_ends_in_a_sentence() -> None:
    def ones():
        while True:
            yield 1.0

    with pytest.raises(ValueError, match="x must hold at least one number, got more than 1000000"):
        check_reals("x", ones(), advice=ADVICE)


@pytest.mark.parametrize("value", [1e-46, 1e-39, 1e39, 1e308])
def test_a_number_of_a_step_is_a_normal_float32(value: float) -> None:
    with pytest.raises(ValueError, match=r"x must be finite, >= 1.17549e-38, <= 3.40282e\+38"):
        check_schedule("x", value)
    check_schedule("x", 3.4e38)
    check_schedule("x", 0.0, zero=True)


def test_a_traced_number_is_checked_by_nobody_here() -> None:
    def step(value: jax.Array) -> jax.Array:
        check_schedule("x", value)
        with pytest.raises(TypeError, match="x must be a real number, got"):
            check_real("x", value, advice=ADVICE)
        with pytest.raises(TypeError, match="x must hold real numbers, got|be a real number"):
            check_reals("x", jnp.stack([value, value]), advice=ADVICE)
        return value

    assert jax.jit(step)(1.0) == 1.0


Refusal = tuple[Callable[[], object], type[Exception], str]

REFUSALS: dict[str, Refusal] = {
    "bool": (lambda: check_bool("b", 1, advice=ADVICE), TypeError, "True or False, got 1"),
    "choice": (lambda: check_choice("c", "x", ["a", "b"]), ValueError, "c must be 'a' or 'b', got"),
    "choice type": (lambda: check_choice("c", None, ["a"]), TypeError, "c must be 'a', got None"),
    "choice list": (lambda: check_choice("c", [], ["a"]), TypeError, r"c must be 'a', got \[\]"),
    "callable": (lambda: check_callable("f", 3, advice=ADVICE), TypeError, "must be a function"),
    "instance": (lambda: check_instance("i", 3, str, advice=ADVICE), TypeError, "of type str"),
    "text": (lambda: check_sequence("s", "ab", advice=ADVICE), TypeError, "must be a sequence"),
    "number": (lambda: check_sequence("s", 3, advice=ADVICE), TypeError, "must be a sequence"),
    "scalar": (lambda: check_sequence("s", np.array(3), advice=ADVICE), TypeError, "a sequence"),
    "short": (
        lambda: check_sequence("s", [], minimum=1, advice=ADVICE), ValueError, "at least 1 entries"
    ),
    "keys": (lambda: check_keys("k", {"a": 1}, ["b"]), ValueError, r"\['b'\], got \['a'\]"),
    "no mapping": (lambda: check_keys("k", 3, ["b"]), TypeError, "k must be a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSALS))
def test_a_refusal_names_argument_rule_and_value(name: str) -> None:
    action, error, says = REFUSALS[name]
    with pytest.raises(error, match=says):
        action()


def test_what_passes_comes_back_as_it_was_meant() -> None:
    assert check_bool("b", np.True_, advice=ADVICE) is True
    assert check_choice("c", "a", ["a"]) == "a"
    assert check_callable("f", len, advice=ADVICE) is len
    assert check_sequence("s", np.ones(2), advice=ADVICE) == (1.0, 1.0)
    assert check_keys("k", {"a": 1}, ["a"]) == {"a": 1}


def test_a_message_stays_on_one_line_and_short() -> None:
    for value in (np.ones((50, 50)), "x" * 10**6, {"a": "\n"}, Unprintable()):
        assert len(shown(value)) <= 80 and "\n" not in shown(value)
