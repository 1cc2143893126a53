"""Errors name the rule, the value and what to do."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from jaxdp import accounting
from jaxdp.accounting import (
    FixedSizeSampling,
    Ledger,
    PoissonSampling,
    ShuffledEpochs,
    calibrate_noise_multiplier,
    calibrate_sampling_rate,
    calibrate_steps,
    epsilon,
)
from tests.accounting.small import DELTA, FIXED, POISSON, REPLACE, SHUFFLED, ledger_of

# Typed as Any: the table passes wrong types on purpose.
EPSILON: Any = epsilon
NOISE: Any = calibrate_noise_multiplier
RATE: Any = calibrate_sampling_rate
STEPS: Any = calibrate_steps
ANY: Any = accounting
BOOK: Any = Ledger()


def ask(sigma: Any = 1.0, **changes: Any) -> Callable[[], object]:
    return lambda: EPSILON(sigma, **({"steps": 3, "delta": DELTA, "sampling": POISSON} | changes))


ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (ask(-1.0), ValueError, "noise_multiplier must be finite, >= 0, got -1.0"),
    (ask(math.inf), ValueError, "noise_multiplier must be finite"),
    (ask([1.0, math.nan]), ValueError, "noise_multiplier must be finite"),
    (ask([]), ValueError, "noise_multiplier must hold at least one number"),
    (ask("1"), TypeError, "noise_multiplier must be a real number, got '1'"),
    (ask(True), TypeError, "noise_multiplier must be a real number, got True"),
    (ask(None), TypeError, "noise_multiplier must be a real number, got None"),
    (ask(steps=-1), ValueError, "steps must be at least 0, got -1"),
    (ask(steps=1.0), TypeError, "steps must be an integer, got 1.0"),
    (ask(delta=0.0), ValueError, "delta must be finite, > 0, < 1, got 0.0"),
    (ask(delta=1.0), ValueError, "delta must be finite, > 0, < 1, got 1.0"),
    (ask(delta=None), TypeError, "delta must be a real number, got None"),
    (ask(sampling=None), ValueError, "exactly one of sampling_rate and sampling"),
    (ask(sampling_rate=0.1), ValueError, "exactly one of sampling_rate and sampling"),
    (ask(sampling=0.1), TypeError, "sampling must be PoissonSampling, FixedSizeSampling or"),
    (ask(sampling=None, sampling_rate=0), ValueError, "sampling_rate must be finite, > 0, <= 1"),
    (ask(accountant="prv"), ValueError, "accountant must be 'pld' or 'rdp', got 'prv'"),
    (ask(neighboring_relation="zero"), ValueError, "neighboring_relation must be 'add_or_remove"),
    (ask(sampling=FIXED), ValueError, 'Use accountant="rdp" with .*"replace_one"'),
    (ask(sampling=FIXED, accountant="rdp"), ValueError, 'accountant="rdp" with .*"replace_one"'),
    (ask(sampling=FIXED, neighboring_relation=REPLACE), ValueError, "which it does not"),
    (
        ask(accountant="rdp", neighboring_relation=REPLACE),
        ValueError,
        'Use accountant="pld" for "replace_one"',
    ),
    (ask(0.0, sampling=FIXED), ValueError, "must be one that dp-accounting supports"),
    (
        lambda: ledger_of((1.0, POISSON, 1), (1.0, FIXED, 1)).epsilon(DELTA),
        ValueError,
        "No accountant composes Poisson and fixed-size steps",
    ),
    (lambda: PoissonSampling(0), ValueError, "sampling_rate must be finite, > 0, <= 1, got 0.0"),
    (lambda: PoissonSampling(1.1), ValueError, "sampling_rate must be"),
    (lambda: ANY.PoissonSampling("a"), TypeError, "sampling_rate must be a real number"),
    (lambda: FixedSizeSampling(5, 6), ValueError, "batch_size must be at most num_examples=5"),
    (lambda: FixedSizeSampling(0, 1), ValueError, "num_examples must be at least 1"),
    (lambda: ShuffledEpochs(0), ValueError, "steps_per_epoch must be at least 1, got 0"),
    (lambda: ANY.ShuffledEpochs(1.5), TypeError, "steps_per_epoch must be an integer"),
    (lambda: ANY.scheme_from_dict({"kind": "x"}), ValueError, "sampling kind must be 'poisson'"),
    (lambda: ANY.scheme_from_dict({"kind": "poisson"}), ValueError, "sampling scheme must be a m"),
    (lambda: ANY.LedgerEntry((1.0,), POISSON, 0), ValueError, "steps must be at least 1, got 0"),
    (lambda: ANY.LedgerEntry((1.0,), None, 1), TypeError, "sampling must be PoissonSampling"),
    (lambda: BOOK.charge(-1.0, POISSON), ValueError, "noise_multiplier must be"),
    (lambda: BOOK.charge(-1.0, POISSON, 0), ValueError, "noise_multiplier must be"),
    (lambda: BOOK.charge(1.0, 0.1), TypeError, "sampling must be PoissonSampling"),
    (lambda: BOOK.charge(1.0, POISSON, -1), ValueError, "steps must be at least 0, got -1"),
    (lambda: BOOK.charge_pure(0.0), ValueError, "epsilon must be finite, > 0, got 0.0"),
    (lambda: BOOK.charge_pure(math.inf), ValueError, "epsilon must be finite, > 0, got inf"),
    (lambda: BOOK.charge_pure("1"), TypeError, "epsilon must be a real number, got '1'"),
    (lambda: BOOK.charge_pure(0.1, 0.5), TypeError, "must be PoissonSampling or None, got 0.5"),
    (lambda: BOOK.charge_pure(0.1, SHUFFLED), TypeError, "Pass None where the whole data set"),
    (lambda: BOOK.charge_pure(0.1).dp_event(), ValueError, "Ask the ledger itself for epsilon"),
    (lambda: BOOK.merge({}), TypeError, "other must be of type Ledger, got {}"),
    (lambda: BOOK.epsilon(2.0), ValueError, "delta must be"),
    (lambda: BOOK.delta(-1.0), ValueError, "epsilon must be finite, >= 0, got -1.0"),
    (
        lambda: BOOK.steps_left(1.0, POISSON, epsilon=0.0, delta=DELTA),
        ValueError,
        "epsilon must be finite, > 0, got 0.0",
    ),
    (
        lambda: NOISE(1.0, delta=DELTA, steps=0, sampling_rate=0.1),
        ValueError,
        "steps must be at least 1, got 0. Without a step there is no noise",
    ),
    (
        lambda: NOISE(1e-9, delta=1e-17, steps=5, sampling_rate=0.1),
        ValueError,
        "epsilon must be reachable.* still gives .*rdp",
    ),
    (
        lambda: NOISE(1e9, delta=DELTA, steps=1, sampling_rate=0.1, accountant="rdp"),
        ValueError,
        "epsilon must need noise.*Lower epsilon, or delta",
    ),
    (
        lambda: RATE(1.0, noise_multiplier=0.0, steps=5, delta=DELTA),
        ValueError,
        "epsilon must be reachable.*noise_multiplier=0 gives inf even at",
    ),
    (
        lambda: STEPS(1.0, noise_multiplier=1.0, delta=DELTA, sampling_rate=0.1, at_most=-1),
        ValueError,
        "at_most must be at least 0, got -1",
    ),
    (
        lambda: STEPS("1", noise_multiplier=1.0, delta=DELTA, sampling_rate=0.1),
        TypeError,
        "epsilon must be a real number, got '1'",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_rule_and_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
