"""Small models for the command line and the benchmarks; one image or text in, logits out.

Most image models are flax modules, the text model is made of `jaxdp.nn`: neither knows of privacy.
A Lipschitz model is made of `jaxdp.lipschitz`: it can be trained without clipping.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdp import lipschitz
from jaxdp import nn as jaxdp_nn
from jaxdp.checks import check_choice
from jaxdp.recipes.data import names


class Model(NamedTuple):
    """A pair of pure functions, and how they want to be trained.

    Attributes:
      init: `key -> params`.
      apply: `(params, image [H, W, C] or text [T]) -> logits [num_classes]`, of one example.
      project: `params -> params`, after every update, for a Lipschitz model; None for an ordinary
        one.
      temperature: of its cross-entropy, see `lipschitz.softmax_cross_entropy`.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    project: Callable[[Any], Any] | None = None
    temperature: float = 1.0


class TanhCNN(nn.Module):
    """Two convolutions with tanh, 26,010 parameters on 28x28x1 images and ten classes.

    Bounded activations keep per-sample gradients small, which clipping rewards.

    Source: Papernot et al. 2021, "Tempered Sigmoid Activations for Deep Learning with
    Differential Privacy", table 1.
    """

    num_classes: int

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = nn.Conv(16, (8, 8), strides=2, padding=3)(image)
        x = nn.max_pool(jnp.tanh(x), (2, 2))
        x = nn.Conv(32, (4, 4), strides=2, padding="VALID")(x)
        x = nn.max_pool(jnp.tanh(x), (2, 2))
        x = jnp.tanh(nn.Dense(32)(x.reshape(-1)))
        return nn.Dense(self.num_classes)(x)


class TanhMLP(nn.Module):
    """One hidden layer of 64 tanh units, for images too small to convolve."""

    num_classes: int

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Dense(64)(image.reshape(-1)))
        return nn.Dense(self.num_classes)(x)


class Linear(nn.Module):
    """Logistic regression."""

    num_classes: int

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes)(image.reshape(-1))


def char_lstm(num_classes: int) -> Model:
    """Characters → embedding → one LSTM layer → its last state → logits.

    Its sizes are those of Opacus's example of the same name: a table of 64 features, a state of
    128. Character id 0 is padding.
    """
    embed = jaxdp_nn.embedding(names.VOCABULARY, 64, padding_idx=0)
    lstm, head = jaxdp_nn.lstm(64, 128), jaxdp_nn.linear(128, num_classes)
    parts = {"embed": embed, "lstm": lstm, "head": head}

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(parts))
        return {name: part.init(own) for (name, part), own in zip(parts.items(), keys, strict=True)}

    def apply(params: Any, text: jax.Array) -> jax.Array:
        embedded = embed.apply(params["embed"], text)
        _, (state, _) = lstm.apply(params["lstm"], embedded, mask=text > 0)
        return head.apply(params["head"], state[0])

    return Model(init, apply)


def lipschitz_mlp(shape: Sequence[int], num_classes: int) -> Model:
    """An image less its mean, cut to norm one → 128 features, sorted in pairs → logits.

    Both layers are orthogonal, so that nothing becomes longer on the way up or down, and the
    gradient of each layer is at most √2 long, whatever the image. Logits are at most one long: a
    temperature lets their softmax tell classes apart.

    Source: Béthune et al. 2023, "DP-SGD Without Clipping: The Lipschitz Neural Network Way".
    """
    prepared = jaxdp_nn.sequential(
        lambda image: image - jnp.mean(image), lipschitz.bounded_input(1.0), jaxdp_nn.flatten()
    )
    layers = jaxdp_nn.sequential(
        prepared,
        lipschitz.linear(math.prod(shape), 128),
        lipschitz.group_sort(),
        lipschitz.linear(128, num_classes),
    )
    return Model(layers.init, layers.apply, layers.project, temperature=30.0)


_MODULES = {"tanh-cnn": TanhCNN, "tanh-mlp": TanhMLP, "linear": Linear}
LIPSCHITZ_MODELS, TEXT_MODELS = ("lipschitz-mlp",), ("char-lstm",)
IMAGE_MODELS = (*_MODULES, *LIPSCHITZ_MODELS)
MODEL_NAMES = IMAGE_MODELS + TEXT_MODELS


def build(name: str, shape: Sequence[int], num_classes: int) -> Model:
    """The model of that name.

    Args:
      name: one of `MODEL_NAMES`.
      shape: of one example: (H, W, C) of images, of which "tanh-cnn" needs H and W of at least 16;
        (T,) of texts for "char-lstm".
      num_classes: number of logits.

    Raises:
      ValueError: unknown name; an image too small for the convolutions; images for a text model,
        or the other way round.

    Example:
      >>> import jax
      >>> model = build("tanh-cnn", (28, 28, 1), 10)
      >>> params = model.init(jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      26010
      >>> model.apply(params, jax.numpy.zeros((28, 28, 1))).shape
      (10,)
    """
    check_choice("model", name, MODEL_NAMES)
    wanted, rank = ("texts", 1) if name in TEXT_MODELS else ("images", 3)
    if len(shape) != rank:
        raise ValueError(
            f"model {name} must get {wanted}, examples with {rank} axes, got {tuple(shape)}. "
            "Choose another model or other data."
        )
    if name in TEXT_MODELS:
        return char_lstm(num_classes)
    if name == "lipschitz-mlp":
        return lipschitz_mlp(shape, num_classes)
    if name == "tanh-cnn" and min(shape[:2]) < 16:
        raise ValueError(
            f"model tanh-cnn must get images of at least 16x16, got {tuple(shape)}. Use tanh-mlp."
        )
    module = _MODULES[name](num_classes)
    return Model(
        init=lambda key: module.init(key, jnp.zeros(tuple(shape)))["params"],
        apply=lambda params, image: module.apply({"params": params}, image),
    )
