"""The table of bound rules, and how to add to it."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.checks import check_bool, check_callable, check_instance
from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.rounding import up
from jaxdp.lipschitz.value import INFINITE, UNKNOWN, Cotangent, Range, Value, is_infinite

PullBack = Callable[[Sequence[Cotangent]], Sequence[Cotangent]]
"""Bounds on the cotangents of the outputs -> bounds on those of the operands."""

BoundRule = Callable[[Equation, Sequence[Value]], tuple[Sequence[Range], PullBack]]
"""`(equation, operands) -> (ranges of the outputs, pull_back)`, as `jax.vjp` does with arrays."""


class Registered(NamedTuple):
    """A rule with its flags.

    Attributes:
      rule: the rule.
      whole: whether the rule is right for operands that may be infinite or NaN. Without it such an
        operand leaves no bound on outputs and cotangents.
      exact: whether the primitive rounds nothing. Without it the bounds are made larger by the
        rounding error of one equation.
    """

    rule: BoundRule
    whole: bool = False
    exact: bool = False

    def guarded(self, values: Sequence[Value]) -> bool:
        """Whether the operands must be finite, and one is known to be unbounded."""
        return not self.whole and any(value.unknown for value in values)

    def ranges(self, found: Sequence[Range], values: Sequence[Value]) -> Sequence[Range]:
        """The ranges of the outputs, loosened as the flags demand."""
        if any(value.unknown for value in values):
            return [UNKNOWN for _ in found]
        doubt = self._doubt(values)
        rounded = found if self.exact else [each.outward() for each in found]
        return [
            each
            if each.unknown or doubt is None
            else each._replace(norm=each.norm + doubt, low=each.low + doubt, high=each.high + doubt)
            for each in rounded
        ]

    def back(self, pull_back: PullBack, values: Sequence[Value]) -> PullBack:
        """The pull-back of cotangents, loosened as the flags demand."""

        def guarded(bounds: Sequence[Cotangent]) -> Sequence[Cotangent]:
            found = pull_back(bounds)
            if self.guarded(values):
                return [None if bound is None else INFINITE for bound in found]
            doubt = self._doubt(values)
            return [self._loosened(bound, doubt) for bound in found]

        return guarded

    def _loosened(self, bound: Cotangent, doubt: jax.Array | None) -> Cotangent:
        if bound is None or is_infinite(bound):
            return bound
        bound = jnp.asarray(bound, jnp.float32) if self.exact else up(bound)
        return bound if doubt is None else bound + doubt

    def _doubt(self, values: Sequence[Value]) -> jax.Array | None:
        """Zero if all operands are finite for sure, else NaN, which is no bound at all."""
        if self.whole:
            return None
        norms = [value.norm for value in values]
        return 0 * functools.reduce(jnp.add, norms, jnp.float32(0))


_RULES: dict[str, Registered] = {}


def register_bound_rule(
    *primitives: str, whole: bool = False, exact: bool = False
) -> Callable[[BoundRule], BoundRule]:
    """Registers the decorated function as the bound rule of primitives.

    For a primitive y = f(x_1, …, x_n) the rule receives the equation and the values of the
    operands, which hold for every example. It returns a range of y that holds for every example,
    and a function from a bound G on the cotangent of y to bounds on the cotangents of the operands:
    on ‖J_iᵀ g‖ for all g with ‖g‖ ≤ G, where J_i is the Jacobian of y with respect to x_i. A
    parameter is an operand like the others: its cotangent is its gradient.

    Where an operand may be infinite or NaN, the answer of the rule is ignored: the outputs and the
    cotangents of the operands have no bounds. Otherwise the bounds of the rule are made larger by
    2⁻¹⁹, for the rounding of one equation without a sum and of the rule's own arithmetic. The rule
    itself adds the rounding of a sum (`jaxdp.lipschitz.rounding`).

    A rule is a claim that nobody checks when it is used: a bound that is too small is a leak.
    Hold it against `jaxdp.lipschitz.falsify`. A cotangent that is None is zero; the rule is not
    called if all cotangents are.

    Args:
      *primitives: names of the primitives, as a jaxpr shows them. An existing rule is replaced.
      whole: whether the rule is right for operands that may be infinite or NaN. Then its answer is
        never ignored.
      exact: whether the primitive only moves entries. Then its bounds are not made larger.

    Returns:
      A decorator that registers a `BoundRule` and returns it as it is.

    Returns:
      The decorator; it returns the rule as it is.

    Raises:
      TypeError: a name is no string, a flag no bool, or a rule (in the decorator) no function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxdp import lipschitz
      >>> @lipschitz.register_bound_rule("sinh")
      ... def sinh(eqn, values):
      ...     (x,) = values
      ...     slope = jnp.cosh(x.largest)
      ...     return [lipschitz.Range(slope * x.norm)], lambda cts: [slope * cts[0]]
      >>> loss_fn = lambda params, x: jnp.sinh(params @ x)
      >>> print(lipschitz.bounds(loss_fn, jnp.zeros(2), jnp.ones(2), 2.0).sensitivity.round(3))
      2.0
    """

    for name in primitives:
        check_instance("primitives", name, str, advice="Pass names, as a jaxpr shows them.")
    check_bool("whole", whole, advice="Pass True or False.")
    check_bool("exact", exact, advice="Pass True or False.")

    def register(rule: BoundRule) -> BoundRule:
        check_callable("rule", rule, advice="Pass a function of an equation and its operands.")
        for name in primitives:
            _RULES[name] = Registered(rule, whole, exact)
        return rule

    return register


def rule_of(eqn: Equation) -> Registered:
    """The rule of an equation's primitive.

    Raises:
      NotImplementedError: the primitive has no rule.
    """
    if eqn.name not in _RULES:
        raise NotImplementedError(
            f"no bound is known for the primitive {eqn.name} ({eqn.source}). Use another function, "
            "declare the one around it (jaxdp.lipschitz.declare), add a rule "
            "(jaxdp.lipschitz.register_bound_rule), or clip instead (jaxdp.clip_flat)."
        )
    return _RULES[eqn.name]
