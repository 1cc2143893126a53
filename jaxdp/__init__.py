"""jaxdp: differentially private training of any JAX model at the price of ordinary training.

The road, in its order: per-sample gradients → clip → noise → optax, and the ledger beside it.
"""

# First of all, since it is for the time that the rest takes.
from jaxdp import interrupts as interrupts

# isort: split
from jaxdp import accounting as accounting
from jaxdp import distributed as distributed
from jaxdp import lipschitz as lipschitz
from jaxdp import nn as nn
from jaxdp import training as training
from jaxdp.accounting import Ledger as Ledger
from jaxdp.accumulation import accumulate as accumulate
from jaxdp.bounded import Bounded as Bounded
from jaxdp.clipping import clip_adaptive as clip_adaptive
from jaxdp.clipping import clip_automatic as clip_automatic
from jaxdp.clipping import clip_by_group as clip_by_group
from jaxdp.clipping import clip_flat as clip_flat
from jaxdp.clipping import clip_per_layer as clip_per_layer
from jaxdp.explanation import Explanation as Explanation
from jaxdp.explanation import explain as explain
from jaxdp.noise import add_noise as add_noise
from jaxdp.per_sample import PerSampleGrads as PerSampleGrads
from jaxdp.per_sample import per_sample_grads as per_sample_grads
from jaxdp.randomness import random_key as random_key
from jaxdp.released import executed_noise_multipliers as executed_noise_multipliers
from jaxdp.released import noise_draws as noise_draws
from jaxdp.sampling import FixedSizeSampler as FixedSizeSampler
from jaxdp.sampling import PhysicalBatch as PhysicalBatch
from jaxdp.sampling import PoissonSampler as PoissonSampler
from jaxdp.sampling import ShuffledSampler as ShuffledSampler
from jaxdp.validation import Finding as Finding
from jaxdp.validation import Validation as Validation
from jaxdp.validation import validate as validate

__version__ = "0.1.0"
