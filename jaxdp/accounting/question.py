"""What is asked of an accountant: by which method, for which neighbours, at which ε or δ.

Example:
  >>> as_question("pld", "replace_one")
  Question(accountant='pld', relation='replace_one')
"""

# pyright: reportMissingTypeStubs=false

from typing import Literal, NamedTuple, cast, get_args

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from jaxdp.checks import LARGEST_COUNT, check_choice, check_integer, check_real

AccountantName = Literal["pld", "rdp"]
"""Privacy loss distributions (tight) or Rényi differential privacy (fast, looser)."""

RelationName = Literal["add_or_remove_one", "replace_one"]
"""Which datasets are neighbours."""

_RELATIONS = {
    "add_or_remove_one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


class Question(NamedTuple):
    """What is asked about a run besides its steps: the accountant and the neighbours."""

    accountant: AccountantName
    relation: RelationName

    def new_accountant(self) -> PLDAccountant | RdpAccountant:
        """dp-accounting's own accountant, which has composed nothing yet.

        Returns:
          An accountant.

        Example:
          >>> Question("rdp", "replace_one").new_accountant().neighboring_relation
          <NeighboringRelation.REPLACE_ONE: 2>
        """
        relation = _RELATIONS[self.relation]
        if self.accountant == "rdp":
            return RdpAccountant(neighboring_relation=relation)
        return PLDAccountant(neighboring_relation=relation)


def as_question(accountant: str, neighboring_relation: str) -> Question:
    """Checks the two names that every question about privacy carries.

    Args:
      accountant: "pld" or "rdp".
      neighboring_relation: "add_or_remove_one" or "replace_one".

    Returns:
      Both, checked.

    Raises:
      TypeError: a name is no string.
      ValueError: a name is unknown.

    Example:
      >>> as_question("pld", "replace_one").relation
      'replace_one'
    """
    return Question(
        cast(AccountantName, check_choice("accountant", accountant, get_args(AccountantName))),
        cast(
            RelationName,
            check_choice("neighboring_relation", neighboring_relation, get_args(RelationName)),
        ),
    )


def check_delta(delta: object) -> float:
    """Returns δ as a float if it lies in (0, 1).

    Args:
      delta: what the caller passed.

    Returns:
      The value.

    Raises:
      TypeError: it is not a number.
      ValueError: it is not in (0, 1).

    Example:
      >>> check_delta(1e-5)
      1e-05
    """
    return check_real(
        "delta", delta, above=0, below=1, advice="A value below 1 / number of examples is usual."
    )


def check_epsilon(epsilon: object) -> float:
    """Returns a target ε as a float if it is positive and finite.

    Args:
      epsilon: what the caller passed.

    Returns:
      The value.

    Raises:
      TypeError: it is not a number.
      ValueError: it is not positive and finite.

    Example:
      >>> check_epsilon(3)
      3.0
    """
    return check_real("epsilon", epsilon, above=0, advice="Pass the privacy budget, say 3.0.")


def check_at_most(at_most: object) -> int:
    """Returns where to stop a search for a number of steps, if it is one.

    Args:
      at_most: what the caller passed.

    Returns:
      The value.

    Raises:
      TypeError: it is no integer.
      ValueError: it is negative, or more than `LARGEST_COUNT`.

    Example:
      >>> check_at_most(10)
      10
    """
    advice = "Pass a number of steps."
    return check_integer("at_most", at_most, minimum=0, maximum=LARGEST_COUNT, advice=advice)
