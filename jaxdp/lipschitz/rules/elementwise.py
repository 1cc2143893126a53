"""Functions of one entry, and arithmetic entry by entry."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.rules.registry import BoundRule, PullBack, register_bound_rule
from jaxdp.lipschitz.value import Cotangent, Range, Value, scaled

Slope = Callable[[Value], ArrayLike]


def _monotone(
    fun: Callable[[jax.Array], jax.Array], slope: Slope, at_zero: float | None = None
) -> BoundRule:
    r"""Of an increasing function φ, entry by entry.

    Args:
      fun: φ.
      slope: an upper bound on |φ'| between the bounds of x.
      at_zero: φ(0), if the slope holds between zero and x, too: then
        ‖φ(x)‖ ≤ slope · ‖x‖ + √n |φ(0)|.
    """

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        (x,) = values
        steepest = slope(x)
        norm: ArrayLike = math.inf
        if at_zero is not None:
            norm = steepest * x.norm + math.sqrt(x.size) * abs(at_zero)
        image = Range(norm, fun(x.low), fun(x.high))
        return [image], lambda cotangents: [scaled(cotangents[0], steepest)]

    return rule


def _step(fun: Callable[[jax.Array], jax.Array]) -> BoundRule:
    """Of an increasing function without slope."""

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        (x,) = values
        return [Range(low=fun(x.low), high=fun(x.high))], lambda cotangents: [None]

    return rule


def _positive(x: Value) -> jax.Array:
    """The least that x can be, zero if that is not positive: slopes become infinite there."""
    return jnp.maximum(x.low, 0)


_FUNCTIONS: Mapping[str, BoundRule] = {
    "tanh": _monotone(jnp.tanh, lambda x: 1, 0),
    "logistic": _monotone(jax.nn.sigmoid, lambda x: 0.25, 0.5),
    "erf": _monotone(jax.lax.erf, lambda x: 2 / math.sqrt(math.pi), 0),
    "atan": _monotone(jnp.arctan, lambda x: 1, 0),
    "asinh": _monotone(jnp.arcsinh, lambda x: 1, 0),
    "exp": _monotone(jnp.exp, lambda x: jnp.exp(x.high)),
    "exp2": _monotone(jnp.exp2, lambda x: math.log(2) * jnp.exp2(x.high)),
    "expm1": _monotone(jnp.expm1, lambda x: jnp.exp(jnp.maximum(x.high, 0)), 0),
    "log": _monotone(lambda x: jnp.log(jnp.maximum(x, 0)), lambda x: 1 / _positive(x)),
    "log1p": _monotone(
        lambda x: jnp.log1p(jnp.maximum(x, -1)),
        lambda x: 1 / jnp.maximum(1 + jnp.minimum(x.low, 0), 0),
        0,
    ),
    "sqrt": _monotone(
        lambda x: jnp.sqrt(jnp.maximum(x, 0)), lambda x: 0.5 / jnp.sqrt(_positive(x))
    ),
    "sign": _step(jnp.sign),
    "floor": _step(jnp.floor),
    "ceil": _step(jnp.ceil),
    "round": _step(jnp.round),
}
for _name, _rule in _FUNCTIONS.items():
    register_bound_rule(_name)(_rule)


@register_bound_rule("neg")
def _neg(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    return [Range(x.norm, -x.high, -x.low)], lambda cotangents: cotangents


@register_bound_rule("abs")
def _abs(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    return [Range(x.norm, _least_size(x), x.largest)], lambda cotangents: cotangents


@register_bound_rule("sin", "cos")
def _wave(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    norm = x.norm if eqn.name == "sin" else math.inf
    return [Range(norm, -1, 1)], lambda cotangents: cotangents


@register_bound_rule("erfc")
def _erfc(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    slope = 2 / math.sqrt(math.pi)
    image = Range(low=jax.lax.erfc(x.high), high=jax.lax.erfc(x.low))
    return [image], lambda cotangents: [scaled(cotangents[0], slope)]


@register_bound_rule("rsqrt")
def _rsqrt(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    least = _positive(x)
    image = Range(low=jax.lax.rsqrt(jnp.maximum(x.high, 0)), high=jax.lax.rsqrt(least))
    return [image], lambda cotangents: [scaled(cotangents[0], 0.5 * least**-1.5)]


@register_bound_rule("integer_pow", "square")
def _power(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    exponent = eqn.params.get("y", 2)
    if exponent < 1:
        raise NotImplementedError(
            f"no bound is known for x ** {exponent} ({eqn.source}): write it as a division"
        )
    high, least = x.largest**exponent, _least_size(x) ** exponent
    image = Range(x.norm * x.largest ** (exponent - 1), least, high)
    if exponent % 2:
        image = Range(image.norm, x.low**exponent, x.high**exponent)
    slope = exponent * x.largest ** (exponent - 1)
    return [image], lambda cotangents: [scaled(cotangents[0], slope)]


@register_bound_rule("add", "add_any", "sub")
def _sum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, y = values
    copies_x, copies_y = _copies(eqn, values)
    norm = copies_x * x.norm + copies_y * y.norm
    if eqn.name == "sub":
        image = Range(norm, x.low - y.high, x.high - y.low)
    else:
        image = Range(norm, x.low + y.low, x.high + y.high)
    return [image], _as_often_as_met([copies_x, copies_y])


@register_bound_rule("mul")
def _mul(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, y = values
    copies_x, copies_y = _copies(eqn, values)
    one_by_other = jnp.minimum(copies_x * x.norm * y.largest, copies_y * y.norm * x.largest)
    norm = jnp.minimum(one_by_other, x.norm * y.norm)
    low, high = _corners(x, y)
    if x is y:
        low = jnp.square(_least_size(x))

    def pull_back(cotangents: Sequence[Cotangent]) -> Sequence[Cotangent]:
        (bound,) = cotangents
        return [
            scaled(bound, _weighing(copies_x, y)),
            scaled(bound, _weighing(copies_y, x)),
        ]

    return [Range(norm, low, high)], pull_back


@register_bound_rule("div")
def _div(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, y = values
    copies_x, copies_y = _copies(eqn, values)
    inverse = 1 / _least_size(y)  # infinite where y can be zero
    corners = jnp.stack([x.low, x.high]) * inverse * jnp.where(y.high < 0, -1, 1)
    spans = jnp.isfinite(inverse)
    low = jnp.where(spans, jnp.minimum(jnp.min(corners), 0), -jnp.inf)
    high = jnp.where(spans, jnp.maximum(jnp.max(corners), 0), jnp.inf)

    def pull_back(cotangents: Sequence[Cotangent]) -> Sequence[Cotangent]:
        (bound,) = cotangents
        below = copies_y * jnp.square(inverse) * x.largest
        return [scaled(bound, copies_x * inverse), scaled(bound, below)]

    return [Range(copies_x * x.norm * inverse, low, high)], pull_back


@register_bound_rule("max", "min")
def _extremum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, y = values
    copies_x, copies_y = _copies(eqn, values)
    choose = jnp.maximum if eqn.name == "max" else jnp.minimum
    norm = jnp.hypot(copies_x * x.norm, copies_y * y.norm)
    image = Range(norm, choose(x.low, y.low), choose(x.high, y.high))
    return [image], _as_often_as_met([copies_x, copies_y])


@register_bound_rule("clamp")
def _clamp(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    least, x, most = values
    at_zero = jnp.maximum(jnp.maximum(least.high, 0), jnp.maximum(-most.low, 0))
    norm = x.norm + math.sqrt(x.size) * at_zero
    low = jnp.clip(x.low, least.low, most.low)
    high = jnp.clip(x.high, least.high, most.high)

    return [Range(norm, low, high)], _as_often_as_met(_copies(eqn, values))


@register_bound_rule("select_n")
def _select(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    which, *cases = values
    copies = _copies(eqn, cases)
    chosen = [_is_chosen(which, number) for number in range(len(cases))]

    def among(numbers: Sequence[jax.Array], otherwise: float) -> jax.Array:
        return jnp.stack(
            [jnp.where(*pair, otherwise) for pair in zip(chosen, numbers, strict=True)]
        )

    norms = among([many * case.norm for many, case in zip(copies, cases, strict=True)], 0)
    image = Range(
        jnp.sqrt(jnp.sum(jnp.square(norms))),
        jnp.min(among([case.low for case in cases], math.inf)),
        jnp.max(among([case.high for case in cases], -math.inf)),
    )

    def pull_back(cotangents: Sequence[Cotangent]) -> Sequence[Cotangent]:
        found = [scaled(cotangents[0], many) for many in copies]
        pairs = zip(chosen, found, strict=True)
        return [None, *(None if bound is None else jnp.where(c, bound, 0) for c, bound in pairs)]

    return [image], pull_back


def _is_chosen(which: Value, number: int) -> jax.Array:
    """Whether any entry comes from the case of that number: all may, where nothing is known."""
    if which.array is None:
        return jnp.ones((), bool)
    return jnp.any(jnp.asarray(which.array).astype(jnp.int32) == number)


def _least_size(x: Value) -> jax.Array:
    """The least absolute value of an entry: zero, unless all have one sign."""
    return jnp.maximum(jnp.maximum(x.low, -x.high), 0)


def _corners(x: Value, y: Value) -> tuple[jax.Array, jax.Array]:
    """The interval of products."""
    products = [a * b for a in (x.low, x.high) for b in (y.low, y.high)]
    known = [jnp.where(jnp.isnan(product), 0, product) for product in products]  # 0 · ∞
    return jnp.min(jnp.stack(known)), jnp.max(jnp.stack(known))


def _copies(eqn: Equation, values: Sequence[Value]) -> list[float]:
    """By how much the norm of each operand grows because its entries meet several others: scalars,
    and axes of one, are not always broadcast by an equation of their own."""
    size = eqn.outputs[0].size
    return [math.sqrt(size / value.size) if value.size else 1.0 for value in values]


def _as_often_as_met(copies: Sequence[float]) -> PullBack:
    """The cotangent of the output to every operand, as often as its entries meet others."""
    return lambda cotangents: [scaled(cotangents[0], many) for many in copies]


def _weighing(copies: float, other: Value) -> jax.Array:
    """How much a product with another array lengthens the cotangent of an operand: entry by entry,
    or, where one entry meets several, by what it meets (Cauchy-Schwarz)."""
    return other.largest if copies == 1 else jnp.minimum(copies * other.largest, other.norm)
