"""The contestants of `bench/engine.py`: steps from `(params, batch)` to one gradient.

    python bench/engine.py --contestants non_private naive jax_privacy

Claim: everybody does the same work. All but the first return Σ_i min(1, C/‖g_i‖) g_i, or the same
for each leaf, and nothing else: noise, optimizer, losses and norms are left out everywhere. Each
peer is called on the loss of one example as it is.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxdp

# Small, so that in every model of the zoo samples and layers are clipped: where nothing is, a wrong
# norm would pass the check.
CLIP_NORM = 0.01

NAMES = (
    "non_private",
    "naive",
    "jaxdp_flat",
    "jaxdp_per_layer",
    "jaxdp_tuned",
    "jax_privacy",
    "optax",
)

LossFn = Callable[[Any, Any], jax.Array]
Step = Callable[[Any, Any], Any]
Clip = Literal["none", "flat", "per_layer"]


class Contestant(NamedTuple):
    """One way to compute the gradient.

    Attributes:
      clip: which sum it returns.
      variants: label -> step. Where there are several, the fastest one competes.
    """

    clip: Clip
    variants: Mapping[str, Step]


def build(loss_fn: LossFn, batch_size: int, method: str | None) -> dict[str, Contestant]:
    """The contestants that are installed, by name.

    Args:
      loss_fn: `(params, example) -> scalar` of one example.
      batch_size: what microbatches must divide.
      method: passed to `jaxdp.per_sample_grads`, unless None.
    """
    options = {} if method is None else {"method": method}

    def flat(microbatch_size: int | None) -> Step:
        more = {"microbatch_size": microbatch_size}
        return clipped(loss_fn, jaxdp.clip_flat(CLIP_NORM), **options, **more)

    per_layer = clipped(loss_fn, jaxdp.clip_per_layer(CLIP_NORM), **options)
    contestants = {
        "non_private": Contestant("none", {"": non_private(loss_fn)}),
        "naive": Contestant("flat", {"": naive(loss_fn)}),
        "jaxdp_flat": Contestant("flat", {"": flat(None)}),
        "jaxdp_per_layer": Contestant("per_layer", {"": per_layer}),
        "jaxdp_tuned": Contestant("flat", _tuned(flat, batch_size)),
    }
    if jax_privacy_installed():
        contestants["jax_privacy"] = Contestant("flat", _tuned(_jax_privacy(loss_fn), batch_size))
    contestants["optax"] = Contestant("flat", {"": _optax(loss_fn)})
    return contestants


def jax_privacy_installed() -> bool:
    """Whether the peer can be imported."""
    return importlib.util.find_spec("jax_privacy") is not None


def oracle(loss_fn: LossFn, params: Any, batch: Any) -> dict[str, Any]:
    """The sums that the contestants must return, by their clip.

    The naive way at its plainest: one `jax.grad` after the other. It shares no batching rule with
    a contestant, and runs where the gradients of a whole batch do not fit.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums: dict[str, Any], params: Any, batch: Any, index: int) -> dict[str, Any]:
        example = jax.tree.map(lambda leaf: leaf[index], batch)
        grad = jax.grad(loss_fn)(params, example)
        norms = jax.tree.map(jnp.linalg.norm, grad)
        norm = jnp.linalg.norm(jnp.stack(jax.tree.leaves(norms)))
        flat = jax.tree.map(lambda leaf: _clipped(leaf, norm), grad)
        per_layer = jax.tree.map(_clipped, grad, norms)
        return jax.tree.map(jnp.add, sums, {"flat": flat, "per_layer": per_layer})

    sums = {clip: jax.tree.map(jnp.zeros_like, params) for clip in ("flat", "per_layer")}
    for index in range(jax.tree.leaves(batch)[0].shape[0]):
        sums = add(sums, params, batch, index)
    return sums


def _clipped(leaf: jax.Array, norm: jax.Array) -> jax.Array:
    return leaf * jnp.minimum(1, CLIP_NORM / norm)


def non_private(loss_fn: LossFn) -> Step:
    """The yardstick: the gradient of the mean loss over the batch."""

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, batch))

    return jax.grad(mean_loss)


def naive(loss_fn: LossFn) -> Step:
    """What one writes without a library, with the weighted sum in its fast form, a contraction."""

    def step(params: Any, batch: Any) -> Any:
        grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        rows = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(grads)]
        norms = jnp.sqrt(sum(jnp.sum(jnp.square(row), axis=1) for row in rows))
        weights = jnp.minimum(1, CLIP_NORM / norms)
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), grads)

    return step


def clipped(loss_fn: LossFn, clip: Any, **options: Any) -> Step:
    """The sum of clipped gradients by jaxdp, with the options of `jaxdp.per_sample_grads`."""
    grads_fn = jaxdp.per_sample_grads(loss_fn, **options)

    def step(params: Any, batch: Any) -> Any:
        bounded, _ = clip.update(grads_fn(params, batch), clip.init(params))
        return bounded.value

    return step


def _tuned(step: Callable[[int | None], Step], batch_size: int) -> dict[str, Step]:
    """The steps on the whole batch and in microbatches, which trade time for memory.

    Which one is fastest depends on model and device, so all of them are tried.
    """
    sizes = sorted({batch_size // part for part in (4, 16, 64, 256) if batch_size % part == 0})
    return {"whole batch": step(None)} | {f"microbatch {size}": step(size) for size in sizes}


def _jax_privacy(loss_fn: LossFn) -> Callable[[int | None], Step]:
    # By name, since type checkers run where this peer is not installed.
    clipped_grad = importlib.import_module("jax_privacy").clipped_grad

    def step(microbatch_size: int | None) -> Step:
        # keep_batch_dim=False: the loss takes one example without a batch axis.
        return clipped_grad(
            loss_fn,
            l2_clip_norm=CLIP_NORM,
            keep_batch_dim=False,
            microbatch_size=microbatch_size,
        )

    return step


def _optax(loss_fn: LossFn) -> Step:
    """The clip of `optax.contrib.differentially_private_aggregate`.

    Not the aggregate itself: with a noise multiplier of zero it still draws the noise, which
    nobody else here does.
    """

    def step(params: Any, batch: Any) -> Any:
        grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        clipped, _ = optax.per_example_global_norm_clip(grads, CLIP_NORM)
        return clipped

    return step
