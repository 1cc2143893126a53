"""Equal keys mean equal cotangents."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.engine import walker
from jaxdp.engine.instrument import attach
from jaxdp.engine.twins import cotangent_classes
from jaxdp.engine.walker import Equation, Path

W = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=3), jnp.float32)


def cotangents(fun: Callable[..., Any], args: list[jax.Array]) -> tuple[list[Any], list[Any]]:
    """For every equation of the program the key and the true cotangent of its first output."""
    program, _ = walker.trace(fun, *args)
    keys = cotangent_classes(program)
    shapes: dict[int, Any] = {}

    def look(path: Path, eqn: Equation, values: list[Any]) -> list[Any]:
        shapes[path[0]] = eqn.outputs[0]
        return eqn.bind(values)

    walker.evaluate(program, args, look)
    # Only a program without calls has its equations where the keys are.
    assert sorted(shapes) == list(range(len(keys)))

    def run(slots: dict[int, jax.Array]) -> jax.Array:
        def rule(path: Path, eqn: Equation, values: list[Any]) -> list[Any]:
            outputs = eqn.bind(values)
            if path[0] in slots:
                outputs[0] = attach(outputs[0], slots[path[0]])
            return outputs

        return sum((jnp.sum(out) for out in walker.evaluate(program, args, rule)), jnp.zeros(()))

    slots = {
        index: jnp.zeros(aval.shape, aval.dtype)
        for index, aval in shapes.items()
        if jnp.issubdtype(aval.dtype, jnp.floating)
    }
    grads = jax.grad(run)(slots)
    return keys, [grads.get(index) for index in range(len(keys))]


def check_classes(fun: Callable[..., Any], args: list[jax.Array]) -> int:
    """How many pairs of equations share a key: in each, the cotangents must be equal."""
    keys, grads = cotangents(fun, args)
    pairs = 0
    for second in range(len(keys)):
        for first in range(second):
            if keys[first] == keys[second] and grads[first] is not None:
                pairs += 1
                np.testing.assert_array_equal(grads[first], grads[second])
    return pairs


def simple_cell(w: Any, x: Any, h: Any) -> Any:
    return jnp.sum(jnp.tanh(x @ w + h @ w.T))


def gates(w: Any, x: Any, h: Any) -> Any:
    """As in a long short-term memory: sums that are split."""
    total = x @ jnp.concatenate([w, w], 1) + h @ jnp.concatenate([w.T, w], 1)
    a, b = jnp.split(total, 2, axis=-1)
    return jnp.sum(jnp.tanh(a) * jnp.sin(b))


def gates_reshaped(w: Any, x: Any, h: Any) -> Any:
    total = (x @ w).reshape(3, 1) + (h @ w).reshape(3, 1)
    return jnp.sum(jnp.sin(total))


# How many pairs of equations have equal cotangents, as the engine sees it, in each cell.
EQUAL = {
    "simple cell": (simple_cell, 1),
    "gates": (gates, 1),
    "gates, reshaped": (gates_reshaped, 1),
}


@pytest.mark.parametrize("name", list(EQUAL))
def test_products_that_are_added_share_a_cotangent(name: str) -> None:
    fun, least = EQUAL[name]
    assert check_classes(fun, [W, X, jnp.cos(X)]) >= least


def read_twice(w: Any, x: Any, h: Any) -> Any:
    a, b = x @ w, h @ w
    return jnp.sum(jnp.sin(a + b)) + jnp.sum(jnp.cos(a))


def broadcast_sum(w: Any, x: Any, h: Any) -> Any:
    """Added to each row: the cotangent of the smaller one is a sum."""
    a, b = w @ w, (x @ w)[None]
    return jnp.sum(jnp.sin(a + b))


def difference(w: Any, x: Any, h: Any) -> Any:
    return jnp.sum(jnp.sin(x @ w - h @ w))


def added_to_itself(w: Any, x: Any, h: Any) -> Any:
    a, b = x @ w, h @ w
    return jnp.sum(jnp.sin(a + a) + jnp.cos(b + b))


def an_output_too(w: Any, x: Any, h: Any) -> Any:
    a, b = x @ w, h @ w
    return jnp.sum(jnp.sin(a + b)), a


def split_apart(w: Any, x: Any, h: Any) -> Any:
    """Pieces that meet the same operations, but not the same values."""
    a, b = jnp.split(x @ w, (1,)), jnp.split(h @ w, (1,))
    return sum(jnp.sum(jnp.sin(piece)) for piece in (*a, *b))


def split_otherwise(w: Any, x: Any, h: Any) -> Any:
    """The same sum of pieces, cut in the other order."""
    a, b = jnp.split(jnp.tile(x @ w, 2), 2), jnp.split(jnp.tile(h @ w, 2), 2)
    return jnp.sum(jnp.sin(a[0] + b[1])) + jnp.sum(jnp.cos(a[1] + b[0]))


def output_alone(w: Any, x: Any, h: Any) -> Any:
    return x @ w, jnp.sin(h @ w)


UNEQUAL = {
    fun.__name__: fun
    for fun in (
        read_twice,
        broadcast_sum,
        difference,
        added_to_itself,
        an_output_too,
        split_apart,
        split_otherwise,
        output_alone,
    )
}


@pytest.mark.parametrize("name", list(UNEQUAL))
def test_values_of_different_cotangents_are_kept_apart(name: str) -> None:
    """The products here have different cotangents: none of them may share a key."""
    fun, args = UNEQUAL[name], [W, X, jnp.cos(X)]
    check_classes(fun, args)
    program, _ = walker.trace(fun, *args)
    keys = cotangent_classes(program)
    products: list[int] = []

    def rule(path: Path, eqn: Equation, values: list[Any]) -> list[Any]:
        products.extend([path[0]] * (eqn.name == "dot_general"))
        return eqn.bind(values)

    walker.evaluate(program, args, rule)
    assert len({keys[index] for index in products}) == len(products) == 2


def test_a_sum_may_have_more_terms_than_python_has_stack_frames() -> None:
    terms = 2 * sys.getrecursionlimit()
    program, _ = walker.trace(lambda x: functools.reduce(jnp.add, [jnp.sin(x)] * terms), 1.0)
    first, *sums = cotangent_classes(program)
    assert len(sums) == terms - 1
    assert first not in sums
    assert len(set(sums)) == 1


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": jnp.add,
    "subtract": jnp.subtract,
    "multiply": jnp.multiply,
    "sin": lambda a, b: jnp.sin(a),
    "swap halves": lambda a, b: jnp.concatenate(jnp.split(a, 2)[::-1]),
    "add halves": lambda a, b: jnp.concatenate([jnp.split(a, 2)[0] + jnp.split(b, 2)[0]] * 2),
    "reshape and back": lambda a, b: (a.reshape(2, 2) + b.reshape(2, 2)).reshape(4),
    "squeeze": lambda a, b: (a[None] + b[None]).squeeze(0),
}


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=8,
    )
)
def test_equal_keys_mean_equal_cotangents(steps: list[tuple[str, int, int]]) -> None:
    """Random programs of sums, splits and reshapes, whose values are read any number of times."""

    def fun(x: jax.Array, y: jax.Array) -> Any:
        values = [jnp.sin(x), jnp.cos(x), jnp.sin(y)]
        for name, a, b in steps:
            values.append(OPERATIONS[name](values[-1 - a % len(values)], values[b % len(values)]))
        return jnp.sum(jnp.sin(values[-1])) + jnp.sum(jnp.square(values[-2]))

    check_classes(fun, [jnp.arange(4.0), jnp.arange(4.0) * 0.3 - 0.7])
