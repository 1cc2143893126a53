"""What `bench/accelerator.py` runs: models at their size and at one that a CPU runs, and steps.

    python bench/accelerator.py --models gpt2 mlp

Claim: all steps of a model do the work of one gradient of the same batch. The ordinary one is the
gradient of the mean loss, in the same microbatches where there are any; all others return
Σ_i min(1, C/‖g_i‖) g_i, or the same for each leaf. Noise and the optimizer are left out everywhere.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import contestants
import jax
import jax.numpy as jnp
import large
import zoo

import jaxdp


class Workload(NamedTuple):
    """A model and how much of it a step takes.

    Attributes:
      case: the loss, parameters and batch.
      unit: what is counted, "tokens" or "images".
      units: how many of them in a step.
      microbatch: samples at a time; None for the whole batch.
    """

    case: zoo.Case
    unit: str
    units: int
    microbatch: int | None = None


def gpt2(tiny: bool, dtype: Any = jnp.bfloat16, *, remat: bool = False) -> Workload:
    """GPT-2 124M on 8 texts of 1024 tokens."""
    if tiny:
        model = large.GPT2(2, 32, 2, 64, dtype, remat)
        batch, tokens = 4, 16
    else:
        model = large.GPT2(dtype=dtype, remat=remat)
        batch, tokens = 8, 1024
    case = large.next_token_case(model, batch, tokens)
    return Workload(large.filled(case, model.vocabulary), "tokens", batch * tokens)


def vit_b16(tiny: bool, dtype: Any = jnp.bfloat16) -> Workload:
    """ViT-B/16 on 64 images."""
    if tiny:
        model = large.ViT(2, 32, 2, patch=4, classes=zoo.CLASSES, dtype=dtype)
        batch, side = 4, 16
    else:
        model = large.ViT(dtype=dtype)
        batch, side = 64, 224
    return Workload(large.filled(large.image_case(model, batch, side)), "images", batch)


def wrn_16_4(tiny: bool) -> Workload:
    """WRN-16-4 on 4096 images of 32×32, 512 at a time."""
    batch, side, stages = (4, 8, (16, 32)) if tiny else (4096, 32, (64, 128, 256))
    case = large.filled(large.image_case(zoo.WideResNet(stages), batch, side))
    return Workload(case, "images", batch, 2 if tiny else 512)


def mlp(tiny: bool) -> Workload:
    """784-512-512-10 on 4096 images."""
    batch = 4 if tiny else 4096
    return Workload(zoo.classifier(zoo.MLP(), zoo.images((batch, 784))), "images", batch)


def lstm(tiny: bool) -> Workload:
    """An LSTM of width 128 on 1024 texts of 64 tokens."""
    batch, tokens = (4, 8) if tiny else (1024, zoo.TOKENS)
    case = zoo.classifier(zoo.LSTM(), zoo.documents((batch, tokens), zoo.VOCABULARY))
    return Workload(case, "tokens", batch * tokens)


# Name -> a builder that takes whether the model shall be tiny.
WORKLOADS: dict[str, Callable[..., Workload]] = {
    "gpt2": gpt2,
    "gpt2_remat": functools.partial(gpt2, remat=True),
    "vit_b16": vit_b16,
    "wrn_16_4": wrn_16_4,
    "mlp": mlp,
    "lstm": lstm,
}
# Those that compute in bfloat16, and the same in float32.
IN_SINGLE = {
    name: functools.partial(WORKLOADS[name], dtype=jnp.float32)
    for name in ("gpt2", "gpt2_remat", "vit_b16")
}

# Contestant -> the clip and the method; "flat_slots" is what "auto" takes where nothing is
# rematerialised.
CLIPPED = {
    "flat": (jaxdp.clip_flat, "auto"),
    "per_layer": (jaxdp.clip_per_layer, "auto"),
    "flat_slots": (jaxdp.clip_flat, "slots"),
    "flat_taps": (jaxdp.clip_flat, "taps"),
    "flat_fused": (jaxdp.clip_flat, "fused"),
    "flat_dense": (jaxdp.clip_flat, "dense"),
    "per_layer_slots": (jaxdp.clip_per_layer, "slots"),
    "per_layer_fused": (jaxdp.clip_per_layer, "fused"),
}


def step_of(
    workload: Workload, contestant: str, clip_norm: float = contestants.CLIP_NORM
) -> contestants.Step:
    """The step `(params, batch) -> gradient` of a contestant of this name."""
    loss_fn = workload.case.loss_fn
    if contestant == "non_private":
        return _in_microbatches(contestants.non_private(loss_fn), workload)
    if contestant == "vmap_grad":
        return _in_microbatches(contestants.naive(loss_fn), workload)
    make_clip, method = CLIPPED[contestant]
    options = {"method": method, "microbatch_size": workload.microbatch}
    return contestants.clipped(loss_fn, make_clip(clip_norm), **options)


def _in_microbatches(step: contestants.Step, workload: Workload) -> contestants.Step:
    """The sum of the step over the microbatches of the workload."""
    size = workload.microbatch
    if size is None:
        return step

    def summed(params: Any, batch: Any) -> Any:
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), batch)

        def add(sums: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, step(params, part)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)[0]

    return summed
