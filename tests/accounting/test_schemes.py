"""Sampling schemes as JSON and as events of dp-accounting."""

import dataclasses
import json

import dp_accounting
import pytest

from jaxdp import accounting
from jaxdp.accounting import (
    FixedSizeSampling,
    Ledger,
    PoissonSampling,
    SamplingScheme,
    ShuffledEpochs,
    dp_event,
)

SCHEMES: list[SamplingScheme] = [
    PoissonSampling(0.1),
    FixedSizeSampling(100, 7),
    ShuffledEpochs(13),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_survive_json_and_are_frozen(scheme):
    rebuilt = accounting.scheme_from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert rebuilt == scheme
    assert hash(rebuilt) == hash(scheme)
    field = dataclasses.fields(scheme)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(scheme, field, 1)


def test_events_are_dp_accounting_events():
    gaussian = dp_accounting.GaussianDpEvent(2.0)
    poisson = dp_accounting.PoissonSampledDpEvent(0.1, gaussian)
    fixed = dp_accounting.SampledWithoutReplacementDpEvent(100, 7, gaussian)
    many = dp_accounting.SelfComposedDpEvent
    assert dp_event(2.0, PoissonSampling(0.1), 5) == many(poisson, 5)
    assert dp_event(2.0, FixedSizeSampling(100, 7), 5) == many(fixed, 5)
    assert dp_event(2.0, ShuffledEpochs(4), 5) == many(gaussian, 2)
    assert dp_event(2.0, ShuffledEpochs(4), 4) == gaussian
    assert dp_event(2.0, PoissonSampling(0.1), 0) == dp_accounting.NoOpDpEvent()
    silent = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(0.0))
    assert dp_event([2.0, 0.0], PoissonSampling(0.1)) == silent
    both = Ledger().charge(2.0, PoissonSampling(0.1)).charge(2.0, ShuffledEpochs(4))
    assert both.dp_event() == dp_accounting.ComposedDpEvent([poisson, gaussian])
