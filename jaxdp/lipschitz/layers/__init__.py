"""Layers whose bounds stay small, for use beside those of `jaxdp.nn`.

A network of them has an output that is as long as its input, and a cotangent that keeps its
length on the way down, so that no bound grows with depth:

    model = nn.sequential(
        lipschitz.bounded_input(1.0),
        lipschitz.linear(784, 128), lipschitz.group_sort(2),
        lipschitz.linear(128, 10),
    )
    tx = optax.chain(jaxdp.add_noise(...), optax.adam(1e-3), lipschitz.project(model.project))
"""

from jaxdp.lipschitz.layers.activations import gradient_norm_preserving as gradient_norm_preserving
from jaxdp.lipschitz.layers.activations import group_sort as group_sort
from jaxdp.lipschitz.layers.activations import householder as householder
from jaxdp.lipschitz.layers.branches import residual as residual
from jaxdp.lipschitz.layers.constrained import bias as bias
from jaxdp.lipschitz.layers.constrained import conv2d as conv2d
from jaxdp.lipschitz.layers.constrained import linear as linear
from jaxdp.lipschitz.layers.inputs import bounded_input as bounded_input
from jaxdp.lipschitz.layers.pooling import l2_norm_pool as l2_norm_pool
from jaxdp.lipschitz.layers.pooling import scaled_avg_pool as scaled_avg_pool
