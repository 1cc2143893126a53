"""Functions `(w, x) -> y` that together use every primitive with a bound rule."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


def normal(*shape: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Program(NamedTuple):
    """A function, its parameter, and the shape of its input."""

    fun: Callable[[Any, Array], Array]
    w: Any
    shape: tuple[int, ...] = (6,)


def elementwise(fun: Callable[[Array], Array]) -> Program:
    """Entry by entry, of the parameter plus the input."""
    return Program(lambda w, x: fun(w + x), normal(6))


def unary(fun: Callable[[Array], Array], shape: tuple[int, ...] = (4, 6)) -> Program:
    return Program(lambda w, x: fun(w * x), normal(*shape), shape)


def conv(
    window: tuple[int, ...],
    shape: tuple[int, ...],
    *,
    outputs: int = 3,
    stride: int = 1,
    padding: Any = "SAME",
    groups: int = 1,
    **options: Any,
) -> Program:
    names = "WHD"[: len(window)]
    layout = (f"N{names}C", f"{names}IO", f"N{names}C")

    def fun(w: Array, x: Array) -> Array:
        strides = (stride,) * len(window)
        return lax.conv_general_dilated(
            x[None], w, strides, padding, dimension_numbers=layout,
            feature_group_count=groups, **options,
        )[0]  # fmt: skip

    return Program(fun, normal(*window, shape[-1] // groups, outputs), shape)


def window_sum(x: Array, size: int, stride: int, padding: str = "VALID") -> Array:
    return lax.reduce_window(x, 0.0, lax.add, (size, 1), (stride, 1), padding)


def window_max(x: Array, size: int, stride: int, padding: str = "VALID") -> Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (size, 1), (stride, 1), padding)


def rnn(w: Any, x: Array) -> Array:
    def cell(state: Array, row: Array) -> tuple[Array, Array]:
        state = jnp.tanh(row @ w["in"] + state @ w["state"])
        return state, state

    last, states = lax.scan(cell, jnp.zeros(3), x)
    return jnp.concatenate([last[None], states])


def known_rows(w: Array, x: Array) -> Array:
    """A scan over rows of the parameter, backwards."""

    def cell(state: Array, row: Array) -> tuple[Array, Array]:
        return 0.5 * state + row * x, jnp.sum(row)

    state, sums = lax.scan(cell, x, w, reverse=True)
    return jnp.concatenate([state, sums])


@jax.custom_jvp
def straight_through(x: Array) -> Array:
    return jnp.sign(x)


straight_through.defjvps(lambda t, out, x: 3 * t)


@jax.custom_vjp
def halved_back(x: Array) -> Array:
    return 2 * x


halved_back.defvjp(lambda x: (2 * x, jnp.tanh(x)), lambda saved, ct: (0.5 * ct * saved,))

PROGRAMS: Mapping[str, Program] = {
    "tanh": elementwise(jnp.tanh),
    "sigmoid": elementwise(lax.logistic),
    "erf": elementwise(lax.erf),
    "arctan": elementwise(jnp.arctan),
    "arcsinh": elementwise(jnp.arcsinh),
    "exp": elementwise(jnp.exp),
    "exp2": elementwise(jnp.exp2),
    "expm1": elementwise(jnp.expm1),
    "log": elementwise(lambda x: jnp.log(10 + x)),
    "log1p": elementwise(lambda x: jnp.log1p(jnp.square(x))),
    "log1p below zero": elementwise(lambda x: jnp.log1p(0.1 * x)),
    "sqrt": elementwise(lambda x: jnp.sqrt(1 + jnp.square(x))),
    "rsqrt": elementwise(lambda x: lax.rsqrt(0.5 + jnp.square(x))),
    "sin": elementwise(jnp.sin),
    "cos": elementwise(jnp.cos),
    "abs": elementwise(jnp.abs),
    "neg": elementwise(jnp.negative),
    "sign": elementwise(lambda x: jnp.sign(x) * x),
    "floor": elementwise(lambda x: jnp.floor(x) + jnp.ceil(x) + jnp.round(x)),
    "square": elementwise(jnp.square),
    "cube": elementwise(lambda x: lax.integer_pow(x, 3)),
    "fourth power": elementwise(lambda x: lax.integer_pow(x, 4)),
    "relu": elementwise(jax.nn.relu),
    "leaky relu": elementwise(jax.nn.leaky_relu),
    "softplus": elementwise(jax.nn.softplus),
    "gelu": elementwise(lambda x: jax.nn.gelu(x, approximate=False)),
    "silu": elementwise(jax.nn.silu),
    "soft sign": elementwise(jax.nn.soft_sign),
    "hard tanh": elementwise(jax.nn.hard_tanh),
    "clip from below": elementwise(lambda x: jnp.clip(x, 0.5, 2.0)),
    "clip to the negative": elementwise(lambda x: lax.clamp(-3.0, x, -1.0)),
    "divided": elementwise(lambda x: 1 / (8 + x)),
    "divided by a negative": elementwise(lambda x: x / (x - 8)),
    "minimum": elementwise(lambda x: jnp.minimum(x, 2 * x)),
    "maximum of scalars": unary(lambda x: jnp.maximum(x, x[0, 0])),
    "where": elementwise(lambda x: jnp.where(x > 0.3, jnp.exp(x), -x)),
    "where, of one case": elementwise(lambda x: jnp.where(jnp.ones(6, bool), x, jnp.exp(x))),
    "where, of a known pattern": unary(
        lambda x: jnp.where(jnp.eye(4, 6, dtype=bool), 2 * x, jnp.sum(x)), (4, 6)
    ),
    "choice of three": elementwise(
        lambda x: lax.select_n(jnp.array([0, 2, 2, 0, 2, 0]), x, jnp.exp(x), 3 * x)
    ),
    "variance": unary(lambda x: jnp.var(x, 0)),
    "sub": Program(lambda w, x: (w - x) - 2 * (x - w), normal(6)),
    "mul of inputs": unary(lambda x: x * jnp.flip(x, 0)),
    "mul by a scalar parameter": Program(lambda w, x: w * x + w, jnp.float32(1.5)),
    "outer sum": Program(lambda w, x: w[:, None] + x[None], normal(4)),
    "outer product": Program(lambda w, x: w[:, None] * x[None], normal(4)),
    "outer product of inputs": unary(lambda x: x[0][:, None] * x[1][None]),
    "outer quotient": Program(lambda w, x: w[:, None] / (9 + x[None]), normal(4)),
    "outer quotient by a parameter": Program(lambda w, x: x[:, None] / (5 + w[None]), normal(4)),
    "outer maximum": Program(lambda w, x: jnp.maximum(w[:, None], x[None]), normal(4)),
    "outer choice": Program(lambda w, x: jnp.where(x[None] > 0, w[:, None], x[None]), normal(4)),
    "outer clip": Program(lambda w, x: jnp.clip(x[None], w[:, None], 1 + w[:, None]), normal(4)),
    "divided by a parameter": Program(lambda w, x: x / w + 1 / w, jnp.float32(-0.7)),
    "divided by an input": unary(lambda x: x / (20 + x[0, 0])),
    "stop gradient": elementwise(lambda x: lax.stop_gradient(x) * x),
    "transpose, reshape": unary(lambda x: x.T.reshape(3, 8)),
    "slices": unary(lambda x: x[1:3] + x[:2] + x[2:]),
    "dynamic slice": unary(lambda x: lax.dynamic_slice(x, (1, 2), (2, 3))),
    "strides": unary(lambda x: x[::2, ::3]),
    "pad": unary(lambda x: jnp.pad(x, ((1, 0), (2, 3)), constant_values=2.0)),
    "pad and cut": unary(lambda x: lax.pad(x, 1.0, ((-1, 2, 0), (0, 0, 1)))),
    "pad by reflection": unary(lambda x: jnp.pad(x, ((2, 1), (0, 3)), mode="reflect")),
    "broadcast": unary(lambda x: jnp.broadcast_to(x[:, None], (4, 3, 6))),
    "broadcast parameter": Program(lambda w, x: x + w[None], normal(6), (4, 6)),
    "concatenate": unary(lambda x: jnp.concatenate([x, 2 * x, jnp.ones((1, 6))])),
    "split": unary(lambda x: jnp.split(x, 2)[0] * 3 - jnp.split(x, 2)[1]),
    "sort": unary(jnp.sort),
    "update": unary(lambda x: lax.dynamic_update_slice(x, 2 * x[:2], (1, 0))),
    "sum": unary(lambda x: jnp.sum(x, 0)),
    "mean": unary(lambda x: jnp.mean(x)[None]),
    "max": unary(lambda x: jnp.max(x, 1)),
    "min": unary(lambda x: jnp.min(x, 0)),
    "cumsum": unary(lambda x: jnp.cumsum(x, 1)),
    "window sum": unary(lambda x: window_sum(x, 2, 2)),
    "window sum, overlapping": unary(lambda x: window_sum(x, 3, 1, "SAME")),
    "window max": unary(lambda x: window_max(x, 2, 2)),
    "window max, overlapping": unary(lambda x: window_max(x, 3, 1, "SAME")),
    "product with a vector": Program(lambda w, x: (x @ w)[None], normal(6)),
    "product with a matrix": Program(lambda w, x: x @ w, normal(6, 5)),
    "product on rows": Program(lambda w, x: jnp.tanh(x @ w) @ w.T, normal(6, 5), (4, 6)),
    "product from the left": Program(lambda w, x: w @ x, normal(3, 4), (4, 6)),
    "batched product": Program(
        lambda w, x: jnp.einsum("abc,ac->ab", w, x), normal(4, 2, 6), (4, 6)
    ),
    "product of inputs": unary(lambda x: x @ x.T),
    "product of parameters": Program(
        lambda w, x: x @ (w["a"] @ w["b"]), {"a": normal(6, 2), "b": normal(2, 5, seed=1)}
    ),
    "scaled parameter": Program(
        lambda w, x: x @ (w / jnp.sqrt(1 + jnp.sum(jnp.square(w)))), normal(6, 5)
    ),
    "conv1d": conv((3,), (8, 2)),
    "conv1d stride": conv((3,), (9, 2), stride=2, padding="VALID"),
    "conv1d dilated": conv((3,), (9, 2), rhs_dilation=(2,)),
    "conv1d stride and dilation": conv((3,), (9, 2), stride=2, rhs_dilation=(3,)),
    "conv1d transposed": conv((3,), (5, 2), padding=[(2, 2)], lhs_dilation=(2,)),
    "conv2d": conv((3, 3), (6, 6, 2)),
    "conv2d groups": conv((3, 2), (6, 5, 4), outputs=6, groups=2),
    "conv2d stride": conv((4, 4), (8, 8, 1), stride=2),
    "look-up": Program(
        lambda w, x: w.at[jnp.int32(jnp.abs(x))].get(mode="clip"), normal(3, 5), (4,)
    ),
    "look-up of an input": Program(
        lambda w, x: w * x.at[jnp.array([0, 2, 2, 5])].get(mode="clip"), normal(4)
    ),
    "look-up with a fill value": Program(
        lambda w, x: w.at[jnp.int32(3 * x)].get(mode="fill", fill_value=1.5), normal(3), (4,)
    ),
    "rnn": Program(rnn, {"in": normal(6, 3), "state": normal(3, 3, seed=1)}, (4, 6)),
    "scan over a parameter": Program(known_rows, normal(3, 6)),
    "cond": Program(
        lambda w, x: lax.cond(x[0] > 0, lambda y: jnp.tanh(y), lambda y: 2 * y, w * x), normal(6)
    ),
    "switch by a known index": Program(
        lambda w, x: lax.switch(1, [lambda y: y, lambda y: 3 * y * w], x), normal(6)
    ),
    "nested jit": Program(
        lambda w, x: jax.jit(lambda y: jax.jit(jnp.tanh)(y @ w))(x), normal(6, 5)
    ),
    "checkpoint": Program(jax.checkpoint(lambda w, x: jnp.tanh(x @ w)), normal(6, 5)),
    "custom jvp": elementwise(straight_through),
    "custom vjp": elementwise(halved_back),
}
