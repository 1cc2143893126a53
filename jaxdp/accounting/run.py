"""The privacy of a run of equal steps: its event and its epsilon.

Example:
    >>> round(epsilon([2.0, 3.0, 4.0], steps=250, delta=1e-5, sampling_rate=0.04), 3)
    1.985
"""

import dp_accounting

from jaxdp.accounting.composition import (
    AccountantName,
    RelationName,
    as_question,
    check_delta,
    epsilon_of,
)
from jaxdp.accounting.mechanisms import Mechanism, Release, events_of, mechanisms_of
from jaxdp.accounting.schemes import (
    NoiseMultiplier,
    PoissonSampling,
    SamplingScheme,
    check_scheme,
    combined_noise_multiplier,
)
from jaxdp.checks import LARGEST_COUNT, check_integer, shown


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
    return events_of(_run_of(noise_multiplier, sampling, steps))


def _run_of(
    noise_multiplier: NoiseMultiplier, sampling: SamplingScheme, steps: int
) -> tuple[Mechanism, ...]:
    advice = "Pass the number of noised releases."
    steps = check_integer("steps", steps, minimum=0, maximum=LARGEST_COUNT, advice=advice)
    sigma = combined_noise_multiplier(noise_multiplier)
    check_scheme(sampling)
    return mechanisms_of([[Release(sigma, sampling, steps)]]) if steps else ()


def sampling_of(sampling_rate: float | None, sampling: SamplingScheme | None) -> SamplingScheme:
    """The scheme meant by the two alternative arguments.

    Args:
        sampling_rate: shorthand for Poisson sampling.
        sampling: any scheme.

    Returns:
        The scheme.

    Raises:
        TypeError: `sampling` is no scheme, or the rate is no number.
        ValueError: none or both are given, or the rate is outside (0, 1].

    Example:
        >>> sampling_of(0.5, None)
        PoissonSampling(sampling_rate=0.5)
    """
    if (sampling_rate is None) == (sampling is None):
        raise ValueError(
            "exactly one of sampling_rate and sampling must be given, got "
            f"sampling_rate={shown(sampling_rate)} and sampling={shown(sampling)}. "
            "Pass sampling_rate for Poisson sampling, sampling for any other scheme."
        )
    return check_scheme(sampling) if sampling_rate is None else PoissonSampling(sampling_rate)


def epsilon(
    noise_multiplier: NoiseMultiplier,
    *,
    steps: int,
    delta: float,
    sampling_rate: float | None = None,
    sampling: SamplingScheme | None = None,
    accountant: AccountantName = "pld",
    neighboring_relation: RelationName = "add_or_remove_one",
) -> float:
    """The ε of a run of equal steps at a given δ.

    With M the composition of `steps` sampled Gaussians,
    ε = min {e ≥ 0 : P[M(D) ∈ E] ≤ exp(e) P[M(D') ∈ E] + δ for all neighbours D, D' and all E},
    up to the accountant's rounding, which is always upwards.

    Args:
        noise_multiplier: σ ≥ 0, noise std / clip norm, or one for each Gaussian that a step
            releases from the same batch (see `combined_noise_multiplier`).
        steps: number of steps, ≥ 0.
        delta: δ in (0, 1). "pld" resolves δ down to about 1e-14.
        sampling_rate: q in (0, 1], shorthand for `sampling=PoissonSampling(q)`.
        sampling: how the batches are drawn; exactly one of the two is given.
        accountant: "pld" or "rdp".
        neighboring_relation: "add_or_remove_one" or "replace_one".

    Returns:
        ε ≥ 0: 0.0 for no steps, `math.inf` for no noise (σ < 1e-6 counts as none), and with "pld"
        where ε may exceed 10⁵: "rdp" has a number for it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; with "pld", more than 10⁸ sampled steps; or
            dp-accounting does not support the combination:
            fixed-size sampling needs "rdp" with "replace_one", Poisson sampling with "replace_one"
            needs "pld".

    Source: Doroshenko et al. 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy
    Loss Distributions" (pld); Mironov, Talwar, Zhang 2019, "Rényi Differential Privacy of the
    Sampled Gaussian Mechanism" (rdp).

    Example:
        >>> round(epsilon(1.1, steps=250, delta=1e-5, sampling_rate=0.04, accountant="rdp"), 3)
        3.895
    """
    mechanisms = _run_of(noise_multiplier, sampling_of(sampling_rate, sampling), steps)
    return epsilon_of(mechanisms, check_delta(delta), as_question(accountant, neighboring_relation))
