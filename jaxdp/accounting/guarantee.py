"""What a privacy guarantee is stated as: δ, the accountant and the neighbours, in one value.

Example:
  >>> from jaxdp import accounting
  >>> asked = accounting.Guarantee(1e-5, accountant="rdp")
  >>> asked
  Guarantee(delta=1e-05, accountant='rdp', neighboring_relation='add_or_remove_one')
"""

from dataclasses import dataclass, replace

from jaxdp.accounting.question import (
    AccountantName,
    Question,
    RelationName,
    as_question,
    check_delta,
)
from jaxdp.checks import shown


@dataclass(frozen=True, slots=True)
class Guarantee:
    """Everything that an ε is stated with: δ, the accountant and the neighbouring relation.

    Wherever jaxdp takes `delta`, it takes a guarantee as well, which then says all three.

    Args:
      delta: δ in (0, 1).
      accountant: "pld" or "rdp".
      neighboring_relation: "add_or_remove_one" or "replace_one".

    Raises:
      TypeError: a field has the wrong type.
      ValueError: δ is out of range, or a name is unknown.

    Example:
      >>> Guarantee(1e-5).accountant
      'pld'
    """

    delta: float
    accountant: AccountantName = "pld"
    neighboring_relation: RelationName = "add_or_remove_one"

    def __post_init__(self) -> None:
        object.__setattr__(self, "delta", check_delta(self.delta))
        as_question(self.accountant, self.neighboring_relation)

    @property
    def question(self) -> Question:
        """What an accountant is asked, whatever δ.

        Returns:
          The accountant and the neighbouring relation.

        Example:
          >>> Guarantee(1e-5).question
          Question(accountant='pld', relation='add_or_remove_one')
        """
        return Question(self.accountant, self.neighboring_relation)


def as_guarantee(
    delta: float | Guarantee,
    accountant: AccountantName | None = None,
    neighboring_relation: RelationName | None = None,
) -> Guarantee:
    """The guarantee meant by the arguments that every question about privacy takes.

    Args:
      delta: δ in (0, 1), or a guarantee.
      accountant: "pld" or "rdp"; None for what the guarantee says, or else "pld".
      neighboring_relation: "add_or_remove_one" or "replace_one"; None for what the guarantee
        says, or else "add_or_remove_one".

    Returns:
      The guarantee.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range, or contradicts the guarantee.

    Example:
      >>> as_guarantee(1e-5, accountant="rdp").accountant
      'rdp'
      >>> as_guarantee(Guarantee(1e-5), accountant="rdp")
      Traceback (most recent call last):
      ValueError: accountant must be that of the guarantee, 'pld', got 'rdp'. Leave it out...
    """
    named = {"accountant": accountant, "neighboring_relation": neighboring_relation}
    given = {name: value for name, value in named.items() if value is not None}
    if not isinstance(delta, Guarantee):
        return Guarantee(delta, **given)  # pyright: ignore[reportArgumentType]  # it checks them
    asked = replace(delta, **given)
    for name in given:
        expected, found = getattr(delta, name), getattr(asked, name)
        if found != expected:
            raise ValueError(
                f"{name} must be that of the guarantee, {expected!r}, got {shown(found)}. "
                "Leave it out, or pass delta as a number."
            )
    return delta
