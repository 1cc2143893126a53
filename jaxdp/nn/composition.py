"""Layers made of layers and of functions."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp.checks import check_callable, check_flags, check_rate, shown
from jaxdp.nn.layer import Layer, Params, below, drop, split_key

# A function of one array counts as a layer without parameters.
LayerLike = Layer | Callable[[Any], Any]


def sequential(*layers: LayerLike, **named: LayerLike) -> Layer:
    """One layer after the other.

    Args:
      *layers: layers, or functions of one array (`jax.nn.relu`); their parameters are called "0",
        "1", ..., as in torch.nn.Sequential.
      **named: more layers, each under the name of its parameters.

    Returns:
      A layer from the input of the first to the output of the last. Parameters: one dict for each
      layer that has any. A key is split, one for each layer.

    Raises:
      TypeError: something that is neither a layer nor a function.

    Example:
      >>> from jaxdp import nn
      >>> model = nn.sequential(nn.linear(8, 4), nn.tanh, nn.dropout(0.5), nn.linear(4, 2))
      >>> params = model.init(jax.random.key(0))
      >>> sorted(params)
      ['0', '3']
      >>> model.apply(params, jnp.ones(8), key=jax.random.key(1)).shape
      (2,)
    """
    return combined({**{str(k): layer for k, layer in enumerate(layers)}, **named}, _chained)


def residual(layer: LayerLike, shortcut: LayerLike = lambda x: x) -> Layer:
    """y = layer(x) + shortcut(x).

    Args:
      layer: the branch.
      shortcut: the other branch, for a layer that changes the shape; by default x itself.

    Returns:
      A layer. Parameters: "layer" and "shortcut", as far as they have any.

    Raises:
      TypeError: as `sequential`.

    Example:
      >>> from jaxdp import nn
      >>> block = nn.residual(nn.sequential(nn.linear(4, 4), nn.tanh))
      >>> block.apply(block.init(jax.random.key(0)), jnp.ones(4)).shape
      (4,)

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition".
    """
    return combined({"layer": layer, "shortcut": shortcut}, _added)


def function(fun: Callable[[Any], Any]) -> Layer:
    """A layer without parameters.

    Args:
      fun: a function of the output of the layer before, an array or any pytree.

    Returns:
      A layer.

    Raises:
      TypeError: `fun` cannot be called.

    Example:
      >>> last_state = function(lambda result: result[0][-1])
      >>> last_state.apply({}, (jnp.arange(3.0), None)).item()
      2.0
    """
    check_callable("fun", fun, advice="Pass a function of the output of the layer before.")
    return Layer(lambda key: {}, lambda params, x, *, key=None: fun(x))


def dropout(rate: float) -> Layer:
    """Replaces each entry by zero with probability `rate`, and divides the others by 1 - rate.

    In training, give every sample a key of its own: `example = (x, y, key)`.

    Args:
      rate: in [0, 1].

    Returns:
      A layer, shape kept, without parameters. Without a key it does nothing.

    Raises:
      ValueError: another rate.

    Example:
      >>> layer = dropout(0.5)
      >>> layer.apply({}, jnp.ones(4)).tolist()
      [1.0, 1.0, 1.0, 1.0]
      >>> sorted(set(layer.apply({}, jnp.ones(99), key=jax.random.key(0)).tolist()))
      [0.0, 2.0]

    Source: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting".
    """
    check_rate("rate", rate)
    return Layer(lambda key: {}, lambda params, x, *, key=None: drop(x, rate, key))


def flatten(*, channels_first: bool = False) -> Layer:
    """Flattens all axes into one.

    Args:
      channels_first: whether channels become the slowest axis. A linear layer that was trained in
        torch behind a Flatten of `[C, H, W]` expects that order.

    Returns:
      A layer of `[..., C] -> [n]`, without parameters.

    Raises:
      TypeError: `channels_first` is no bool.

    Example:
      >>> flatten(channels_first=True).apply({}, jnp.array([[1, 2], [3, 4]])).tolist()
      [1, 3, 2, 4]
    """
    check_flags(channels_first=channels_first)
    return function(lambda x: (jnp.moveaxis(x, -1, 0) if channels_first else x).reshape(-1))


def as_layer(layer: LayerLike) -> Layer:
    """A layer as it is, or a function as a layer.

    Raises:
      TypeError: neither.
    """
    if isinstance(layer, Layer):
        return layer
    if not callable(layer):
        raise TypeError(
            f"layer must be a jaxdp.nn.Layer or a function, got {shown(layer)}. Call the factory "
            "of the layer, or wrap what it does in a function."
        )
    return function(layer)


def combined(given: Mapping[str, LayerLike], combine: Callable[[list[Any], Any], Any]) -> Layer:
    """A layer of named parts; `combine(parts as functions of x, x)` is its result."""
    parts = {name: as_layer(layer) for name, layer in given.items()}

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(parts))
        params = {
            name: layer.init(own) for (name, layer), own in zip(parts.items(), keys, strict=True)
        }
        return {name: own for name, own in params.items() if own}

    def apply(params: Params, x: Any, *, key: jax.Array | None = None) -> Any:
        def bound(name: str, layer: Layer, own: jax.Array | None) -> Callable[[Any], Any]:
            return lambda x: layer.apply(params.get(name, {}), x, key=own)

        keys = split_key(key, len(parts))
        functions = [bound(*item, own) for item, own in zip(parts.items(), keys, strict=True)]
        return combine(functions, x)

    def project(params: Params) -> Params:
        return {name: parts[name].project(own) for name, own in params.items()}

    names: dict[tuple[str, ...], Any] = {}
    for name, layer in parts.items():
        names |= below(name, layer.torch_names)
    return Layer(init, apply, names, project)


def _chained(functions: list[Callable[[Any], Any]], x: Any) -> Any:
    for each in functions:
        x = each(x)
    return x


def _added(functions: list[Callable[[Any], Any]], x: Any) -> Any:
    branch, shortcut = (each(x) for each in functions)
    return branch + shortcut
