"""Each rule against brute force: ranges of values, and gradients below, at and above a function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp import lipschitz
from jaxdp.engine import walker
from jaxdp.lipschitz.propagation import propagate
from jaxdp.lipschitz.rules.registry import _RULES
from jaxdp.lipschitz.value import Range, Value
from tests.lipschitz.program_table import PROGRAMS, Program, halved_back

cases = pytest.mark.parametrize("name", list(PROGRAMS))

BOUND = 3.0
ROUNDING = 1 + 1e-5


def inputs(shape: tuple[int, ...], count: int = 200) -> jax.Array:
    """On the sphere of radius BOUND and within: random, constant, sparse."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, *shape))
    rows[::5] = rng.choice([-1.0, 1.0], size=(count // 5, *(1,) * len(shape)))
    rows[1::5] *= rng.random((count // 5, *shape)) < 0.2
    rows[2::5] = np.abs(rows[2::5])
    norms = np.sqrt((rows**2).sum(axis=tuple(range(1, rows.ndim)), keepdims=True))
    radii = BOUND * np.minimum(2 * rng.random((count, *(1,) * len(shape))), 1)
    return jnp.asarray(radii * rows / np.maximum(norms, 1e-9), jnp.float32)


def surrounded(program: Program) -> tuple[Any, Any]:
    """A loss with parameters below and above the function: their gradients show the cotangent of
    its input, and its output."""
    rng = np.random.default_rng(1)
    shape = jax.eval_shape(program.fun, program.w, jnp.zeros(program.shape)).shape
    above = rng.normal(size=shape)
    params = {
        "below": jnp.ones(program.shape),
        "at": program.w,
        "above": jnp.asarray(above / np.linalg.norm(above), jnp.float32),
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.vdot(params["above"], program.fun(params["at"], params["below"] * x))

    return loss_fn, params


def per_sample(loss_fn: Any) -> Any:
    """Gradients of every row, in one program."""
    return jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))


@pytest.mark.sweep
@cases
def test_values_stay_within_their_range(name: str) -> None:
    program = PROGRAMS[name]
    w, treedef = jax.tree.flatten(program.w)
    traced, _ = walker.trace(
        lambda leaves, x: program.fun(treedef.unflatten(leaves), x), w, jnp.zeros(program.shape)
    )
    x = Value(program.shape, jnp.float32, range=Range(BOUND), per_sample=True)
    (output,), _ = propagate(traced, [*(Value.known(leaf, moves=True) for leaf in w), x])
    run = jax.jit(jax.vmap(program.fun, (None, 0)))
    y = np.asarray(run(program.w, inputs(program.shape)), np.float64)
    assert y.shape[1:] == output.shape
    norms = np.linalg.norm(y.reshape(len(y), -1), axis=1)
    assert norms.max() <= float(output.norm) * ROUNDING
    assert y.max() <= float(output.high) + 1e-5 * abs(y.max())
    assert y.min() >= float(output.low) - 1e-5 * abs(y.min())


@pytest.mark.sweep
@cases
def test_no_gradient_is_longer_than_its_bound(name: str) -> None:
    loss_fn, params = surrounded(PROGRAMS[name])
    x = inputs(PROGRAMS[name].shape)
    found = lipschitz.bounds(loss_fn, params, x[0], BOUND)
    grads = per_sample(loss_fn)(params, x)
    for grad, bound in zip(jax.tree.leaves(grads), jax.tree.leaves(found.sensitivity), strict=True):
        norms = np.linalg.norm(np.asarray(grad, np.float64).reshape(len(x), -1), axis=1)
        assert np.isfinite(bound)
        assert norms.max() <= float(bound) * ROUNDING


def test_the_table_uses_every_rule() -> None:
    used = set()
    for program in PROGRAMS.values():
        loss_fn, params = surrounded(program)
        traced, _ = walker.trace(loss_fn, params, jnp.zeros(program.shape))
        used |= {eqn.name for eqn in walker.equations(traced)}
    # Names of other versions, of the inside of transformations, and of what only some users do.
    rare = {"copy", "copy_p", "add_any", "pvary", "pcast", "sharding_constraint", "stack"}
    rare |= {
        "bitcast_convert_type",
        "expand_dims",
        "optimization_barrier",
        "reduce_precision",
        "unstack",
        "reduce_window_min",
        "sinh",
    }
    assert set(_RULES) - used <= rare


def tight(loss_fn: Any, params: Any, shape: tuple[int, ...]) -> dict[str, float]:
    """Largest gradient found over bound, for each leaf."""
    x = inputs(shape, 2000)
    found = lipschitz.bounds(loss_fn, params, x[0], BOUND)
    grads = per_sample(loss_fn)(params, x)
    norms = jax.tree.map(lambda g: jnp.linalg.norm(g.reshape(len(x), -1), axis=1).max(), grads)
    return jax.tree.map(lambda norm, bound: float(norm / bound), norms, found.sensitivity)


def test_the_bounds_of_one_layer_are_reached() -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(2, 1)), jnp.float32)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(x @ params["w"] + params["b"][None]) / 2

    ratios = tight(loss_fn, {"b": jnp.zeros(1), "w": w}, (4, 2))
    assert ratios["b"] == pytest.approx(1, abs=1e-3)
    assert ratios["w"] > 0.9


def test_a_parameter_used_twice_has_the_sum_of_both_bounds() -> None:
    params = jnp.ones(3)
    once = lipschitz.bounds(lambda w, x: w @ x, params, params, 1.0).sensitivity
    twice = lipschitz.bounds(lambda w, x: w @ x + 2 * (w @ x), params, params, 1.0).sensitivity
    assert float(twice) == pytest.approx(3 * float(once), rel=1e-5)


def test_an_unknown_primitive_raises_with_its_name_its_place_and_what_to_do() -> None:
    def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.lgamma(params * x))

    with pytest.raises(NotImplementedError, match="lgamma.*test_rules.py.*register_bound_rule"):
        lipschitz.bounds(loss_fn, jnp.ones(3), jnp.ones(3), 1.0)


def test_an_error_inside_of_a_function_of_jax_says_where_that_was_called() -> None:
    with pytest.raises(NotImplementedError, match="gives NaN.*test_rules.py"):
        lipschitz.bounds(lambda w, x: jnp.take(w, x), jnp.ones(3), jnp.int32(0), 1.0)


def test_an_unknown_primitive_on_public_values_needs_no_rule() -> None:
    table = jnp.arange(1.0, 4.0)
    loss_fn = lambda params, x: jnp.sum(params * x * jax.lax.lgamma(table))  # noqa: E731
    assert float(lipschitz.bounds(loss_fn, jnp.ones(3), jnp.ones(3), 1.0).total) > 0


def test_the_steps_of_a_loop_share_the_norm_of_their_weights() -> None:
    params = PROGRAMS["rnn"].w

    def norms(length: int) -> int:
        loss_fn = lambda w, x: jnp.sum(PROGRAMS["rnn"].fun(w, x))  # noqa: E731
        x = jnp.zeros((length, 6))
        found = jax.make_jaxpr(lambda w: lipschitz.bounds(loss_fn, w, x, 1.0).total)(params)
        return str(found).count("name=_matrix_norm")

    assert norms(9) == norms(3) > 0


@jax.custom_vjp
def pulled_to_zero(x: jax.Array) -> jax.Array:
    """Its gradient has a part that no loss asked for, in rows without a sample, too."""
    return x


pulled_to_zero.defvjp(lambda x: (x, x), lambda x, ct: (ct + jnp.tanh(x),))

REFUSED = {
    "a gradient without a cotangent": (
        lambda w, x: pulled_to_zero(w * x),
        NotImplementedError,
        "rows without a sample might count",
    ),
    "while": (
        lambda w, x: jax.lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: 2 * y, w * x),
        NotImplementedError,
        "while",
    ),
    "a look-up that gives NaN": (
        lambda w, x: jnp.take(w, jnp.int32(x)),
        NotImplementedError,
        'mode="clip"',
    ),
    "a kernel that depends on the example": (
        lambda w, x: jax.lax.conv(w[None, None], x[None, None], (1,), "SAME"),
        NotImplementedError,
        "Clip instead",
    ),
    "half precision": (
        lambda w, x: (w * x).astype(jnp.bfloat16).astype(jnp.float32),
        TypeError,
        "at least float32",
    ),
    "a window in the padding alone": (
        lambda w, x: jax.lax.reduce_window(w * x, -jnp.inf, jax.lax.max, (2,), (1,), [(2, 0)]),
        NotImplementedError,
        "padding alone",
    ),
    "a window in a hole": (
        lambda w, x: jax.lax.reduce_window(
            w * x, -jnp.inf, jax.lax.max, (1,), (1,), "VALID", base_dilation=(2,)
        ),
        NotImplementedError,
        "padding alone",
    ),
    "complex numbers": (lambda w, x: jnp.abs(jnp.fft.fft(w * x)), NotImplementedError, "complex"),
    "a norm of complex numbers": (
        lambda w, x: jnp.abs((w * x).astype(jnp.complex64)),
        NotImplementedError,
        "complex",
    ),
    "rounded to few bits": (
        lambda w, x: jax.lax.reduce_precision(w * x, 5, 2),
        NotImplementedError,
        "reduce_precision",
    ),
    "a backward pass of its own on what samples share": (
        lambda w, x: x * halved_back(w),
        NotImplementedError,
        "added up before",
    ),
    "a negative power": (lambda w, x: (w * x) ** -2, NotImplementedError, "division"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_has_no_bound_is_refused(name: str) -> None:
    fun, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        lipschitz.bounds(lambda w, x: jnp.sum(fun(w, x)), jnp.ones(6), jnp.ones(6), 1.0)


def test_what_can_grow_without_end_has_an_infinite_bound() -> None:
    loss_fn = lambda params, x: jnp.sum(jnp.log(jnp.abs(params * x)))  # noqa: E731
    assert not np.isfinite(lipschitz.bounds(loss_fn, jnp.ones(3), jnp.ones(3), 1.0).total)


UNKNOWN = {
    "a constant that is no number": lambda w, x: jnp.where(x > 0, w, jnp.nan) ** 2,
    "zero times infinity": lambda w, x: (0 * x) * jnp.exp(1e9 * w * x),
    "infinity less infinity": lambda w, x: jnp.exp(1e9 * w * x) - jnp.exp(1e8 * w * x),
}


@pytest.mark.parametrize("name", list(UNKNOWN))
def test_a_bound_is_infinite_rather_than_nan(name: str) -> None:
    loss_fn = lambda w, x: jnp.sum(UNKNOWN[name](w, x))  # noqa: E731
    found = lipschitz.bounds(loss_fn, jnp.ones(3), jnp.ones(3), 1.0)
    assert float(found.total) == np.inf


def test_rounds_of_random_programs_do_not_break_a_bound() -> None:
    """Compositions: each of three functions on top of the one before."""
    rng = np.random.default_rng(0)
    square = [name for name, program in PROGRAMS.items() if keeps_shape(program)]
    for _ in range(12):
        chosen = [PROGRAMS[name] for name in rng.choice(square, 3)]
        params = [program.w for program in chosen]

        def loss_fn(params: Any, x: jax.Array, chosen: Any = chosen) -> jax.Array:
            for program, w in zip(chosen, params, strict=True):
                x = jnp.tanh(program.fun(w, x))
            return jnp.sum(x) / 3

        x = inputs((6,), 50)
        found = lipschitz.bounds(loss_fn, params, x[0], BOUND)
        grads = per_sample(loss_fn)(params, x)
        for grad, bound in zip(
            jax.tree.leaves(grads), jax.tree.leaves(found.sensitivity), strict=True
        ):
            norms = np.linalg.norm(np.asarray(grad, np.float64).reshape(len(x), -1), axis=1)
            assert norms.max() <= float(bound) * ROUNDING


def keeps_shape(program: Program) -> bool:
    x = jnp.zeros(program.shape)
    return program.shape == (6,) and jax.eval_shape(program.fun, program.w, x).shape == (6,)
