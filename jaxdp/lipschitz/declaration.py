"""Functions whose bounds are declared as a whole, not found from their primitives."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.rounding import gamma, times
from jaxdp.lipschitz.rules.registry import BoundRule, PullBack, Registered
from jaxdp.lipschitz.value import Cotangent, Range, Value, scaled

# With it an error names the place where the user wrote the call, not the place in this file.
source_info_util.register_exclusion(str(Path(__file__).parent))

# No function has such a name by accident: a name with a slash is no identifier.
_PREFIX = "jaxdp/lipschitz/"
_serial = itertools.count()


class _Declared(NamedTuple):
    """The rule of a declared function, and the shapes of the leaves of one call."""

    registered: Registered
    shapes: tuple[tuple[int, ...], ...]
    linear: bool


_DECLARED: dict[str, _Declared] = {}


def declare(
    fun: Callable[..., Any], rule: BoundRule, *, whole: bool = False, linear: bool = False
) -> Callable[..., Any]:
    """The function, with a bound rule of its own.

    Where the bounds of a composition are too loose (a softmax cross-entropy, taken apart, is an
    exponential) or a primitive has none, a bound on the function as a whole can be declared. It
    computes and differentiates as before, under every transformation.

    Nobody checks the declaration when it is used, and a bound that is too small is a leak: hold it
    against `jaxdp.lipschitz.falsify`. The falsifier sees one example at a time, and therefore
    misses two mistakes in backward passes of your own (`jax.custom_vjp`). Where the cotangent is
    zero the gradient must be zero. And if the gradient is not linear in the cotangent, the rule
    must refuse operands that are not `per_sample`.

    Args:
      fun: a function of arrays that returns one array or several. It must not close over traced
        arrays.
      rule, whole: as for `register_bound_rule`, with the leaves of all arguments as operands. The
        rule sees one call: where `jax.vmap` makes several of it within the program of one example,
        it is asked about one of them, and its answer is made to hold for all together.
      linear: whether the rule's bounds on cotangents are in proportion to its bound on the
        cotangent of the output. Then several calls side by side need no more than one call.

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

    @functools.cache
    def called(shapes: tuple[tuple[int, ...], ...]) -> Callable[..., Any]:
        def named(*args: Any) -> Any:
            return fun(*args)

        # The name goes with the call through every transformation, and tells the rule.
        named.__name__ = f"{_PREFIX}{next(_serial)}/{getattr(fun, '__name__', 'function')}"
        _DECLARED[named.__name__] = _Declared(Registered(rule, whole), shapes, linear)
        return jax.jit(named)

    @functools.wraps(fun)
    def declared(*args: Any) -> Any:
        return called(tuple(map(jnp.shape, jax.tree.leaves(args))))(*args)

    return declared


def declared_rule(eqn: Equation) -> Registered | None:
    """The rule of a call of a declared function, or None."""
    declared = _DECLARED.get(eqn.function)
    if declared is None:
        return None
    if len(eqn.operands) != len(declared.shapes):
        return None  # the call of a derivative, which keeps the name
    if tuple(aval.shape for aval in eqn.operands) == declared.shapes:
        return declared.registered
    return declared.registered._replace(rule=_side_by_side(declared))


def _side_by_side(declared: _Declared) -> BoundRule:
    """The rule for several calls that `jax.vmap` made one.

    Each call is bounded as one call whose operands are no longer than those of all calls together.
    The results of r calls together are √r times as long, and so are the cotangents if their bound
    for one call is not in proportion. An operand that all calls share has the sum of r cotangents.
    """

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        counts = {
            value.size // math.prod(shape)
            for value, shape in zip(values, declared.shapes, strict=True)
            if value.shape != shape and value.size
        }
        if len(counts) != 1:
            raise NotImplementedError(
                f"no bound is known for a declared function under jax.vmap ({eqn.source}) with "
                "operands that it maps in different ways. Call it in a loop (jax.lax.scan)."
            )
        (calls,) = counts
        one = [
            Value(
                shape, value.dtype, range=value.range, moves=value.moves,
                per_sample=value.per_sample,
            )
            if value.shape != shape
            else value
            for value, shape in zip(values, declared.shapes, strict=True)
        ]  # fmt: skip
        ranges, pull_back = declared.registered.rule(eqn, one)
        ranges = [each._replace(norm=times(math.sqrt(calls), each.norm)) for each in ranges]

        def back(bounds: Sequence[Cotangent]) -> Sequence[Cotangent]:
            mapped = 1.0 if declared.linear else math.sqrt(calls)
            gains = [
                math.sqrt(calls) if value.shape == shape else 1.0
                for value, shape in zip(values, declared.shapes, strict=True)
            ]
            return [
                scaled(bound, mapped * gain * (1 + gamma(calls)))
                for bound, gain in zip(pull_back(bounds), gains, strict=True)
            ]

        return ranges, back

    return rule


def shown_name(eqn: Equation) -> str:
    """The name that the user knows: of the declared function, or of the primitive."""
    return eqn.function.rpartition("/")[-1] or eqn.name
