r"""Noise: from a `Bounded` sum to plain arrays that are private.

    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.1, key), optax.scale(1 / 256), ...)

For group k of sensitivity Δ_k the released value is v_k + s_k·N(0, I). One step is K Gaussian
mechanisms on the same batch, which cost as much as one of noise multiplier

$$ \sigma_{\text{eff}} = \Bigl( \sum_k (\Delta_k / s_k)^2 \Bigr)^{-1/2}, $$

| allocation   | s_k                        | σ_eff               |
|--------------|----------------------------|---------------------|
| "global"     | σ·(ΣΔ_j²)^(1/2)            | σ                   |
| "per_layer"  | σ·Δ_k                      | σ/√K                |
| (c_1 … c_K)  | σ·c_k·Δ_k                  | σ·(Σc_k⁻²)^(−1/2)   |
| "optimal"    | σ·(Δ_k·S/√n_k)^(1/2)       | σ                   |

with n_k the number of entries of group k and S = Σ_j Δ_j·√n_j. The law of the noise and how far it
is from N(0, I) stand in `jaxdp.distributions`.
"""

# The types of JAX and optax are partly unknown.
# pyright: reportMissingTypeStubs=false
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from jaxdp.bounded import Bounded, is_zero, root_sum_squares
from jaxdp.checks import check_sequence, shown
from jaxdp.distributions import normal
from jaxdp.engine.numerics import accumulation_dtype
from jaxdp.per_sample import PerSampleGrads
from jaxdp.randomness import GRADIENT_NOISE, drawn_alone, drawn_by_place, leaf_key
from jaxdp.released import Released
from jaxdp.schedules import FloatOrSchedule, check_number, check_schedule, value_at
from jaxdp.shares import placed, placed_like, share_of
from jaxdp.varying import devices_along, varying_axes


def add_noise(
    noise_multiplier: FloatOrSchedule,
    key: jax.Array,
    allocation: str | Sequence[float] = "global",
    sharding: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds Gaussian noise calibrated to the sensitivity of a `jaxdp.Bounded`.

    Args:
      noise_multiplier: σ ≥ 0, noise standard deviation relative to the sensitivity of adding or
        removing one sample, or a schedule of the logical step. 0 is no privacy: the sum itself.
      key: a JAX key, of one run: `jaxdp.random_key()`. The noise of a leaf at a step is drawn from
        a key derived from `key`, the purpose, the step, and the leaf's place and path in the tree.
        Another run with this key, or this one begun anew, draws the same noise again: give it
        another key (`noise_draws` is what a ledger tells them apart by). Each member of a `vmap`
        needs its own.
      allocation: which standard deviation each group of the clip gets (see the table above).
        "global" gives every leaf the same one. "per_layer" gives each group noise in proportion
        to its own sensitivity. A sequence of K numbers c_k > 0 does so, too, and multiplies the
        noise of group k by c_k. "optimal" gives the least total noise power at the same privacy
        as "global".
      sharding: of the rows of the batch, where parameters are the same on all devices under `jit`.
        The numbers are the same without it; with it each device draws its share of them alone. A
        mesh with explicit axes, as `jax.make_mesh` makes them, says by itself what lies where.

    Returns:
      A transformation from `Bounded` to plain arrays: noise is drawn and added in at least
      float32, then cast to the dtypes of the parameters where `update` is given them. Integer and
      frozen leaves get zeros. Everything behind it is post-processing. On several devices it is
      drawn once: where a leaf is spread over devices each draws its own part, where it is the same
      on several each draws a share, adds it and gathers what the others made (a small leaf is drawn
      by all alike), and the result lies as the parameter does. Which devices there are changes no
      number.

    The result is NaN wherever the stated noise cannot be drawn: in all leaves where a schedule of σ
    goes below zero or is not finite; where σ > 0 and a sample can move a leaf whose standard
    deviation is not finite or below tiny/ε of its precision, 1e-31 in float32; where two members of
    a `vmap` have one key; where a traced `is_last` is false.

    Raises:
      ValueError: σ negative or not finite; an unknown allocation, or one of the wrong length.
      TypeError: (in `update`) what comes in is no `Bounded`.
      ValueError: (in `update`) the sum of one of several devices; `is_last=False`; (in both) under
        a `vmap` that maps what is released, but not the key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = add_noise(2.0, jax.random.key(0))
      >>> total = Bounded(jnp.zeros(10_000), sensitivity=3.0)
      >>> noised, state = tx.update(total, tx.init(jnp.zeros(10_000)))
      >>> 5.8 < float(noised.std()) < 6.2, float(state.noise_multiplier)
      (True, 2.0)

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1;
    McMahan et al. 2018, "A General Approach to Adding Differential Privacy to Iterative Training
    Procedures", theorem 1 (several Gaussians as one).
    """
    check_schedule("noise_multiplier", noise_multiplier, zero=True)
    allocated = _allocation(allocation)

    def init(params: optax.Params) -> Released:
        return Released.begin(key, GRADIENT_NOISE, params)

    def update(
        updates: Any,
        state: Released,
        params: optax.Params | None = None,
        *,
        is_last: ArrayLike = True,
        **_: Any,
    ) -> tuple[Any, Released]:
        bounded = _bounded(updates)
        _check_summed(bounded)
        draw = state.coming_key()
        sigma = value_at(noise_multiplier, state.step)
        alone = drawn_alone(state.key, (bounded.value, bounded.sensitivity, sigma, params))
        # Noise for a part of a logical batch is a release that nobody accounts for, noise that
        # another member of a vmap draws, too, cancels, and a negative σ is none at all.
        sigma = jnp.where(_whole(is_last) & alone & (sigma >= 0), sigma, jnp.nan)
        sensitivity = jnp.atleast_1d(bounded.sensitivity)
        stds = allocated.deviations(sensitivity, _group_sizes(bounded, sensitivity.dtype))
        noised = _noised(bounded, sigma, stds, draw, params, sharding)
        return noised, state.after(sigma * allocated.effective(sensitivity.size))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _whole(is_last: ArrayLike) -> jax.Array:
    if isinstance(is_last, bool | np.bool_) and not is_last:
        raise ValueError(
            "add_noise must see a whole logical batch, got is_last=False. Put it into "
            "jaxdp.accumulate(...), which adds up the physical batches first."
        )
    return jnp.asarray(is_last, bool)


def _bounded(updates: Any) -> Bounded:
    if isinstance(updates, Bounded):
        updates.check_groups()
        return updates
    kind = "PerSampleGrads" if isinstance(updates, PerSampleGrads) else "arrays"
    raise TypeError(
        f"add_noise must get a jaxdp.Bounded, whose sensitivity sets the noise, got {kind}. Put a "
        "clip (jaxdp.clip_flat, clip_per_layer, ...) right before it in the chain."
    )


def _check_summed(bounded: Bounded) -> None:
    """Refuses the sum of one device: noise for each of them is not what the ledger is charged."""
    if bounded.unsummed:
        axes = ", ".join(repr(axis) for axis in sorted(bounded.unsummed))
        raise ValueError(
            "add_noise must get a sum over the samples of all devices, got one of those along "
            f"{axes} alone. Put jaxdp.distributed.all_reduce({axes}) right behind the clip."
        )


class _Allocation(NamedTuple):
    """How σ is allocated to K groups.

    Attributes:
      deviations: `(sensitivities [K], entries per group [K]) -> standard deviations [K]` at σ = 1.
        No square of a sensitivity on the way: below 1e-19 it would vanish, and all noise with it.
      effective: K -> σ_eff at σ = 1. In closed form: computed from the deviations it would wobble
        in its last digits from step to step, and every wobble be a mechanism of its own to account.
    """

    deviations: Callable[[jax.Array, jax.Array], jax.Array]
    effective: Callable[[int], float]


def _same_for_all(sensitivity: jax.Array, sizes: jax.Array) -> jax.Array:
    return jnp.full_like(sensitivity, root_sum_squares(sensitivity))


def _least_power(sensitivity: jax.Array, sizes: jax.Array) -> jax.Array:
    # Minimises Σ n_k s_k² at Σ (Δ_k/s_k)² = 1, by Lagrange: s_k² ∝ Δ_k/√n_k. Relative to the
    # largest Δ, roots taken apart.
    roots = jnp.sqrt(jnp.maximum(sizes, 1))
    largest = jnp.max(sensitivity)
    total = jnp.sum(sensitivity / jnp.where(largest > 0, largest, 1) * roots)
    return jnp.sqrt(sensitivity) * jnp.sqrt(largest) * jnp.sqrt(total / roots)


def _relative_to_own(sensitivity: jax.Array, sizes: jax.Array) -> jax.Array:
    return sensitivity


def _whole_sigma(groups: int) -> float:
    return 1.0


def _root_of_groups(groups: int) -> float:
    return groups**-0.5


_NAMED = {
    "global": _Allocation(_same_for_all, _whole_sigma),
    "optimal": _Allocation(_least_power, _whole_sigma),
    "per_layer": _Allocation(_relative_to_own, _root_of_groups),
}


def _allocation(allocation: str | Sequence[float]) -> _Allocation:
    if isinstance(allocation, str):
        if allocation not in _NAMED:
            raise ValueError(
                f"allocation must be one of {sorted(_NAMED)} or a sequence of coefficients, got "
                f"{shown(allocation)}. Pass one of these strings, or one number for each group."
            )
        return _NAMED[allocation]

    advice = f"Pass one of {sorted(_NAMED)}, or one number for each group."
    coefficients = check_sequence("allocation", allocation, minimum=1, advice=advice)
    for k, coefficient in enumerate(coefficients):
        check_number(f"allocation[{k}]", coefficient)

    def scaled(sensitivity: jax.Array, sizes: jax.Array) -> jax.Array:
        if len(coefficients) != sensitivity.size:
            raise ValueError(
                f"allocation must hold one coefficient for each of the {sensitivity.size} groups "
                f"of the clip, got {len(coefficients)}. {advice}"
            )
        return sensitivity * jnp.asarray(coefficients, sensitivity.dtype)

    def effective(groups: int) -> float:
        return sum(c**-2 for c in coefficients) ** -0.5

    return _Allocation(scaled, effective)


def _group_sizes(bounded: Bounded, dtype: Any) -> jax.Array:
    """How many entries each group has, `[K]`."""
    sizes = [0] * max(bounded.sensitivity.size, 1)
    for leaf, group in zip(jax.tree.leaves(bounded.value), bounded.groups, strict=True):
        if group is not None:
            sizes[group] += leaf.size * devices_along(varying_axes(leaf))
    return jnp.asarray(sizes, dtype)


def _noised(
    bounded: Bounded,
    sigma: jax.Array,
    stds: jax.Array,
    key: jax.Array,
    params: optax.Params | None,
    rows: NamedSharding | None,
) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(bounded.value)
    parameters = [None] * len(leaves) if params is None else treedef.flatten_up_to(params)
    sensitivities = jnp.atleast_1d(bounded.sensitivity)

    def release(
        index: int, path: Any, leaf: jax.Array, group: int | None, parameter: Any
    ) -> jax.Array:
        at, share = jax.typeof(leaf).sharding, None
        if group is not None:
            leaf = leaf.astype(accumulation_dtype(leaf.dtype))
            std = _deviation(sigma, stds[group], sensitivities[group], leaf.dtype)
            share = share_of(leaf, rows) if drawn_by_place(key) else None
            leaf = _with_noise(leaf, std, leaf_key(key, index, path), share)
        if parameter is not None:
            # Before it is gathered: half a precision is half the numbers to send.
            leaf = leaf.astype(jnp.result_type(parameter))
        whole = leaf if share is None else placed(leaf, at)
        return whole if parameter is None else placed_like(whole, parameter)

    released = [
        release(index, path, leaf, group, parameter)
        for index, ((path, leaf), group, parameter) in enumerate(
            zip(leaves, bounded.groups, parameters, strict=True)
        )
    ]
    return jax.tree.unflatten(treedef, released)


def _with_noise(
    leaf: jax.Array, std: jax.Array, key: jax.Array, share: NamedSharding | None
) -> jax.Array:
    """One leaf of the sum with noise; where there are shares each device has that of its own."""
    at = jax.typeof(leaf).sharding if share is None else share

    def noised(leaf: jax.Array, std: jax.Array, key: jax.Array) -> jax.Array:
        part = leaf if share is None else placed(leaf, share)
        noise = _normal_like(part, key, at)
        # By selection: where σ is zero, Δ may be as large as it likes.
        return jnp.where(is_zero(std), part, part + std * noise)

    # What is drawn on several devices is one program on all of them, outside of `jit`, too.
    return jax.jit(noised)(leaf, std, key) if _is_divided(at) else noised(leaf, std, key)


def _deviation(sigma: jax.Array, unit: jax.Array, sensitivity: jax.Array, dtype: Any) -> jax.Array:
    """The standard deviation in the precision of a leaf: NaN where it is not what was asked for."""
    wide = max(unit.dtype, jnp.dtype(dtype), key=lambda each: each.itemsize)
    std = (sigma.astype(wide) * unit.astype(wide)).astype(dtype)
    # Any smaller, and a product of it with the noise would vanish with a chance that counts.
    smallest = jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps
    drawn = (std >= smallest) & jnp.isfinite(std)
    still = is_zero(sensitivity) & jnp.isfinite(std) & (std >= 0)
    std = jnp.where(drawn | still, std, jnp.nan)
    return jnp.where(is_zero(sigma), jnp.zeros_like(std), std)


def _normal_like(leaf: jax.Array, key: jax.Array, at: NamedSharding) -> jax.Array:
    """Standard normal noise for a leaf, each part of it made where it lies: the same on all devices
    that hold the same part, independent on those that hold others."""
    for axis in sorted(varying_axes(leaf)):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return normal(key, leaf.shape, leaf.dtype, at if _is_divided(at) else None)


def _is_divided(at: NamedSharding) -> bool:
    return any(entry is not None for entry in at.spec)
