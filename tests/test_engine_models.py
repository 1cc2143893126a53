"""Every method on models as their libraries write them: nothing here is made for jaxdp."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

from tests.oracle import Case, Reference, check_case, differentiate, every_method
from tests.program_table import Integers, arrays

ROWS = 4
MASK = np.array([True, True, True, False])
KEY = jax.random.key(0)

IMAGES = {"x": (6, 6, 2), "y": Integers(3)}
SEQUENCES = {"x": (5, 3), "y": Integers(3)}
TEXTS = Integers(7, (6,))

# Libraries start recurrent states in float32 by name: double precision would meet it in the loop.
SINGLE = {"double": False}


def batch_of(example: Any) -> Any:
    return arrays(example, np.random.default_rng(1), (ROWS,))


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)


def next_word(logits: jax.Array, words: jax.Array) -> jax.Array:
    return jnp.mean(cross_entropy(logits[:-1], words[1:]))


def initial(model: Any, example: Any) -> Any:
    """Parameters of a flax or haiku model; compiled, since one operation at a time is slower."""
    return jax.jit(model.init)(KEY, example)


# ---- flax.linen ---------------------------------------------------------------------------------


def linen(model: nn.Module, example: Any = None, **settings: Any) -> Case:
    """A classifier of `x` with labels `y`."""
    batch = batch_of(IMAGES if example is None else example)
    params = initial(model, batch["x"][0])

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return cross_entropy(jnp.asarray(model.apply(params, example["x"])), example["y"])

    return Case(loss_fn, params, batch, **settings)


def linen_text(model: nn.Module) -> Case:
    """A language model."""
    words = batch_of(TEXTS)
    params = initial(model, words[0])

    def loss_fn(params: Any, words: jax.Array) -> jax.Array:
        return next_word(jnp.asarray(model.apply(params, words)), words)

    return Case(loss_fn, params, words)


class Perceptron(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(5, dtype=self.dtype)(x.reshape(-1)))
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return nn.Dense(3, dtype=self.dtype)(x)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Conv(3, (3, 3), strides=2)(x))
        x = nn.max_pool(nn.tanh(nn.Conv(4, (2, 2), padding="VALID")(x)), (2, 2))
        return nn.Dense(3)(x.reshape(-1))


class DepthwiseNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (3, 3), feature_group_count=2)(x)
        x = nn.tanh(nn.Conv(5, (1, 1))(x))
        return nn.Dense(3)(jnp.max(x, (0, 1)))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3), use_bias=False)(x)))
        y = nn.GroupNorm(1)(nn.Conv(4, (3, 3), use_bias=False)(y))
        y = nn.relu(y + nn.Conv(4, (1, 1))(x))
        return nn.Dense(3)(jnp.mean(y, (0, 1)))


class Recurrent(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(nn.RNN(self.cell)(x)[-1])


class Bidirectional(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        forward, backward = nn.RNN(nn.SimpleCell(2)), nn.RNN(nn.SimpleCell(2))
        return nn.Dense(3)(nn.Bidirectional(forward, backward)(x)[0])


class Block(nn.Module):
    """Of a transformer, pre-norm."""

    causal: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        mask = nn.make_causal_mask(x[:, 0]) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(6)(nn.LayerNorm()(x)))
        return x + nn.Dense(4)(hidden), None


class VisionTransformer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (3, 3), strides=3, padding="VALID")(x).reshape(4, 4)
        first = self.param("class", nn.initializers.normal(0.5), (1, 4))
        x = jnp.concatenate([first, x])
        x = x + self.param("position", nn.initializers.normal(0.5), (5, 4))
        x, _ = Block(causal=False)(x)
        return nn.Dense(3)(nn.LayerNorm()(x)[0])


class LanguageModel(nn.Module):
    """GPT-2: layers scanned and rematerialised, and one table for input and output."""

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        embed = nn.Embed(7, 4)
        x = embed(words) + self.param("position", nn.initializers.normal(0.5), (6, 4))
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = layers()(x, None)
        return embed.attend(nn.LayerNorm()(x))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        down = nn.tanh(nn.Conv(3, (3, 3), strides=2)(x))
        up = nn.ConvTranspose(2, (3, 3), strides=(2, 2))(down)
        return nn.Conv(3, (1, 1))(jnp.concatenate([x, up], -1))


def unet() -> Case:
    """A label for each pixel."""
    model, batch = UNet(), batch_of({"x": (4, 4, 2), "y": Integers(3, (4, 4))})
    params = initial(model, batch["x"][0])

    def loss_fn(params: Any, example: Any) -> jax.Array:
        logits = jnp.asarray(model.apply(params, example["x"]))
        return jnp.mean(cross_entropy(logits, example["y"]))

    return Case(loss_fn, params, batch)


class MixtureOfExperts(nn.Module):
    """Every expert sees every token: a product with a batch axis, and a soft gate."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        up = self.param("up", nn.initializers.normal(0.5), (2, 3, 4))
        down = self.param("down", nn.initializers.normal(0.5), (2, 4, 3))
        gate = nn.softmax(nn.Dense(2)(x))
        copies = jnp.broadcast_to(x, (2, *x.shape))
        hidden = nn.gelu(lax.dot_general(copies, up, (((2,), (1,)), ((0,), (0,)))))
        return jnp.einsum("te,etd->d", gate, jnp.einsum("etf,efd->etd", hidden, down))


class WeightNormalised(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.WeightNorm(nn.Dense(4))(x))
        return nn.Dense(3)(jnp.mean(x, 0))


class Dropout(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dropout(0.5, deterministic=False)(nn.tanh(nn.Dense(8)(x)))
        return nn.Dense(3)(jnp.mean(x, 0))


def dropout() -> Case:
    """One key for each sample, as a part of the example."""
    model, batch = Dropout(), batch_of(SEQUENCES)
    batch["key"] = jax.random.split(KEY, ROWS)
    params = model.init({"params": KEY, "dropout": KEY}, batch["x"][0])

    def loss_fn(params: Any, example: Any) -> jax.Array:
        logits = model.apply(params, example["x"], rngs={"dropout": example["key"]})
        return cross_entropy(jnp.asarray(logits), example["y"])

    # Double precision would draw other numbers.
    return Case(loss_fn, params, batch, double=False)


def mixed_precision() -> Case:
    """Computed in bfloat16, of 8 bits: roundings in another order differ by some 2^-8."""
    case = linen(Perceptron(), tolerance=2e-2, double=False)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        # flax's own LayerNorm mixes types.
        with jax.numpy_dtype_promotion("standard"):
            logits = Perceptron(jnp.bfloat16).apply(params, example["x"])
        return cross_entropy(jnp.asarray(logits, jnp.float32), example["y"])

    return case._replace(loss_fn=loss_fn)


def last_layer_only() -> Case:
    """A frozen body."""
    case = linen(ConvNet())
    trainable = {"params": {name: name == "Dense_0" for name in case.params["params"]}}
    return case._replace(options={"trainable": trainable})


# ---- flax.nnx -----------------------------------------------------------------------------------


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.mean(nnx.gelu(self.norm(self.conv(x))), (0, 1)))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(4, rngs=rngs)

    def __call__(self, words: jax.Array) -> jax.Array:
        x = self.embed(words)
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(x[:, 0]))
        return self.embed.attend(x)


def nnx_classifier() -> Case:
    graph, params = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return cross_entropy(nnx.merge(graph, params)(example["x"]), example["y"])

    return Case(loss_fn, params, batch_of(IMAGES))


def nnx_transformer() -> Case:
    graph, params = nnx.split(NnxTransformer(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params: Any, words: jax.Array) -> jax.Array:
        return next_word(nnx.merge(graph, params)(words), words)

    return Case(loss_fn, params, batch_of(TEXTS))


# ---- haiku --------------------------------------------------------------------------------------


def haiku(build: Callable[[Any, Any], Any], example: Any, **settings: Any) -> Case:
    """A classifier: `build(haiku, x)` gives its logits."""
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(functools.partial(build, hk)))
    batch = batch_of(example)
    params = initial(model, batch["x"][0])

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return cross_entropy(model.apply(params, example["x"]), example["y"])

    return Case(loss_fn, params, batch, **settings)


def haiku_conv(hk: Any, x: jax.Array) -> jax.Array:
    x = jnp.tanh(hk.Conv2D(3, 3, stride=2)(x))
    return hk.Linear(3)(hk.LayerNorm(-1, True, True)(x).reshape(-1))


def haiku_lstm(hk: Any, x: jax.Array) -> jax.Array:
    core = hk.LSTM(4)
    states, _ = hk.dynamic_unroll(core, x, core.initial_state(None))
    return hk.Linear(3)(states[-1])


def haiku_perceptron(hk: Any, x: jax.Array) -> jax.Array:
    return hk.nets.MLP([4, 3], activation=jnp.tanh)(x.reshape(-1))


# ---- equinox ------------------------------------------------------------------------------------


def equinox(build: Callable[[Any], Any], example: Any) -> Case:
    """A classifier: `build(equinox)` gives `(modules, call)`, with call(modules, x) its logits."""
    eqx = pytest.importorskip("equinox")
    modules, call = build(eqx)
    params, static = eqx.partition(modules, eqx.is_inexact_array)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return cross_entropy(call(eqx.combine(params, static), example["x"]), example["y"])

    return Case(loss_fn, params, batch_of(example))


def equinox_perceptron(eqx: Any) -> Any:
    model = eqx.nn.MLP(15, 3, 4, 2, activation=jnp.tanh, key=KEY)
    return model, lambda model, x: model(x.reshape(-1))


def equinox_conv(eqx: Any) -> Any:
    keys = jax.random.split(KEY, 3)
    modules = {
        "conv": eqx.nn.Conv2d(2, 4, 3, stride=2, key=keys[0]),
        "norm": eqx.nn.GroupNorm(2, 4),
        "head": eqx.nn.Linear(16, 3, key=keys[1]),
    }

    def call(modules: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(modules["norm"](modules["conv"](jnp.moveaxis(x, 2, 0))))
        return modules["head"](hidden.reshape(-1))

    return modules, call


def equinox_sequence(eqx: Any) -> Any:
    keys = jax.random.split(KEY, 3)
    modules = {
        "attention": eqx.nn.MultiheadAttention(1, 3, key=keys[0]),
        "cell": eqx.nn.GRUCell(3, 4, key=keys[1]),
        "head": eqx.nn.Linear(4, 3, key=keys[2]),
    }

    def call(modules: Any, x: jax.Array) -> jax.Array:
        x = x + modules["attention"](x, x, x)
        start = jnp.zeros(4, x.dtype)
        state, _ = lax.scan(lambda h, t: (modules["cell"](t, h), None), start, x)
        return modules["head"](state)

    return modules, call


# ---- plain JAX ----------------------------------------------------------------------------------


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) * scale[None, :]


def transformer_layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
    """One layer of GPT-2; the projection of queries, keys and values is fused."""
    count, width = x.shape
    query, key, value = jnp.split(norm(x, own["scale"][0]) @ own["qkv"], 3, -1)
    query, key, value = (part.reshape(count, 2, width // 2) for part in (query, key, value))
    scores = jnp.einsum("qhd,khd->hqk", query, key) / math.sqrt(width // 2)
    causal = jnp.tril(jnp.ones((1, count, count), bool))
    scores = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    x = x + jnp.einsum("hqk,khd->qhd", scores, value).reshape(count, width) @ own["out"]
    return x + jax.nn.gelu(norm(x, own["scale"][1]) @ own["up"]) @ own["down"], None


def plain_transformer(remat: bool) -> Case:
    layer = jax.checkpoint(transformer_layer) if remat else transformer_layer
    shapes = {
        "layers": {
            "down": (3, 5, 4),
            "out": (3, 4, 4),
            "qkv": (3, 4, 12),
            "scale": (3, 2, 4),
            "up": (3, 4, 5),
        },
        "position": (6, 4),
        "table": (7, 4),
    }

    def loss_fn(params: Any, words: jax.Array) -> jax.Array:
        x = params["table"][words] + params["position"]
        x, _ = lax.scan(layer, x, params["layers"])
        return next_word(x @ params["table"].T, words)

    return Case(loss_fn, arrays(shapes, np.random.default_rng(0)), batch_of(TEXTS))


def low_rank_adapters() -> Case:
    """LoRA: each frozen matrix plus the product of two thin ones, in a scan over layers."""
    base = {"down": (2, 5, 4), "out": (2, 4, 4), "qkv": (2, 4, 12), "up": (2, 4, 5)}
    adapter = {
        name: {"a": (layers, rows, 1), "b": (layers, 1, columns)}
        for name, (layers, rows, columns) in base.items()
    }
    shapes = {"adapter": adapter, "base": base, "head": (4, 3), "scale": (2, 2, 4)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def layer(x: jax.Array, own: Any) -> Any:
            matrices = {name: own[0][name] + own[1][name]["a"] @ own[1][name]["b"] for name in base}
            return transformer_layer(x, matrices | {"scale": own[2]})

        own = (params["base"], params["adapter"], params["scale"])
        x, _ = lax.scan(layer, example["x"], own)
        return cross_entropy(x[-1] @ params["head"], example["y"])

    trainable = {"adapter": True, "base": False, "head": True, "scale": False}
    batch = batch_of({"x": (5, 4), "y": Integers(3)})
    params = arrays(shapes, np.random.default_rng(0))
    return Case(loss_fn, params, batch, {"trainable": trainable})


def plain_mixed_precision() -> Case:
    """Parameters in float32, layers in bfloat16, the loss in float32."""
    case = plain_transformer(remat=True)

    def loss_fn(params: Any, words: jax.Array) -> jax.Array:
        halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        x = halves["table"][words] + halves["position"]
        x, _ = lax.scan(jax.checkpoint(transformer_layer), x, halves["layers"])
        return next_word((x @ halves["table"].T).astype(jnp.float32), words)

    return case._replace(loss_fn=loss_fn, tolerance=2e-2, double=False)


MODELS: Mapping[str, Callable[[], Case]] = {
    "linen_perceptron": lambda: linen(Perceptron()),
    "linen_conv": lambda: linen(ConvNet()),
    "linen_depthwise": lambda: linen(DepthwiseNet()),
    "linen_residual": lambda: linen(Residual()),
    "linen_lstm": lambda: linen(Recurrent(nn.OptimizedLSTMCell(4)), SEQUENCES, **SINGLE),
    "linen_gru": lambda: linen(Recurrent(nn.GRUCell(4)), SEQUENCES, **SINGLE),
    "linen_bidirectional": lambda: linen(Bidirectional(), SEQUENCES, **SINGLE),
    "linen_vision_transformer": lambda: linen(VisionTransformer()),
    "linen_language_model": lambda: linen_text(LanguageModel()),
    "linen_unet": unet,
    "linen_mixture_of_experts": lambda: linen(MixtureOfExperts(), SEQUENCES),
    "linen_weight_normalised": lambda: linen(WeightNormalised(), SEQUENCES),
    "linen_dropout": dropout,
    "linen_mixed_precision": mixed_precision,
    "linen_last_layer_only": last_layer_only,
    "nnx_classifier": nnx_classifier,
    "nnx_transformer": nnx_transformer,
    "haiku_perceptron": lambda: haiku(haiku_perceptron, SEQUENCES),
    "haiku_conv": lambda: haiku(haiku_conv, IMAGES),
    "haiku_lstm": lambda: haiku(haiku_lstm, SEQUENCES, **SINGLE),
    "equinox_perceptron": lambda: equinox(equinox_perceptron, SEQUENCES),
    "equinox_conv": lambda: equinox(equinox_conv, IMAGES),
    "equinox_sequence": lambda: equinox(equinox_sequence, SEQUENCES),
    "plain_transformer": lambda: plain_transformer(remat=False),
    "plain_transformer_with_remat": lambda: plain_transformer(remat=True),
    "plain_low_rank_adapters": low_rank_adapters,
    "plain_mixed_precision": plain_mixed_precision,
}


# Others by default hold what these hold: the same kind of network in another library, or the same
# library with another network.
SLOW = (
    "equinox_conv",
    "equinox_perceptron",
    "haiku_lstm",
    "haiku_perceptron",
    "linen_bidirectional",
    "linen_conv",
    "linen_depthwise",
    "linen_dropout",
    "linen_gru",
    "linen_language_model",
    "linen_perceptron",
    "linen_unet",
    "linen_vision_transformer",
    "nnx_classifier",
    "plain_mixed_precision",
    "plain_transformer",
)


@functools.cache
def case_of(name: str) -> tuple[Case, Reference]:
    case = MODELS[name]()
    return case, differentiate(case)


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "method"), every_method(MODELS, SLOW))
def test_model(name: str, method: str) -> None:
    case, reference = case_of(name)
    check_case(case, method, MASK, reference)
