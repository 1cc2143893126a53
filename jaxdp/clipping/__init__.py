r"""Clips: from per-sample gradients to a `Bounded` sum.

    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.1, key), optax.scale(1 / 256), ...)

Every clip is an optax `GradientTransformation`. It takes a `jaxdp.PerSampleGrads`, or the pytree of
`[B, ...]` arrays that `jax.vmap(jax.grad(loss_fn), (None, 0))` gives, and returns

$$ \sum_i w_{ik}\, g_{ik}, \qquad \lVert w_{ik}\, g_{ik} \rVert_2 \le C_k $$

for every sample i and every group k of leaves, with L2 sensitivity C_k per group under adding or
removing one sample. A sample that is masked or whose gradient is not finite contributes zero.
Thresholds are at least `SMALLEST_THRESHOLD`: a number below it is refused, a schedule raised to it.

Arrays are taken as they are: what stands ahead of the clip in the chain has seen the rows of all
samples, and may have mixed them (`optax.clip_by_global_norm`, a momentum, any normalisation over
the update), which no clip can undo or notice. So a clip that is given arrays must come first, and
what `optax.masked` or `optax.partition` send past it are rows of single samples, `[B, ...]`. The
handle of `jaxdp.per_sample_grads`, or `PerSampleGrads.from_arrays(grads)`, lets nothing ahead of
the clip and nothing past it; `jaxdp.training.make_step` takes no arrays.

| clip              | groups           | weight of a sample         |
|-------------------|------------------|----------------------------|
| clip_flat         | one, all leaves  | min(1, C/‖g‖)              |
| clip_per_layer    | one per leaf     | min(1, C_k/‖g_k‖)          |
| clip_by_group     | by label         | min(1, C_k/‖g_k‖)          |
| clip_automatic    | one, or per leaf | C/(‖g‖ + γ)                |
| clip_adaptive     | one, or per leaf | min(1, C_t/‖g‖), C_t tuned |
"""

from jaxdp.clipping.adaptive import ClipAdaptiveState as ClipAdaptiveState
from jaxdp.clipping.adaptive import clip_adaptive as clip_adaptive
from jaxdp.clipping.automatic import clip_automatic as clip_automatic
from jaxdp.clipping.base import ClipState as ClipState
from jaxdp.clipping.by_group import clip_by_group as clip_by_group
from jaxdp.clipping.flat import clip_flat as clip_flat
from jaxdp.clipping.per_layer import clip_per_layer as clip_per_layer
from jaxdp.clipping.thresholds import SMALLEST_THRESHOLD as SMALLEST_THRESHOLD
