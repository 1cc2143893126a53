"""The inverse questions: how much noise, how many steps, which rate reach a target epsilon.

Every answer is on the safe side: `epsilon(answer) <= target` holds exactly, and the answer is
within 0.1% of the best one (for steps: one more step exceeds the target).

Example:
  >>> calibrate_steps(3.0, noise_multiplier=1.1, delta=1e-5, sampling_rate=0.04)
  183
"""

from jaxdp.accounting.ahead import rough_epsilon
from jaxdp.accounting.guarantee import Guarantee, as_guarantee
from jaxdp.accounting.ledger import Ledger
from jaxdp.accounting.question import AccountantName, RelationName, check_epsilon
from jaxdp.accounting.schemes import (
    NoiseMultiplier,
    PoissonSampling,
    SamplingScheme,
    combined_noise_multiplier,
    scheme_meant,
)
from jaxdp.accounting.search import Span, boldest_number
from jaxdp.checks import LARGEST_COUNT, check_integer

# The noise multipliers and rates among which an answer is looked for.
_SMALLEST_ANSWER, _LARGEST_ANSWER = 2.0**-4, 2.0**19
_SMALLEST_RATE = 2.0**-40


def _check_steps(steps: object, advice: str) -> int:
    return check_integer("steps", steps, minimum=1, maximum=LARGEST_COUNT, advice=advice)


def calibrate_noise_multiplier(
    epsilon: float,
    *,
    delta: float | Guarantee,
    steps: int,
    sampling_rate: float | None = None,
    sampling: SamplingScheme | None = None,
    accountant: AccountantName | None = None,
    neighboring_relation: RelationName | None = None,
) -> float:
    """The smallest noise multiplier with which a run stays within a target ε.

    σ* = min {σ : epsilon(σ, steps, δ, sampling) ≤ ε}, answered from above within 0.1%.

    Args:
      epsilon: target ε > 0.
      delta: δ in (0, 1); or a guarantee, which says accountant and neighbours as well.
      steps: number of steps, ≥ 1.
      sampling_rate: q in (0, 1], shorthand for Poisson sampling.
      sampling: how the batches are drawn; exactly one of the two is given.
      accountant: "pld", the default, or "rdp".
      neighboring_relation: "add_or_remove_one", the default, or "replace_one".

    Returns:
      σ in [σ*, 1.001 σ*], noise std / clip norm. For layers with multipliers in the proportion
      r_k, scale r by σ / combined_noise_multiplier(r).

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range, the combination is not supported, or no noise
        multiplier between 2⁻⁴ and 2¹⁹ is the answer.

    Example:
      >>> round(calibrate_noise_multiplier(3.0, delta=1e-5, steps=250, sampling_rate=0.04), 2)
      1.19
    """
    target = check_epsilon(epsilon)
    guarantee = as_guarantee(delta, accountant, neighboring_relation)
    steps = _check_steps(steps, "Without a step there is no noise.")
    scheme = scheme_meant(sampling_rate, sampling)

    def run(sigma: float) -> Ledger:
        return Ledger().charge(sigma, scheme, steps)

    sigma = boldest_number(
        lambda sigma: run(sigma).epsilon(guarantee),
        lambda sigma: rough_epsilon(run(sigma), guarantee),
        target,
        Span(_LARGEST_ANSWER, _SMALLEST_ANSWER, start=1.0, step=2.0),
    )
    if sigma is None:
        raise ValueError(
            f"epsilon must be reachable, got epsilon={target:g} at delta={guarantee.delta:g}: "
            f"noise_multiplier={_LARGEST_ANSWER:g} still gives "
            f"{run(_LARGEST_ANSWER).epsilon(guarantee):g}. "
            'Raise epsilon or delta; accountant="rdp" resolves smaller deltas than "pld".'
        )
    if sigma == _SMALLEST_ANSWER:
        raise ValueError(
            f"epsilon must need noise, got epsilon={target:g} at delta={guarantee.delta:g}, which "
            f"noise_multiplier={sigma:g} already meets. Lower epsilon, or delta, which "
            "may not exceed the chance that an example is drawn at all."
        )
    return sigma


def calibrate_steps(
    epsilon: float,
    *,
    noise_multiplier: NoiseMultiplier,
    delta: float | Guarantee,
    sampling_rate: float | None = None,
    sampling: SamplingScheme | None = None,
    accountant: AccountantName | None = None,
    neighboring_relation: RelationName | None = None,
    at_most: int = 10_000_000,
) -> int:
    """The largest number of steps that stays within a target ε.

    T* = max {T : epsilon(σ, T, δ, sampling) ≤ ε}.

    Args:
      epsilon: target ε > 0.
      noise_multiplier: σ ≥ 0, or one for each Gaussian released from the same batch.
      delta: δ in (0, 1); or a guarantee, which says accountant and neighbours as well.
      sampling_rate: q in (0, 1], shorthand for Poisson sampling.
      sampling: how the batches are drawn; exactly one of the two is given.
      accountant: "pld", the default, or "rdp".
      neighboring_relation: "add_or_remove_one", the default, or "replace_one".
      at_most: the largest answer of interest, ≥ 0.

    Returns:
      T*, exactly: T* fits and T* + 1 does not. 0 if no step fits, `at_most` if T* is larger.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range, or the combination is not supported.

    Example:
      >>> calibrate_steps(1.0, noise_multiplier=0.0, delta=1e-5, sampling_rate=0.04)
      0
    """
    scheme = scheme_meant(sampling_rate, sampling)
    return Ledger().steps_left(
        noise_multiplier,
        scheme,
        epsilon=epsilon,
        delta=as_guarantee(delta, accountant, neighboring_relation),
        at_most=at_most,
    )


def calibrate_sampling_rate(
    epsilon: float,
    *,
    noise_multiplier: NoiseMultiplier,
    steps: int,
    delta: float | Guarantee,
    accountant: AccountantName | None = None,
    neighboring_relation: RelationName | None = None,
) -> float:
    """The largest Poisson sampling rate with which a run stays within a target ε.

    q* = max {q : epsilon(σ, steps, δ, q) ≤ ε}, answered from below within 0.1%.

    Args:
      epsilon: target ε > 0.
      noise_multiplier: σ ≥ 0, or one for each Gaussian released from the same batch.
      steps: number of steps, ≥ 1.
      delta: δ in (0, 1); or a guarantee, which says accountant and neighbours as well.
      accountant: "pld", the default, or "rdp".
      neighboring_relation: "add_or_remove_one", the default, or "replace_one".

    Returns:
      q in [0.999 q*, q*]; exactly 1.0 if every example may join every step.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range, the combination is not supported, or not even a
        rate of 2⁻⁴⁰ fits.

    Example:
      >>> round(calibrate_sampling_rate(3.0, noise_multiplier=1.1, steps=250, delta=1e-5), 4)
      0.0349
    """
    target = check_epsilon(epsilon)
    guarantee = as_guarantee(delta, accountant, neighboring_relation)
    steps = _check_steps(steps, "Without a step no rate is too large.")
    sigma = combined_noise_multiplier(noise_multiplier)

    def run(rate: float) -> Ledger:
        return Ledger().charge(sigma, PoissonSampling(rate), steps)

    rate = boldest_number(
        lambda rate: run(rate).epsilon(guarantee),
        lambda rate: rough_epsilon(run(rate), guarantee),
        target,
        Span(_SMALLEST_RATE, 1.0, start=1.0, step=1 / 8),
    )
    if rate is None:
        raise ValueError(
            f"epsilon must be reachable, got epsilon={target:g} at delta={guarantee.delta:g}: "
            f"noise_multiplier={sigma:g} gives {run(_SMALLEST_RATE).epsilon(guarantee):g} even at "
            f"sampling_rate={_SMALLEST_RATE:g}. Raise noise_multiplier, epsilon or delta."
        )
    return rate
