"""Attention, and the learned last position that it may attend to."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.checks import check_flags, check_rate, check_sizes
from jaxdp.nn.layer import (
    Layer,
    Params,
    TorchName,
    TorchNames,
    affine,
    check_input,
    deterministic,
    drop,
    kernel_from_torch,
    uniform,
)


def multi_head_attention(
    embed_dim: int,
    num_heads: int,
    *,
    dropout: float = 0.0,
    bias: bool = True,
    add_bias_kv: bool = False,
    add_zero_attn: bool = False,
    kdim: int | None = None,
    vdim: int | None = None,
) -> Layer:
    r"""Attention of every query to every key, in several heads.

    $$ y_t = b + \sum_h \Big(\sum_s \mathrm{softmax}_s\big(\tfrac{\langle q_{th}, k_{sh}\rangle}
       {\sqrt{d}}\big)\, v_{sh}\Big) O_h, \qquad d = \tfrac{\text{embed\_dim}}{\text{num\_heads}} $$

    where q, k and v are linear in queries, keys and values.

    Args:
      embed_dim: E, features of queries and outputs; a multiple of num_heads.
      num_heads: number of heads.
      dropout: rate on the softmax weights, active while `apply` is given a key.
      bias: whether the four projections have biases.
      add_bias_kv: appends a learned key and value (`sequence_bias`), which no mask hides.
      add_zero_attn: appends a key and value of zeros, which no mask hides.
      kdim, vdim: features of keys and values; None for embed_dim.

    Returns:
      A layer with `apply(params, queries, keys=None, values=None, *, mask=None, key_mask=None,
      is_causal=False, key=None)`: queries `[T, E]`, keys `[S, kdim]`, values `[S, vdim]`, to
      `[T, E]`. Keys default to the queries, values to the keys. True in a mask allows: `mask` is
      bool `[T, S]` or `[num_heads, T, S]`, `key_mask` bool `[S]` (False for padding), and
      `is_causal` lets position t attend to s ≤ t. A query that may attend to nothing gets zeros
      (and the output bias), where torch gives NaN.

      Parameters: "query", "key", "value" and "out" with kernel and bias each (xavier-uniform
      kernels, zero biases), "key_bias" and "value_bias" with add_bias_kv.

    Raises:
      ValueError: a size below 1; an embed_dim that num_heads does not divide; a dropout outside
        of [0, 1]; inputs or masks of other shapes.
      TypeError: a mask that is not boolean.

    Example:
      >>> layer = multi_head_attention(8, 2)
      >>> params = layer.init(jax.random.key(0))
      >>> layer.apply(params, jnp.ones((5, 8)), is_causal=True).shape
      (5, 8)

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """
    kdim = embed_dim if kdim is None else kdim
    vdim = embed_dim if vdim is None else vdim
    check_sizes(embed_dim=embed_dim, num_heads=num_heads, kdim=kdim, vdim=vdim)
    check_rate("dropout", dropout)
    check_flags(bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn)
    if embed_dim % num_heads:
        raise ValueError(
            f"embed_dim must be a multiple of num_heads={num_heads}, got {embed_dim}. Each head "
            "takes an equal part of it."
        )
    features = {"queries": embed_dim, "keys": kdim, "values": vdim}
    extra = sequence_bias(embed_dim)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 6)
        params = _projections([*keys[:4]], embed_dim, kdim, vdim, bias)
        if add_bias_kv:
            params["key_bias"], params["value_bias"] = extra.init(keys[4]), extra.init(keys[5])
        return params

    def apply(
        params: Params,
        queries: jax.Array,
        keys: jax.Array | None = None,
        values: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        key_mask: jax.Array | None = None,
        is_causal: bool = False,
        key: jax.Array | None = None,
    ) -> jax.Array:
        keys = queries if keys is None else keys
        values = keys if values is None else values
        _check_sequences({"queries": queries, "keys": keys, "values": values}, features)
        allowed = _allowed(len(queries), len(keys), num_heads, mask, key_mask, is_causal)
        q, k, v = (
            affine(params[name], x)
            for name, x in (("query", queries), ("key", keys), ("value", values))
        )
        if add_bias_kv:
            k, v = extra.apply(params["key_bias"], k), extra.apply(params["value_bias"], v)
        if add_zero_attn:
            k, v = (jnp.pad(x, ((0, 1), (0, 0))) for x in (k, v))
        q, k, v = (x.reshape(len(x), num_heads, -1) for x in (q, k, v))
        weights = drop(_attention_weights(q, k, allowed), dropout, key)
        mixed = jnp.einsum("hts,shd->thd", weights, v).reshape(len(q), embed_dim)
        return affine(params["out"], mixed)

    return Layer(init, apply, _torch_names(embed_dim, bias, add_bias_kv))


def _projections(
    keys: Sequence[jax.Array], embed_dim: int, kdim: int, vdim: int, bias: bool
) -> Params:
    """Kernel and bias of the three projections of the inputs, and of the one of the output."""
    inputs = {"query": embed_dim, "key": kdim, "value": vdim, "out": embed_dim}
    params: Params = {}
    # Torch draws three projections of one width as one matrix, with its fans.
    fans = 4 * embed_dim if kdim == vdim == embed_dim else None
    for (name, size), key in zip(inputs.items(), keys, strict=True):
        bound = math.sqrt(6 / (fans or size + embed_dim))
        if name == "out":
            bound = 1 / math.sqrt(embed_dim)
        params[name] = {"kernel": uniform(key, (size, embed_dim), bound)}
        if bias:
            params[name]["bias"] = jnp.zeros(embed_dim)
    return params


def _attention_weights(q: jax.Array, k: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """The softmax `[heads, T, S]` of scaled products of queries `[T, heads, d]` and keys
    `[S, heads, d]`. Every query may attend to keys behind the last one of the mask."""
    scores = jnp.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[2])
    if allowed is not None:
        added = k.shape[0] - allowed.shape[2]
        allowed = jnp.pad(allowed, ((0, 0), (0, 0), (0, added)), constant_values=True)
    return _softmax(scores, allowed)


def sequence_bias(embed_dim: int) -> Layer:
    """Appends a learned vector to a sequence, as Opacus's `SequenceBias`.

    Args:
      embed_dim: E, its length.

    Returns:
      A layer of `[T, E] -> [T + 1, E]`. Parameters: bias `[E]`, of N(0, 1/E) as the xavier-normal
      start of a row.

    Raises:
      ValueError: a size below 1; an input of another shape.

    Example:
      >>> layer = sequence_bias(4)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((3, 4))).shape
      (4, 4)
    """
    check_sizes(embed_dim=embed_dim)

    def init(key: jax.Array) -> Params:
        return {"bias": jax.random.normal(key, (embed_dim,)) / math.sqrt(embed_dim)}

    def apply(params: Params, x: jax.Array) -> jax.Array:
        check_input("sequence_bias", x, last=embed_dim, rank=2)
        return jnp.concatenate([x, params["bias"][None]])

    return deterministic(init, apply, {("bias",): (TorchName("bias", np.ravel),)})


def _check_sequences(given: dict[str, jax.Array], features: dict[str, int]) -> None:
    """Raises unless queries, keys and values have their features, and each key a value."""
    for name, x in given.items():
        check_input(f"multi_head_attention ({name})", x, last=features[name], rank=2)
    keys, values = len(given["keys"]), len(given["values"])
    if keys != values:
        raise ValueError(
            f"keys and values must be equally many, got {keys} and {values}. Pass one value for "
            "each key."
        )


def _allowed(
    queries: int,
    keys: int,
    heads: int,
    mask: jax.Array | None,
    key_mask: jax.Array | None,
    is_causal: bool,
) -> jax.Array | None:
    """All masks as one mask `[1 or heads, T, S]`; None without masks."""
    masks = []
    for name, given, shapes in (
        ("mask", mask, [(queries, keys), (heads, queries, keys)]),
        ("key_mask", key_mask, [(keys,)]),
    ):
        if given is None:
            continue
        if given.dtype != bool:
            raise TypeError(
                f"{name} must be boolean, True where allowed, got {given.dtype}. Pass mask == 0 "
                "for a mask that is added to the scores."
            )
        if given.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name} must have shape {wanted}, got {given.shape}. Leave out the batch axis."
            )
        masks.append(given.reshape((1,) * (3 - given.ndim) + given.shape))
    if is_causal:
        masks.append(jnp.tri(queries, keys, dtype=bool)[None])
    allowed = None
    for each in masks:
        allowed = each if allowed is None else allowed & each
    return None if allowed is None else jnp.broadcast_to(allowed, (len(allowed), queries, keys))


def _softmax(scores: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """The softmax over the last axis of `[heads, T, S]`; zeros where nothing is allowed."""
    if allowed is None:
        return jax.nn.softmax(scores)
    allowed = jnp.broadcast_to(allowed, scores.shape)
    lowest = jnp.full_like(scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(jnp.where(allowed, scores, lowest))
    return jnp.where(allowed, weights, jnp.zeros_like(weights))


def _torch_names(embed_dim: int, bias: bool, add_bias_kv: bool) -> TorchNames:
    """Torch packs three projections of one width into one matrix; Opacus keeps all apart."""
    names: dict[tuple[str, ...], tuple[TorchName, ...]] = {}
    for index, name in enumerate(("query", "key", "value")):
        rows = slice(index * embed_dim, (index + 1) * embed_dim)

        def packed(array: np.ndarray, rows: slice = rows) -> Any:
            return array[rows].T if array.ndim == 2 else array[rows]

        short = name[0]
        names[name, "kernel"] = (
            TorchName("in_proj_weight", packed),
            TorchName(f"{short}_proj_weight", kernel_from_torch),
            TorchName(f"{short}linear.weight", kernel_from_torch),
        )
        if bias:
            names[name, "bias"] = (
                TorchName("in_proj_bias", packed),
                TorchName(f"{short}linear.bias"),
            )
        if add_bias_kv and name != "query":
            names[f"{name}_bias", "bias"] = (
                TorchName(f"bias_{short}", np.ravel),
                TorchName(f"seq_bias_{short}.bias", np.ravel),
            )
    names["out", "kernel"] = (TorchName("out_proj.weight", kernel_from_torch),)
    if bias:
        names["out", "bias"] = (TorchName("out_proj.bias"),)
    return names
