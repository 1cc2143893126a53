"""What counted mechanisms cost together, by either accountant. Answers are cached.

Example:
  >>> from jaxdp.accounting.mechanisms.gaussian import SampledGaussian
  >>> from jaxdp.accounting.schemes import PoissonSampling
  >>> steps = Counted(SampledGaussian(PoissonSampling(0.04), 1.1), 250)
  >>> round(epsilon_of((steps,), Guarantee(1e-5)), 3)
  3.471
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

from jaxdp.accounting import pld, rdp
from jaxdp.accounting.coarsening import coarsened
from jaxdp.accounting.guarantee import Guarantee
from jaxdp.accounting.mechanisms.base import Counted
from jaxdp.accounting.question import Question, RelationName

# How much coarser the grid of a bound is. A power of two, as `pld.epsilon` needs.
_BOUND_COARSER = 16


@lru_cache(maxsize=4096)
def epsilon_of(mechanisms: tuple[Counted, ...], guarantee: Guarantee) -> float:
    """The ε at which the composed mechanisms are (ε, δ) differentially private.

    Args:
      mechanisms: from `mechanisms_of`.
      guarantee: δ, accountant and neighbouring relation.

    Returns:
      ε ≥ 0; `math.inf` if something was released without noise, and where "pld" would have to
      resolve an ε beyond 10⁵.

    Raises:
      ValueError: dp-accounting does not support the combination, or it is more than can be
        composed.

    Example:
      >>> epsilon_of((), Guarantee(1e-5))
      0.0
    """
    return _epsilon(mechanisms, guarantee.delta, guarantee.question, pld.epsilon)


@lru_cache(maxsize=4096)
def epsilon_bound_of(
    mechanisms: tuple[Counted, ...], guarantee: Guarantee, *, rounded: bool
) -> float:
    """At least `epsilon_of`, usually within 3%, and for "pld" in about a tenth of the time.

    An upper bound: it composes on a grid of losses that is sixteen times coarser, whose points are
    points of the fine one, and rounding a distribution up to a coarser grid can only raise every
    δ(ε). With `rounded` noise multipliers are rounded down however few they are, which raises δ(ε)
    as well, and makes the bound hold for all mechanisms that are `rounded_down` alike or to more.
    What tails a composition cuts off is counted as infinite: 1e-15 each, hence a δ that is smaller
    by what a thousand of them cut off.

    Args:
      mechanisms: from `mechanisms_of`.
      guarantee: δ, accountant and neighbouring relation.
      rounded: whether to round all noise multipliers down.

    Returns:
      ε ≥ 0, or `math.inf`.

    Raises:
      ValueError: dp-accounting does not support the combination, or it is more than can be
        composed.

    Example:
      >>> from jaxdp.accounting.mechanisms.gaussian import SampledGaussian
      >>> from jaxdp.accounting.schemes import PoissonSampling
      >>> steps = (Counted(SampledGaussian(PoissonSampling(0.04), 1.1), 250),)
      >>> bound = epsilon_bound_of(steps, Guarantee(1e-5), rounded=False)
      >>> 1 <= bound / epsilon_of(steps, Guarantee(1e-5)) < 1.01
      True
    """
    smaller = 0.999 * guarantee.delta - 1e-12
    bound = partial(pld.epsilon, coarser=_BOUND_COARSER)
    return _epsilon(mechanisms, smaller, guarantee.question, bound, rounded=rounded)


@lru_cache(maxsize=4096)
def rough_epsilon_of(mechanisms: tuple[Counted, ...], guarantee: Guarantee) -> float:
    """About `epsilon_of`, for "pld" in a tenth of the time: to search with, never to answer with.

    It differs from `epsilon_bound_of` by not allowing for what tails a composition cuts off, and so
    tells something of every δ.

    Args:
      mechanisms: from `mechanisms_of`.
      guarantee: δ, accountant and neighbouring relation.

    Returns:
      ε ≥ 0, or `math.inf`.

    Raises:
      ValueError: dp-accounting does not support the combination, or it is more than can be
        composed.

    Example:
      >>> from jaxdp.accounting.mechanisms.gaussian import SampledGaussian
      >>> from jaxdp.accounting.schemes import PoissonSampling
      >>> steps = (Counted(SampledGaussian(PoissonSampling(0.04), 1.1), 250),)
      >>> rough = rough_epsilon_of(steps, Guarantee(1e-5))
      >>> abs(rough / epsilon_of(steps, Guarantee(1e-5)) - 1) < 0.01
      True
    """
    return _epsilon(mechanisms, guarantee.delta, guarantee.question, pld.rough_epsilon)


@lru_cache(maxsize=4096)
def delta_of(mechanisms: tuple[Counted, ...], epsilon: float, question: Question) -> float:
    """The δ at which the composed mechanisms are (ε, δ) differentially private.

    Args:
      mechanisms: from `mechanisms_of`.
      epsilon: ε ≥ 0.
      question: accountant and neighbouring relation.

    Returns:
      δ in [0, 1]; 1.0 if something was released without noise, and where "pld" would have to
      resolve an ε beyond 10⁵.

    Raises:
      ValueError: dp-accounting does not support the combination, or it is more than can be
        composed.

    Example:
      >>> delta_of((), 1.0, Question("pld", "replace_one"))
      0.0
    """
    if not mechanisms:
        return 0.0
    composed = _composed(mechanisms, question)
    if composed is None:
        return 1.0
    accountant = rdp if question.accountant == "rdp" else pld
    return accountant.delta(composed, epsilon, question.relation)


def _epsilon(
    mechanisms: tuple[Counted, ...],
    delta: float,
    question: Question,
    by_pld: Callable[[tuple[Counted, ...], float, RelationName], float],
    *,
    rounded: bool = False,
) -> float:
    """Of all three above: by "rdp" there is one way, by "pld" each has its own; noise multipliers
    may be `rounded` however few they are."""
    if not mechanisms:
        return 0.0
    composed = _composed(mechanisms, question, rounded=rounded)
    if composed is None or delta <= 0:
        return math.inf
    answer = rdp.epsilon if question.accountant == "rdp" else by_pld
    return answer(composed, delta, question.relation)


def _composed(
    mechanisms: tuple[Counted, ...], question: Question, *, rounded: bool = False
) -> tuple[Counted, ...] | None:
    """What an accountant really composes; None where one of the mechanisms has no noise."""
    beside = [mechanism for mechanism, _ in mechanisms]
    for mechanism in beside:
        if sentence := mechanism.refusal(question, beside):
            raise ValueError(sentence)
    if any(mechanism.is_bare() for mechanism in beside):
        return None
    coarse = coarsened(mechanisms, always=rounded)
    # Rounding may take the last of the noise.
    return None if any(mechanism.is_bare() for mechanism, _ in coarse) else coarse
