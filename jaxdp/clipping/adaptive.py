"""A threshold that follows a quantile of the norms, by noisy counts of its own."""

# JAX and optax leave some of their types unknown.
# pyright: reportMissingTypeStubs=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxdp.bounded import Groups
from jaxdp.checks import check_bool, check_real
from jaxdp.clipping.base import members, one_group_each, per_sample_gradients, shrink
from jaxdp.clipping.thresholds import adaptive_limits, check_threshold
from jaxdp.distributions import normal
from jaxdp.engine.numerics import select_rows
from jaxdp.engine.weighting import ClipRule
from jaxdp.gathering import Gathers
from jaxdp.per_sample import PerSampleGrads
from jaxdp.randomness import COUNT_NOISE, drawn_alone
from jaxdp.released import Released
from jaxdp.schedules import FloatOrSchedule, check_number, check_schedule, value_at
from jaxdp.varying import summed_over_devices, untracked_axes, varying_axes


@Gathers.register
class ClipAdaptiveState(NamedTuple):
    """State of `jaxdp.clip_adaptive`.

    Attributes:
      released: the counts' noise, and how many logical steps have drawn it.
      thresholds: C_t of the coming step, float32, scalar or `[K]`. Private already: releasable.
      counts: Σ_i (1[‖g_i‖ ≤ C_t] − ½) so far in this logical batch: raw until the step ends, when
        it goes back to zero.
      lowest: the least C_t, float32 scalar.
      highest: the largest C_t, float32 scalar.
    """

    released: Released
    thresholds: jax.Array
    counts: jax.Array
    lowest: jax.Array
    highest: jax.Array

    @property
    def gathered(self) -> jax.Array:
        """See `jaxdp.gathering`."""
        return self.counts

    def emptied(self) -> "ClipAdaptiveState":
        """See `jaxdp.gathering`."""
        return self._replace(counts=jnp.zeros_like(self.counts))


def clip_adaptive(
    initial_threshold: float,
    *,
    key: jax.Array,
    count_noise_multiplier: FloatOrSchedule,
    expected_batch_size: float,
    quantile: float = 0.5,
    learning_rate: FloatOrSchedule = 0.2,
    per_layer: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips to a threshold that follows a quantile of the per-sample gradient norms, privately.

    With b_i = 1[‖g_i‖ ≤ C_t], the expected batch size m and the target quantile γ,

    $$ \tilde b_t = \tfrac12 + \tfrac1m \Bigl( \sum_i (b_i - \tfrac12) + \sigma_b\,\Delta_b\,
       \mathcal N(0, 1) \Bigr), \qquad C_{t+1} = C_t \exp(-\eta\,(\tilde b_t - \gamma)). $$

    The count is a release of its own. One sample moves it by ½ (the −½ halves the sensitivity), a
    vector of K counts by Δ_b = √K/2. It is drawn from the same sampled batch as the gradients, so
    a step of this clip and of `add_noise(σ)` costs as much as ONE Gaussian of noise multiplier
    (σ⁻² + σ_b⁻²)^(−1/2): `jaxdp.accounting.combined_noise_multiplier([σ, σ_b])`, or charge
    `[σ, σ_b]` to the ledger. In the paper's notation σ_b here is 2σ_b there: noise relative to
    the sensitivity, as everywhere in jaxdp.

    C_t stays between C_0/10⁶ and 10⁶·C_0, and above `SMALLEST_THRESHOLD`: where gradients vanish,
    as on data that is fitted, it stops falling, and when they return it follows them.

    Args:
      initial_threshold: C_0 > 0.
      key: JAX key of the counts' noise, of one run; it may be that of the gradients' noise. See
        `jaxdp.add_noise`.
      count_noise_multiplier: σ_b ≥ 0, or a schedule. A tenth of the batch size is a good start.
      expected_batch_size: m > 0, a public constant, never the realised count.
      quantile: γ in [0, 1].
      learning_rate: η > 0, or a schedule.
      per_layer: one threshold and one count for each leaf.

    Returns:
      A transformation from per-sample gradients to a `jaxdp.Bounded`. Where a logical batch comes
      in several physical ones, pass `is_last` to `update`: counts add up, and the noise is drawn
      and the threshold moved at the last one only.

    Raises:
      ValueError: an argument out of its range; (in `init`, `update`) under a `vmap` that maps what
        is counted, but not the key. Where a schedule of σ_b goes below zero, thresholds become NaN.
      NotImplementedError: (in `update`) inside `pmap`, or `shard_map` with `check_vma=False`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = clip_adaptive(1.0, key=jax.random.key(0), count_noise_multiplier=0.1,
      ...                    expected_batch_size=2, learning_rate=1.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> _, state = tx.update(jnp.array([[3.0], [4.0]]), state)
      >>> 1.5 < float(state.thresholds) < 1.8   # both were above: C grows by about exp(1/2)
      True

    Source: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping",
    equation 1 and section 2.2, theorem 1.
    """
    _check(initial_threshold, count_noise_multiplier, expected_batch_size, learning_rate)
    advice = "Pass the share of samples that are not to be clipped."
    quantile = check_real("quantile", quantile, minimum=0, maximum=1, advice=advice)
    per_layer = check_bool("per_layer", per_layer, advice="Leave it out for one threshold.")

    def init(params: optax.Params) -> ClipAdaptiveState:
        shape = (len(jax.tree.leaves(params)),) if per_layer else ()
        initial = jnp.asarray(initial_threshold, jnp.float32)
        lowest, highest = adaptive_limits(initial)
        return ClipAdaptiveState(
            released=Released.begin(key, COUNT_NOISE, params),
            thresholds=jnp.full(shape, initial),
            counts=jnp.zeros(shape, jnp.float32),
            lowest=lowest,
            highest=highest,
        )

    def update(
        updates: Any,
        state: ClipAdaptiveState,
        params: optax.Params | None = None,
        *,
        is_last: ArrayLike = True,
        **_: Any,
    ) -> tuple[Any, ClipAdaptiveState]:
        _refuse_unseen_devices()
        grads = per_sample_gradients(updates, params)
        groups, places = _groups(grads.groups) if per_layer else (grads.groups, ...)
        thresholds = state.thresholds[places]
        bounded = grads.clipped_sum(ClipRule(groups, thresholds, shrink))

        counts = state.counts.at[places].add(_halves_below(grads, groups, thresholds))

        draw, step = state.released.coming_key(), state.released.step
        noise_multiplier = value_at(count_noise_multiplier, step)
        alone = drawn_alone(state.released.key, (counts, state.thresholds, noise_multiplier))
        noise_multiplier = jnp.where(alone & (noise_multiplier >= 0), noise_multiplier, jnp.nan)
        std = noise_multiplier * math.sqrt(thresholds.size) / 2  # one sample moves K counts by ½
        noise = normal(draw, counts.shape)
        error = 0.5 + (counts + std * noise) / expected_batch_size - quantile
        moved = state.thresholds * jnp.exp(-value_at(learning_rate, step) * error)
        moved = jnp.clip(moved, state.lowest, state.highest)

        def at_end(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(is_last, new, old)

        return bounded, ClipAdaptiveState(
            released=state.released.after(noise_multiplier, is_last),
            thresholds=at_end(moved, state.thresholds),
            counts=at_end(jnp.zeros_like(counts), counts),
            lowest=state.lowest,
            highest=state.highest,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _check(
    initial_threshold: float,
    count_noise_multiplier: FloatOrSchedule,
    expected_batch_size: float,
    learning_rate: FloatOrSchedule,
) -> None:
    """Raises at what is out of its range."""
    check_threshold("initial_threshold", initial_threshold)
    check_number("initial_threshold", initial_threshold)
    check_schedule("count_noise_multiplier", count_noise_multiplier, zero=True)
    check_number("expected_batch_size", expected_batch_size)
    check_schedule("learning_rate", learning_rate)


def _refuse_unseen_devices() -> None:
    if axes := sorted(untracked_axes()):
        raise NotImplementedError(
            "clip_adaptive must count the samples of all devices, which it cannot see along "
            f"{axes}. Use jit with a sharded batch, or jax.shard_map with check_vma=True."
        )


def _groups(groups: Groups) -> tuple[Groups, jax.Array]:
    """One group for each leaf that has a gradient, and its place in the state: that has one for
    every leaf, since init cannot know which are frozen."""
    return one_group_each(groups), jnp.asarray(members(groups))


def _halves_below(grads: PerSampleGrads, groups: Groups, thresholds: jax.Array) -> jax.Array:
    """Σ_i (1[‖g_i‖ ≤ C] − ½) over the samples of all devices, of the shape of the thresholds."""
    norms = grads.norms(groups)
    below = jnp.where(norms <= thresholds.reshape(1, -1), 0.5, -0.5).astype(jnp.float32)
    counts = jnp.sum(select_rows(grads.counted, below), axis=0).reshape(thresholds.shape)
    return summed_over_devices(counts, varying_axes(counts))
