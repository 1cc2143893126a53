"""Recurrent layers: LSTM, GRU and the simple RNN, stacked and in one or two directions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp.checks import check_choice, check_flags, check_integer, check_rate, check_sizes
from jaxdp.nn.layer import (
    Layer,
    Params,
    TorchName,
    TorchNames,
    check_input,
    drop,
    kernel_from_torch,
    split_key,
    uniform,
)
from jaxdp.varying import vary, varying_axes

_MOST_LAYERS = 1000


def lstm(
    input_size: int,
    hidden_size: int,
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    bidirectional: bool = False,
) -> Layer:
    r"""Long short-term memory over one sequence.

    $$ (i, f, g, o) = x_t W + b + h_{t-1} R + r $$
    $$ c_t = \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g), \qquad
       h_t = \sigma(o) \odot \tanh(c_t) $$

    Args:
      input_size: D, features of the input.
      hidden_size: H, features of the state.
      num_layers: L; each layer reads the outputs of the one before.
      bias: whether there are b and r.
      dropout: rate on the outputs of each layer but the last, drawn anew for every step. It is
        active while `apply` is given a key.
      bidirectional: a second set of parameters reads backwards; then Q = 2 directions, else 1.

    Returns:
      A layer with `apply(params, x, state=None, *, mask=None, key=None)`. x is `[T, D]`; state is
      (h, c), each `[L·Q, H]`, forwards before backwards in each layer, zeros by default. The
      result is (outputs `[T, Q·H]`, (h, c) after the last step of each direction). `mask` is bool
      `[T]`: steps under False are skipped, so that padding changes nothing, and their outputs are
      zero. For a batch along another axis, say time first, use `jax.vmap` with that axis.

      Parameters: for layer k `"lk"` and, backwards, `"lk_reverse"`, with "input" (kernel
      `[D, 4H]`, bias) and "recurrent" (kernel `[H, 4H]`, bias) each, of U(±1/√H).

    Raises:
      ValueError: a size below 1; a dropout outside of [0, 1]; an input, state or mask of another
        shape.
      TypeError: a mask that is not boolean.

    Example:
      >>> layer = lstm(3, 5, num_layers=2, bidirectional=True)
      >>> params = layer.init(jax.random.key(0))
      >>> outputs, (h, c) = layer.apply(params, jnp.ones((7, 3)), mask=jnp.arange(7) < 4)
      >>> outputs.shape, h.shape, c.shape
      ((7, 10), (4, 5), (4, 5))

    Source: Hochreiter and Schmidhuber 1997, "Long Short-Term Memory"; gates as in torch.nn.LSTM.
    """
    cell = _Cell("lstm", gates=4, states=2, step=_lstm_step, adds=True)
    return _recurrent(cell, input_size, hidden_size, num_layers, bias, dropout, bidirectional)


def gru(
    input_size: int,
    hidden_size: int,
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    bidirectional: bool = False,
) -> Layer:
    r"""Gated recurrent units over one sequence.

    $$ r = \sigma(x_t W_r + b_r + h_{t-1} R_r + s_r), \qquad
       z = \sigma(x_t W_z + b_z + h_{t-1} R_z + s_z) $$
    $$ n = \tanh(x_t W_n + b_n + r \odot (h_{t-1} R_n + s_n)), \qquad
       h_t = (1 - z) \odot n + z \odot h_{t-1} $$

    Args:
      input_size, hidden_size, num_layers, bias, dropout, bidirectional: as for `lstm`.

    Returns:
      A layer as `lstm`, with a state h `[L·Q, H]` and kernels of 3H columns, in the order r, z, n.

    Raises:
      ValueError, TypeError: as `lstm`.

    Example:
      >>> layer = gru(3, 5)
      >>> outputs, h = layer.apply(layer.init(jax.random.key(0)), jnp.ones((7, 3)))
      >>> outputs.shape, h.shape
      ((7, 5), (1, 5))

    Source: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder"; the
    reset gate acts behind the product, as in torch.nn.GRU.
    """
    cell = _Cell("gru", gates=3, states=1, step=_gru_step, adds=False)
    return _recurrent(cell, input_size, hidden_size, num_layers, bias, dropout, bidirectional)


def rnn(
    input_size: int,
    hidden_size: int,
    *,
    num_layers: int = 1,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
    bias: bool = True,
    dropout: float = 0.0,
    bidirectional: bool = False,
) -> Layer:
    """The simple recurrent network of Elman, h_t = tanh(x_t W + b + h_{t-1} R + r).

    Args:
      nonlinearity: "tanh" or "relu".
      input_size, hidden_size, num_layers, bias, dropout, bidirectional: as for `lstm`.

    Returns:
      A layer as `lstm`, with a state h `[L·Q, H]` and kernels of H columns.

    Raises:
      ValueError, TypeError: as `lstm`; another nonlinearity.

    Example:
      >>> layer = rnn(3, 5, nonlinearity="relu")
      >>> outputs, h = layer.apply(layer.init(jax.random.key(0)), jnp.ones((7, 3)))
      >>> outputs.shape, h.shape
      ((7, 5), (1, 5))

    Source: Elman 1990, "Finding Structure in Time".
    """
    functions = {"tanh": jnp.tanh, "relu": jax.nn.relu}
    check_choice("nonlinearity", nonlinearity, functions)
    activation = functions[nonlinearity]

    def step(state: State, projected: jax.Array, product: jax.Array) -> State:
        return (activation(projected + product),)

    cell = _Cell("rnn", gates=1, states=1, step=step, adds=True)
    return _recurrent(cell, input_size, hidden_size, num_layers, bias, dropout, bidirectional)


# The output comes first: (h, c) for an LSTM, (h,) for the others.
State = tuple[jax.Array, ...]


class _Cell(NamedTuple):
    """One step of a recurrent layer.

    Attributes:
      name: name of the layer, for messages.
      gates: columns of the kernels, in units of H.
      states: number of arrays that are carried.
      step: `(state, x_t W + b, h_{t-1} R + r) -> state`.
      adds: whether the step only adds the two, so that b + r may be added once.
    """

    name: str
    gates: int
    states: int
    step: Callable[[State, jax.Array, jax.Array], State]
    adds: bool


def _lstm_step(state: State, projected: jax.Array, product: jax.Array) -> State:
    _, c = state
    i, f, g, o = jnp.split(projected + product, 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru_step(state: State, projected: jax.Array, product: jax.Array) -> State:
    (h,) = state
    (r_in, z_in, n_in), (r, z, n) = jnp.split(projected, 3), jnp.split(product, 3)
    update = jax.nn.sigmoid(z_in + z)
    candidate = jnp.tanh(n_in + jax.nn.sigmoid(r_in + r) * n)
    return ((1 - update) * candidate + update * h,)


def _recurrent(
    cell: _Cell,
    input_size: int,
    hidden_size: int,
    num_layers: int,
    bias: bool,
    dropout: float,
    bidirectional: bool,
) -> Layer:
    check_sizes(input_size=input_size, hidden_size=hidden_size)
    advice = "Each layer is compiled on its own."
    check_integer("num_layers", num_layers, minimum=1, maximum=_MOST_LAYERS, advice=advice)
    check_rate("dropout", dropout)
    check_flags(bias=bias, bidirectional=bidirectional)
    directions = ("", "_reverse") if bidirectional else ("",)
    columns = cell.gates * hidden_size

    def init(key: jax.Array) -> Params:
        params: Params = {}
        for layer in range(num_layers):
            width = input_size if layer == 0 else len(directions) * hidden_size
            for direction in directions:
                key, *keys = jax.random.split(key, 5)
                cell_params = _cell_params(keys, width, hidden_size, columns, bias)
                params[f"l{layer}{direction}"] = cell_params
        return params

    def apply(
        params: Params,
        x: jax.Array,
        state: Any = None,
        *,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        check_input(cell.name, x, last=input_size, rank=2)
        dtype = jnp.result_type(x, params["l0"]["recurrent"]["kernel"])
        start = _start(cell, state, (num_layers * len(directions), hidden_size), dtype)
        # Inside `shard_map` the carry must vary over devices from the first step on.
        start = vary(start, varying_axes((x, params, start)))
        _check_mask(mask, len(x))
        keys = split_key(key, num_layers)
        ends = []
        for layer in range(num_layers):
            outputs = []
            for direction in directions:
                own = params[f"l{layer}{direction}"]
                begin = tuple(array[len(ends)] for array in start)
                end, y = _run(cell, own, x, begin, mask, reverse=direction != "")
                ends.append(end)
                outputs.append(y)
            x = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
            if layer < num_layers - 1:
                x = drop(x, dropout, keys[layer])
        final = tuple(jnp.stack(arrays) for arrays in zip(*ends, strict=True))
        return x, final if cell.states > 1 else final[0]

    return Layer(init, apply, _torch_names(num_layers, directions, bias))


def _cell_params(
    keys: Sequence[jax.Array], width: int, hidden_size: int, columns: int, bias: bool
) -> Params:
    """Parameters of one layer in one direction, from U(±1/√hidden_size)."""
    bound = 1 / math.sqrt(hidden_size)
    params = {
        "input": {"kernel": uniform(keys[0], (width, columns), bound)},
        "recurrent": {"kernel": uniform(keys[1], (hidden_size, columns), bound)},
    }
    if bias:
        params["input"]["bias"] = uniform(keys[2], (columns,), bound)
        params["recurrent"]["bias"] = uniform(keys[3], (columns,), bound)
    return params


def _run(
    cell: _Cell,
    params: Params,
    x: jax.Array,
    start: State,
    mask: jax.Array | None,
    reverse: bool,
) -> tuple[State, jax.Array]:
    """One layer in one direction: the last state, and the outputs `[T, H]`."""
    inputs, recurrent = (params[part]["kernel"] for part in ("input", "recurrent"))
    b, r = (params[part].get("bias") for part in ("input", "recurrent"))
    if cell.adds and b is not None:
        b, r = b + r, None
    if mask is not None:  # whatever padding holds, NaN included
        x = jnp.where(mask[:, None], x, jnp.zeros_like(x))

    # Both products are taken inside of the loop: for all steps at once, the first one would keep
    # `[T, gates · H]` twice, which costs more than it saves.
    def step(state: State, now: tuple[jax.Array, jax.Array | None]) -> tuple[State, jax.Array]:
        x, valid = now
        projected, product = x @ inputs, state[0] @ recurrent
        new = cell.step(
            state,
            projected if b is None else projected + b,
            product if r is None else product + r,
        )
        if valid is None:
            return new, new[0]
        kept = tuple(jnp.where(valid, *pair) for pair in zip(new, state, strict=True))
        return kept, jnp.where(valid, new[0], jnp.zeros_like(new[0]))

    return lax.scan(step, start, (x, mask), reverse=reverse)


def _start(cell: _Cell, state: Any, shape: tuple[int, int], dtype: Any) -> State:
    """The given state as a tuple, or zeros."""
    if state is None:
        return (jnp.zeros(shape, dtype),) * cell.states
    given = tuple(state) if cell.states > 1 else (state,)
    shapes = [jnp.shape(array) for array in given]
    if shapes != [shape] * cell.states:
        raise ValueError(
            f"{cell.name} takes an initial state of {cell.states} array(s) of shape {shape}, got "
            f"{shapes}. Its axes are layers times directions, then features."
        )
    return given


def _check_mask(mask: jax.Array | None, steps: int) -> None:
    if mask is None:
        return
    if mask.dtype != bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}. Use jnp.arange(T) < length.")
    if mask.shape != (steps,):
        raise ValueError(f"mask must have shape ({steps},), one for each step, got {mask.shape}.")


def _torch_names(num_layers: int, directions: tuple[str, ...], bias: bool) -> TorchNames:
    """The names of torch, and those of the linear layers in Opacus's cells."""
    names: dict[tuple[str, ...], tuple[TorchName, ...]] = {}
    for layer in range(num_layers):
        for direction in directions:
            at = f"l{layer}{direction}"
            for part, short in (("input", "ih"), ("recurrent", "hh")):
                names[at, part, "kernel"] = (
                    TorchName(f"weight_{short}_{at}", kernel_from_torch),
                    TorchName(f"{at}.{short}.weight", kernel_from_torch),
                )
                if bias:
                    names[at, part, "bias"] = (
                        TorchName(f"bias_{short}_{at}"),
                        TorchName(f"{at}.{short}.bias"),
                    )
    return names
