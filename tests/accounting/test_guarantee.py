"""One value for what an epsilon is stated with, checked where it is made."""

import dataclasses
from typing import Any

import pytest

from jaxdp.accounting import Guarantee
from jaxdp.accounting.guarantee import as_guarantee

RDP = Guarantee(1e-5, "rdp", "replace_one")
ANY: Any = Guarantee
ASKED: Any = as_guarantee


def test_a_guarantee_is_a_value() -> None:
    assert Guarantee(1e-5) == Guarantee(1e-5, "pld", "add_or_remove_one")
    assert len({Guarantee(1e-5), Guarantee(1e-5), RDP}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(RDP, "delta", 0.5)  # noqa: B010


def test_the_arguments_mean_a_guarantee() -> None:
    assert as_guarantee(1e-5, "rdp", "replace_one") == RDP
    assert as_guarantee(RDP) is RDP
    assert as_guarantee(RDP, "rdp") is RDP
    assert as_guarantee(RDP, neighboring_relation="replace_one") is RDP


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ANY(0.0), ValueError, "delta must be finite, > 0, < 1, got 0.0"),
        (lambda: ANY(RDP), TypeError, "delta must be a real number, got Guarantee"),
        (lambda: ANY(1e-5, "prv"), ValueError, "accountant must be 'pld' or 'rdp', got 'prv'"),
        (lambda: ANY(1e-5, None), TypeError, "accountant must be 'pld' or 'rdp', got None"),
        (lambda: ANY(1e-5, "rdp", "some"), ValueError, "neighboring_relation must be 'add_or_rem"),
        (lambda: ASKED(RDP, "pld"), ValueError, "accountant must be that of the guarantee, 'rdp'"),
        (lambda: ASKED(RDP, "prv"), ValueError, "accountant must be 'pld' or 'rdp', got 'prv'"),
        (
            lambda: ASKED(RDP, None, "add_or_remove_one"),
            ValueError,
            "neighboring_relation must be that of the guarantee, 'replace_one', got 'add_or_rem",
        ),
    ],
)
def test_what_is_none_is_refused(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
