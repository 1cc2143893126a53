"""A run of equal steps: its event and its epsilon. Both ask a ledger.

Example:
  >>> round(epsilon([2.0, 3.0, 4.0], steps=250, delta=1e-5, sampling_rate=0.04), 3)
  1.985
"""

# pyright: reportMissingTypeStubs=false

import dp_accounting

from jaxdp.accounting.guarantee import Guarantee, as_guarantee
from jaxdp.accounting.ledger import Ledger
from jaxdp.accounting.question import AccountantName, RelationName
from jaxdp.accounting.schemes import NoiseMultiplier, SamplingScheme, scheme_meant
from jaxdp.checks import LARGEST_COUNT, check_integer


def dp_event(
    noise_multiplier: NoiseMultiplier, sampling: SamplingScheme, steps: int = 1
) -> dp_accounting.DpEvent:
    """The dp-accounting event of a run of equal steps.

    Its noise multipliers are noise std / clip norm. dp-accounting's RDP accountant reads them
    relative to the distance of the neighbours, 2 · clip norm under replace-one; `epsilon` and
    `Ledger` take care of that, a caller who feeds the event to that accountant must halve them.

    Args:
      noise_multiplier: σ ≥ 0, or one for each Gaussian released from the same batch.
      sampling: how the batches were drawn.
      steps: number of steps, ≥ 0.

    Returns:
      A `dp_accounting.DpEvent`.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

    Example:
      >>> from jaxdp.accounting import ShuffledEpochs
      >>> dp_event(1.1, ShuffledEpochs(steps_per_epoch=100), steps=250)
      SelfComposedDpEvent(event=GaussianDpEvent(noise_multiplier=1.1), count=3)
    """
    return _run(noise_multiplier, sampling, steps).dp_event()


def epsilon(
    noise_multiplier: NoiseMultiplier,
    *,
    steps: int,
    delta: float | Guarantee,
    sampling_rate: float | None = None,
    sampling: SamplingScheme | None = None,
    accountant: AccountantName | None = None,
    neighboring_relation: RelationName | None = None,
) -> float:
    """The ε of a run of equal steps at a given δ.

    With M the composition of `steps` sampled Gaussians,
    ε = min {e ≥ 0 : P[M(D) ∈ E] ≤ exp(e) P[M(D') ∈ E] + δ for all neighbours D, D' and all E},
    up to the accountant's rounding, which is always upwards.

    Args:
      noise_multiplier: σ ≥ 0, noise std / clip norm, or one for each Gaussian that a step
        releases from the same batch (see `combined_noise_multiplier`).
      steps: number of steps, ≥ 0.
      delta: δ in (0, 1), of which "pld" resolves down to about 1e-14; or a guarantee, which says
        accountant and neighbours as well.
      sampling_rate: q in (0, 1], shorthand for `sampling=PoissonSampling(q)`.
      sampling: how the batches are drawn; exactly one of the two is given.
      accountant: "pld", the default, or "rdp".
      neighboring_relation: "add_or_remove_one", the default, or "replace_one".

    Returns:
      ε ≥ 0: 0.0 for no steps, `math.inf` for no noise (σ < 1e-6 counts as none), and with "pld"
      where ε may exceed 10⁵: "rdp" has a number for it.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range or contradicts the guarantee; with "pld", there are
        more than 10⁷ sampled steps; or dp-accounting does not support the combination:
        fixed-size sampling needs "rdp" with "replace_one", Poisson sampling with "replace_one"
        needs "pld".

    Source: Doroshenko et al. 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy
    Loss Distributions" (pld); Mironov, Talwar, Zhang 2019, "Rényi Differential Privacy of the
    Sampled Gaussian Mechanism" (rdp).

    Example:
      >>> round(epsilon(1.1, steps=250, delta=1e-5, sampling_rate=0.04, accountant="rdp"), 3)
      3.895
    """
    guarantee = as_guarantee(delta, accountant, neighboring_relation)
    scheme = scheme_meant(sampling_rate, sampling)
    return _run(noise_multiplier, scheme, steps).epsilon(guarantee)


def _run(noise_multiplier: NoiseMultiplier, sampling: SamplingScheme, steps: int) -> Ledger:
    advice = "Pass the number of noised releases."
    steps = check_integer("steps", steps, minimum=0, maximum=LARGEST_COUNT, advice=advice)
    return Ledger().charge(noise_multiplier, sampling, steps)
