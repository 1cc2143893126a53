"""Normalisation within one example."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp.checks import check_real, check_sequence, check_sizes
from jaxdp.nn.layer import (
    Layer,
    Params,
    TorchName,
    TorchNames,
    add_bias,
    along_last,
    at_least_float32,
    check_input,
    deterministic,
)


def layer_norm(
    normalized_shape: int | Sequence[int],
    *,
    eps: float = 1e-5,
    elementwise_affine: bool = True,
    bias: bool = True,
) -> Layer:
    """y = (x - mean) / √(variance + eps) ⊙ scale + bias, over the last axes.

    Args:
      normalized_shape: lengths of the last axes of x; mean and (biased) variance are over these.
      eps: at least 0.
      elementwise_affine: whether there are a scale and a bias.
      bias: whether there is a bias beside the scale.

    Returns:
      A layer of `[..., *normalized_shape]`, shape kept. Parameters: scale (ones) and bias
      (zeros), `[*normalized_shape]`.

    Raises:
      ValueError: a size below 1; an eps below 0; an input whose last axes are others.

    Example:
      >>> layer = layer_norm(4)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.arange(4.0)).mean().item()
      0.0

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization".
    """
    shape = _shape(normalized_shape)
    _check_eps(eps)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        _check_last("layer_norm", x, shape)
        centred, inverse = _moments(x, _last(shape), eps)
        return add_bias(params, _scaled(params, (centred * inverse).astype(x.dtype)))

    return _normalization(apply, shape, elementwise_affine, elementwise_affine and bias)


def rms_norm(
    normalized_shape: int | Sequence[int],
    *,
    eps: float | None = None,
    elementwise_affine: bool = True,
) -> Layer:
    """y = x / √(mean of x² + eps) ⊙ scale, over the last axes.

    Args:
      normalized_shape: lengths of the last axes of x.
      eps: at least 0; None for the machine epsilon of float32 (of x, if that is wider). With 0, a
        row of zeros has no gradient: it is NaN.
      elementwise_affine: whether there is a scale.

    Returns:
      A layer of `[..., *normalized_shape]`, shape kept. Parameters: scale (ones)
      `[*normalized_shape]`.

    Raises:
      ValueError: as `layer_norm`.

    Example:
      >>> layer = rms_norm(2)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.array([2.0, -2.0])).tolist()
      [1.0, -1.0]

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    shape = _shape(normalized_shape)
    _check_eps(0.0 if eps is None else eps)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        _check_last("rms_norm", x, shape)
        wide = at_least_float32(x)
        floor = jnp.finfo(wide.dtype).eps if eps is None else eps
        square = jnp.mean(jnp.square(wide), axis=_last(shape), keepdims=True)
        return _scaled(params, (wide * lax.rsqrt(square + floor)).astype(x.dtype))

    return _normalization(apply, shape, elementwise_affine, False)


def group_norm(
    num_groups: int, num_channels: int, *, eps: float = 1e-5, affine: bool = True
) -> Layer:
    """y = (x - mean) / √(variance + eps) ⊙ scale + bias, per group of channels.

    Args:
      num_groups: mean and variance are taken over all positions and the channels of one group.
      num_channels: length of the last axis of x.
      eps: at least 0.
      affine: whether there are a scale and a bias for each channel.

    Returns:
      A layer of `[..., num_channels]`, shape kept. Parameters: scale (ones) and bias (zeros)
      `[num_channels]`.

    Raises:
      ValueError: a size below 1; channels that groups do not divide; an input of other channels.

    Example:
      >>> layer = group_norm(2, 4)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((5, 5, 4))).shape
      (5, 5, 4)

    Source: Wu and He 2018, "Group Normalization".
    """
    check_sizes(num_groups=num_groups, num_channels=num_channels)
    _check_eps(eps)
    if num_channels % num_groups:
        raise ValueError(
            f"num_channels must be a multiple of num_groups={num_groups}, got {num_channels}. "
            "Each group takes an equal part of the channels."
        )

    def apply(params: Params, x: jax.Array) -> jax.Array:
        check_input("group_norm", x, last=num_channels)
        channels = (num_groups, num_channels // num_groups)
        grouped = x.reshape(*x.shape[:-1], *channels)
        axes = (*range(x.ndim - 1), x.ndim)
        return add_bias(params, _per_channel(params, grouped, channels, axes, eps).reshape(x.shape))

    return _normalization(apply, (num_channels,), affine, affine)


def instance_norm(num_features: int, *, eps: float = 1e-5, affine: bool = False) -> Layer:
    """y = (x - mean) / √(variance + eps), per channel, over the positions of one example.

    This is torch's InstanceNorm1d to 3d without running statistics, which samples would share.

    Args:
      num_features: length of the last axis of x.
      eps: at least 0.
      affine: whether a scale and a bias for each channel follow.

    Returns:
      A layer of `[..., num_features]` with two axes at least, shape kept. Parameters: scale
      (ones) and bias (zeros) `[num_features]` if affine.

    Raises:
      ValueError: a size below 1; an input of other channels, or of a single position.

    Example:
      >>> layer = instance_norm(3)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((5, 5, 3))).shape
      (5, 5, 3)

    Source: Ulyanov, Vedaldi and Lempitsky 2016, "Instance Normalization".
    """
    check_sizes(num_features=num_features)
    _check_eps(eps)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        check_input("instance_norm", x, last=num_features)
        if math.prod(x.shape[:-1]) == 1:
            raise ValueError(
                f"instance_norm needs more than one position, got shape {tuple(x.shape)}. With one "
                "the result is zero whatever the input."
            )
        positions = tuple(range(x.ndim - 1))
        return add_bias(params, _per_channel(params, x, (num_features,), positions, eps))

    return _normalization(apply, (num_features,), affine, affine)


def batch_norm(*args: object, **kwargs: object) -> NoReturn:
    """Always an error: batch statistics cannot be private.

    Args:
      *args, **kwargs: those of any batch normalisation.

    Returns:
      Nothing: it always raises.

    Raises:
      ValueError: says what to use in its place.

    Example:
      >>> batch_norm(16)
      Traceback (most recent call last):
      ValueError: batch_norm normalises a sample by others, which no clip can undo, ...
    """
    raise ValueError(
        "batch_norm normalises a sample by others, which no clip can undo, so it has no private "
        "form. Use nn.group_norm(32, channels), nn.instance_norm, nn.layer_norm or nn.rms_norm; "
        "for a trained model fold the running statistics into the layer before."
    )


def _shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    advice = "Pass the lengths of the last axes, or of the last one."
    several = isinstance(normalized_shape, Sequence) or np.ndim(normalized_shape) > 0
    shape: tuple[Any, ...] = (normalized_shape,)
    if several:
        shape = check_sequence("normalized_shape", normalized_shape, minimum=1, advice=advice)
    for size in shape:
        check_sizes(normalized_shape=size)
    return shape


def _check_eps(eps: float) -> None:
    check_real("eps", eps, minimum=0, advice="It keeps a division from failing: 1e-5 is usual.")


def _last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def _check_last(layer: str, x: jax.Array, shape: tuple[int, ...]) -> None:
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{layer} takes inputs whose last axes are {shape}, got {x.shape}. Build the layer "
            "with the sizes of its input."
        )


def _moments(x: jax.Array, axes: tuple[int, ...], eps: float) -> tuple[jax.Array, jax.Array]:
    """x minus its mean, and the inverse of its standard deviation. Both are in float32 at least,
    where squares neither overflow nor lose small differences."""
    x = at_least_float32(x)
    centred = x - jnp.mean(x, axis=axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=axes, keepdims=True)
    return centred, lax.rsqrt(variance + eps)


def _per_channel(
    params: Params, x: jax.Array, channels: tuple[int, ...], axes: tuple[int, ...], eps: float
) -> jax.Array:
    """x `[*positions, *channels]`, standardised over some axes and scaled."""
    centred, inverse = _moments(x, axes, eps)
    if "scale" in params:
        # The two small factors first: that saves a pass over the activation in both directions.
        scale = params["scale"].reshape(channels).astype(inverse.dtype)
        inverse = inverse * along_last(scale, x)
    return (centred * inverse).astype(x.dtype)


def _scaled(params: Params, x: jax.Array) -> jax.Array:
    return x * along_last(params["scale"], x) if "scale" in params else x


def _normalization(apply, shape: tuple[int, ...], scale: bool, bias: bool) -> Layer:
    def init(key: jax.Array) -> Params:
        params = {"scale": jnp.ones(shape)} if scale else {}
        return params | ({"bias": jnp.zeros(shape)} if bias else {})

    names: TorchNames = {("scale",): (TorchName("weight"),)} if scale else {}
    return deterministic(
        init, apply, {**names, **({("bias",): (TorchName("bias"),)} if bias else {})}
    )
