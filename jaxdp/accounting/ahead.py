"""What is known of a ledger's ε without asking the accountant in full.

Example:
  >>> from jaxdp.accounting import Ledger, PoissonSampling
  >>> spent = Ledger().charge(1.1, PoissonSampling(0.04), steps=100)
  >>> surely_fits(spent, 2.5, Guarantee(1e-5), rounded=True)
  True
"""

from jaxdp.accounting.coarsening import MAX_DISTINCT_SIGMAS
from jaxdp.accounting.composition import epsilon_bound_of, rough_epsilon_of
from jaxdp.accounting.guarantee import Guarantee
from jaxdp.accounting.ledger import Ledger
from jaxdp.accounting.mechanisms import mechanisms_of
from jaxdp.accounting.mechanisms.gaussian import SampledGaussian
from jaxdp.accounting.schemes import SamplingScheme, ShuffledEpochs


def rough_epsilon(ledger: Ledger, guarantee: Guarantee) -> float:
    """About the ε of a ledger, for "pld" in a tenth of the time: to search with.

    Args:
      ledger: what was, or might be, executed.
      guarantee: δ, accountant and neighbouring relation.

    Returns:
      ε ≥ 0, or `math.inf`.

    Raises:
      ValueError: dp-accounting does not support the combination, or it is more than can be
        composed.

    Example:
      >>> round(rough_epsilon(Ledger().charge_pure(2.0), Guarantee(1e-5)), 2)
      2.0
    """
    return rough_epsilon_of(mechanisms_of(ledger.runs), guarantee)


def surely_fits(ledger: Ledger, epsilon: float, guarantee: Guarantee, *, rounded: bool) -> bool:
    """Whether an upper bound of what a ledger spends is within a budget.

    If it is, `ledger.epsilon(delta)` is within the budget, and so is that of every ledger that
    differs in fewer steps, or in steps with more noise: exactly, with `rounded`; without, as long
    as it holds too few different noise multipliers for them to be rounded.

    Args:
      ledger: what was, or might be, executed.
      epsilon: ε > 0.
      guarantee: δ, accountant and neighbouring relation.
      rounded: whether to round noise multipliers down however few they are.

    Returns:
      True if it fits; False if the bound does not tell.

    Raises:
      ValueError: dp-accounting does not support the combination.

    Example:
      >>> surely_fits(Ledger().charge_pure(2.0), 1.0, Guarantee(1e-5), rounded=False)
      False
    """
    return epsilon_bound_of(mechanisms_of(ledger.runs), guarantee, rounded=rounded) <= epsilon


def exact_noise(ledger: Ledger, sampling: SamplingScheme) -> frozenset[float] | None:
    """The noise multipliers that a ledger composes as they are, of one scheme.

    Args:
      ledger: what was executed.
      sampling: the scheme.

    Returns:
      Those of the steps with this scheme; None if there are so many that they are rounded.

    Example:
      >>> from jaxdp.accounting import PoissonSampling
      >>> scheme = PoissonSampling(0.04)
      >>> exact_noise(Ledger().charge(1.1, scheme, steps=100), scheme)
      frozenset({1.1})
    """
    of = None if isinstance(sampling, ShuffledEpochs) else sampling
    gaussians = [
        each for each, _ in mechanisms_of(ledger.runs) if isinstance(each, SampledGaussian)
    ]
    if sum(each.sampling is not None for each in gaussians) > MAX_DISTINCT_SIGMAS:
        return None
    return frozenset(each.noise_multiplier for each in gaussians if each.sampling == of)
