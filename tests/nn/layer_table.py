"""Every layer on trial: what it is, what an example looks like, and a loss on its output."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import nn
from tests.oracle import Case
from tests.program_table import Integers, arrays

KEY = jax.random.key(0)


def applied(layer: nn.Layer, params: Any, example: Any) -> Any:
    return layer.apply(params, example)


def outputs(layer: nn.Layer, params: Any, example: Any) -> Any:
    """Of a recurrent layer."""
    return layer.apply(params, example)[0]


def states(layer: nn.Layer, params: Any, example: Any) -> Any:
    """Outputs and last states of a recurrent layer on an initial state and a length."""
    steps, state = len(example["x"]), example["state"]
    state = state if isinstance(state, jax.Array) else tuple(state)
    mask = jnp.arange(steps) < 2 + example["length"]
    y, end = layer.apply(params, example["x"], state, mask=mask)
    return jnp.concatenate([y.reshape(-1), *(part.reshape(-1) for part in jax.tree.leaves(end))])


def attended(layer: nn.Layer, params: Any, example: Any) -> Any:
    """Cross-attention with a mask for padding that leaves one sample nothing to attend to."""
    key_mask = jnp.arange(len(example["keys"])) < example["length"]
    return layer.apply(
        params, example["queries"], example["keys"], example["values"], key_mask=key_mask
    )


def dropped(layer: nn.Layer, params: Any, example: Any) -> Any:
    """With a key of the sample's own."""
    y = layer.apply(params, example["x"], key=jax.random.key(example["seed"]))
    return y[0] if isinstance(y, tuple) else y


class Row(NamedTuple):
    """One layer.

    Attributes:
      layer: it.
      example: shapes of one example, as `program_table.arrays` takes them.
      call: `(layer, params, example) -> output`.
      double: see `tests.oracle.Case`.
    """

    layer: nn.Layer
    example: Any
    call: Callable[[nn.Layer, Any, Any], Any] = applied
    double: bool = True

    def case(self, batch_size: int = 5) -> Case:
        """Half the squared distance of the output from a ramp, so that entries differ."""
        params = jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(self.layer.init)(KEY))

        def loss_fn(params: Any, example: Any) -> jax.Array:
            y = self.call(self.layer, params, example)
            ramp = jnp.arange(y.size, dtype=y.dtype).reshape(y.shape) / max(y.size, 1)
            return 0.5 * jnp.sum(jnp.square(y - ramp))

        batch = arrays(self.example, np.random.default_rng(0), (batch_size,))
        return Case(loss_fn, params, batch, double=self.double)


def ragged(steps: int, width: int, state: Any) -> dict[str, Any]:
    return {"x": (steps, width), "state": state, "length": Integers(steps - 1)}


LAYERS: Mapping[str, Row] = {
    "linear": Row(nn.linear(4, 3), (4,)),
    "linear_sequence": Row(nn.linear(4, 3), (6, 4)),
    "linear_without_bias": Row(nn.linear(4, 3, bias=False), (2, 3, 4)),
    "conv_linear": Row(nn.conv_linear(4, 3), (5, 4)),
    "conv1d": Row(nn.conv1d(3, 4, 3, stride=2, padding=1), (9, 3)),
    "conv1d_grouped": Row(nn.conv1d(4, 6, 2, padding="same", dilation=2, groups=2), (7, 4)),
    "conv1d_circular": Row(nn.conv1d(2, 3, 3, padding=2, padding_mode="circular"), (6, 2)),
    "conv2d": Row(nn.conv2d(2, 3, 3, padding="same"), (6, 5, 2)),
    "conv2d_reflect": Row(nn.conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (5, 5, 2)),
    "conv2d_depthwise": Row(nn.conv2d(3, 3, 2, groups=3, bias=False), (5, 4, 3)),
    "conv3d": Row(nn.conv3d(2, 2, (1, 2, 3), stride=(1, 2, 1)), (3, 4, 5, 2)),
    "conv_transpose1d": Row(nn.conv_transpose1d(3, 4, 4, stride=2, padding=1), (5, 3)),
    "conv_transpose2d": Row(
        nn.conv_transpose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (3, 4, 4)
    ),
    "conv_transpose3d": Row(nn.conv_transpose3d(2, 2, 2, dilation=2), (2, 3, 2, 2)),
    "embedding": Row(nn.embedding(7, 4), Integers(7, (6,))),
    "embedding_options": Row(
        nn.embedding(5, 4, padding_idx=1, max_norm=0.8, norm_type=1.0, scale_grad_by_freq=True),
        Integers(5, (2, 4)),
    ),
    "layer_norm": Row(nn.layer_norm(4), (5, 4)),
    "layer_norm_planes": Row(nn.layer_norm((3, 4), bias=False), (2, 3, 4)),
    "rms_norm": Row(nn.rms_norm(4), (5, 4)),
    "group_norm": Row(nn.group_norm(2, 4), (3, 4, 4)),
    "instance_norm": Row(nn.instance_norm(3, affine=True), (4, 5, 3)),
    "lstm": Row(nn.lstm(3, 4), (6, 3), outputs),
    "lstm_deep": Row(nn.lstm(3, 2, num_layers=2, bidirectional=True), (5, 3), outputs),
    "lstm_ragged": Row(nn.lstm(3, 4), ragged(6, 3, [(1, 4), (1, 4)]), states),
    "lstm_dropout": Row(
        nn.lstm(3, 4, num_layers=2, dropout=0.5),
        {"x": (4, 3), "seed": Integers(99)},
        dropped,
        double=False,
    ),
    "gru": Row(nn.gru(3, 4), (6, 3), outputs),
    "gru_ragged": Row(nn.gru(3, 2, bidirectional=True), ragged(5, 3, (2, 2)), states),
    "rnn": Row(nn.rnn(3, 4, bias=False), (6, 3), outputs),
    "rnn_ragged": Row(nn.rnn(3, 2, num_layers=2), ragged(5, 3, (2, 2)), states),
    "attention": Row(nn.multi_head_attention(4, 2), (5, 4)),
    "attention_causal": Row(
        nn.multi_head_attention(6, 3, add_bias_kv=True, add_zero_attn=True),
        (4, 6),
        lambda layer, params, x: layer.apply(params, x, is_causal=True),
    ),
    "attention_cross": Row(
        nn.multi_head_attention(4, 2, kdim=3, vdim=5, bias=False),
        {"queries": (3, 4), "keys": (4, 3), "values": (4, 5), "length": Integers(5)},
        attended,
    ),
    "sequence_bias": Row(nn.sequence_bias(4), (3, 4)),
    "prelu": Row(nn.prelu(3), (5, 3)),
    "residual": Row(
        nn.residual(nn.sequential(nn.linear(3, 4), nn.tanh), shortcut=nn.linear(3, 4)), (3,)
    ),
    "dropout": Row(
        nn.sequential(nn.linear(3, 8), nn.dropout(0.5), last=nn.linear(8, 2)),
        {"x": (3,), "seed": Integers(99)},
        dropped,
        double=False,
    ),
    "cnn": Row(
        nn.sequential(
            nn.conv2d(1, 4, 3, padding=1),
            nn.group_norm(2, 4),
            nn.relu,
            nn.max_pool(2),
            nn.conv2d(4, 4, 3, padding="same"),
            nn.tanh,
            nn.adaptive_avg_pool(2),
            nn.flatten(),
            nn.linear(16, 3),
        ),
        (6, 6, 1),
    ),
    "text": Row(
        nn.sequential(
            nn.embedding(6, 4, padding_idx=0),
            nn.gru(4, 3),
            nn.function(lambda result: result[0][-1]),
            nn.linear(3, 2),
        ),
        Integers(6, (5,)),
    ),
}
