"""Bounds that were broken, and others of their kind: what a row adds is never longer than stated.

Each kind is a table. A case is a loss, its parameters, and examples made to break it; the oracle is
the norm, in float64, of the sum that `bounded_grads` gives for one example, so that everything that
happens to an example on the way is under attack, too.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxdp import lipschitz
from jaxdp.lipschitz.gradients import admitted

LIMIT = 1.0


class Case(NamedTuple):
    """A loss of `(params, x)`, its parameters, and the shape of an example."""

    loss: Callable[[Any, jax.Array], Any]
    params: Any
    shape: tuple[int, ...] = (4,)
    limit: float = LIMIT


def length(tree: Any) -> float:
    """In float64."""
    return math.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree)))


def rows_of(shape: tuple[int, ...], limit: float) -> np.ndarray:
    """Examples made to break bounds: zeros, equal entries, signs, one entry, small, huge, not
    finite, random."""
    rng = np.random.default_rng(0)
    size = math.prod(shape)
    unit = np.ones(size) / math.sqrt(size)
    rows = [
        0 * unit, unit, -unit, 3 * unit, unit * rng.choice([-1, 1], size), np.eye(size)[0],
        1e-20 * unit, np.where(np.arange(size) % 16, 1.08e-19, 1.09e-19), 1e-30 * np.eye(size)[-1],
        1e17 * unit, 1e30 * unit,
        np.where(np.eye(size)[0] > 0, np.nan, unit), np.where(np.eye(size)[0] > 0, np.inf, unit),
        *rng.normal(size=(6, size)), *(1e-3 * rng.normal(size=(2, size))),
    ]  # fmt: skip
    scale = min(limit, 1e3)
    return (scale * np.stack(rows)).reshape(-1, *shape).astype(np.float32)


def added(
    case: Case, rows: np.ndarray, mask: np.ndarray | None = None
) -> tuple[list[float], float]:
    """Length of the sum for each row alone, and the sensitivity that it states."""
    grads_fn = jax.jit(lipschitz.bounded_grads(case.loss, case.limit))
    found = [grads_fn(case.params, row[None], None if mask is None else mask) for row in rows]
    return [length(each.value) for each in found], length(found[0].sensitivity)


# ---- finite for sure -----------------------------------------------------------------------------


def backward(of: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The identity, whose gradient is a function of the cotangent."""
    identity = jax.custom_vjp(lambda x: x)
    identity.defvjp(lambda x: (x, None), lambda _, g: (of(g),))
    return identity


def normalised(g: jax.Array) -> jax.Array:
    return g / jnp.sqrt(jnp.sum(jnp.square(g)))


ONES = jnp.ones(4)
SCALED = lipschitz.declare(
    lambda x: jnp.tanh(x), lambda eqn, values: ([lipschitz.Range(2.0, -1, 1)], lambda b: [1.0])
)

# A cap behind what may be infinite or NaN: the primitive that makes it so.
CAPPED: Mapping[str, tuple[Callable[[Any, jax.Array], jax.Array], str]] = {
    "clamp of 0/0": (lambda p, x: p @ jnp.clip((x - x.mean()) / x.std(), -3, 3), "div"),
    "clamp of 0/0, by a literal": (lambda p, x: p @ lax.clamp(-1.0, x / jnp.abs(x), 1.0), "div"),
    "sine of a reciprocal": (lambda p, x: jnp.sum(jnp.sin(p / x)), "div"),
    "cosine of a reciprocal": (lambda p, x: jnp.sum(p * jnp.cos(1 / x)), "div"),
    "tanh of ∞ - ∞": (
        lambda p, x: jnp.sum(jnp.tanh(jnp.exp(2e3 * p * x) - jnp.exp(1e3 * p * x))),
        "exp",
    ),
    "logistic of a logarithm": (lambda p, x: jnp.sum(lax.logistic(p * jnp.log(x))), "log"),
    "erf of a root": (lambda p, x: jnp.sum(lax.erf(p * jnp.sqrt(x))), "sqrt"),
    "atan of an overflow": (lambda p, x: jnp.sum(jnp.arctan(p * jnp.square(1e25 * x))), "square"),
    "minimum of a pole": (lambda p, x: p @ jnp.minimum(jnp.maximum(lax.rsqrt(x), -1), 1), "rsqrt"),
    "sign of 0/0": (lambda p, x: p @ jnp.sign(x / jnp.sum(x)), "div"),
    "floor of ∞": (lambda p, x: p @ jnp.clip(jnp.floor(jnp.exp(1e3 * x)), 0, 1), "exp"),
    "choice behind a pole": (lambda p, x: jnp.sum(jnp.where(x > 0, jnp.log(p * x), 0.0)), "log"),
    "a sum that overflows": (
        lambda p, x: jnp.sum(p * jnp.tanh(jnp.sum(3e38 * x) - 3e38 * x[0])),
        "reduce_sum|mul|sub",
    ),
    "an extremum of 0/0": (lambda p, x: jnp.tanh(jnp.max(p * (x / x))), "div"),
    "logits that overflow": (
        lambda p, x: lipschitz.softmax_cross_entropy(1e30 * p * jnp.exp(60 * x), 0),
        "exp|mul",
    ),
    "a margin that overflows": (
        lambda p, x: lipschitz.softmax_cross_entropy(1.2e38 * p * x, 1),
        "softmax_cross_entropy",
    ),
    "a declared function of 0/0": (lambda p, x: jnp.sum(SCALED(p * (x / x))), "div"),
    "a bounded input of 0/0": (
        lambda p, x: p @ lipschitz.bounded_input(1.0).apply({}, x / jnp.sum(x)),
        "div",
    ),
    "the cosine of 0/0": (lambda p, x: lipschitz.cosine_similarity(p * (x / x), x), "div"),
    "the gradient of a norm": (lambda p, x: jnp.linalg.norm(p * x), "sqrt"),
    "a power below one": (lambda p, x: jnp.sum(jnp.sqrt(jnp.square(p * x))), "sqrt"),
    "a branch that is not taken": (
        lambda p, x: jnp.sum(lax.cond(x[0] > 0, jnp.log, jnp.tanh, p * x)),
        "cond",
    ),
    "a normalised cotangent": (
        lambda p, x: jnp.sum(backward(lambda g: jnp.tanh(normalised(g)))(p * x)),
        "custom_vjp",
    ),
    "a clamped cotangent": (
        lambda p, x: jnp.sum(backward(lambda g: jnp.minimum(g / jnp.max(g), g))(p * x)),
        "custom_vjp",
    ),
    "bits of an example": (
        lambda p, x: p @ jnp.tanh(lax.bitcast_convert_type(jnp.int32(x), jnp.float32)),
        "bitcast",
    ),
    "a constant that is no number": (lambda p, x: jnp.tanh(p @ x + jnp.nan), "tanh"),
}


@pytest.mark.parametrize("name", list(CAPPED))
def test_no_cap_bounds_what_may_not_be_finite(name: str) -> None:
    loss, maker = CAPPED[name]
    found = lipschitz.bounds(loss, ONES, ONES, LIMIT)
    assert float(found.total) == math.inf
    assert any(each in found.reason for each in maker.split("|")), found.reason
    assert "test_attacks.py" in found.reason and found.reason in str(found)
    with pytest.raises(ValueError, match="must have a bound, got infinity, because"):
        lipschitz.bounded_grads(loss, LIMIT)(ONES, ONES[None])


# Finite for sure, whatever stands before: what is not finite is dropped, or cannot come.
FINITE: Mapping[str, Case] = {
    "a clip behind a norm": Case(
        lambda p, x: jnp.linalg.norm(lipschitz.clip_gradient(p * x, 1.0)), ONES
    ),
    "a clip behind a pole": Case(
        lambda p, x: jnp.sum(jnp.log(lipschitz.clip_gradient(p * x, 0.3))), ONES
    ),
    "a clip of cotangents that vanish": Case(
        lambda p, x: 1e-25 * jnp.sum(lipschitz.clip_gradient(p * x, 1e-27)), ONES
    ),
    "a clip of cotangents that overflow when squared": Case(
        lambda p, x: 1e25 * jnp.sum(lipschitz.clip_gradient(p * x, 0.5)), ONES
    ),
    "a quotient away from zero": Case(lambda p, x: jnp.sum(p / (2 + x)), ONES),
    "a root away from zero": Case(lambda p, x: jnp.sum(jnp.sqrt(1 + jnp.square(p * x))), ONES),
    "a bounded input of any size": Case(
        lambda p, x: p @ lipschitz.bounded_input(0.5).apply({}, x - jnp.mean(x)),
        ONES,
        limit=math.inf,
    ),
    "a choice of a safe operand": Case(
        lambda p, x: jnp.sum(jnp.log(jnp.where(x > 0.1, p * x, 1.0) ** 2 + 1)), ONES
    ),
    "the cosine of zero": Case(
        lambda p, x: lipschitz.cosine_similarity(p * x, x, least_norm=1e-3), ONES
    ),
    "the cosine of what overflows when squared": Case(
        lambda p, x: lipschitz.cosine_similarity(1e25 * p * x, 1e25 * x), ONES
    ),
    "losses of any logits": Case(
        lambda p, x: lipschitz.softmax_cross_entropy(1e30 * p * x, 3), ONES
    ),
    "a pool of windows of zeros": Case(
        lambda p, x: jnp.sum(lipschitz.l2_norm_pool(2).apply({}, (p * x)[:, None])), ONES
    ),
}

# Norms of norms, of what vanishes when it is squared.
WIDE = jnp.zeros((256, 1))
VANISHING: Mapping[str, Case] = {
    "a pool, behind a bias": Case(
        lambda b, x: jnp.sum(lipschitz.l2_norm_pool(16).apply({}, x + b)), WIDE, (256, 1)
    ),
    "concatenated": Case(lambda p, x: jnp.sum(jnp.concatenate([p * x * 1e-25] * 2) * 1e30), ONES),
    "stacked": Case(lambda p, x: jnp.sum(jnp.stack([1e-25 * p * x] * 3) * 1e30), ONES),
    "chosen": Case(
        lambda p, x: 1e25 * jnp.sum(jnp.where(x > 0, 1e-25 * p * x, -1e-25 * x * p)), ONES
    ),
    "padded": Case(lambda p, x: 1e25 * jnp.sum(jnp.pad(1e-25 * p * x, 2)), ONES),
    "updated": Case(
        lambda p, x: 1e25 * jnp.sum(lax.dynamic_update_slice(1e-25 * p * x, 1e-25 * x[:1], (0,))),
        ONES,
    ),
    "the larger": Case(lambda p, x: 1e25 * jnp.sum(jnp.maximum(1e-25 * p * x, 1e-25 * x)), ONES),
    "a small weight": Case(
        lambda p, x: 1e22 * jnp.sum(p["b"] * ((p["a"] * x) @ jnp.full((4, 3), 1e-22))),
        {"a": ONES, "b": jnp.ones(3)},
    ),
    "a small parameter": Case(lambda p, x: 1e22 * jnp.sum((p @ x) * x), jnp.full((4, 4), 1e-22)),
    "a small kernel": Case(
        lambda p, x: (
            1e22 * jnp.sum(p["b"] * lax.conv((p["a"] * x)[None, None], p["k"], (1,), "SAME"))
        ),
        {"a": ONES, "b": jnp.ones(()), "k": jnp.full((1, 1, 3), 1e-22)},
    ),
    "a small table": Case(
        lambda p, x: 1e22 * jnp.sum(x * p.at[jnp.int32(jnp.abs(x))].get(mode="clip")),
        jnp.full(3, 1e-22),
    ),
    "split": Case(
        lambda p, x: 1e22 * jnp.sum(sum(jnp.split(1e-22 * p * x, 2), jnp.zeros(2))), ONES
    ),
    "a loss that is small, split": Case(
        lambda p, x: 1e-22 * jnp.sum(jnp.stack(jnp.split(1e22 * p * x, 2))), ONES
    ),
    "in a loop": Case(
        lambda p, x: jnp.float32(1e22)
        * lax.scan(lambda c, r: (c + r, None), 0.0, 1e-22 * p * x)[0],
        ONES,
    ),
    "out of a loop": Case(
        lambda p, x: 1e22 * jnp.sum(lax.scan(lambda c, r: (c, r * c), 1.0, 1e-22 * p * x)[1]), ONES
    ),
    "a product of products": Case(lambda p, x: jnp.sum(p * x * 1e-25 * 1e-25 * 1e25 * 1e10), ONES),
    "a square": Case(lambda p, x: 1e30 * jnp.sum(jnp.square(1e-15 * p * x)), ONES),
    "a square that vanishes": Case(
        lambda p, x: 1e30 * jnp.sum(lax.integer_pow(1e-5 * p * x, 6)), ONES
    ),
    "a quotient": Case(lambda p, x: 1e25 * jnp.sum(p / (1e25 * (2 + x))), ONES),
    "a small input": Case(lambda p, x: 1e12 * jnp.sum(p * x), ONES, limit=1e-12),
}

# 1 - r² is lost to the rounding of r².
CANCELLING: Mapping[str, Case] = {
    f"a logarithm at {radius}": Case(
        lambda p, x: -jnp.log(1 - p * jnp.dot(x, x)), jnp.ones(()), limit=radius
    )
    for radius in (0.9, 0.999, 0.99999, 0.999999, 0.9999999)
} | {
    f"a quotient at {radius}": Case(
        lambda p, x: p / (1 - jnp.sum(jnp.square(x))), jnp.ones(()), (48,), limit=radius
    )
    for radius in (0.999, 0.99999)
} | {
    f"a root at {radius}": Case(
        lambda p, x: jnp.sqrt(1 - p * jnp.sum(jnp.square(x))), jnp.ones(()), (48,), limit=radius
    )
    for radius in (0.999, 0.99999)
} | {
    "a difference of sums": Case(
        lambda p, x: 1e4 * p * jnp.tanh(jnp.sum(x[:32] + 7) - jnp.sum(x[32:] + 7)),
        jnp.ones(()),
        (64,),
    ),
}  # fmt: skip

KINDS = {"finite": FINITE, "vanishing": VANISHING, "cancelling": CANCELLING}


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind, table in KINDS.items() for name in table]
)
def test_no_row_adds_more_than_is_stated(kind: str, name: str) -> None:
    case = KINDS[kind][name]
    lengths, stated = added(case, rows_of(case.shape, case.limit))
    if stated == math.inf:  # then the sum is refused, or no number, and the noise with it
        assert kind == "cancelling"
        return
    assert stated > 0
    assert max(lengths) <= stated  # NaN is not
    assert kind != "vanishing" or max(lengths) > 1e-4 * stated


@pytest.mark.parametrize("name", list(FINITE))
def test_a_masked_row_adds_nothing_whatever_it_holds(name: str) -> None:
    case = FINITE[name]
    lengths, _ = added(case, rows_of(case.shape, case.limit), np.zeros(1, bool))
    assert max(lengths) == 0


def test_the_radius_at_which_nothing_is_left_of_a_difference_has_no_bound() -> None:
    loss = CANCELLING["a logarithm at 0.9999999"].loss
    finite, lost = (lipschitz.bounds(loss, jnp.ones(()), ONES, r) for r in (0.99999, 0.9999999))
    assert 5e4 < float(finite.total) < 2e5
    assert float(lost.total) == math.inf and "log" in lost.reason


# ---- half precision ------------------------------------------------------------------------------


@functools.cache
def admit(limit: float) -> Callable[..., Any]:
    return jax.jit(lambda rows: admitted(rows, jnp.ones(len(rows), bool), [limit]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@given(
    seed=st.integers(0, 10_000),
    limit=st.sampled_from([0.3, 1.0, 1e-3, 7.0]),
    size=st.sampled_from([0.3, 1.3, 3.0, 60.0]),
    equal=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_no_example_in_half_precision_leaves_its_ball(
    dtype: Any, seed: int, limit: float, size: float, equal: bool
) -> None:
    rng = np.random.default_rng(seed)
    entries = rng.choice([-1.0, 1.0], (8, 64)) if equal else rng.normal(size=(8, 64))
    rows = jnp.asarray(size * entries * rng.uniform(0, 2, (8, 1)), dtype)
    kept, counted = admit(limit)(rows)
    assert kept.dtype == dtype and np.all(counted)
    before, after = (np.asarray(each, np.float64) for each in (rows, kept))
    norms = np.linalg.norm(after, axis=1)
    assert norms.max() <= limit * (1 + 1e-6)
    scaled = np.minimum(1, limit / np.maximum(np.linalg.norm(before, axis=1), 1e-30))[:, None]
    assert np.all(np.abs(after) <= np.abs(before) * scaled * (1 + 1e-6))
    # An example within the ball stays as it is, and no other one is lost.
    inside = scaled[:, 0] == 1
    assert np.array_equal(after[inside], before[inside])
    assert np.all(norms >= 0.9 * np.minimum(limit, np.linalg.norm(before, axis=1)) - 1e-4)


@pytest.mark.parametrize("dtype, entry", [(jnp.bfloat16, 3.0), (jnp.float16, 1.3)])
def test_half_precision_inputs_keep_the_sensitivity(dtype: Any, entry: float) -> None:
    grads_fn = lipschitz.bounded_grads(lambda p, x: p @ x.astype(jnp.float32), 0.3)
    found = jax.jit(grads_fn)(jnp.ones(3), jnp.full((1, 3), entry, dtype))
    assert length(found.value) <= float(found.total_sensitivity) <= 0.3 * (1 + 1e-4)


# ---- several calls of one declared function ------------------------------------------------------

ROWS = jnp.ones((5, 3))


def clipped(z: jax.Array) -> jax.Array:
    return lipschitz.clip_gradient(z, 0.1)


TARGETS = 0 * ROWS
MAPPED: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "absolute error": lambda y: jax.vmap(lipschitz.mean_absolute_error)(y - 3, TARGETS),
    "binary": lambda y: jax.vmap(lipschitz.binary_cross_entropy)(y, 1 + TARGETS),
    "softmax": lambda y: jax.vmap(lipschitz.softmax_cross_entropy)(y, jnp.arange(5) % 3),
    "softmax of one label": lambda y: jax.vmap(
        lambda z: lipschitz.softmax_cross_entropy(z, 1, temperature=0.1)
    )(y),
    "hinge": lambda y: jax.vmap(lipschitz.multiclass_hinge)(y, jnp.arange(5) % 3),
    "cosine": lambda y: jax.vmap(lambda z, t: lipschitz.cosine_similarity(z, t))(y, ROWS[:, ::-1]),
    "bounded input": lambda y: jax.vmap(lambda z: lipschitz.bounded_input(0.2).apply({}, z))(y),
    "clip": lambda y: 9 * jax.vmap(clipped)(y),
    "clip, twice mapped": lambda y: 9 * jax.vmap(jax.vmap(clipped))(y),
    "pool": lambda y: jax.vmap(lambda z: lipschitz.l2_norm_pool(3).apply({}, z[:, None]))(y),
    "declared": lambda y: jax.vmap(
        lipschitz.declare(
            lambda z: z / jnp.sqrt(1 + jnp.sum(z * z)),
            lambda eqn, values: ([lipschitz.Range(1.0)], lambda bounds: bounds),
        )
    )(y),
}  # fmt: skip


LAYERS = ("bounded input", "clip", "clip, twice mapped", "pool", "declared")


@pytest.mark.parametrize("name", list(MAPPED))
def test_calls_side_by_side_are_as_many(name: str) -> None:
    """Parameters below and above: the cotangent of what goes in, and the size of what comes out."""
    params = {"below": 0 * ROWS, "above": jnp.ones(())}

    def loss(params: Any, x: jax.Array) -> jax.Array:
        out = MAPPED[name](params["below"] + x)
        # Of a loss there is no bound to multiply with: a traced label may be none of a class.
        return params["above"] * jnp.sum(out) if name in LAYERS else jnp.sum(out)

    grads_fn = jax.jit(lipschitz.bounded_grads(loss, 3.0))
    found = [grads_fn(params, row[None]) for row in rows_of((5, 3), 3.0)]
    for leaf, stated in zip(("above", "below"), found[0].sensitivity, strict=True):
        longest = max(length(each.value[leaf]) for each in found)
        assert (leaf == "above" or 0.01 * stated < longest) and longest <= stated < math.inf


def test_a_threshold_that_calls_share_is_counted_as_often() -> None:
    layer = lipschitz.adaptive_gradient_clip(0.1)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return 9 * jnp.sum(jax.vmap(lambda row: layer.apply(params["clip"], row))(params["w"] * x))

    params = {"clip": {"clip_value": jnp.float32(0.1)}, "w": ROWS}
    lengths, stated = added(Case(loss, params, (5, 3), 3.0), rows_of((5, 3), 3.0))
    assert max(lengths) <= stated
    assert float(lipschitz.bounds(loss, params, ROWS, 3.0).by_name["clip/clip_value"]) >= 2.5


def test_calls_mapped_over_different_operands_in_different_ways_are_refused() -> None:
    def loss(params: jax.Array, x: jax.Array) -> jax.Array:
        inner = jax.vmap(lipschitz.mean_absolute_error, (0, None))
        return jnp.sum(jax.vmap(inner, (None, 0))(params * x, TARGETS[:2]))

    with pytest.raises(NotImplementedError, match="maps in different ways"):
        lipschitz.bounds(loss, ROWS, ROWS, 1.0)


def test_samples_that_mix_by_flags_are_refused() -> None:
    """A bound on the gradient of one example says nothing of one that another one decides."""

    def shown(flags: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.any(flags), np.shape(flags))

    def loss(p: Any, x: jax.Array) -> jax.Array:
        flag = jax.pure_callback(
            shown, jax.ShapeDtypeStruct((), bool), x[0] > 1, vmap_method="expand_dims"
        )
        return jnp.tanh(p @ jnp.where(flag, x, 0))

    for ask in (
        lambda: lipschitz.bounds(loss, jnp.ones(3), jnp.ones(3), 1.0),
        lambda: lipschitz.bounded_grads(loss, 1.0)(jnp.ones(3), jnp.ones((4, 3))),
    ):
        with pytest.raises(ValueError, match="pure_callback with vmap_method='expand_dims'"):
            ask()
