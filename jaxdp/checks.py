"""The one place where arguments are checked: each check names the argument, the rule and the value.

Every refusal reads "NAME must be RULE, got VALUE. ADVICE": a TypeError where the value is of a kind
that could never do, a ValueError where another of its kind would. A check returns the value as the
plain Python type that the rest of the code works with, and is made once, at the public boundary.

Every check takes `name`, the argument's name as the message prints it; `value`, what the caller
passed; and, where the rule does not say it already, `advice`: one sentence on what to do next.

Numbers may be Python's, NumPy's or arrays of no axes, JAX's included, which are read without
importing jax. A bool is no number, and text is no sequence.

================ =================================================================
check            what passes
================ =================================================================
check_integer    an integer between two bounds
check_real       a finite real number between bounds
check_reals      one such number, or a sequence of them
check_bool       True or False
check_choice     one of some strings
check_callable   a function
check_instance   an object of a class
check_sequence   a list, a tuple or another sequence that is no text
check_array      a number, or an array of numbers
check_sizes      lengths of axes, each a positive int32
check_flags      settings of a layer, each True or False
check_rate       the probability of a dropout
================ =================================================================

Example:
  >>> check_integer("steps", 3, minimum=0, advice="Pass the number of executed steps.")
  3
"""

# pyright: standard

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

LARGEST_COUNT = 2**63 - 1
"""The largest count of steps, rows or examples: what an int64 holds."""

LARGEST_SIZE = 2**31 - 1
"""The longest axis that a layer is asked to have."""

_LONGEST_SEQUENCE = 1_000_000
_SHOWN = 80


def shown(value: object) -> str:
    """The value as a message prints it: on one line, and cut where it is long.

    Args:
      value: anything.

    Returns:
      At most 80 characters.

    Example:
      >>> shown("3"), len(shown([0.5] * 1000))
      ("'3'", 80)
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a repr is a stranger's code; an int of 5000 digits has none
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _without_axes(value: object) -> object:
    """The number that an array of no axes holds; anything else as it is."""
    # What most callers pass is known by its type: a charge has forty checks, at every step.
    if type(value) in (int, float, tuple):
        return value
    if isinstance(value, np.generic) or getattr(value, "ndim", None) != 0:
        return value
    try:
        return np.asarray(value).item()
    except Exception:  # a traced array, which holds no number yet; a key of a random stream
        return value


def _is_number(value: object, kind: type) -> bool:
    if type(value) is int:
        return True
    return isinstance(value, kind) and not isinstance(value, bool)


def check_integer(
    name: str,
    value: object,
    *,
    minimum: int | None = None,
    maximum: int | None = None,
    advice: str,
) -> int:
    """Returns `value` as an int, or says why it is not an integer within the bounds.

    Args:
      value: any integer type, NumPy's included, or an array of no axes; bool is refused.
      minimum: the smallest allowed value, or None.
      maximum: the largest allowed value, or None.

    Raises:
      TypeError: `value` is not an integer.
      ValueError: `value` is out of the bounds.

    Example:
      >>> check_integer("steps", -1, minimum=0, advice="Count from zero.")
      Traceback (most recent call last):
      ValueError: steps must be at least 0, got -1. Count from zero.
      >>> check_integer("steps", 9, minimum=0, maximum=8, advice="Take fewer.")
      Traceback (most recent call last):
      ValueError: steps must be at most 8, got 9. Take fewer.
    """
    number = _without_axes(value)
    if not _is_number(number, Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}. {advice}")
    count = int(number)  # pyright: ignore[reportArgumentType]  # an Integral
    if minimum is not None and count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(count)}. {advice}")
    if maximum is not None and count > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {shown(count)}. {advice}")
    return count


def check_real(
    name: str,
    value: object,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
    below: float = math.inf,
    advice: str,
) -> float:
    """Returns `value` as a finite float inside the given bounds, or says which one it breaks.

    Args:
      value: any real number type, NumPy's included, or an array of no axes; bool is refused.
      minimum: inclusive lower bound.
      above: exclusive lower bound.
      maximum: inclusive upper bound.
      below: exclusive upper bound.

    Raises:
      TypeError: `value` is not a real number.
      ValueError: `value` is not finite or breaks a bound.

    Example:
      >>> import numpy as np
      >>> check_real("noise_multiplier", np.array(1.5), minimum=0, advice="1.1 is usual.")
      1.5
      >>> check_real("delta", 2.0, above=0, below=1, advice="1e-5 is usual.")
      Traceback (most recent call last):
      ValueError: delta must be finite, > 0, < 1, got 2.0. 1e-5 is usual.
    """
    real = _without_axes(value)
    if not _is_number(real, Real):
        raise TypeError(f"{name} must be a real number, got {shown(value)}. {advice}")
    try:
        number = float(real)  # pyright: ignore[reportArgumentType]  # a Real
    except OverflowError:  # an int beyond the floats is as unusable as infinity
        number = math.inf
    if not (math.isfinite(number) and minimum <= number <= maximum and above < number < below):
        bounds = ((">=", minimum), (">", above), ("<=", maximum), ("<", below))
        rules = [f"{sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound)]
        rule = ", ".join(["finite", *rules])
        raise ValueError(f"{name} must be {rule}, got {number!r}. {advice}")
    return number


def check_reals(
    name: str,
    value: object,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    advice: str,
) -> tuple[float, ...]:
    """Returns one real number, or a sequence of them, as a tuple of floats.

    Args:
      value: a number, an array of no or of one axis, or an iterable of at most 10⁶ numbers.
      minimum: inclusive lower bound of each.
      above: exclusive lower bound of each.

    Returns:
      At least one float.

    Raises:
      TypeError: it is neither a number nor a sequence of numbers.
      ValueError: there is none, there are too many, or one is not finite or breaks a bound.

    Example:
      >>> check_reals("noise_multiplier", [1, 2.5], minimum=0, advice="Pass one for each.")
      (1.0, 2.5)
    """
    whole = _without_axes(value)
    if not isinstance(whole, Iterable) or isinstance(whole, str | bytes | Mapping):
        return (check_real(name, whole, minimum=minimum, above=above, advice=advice),)
    try:
        entries = list(islice(whole, _LONGEST_SEQUENCE + 1))
    except Exception:  # a traced array
        raise TypeError(f"{name} must hold real numbers, got {shown(value)}. {advice}") from None
    if not 0 < len(entries) <= _LONGEST_SEQUENCE:
        size = "an empty sequence" if not entries else f"more than {_LONGEST_SEQUENCE}"
        raise ValueError(f"{name} must hold at least one number, got {size}. {advice}")
    return tuple(
        check_real(name, entry, minimum=minimum, above=above, advice=advice) for entry in entries
    )


def check_bool(name: str, value: object, *, advice: str) -> bool:
    """Returns `value` if it is True or False, NumPy's included.

    Args:
      value: what the caller passed; 0 and 1 are refused.

    Raises:
      TypeError: `value` is no bool.

    Example:
      >>> check_bool("bias", 1, advice="Leave it out for a bias.")
      Traceback (most recent call last):
      TypeError: bias must be True or False, got 1. Leave it out for a bias.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}. {advice}")
    return bool(value)


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """Returns `value` if it is one of `choices`.

    Args:
      choices: the allowed strings.

    Raises:
      TypeError: `value` is no string.
      ValueError: `value` is not among `choices`.

    Example:
      >>> check_choice("accountant", "pld", ("pld", "rdp"))
      'pld'
    """
    if not isinstance(value, str) or value not in choices:
        allowed = " or ".join(repr(choice) for choice in choices)
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name} must be {allowed}, got {shown(value)}. Pass one of these strings.")
    return value


def check_callable(name: str, value: object, *, advice: str) -> Callable[..., Any]:
    """Returns `value` if it can be called.

    Raises:
      TypeError: `value` cannot be called.

    Example:
      >>> check_callable("loss_fn", 3, advice="Pass the loss of one example.")
      Traceback (most recent call last):
      TypeError: loss_fn must be a function, got 3. Pass the loss of one example.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {shown(value)}. {advice}")
    return value


def check_instance(name: str, value: object, kind: type[T], *, advice: str) -> T:
    """Returns `value` if it is an object of a class.

    Args:
      kind: the class.

    Raises:
      TypeError: `value` is of another class.

    Example:
      >>> check_instance("x", 3, str, advice="Quote it.")
      Traceback (most recent call last):
      TypeError: x must be of type str, got 3. Quote it.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {shown(value)}. {advice}")
    return value


def check_sequence(name: str, value: object, *, minimum: int = 0, advice: str) -> tuple[Any, ...]:
    """Returns `value` as a tuple if it is a sequence of at least `minimum` entries.

    Args:
      value: a list, a tuple, an array with axes, or another sequence; text is refused.
      minimum: the smallest allowed length.

    Returns:
      The entries, unchecked.

    Raises:
      TypeError: `value` is no sequence.
      ValueError: it is too short.

    Example:
      >>> check_sequence("layers", [1, 2], advice="Pass the layers in their order.")
      (1, 2)
    """
    if type(value) is tuple and len(value) >= minimum:
        return value
    is_array = isinstance(getattr(value, "ndim", None), int) and getattr(value, "ndim", 0) > 0
    if not (is_array or isinstance(value, Sequence)) or isinstance(value, str | bytes | bytearray):
        raise TypeError(f"{name} must be a sequence, got {shown(value)}. {advice}")
    entries = tuple(value)  # pyright: ignore[reportArgumentType]  # a Sequence or an array
    if len(entries) < minimum:
        raise ValueError(
            f"{name} must have at least {minimum} entries, got {shown(value)}. {advice}"
        )
    return entries


def check_array(name: str, value: T, *, advice: str) -> T:
    """Returns `value` if it is a number or an array of numbers, NumPy's or JAX's, traced or not.

    Args:
      value: what the caller passed; lists are refused, and so are random keys.

    Raises:
      TypeError: `value` is no array of numbers.
      ValueError: `value` is a Python integer that an int32 does not hold.

    Example:
      >>> check_array("logits", "3", advice="Pass the output of the model.")
      Traceback (most recent call last):
      TypeError: logits must be an array of numbers, got '3'. Pass the output of the model.
    """
    if isinstance(value, int) and not -(2**31) <= value < 2**31:
        raise ValueError(f"{name} must be within int32, got {shown(value)}. {advice}")
    dtype = getattr(value, "dtype", None)
    is_array = isinstance(dtype, np.dtype) and (
        # bfloat16 and its like are of a kind of their own.
        dtype.kind in "biufc" or dtype.name.startswith(("bfloat", "float", "int", "uint"))
    )
    if not (is_array or isinstance(value, int | float | complex)):
        raise TypeError(f"{name} must be an array of numbers, got {shown(value)}. {advice}")
    return value


def check_sizes(**sizes: object) -> None:
    """Raises unless all of them are positive integers that an axis may have."""
    advice = "It is the length of an axis, or a number of parts."
    for name, size in sizes.items():
        check_integer(name, size, minimum=1, maximum=LARGEST_SIZE, advice=advice)


def check_flags(**flags: object) -> None:
    """Raises unless all of them are True or False."""
    for name, flag in flags.items():
        check_bool(name, flag, advice="It says whether the layer has or does this.")


def check_rate(name: str, rate: object) -> None:
    """Raises unless it is the probability of a dropout."""
    check_real(name, rate, minimum=0, maximum=1, advice="It is the chance that an entry is zeroed.")
