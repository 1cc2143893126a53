"""Activations: functions of one array, which `sequential` takes as they are.

Most are functions of `jax.nn` under their own names; others have the default of torch.
"""

import functools

import jax
import jax.numpy as jnp
from jax.nn import celu as celu
from jax.nn import elu as elu
from jax.nn import glu as glu
from jax.nn import hard_sigmoid as hard_sigmoid
from jax.nn import hard_swish as hard_swish
from jax.nn import hard_tanh as hard_tanh
from jax.nn import leaky_relu as leaky_relu
from jax.nn import log_sigmoid as log_sigmoid
from jax.nn import log_softmax as log_softmax
from jax.nn import mish as mish
from jax.nn import relu as relu
from jax.nn import relu6 as relu6
from jax.nn import selu as selu
from jax.nn import sigmoid as sigmoid
from jax.nn import silu as silu
from jax.nn import soft_sign as soft_sign
from jax.nn import softmax as softmax
from jax.nn import softplus as softplus
from jax.numpy import tanh as tanh

from jaxdp.checks import check_sizes
from jaxdp.nn.layer import Layer, Params, TorchName, along_last, check_input, deterministic

gelu = functools.partial(jax.nn.gelu, approximate=False)
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


def prelu(num_parameters: int = 1) -> Layer:
    """x where it is positive, a x elsewhere, with a learned slope a.

    Args:
      num_parameters: 1, or the number of channels, the last axis, for a slope of each.

    Returns:
      A layer, shape kept. Parameters: slope `[num_parameters]`, a quarter.

    Raises:
      ValueError: a size below 1; an input of other channels.

    Example:
      >>> layer = prelu()
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.array([-4.0, 2.0])).tolist()
      [-1.0, 2.0]

    Source: He et al. 2015, "Delving Deep into Rectifiers".
    """
    check_sizes(num_parameters=num_parameters)

    def init(key: jax.Array) -> Params:
        return {"slope": 0.25 * jnp.ones(num_parameters)}

    def apply(params: Params, x: jax.Array) -> jax.Array:
        if num_parameters > 1:
            check_input("prelu", x, last=num_parameters)
        return jnp.where(x > 0, x, along_last(params["slope"], x) * x)

    return deterministic(init, apply, {("slope",): (TorchName("weight"),)})
