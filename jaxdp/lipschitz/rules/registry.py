"""The table of bound rules, and how to add to it."""

from collections.abc import Callable, Sequence

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.value import Cotangent, Range, Value

PullBack = Callable[[Sequence[Cotangent]], Sequence[Cotangent]]
"""Bounds on the cotangents of the outputs -> bounds on those of the operands."""

BoundRule = Callable[[Equation, Sequence[Value]], tuple[Sequence[Range], PullBack]]
"""`(equation, operands) -> (ranges of the outputs, pull_back)`, as `jax.vjp` does with arrays."""

_RULES: dict[str, BoundRule] = {}


def register_bound_rule(*primitives: str) -> Callable[[BoundRule], BoundRule]:
    r"""Decorator: says how bounds go through a primitive.

    For a primitive $y = f(x_1, \dots, x_n)$ the rule is given the equation and what is known of
    the operands, for every example at once, and answers what holds of y for all of them; then,
    for every bound G on the cotangent of y, bounds on the cotangents
    $\lVert J_i^\top g \rVert_2$, $\lVert g \rVert_2 \le G$, of the operands. An operand that is a
    parameter is one like the others: its cotangent is its gradient.

    A rule is a claim that nobody checks when it is used: a bound that is too small is a leak.
    Hold it against `jaxdp.lipschitz.falsify`. Cotangents that are None are zero; the rule is not
    asked if all are.

    Args:
      *primitives: their names, as a jaxpr shows them. A rule that exists is replaced.

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

    def register(rule: BoundRule) -> BoundRule:
        for name in primitives:
            _RULES[name] = rule
        return rule

    return register


def rule_of(eqn: Equation) -> BoundRule:
    """The rule of an equation's primitive.

    Raises:
      NotImplementedError: there is none.
    """
    if eqn.name not in _RULES:
        raise NotImplementedError(
            f"no bound is known for the primitive {eqn.name} ({eqn.source}): use another function, "
            "declare the one around it (jaxdp.lipschitz.declare), add a rule "
            "(jaxdp.lipschitz.register_bound_rule), or clip instead (jaxdp.clip_flat)"
        )
    return _RULES[eqn.name]
