"""Bound rules of functions of one entry, and of arithmetic entry by entry."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.rounding import COMPOSED, TINY, gamma, power, root_of_squares, times, up
from jaxdp.lipschitz.rules.registry import BoundRule, PullBack, register_bound_rule
from jaxdp.lipschitz.value import INFINITE, Cotangent, Range, Value, scaled

Slope = Callable[[Value], ArrayLike]


def _monotone(
    fun: Callable[[jax.Array], jax.Array],
    slope: Slope,
    at_zero: float | None = None,
    *,
    units: int = 0,
) -> BoundRule:
    """The rule of an increasing function φ that acts entry by entry.

    Args:
      fun: φ.
      slope: an upper bound on |φ'| between the bounds of x.
      at_zero: φ(0), if the slope holds between zero and x, too: then
        ‖φ(x)‖ ≤ slope · ‖x‖ + √n |φ(0)|.
      units: its error beyond that of other functions, in units of u.
    """

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        (x,) = values
        steepest = up(slope(x), units)
        norm: ArrayLike = math.inf
        if at_zero is not None:
            norm = times(steepest, x.norm) + math.sqrt(x.size) * abs(at_zero)
        image = Range(norm, fun(x.low), fun(x.high)).outward(units)
        return [image], lambda cotangents: [scaled(cotangents[0], steepest)]

    return rule


def _step(fun: Callable[[jax.Array], jax.Array]) -> BoundRule:
    """The rule of an increasing function that is constant between its jumps."""

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        (x,) = values
        return [Range(low=fun(x.low), high=fun(x.high))], lambda cotangents: [None]

    return rule


def _inverse(x: jax.Array) -> jax.Array:
    """A bound on the reciprocal of numbers that are at least x; infinite at zero."""
    return jnp.where(x > 0, jnp.maximum(1 / x, TINY), jnp.inf)


def _positive(x: Value) -> jax.Array:
    """The least value of x, or zero if that is not positive: there slopes become infinite."""
    return jnp.maximum(x.low, 0)


_FUNCTIONS: Mapping[str, BoundRule] = {
    "tanh": _monotone(jnp.tanh, lambda x: 1, 0),
    "logistic": _monotone(jax.nn.sigmoid, lambda x: 0.25, 0.5),
    "erf": _monotone(jax.lax.erf, lambda x: 2 / math.sqrt(math.pi), 0),
    "atan": _monotone(jnp.arctan, lambda x: 1, 0),
    "asinh": _monotone(jnp.arcsinh, lambda x: 1, 0),
    "exp": _monotone(jnp.exp, lambda x: jnp.exp(x.high)),
    "exp2": _monotone(jnp.exp2, lambda x: times(math.log(2), jnp.exp2(x.high)), units=COMPOSED),
    "expm1": _monotone(jnp.expm1, lambda x: jnp.exp(jnp.maximum(x.high, 0)), 0),
    "log": _monotone(lambda x: jnp.log(jnp.maximum(x, 0)), lambda x: _inverse(_positive(x))),
    "log1p": _monotone(
        lambda x: jnp.log1p(jnp.maximum(x, -1)),
        lambda x: _inverse(jnp.maximum(1 + jnp.minimum(x.low, 0), 0)),
        0,
    ),
    "sqrt": _monotone(jnp.sqrt, lambda x: 0.5 * _inverse(jnp.sqrt(_positive(x)))),
    "sign": _step(jnp.sign),
    "floor": _step(jnp.floor),
    "ceil": _step(jnp.ceil),
    "round": _step(jnp.round),
}
for _name, _rule in _FUNCTIONS.items():
    register_bound_rule(_name)(_rule)


@register_bound_rule("neg", whole=True, exact=True)
def _neg(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    return [Range(x.norm, -x.high, -x.low)], lambda cotangents: cotangents


@register_bound_rule("abs", exact=True)
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
    return [image.outward(COMPOSED)], lambda cotangents: [scaled(cotangents[0], slope)]


@register_bound_rule("rsqrt")
def _rsqrt(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    least = _positive(x)
    image = Range(low=jax.lax.rsqrt(jnp.maximum(x.high, 0)), high=jax.lax.rsqrt(least))
    slope = times(0.5, jax.lax.rsqrt(least), _inverse(least))
    return [image], lambda cotangents: [scaled(cotangents[0], slope)]


@register_bound_rule("integer_pow", "square")
def _power(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    (x,) = values
    exponent = eqn.params.get("y", 2)
    if exponent < 1:
        raise NotImplementedError(
            f"no bound is known for x ** {exponent} ({eqn.source}). Write it as a division."
        )
    slope = power(x.largest, exponent - 1)
    norm = times(x.norm, slope)
    if exponent % 2:
        image = Range(norm, _lower_power(x.low, exponent), -_lower_power(-x.high, exponent))
    else:
        least = _lower_power(_least_size(x), exponent)
        image = Range(norm, least, power(x.largest, exponent))
    return [image], lambda cotangents: [scaled(cotangents[0], exponent * slope)]


def _lower_power(x: jax.Array, exponent: int) -> jax.Array:
    """A lower bound on a power of numbers that are at least x; x may be negative for odd powers."""
    below = -power(jnp.maximum(-x, 0), exponent)
    return jnp.where(x < 0, below, x**exponent * (1 - gamma(2 * exponent)))


@register_bound_rule("add", "add_any", "sub", whole=True)
def _sum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, y = values
    copies_x, copies_y = _copies(eqn, values)
    norm = copies_x * x.norm + copies_y * y.norm
    if eqn.name == "sub":
        image = Range(norm, x.low - y.high, x.high - y.low)
    else:
        image = Range(norm, x.low + y.low, x.high + y.high)
    return [image], _as_often_as_met([copies_x, copies_y])


@register_bound_rule("mul", whole=True)
def _mul(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, y = values
    copies_x, copies_y = _copies(eqn, values)
    one_by_other = jnp.minimum(
        times(copies_x, x.norm, y.largest), times(copies_y, y.norm, x.largest)
    )
    norm = jnp.minimum(one_by_other, times(x.norm, y.norm))
    low, high = _corners(x, y)
    if x is y:
        low = jnp.square(_least_size(x))

    def pull_back(cotangents: Sequence[Cotangent]) -> Sequence[Cotangent]:
        (bound,) = cotangents
        return [
            INFINITE if other.unknown else scaled(bound, _weighing(copies, other))
            for copies, other in ((copies_x, y), (copies_y, x))
        ]

    return [Range(norm, low, high)], pull_back


@register_bound_rule("div", whole=True)
def _div(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, y = values
    copies_x, copies_y = _copies(eqn, values)
    inverse = _inverse(_least_size(y))  # infinite where y can be zero: 0/0 is no number
    most = times(x.largest, inverse)
    one_sign = (x.low >= 0) & (y.low >= 0) | (x.high <= 0) & (y.high <= 0)
    other_sign = (x.low >= 0) & (y.high <= 0) | (x.high <= 0) & (y.low >= 0)
    low, high = jnp.where(one_sign, 0, -most), jnp.where(other_sign, 0, most)

    def pull_back(cotangents: Sequence[Cotangent]) -> Sequence[Cotangent]:
        (bound,) = cotangents
        # In this order JAX multiplies, too: where the first product overflows, so does the bound.
        below = scaled(bound, x.largest, _met(copies_y), inverse, inverse)
        return [scaled(bound, _met(copies_x), inverse), below]

    return [Range(times(copies_x, x.norm, inverse), low, high)], pull_back


@register_bound_rule("max", "min")
def _extremum(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, y = values
    copies_x, copies_y = _copies(eqn, values)
    choose = jnp.maximum if eqn.name == "max" else jnp.minimum
    norm = root_of_squares(jnp.stack([copies_x * x.norm, copies_y * y.norm]))
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


@register_bound_rule("select_n", whole=True)
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
        root_of_squares(norms),
        jnp.min(among([case.low for case in cases], math.inf)),
        jnp.max(among([case.high for case in cases], -math.inf)),
    )

    def pull_back(cotangents: Sequence[Cotangent]) -> Sequence[Cotangent]:
        found = [scaled(cotangents[0], _met(many)) for many in copies]
        pairs = zip(chosen, found, strict=True)
        return [None, *(None if bound is None else jnp.where(c, bound, 0) for c, bound in pairs)]

    return [image], pull_back


def _is_chosen(which: Value, number: int) -> jax.Array:
    """Whether any entry comes from the case of that number; True where the choice is not known."""
    if which.array is None:
        return jnp.ones((), bool)
    return jnp.any(jnp.asarray(which.array).astype(jnp.int32) == number)


def _least_size(x: Value) -> jax.Array:
    """A lower bound on the absolute value of every entry: zero unless all entries have one sign."""
    return jnp.maximum(jnp.maximum(x.low, -x.high), 0)


def _corners(x: Value, y: Value) -> tuple[jax.Array, jax.Array]:
    """The interval of the products of entries of x and y."""
    pairs = [(a, b) for a in (x.low, x.high) for b in (y.low, y.high)]
    products = jnp.stack([a * b for a, b in pairs])
    products = jnp.where(jnp.isnan(products), 0, products)  # 0 · ∞: then the norm is infinite
    # One that vanishes below the least number may come back in a product with a large one.
    signs = jnp.stack([jnp.sign(a) * jnp.sign(b) for a, b in pairs])
    slips = jnp.where(jnp.abs(products) < TINY, signs * TINY, 0)
    return jnp.min(products + jnp.minimum(slips, 0)), jnp.max(products + jnp.maximum(slips, 0))


def _copies(eqn: Equation, values: Sequence[Value]) -> list[float]:
    """The factor by which the norm of each operand grows because its entries meet several entries
    of the other: scalars and axes of length one need not be broadcast by an equation of their own.
    """
    size = eqn.outputs[0].size
    return [math.sqrt(size / value.size) if value.size else 1.0 for value in values]


def _as_often_as_met(copies: Sequence[float]) -> PullBack:
    """Pulls the cotangent of the output back to every operand, as often as its entries are used."""
    return lambda cotangents: [scaled(cotangents[0], _met(many)) for many in copies]


def _met(copies: float) -> float:
    """The norm of a sum over copies² terms relative to that of its terms, rounding included."""
    return copies * (1 + gamma(round(copies**2)))


def _weighing(copies: float, other: Value) -> jax.Array:
    """The factor by which a product with another array lengthens the cotangent of an operand: the
    largest entry, or, where one entry meets several, their norm (Cauchy-Schwarz)."""
    if copies == 1:
        return other.largest
    return jnp.minimum(times(copies, other.largest), other.norm) * (_met(copies) / copies)
