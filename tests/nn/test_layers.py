"""What every layer promises: gradients, recognition by the engine, any batch size, plain dicts."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from jaxdp import nn
from tests.helpers import assert_trees_close
from tests.nn.layer_table import KEY, LAYERS
from tests.oracle import Case, Reference, check_case, every_method

# Their gradients are sums over positions, never larger than what they are added to or scale.
VECTORS = ("bias", "scale", "slope")


def thinned(names: Iterable[str]) -> list[Any]:
    """Every third by default, the others slow."""
    marks = [() if index % 3 == 0 else pytest.mark.slow for index, _ in enumerate(names)]
    return [pytest.param(name, marks=mark) for name, mark in zip(names, marks, strict=True)]


@functools.cache
def case_of(name: str) -> Case:
    return LAYERS[name].case()


def one_at_a_time(case: Case) -> Reference:
    """The gradient of every sample alone, in double precision where the case allows."""
    with jax.enable_x64(case.double), jax.numpy_dtype_promotion("standard"):
        kind = np.float64 if case.double else np.float32
        params, batch = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), kind if leaf.dtype.kind == "f" else None),
            (case.params, case.batch),
        )
        grad = jax.jit(jax.value_and_grad(case.loss_fn))
        count = len(jax.tree.leaves(batch)[0])
        answers = [grad(params, jax.tree.map(lambda a, i=i: a[i], batch)) for i in range(count)]
        losses = np.array([float(loss) for loss, _ in answers])
        rows = [jax.tree.leaves(grads) for _, grads in answers]
        stacked = [np.stack(leaf).astype(np.float64) for leaf in zip(*rows, strict=True)]
    return Reference([True] * len(stacked), stacked, losses, None)


# One of each family, with one method: how gradients go through products, convolutions and look-ups
# is swept in tests/engine/test_kinds.py and tests/test_engine_programs.py. The others are slow.
BY_DEFAULT = (
    "linear_sequence",
    "conv2d",
    "conv_transpose2d",
    "embedding_options",
    "group_norm",
    "lstm_ragged",
    "attention_causal",
    "prelu",
    "residual",
    "dropout",
    "cnn",
)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "method"), every_method(LAYERS, slow=set(LAYERS) - set(BY_DEFAULT))
)
def test_per_sample_gradients_are_those_of_a_loop(name: str, method: str) -> None:
    case = case_of(name)
    check_case(case, method, np.array([True, True, False, True, True]), one_at_a_time(case))


@pytest.mark.sweep
@pytest.mark.parametrize("name", thinned(LAYERS))
def test_the_engine_recognises_it(name: str) -> None:
    case = case_of(name)
    explanation = jaxdp.explain(case.loss_fn, case.params, case.batch)
    assert explanation.method != "dense"
    for leaf in explanation.leaves:
        materialized = "materialized" in leaf.form
        assert not materialized or leaf.leaf.rpartition("/")[2] in VECTORS, leaf


@pytest.mark.sweep
@pytest.mark.parametrize("name", thinned(LAYERS))
def test_any_batch_size(name: str) -> None:
    row = LAYERS[name]
    case = row.case(batch_size=4)

    def norms(params: Any, batch: Any) -> jax.Array:
        return jaxdp.per_sample_grads(case.loss_fn)(params, batch).norms()

    run = jax.jit(norms)
    many = run(case.params, case.batch)
    single = run(case.params, jax.tree.map(lambda leaf: leaf[:1], case.batch))
    none = run(case.params, jax.tree.map(lambda leaf: leaf[:0], case.batch))
    assert (many.shape, none.shape) == ((4,), (0,))
    np.testing.assert_allclose(single, many[:1], rtol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("name", thinned(LAYERS))
def test_parameters_are_plain_dicts_that_follow_the_key(name: str) -> None:
    layer = LAYERS[name].layer
    init = jax.jit(layer.init)
    params, same, other = init(KEY), init(KEY), init(jax.random.key(1))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, same))
    for (path, a), b in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(other), strict=True):
        assert a.dtype == jnp.float32 and not a.weak_type  # else a step compiles twice
        assert all(isinstance(entry, jax.tree_util.DictKey) for entry in path)
        constant = bool(jnp.all(a == a.reshape(-1)[0]))
        assert constant or not bool(jnp.array_equal(a, b)), path


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_has_a_torch_name(name: str) -> None:
    layer = LAYERS[name].layer
    shapes = jax.eval_shape(layer.init, KEY)
    paths = [tuple(e.key for e in path) for path, _ in jax.tree.leaves_with_path(shapes)]
    assert sorted(paths) == sorted(layer.torch_names)


def test_initial_parameters_have_the_spread_of_torch() -> None:
    """A standard deviation within 3 %: four standard errors of 2^14 draws and more."""

    def spread(layer: nn.Layer, *path: str) -> float:
        leaf: Any = jax.jit(layer.init)(KEY)
        for name in path:
            leaf = leaf[name]
        assert abs(float(jnp.mean(leaf))) < 0.03 * float(jnp.std(leaf)) + 1e-9
        return float(jnp.std(leaf))

    uniform = 1 / np.sqrt(3)
    expected = [
        (nn.linear(64, 256), ("kernel",), uniform / 8),
        (nn.conv2d(8, 256, 3), ("kernel",), uniform / np.sqrt(72)),
        (nn.conv2d(16, 512, 3, groups=2), ("kernel",), uniform / np.sqrt(72)),
        (nn.conv_transpose2d(256, 8, 3), ("kernel",), uniform / np.sqrt(72)),
        (nn.embedding(256, 64), ("embedding",), 1.0),
        (nn.lstm(64, 64), ("l0", "recurrent", "kernel"), uniform / 8),
        (nn.multi_head_attention(128, 2), ("query", "kernel"), np.sqrt(2 / (4 * 128))),
        (nn.multi_head_attention(128, 2, kdim=256), ("key", "kernel"), np.sqrt(2 / (128 + 256))),
        (nn.multi_head_attention(128, 2), ("out", "kernel"), uniform / np.sqrt(128)),
    ]
    for layer, path, std in expected:
        assert spread(layer, *path) == pytest.approx(std, rel=0.03), path


# What each refuses: a call, and what the sentence must say.
ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: nn.linear(0, 3), ValueError, "in_features must be at least 1, got 0"),
    (lambda: nn.linear(2, True), TypeError, "out_features .* got True"),
    (lambda: nn.conv2d(3, 4, 3, groups=2), ValueError, "in_channels .* groups=2, got 3"),
    (lambda: nn.conv2d(4, 5, 3, groups=2), ValueError, "out_channels .* groups=2, got 5"),
    (lambda: nn.conv2d(1, 1, (3, 3, 3)), ValueError, r"kernel_size .* got \(3, 3, 3\)"),
    (lambda: nn.conv2d(1, 1, 3, stride=0), ValueError, "stride .* at least 1.* got 0"),
    (lambda: nn.conv1d(1, 1, 3, padding="SAME"), ValueError, "'same' or 'valid', got 'SAME'"),
    (lambda: nn.conv1d(1, 1, 3, padding="same", stride=2), ValueError, "stride of 1"),
    (
        lambda: nn.conv1d(1, 1, 3, padding_mode="mirror"),  # pyright: ignore[reportArgumentType]
        ValueError,
        "'zeros' or 'reflect' or 'replicate' or 'circular', got 'mirror'",
    ),
    (lambda: nn.conv_transpose1d(1, 1, 3, output_padding=1), ValueError, "output_padding .* got 1"),
    (lambda: nn.embedding(5, 2, padding_idx=5), ValueError, "padding_idx .* got 5"),
    (lambda: nn.embedding(5, 2, max_norm=0.0), ValueError, "max_norm must be finite, > 0, got 0"),
    (lambda: nn.embedding(5, 2, norm_type=0.0), ValueError, "norm_type must be finite, > 0"),
    (lambda: nn.group_norm(3, 4), ValueError, "num_channels .* num_groups=3, got 4"),
    (lambda: nn.layer_norm(()), ValueError, "normalized_shape must have at least 1 entries"),
    (lambda: nn.batch_norm(8), ValueError, "nn.group_norm"),
    (lambda: nn.lstm(3, 4, dropout=1.5), ValueError, "dropout must be finite, >= 0, <= 1, got 1.5"),
    (lambda: nn.gru(3, 0), ValueError, "hidden_size must be at least 1, got 0"),
    (
        lambda: nn.rnn(3, 4, nonlinearity="gelu"),  # pyright: ignore[reportArgumentType]
        ValueError,
        "'tanh' or 'relu', got 'gelu'",
    ),
    (lambda: nn.multi_head_attention(5, 2), ValueError, "embed_dim .* num_heads=2, got 5"),
    (lambda: nn.multi_head_attention(4, 2, kdim=0), ValueError, "kdim .* got 0"),
    (lambda: nn.layer_norm(3, eps=-1.0), ValueError, "eps must be finite, >= 0, got -1.0"),
    (lambda: nn.dropout(-0.1), ValueError, "rate must be finite, >= 0, <= 1, got -0.1"),
    (lambda: nn.sequential(nn.linear(2, 2), 3), TypeError, "Layer or a function, got 3"),  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize(("call", "error", "sentence"), ERRORS)
def test_bad_arguments_are_refused(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


# Inputs that do not fit: a layer, its input, further arguments, and what the sentence must say.
MISFITS: list[tuple[nn.Layer, Any, dict[str, Any], type[Exception], str]] = [
    (nn.linear(3, 2), jnp.ones(4), {}, ValueError, r"\[\.\.\., 3\].* got \(4,\)"),
    (nn.conv2d(3, 2, 1), jnp.ones((5, 8, 8, 3)), {}, ValueError, "without a batch axis"),
    (nn.conv2d(3, 2, 1), jnp.ones((3, 8, 8)), {}, ValueError, "Channels come last"),
    (nn.embedding(5, 2), jnp.ones(3), {}, TypeError, "integer ids, got float32"),
    (nn.layer_norm((2, 3)), jnp.ones((3, 2)), {}, ValueError, r"\(2, 3\), got \(3, 2\)"),
    (nn.instance_norm(3), jnp.ones((1, 3)), {}, ValueError, "more than one position"),
    (nn.lstm(3, 4), jnp.ones((2, 5, 3)), {}, ValueError, "without a batch axis"),
    (nn.lstm(3, 4), jnp.ones((5, 3)), {"state": jnp.ones((1, 4))}, ValueError, "2 array"),
    (nn.gru(3, 4), jnp.ones((5, 3)), {"state": jnp.ones((4,))}, ValueError, r"\(1, 4\), got"),
    (nn.gru(3, 4), jnp.ones((5, 3)), {"mask": jnp.ones(5)}, TypeError, "arange"),
    (nn.gru(3, 4), jnp.ones((5, 3)), {"mask": jnp.ones(4, bool)}, ValueError, r"\(5,\).* \(4,\)"),
    (
        nn.multi_head_attention(4, 2),
        jnp.ones((5, 4)),
        {"mask": jnp.ones((5, 4), bool)},
        ValueError,
        r"\(5, 5\) or \(2, 5, 5\), got \(5, 4\)",
    ),
    (
        nn.multi_head_attention(4, 2),
        jnp.ones((5, 4)),
        {"key_mask": jnp.ones(5)},
        TypeError,
        "key_mask must be boolean",
    ),
    (
        nn.multi_head_attention(4, 2),
        jnp.ones((5, 4)),
        {"keys": jnp.ones((3, 4)), "values": jnp.ones((2, 4))},
        ValueError,
        "got 3 and 2",
    ),
    (nn.max_pool(2, padding=2), jnp.ones((4, 1)), {}, ValueError, "at most half"),
    (nn.avg_pool((2, 2)), jnp.ones((4, 1)), {}, ValueError, r"kernel_size .* got \(2, 2\)"),
    (nn.max_pool(5), jnp.ones((3, 1)), {}, ValueError, r"pooling.* got an input of shape \(3, 1\)"),
    (nn.conv2d(1, 2, 5), jnp.ones((3, 3, 1)), {}, ValueError, r"conv2d.* of shape \(3, 3, 1\)"),
    (nn.conv_transpose1d(1, 1, 2, padding=3), jnp.ones((2, 1)), {}, ValueError, "transpose1d"),
    (
        nn.conv1d(1, 1, 2, padding=3, padding_mode="reflect"),
        jnp.ones((3, 1)),
        {},
        ValueError,
        "at most 2 .*'reflect' on an axis of 3, got 3",
    ),
    (
        nn.conv1d(1, 1, 2, padding=4, padding_mode="circular"),
        jnp.ones((3, 1)),
        {},
        ValueError,
        "at most 3 .*'circular'",
    ),
    (nn.prelu(4), jnp.ones((5, 1)), {}, ValueError, r"prelu .* got \(5, 1\)"),
]


@pytest.mark.parametrize(("layer", "x", "options", "error", "sentence"), MISFITS)
def test_inputs_that_do_not_fit_are_refused(
    layer: nn.Layer, x: Any, options: Any, error: type[Exception], sentence: str
) -> None:
    params = jax.eval_shape(layer.init, KEY)
    with pytest.raises(error, match=sentence):
        jax.eval_shape(functools.partial(layer.apply, **options), params, x)


def test_dropout_rescales_what_it_keeps() -> None:
    """The share of zeros within 5 standard errors of the rate; other rates are refused."""
    x = jnp.ones((200, 100))
    y = nn.dropout(0.3).apply({}, x, key=KEY)
    share = float(jnp.mean(y == 0))
    bound = 5 * np.sqrt(0.3 * 0.7 / x.size)
    assert abs(share - 0.3) < bound < 0.02
    np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)
    assert not jnp.any(nn.dropout(1.0).apply({}, x, key=KEY))
    assert jnp.array_equal(nn.dropout(0.3).apply({}, x), x)


def test_layers_of_a_sequence_drop_independently() -> None:
    model = nn.sequential(nn.dropout(0.5), nn.function(lambda x: x * 0 + 1), nn.dropout(0.5))
    first = nn.sequential(nn.dropout(0.5))
    x = jnp.ones(1000)
    both = model.apply({}, x, key=KEY)
    assert 0.4 < float(jnp.mean(both == 0)) < 0.6
    assert not jnp.array_equal(both == 0, first.apply({}, x, key=KEY) == 0)


def test_dropout_between_layers_is_drawn_for_every_step_anew() -> None:
    layer = nn.rnn(2, 50, num_layers=2, dropout=0.5, nonlinearity="relu", bias=False)
    params = jax.jit(layer.init)(KEY)
    # The second layer hands on what it is given.
    params["l1"]["input"]["kernel"] = jnp.eye(50)
    params["l1"]["recurrent"]["kernel"] = jnp.zeros((50, 50))
    x = jnp.ones((6, 2))
    kept, whole = layer.apply(params, x, key=KEY)[0], layer.apply(params, x)[0]
    positive = np.asarray(whole > 0)
    zeros = np.asarray(kept == 0) & positive
    assert 0.3 < zeros.sum() / positive.sum() < 0.7
    assert len({tuple(row) for row in zeros}) == 6
    np.testing.assert_allclose(kept[~zeros], 2 * whole[~zeros], rtol=1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("make", [nn.lstm, nn.gru, nn.rnn])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_nothing(make: Any, bidirectional: bool) -> None:
    """Whatever it holds, and in the gradient, too."""
    layer = make(3, 4, num_layers=2, bidirectional=bidirectional)
    params = jax.jit(layer.init)(KEY)
    short = jax.random.normal(KEY, (4, 3))
    padded = jnp.concatenate([short, jnp.array([[1e38] * 3, [jnp.nan] * 3, [jnp.inf] * 3])])

    def loss(params: Any, x: jax.Array, mask: Any) -> tuple[jax.Array, Any]:
        y, state = layer.apply(params, x, mask=mask)
        return jnp.sum(y**2), (y, state)

    grad = jax.jit(jax.grad(loss, has_aux=True))
    grads, (y, state) = grad(params, short, None)
    padded_grads, (longer, end) = grad(params, padded, jnp.arange(7) < 4)
    assert not jnp.any(longer[4:])
    for a, b in zip(
        jax.tree.leaves((grads, y, state)),
        jax.tree.leaves((padded_grads, longer[:4], end)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_time_may_come_before_the_batch() -> None:
    layer = nn.lstm(3, 4)
    params = layer.init(KEY)
    x = jax.random.normal(KEY, (6, 5, 3))  # [T, B, D]
    time_major = jax.vmap(lambda x: layer.apply(params, x)[0], 1, 1)(x)
    batch_first = jax.vmap(lambda x: layer.apply(params, x)[0])(jnp.swapaxes(x, 0, 1))
    np.testing.assert_allclose(time_major, jnp.swapaxes(batch_first, 0, 1), rtol=1e-5, atol=1e-7)


def test_a_query_that_may_attend_to_nothing_gets_the_bias() -> None:
    layer = nn.multi_head_attention(4, 2)
    params = layer.init(KEY)
    params["out"]["bias"] = jnp.arange(4.0)
    y = layer.apply(params, jnp.ones((3, 4)), mask=jnp.zeros((3, 3), bool))
    np.testing.assert_array_equal(y, np.tile(np.arange(4.0), (3, 1)))


def test_norms_in_half_precision_take_their_moments_in_single() -> None:
    """Squares of 500 overflow float16, and bfloat16 cannot tell 100.1 from 100.4."""
    x = np.array([300.0, -400.0, 500.0, 100.0])
    expected = (x - x.mean()) / x.std()
    half = jnp.asarray(x, jnp.float16)
    for layer, given, wanted in [
        (nn.layer_norm(4, elementwise_affine=False), half, expected),
        (nn.rms_norm(4, elementwise_affine=False), half, x / np.sqrt(np.mean(x**2))),
        (nn.group_norm(1, 4, affine=False), half, expected),
        (nn.instance_norm(1), half[:, None], expected[:, None]),
    ]:
        y = layer.apply({}, given)
        assert y.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=3e-3)
    wide = 100 + np.random.default_rng(0).normal(size=512)
    given = np.asarray(jnp.asarray(wide, jnp.bfloat16), np.float64)
    y = nn.layer_norm(512, elementwise_affine=False).apply({}, jnp.asarray(wide, jnp.bfloat16))
    expected = (given - given.mean()) / given.std()
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.02)
    # Torch's default eps is that of float32 here, too.
    small = nn.rms_norm(3, elementwise_affine=False)
    y = small.apply({}, jnp.array([0.01, 0.02, 0.03], jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(y, np.float64), [0.463, 0.926, 1.39], rtol=1e-2)


def test_sizes_may_be_numpy_integers() -> None:
    layer = nn.conv1d(np.int64(2), np.int32(3), np.int64(2))  # pyright: ignore[reportArgumentType]
    assert layer.apply(layer.init(KEY), jnp.ones((4, 2))).shape == (3, 3)


def test_an_id_outside_of_the_table_spoils_its_sample_and_no_other() -> None:
    model = nn.sequential(nn.embedding(5, 3), nn.linear(3, 2))
    params = model.init(KEY)
    ids = jnp.array([[0, 4], [1, 5], [-1, 2], [3, 3]])
    grads_fn = jaxdp.per_sample_grads(lambda p, x: jnp.sum(model.apply(p, x) ** 2))

    @jax.jit
    def run(ids: jax.Array) -> tuple[jax.Array, Any]:
        grads = grads_fn(params, ids)
        return grads.counted, grads.weighted_sum(jnp.ones(len(ids)))

    counted, got = run(ids)
    np.testing.assert_array_equal(counted, [True, False, False, True])
    _, expected = run(ids[jnp.array([0, 3])])
    assert_trees_close(got, expected, rtol=1e-5)


def test_ids_of_narrow_types() -> None:
    layer = nn.embedding(300, 2)
    params = layer.init(KEY)
    ids = np.array([3, 255], np.uint8)
    np.testing.assert_array_equal(layer.apply(params, ids), params["embedding"][np.array([3, 255])])


def test_rows_that_are_too_long_stay_in_the_table() -> None:
    """Torch shortens them there, which tells without noise what a batch held."""
    layer = nn.embedding(4, 2, max_norm=1.0)
    params = {"embedding": jnp.array([[3.0, 4.0], [0.3, 0.4], [5.0, 0.0], [0.0, 7.0]])}
    rows = layer.apply(params, jnp.array([0, 1, 3]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.3, 0.4], [0.0, 1.0]], rtol=1e-6)


def test_what_an_id_weighs_depends_on_its_own_example_only() -> None:
    layer = nn.embedding(4, 2, scale_grad_by_freq=True)
    params = layer.init(KEY)
    grads_fn = jaxdp.per_sample_grads(lambda p, x: jnp.sum(layer.apply(p, x)))
    ids = jnp.array([[1, 1, 1], [1, 2, 3]])
    together = jax.jit(lambda ids: grads_fn(params, ids).materialize())(ids)["embedding"]
    np.testing.assert_allclose(together[0][1], [1.0, 1.0])
    np.testing.assert_allclose(together[1][1], [1.0, 1.0])
