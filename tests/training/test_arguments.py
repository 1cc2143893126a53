"""Arguments of `fit`: what cannot be is refused by one sentence, before anything is read."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.accounting import Guarantee, PoissonSampling
from tests.training import small
from tests.training.small import fit

ANY_FIT: Any = fit


def untouched(indices: np.ndarray) -> Any:
    raise AssertionError("an impossible run must fail before it reads data")


NO_INTEGERS: list[Any] = [10.5, math.nan, math.inf, True, "3", None, b"3", [3], 3j, np.ones(2)]
NO_NUMBERS: list[Any] = ["3", True, b"x", [], {}, 3j, object(), np.ones(2)]

# (arguments, error, what it says)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(({"steps": v}, TypeError, "steps must be an integer, got") for v in NO_INTEGERS),
    ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
    ({"steps": 10**30}, ValueError, "steps must be at most 2147483647, got 1000"),
    *(
        ({"report_every": v}, TypeError, "report_every must be an integer, got")
        for v in NO_INTEGERS
        if v is not None
    ),
    ({"report_every": 0}, ValueError, "report_every must be at least 1, got 0"),
    *(({"data_parts": v}, TypeError, "data_parts must be an integer, got") for v in NO_INTEGERS),
    ({"data_parts": 0}, ValueError, "data_parts must be at least 1, got 0"),
    ({"data_parts": -2}, ValueError, "data_parts must be at least 1, got -2"),
    ({"data_parts": 2}, ValueError, "data_parts must divide the 1 devices"),
    *(({"delta": v}, TypeError, "delta must be a real number, got") for v in [*NO_NUMBERS, None]),
    *(({"delta": v}, ValueError, "delta must be") for v in (0, 1, -1e-5, math.nan, math.inf)),
    *(({"budget": v}, TypeError, "budget must be a real number, got") for v in NO_NUMBERS),
    *(({"budget": v}, ValueError, "budget must be") for v in (0, -1.0, math.nan, math.inf)),
    ({"accountant": "moments"}, ValueError, "accountant must be 'pld' or 'rdp', got 'moments'"),
    ({"accountant": 3}, TypeError, "accountant must be 'pld' or 'rdp', got 3"),
    (
        {"delta": Guarantee(1e-5), "accountant": "rdp"},
        ValueError,
        "accountant must be that of the guarantee, 'pld', got 'rdp'",
    ),
    ({"neighboring_relation": "some"}, ValueError, "neighboring_relation must be"),
    ({"neighboring_relation": 3}, TypeError, "neighboring_relation must be"),
    ({"ledger": {}}, TypeError, "ledger must be of type Ledger, got {}. Pass run.ledger"),
    ({"ledger": None}, TypeError, "ledger must be of type Ledger"),
    ({"ledger": "{}"}, TypeError, "ledger must be of type Ledger"),
    ({"sampler": PoissonSampling(0.1)}, TypeError, "sampler must be of type Sampler, got Poisson"),
    ({"sampler": 3}, TypeError, "sampler must be of type Sampler, got 3"),
    ({"state": {}}, TypeError, "state must be of type TrainState, got {}. Pass training.init"),
    ({"step": print}, TypeError, "step must be of type Step, got <built-in"),
    ({"evaluate": 3}, TypeError, "evaluate must be a function, got 3"),
    ({"checkpoints": "out"}, TypeError, "checkpoints must be of type Checkpoints, got 'out'"),
    ({"sharding": 4}, TypeError, "sharding must be of type NamedSharding, got 4"),
    ({"progress": 1}, TypeError, "progress must be True or False, got 1"),
    ({"log_fn": "nowhere"}, ValueError, "'nowhere'"),
    ({"data": None}, ValueError, "every leaf of data must hold the 24 examples"),
    ({"data": "text"}, ValueError, "every leaf of data must hold the 24 examples"),
    ({"data": object()}, ValueError, "every leaf of data must hold the 24 examples"),
    ({"data": {}}, ValueError, "every leaf of data must hold the 24 examples"),
    ({"data": 3.0}, ValueError, "every leaf of data must hold the 24 examples"),
    ({"data": [[1.0, 2.0], [3.0]]}, ValueError, "every leaf of data must hold the 24 examples"),
]


@pytest.mark.parametrize(("arguments", "error", "says"), REFUSED)
def test_what_cannot_be_is_refused(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as refused:
        ANY_FIT(**({"data": untouched} | arguments))
    assert "\n" not in str(refused.value)


def test_numbers_of_any_kind_are_numbers() -> None:
    options: dict[str, Any] = {
        "steps": np.int64(4),
        "report_every": jnp.asarray(2),
        "delta": np.float64(1e-5),
        "budget": np.array(100),
        "data_parts": np.uint8(1),
    }
    run = fit(**options)
    small.assert_same(run, fit())
    assert all(type(value) in (int, float) for value in run.history[-1].values())


def test_a_guarantee_says_what_three_arguments_say() -> None:
    names: dict[str, Any] = {"accountant": "pld", "neighboring_relation": "replace_one"}
    options: dict[str, Any] = {"budget": 6.0, "steps": 40}
    named = fit(**names, **options)
    assert named.stopped_by == "budget"
    guarantee = Guarantee(small.DELTA, **names)
    small.assert_same(fit(delta=guarantee, accountant=None, **options), named)
    # Said twice alike it is said once.
    small.assert_same(fit(delta=guarantee, **names, **options), named)
