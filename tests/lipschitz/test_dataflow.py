"""Which results `jax.vmap` gives a row for each sample: what is claimed, and what JAX does."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxdp.engine import walker
from jaxdp.lipschitz.dataflow import row_for_each_sample

Results = Sequence[Any]
P, X = jnp.arange(1.0, 4), jnp.ones(3)


@jax.custom_vjp
def drops_example(p: jax.Array, x: jax.Array) -> jax.Array:
    return p + 0 * x


drops_example.defvjp(lambda p, x: (p, x), lambda x, g: (g, 0 * x))


@jax.custom_vjp
def calls_itself(p: jax.Array, x: jax.Array) -> jax.Array:
    return p + x


calls_itself.defvjp(lambda p, x: (calls_itself(p, x), None), lambda _, g: (g, g))


@jax.custom_jvp
def pair(p: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sin(p), p * x


pair.defjvp(lambda primals, tangents: (pair(*primals), pair(*tangents)))


def shifting(p: jax.Array, x: jax.Array) -> Results:
    """The example comes into the last part of the state, and into the first after two steps."""

    def step(state: Any, _: None) -> Any:
        constant, first, second, third = state
        return (2 * constant, second, third, third), (first, constant)

    return jax.tree.leaves(lax.scan(step, (p, p, p, x), None, length=4))


# What has a row for each sample in f(p, x), if x alone has one.
CASES: dict[str, tuple[Callable[[jax.Array, jax.Array], Results], list[bool]]] = {
    "arithmetic": (lambda p, x: (p * x, p + 1), [True, False]),
    "a barrier": (lambda p, x: lax.optimization_barrier((x, p, x)), [True, False, True]),
    "a call": (lambda p, x: jax.jit(lambda p, x: (p * 2, x * p))(p, x), [False, True]),
    "a sort of several": (lambda p, x: lax.sort((p, x)), [True, True]),
    "a sort of parameters": (lambda p, x: lax.sort((p, 2 * p)), [False, False]),
    "a split": (lambda p, x: (*jnp.split(x, 3), *jnp.split(p, 3)), [True] * 3 + [False] * 3),
    "the largest entries": (
        lambda p, x: (*lax.top_k(x, 2), *lax.top_k(p, 2)), [True, True, False, False]
    ),
    "a scatter": (lambda p, x: (p.at[0].add(x[0]), p.at[0].max(1.0)), [True, False]),
    "a reduction of several": (
        lambda p, x: lax.reduce(
            (lax.stop_gradient(p), x), (0.0, 0.0), lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,)
        ),
        [True, True],
    ),
    "a remat": (lambda p, x: jax.checkpoint(lambda p, x: (jnp.sin(p), p * x))(p, x), [False, True]),
    "a state that the example enters late": (shifting, [False, True, True, True, True, False]),
    "branches, of which one drops the example": (
        lambda p, x: lax.cond(
            p[0] > 0, lambda p, x: (x, x, p), lambda p, x: (2 * x, p, 2 * p), p, x
        ),
        [True, False, False],
    ),
    "a loop without a known end": (
        lambda p, x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, 2 * s[1]), (0, x)),
        [False, False],
    ),
    "a function with a forward derivative": (lambda p, x: pair(p, x), [False, True]),
    "a backward derivative that drops the example": (lambda p, x: (drops_example(p, x),), [False]),
    "a backward derivative that calls its function": (lambda p, x: (calls_itself(p, x),), [True]),
}  # fmt: skip


def has_rows(fun: Callable[..., Results], index: int) -> bool:
    """What `jax.vmap` does, where the function is differentiated by its parameters."""

    def result(x: jax.Array) -> Any:
        return jax.vjp(lambda p: list(fun(p, x)), P)[0][index]

    try:
        jax.eval_shape(jax.vmap(result, out_axes=None), X[None])
    except ValueError as error:
        assert "out_axes" in str(error)
        return True
    return False


@pytest.mark.parametrize("name", list(CASES))
def test_rows_are_claimed_where_vmap_makes_them(name: str) -> None:
    fun, expected = CASES[name]
    if "without a known end" not in name:  # it cannot be differentiated backwards
        actual = [has_rows(fun, index) for index in range(len(expected))]
        assert all(real for claimed, real in zip(expected, actual, strict=True) if claimed)
    program, _ = walker.trace(fun, P, X)
    assert row_for_each_sample(program, [False, True]) == expected
