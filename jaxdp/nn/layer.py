"""The type of a layer, and the functions that all layers share."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]


class TorchName(NamedTuple):
    """Where a parameter lies in a torch `state_dict`.

    Attributes:
      name: its key there.
      convert: turns the array found there into the parameter.

    Example:
      >>> from jaxdp import nn
      >>> nn.linear(3, 2).torch_names["kernel",][0].name
      'weight'
    """

    name: str
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray


# Maps the path of a parameter to the names that it may have; the first one found counts.
TorchNames = Mapping[tuple[str, ...], Sequence[TorchName]]


def _unconstrained(params: Params) -> Params:
    return params


class Layer(NamedTuple):
    """A pair of pure functions of ONE example: no shape has a batch axis, `jax.vmap` adds it.

    Attributes:
      init: `key -> params`, a dict of arrays or of such dicts; empty without parameters.
      apply: `(params, x, *, key=None) -> y`. A key turns dropout on; without one the layer is
        deterministic. Some layers take more arguments; their factories say which.
      torch_names: where `from_torch_state_dict` finds the parameters.
      project: `params -> params`, the nearest parameters that the layer allows; most layers allow
        all. Layers with a Lipschitz constant (`jaxdp.lipschitz`) need it after every update.

    Example:
      >>> import jax
      >>> from jaxdp import nn
      >>> layer = nn.linear(3, 2)
      >>> params = layer.init(jax.random.key(0))
      >>> jax.tree.map(jax.numpy.shape, params)
      {'bias': (2,), 'kernel': (3, 2)}
      >>> layer.apply(params, jax.numpy.ones(3)).shape
      (2,)
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]
    torch_names: TorchNames = {}
    project: Callable[[Params], Params] = _unconstrained


def deterministic(
    init: Callable[[jax.Array], Params],
    apply: Callable[[Params, jax.Array], jax.Array],
    torch_names: TorchNames,
) -> Layer:
    """A layer that needs no key."""
    return Layer(init, lambda params, x, *, key=None: apply(params, x), torch_names)


def kernel_from_torch(weight: np.ndarray) -> np.ndarray:
    """`[out, in, *window] -> [*window, in, out]`."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def below(name: str, names: TorchNames) -> dict[tuple[str, ...], tuple[TorchName, ...]]:
    """The torch names of a layer that is the part `name` of another layer."""
    return {
        (name, *path): tuple(each._replace(name=f"{name}.{each.name}") for each in found)
        for path, found in names.items()
    }


def uniform(key: jax.Array, shape: Sequence[int], bound: float) -> jax.Array:
    """Draws from U(-bound, bound)."""
    return jax.random.uniform(key, tuple(shape), minval=-bound, maxval=bound)


def kernel_and_bias(
    key: jax.Array, kernel: Sequence[int], fan_in: int, bias: bool, bias_size: int | None = None
) -> Params:
    """Draws from U(±1/√fan_in), with which torch starts linear and convolution layers."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    for_kernel, for_bias = jax.random.split(key)
    params = {"kernel": uniform(for_kernel, kernel, bound)}
    if bias:
        params["bias"] = uniform(for_bias, (bias_size or kernel[-1],), bound)
    return params


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """The vector, or array, with leading axes of one so that it meets the last axes of x."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


def add_bias(params: Params, x: jax.Array) -> jax.Array:
    """x plus the bias along its last axis, if the layer has one."""
    return x + along_last(params["bias"], x) if "bias" in params else x


def affine(params: Params, x: jax.Array) -> jax.Array:
    """x times the kernel along its last axis, plus the bias if there is one."""
    return add_bias(params, x @ params["kernel"])


def check_input(layer: str, x: jax.Array, *, last: int, rank: int | None = None) -> None:
    """Raises unless x has `last` features in its last axis, and rank axes in all."""
    if x.ndim == 0 or x.shape[-1] != last or (rank is not None and x.ndim != rank):
        axes = "..." if rank is None else ", ".join("_" * (rank - 1))
        wanted = f"[{axes}, {last}]" if axes else f"[{last}]"
        raise ValueError(
            f"{layer} takes one example of shape {wanted}, without a batch axis, got "
            f"{tuple(x.shape)}. Channels come last, and jax.vmap adds the batch."
        )


def check_output(layer: str, x: jax.Array, y: jax.Array) -> None:
    """Raises if windows do not fit into x anywhere, so that y is empty."""
    if y.size == 0 and x.size > 0:
        raise ValueError(
            f"the window of {layer} must be at most as large as the input, padding included, got "
            f"an input of shape {tuple(x.shape)}, which leaves an output of {tuple(y.shape)}. Take "
            "a smaller window, or more padding."
        )


def at_least_float32(x: jax.Array) -> jax.Array:
    """x, converted to float32 if it is in half precision."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def split_key(key: jax.Array | None, count: int) -> Sequence[jax.Array | None]:
    """One key for each of `count` parts, or None for each."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with each entry zero with probability `rate`, the others divided by 1 - rate."""
    if key is None or rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))
