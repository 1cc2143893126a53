"""What fits for sure into a budget, without asking the accountant in full.

Example:
    >>> from jaxdp.accounting import Ledger, PoissonSampling
    >>> spent = Ledger().charge(1.1, PoissonSampling(0.04), steps=100)
    >>> surely_fits(spent, epsilon=2.5, delta=1e-5, rounded=True)
    True
"""

from jaxdp.accounting.composition import AccountantName, RelationName, as_question, epsilon_bound_of
from jaxdp.accounting.ledger import Ledger
from jaxdp.accounting.mechanisms import MAX_DISTINCT_SIGMAS, GaussianMechanism
from jaxdp.accounting.schemes import SamplingScheme, ShuffledEpochs


def surely_fits(
    ledger: Ledger,
    *,
    epsilon: float,
    delta: float,
    accountant: AccountantName = "pld",
    neighboring_relation: RelationName = "add_or_remove_one",
    rounded: bool,
) -> bool:
    """Whether an upper bound of what a ledger spends is within a budget.

    If it is, `ledger.epsilon(delta)` is within the budget, and so is that of every ledger that
    differs in fewer steps, or in steps with more noise: exactly, with `rounded`; without, as long
    as it holds too few different noise multipliers for them to be rounded.

    Args:
        ledger: what was, or might be, executed.
        epsilon: ε > 0.
        delta: δ in (0, 1).
        accountant: "pld" or "rdp".
        neighboring_relation: "add_or_remove_one" or "replace_one".
        rounded: whether to round noise multipliers down however few they are.

    Returns:
        True if it fits; False if the bound does not tell.

    Raises:
        ValueError: dp-accounting does not support the combination.

    Example:
        >>> surely_fits(Ledger().charge_pure(2.0), epsilon=1.0, delta=1e-5, rounded=False)
        False
    """
    question = as_question(accountant, neighboring_relation)
    mechanisms = ledger._mechanisms()
    return epsilon_bound_of(mechanisms, delta, question, rounded=rounded) <= epsilon


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
    mechanisms = [each for each in ledger._mechanisms() if isinstance(each, GaussianMechanism)]
    if sum(each.sampling is not None for each in mechanisms) > MAX_DISTINCT_SIGMAS:
        return None
    return frozenset(each.noise_multiplier for each in mechanisms if each.sampling == of)
