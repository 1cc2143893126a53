"""Per-sample gradients against a one-at-a-time loop in double precision, and the handle's rules."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp.engine.numerics import select_rows
from tests import helpers
from tests.helpers import PARAMS

ROWS = 5
MASK = np.array([True, True, False, True, False])


class Model(NamedTuple):
    """A loss of one example, and data for it.

    Attributes:
      loss_fn: `(params, example, **kwargs) -> loss`, or `(loss, aux)`.
      params: pytree.
      batch: pytree of `[ROWS, ...]`.
      kwargs: keyword arguments of the loss.
      has_aux: whether the loss returns a pair.
    """

    loss_fn: Callable[..., Any]
    params: Any
    batch: Any
    kwargs: dict[str, Any] = {}
    has_aux: bool = False


def rng_tree(shapes: Any, seed: int = 0, scale: float = 0.5) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(jnp.square(prediction - target))


def linear() -> Model:
    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, y = example
        return squared_error(x @ params["w"] + params["b"], y)

    params = rng_tree({"w": (3, 2), "b": (2,)})
    return Model(loss_fn, params, rng_tree([(ROWS, 3), (ROWS, 2)], 1))


def perceptron() -> Model:
    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, y = example
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        logits = x @ params[-1]["w"]
        return -jnp.vdot(jax.nn.log_softmax(logits), y)

    params = rng_tree([{"w": (3, 4), "b": (4,)}, {"w": (4, 4), "b": (4,)}, {"w": (4, 3)}])
    labels = jax.nn.one_hot(jnp.arange(ROWS) % 3, 3)
    return Model(loss_fn, params, (rng_tree((ROWS, 3), 1), labels))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.tanh(nn.Conv(3, (3, 3), strides=2)(x))
        x = nn.GroupNorm(num_groups=1)(x)
        x = nn.Dense(2)(x.reshape(-1))
        return x if train else 2.0 * x


def convolution() -> Model:
    """flax.linen, and a keyword argument that reaches the loss."""
    model = ConvNet()
    batch = rng_tree([(ROWS, 5, 5, 1), (ROWS, 2)], 1)
    params = model.init(jax.random.key(0), batch[0][0], train=True)

    def loss_fn(params: Any, example: Any, *, train: bool) -> jax.Array:
        return squared_error(model.apply(params, example[0], train=train), example[1])

    return Model(loss_fn, params, batch, {"train": True})


def embedding() -> Model:
    """Integer examples; repeated words must add up before the norm is taken."""

    def loss_fn(params: Any, words: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(params["table"][words] @ params["w"]))

    words = jnp.array([[0, 0, 0], [0, 1, 2], [3, 3, 1], [2, 2, 2], [1, 1, 0]])
    return Model(loss_fn, rng_tree({"table": (4, 3), "w": (3, 2)}), words)


def recurrent() -> Model:
    def loss_fn(params: Any, sequence: jax.Array) -> jax.Array:
        def cell(state: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(state @ params["u"] + x @ params["w"]), None

        state, _ = jax.lax.scan(cell, jnp.zeros(3, sequence.dtype), sequence)
        return jnp.sum(jnp.square(state))

    return Model(loss_fn, rng_tree({"u": (3, 3), "w": (2, 3)}), rng_tree((ROWS, 6, 2), 1))


def shared_weights() -> Model:
    """One matrix in two places: its gradient is the sum over both."""

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"].T))

    return Model(loss_fn, rng_tree({"w": (3, 4)}), rng_tree((ROWS, 3), 1))


def with_aux() -> Model:
    def loss_fn(params: Any, example: Any) -> Any:
        x, y = example
        prediction = jnp.tanh(x @ params["w"])
        return squared_error(prediction, y), {"prediction": prediction, "right": prediction > y}

    return Model(
        loss_fn, rng_tree({"w": (3, 2)}), rng_tree([(ROWS, 3), (ROWS, 2)], 1), has_aux=True
    )


def dropout(keys: jax.Array) -> Model:
    """One key per sample in the batch: every sample drops its own units."""

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, key = example
        # float32 by name: in double precision, where the oracle runs, the draw would be another.
        kept = jax.random.uniform(key, (4,), jnp.float32) < 0.5
        hidden = jnp.where(kept, jnp.tanh(x @ params["w"]), 0.0)
        return jnp.sum(jnp.square(hidden))

    return Model(loss_fn, rng_tree({"w": (3, 4)}), (rng_tree((ROWS, 3), 1), keys))


def scalar_parameter() -> Model:
    def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sin(params * x)

    return Model(loss_fn, jnp.array(0.7), rng_tree((ROWS,), 1))


MODELS: Mapping[str, Callable[[], Model]] = {
    "linear": linear,
    "perceptron": perceptron,
    "convolution": convolution,
    "embedding": embedding,
    "recurrent": recurrent,
    "shared_weights": shared_weights,
    "with_aux": with_aux,
    "dropout_typed_keys": lambda: dropout(jax.random.split(jax.random.key(1), ROWS)),
    "dropout_raw_keys": lambda: dropout(jax.random.split(jax.random.PRNGKey(1), ROWS)),
    "scalar_parameter": scalar_parameter,
}


class Expected(NamedTuple):
    grads: list[np.ndarray]
    losses: np.ndarray
    aux: Any


def double(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64) if helpers.is_float(leaf) else leaf,
        tree,
    )


@functools.cache
def one_at_a_time(name: str) -> Expected:
    """The oracle: a Python loop of `jax.grad` over the examples, in double precision."""
    model = MODELS[name]()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, batch = double(model.params), double(model.batch)
        loss_fn = functools.partial(model.loss_fn, **model.kwargs)
        value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=model.has_aux))
        grads, losses, aux = [], [], []
        for row in range(ROWS):
            example = jax.tree.map(lambda leaf, row=row: leaf[row], batch)
            value, grad = value_and_grad(params, example)
            losses.append(np.asarray(value[0] if model.has_aux else value))
            aux.append(value[1] if model.has_aux else None)
            grads.append([np.asarray(leaf) for leaf in jax.tree.leaves(grad)])
        stacked_aux = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *aux)
    stacked = [np.stack(leaves) for leaves in zip(*grads, strict=True)]
    assert all(leaf.dtype == np.float64 for leaf in stacked)
    return Expected(stacked, np.stack(losses), stacked_aux)


def assert_close(got: Any, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Relative to the size of the whole array: single entries may cancel."""
    got = np.asarray(got, np.float64)
    assert got.shape == expected.shape
    error = np.linalg.norm((got - expected).ravel())
    assert error <= tolerance * max(np.linalg.norm(expected.ravel()), 1e-12)


CASES = [(name, None) for name in MODELS] + [
    (name, 2) for name in ("recurrent", "with_aux", "dropout_typed_keys")
]


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "microbatch_size"), CASES)
def test_everything_a_handle_answers_equals_the_loop(
    name: str, microbatch_size: int | None
) -> None:
    model = MODELS[name]()
    expected = one_at_a_time(name)
    grads_fn = jaxdp.per_sample_grads(
        model.loss_fn, has_aux=model.has_aux, microbatch_size=microbatch_size
    )
    leaves = len(expected.grads)
    weights = np.array([0.5, -1.0, 2.0, 0.0, 3.0], np.float32)
    # Groups in which neighbouring leaves alternate.
    groups = tuple(leaf % 2 for leaf in range(leaves))

    @jax.jit
    def answers(params: Any, batch: Any) -> Any:
        grads = grads_fn(params, batch, MASK, **model.kwargs)
        return (
            grads.materialize(),
            grads.norms(),
            grads.norms(groups),
            grads.weighted_sum(weights),
            grads.losses,
            grads.aux,
            grads.nonfinite,
        )

    rows, norms, by_group, weighted, losses, aux, nonfinite = answers(model.params, model.batch)
    masked = [leaf * MASK.reshape(-1, *[1] * (leaf.ndim - 1)) for leaf in expected.grads]
    assert jax.tree.structure(rows) == jax.tree.structure(model.params)
    for got, leaf in zip(jax.tree.leaves(rows), masked, strict=True):
        assert_close(got, leaf)
    squares = np.stack([np.sum(leaf.reshape(ROWS, -1) ** 2, axis=1) for leaf in masked], axis=1)
    assert_close(norms, np.sqrt(squares.sum(axis=1)))
    per_group = [squares[:, k::2].sum(axis=1) for k in range(min(leaves, 2))]
    assert_close(by_group, np.sqrt(np.stack(per_group, axis=1)))
    for got, leaf in zip(jax.tree.leaves(weighted), masked, strict=True):
        assert_close(got, np.tensordot(weights.astype(np.float64), leaf, 1))
    assert_close(losses, expected.losses * MASK)
    for got, leaf in zip(jax.tree.leaves(aux), jax.tree.leaves(expected.aux), strict=True):
        assert_close(got[MASK], leaf[MASK])
    assert int(nonfinite) == 0


@functools.cache
def answers_in_microbatches(size: int | None) -> Any:
    model = with_aux()

    @jax.jit
    def ask(params: Any, batch: Any) -> Any:
        grads_fn = jaxdp.per_sample_grads(model.loss_fn, has_aux=True, microbatch_size=size)
        grads = grads_fn(params, batch, MASK)
        total = grads.weighted_sum(jnp.ones(ROWS))
        aux = jax.tree.map(functools.partial(select_rows, MASK), grads.aux)
        return total, grads.materialize(), grads.losses, grads.norms(), aux

    return ask(model.params, model.batch)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_any_microbatch_size_gives_the_same_rows(size: int) -> None:
    helpers.assert_trees_close(answers_in_microbatches(size), answers_in_microbatches(None))


@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_bfloat16_parameters_have_norms_and_sums_in_float32(microbatch_size: int | None) -> None:
    """4096 entries and 300 rows of ones: in bfloat16, of 8 bits, their sums would stop at 256."""
    count, rows = 4096, 300
    params = {"w": jnp.ones(count, jnp.bfloat16)}

    @jax.jit
    def answers(batch: jax.Array) -> Any:
        grads_fn = jaxdp.per_sample_grads(
            lambda p, x: jnp.sum(p["w"]) * x, microbatch_size=microbatch_size
        )
        grads = grads_fn(params, batch)
        return grads.norms(), grads.weighted_sum(jnp.ones(rows)), grads.materialize()

    with jax.numpy_dtype_promotion("standard"):
        norms, total, materialized = answers(jnp.ones(rows, jnp.bfloat16))
    assert materialized["w"].dtype == jnp.bfloat16
    assert norms.dtype == total["w"].dtype == jnp.float32
    np.testing.assert_allclose(norms, 64.0, rtol=6e-6)
    assert np.all(np.asarray(norms) >= 64.0)
    np.testing.assert_allclose(total["w"], 300.0, rtol=1e-6)


def test_bfloat16_gradients_agree_with_the_loop_to_their_own_precision() -> None:
    model = perceptron()
    expected = one_at_a_time("perceptron")
    with jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
        grads_fn = jaxdp.per_sample_grads(model.loss_fn)
        rows = jax.jit(lambda p, b: grads_fn(p, b).materialize())(params, model.batch)
        # A bfloat16 has 8 bits: 2^-8 for each of the few roundings on the way.
        for got, leaf in zip(jax.tree.leaves(rows), expected.grads, strict=True):
            assert_close(got.astype(jnp.float32), leaf, tolerance=0.02)


def test_samples_that_are_not_finite_are_counted_and_masked_ones_are_not() -> None:
    rows = {"w": jnp.array([[1.0, jnp.nan], [1.0, 1.0], [jnp.inf, 0.0], [1e30, 0.0]])}
    grads = jaxdp.PerSampleGrads.from_arrays(rows, jnp.array([True, True, False, True]))
    assert grads.counted.tolist() == [False, True, False, False]
    assert int(grads.nonfinite) == 2


def test_weight_zero_silences_a_row_whatever_it_holds() -> None:
    rows = {"w": jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])}
    total = jaxdp.PerSampleGrads.from_arrays(rows).weighted_sum(jnp.array([2.0, 0.0]))
    assert total["w"].tolist() == [2.0, 4.0]


def test_a_handle_answers_the_same_inside_and_outside_of_traces() -> None:
    """Answers are remembered, yet never across a trace: a tracer of a finished cond would leak."""

    @jax.jit
    def inside(params: Any, batch: Any) -> Any:
        grads = jaxdp.per_sample_grads(helpers.small_loss)(params, batch)
        in_cond = jax.lax.cond(jnp.array(True), grads.norms, lambda: jnp.zeros(ROWS))
        _, in_scan = jax.lax.scan(lambda c, _: (c, grads.norms()), 0, None, length=2)
        in_vmap = jax.vmap(lambda weight: grads.weighted_sum(weight))(jnp.eye(ROWS))
        return in_cond, in_scan[1], jax.tree.leaves(in_vmap), grads.norms(), grads.losses

    batch = helpers.small_batch(ROWS)
    in_cond, in_scan, in_vmap, norms, losses = inside(PARAMS, batch)
    eager = jaxdp.per_sample_grads(helpers.small_loss)(PARAMS, batch)
    np.testing.assert_allclose(in_cond, norms, rtol=1e-6)
    np.testing.assert_allclose(in_scan, norms, rtol=1e-6)
    np.testing.assert_allclose(eager.norms(), norms, rtol=1e-6)
    np.testing.assert_allclose(eager.losses, losses, rtol=1e-6)
    for got, leaf in zip(in_vmap, jax.tree.leaves(eager.materialize()), strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-6)


def test_one_handle_serves_several_clips() -> None:
    grads = jaxdp.per_sample_grads(helpers.small_loss)(PARAMS, helpers.small_batch(ROWS))
    for clip in (jaxdp.clip_flat(1.0), jaxdp.clip_per_layer(0.1), jaxdp.clip_flat(1.0)):
        fresh = jaxdp.per_sample_grads(helpers.small_loss)(PARAMS, helpers.small_batch(ROWS))
        got, _ = clip.update(grads, clip.init(PARAMS))
        expected, _ = clip.update(fresh, clip.init(PARAMS))
        helpers.assert_trees_equal(got, expected)


def lazy() -> jaxdp.PerSampleGrads:
    return jaxdp.per_sample_grads(helpers.small_loss)(PARAMS, helpers.small_batch(ROWS))


ESCAPES: Mapping[str, Callable[[], Any]] = {
    "returned from jit": lambda: jax.jit(lazy)(),
    "given to jit": lambda: jax.jit(lambda grads: grads.norms())(lazy()),
    "given to scan": lambda: jax.lax.scan(lambda c, _: (c, None), lazy(), None, length=2),
    "given to vmap": lambda: jax.vmap(lambda grads: grads.norms())(lazy()),
    "returned from cond": lambda: jax.lax.cond(jnp.array(True), lazy, lazy),
    "mapped over": lambda: jax.tree.map(jnp.ones_like, lazy()),
    "given to sgd": lambda: optax.sgd(0.1).update(lazy(), optax.sgd(0.1).init(PARAMS)),  # pyright: ignore
    "given to adam": lambda: optax.adam(0.1).update(lazy(), optax.adam(0.1).init(PARAMS)),  # pyright: ignore
    "given to a norm clip": lambda: optax.tree.norm(lazy()),
}


@pytest.mark.parametrize("escape", list(ESCAPES))
def test_a_handle_that_leaves_its_function_says_what_to_do(escape: str) -> None:
    with pytest.raises(TypeError, match="lazy handle on one batch.*Give it to a clip"):
        ESCAPES[escape]()


def call(batch: Any = None, mask: Any = None, loss_fn: Any = None, params: Any = None) -> Any:
    grads_fn = jaxdp.per_sample_grads(loss_fn or helpers.small_loss)
    batch = helpers.small_batch(ROWS) if batch is None else batch
    return grads_fn(PARAMS if params is None else params, batch, mask).norms()


MISUSES: Mapping[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "leaves disagree": (
        lambda: call((jnp.ones((5, 3)), jnp.ones(4))),
        ValueError,
        r"all leaves of batch must have the same leading axis, the samples, got sizes \[4, 5\]",
    ),
    "a leaf without sample axis": (
        lambda: call((jnp.ones((5, 3)), jnp.ones(()))),
        ValueError,
        "every leaf of batch must have a leading sample axis",
    ),
    "no leaves": (lambda: call(()), ValueError, "every leaf of batch must have a leading"),
    "mask of another length": (
        lambda: call(mask=jnp.ones(4, bool)),
        ValueError,
        r"mask must have shape \(5,\), got \(4,\)",
    ),
    "mask with another axis": (
        lambda: call(mask=jnp.ones((5, 1), bool)),
        ValueError,
        r"mask must have shape \(5,\)",
    ),
    "weights as mask": (
        lambda: call(mask=jnp.ones(5)),
        TypeError,
        "mask must be boolean, got float32. It selects rows, it does not weigh them",
    ),
    "counts as mask": (lambda: call(mask=np.ones(5, int)), TypeError, "mask must be boolean"),
    "loss with a batch axis": (
        lambda: call(loss_fn=lambda p, e: e[0] * p["head"][0]),
        TypeError,
        r"must return one real scalar, .* got .* of shape \(3,\). Drop the batch axis",
    ),
    "integer loss": (
        lambda: call(loss_fn=lambda p, e: jnp.int32(p["head"][0])),
        TypeError,
        "must return one real scalar",
    ),
    "has_aux without a pair": (
        lambda: jaxdp.per_sample_grads(helpers.small_loss, has_aux=True)(
            PARAMS, helpers.small_batch(ROWS)
        ).norms(),
        TypeError,
        r"with has_aux must return \(loss, aux\)",
    ),
    "complex parameters": (
        lambda: call(params={"w": jnp.ones(2, jnp.complex64)}),
        TypeError,
        "parameters must be real, got a complex leaf",
    ),
    "integers only": (
        lambda: call(params={"w": jnp.arange(2)}),
        ValueError,
        "at least one trainable floating-point leaf",
    ),
    "no parameters": (lambda: call(params={}), ValueError, "at least one trainable"),
    "everything frozen": (
        lambda: jaxdp.per_sample_grads(helpers.small_loss, trainable=False)(
            PARAMS, helpers.small_batch(ROWS)
        ),
        ValueError,
        "at least one trainable",
    ),
    "trainable of another structure": (
        lambda: jaxdp.per_sample_grads(helpers.small_loss, trainable={"tail": True})(
            PARAMS, helpers.small_batch(ROWS)
        ),
        ValueError,
        "trainable must be a pytree prefix of the parameters",
    ),
    "microbatch of none": (
        lambda: jaxdp.per_sample_grads(helpers.small_loss, microbatch_size=0),
        ValueError,
        "microbatch_size must be at least 1, got 0",
    ),
    "no function": (
        lambda: jaxdp.per_sample_grads(PARAMS),  # pyright: ignore[reportArgumentType]
        TypeError,
        "loss_fn must be a function",
    ),
    "losses of arrays": (
        lambda: jaxdp.PerSampleGrads.from_arrays(jnp.ones((2, 3))).losses,
        ValueError,
        "losses are unknown for gradients given as arrays",
    ),
    "weights of another length": (
        lambda: lazy().weighted_sum(jnp.ones(4)),
        ValueError,
        r"weights must have shape \(5,\), got \(4,\)",
    ),
    "groups that leave out a leaf": (
        lambda: lazy().norms((0, None, 0)),
        ValueError,
        "groups must be None exactly where a leaf has no gradient",
    ),
}


@pytest.mark.parametrize("misuse", list(MISUSES))
def test_misuse_is_told_with_name_rule_and_value(misuse: str) -> None:
    action, error, message = MISUSES[misuse]
    with pytest.raises(error, match=message):
        action()
