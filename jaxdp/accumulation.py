"""Gradient accumulation: one logical batch in several physical ones.

    behind = optax.chain(jaxdp.add_noise(1.1, key), optax.scale(1 / 256), optax.adam(1e-3))
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(behind))
    updates, state = tx.update(grads, state, params, is_last=is_last)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxdp.bounded import Bounded, is_zero, taken_whole
from jaxdp.checks import check_instance
from jaxdp.engine.reduction import sum_dtype
from jaxdp.engine.sums import Running
from jaxdp.gathering import Gathers
from jaxdp.randomness import drawn_alone
from jaxdp.released import Released, initial_state
from jaxdp.shares import placed_like


@Gathers.register
class AccumulateState(NamedTuple):
    """State of `jaxdp.accumulate`.

    Attributes:
      sums: of the logical batch so far, like the parameters, with what rounding took from them.
        Raw until the step ends, when they go back to zero.
      sensitivities: largest sensitivity so far of the group of each leaf, float32 `[L]`.
      inner_state: state of the inner transformation.
    """

    sums: Running
    sensitivities: jax.Array
    inner_state: optax.OptState

    @property
    def gathered(self) -> Any:
        """See `jaxdp.gathering`."""
        return self.sums, self.sensitivities

    def emptied(self) -> "AccumulateState":
        """See `jaxdp.gathering`."""
        sums, sensitivities = jax.tree.map(jnp.zeros_like, self.gathered)
        return self._replace(sums=sums, sensitivities=sensitivities)


def accumulate(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Adds up the `Bounded` sums of a logical batch and runs `inner` once, at its end.

    A logical batch is what the sampler drew; a physical batch is what fits the device. The sums of
    its physical batches are over disjoint samples, so the sensitivity of their sum is that of one
    of them, and noise is drawn once:

    $$ \text{inner}\Bigl( \sum_p v_p,\; \max_p \Delta_p \Bigr) $$

    The sum is compensated (`jaxdp.engine.sums`), so that one sample cannot change how thousands of
    others are rounded: the state holds two arrays of the size of the parameters.

    Args:
      inner: everything behind the clip: `jaxdp.add_noise` first, then optax.

    Returns:
      A transformation whose `update` needs `is_last=...`, bool: whether this physical batch ends
      its logical batch (the `is_last` of `jaxdp.PhysicalBatch`). Before the end the updates are
      zero and neither noise nor the inner state moves: nothing is released, nothing is to charge.
      In a `jax.vmap` members may end their batches at different times. JAX then runs `inner` for
      all of them at once: for those that go on, with a sum of zero and noise of no step.

    Raises:
      TypeError: `inner` is no transformation; (in `update`) `is_last` is missing, what comes in is
        no `Bounded`, `inner` draws no noise, or it takes the `Bounded` apart, as a wrapper of optax
        around `jaxdp.add_noise` does.
      ValueError: (in `init`) the state of `inner` hides a noised release, see `jaxdp.released`.

    `optax.MultiSteps` is no substitute: ahead of the clip it would mix samples, and around the
    noise run it for every physical batch; both are refused. Behind the noise it is post-processing.

    Example:
      >>> import jax, jax.numpy as jnp, jaxdp
      >>> noise = jaxdp.add_noise(0.0, jax.random.key(0))
      >>> tx = optax.chain(jaxdp.clip_flat(2.0), accumulate(noise))
      >>> params = jnp.zeros(1)
      >>> first, state = tx.update(jnp.ones((2, 1)), tx.init(params), params, is_last=False)
      >>> second, state = tx.update(jnp.ones((3, 1)), state, params, is_last=True)
      >>> first.tolist(), second.tolist()
      ([0.0], [5.0])
    """
    check_instance(
        "inner",
        inner,
        optax.GradientTransformation,
        advice="Pass jaxdp.add_noise(...), or an optax.chain that begins with it.",
    )
    behind = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AccumulateState:
        return AccumulateState(
            Running.start(jax.tree.map(_zero_sum, params)),
            jnp.zeros((len(jax.tree.leaves(params)),), jnp.float32),
            initial_state(behind.init, params),
        )

    def update(
        updates: Any,
        state: AccumulateState,
        params: optax.Params | None = None,
        *,
        is_last: ArrayLike | None = None,
        **extra: Any,
    ) -> tuple[Any, AccumulateState]:
        if is_last is None:
            raise TypeError(
                "is_last must say whether this physical batch ends its logical batch, got None. "
                "Pass the is_last of jaxdp.PhysicalBatch to update."
            )
        if not isinstance(updates, Bounded):
            raise TypeError(
                f"accumulate must get the jaxdp.Bounded of a clip, got {type(updates).__name__}. "
                "Put it right behind the clip, around jaxdp.add_noise and the optimizer."
            )
        # Each device adds to the sums that it holds.
        sums = state.sums.add(jax.tree.map(placed_like, updates.value, state.sums.total))
        sensitivities = jnp.maximum(state.sensitivities, _of_leaves(updates))
        total = updates.with_value(sums.value, _of_groups(sensitivities, updates))
        whole, ready = _at_the_end(is_last, total, state.inner_state)

        def end() -> tuple[Any, AccumulateState]:
            with taken_whole():
                released, inner_state = behind.update(whole, ready, params, is_last=True, **extra)
            if isinstance(released, Bounded):
                raise TypeError(
                    "accumulate must hold everything behind the clip, got an inner transformation "
                    "that lets a Bounded through. Move jaxdp.add_noise and what follows it inside."
                )
            return released, AccumulateState(sums, sensitivities, inner_state).emptied()

        def go_on() -> tuple[Any, AccumulateState]:
            released, _ = jax.eval_shape(end)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), released)
            return zeros, AccumulateState(sums, sensitivities, state.inner_state)

        if isinstance(is_last, bool | np.bool_):
            return end() if is_last else go_on()
        return jax.lax.cond(jnp.asarray(is_last, bool), end, go_on)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _zero_sum(param: ArrayLike) -> jax.Array:
    """The sum over no samples, spread over devices as the parameter is and later sums will be: a
    step would be compiled once more for what it makes of another layout."""
    return jnp.zeros_like(param, dtype=sum_dtype(jnp.result_type(param)))


def _at_the_end(is_last: ArrayLike, total: Bounded, inner_state: Any) -> tuple[Any, Any]:
    """What the end of a logical batch is computed from: where there is none, an empty sum and
    other noise.

    Under a `vmap` that maps `is_last`, both branches of `lax.cond` run for all members. Whatever
    has effects behind the noise would see the noise of a step with a part of its sum, and at the
    end with all of it: the difference has no noise.
    """
    is_last = jnp.asarray(is_last, bool)

    def kept(leaf: jax.Array) -> jax.Array:
        return jnp.where(is_last, leaf, jnp.zeros_like(leaf))

    def rehearsed(node: Any) -> Any:
        if not isinstance(node, Released):
            return node
        # A key that members share stays, so that the noise itself is refused: with another one
        # where a batch goes on, the member whose batch ends would seem to be alone.
        alone = drawn_alone(node.key, (is_last, total.value, total.sensitivity))
        return node.rehearsed(unless=is_last | ~alone)

    held = jax.tree.map(rehearsed, inner_state, is_leaf=lambda node: isinstance(node, Released))
    return total.with_value(jax.tree.map(kept, total.value), total.sensitivity), held


def _of_leaves(bounded: Bounded) -> jax.Array:
    """The sensitivity of each leaf's group, float32 `[L]`; zero for a leaf without group."""
    sensitivity = _rounded_up(jnp.atleast_1d(bounded.sensitivity))
    zero = jnp.zeros((), jnp.float32)
    return jnp.stack([zero if g is None else sensitivity[g] for g in bounded.groups])


def _rounded_up(sensitivity: jax.Array) -> jax.Array:
    """In float32, not below itself, and above zero where it is."""
    single = jnp.finfo(jnp.float32)
    narrow = sensitivity.astype(jnp.float32)
    below = narrow.astype(sensitivity.dtype) < sensitivity
    narrow = jnp.where(below, narrow * (1 + 2 * single.eps), narrow)
    return jnp.where(is_zero(sensitivity), narrow, jnp.maximum(narrow, single.tiny))


def _of_groups(leaf_sensitivities: jax.Array, like: Bounded) -> jax.Array:
    """The inverse of `_of_leaves`, in the shape of `like.sensitivity`."""
    first = [like.groups.index(group) for group in range(max(like.sensitivity.size, 1))]
    return leaf_sensitivities[jnp.asarray(first)].reshape(like.sensitivity.shape)
