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

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxdp.bounded import Bounded, Groups
from jaxdp.checks import check_bool, check_instance, check_real, shown
from jaxdp.distributions import normal
from jaxdp.engine.numerics import select_rows
from jaxdp.engine.rule import ClipRule
from jaxdp.per_sample import PerSampleGrads
from jaxdp.randomness import COUNT_NOISE, drawn_alone, own_key, step_key
from jaxdp.schedules import (
    NUMBER_OR_SCHEDULE,
    FloatOrSchedule,
    check_number,
    check_schedule,
    value_at,
)
from jaxdp.trees import prefix_leaves
from jaxdp.varying import summed_over_devices, untracked_axes, varying_axes

# Below, sums of weighted gradients would underflow where the norms do not, and a sample add more
# than its threshold: 1.13 times at 1e-18.
SMALLEST_THRESHOLD = 2.0**-40  # 9.1e-13, a number of every precision

# How far an adaptive threshold may go from where it began. Where over half of the gradients vanish,
# their median is zero, and a threshold that followed it there would never come back.
_ADAPTIVE_RANGE = 1e6

# (parameters' structure, which leaves have a gradient, logical step) -> rule
MakeRule = Callable[[Any, Groups, jax.Array], ClipRule]


def check_threshold(name: str, value: FloatOrSchedule) -> None:
    """Raises unless `value` is a schedule, or a finite number of at least `SMALLEST_THRESHOLD`."""
    if not callable(value) and not isinstance(value, Tracer):
        number = check_real(name, value, above=0, advice=NUMBER_OR_SCHEDULE)
        advice = "Scale the loss up: gradients of that size underflow."
        check_real(name, number, minimum=SMALLEST_THRESHOLD, advice=advice)
    check_schedule(name, value)


def threshold_at(value: FloatOrSchedule, step: jax.Array) -> jax.Array:
    """The threshold of a logical step, float32, at least `SMALLEST_THRESHOLD`; NaN stays."""
    return jnp.maximum(value_at(value, step), SMALLEST_THRESHOLD)


def adaptive_limits(initial_threshold: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Between which an adaptive threshold moves that began here: float32, or the dtype of an array.

    Example:
      >>> print(*adaptive_limits(2.0))
      2e-06 2e+06
    """
    initial = jnp.asarray(initial_threshold)
    lowest = jnp.maximum(initial / _ADAPTIVE_RANGE, SMALLEST_THRESHOLD)
    # Without a product that overflows.
    most = float(jnp.finfo(initial.dtype).max) / _ADAPTIVE_RANGE
    return lowest, jnp.maximum(jnp.minimum(initial, most) * _ADAPTIVE_RANGE, lowest)


class ClipState(NamedTuple):
    """The logical step, which schedules read. int32 scalar."""

    step: jax.Array


def clip_flat(threshold: FloatOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Clips each sample's whole gradient to L2 norm C, and sums.

    $$ \sum_i g_i \min(1, C / \lVert g_i \rVert_2), \qquad \Delta = C $$

    Args:
      threshold: C > 0, in the unit of the gradients, or a schedule of the logical step. As large
        as float32 can hold is no clipping, and the release NaN unless σ is zero.

    Returns:
      A transformation from per-sample gradients to a `jaxdp.Bounded` with scalar sensitivity.

    Raises:
      ValueError: C is not finite and at least `SMALLEST_THRESHOLD`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_flat(2.5)
      >>> per_sample = {"w": jnp.array([[3.0, 4.0], [0.0, 0.5]])}
      >>> total, _ = tx.update(per_sample, tx.init({"w": jnp.zeros(2)}))
      >>> total.value["w"].round(4).tolist(), float(total.sensitivity)
      ([1.5, 2.5], 2.5)

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.
    """
    check_threshold("threshold", threshold)

    def rule(params: Any, groups: Groups, step: jax.Array) -> ClipRule:
        return ClipRule(groups, threshold_at(threshold, step), _shrink)

    return _clip(rule)


def clip_per_layer(threshold: Any) -> optax.GradientTransformationExtraArgs:
    r"""Clips each sample's gradient leaf by leaf, and sums.

    $$ \sum_i g_{ik} \min(1, C_k / \lVert g_{ik} \rVert_2), \qquad
       \Delta = (\textstyle\sum_k C_k^2)^{1/2} $$

    Args:
      threshold: C_k > 0. One number (or schedule) is given to EACH of the K leaves, so Δ = √K·C;
        pass C/√K to keep the total at C. Else a pytree prefix of the parameters, whose number on a
        subtree holds for each of its leaves, or a flat list of K numbers in the order of
        `jax.tree.leaves(params)`. Integer and frozen leaves need a place there, but count for
        nothing.

    Returns:
      A transformation from per-sample gradients to a `jaxdp.Bounded` with sensitivity `[K]`.

    Raises:
      ValueError: a threshold is not positive and finite; the structure does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_per_layer({"b": 0.5, "w": 2.0})
      >>> per_sample = {"b": jnp.array([[1.0]]), "w": jnp.array([[0.0, 3.0]])}
      >>> total, _ = tx.update(per_sample, tx.init({"b": jnp.zeros(1), "w": jnp.zeros(2)}))
      >>> {name: leaf.round(4).tolist() for name, leaf in total.value.items()}
      {'b': [0.5], 'w': [0.0, 2.0]}
      >>> total.sensitivity.tolist()
      [0.5, 2.0]

    Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models",
    section 3 (per-layer clipping).
    """
    for value in jax.tree.leaves(threshold):
        check_threshold("threshold", value)

    def rule(params: Any, groups: Groups, step: jax.Array) -> ClipRule:
        values = _leaf_thresholds(threshold, params)
        kept = [value for value, group in zip(values, groups, strict=True) if group is not None]
        return ClipRule(_each_leaf(groups), _stack(kept, step), _shrink)

    return _clip(rule)


def clip_by_group(
    labels: Any, thresholds: Mapping[Any, FloatOrSchedule]
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each sample's gradient group by group, and sums.

    $$ \sum_i g_{ik} \min(1, C_k / \lVert g_{ik} \rVert_2), \qquad
       \Delta = (\textstyle\sum_k C_k^2)^{1/2} $$

    with g_ik the joint gradient of all leaves of group k.

    Args:
      labels: pytree prefix of the parameters whose leaves are labels, or a function from the
        parameters to one (as in `optax.partition`).
      thresholds: label -> C_k > 0, a number or a schedule. Groups keep this order.

    Returns:
      A transformation from per-sample gradients to a `jaxdp.Bounded` with sensitivity `[K]`.

    Raises:
      ValueError: a threshold is not positive and finite, a label has none, or none of the leaves
        that have a gradient carries a label that has one.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_by_group({"body": "slow", "head": "fast"}, {"slow": 0.25, "fast": 1.0})
      >>> params = {"body": {"b": jnp.zeros(1), "w": jnp.zeros(2)}, "head": jnp.zeros(2)}
      >>> per_sample = jax.tree.map(lambda p: jnp.ones((4, *p.shape)), params)
      >>> total, _ = tx.update(per_sample, tx.init(params))
      >>> total.groups, total.sensitivity.tolist()
      ((0, 0, 1), [0.25, 1.0])

    Source: McMahan et al. 2018, "A General Approach to Adding Differential Privacy to Iterative
    Training Procedures", section 2.
    """
    advice = "Pass a threshold for each label."
    check_instance("thresholds", thresholds, Mapping, advice=advice)
    if not thresholds:
        raise ValueError(f"thresholds must hold at least one label, got {{}}. {advice}")
    for label, value in thresholds.items():
        check_threshold(f"thresholds[{shown(label)}]", value)
    names = list(thresholds)

    def rule(params: Any, groups: Groups, step: jax.Array) -> ClipRule:
        tree = labels(params) if callable(labels) else labels
        leaf_labels = prefix_leaves("labels", tree, params)
        unknown = {label for label in leaf_labels if label not in thresholds}
        if unknown:
            raise ValueError(
                f"thresholds must hold every label, got labels {sorted(map(repr, unknown))} "
                f"without one; known: {sorted(map(repr, names))}"
            )
        merged = tuple(
            None if group is None else names.index(label)
            for label, group in zip(leaf_labels, groups, strict=True)
        )
        unused = [names[k] for k in range(len(names)) if k not in merged]
        if unused:
            raise ValueError(
                f"every threshold must guard a leaf that has a gradient, but {unused} guard none "
                "and would only add noise: remove them"
            )
        return ClipRule(merged, _stack([thresholds[name] for name in names], step), _shrink)

    return _clip(rule)


def clip_automatic(
    threshold: FloatOrSchedule = 1.0, *, stability: float = 0.01, per_layer: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Normalises each sample's gradient instead of clipping it: no threshold to tune.

    $$ \sum_i g_i \frac{C}{\lVert g_i \rVert_2 + \gamma}, \qquad \Delta = C $$

    C only scales the update, so it is absorbed by the learning rate.

    Args:
      threshold: C > 0, a number or a schedule.
      stability: γ > 0, in the unit of the gradients. It keeps the small gradients small.
      per_layer: normalise each leaf by its own norm: Δ = √K·C for K leaves.

    Returns:
      A transformation from per-sample gradients to a `jaxdp.Bounded`.

    Raises:
      ValueError: C or γ is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_automatic(stability=1.0)
      >>> total, _ = tx.update(jnp.array([[3.0], [0.0]]), tx.init(jnp.zeros(1)))
      >>> total.value.round(4).tolist(), float(total.sensitivity)
      ([0.75], 1.0)

    Source: Bu et al. 2023, "Automatic Clipping: Differentially Private Deep Learning Made Easier
    and Stronger", equation 5.5 (AUTO-S).
    """
    check_threshold("threshold", threshold)
    check_number("stability", stability)
    check_bool("per_layer", per_layer, advice="Leave it out for one norm over all leaves.")

    def normalise(norms: jax.Array, thresholds: jax.Array) -> jax.Array:
        return thresholds / (norms + stability)

    def rule(params: Any, groups: Groups, step: jax.Array) -> ClipRule:
        if not per_layer:
            return ClipRule(groups, threshold_at(threshold, step), normalise)
        layers = _each_leaf(groups)
        return ClipRule(layers, _stack([threshold] * len(_members(layers)), step), normalise)

    return _clip(rule)


class ClipAdaptiveState(NamedTuple):
    """State of `jaxdp.clip_adaptive`.

    Attributes:
      step: logical step, int32 scalar.
      thresholds: C_t of the coming step, float32, scalar or `[K]`. Private already: releasable.
      counts: Σ_i (1[‖g_i‖ ≤ C_t] − ½) so far in this logical batch: raw until the step ends, when
        it goes back to zero.
      lowest: the least C_t, float32 scalar.
      highest: the largest C_t, float32 scalar.
      noise_multiplier: of the count released at the last logical step, relative to its
        sensitivity; NaN before the first.
      key: where the counts' noise comes from, of this purpose and these leaves alone. Secret.
    """

    step: jax.Array
    thresholds: jax.Array
    counts: jax.Array
    lowest: jax.Array
    highest: jax.Array
    noise_multiplier: jax.Array
    key: jax.Array

    purpose = COUNT_NOISE


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
    check_threshold("initial_threshold", initial_threshold)
    check_number("initial_threshold", initial_threshold)
    check_schedule("count_noise_multiplier", count_noise_multiplier, zero=True)
    check_number("expected_batch_size", expected_batch_size)
    check_schedule("learning_rate", learning_rate)
    advice = "Pass the share of samples that are not to be clipped."
    quantile = check_real("quantile", quantile, minimum=0, maximum=1, advice=advice)
    per_layer = check_bool("per_layer", per_layer, advice="Leave it out for one threshold.")

    def init(params: optax.Params) -> ClipAdaptiveState:
        shape = (len(jax.tree.leaves(params)),) if per_layer else ()
        own = own_key(key, COUNT_NOISE, params)
        drawn_alone(own, params)
        initial = jnp.asarray(initial_threshold, jnp.float32)
        lowest, highest = adaptive_limits(initial)
        return ClipAdaptiveState(
            step=jnp.zeros((), jnp.int32),
            thresholds=jnp.full(shape, initial),
            counts=jnp.zeros(shape, jnp.float32),
            lowest=lowest,
            highest=highest,
            noise_multiplier=jnp.full((), jnp.nan, jnp.float32),
            key=own,
        )

    def update(
        updates: Any,
        state: ClipAdaptiveState,
        params: optax.Params | None = None,
        *,
        is_last: ArrayLike = True,
        **_: Any,
    ) -> tuple[Any, ClipAdaptiveState]:
        if axes := sorted(untracked_axes()):
            raise NotImplementedError(
                f"clip_adaptive counts the samples of all devices, which it cannot see along {axes}"
                ": use jit with a sharded batch, or jax.shard_map with check_vma=True"
            )
        grads = _per_sample(updates, params)
        if per_layer:
            groups = _each_leaf(grads.groups)
            # The state has a place for every leaf, since init cannot know which are frozen.
            places = jnp.asarray(_members(groups))
            thresholds = state.thresholds[places]
        else:
            groups, places, thresholds = grads.groups, ..., state.thresholds
        bounded = grads.clipped_sum(ClipRule(groups, thresholds, _shrink))

        norms = grads.norms(groups)
        below = jnp.where(norms <= thresholds.reshape(1, -1), 0.5, -0.5).astype(jnp.float32)
        counts = jnp.sum(select_rows(grads.counted, below), axis=0).reshape(thresholds.shape)
        counts = summed_over_devices(counts, varying_axes(counts))
        counts = state.counts.at[places].add(counts)

        draw = step_key(state.key, state.step)
        noise_multiplier = value_at(count_noise_multiplier, state.step)
        alone = drawn_alone(draw, (counts, state.thresholds, noise_multiplier))
        noise_multiplier = jnp.where(alone & (noise_multiplier >= 0), noise_multiplier, jnp.nan)
        std = noise_multiplier * math.sqrt(thresholds.size) / 2  # one sample moves K counts by ½
        noise = normal(draw, counts.shape)
        error = 0.5 + (counts + std * noise) / expected_batch_size - quantile
        moved = state.thresholds * jnp.exp(-value_at(learning_rate, state.step) * error)
        moved = jnp.clip(moved, state.lowest, state.highest)

        def at_end(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(is_last, new, old)

        return bounded, ClipAdaptiveState(
            step=at_end(state.step + 1, state.step),
            thresholds=at_end(moved, state.thresholds),
            counts=at_end(jnp.zeros_like(counts), counts),
            lowest=state.lowest,
            highest=state.highest,
            noise_multiplier=at_end(noise_multiplier, state.noise_multiplier),
            key=state.key,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _clip(make_rule: MakeRule) -> optax.GradientTransformationExtraArgs:
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
        grads = _per_sample(updates, params)
        bounded = grads.clipped_sum(make_rule(grads.params, grads.groups, state.step))
        return bounded, ClipState(state.step + jnp.asarray(is_last, bool).astype(jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _shrink(norms: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Wishes every sample to stay as it is; the cap in `sample_weights` does the clipping."""
    return jnp.ones_like(norms)


def _per_sample(updates: Any, params: optax.Params | None) -> PerSampleGrads:
    """What came down the chain, as a handle; refuses what holds no per-sample gradients."""
    if isinstance(updates, Bounded):
        raise TypeError(
            "a clip takes per-sample gradients, got a Bounded, whose samples are summed already: "
            "keep one clip in the chain, and let jaxdp.add_noise follow it"
        )
    grads = updates if isinstance(updates, PerSampleGrads) else PerSampleGrads.from_arrays(updates)
    if params is not None:
        expected = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
        got = [leaf.shape for leaf in jax.tree.leaves(grads.params)]
        if got != expected:
            raise ValueError(
                "a clip takes per-sample gradients of shape [B, *param.shape], got shapes without "
                f"the sample axis {got} for parameters {expected}: take "
                "jax.vmap(jax.grad(loss_fn), (None, 0)) or jaxdp.per_sample_grads(loss_fn), not "
                "the gradient of a mean loss"
            )
    return grads


def _members(groups: Groups) -> list[int]:
    """Positions of the leaves that have a gradient."""
    return [leaf for leaf, group in enumerate(groups) if group is not None]


def _each_leaf(groups: Groups) -> Groups:
    """A group of its own for each leaf that has a gradient."""
    rank = {leaf: k for k, leaf in enumerate(_members(groups))}
    return tuple(rank.get(leaf) for leaf in range(len(groups)))


def _leaf_thresholds(threshold: Any, params: Any) -> list[FloatOrSchedule]:
    """One threshold for each leaf, from a number, a prefix tree or a flat list."""
    leaves = jax.tree.structure(params).num_leaves
    if isinstance(threshold, list | tuple) and not isinstance(params, type(threshold)):
        if len(threshold) != leaves:
            raise ValueError(
                f"threshold must hold one number for each of the {leaves} leaves of the "
                f"parameters, got {len(threshold)}"
            )
        return list(threshold)
    return prefix_leaves("threshold", threshold, params)


def _stack(thresholds: list[FloatOrSchedule], step: jax.Array) -> jax.Array:
    return jnp.stack([threshold_at(threshold, step) for threshold in thresholds])
