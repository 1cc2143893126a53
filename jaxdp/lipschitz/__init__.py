"""The road without clipping: networks whose gradients are bounded by design.

    grads_fn = lipschitz.bounded_grads(loss_fn, input_bound=1.0)       # → Bounded
    tx = optax.chain(jaxdp.add_noise(1.1, key), optax.scale(1 / 256), optax.adam(1e-3))

`bounds` computes how large the gradient of one example can be, and `falsify` attacks the result.
The layers and losses here keep the gradient small, but every function made of known primitives has
a bound.
"""

from jaxdp.lipschitz import rules as rules
from jaxdp.lipschitz.bounds import Bounds as Bounds
from jaxdp.lipschitz.bounds import LayerBound as LayerBound
from jaxdp.lipschitz.bounds import bounds as bounds
from jaxdp.lipschitz.declaration import declare as declare
from jaxdp.lipschitz.diagnostics import SignalToNoise as SignalToNoise
from jaxdp.lipschitz.diagnostics import signal_to_noise_average as signal_to_noise_average
from jaxdp.lipschitz.diagnostics import signal_to_noise_elementwise as signal_to_noise_elementwise
from jaxdp.lipschitz.falsification import Attack as Attack
from jaxdp.lipschitz.falsification import Falsification as Falsification
from jaxdp.lipschitz.falsification import falsify as falsify
from jaxdp.lipschitz.gradient_clipping import adaptive_gradient_clip as adaptive_gradient_clip
from jaxdp.lipschitz.gradient_clipping import clip_gradient as clip_gradient
from jaxdp.lipschitz.gradient_clipping import gradient_clip as gradient_clip
from jaxdp.lipschitz.gradient_clipping import track_quantile as track_quantile
from jaxdp.lipschitz.gradients import bounded_grads as bounded_grads
from jaxdp.lipschitz.layers import bias as bias
from jaxdp.lipschitz.layers import bounded_input as bounded_input
from jaxdp.lipschitz.layers import conv2d as conv2d
from jaxdp.lipschitz.layers import gradient_norm_preserving as gradient_norm_preserving
from jaxdp.lipschitz.layers import group_sort as group_sort
from jaxdp.lipschitz.layers import householder as householder
from jaxdp.lipschitz.layers import l2_norm_pool as l2_norm_pool
from jaxdp.lipschitz.layers import linear as linear
from jaxdp.lipschitz.layers import residual as residual
from jaxdp.lipschitz.layers import scaled_avg_pool as scaled_avg_pool
from jaxdp.lipschitz.losses import binary_cross_entropy as binary_cross_entropy
from jaxdp.lipschitz.losses import cosine_similarity as cosine_similarity
from jaxdp.lipschitz.losses import hinge_kantorovich_rubinstein as hinge_kantorovich_rubinstein
from jaxdp.lipschitz.losses import kantorovich_rubinstein as kantorovich_rubinstein
from jaxdp.lipschitz.losses import mean_absolute_error as mean_absolute_error
from jaxdp.lipschitz.losses import multiclass_hinge as multiclass_hinge
from jaxdp.lipschitz.losses import softmax_cross_entropy as softmax_cross_entropy
from jaxdp.lipschitz.operator_norm import convolution_norm as convolution_norm
from jaxdp.lipschitz.operator_norm import matrix_norm as matrix_norm
from jaxdp.lipschitz.projections import onto_ball as onto_ball
from jaxdp.lipschitz.projections import onto_spectral_ball as onto_spectral_ball
from jaxdp.lipschitz.projections import orthogonal as orthogonal
from jaxdp.lipschitz.projections import project as project
from jaxdp.lipschitz.rules.registry import BoundRule as BoundRule
from jaxdp.lipschitz.rules.registry import register_bound_rule as register_bound_rule
from jaxdp.lipschitz.sparse_vector import select_clip_value as select_clip_value
from jaxdp.lipschitz.sparse_vector import selection_draws as selection_draws
from jaxdp.lipschitz.sparse_vector import unclipped_counts as unclipped_counts
from jaxdp.lipschitz.value import Range as Range
from jaxdp.lipschitz.value import Value as Value
