"""The models that `bench/engine.py` measures on: nine losses of ONE example, and random batches.

    python bench/engine.py --models mlp transformer

Claim: nothing here knows how jaxdp computes. The models are flax modules and plain JAX as a user
would write them, and cover what per-sample methods treat differently: dense layers, convolutions,
normalisation, recurrence, attention, embeddings, scan and rematerialisation. Seeds are fixed; the
data are random, since the cost of a step does not depend on what it learns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdp.recipes import models

CLASSES = 10
VOCABULARY = 1000
TOKENS = 64


class Case(NamedTuple):
    """A model to differentiate.

    Attributes:
      loss_fn: `(params, example) -> scalar`, where no leaf of the example has a batch axis.
      params: pytree of float32 arrays.
      batch: pytree of `[B, ...]` arrays.
    """

    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any

    @property
    def batch_size(self) -> int:
        """B."""
        return jax.tree.leaves(self.batch)[0].shape[0]

    def example(self, index: Any) -> Any:
        """One of the batch."""
        return jax.tree.map(lambda leaf: leaf[index], self.batch)


class MLP(nn.Module):
    """784-512-512-10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (512, 512):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(CLASSES)(x)


class CifarCNN(nn.Module):
    """Six 3x3 convolutions in three stages."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for stage, channels in enumerate((32, 64, 128)):
            if stage > 0:
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(2):
                x = nn.relu(nn.Conv(channels, (3, 3))(x))
        return nn.Dense(CLASSES)(x.reshape(-1))


class WideBlock(nn.Module):
    """A residual block that normalises before each convolution."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(_group_norm()(x))
        reshapes = self.stride > 1 or x.shape[-1] != self.channels
        shortcut = nn.Conv(self.channels, (1, 1), self.stride, use_bias=False)(y) if reshapes else x
        y = nn.Conv(self.channels, (3, 3), self.stride, use_bias=False)(y)
        y = nn.relu(_group_norm()(y))
        return shortcut + nn.Conv(self.channels, (3, 3), use_bias=False)(y)


class WideResNet(nn.Module):
    """WRN-16-4, GroupNorm in the place of BatchNorm, which mixes samples."""

    stages: tuple[int, ...] = (64, 128, 256)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        for stage, channels in enumerate(self.stages):
            for block in range(2):
                x = WideBlock(channels, stride=2 if stage > 0 and block == 0 else 1)(x)
        x = nn.relu(_group_norm()(x))
        return nn.Dense(CLASSES)(x.mean(axis=(0, 1)))


class LSTM(nn.Module):
    """Embedding, one LSTM layer, a classifier on its last state."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, 100)(tokens)
        return nn.Dense(CLASSES)(nn.RNN(nn.OptimizedLSTMCell(128))(x)[-1])


class Block(nn.Module):
    """A causal transformer block that normalises first. `[T, d] -> [T, d]`."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        causal = nn.make_causal_mask(x[:, 0])
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=causal)
        y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(y)


class Embedding(nn.Module):
    """Token and position embeddings. `[T] -> [T, 128]`."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[0])
        return nn.Embed(VOCABULARY, 128)(tokens) + nn.Embed(TOKENS, 128)(positions)


class Head(nn.Module):
    """Logits of the next token. `[T, 128] -> [T, VOCABULARY]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


class Transformer(nn.Module):
    """A language model of two blocks, d 128."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = Embedding()(tokens)
        for _ in range(2):
            x = Block(heads=4)(x)
        return Head()(x)


class BagOfWords(nn.Module):
    """The mean of 20 rows of a table of a million, and a classifier."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return nn.Dense(CLASSES)(nn.Embed(1_000_000, 64)(tokens).mean(axis=0))


def _mlp(scale: int) -> Case:
    return classifier(MLP(), images((256 * scale, 784)))


def _mnist_cnn(scale: int) -> Case:
    batch = images((256 * scale, 28, 28, 1))
    model = models.build("tanh-cnn", batch[0].shape[1:], CLASSES)
    loss_fn = classification_loss(model.apply)
    return Case(loss_fn, model.init(jax.random.key(0)), batch)


def _cifar_cnn(scale: int) -> Case:
    return classifier(CifarCNN(), images((64 * scale, 32, 32, 3)))


def _wrn_16_4(scale: int) -> Case:
    return classifier(WideResNet(), images((16 * scale, 32, 32, 3)))


def _lstm(scale: int) -> Case:
    return classifier(LSTM(), documents((256 * scale, TOKENS), VOCABULARY))


def _transformer(scale: int) -> Case:
    model = Transformer()
    tokens = _integers((32 * scale, TOKENS + 1), VOCABULARY)
    params = model.init(jax.random.key(0), tokens[0, 1:])
    return Case(next_token_loss(model.apply), params, tokens)


def _scanned_remat_transformer(scale: int) -> Case:
    """Six blocks whose parameters are stacked, as large models are written to compile fast."""
    embedding, block, head = Embedding(), Block(heads=4), Head()
    tokens = _integers((32 * scale, TOKENS + 1), VOCABULARY)
    first, middle, last = jax.random.split(jax.random.key(0), 3)
    x = jnp.zeros((TOKENS, 128))
    params = {
        "embedding": embedding.init(first, tokens[0, 1:]),
        "blocks": jax.vmap(block.init, (0, None))(jax.random.split(middle, 6), x),
        "head": head.init(last, x),
    }

    @jax.checkpoint
    def body(x: Any, layer: Any) -> tuple[Any, None]:
        return block.apply(layer, x), None

    def apply(params: Any, tokens: jax.Array) -> Any:
        x = embedding.apply(params["embedding"], tokens)
        x, _ = jax.lax.scan(body, x, params["blocks"])
        return head.apply(params["head"], x)

    return Case(next_token_loss(apply), params, tokens)


def _gpt2_block(scale: int) -> Case:
    """One block of GPT-2 small on activations, without its embeddings."""
    model = Block(heads=12)
    activations = _normal((4 * scale, 512, 768))

    def loss_fn(params: Any, example: jax.Array) -> jax.Array:
        output: Any = model.apply(params, example)
        return jnp.mean(jnp.square(output))

    return Case(loss_fn, model.init(jax.random.key(0), activations[0]), activations)


def _embedding_1m(scale: int) -> Case:
    return classifier(BagOfWords(), documents((256 * scale, 20), 1_000_000))


# Name -> a builder that takes a factor of the batch size.
CASES: dict[str, Callable[[int], Case]] = {
    "mlp": _mlp,
    "mnist_cnn": _mnist_cnn,
    "cifar_cnn": _cifar_cnn,
    "wrn_16_4": _wrn_16_4,
    "lstm": _lstm,
    "transformer": _transformer,
    "scanned_remat_transformer": _scanned_remat_transformer,
    "gpt2_block": _gpt2_block,
    "embedding_1m": _embedding_1m,
}


def classifier(module: nn.Module, batch: tuple[jax.Array, jax.Array]) -> Case:
    """With its parameters drawn, and the cross entropy of its logits."""
    params = module.init(jax.random.key(0), batch[0][0])
    return Case(classification_loss(module.apply), params, batch)


def classification_loss(apply: Callable[..., Any]) -> Callable[[Any, Any], jax.Array]:
    """The cross entropy of the logits of one example and its label."""

    def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, label = example
        return optax.losses.softmax_cross_entropy_with_integer_labels(apply(params, x), label)

    return loss_fn


def next_token_loss(apply: Callable[..., Any]) -> Callable[[Any, Any], jax.Array]:
    """The mean cross entropy of the tokens of one text, each from those before it."""

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits = apply(params, tokens[:-1])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
        return losses.mean()

    return loss_fn


def _group_norm() -> nn.GroupNorm:
    # For one example without a batch axis flax must be told that the channels are the last axis
    # and that all the others are reduced.
    return nn.GroupNorm(num_groups=16, reduction_axes=(-3, -2, -1))


def _normal(shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def _integers(shape: tuple[int, ...], high: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(high, size=shape), jnp.int32)


def images(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Normal pixels `[B, ...]` and labels."""
    return _normal(shape), _integers(shape[:1], CLASSES)


def documents(shape: tuple[int, ...], vocabulary: int) -> tuple[jax.Array, jax.Array]:
    """Token ids `[B, T]` and labels."""
    return _integers(shape, vocabulary), _integers(shape[:1], CLASSES)
