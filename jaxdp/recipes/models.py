"""Small models for the command line and the benchmarks, in flax; one image in, logits out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Model(NamedTuple):
    """A pair of pure functions.

    Attributes:
      init: `key -> params`.
      apply: `(params, image [H, W, C]) -> logits [num_classes]`, of one example.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


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


_MODELS = {"tanh-cnn": TanhCNN, "tanh-mlp": TanhMLP, "linear": Linear}
MODEL_NAMES = tuple(_MODELS)


def build(name: str, image_shape: Sequence[int], num_classes: int) -> Model:
    """The model of that name.

    Args:
      name: one of `MODEL_NAMES`.
      image_shape: (H, W, C); "tanh-cnn" needs H and W of at least 16.
      num_classes: number of logits.

    Raises:
      ValueError: unknown name; an image too small for the convolutions.

    Example:
      >>> import jax
      >>> model = build("tanh-cnn", (28, 28, 1), 10)
      >>> params = model.init(jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      26010
      >>> model.apply(params, jax.numpy.zeros((28, 28, 1))).shape
      (10,)
    """
    if name not in _MODELS:
        raise ValueError(f"model must be one of {', '.join(MODEL_NAMES)}, got {name!r}")
    if name == "tanh-cnn" and min(image_shape[:2]) < 16:
        raise ValueError(
            f"model tanh-cnn needs images of at least 16x16, got {tuple(image_shape)}: use tanh-mlp"
        )
    module = _MODELS[name](num_classes)
    return Model(
        init=lambda key: module.init(key, jnp.zeros(tuple(image_shape)))["params"],
        apply=lambda params, image: module.apply({"params": params}, image),
    )
