"""What all clips have in common: a rule for each logical step, and what comes down the chain."""

# JAX and optax leave some of their types unknown.
# pyright: reportMissingTypeStubs=false
# pyright: reportUnknownMemberType=false

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxdp.bounded import Bounded, Groups
from jaxdp.engine.weighting import ClipRule
from jaxdp.per_sample import PerSampleGrads

# (parameters' structure, which leaves have a gradient, logical step) -> rule
MakeRule = Callable[[Any, Groups, jax.Array], ClipRule]


class ClipState(NamedTuple):
    """The logical step, which schedules read. int32 scalar."""

    step: jax.Array


def from_rule(make_rule: MakeRule) -> optax.GradientTransformationExtraArgs:
    """The transformation of a rule that needs to remember nothing but the logical step."""

    def init(params: optax.Params) -> ClipState:
        return ClipState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any,
        state: ClipState,
        params: optax.Params | None = None,
        *,
        is_last: ArrayLike = True,
        **_: Any,
    ) -> tuple[Any, ClipState]:
        grads = per_sample_gradients(updates, params)
        bounded = grads.clipped_sum(make_rule(grads.params, grads.groups, state.step))
        return bounded, ClipState(state.step + jnp.asarray(is_last, bool).astype(jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def shrink(norms: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Wishes every sample to stay as it is; the cap in `sample_weights` does the clipping."""
    return jnp.ones_like(norms)


def per_sample_gradients(updates: Any, params: optax.Params | None) -> PerSampleGrads:
    """What came down the chain, as a handle; refuses what holds no per-sample gradients."""
    if isinstance(updates, Bounded):
        raise TypeError(
            "a clip must get per-sample gradients, got a Bounded, whose samples are summed "
            "already. Keep one clip in the chain, and let jaxdp.add_noise follow it."
        )
    grads = updates if isinstance(updates, PerSampleGrads) else PerSampleGrads.from_arrays(updates)
    if params is not None:
        expected = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
        got = [leaf.shape for leaf in jax.tree.leaves(grads.params)]
        if got != expected:
            raise ValueError(
                "a clip must get per-sample gradients of shape [B, *param.shape], got shapes "
                f"without the sample axis {got} for parameters {expected}. Take "
                "jax.vmap(jax.grad(loss_fn), (None, 0)) or jaxdp.per_sample_grads(loss_fn), not "
                "the gradient of a mean loss."
            )
    return grads


def members(groups: Groups) -> list[int]:
    """Positions of the leaves that have a gradient."""
    return [leaf for leaf, group in enumerate(groups) if group is not None]


def one_group_each(groups: Groups) -> Groups:
    """A group of its own for each leaf that has a gradient."""
    rank = {leaf: k for k, leaf in enumerate(members(groups))}
    return tuple(rank.get(leaf) for leaf in range(len(groups)))
