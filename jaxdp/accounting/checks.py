"""The checks that accounting and sampling share: each names the argument, the rule and the value.

Example:
    >>> check_integer("steps", 3, minimum=0, advice="Pass the number of executed steps.")
    3
"""

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real


def check_integer(name: str, value: object, *, minimum: int, advice: str) -> int:
    """Returns `value` as an int, or says why it is not an integer of at least `minimum`.

    Args:
        name: the argument's name, for the message.
        value: any integer type, NumPy's included; bool is refused.
        minimum: the smallest allowed value.
        advice: one sentence on what to do next.

    Returns:
        The value as a Python int.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below `minimum`.

    Example:
        >>> check_integer("steps", -1, minimum=0, advice="Count from zero.")
        Traceback (most recent call last):
        ValueError: steps must be at least 0, got -1. Count from zero.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}. {advice}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}. {advice}")
    return int(value)


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
        name: the argument's name, for the message.
        value: any real number type, NumPy's included; bool is refused.
        minimum: inclusive lower bound.
        above: exclusive lower bound.
        maximum: inclusive upper bound.
        below: exclusive upper bound.
        advice: one sentence on what to do next.

    Returns:
        The value as a Python float.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is not finite or breaks a bound.

    Example:
        >>> check_real("delta", 2.0, above=0, below=1, advice="1e-5 is usual.")
        Traceback (most recent call last):
        ValueError: delta must be finite, > 0, < 1, got 2.0. 1e-5 is usual.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r}. {advice}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the floats is as unusable as infinity
        number = math.inf
    if not (math.isfinite(number) and minimum <= number <= maximum and above < number < below):
        bounds = ((">=", minimum), (">", above), ("<=", maximum), ("<", below))
        rule = ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound))
        raise ValueError(f"{name} must be finite, {rule}, got {number!r}. {advice}")
    return number


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """Returns `value` if it is one of `choices`.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        choices: the allowed strings.

    Returns:
        The value.

    Raises:
        ValueError: `value` is not among `choices`.

    Example:
        >>> check_choice("accountant", "pld", ("pld", "rdp"))
        'pld'
    """
    if not isinstance(value, str) or value not in choices:
        allowed = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {allowed}, got {value!r}. Pass one of these strings.")
    return value


def check_keys(name: str, value: object, keys: Collection[str]) -> Mapping[str, object]:
    """Returns `value` if it is a mapping with exactly the given keys.

    Args:
        name: what the mapping describes, for the message.
        value: parsed JSON.
        keys: the keys it must have, no more and no fewer.

    Returns:
        The mapping.

    Raises:
        ValueError: it is no mapping, or its keys differ.

    Example:
        >>> check_keys("point", {"x": 1}, {"x"})
        {'x': 1}
    """
    if not isinstance(value, Mapping) or set(value) != set(keys):
        found = sorted(map(str, value)) if isinstance(value, Mapping) else repr(value)
        raise ValueError(
            f"{name} must be a mapping with the keys {sorted(keys)}, got {found}. "
            "It was not written by this version of jaxdp or has been altered."
        )
    return value
