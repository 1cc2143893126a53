"""Which equations the needed outputs of a program depend on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.engine import walker
from jaxdp.engine.liveness import live_paths
from jaxdp.engine.walker import Equation, Path

W = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=3), jnp.float32)


def live_names(fun: Callable[..., Any], needed: list[bool]) -> list[str]:
    """In the order of evaluation, loops and blocks not entered."""
    program, _ = walker.trace(fun, W, X)
    live = live_paths(program, needed)
    names: list[str] = []

    def rule(path: Path, eqn: Equation, values: list[Any]) -> list[Any]:
        names.extend([eqn.name] * (path in live))
        return [None] * len(eqn.outputs)

    walker.evaluate(program, [None, None], rule)
    return names


def two_outputs(w: jax.Array, x: jax.Array) -> Any:
    hidden = jnp.tanh(w @ x)
    return jnp.sum(jnp.sin(hidden)), jnp.sum(jnp.cos(x))


def test_what_no_needed_output_depends_on_is_left_out() -> None:
    first, second = (live_names(two_outputs, needed) for needed in ([True, False], [False, True]))
    assert {"tanh", "dot_general", "sin"} <= set(first)
    assert "cos" not in first
    assert "cos" in second
    assert not {"tanh", "dot_general", "sin"} & set(second)
    assert live_names(two_outputs, [False, False]) == []


def test_calls_are_looked_into() -> None:
    """Of a call with two results one may be needed."""
    both = jax.jit(two_outputs)
    names = live_names(lambda w, x: both(w, x)[1], [True])
    assert "cos" in names
    assert "dot_general" not in names


def test_an_output_that_is_an_input_or_a_literal_needs_nothing() -> None:
    assert live_names(lambda w, x: (w, 1.0, jnp.sin(x)), [True, True, False]) == []


def test_an_equation_with_an_effect_is_live_whoever_needs_it() -> None:
    def writes(w: jax.Array, x: jax.Array) -> jax.Array:
        ref = jax.new_ref(jnp.cos(w))
        jax.jit(lambda x: ref.__setitem__(..., x))(jnp.sin(w))
        return jnp.sum(x)

    assert {"new_ref", "swap", "sin", "cos"} <= set(live_names(writes, [True]))

    def prints(w: jax.Array, x: jax.Array) -> jax.Array:
        jax.debug.print("{}", jnp.sin(w))
        return jnp.sum(x)

    # Nothing in the program can notice that.
    assert "sin" not in live_names(prints, [True])
