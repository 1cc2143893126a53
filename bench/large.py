"""The models that people train on accelerators: GPT-2 124M and ViT-B/16, losses of ONE example.

    python bench/passes.py --models gpt2 vit_b16

Claim: as users would write them: flax modules, layers stacked and scanned, computed in bfloat16
from float32 parameters, or in float32. Parameters and batches are shapes alone until `filled`
gives them values, so that a program can be counted without a device that holds it.
"""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from zoo import CLASSES, Case, classification_loss, next_token_loss


class Block(nn.Module):
    """A transformer block that normalises first. `[T, d] -> [T, d]`, and nothing for `nn.scan`."""

    heads: int
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        width, dtype = x.shape[-1], self.dtype
        mask = nn.make_causal_mask(x[:, 0], dtype=bool) if self.causal else None
        y = nn.LayerNorm(dtype=dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=dtype)(y, mask=mask)
        y = nn.Dense(4 * width, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
        return x + nn.Dense(width, dtype=dtype)(nn.gelu(y)), None


class Blocks(nn.Module):
    """Scanned blocks, each recomputed in the backward pass where `remat` asks for it."""

    layers: int
    heads: int
    causal: bool
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block: Any = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scanned = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        return scanned(self.heads, self.causal, self.dtype)(x, None)[0]


class GPT2(nn.Module):
    """124M parameters at the sizes of the paper; the head is the table of tokens."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    dtype: Any = jnp.bfloat16
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        positions = nn.Embed(tokens.shape[0], self.width, dtype=self.dtype)
        x = table(tokens) + positions(jnp.arange(tokens.shape[0]))
        x = Blocks(self.layers, self.heads, True, self.dtype, self.remat)(x)
        return table.attend(nn.LayerNorm(dtype=self.dtype)(x))


class ViT(nn.Module):
    """ViT-B/16 with the mean of its tokens. `[224, 224, 3] -> [1000]`."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    patch: int = 16
    classes: int = 1000
    dtype: Any = jnp.bfloat16
    remat: bool = False

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, dtype=self.dtype)(image).reshape(-1, self.width)
        x = x + nn.Embed(x.shape[0], self.width, dtype=self.dtype)(jnp.arange(x.shape[0]))
        x = Blocks(self.layers, self.heads, False, self.dtype, self.remat)(x)
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean(axis=0))


def next_token_case(model: GPT2, batch: int, tokens: int) -> Case:
    """A language model on `[batch, tokens + 1]`."""
    params = _params(model, jax.ShapeDtypeStruct((tokens,), jnp.int32))
    texts = jax.ShapeDtypeStruct((batch, tokens + 1), jnp.int32)
    return Case(next_token_loss(_in_single(model)), params, texts)


def image_case(model: nn.Module, batch: int, side: int) -> Case:
    """A classifier on `[batch, side, side, 3]`."""
    params = _params(model, jax.ShapeDtypeStruct((side, side, 3), jnp.float32))
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return Case(classification_loss(_in_single(model)), params, (images, labels))


def _params(model: nn.Module, example: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), example)


def _in_single(model: nn.Module) -> Callable[..., jax.Array]:
    """The logits of the model, in float32 whatever it computes in."""

    def apply(params: Any, example: jax.Array) -> jax.Array:
        logits: Any = model.apply(params, example)
        return logits.astype(jnp.float32)

    return apply


def filled(case: Case, most: int = CLASSES) -> Case:
    """The same with normal parameters of standard deviation 0.02, about one for the scales of
    normalisations, and random data, whose integers are below `most`."""

    def value(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        random = np.random.default_rng(zlib.crc32(name.encode()))  # on the host: nothing compiles
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(random.integers(most, size=leaf.shape), leaf.dtype)
        mean = 1.0 if "scale" in name else 0.0
        drawn = random.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(np.float32(mean) + np.float32(0.02) * drawn, leaf.dtype)

    params, batch = jax.tree_util.tree_map_with_path(value, (case.params, case.batch))
    return Case(case.loss_fn, params, batch)


# Name -> a builder that takes a factor of the batch size.
CASES: dict[str, Callable[[int], Case]] = {
    "gpt2": lambda scale: next_token_case(GPT2(), 8 * scale, 1024),
    "gpt2_remat": lambda scale: next_token_case(GPT2(remat=True), 8 * scale, 1024),
    "gpt2_t256": lambda scale: next_token_case(GPT2(), 32 * scale, 256),
    "gpt2_float32": lambda scale: next_token_case(GPT2(dtype=jnp.float32), 8 * scale, 1024),
    "vit_b16": lambda scale: image_case(ViT(), 64 * scale, 224),
}
