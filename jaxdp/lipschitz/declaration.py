"""Functions whose bounds are declared as a whole, not found from what they are made of."""

import itertools
from collections.abc import Callable
from typing import Any

import jax

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.rules.registry import BoundRule

# No function can be called so by accident: a name with a slash is no identifier.
_PREFIX = "jaxdp/lipschitz/"
_serial = itertools.count()
_DECLARED: dict[str, BoundRule] = {}


def declare(fun: Callable[..., Any], rule: BoundRule) -> Callable[..., Any]:
    r"""The function, with a bound rule of its own.

    Where the bounds of a composition are too loose (a softmax cross-entropy, taken apart, is an
    exponential) or a primitive has none, a bound on the function as a whole can be declared. It
    computes and differentiates as before, under every transformation.

    Nobody checks the declaration when it is used, and one that is too small is a leak: hold it
    against `jaxdp.lipschitz.falsify`. The falsifier sees one example at a time. What it cannot see
    concerns backward passes of your own (`jax.custom_vjp`): where the cotangent is zero the
    gradient must be zero, and if it is not linear in the cotangent, the rule must refuse operands
    that are not `per_sample`.

    Args:
      fun: of arrays, to one array or several. What it closes over must not be traced.
      rule: as for `register_bound_rule`, with the leaves of all arguments as operands.

    Returns:
      The function, jitted.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxdp import lipschitz
      >>> def rule(eqn, values):
      ...     (x,) = values  # |silu'| ≤ 1.0999, |silu(x)| ≤ |x|
      ...     return [lipschitz.Range(x.norm)], lambda cts: [1.0999 * cts[0]]
      >>> silu = lipschitz.declare(jax.nn.silu, rule)
      >>> loss_fn = lambda params, x: jnp.sum(silu(params * x))
      >>> print(lipschitz.bounds(loss_fn, jnp.ones(()), jnp.ones(()), 2.0).sensitivity.round(3))
      2.2
    """

    def named(*args: Any) -> Any:
        return fun(*args)

    # The name goes with the call through every transformation, and tells the rule.
    named.__name__ = f"{_PREFIX}{next(_serial)}/{getattr(fun, '__name__', 'function')}"
    _DECLARED[named.__name__] = rule
    return jax.jit(named)


def declared_rule(eqn: Equation) -> BoundRule | None:
    """The rule of a call of a declared function, or None."""
    return _DECLARED.get(eqn.function)


def shown_name(eqn: Equation) -> str:
    """What the user calls it: the declared function, or the primitive."""
    return eqn.function.rpartition("/")[-1] or eqn.name
