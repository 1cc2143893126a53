"""Few schemes, and ledgers of a few charges."""

from typing import Any, Literal

from jaxdp.accounting import (
    FixedSizeSampling,
    Ledger,
    PoissonSampling,
    PureRelease,
    SamplingScheme,
    ShuffledEpochs,
)

DELTA = 1e-5
ADD: Literal["add_or_remove_one"] = "add_or_remove_one"
REPLACE: Literal["replace_one"] = "replace_one"

POISSON, OTHER, FIXED, SHUFFLED = (
    PoissonSampling(0.1),
    PoissonSampling(0.2),
    FixedSizeSampling(100, 10),
    ShuffledEpochs(4),
)


def ledger_of(*charged: tuple[Any, SamplingScheme, int] | PureRelease) -> Ledger:
    ledger = Ledger()
    for each in charged:
        if isinstance(each, PureRelease):
            ledger = ledger.charge_pure(each.epsilon, each.sampling)
        else:
            ledger = ledger.charge(*each)
    return ledger
