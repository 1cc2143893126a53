"""Answers by Rényi differential privacy: it adds up, step by step.

Example:
  >>> from jaxdp.accounting.mechanisms.gaussian import SampledGaussian
  >>> steps = (Counted(SampledGaussian(None, 10.0), 50),)
  >>> round(epsilon(steps, 1e-5, "add_or_remove_one"), 3)
  3.189
"""

# pyright: reportMissingTypeStubs=false

from functools import lru_cache

import numpy as np
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_delta, compute_epsilon
from numpy.typing import NDArray

from jaxdp.accounting.mechanisms.base import Counted, Mechanism
from jaxdp.accounting.question import RelationName


def epsilon(mechanisms: tuple[Counted, ...], delta: float, relation: RelationName) -> float:
    """The ε of mechanisms at a given δ.

    Args:
      mechanisms: at least one, none without noise.
      delta: δ in (0, 1).
      relation: "add_or_remove_one" or "replace_one".

    Returns:
      ε ≥ 0.

    Example:
      >>> from jaxdp.accounting.mechanisms import mechanisms_of, PureRelease
      >>> round(epsilon(mechanisms_of([[PureRelease(0.1)]]), 1e-5, "replace_one"), 2)
      0.2
    """
    return float(compute_epsilon(*_composed(mechanisms, relation), delta)[0])


def delta(mechanisms: tuple[Counted, ...], epsilon: float, relation: RelationName) -> float:
    """The δ of mechanisms at a given ε.

    Args:
      mechanisms: at least one, none without noise.
      epsilon: ε ≥ 0.
      relation: "add_or_remove_one" or "replace_one".

    Returns:
      δ in [0, 1].

    Example:
      >>> from jaxdp.accounting.mechanisms import mechanisms_of, PureRelease
      >>> delta(mechanisms_of([[PureRelease(0.1)]]), 0.3, "replace_one") < 1e-9
      True
    """
    return float(compute_delta(*_composed(mechanisms, relation), epsilon)[0])


@lru_cache(maxsize=4096)
def _rdp_of(mechanism: Mechanism, relation: RelationName) -> NDArray[np.float64]:
    return mechanism.rdp(relation)


def _composed(
    mechanisms: tuple[Counted, ...], relation: RelationName
) -> tuple[list[float], list[float]]:
    """Orders and RDP of all the steps: it adds up."""
    steps = [count * _rdp_of(mechanism, relation) for mechanism, count in mechanisms]
    return RdpAccountant().orders.tolist(), np.sum(steps, axis=0).tolist()
