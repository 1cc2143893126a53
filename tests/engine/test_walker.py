"""The room that reads jaxprs: what it evaluates, and what it names."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdp.engine import walker
from jaxdp.engine.walker import Equation, Path
from tests import helpers

W = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=3), jnp.float32)


@jax.custom_jvp
def doubled(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


@doubled.defjvp
def _doubled_jvp(primals: Any, tangents: Any) -> Any:
    return jnp.sin(primals[0]), 2.0 * tangents[0]


@jax.custom_vjp
def tripled(w: jax.Array, x: jax.Array) -> jax.Array:
    return w @ x


tripled.defvjp(
    lambda w, x: (w @ x, (w, x)), lambda saved, g: (3.0 * jnp.outer(g, saved[1]), g @ saved[0])
)


def scanned(w: jax.Array, x: jax.Array) -> jax.Array:
    def step(carry: jax.Array, each: Any) -> Any:
        index, row = each
        return jnp.tanh(w @ carry + row), carry[0] * index

    carry, seen = lax.scan(step, x, (jnp.arange(3, dtype=jnp.float32), w), reverse=True, unroll=2)
    return jnp.sum(carry) + jnp.sum(seen)


def counted(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(lax.fori_loop(0, 3, lambda _, x: jnp.tanh(w @ x), x))


def while_it_is_small(w: jax.Array, x: jax.Array) -> jax.Array:
    small = lax.stop_gradient(x)
    return jnp.sum(lax.while_loop(lambda x: jnp.sum(x) < 9.0, lambda x: x + 1.0, small) @ w)


def branched(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(lax.cond(x[0] > 0, lambda w: w @ x, lambda w: x @ w, w))


@jax.jit
def inner(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.jit(jnp.matmul)(w, x) + jnp.asarray([1.0, 2.0, 3.0])


def called_twice(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(inner(w, inner(w.T, x))))


def in_a_block(w: jax.Array, x: jax.Array) -> jax.Array:
    policy = jax.checkpoint_policies.dots_saveable
    block = jax.checkpoint(lambda w, x: jnp.tanh(w @ x), policy=policy, prevent_cse=False)
    return jnp.sum(block(w, block(w, x)))


def plain(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(w @ x) * x)


CONSTANT = np.array([[1.0, 2.0, 3.0]] * 3, np.float32)

FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "plain": plain,
    "captured constant": lambda w, x: jnp.sum((w + CONSTANT) @ x),
    "nested jit": called_twice,
    "scan": scanned,
    "fori_loop": counted,
    "while": while_it_is_small,
    "cond": branched,
    "remat": in_a_block,
    "remat in a scan in jit": lambda w, x: jax.jit(
        lambda w, x: lax.scan(lambda c, _: (in_a_block(w, c) * c, None), x, None, length=2)[0]
    )(w, x),
    "custom_jvp": lambda w, x: jnp.sum(doubled(w @ x)),
    "custom_vjp": lambda w, x: jnp.sum(tripled(w, x)),
    "its input, a literal and a tree": lambda w, x: {"w": w, "one": 1.0, "pair": (x, x + 1.0)},
    "vmap": lambda w, x: jnp.sum(jax.vmap(lambda row: jnp.tanh(row @ x))(w)),
    "gradient": lambda w, x: jax.grad(lambda x: scanned(w, x))(x),
    "gradient of a block": lambda w, x: jax.grad(in_a_block)(w, x),
    "random": lambda w, x: x * jax.random.uniform(jax.random.key(3), (3,)),
}


def again(fun: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`fun`, from its equations one by one."""

    def run(w: Any, x: Any) -> Any:
        program, structure = walker.trace(fun, w, x)
        outputs = walker.evaluate(program, [w, x], lambda path, eqn, values: eqn.bind(values))
        return jax.tree.unflatten(structure, outputs)

    return run


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_evaluating_the_equations_is_calling_the_function(name: str) -> None:
    fun = FUNCTIONS[name]
    expected = jax.tree.map(jnp.asarray, fun(W, X))
    got = jax.tree.map(jnp.asarray, again(fun)(W, X))
    helpers.assert_trees_close(got, expected, rtol=1e-6)
    helpers.assert_trees_close(jax.jit(again(fun))(W, X), expected, rtol=1e-5)


DIFFERENTIABLE = [
    name for name in FUNCTIONS if name not in ("its input, a literal and a tree", "random")
]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_it_is_differentiated_as_the_function_is(name: str) -> None:
    """Custom derivatives included."""

    def total(fun: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return jax.grad(lambda w, x: jnp.sum(fun(w, x)), (0, 1))

    fun = FUNCTIONS[name]
    helpers.assert_trees_close(total(again(fun))(W, X), total(fun)(W, X), rtol=1e-5)


def visited(fun: Callable[..., Any], *args: Any) -> list[tuple[Path, str]]:
    """Paths and names in the order of evaluation, loops and blocks not entered."""
    program, _ = walker.trace(fun, *args)
    seen: list[tuple[Path, str]] = []

    def rule(path: Path, eqn: Equation, values: list[Any]) -> list[Any]:
        seen.append((path, eqn.name))
        return [None] * len(eqn.outputs)

    walker.evaluate(program, [None] * len(args), rule)
    return seen


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_every_equation_has_a_path_of_its_own(name: str) -> None:
    paths = [path for path, _ in visited(FUNCTIONS[name], W, X)]
    assert len(set(paths)) == len(paths)
    assert paths == sorted(paths), "paths are not in the order of evaluation"


def test_calls_are_entered_and_leave_no_name() -> None:
    seen = visited(called_twice, W, X)
    assert [name for _, name in seen].count("dot_general") == 2
    assert not {name for _, name in seen} & {"pjit", "jit", "closed_call"}
    deepest = max(len(path) for path, _ in seen)
    assert deepest == 3


def test_the_path_of_the_holder_comes_first() -> None:
    program, _ = walker.trace(plain, W, X)
    paths: list[Path] = []

    def rule(path: Path, eqn: Equation, values: list[Any]) -> list[Any]:
        paths.append(path)
        return [None] * len(eqn.outputs)

    walker.evaluate(program, [None, None], rule, path=(7, 1))
    assert paths == [(7, 1, k) for k in range(len(paths))]


def find(fun: Callable[..., Any], name: str) -> Equation:
    program, _ = walker.trace(fun, W, X)
    found: list[Equation] = []

    def rule(path: Path, eqn: Equation, values: list[Any]) -> list[Any]:
        found.extend([eqn] * (eqn.name == name))
        return [None] * len(eqn.outputs)

    walker.evaluate(program, [None, None], rule)
    return found[0]


def test_a_scan_says_what_it_was_asked_for() -> None:
    eqn = find(scanned, "scan")
    scan = eqn.scan
    assert scan is not None
    assert eqn.remat is None
    assert (scan.carry, scan.length, scan.reverse, scan.unroll) == (1, 3, True, 2)
    assert scan.constants >= 1
    # Operands: constants, carry, xs; outputs: carry, ys. W comes once as a whole and once in rows.
    assert len(eqn.operands) == scan.constants + scan.carry + 2
    assert [tuple(aval.shape) for aval in eqn.operands[scan.constants :]] == [(3,), (3,), (3, 3)]
    assert [tuple(aval.shape) for aval in eqn.outputs] == [(3,), (3,)]
    assert len(scan.body.inputs) == len(eqn.operands)


def test_a_block_says_what_it_was_asked_for() -> None:
    eqn = find(in_a_block, "remat")
    remat = eqn.remat
    assert remat is not None
    assert eqn.scan is None
    assert remat.policy is jax.checkpoint_policies.dots_saveable
    assert not remat.prevent_cse
    names: list[str] = []

    def rule(path: Path, eqn: Equation, values: list[Any]) -> list[Any]:
        names.append(eqn.name)
        return eqn.bind(values)

    (output,) = walker.evaluate(remat.body, [W, X], rule)
    np.testing.assert_allclose(output, jnp.tanh(W @ X), rtol=1e-6)
    assert {"dot_general", "tanh"} <= set(names)


def test_a_block_that_is_being_differentiated_is_not_entered() -> None:
    """Its body is the backward pass already, and must not be rematerialised once more."""
    seen = []
    program, _ = walker.trace(jax.grad(in_a_block), W, X)

    def rule(path: Path, eqn: Equation, values: list[Any]) -> list[Any]:
        if eqn.name == "remat":
            seen.append((eqn.params["differentiated"], eqn.remat is None))
        return eqn.bind(values)

    walker.evaluate(program, [W, X], rule)
    assert (True, True) in seen
    assert all(differentiated == hidden for differentiated, hidden in seen)


def test_an_equation_knows_where_it_was_written() -> None:
    assert "test_walker.py" in find(plain, "dot_general").source


def test_an_equation_of_a_function_of_jax_knows_where_that_was_called() -> None:
    seen = []

    def rule(path: walker.Path, eqn: walker.Equation, values: list[Any]) -> Any:
        seen.append((eqn.name, eqn.source))
        return eqn.bind(values)

    program, _ = walker.trace(lambda x: jnp.var(jnp.take(x, 0, axis=1)), W)
    walker.evaluate(program, [W], rule)
    assert {"gather", "square"} <= {name for name, _ in seen}
    assert all("test_walker.py" in source for _, source in seen), seen


# ---- what an equation says of itself ------------------------------------------------------------


def test_named_axes_are_those_of_maps_and_devices() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def over_devices(w: jax.Array, x: jax.Array) -> jax.Array:
        spec = jax.sharding.PartitionSpec
        run = jax.shard_map(
            lambda x: lax.psum(x, "data") + jnp.sum(x, axis=0, keepdims=True) + x,
            mesh=mesh,
            in_specs=spec("data"),
            out_specs=spec("data"),
        )
        return run(x[:2])

    program, _ = walker.trace(over_devices, W, X)
    equations = list(walker.equations(program))
    assert [eqn.bound_axes for eqn in equations if eqn.name == "shard_map"] == [{"data"}]
    assert {"psum", "psum_invariant"} & {eqn.name for eqn in equations if eqn.named_axes}
    assert all(eqn.named_axes <= {"data"} for eqn in equations)
    assert not any(eqn.named_axes for eqn in equations if eqn.name == "reduce_sum")


def test_mutable_arrays_are_known_by_their_type() -> None:
    outside = jax.new_ref(X)

    def adds(w: jax.Array, x: jax.Array) -> jax.Array:
        def step(carry: jax.Array, _: None) -> Any:
            outside[...] += carry
            return carry, None

        return lax.scan(step, x, None, length=2)[0]

    program, _ = walker.trace(adds, W, X)
    names = {eqn.name for eqn in walker.equations(program) if eqn.touches_refs}
    assert "scan" in names and names & {"swap", "addupdate"} and "add" not in names
    assert list(map(walker.is_ref, walker.closed_over(program))) == [True]
    assert not walker.is_ref(X)
