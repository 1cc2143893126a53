"""Layers as pure functions of one example.

Each factory returns a `Layer(init, apply)`: `init(key)` gives a dict of parameters, and
`apply(params, x)` the output for ONE example, without a batch axis and with channels last. Any
optimizer, checkpoint or sharding rule for dicts of arrays applies.

    >>> import jax, jaxdp, optax
    >>> from jaxdp import nn
    >>> model = nn.sequential(nn.conv2d(1, 4, 3), nn.relu, nn.flatten(), nn.linear(144, 10))
    >>> params = model.init(jax.random.key(0))
    >>> def loss_fn(params, example):
    ...     image, label = example
    ...     logits = model.apply(params, image)
    ...     return optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    >>> batch = (jax.numpy.ones((5, 8, 8, 1)), jax.numpy.arange(5))
    >>> jaxdp.per_sample_grads(loss_fn)(params, batch).norms().shape
    (5,)

Outputs agree with the torch layers of the same names, so that trained weights move over
(`from_torch_state_dict`). No layer looks at other samples: there is no batch norm.
"""

from jaxdp.nn.activations import celu as celu
from jaxdp.nn.activations import elu as elu
from jaxdp.nn.activations import gelu as gelu
from jaxdp.nn.activations import gelu_tanh as gelu_tanh
from jaxdp.nn.activations import glu as glu
from jaxdp.nn.activations import hard_sigmoid as hard_sigmoid
from jaxdp.nn.activations import hard_swish as hard_swish
from jaxdp.nn.activations import hard_tanh as hard_tanh
from jaxdp.nn.activations import leaky_relu as leaky_relu
from jaxdp.nn.activations import log_sigmoid as log_sigmoid
from jaxdp.nn.activations import log_softmax as log_softmax
from jaxdp.nn.activations import mish as mish
from jaxdp.nn.activations import prelu as prelu
from jaxdp.nn.activations import relu as relu
from jaxdp.nn.activations import relu6 as relu6
from jaxdp.nn.activations import selu as selu
from jaxdp.nn.activations import sigmoid as sigmoid
from jaxdp.nn.activations import silu as silu
from jaxdp.nn.activations import soft_sign as soft_sign
from jaxdp.nn.activations import softmax as softmax
from jaxdp.nn.activations import softplus as softplus
from jaxdp.nn.activations import tanh as tanh
from jaxdp.nn.attention import multi_head_attention as multi_head_attention
from jaxdp.nn.attention import sequence_bias as sequence_bias
from jaxdp.nn.composition import dropout as dropout
from jaxdp.nn.composition import flatten as flatten
from jaxdp.nn.composition import function as function
from jaxdp.nn.composition import residual as residual
from jaxdp.nn.composition import sequential as sequential
from jaxdp.nn.convolution import conv1d as conv1d
from jaxdp.nn.convolution import conv2d as conv2d
from jaxdp.nn.convolution import conv3d as conv3d
from jaxdp.nn.embedding import embedding as embedding
from jaxdp.nn.layer import Layer as Layer
from jaxdp.nn.layer import TorchName as TorchName
from jaxdp.nn.linear import conv_linear as conv_linear
from jaxdp.nn.linear import linear as linear
from jaxdp.nn.normalization import batch_norm as batch_norm
from jaxdp.nn.normalization import group_norm as group_norm
from jaxdp.nn.normalization import instance_norm as instance_norm
from jaxdp.nn.normalization import layer_norm as layer_norm
from jaxdp.nn.normalization import rms_norm as rms_norm
from jaxdp.nn.pooling import adaptive_avg_pool as adaptive_avg_pool
from jaxdp.nn.pooling import avg_pool as avg_pool
from jaxdp.nn.pooling import max_pool as max_pool
from jaxdp.nn.recurrent import gru as gru
from jaxdp.nn.recurrent import lstm as lstm
from jaxdp.nn.recurrent import rnn as rnn
from jaxdp.nn.state_dict import from_torch_state_dict as from_torch_state_dict
from jaxdp.nn.transposed import conv_transpose1d as conv_transpose1d
from jaxdp.nn.transposed import conv_transpose2d as conv_transpose2d
from jaxdp.nn.transposed import conv_transpose3d as conv_transpose3d
