"""How private was the run: schemes, epsilon, calibration and the ledger; never imports jax.

The field's terms and the symbols of the papers:

==================== ======== ==================================================================
name                 symbol   meaning
==================== ======== ==================================================================
noise_multiplier     σ        noise standard deviation / clip norm: the effect of ONE example that
                              is added or removed, whatever the neighbouring relation
sampling_rate        q        probability that one example joins one step
steps                T        number of noised releases
epsilon, delta       ε, δ     for every event E: P[M(D) ∈ E] ≤ exp(ε) P[M(D') ∈ E] + δ
==================== ======== ==================================================================

Neighbours: under "add_or_remove_one" two data sets differ by zeroing out the contribution of one
example. Their number n is public, and so are the sampling rate B/n and the divisor B that are set
from it; a data set that is really shorter would move both, which no accountant counts (arXiv
2605.15648). Under "replace_one" they differ in the content of one example.

Wherever `delta` is asked for, a `Guarantee` may be given: it says δ, the accountant ("pld" by
privacy loss distributions, "rdp" by Rényi differential privacy) and the neighbours in one value.

Limits: every question is answered within seconds, or refused in a sentence. "pld" resolves δ down
to about 1e-14 and ε up to 10⁵ (infinity beyond both) and composes up to 10⁷ equal sampled steps. No
rounding makes an answer smaller; it makes one larger that asks for δ ≪ 10⁻⁸ of millions of steps
with hardly a sample among them. Where more than 32 different noise multipliers or rates are
composed, they are rounded to less privacy by 2.2% at the most; 1024 different mechanisms are the
most after that. "rdp" has none of these limits but the last.

Example:
  >>> from jaxdp import accounting
  >>> round(accounting.epsilon(1.1, steps=250, delta=1e-5, sampling_rate=0.04), 3)
  3.471
  >>> ledger = accounting.Ledger().charge(1.1, accounting.PoissonSampling(0.04), steps=250)
  >>> round(ledger.epsilon(1e-5), 3)
  3.471
"""

from jaxdp.accounting.calibration import (
    calibrate_noise_multiplier,
    calibrate_sampling_rate,
    calibrate_steps,
)
from jaxdp.accounting.draws import BATCHES, EPOCHS, Draws
from jaxdp.accounting.equal_steps import dp_event, epsilon
from jaxdp.accounting.guarantee import Guarantee
from jaxdp.accounting.ledger import Ledger
from jaxdp.accounting.mechanisms.gaussian import LedgerEntry
from jaxdp.accounting.mechanisms.pure import PureRelease
from jaxdp.accounting.question import AccountantName, RelationName
from jaxdp.accounting.schemes import (
    FixedSizeSampling,
    NoiseMultiplier,
    PoissonSampling,
    SamplingScheme,
    ShuffledEpochs,
    combined_noise_multiplier,
    scheme_from_dict,
)

__all__ = [
    "BATCHES",
    "EPOCHS",
    "AccountantName",
    "Draws",
    "FixedSizeSampling",
    "Guarantee",
    "Ledger",
    "LedgerEntry",
    "NoiseMultiplier",
    "PoissonSampling",
    "PureRelease",
    "RelationName",
    "SamplingScheme",
    "ShuffledEpochs",
    "calibrate_noise_multiplier",
    "calibrate_sampling_rate",
    "calibrate_steps",
    "combined_noise_multiplier",
    "dp_event",
    "epsilon",
    "scheme_from_dict",
]
