"""The choice of a gradient clip's threshold among candidates, by the sparse vector technique.

    counts_fn = jax.jit(lipschitz.unclipped_counts(loss_fn, 1.0, values, leaf="clip/clip_value"))
    counts = sum(counts_fn(state.params, batch, mask) for batch, mask in all_the_data)
    clip_value = lipschitz.select_clip_value(
        counts, values, quantile=0.8, expected_count=60_000, epsilon=0.05, key=key, step=state.step)
    ledger = ledger.charge_pure(0.05)

Choose a threshold every few epochs, instead of counting at every step as `track_quantile` does. Put
the value into the parameters, and keep its leaf out of training (`bounded_grads(..., trainable=)`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxdp.checks import (
    check_array,
    check_integer,
    check_real,
    check_reals,
    shown,
)
from jaxdp.distributions import laplace
from jaxdp.lipschitz.bounds import input_limits
from jaxdp.lipschitz.gradients import admitted
from jaxdp.problem import LossFn, Problem, check_function, pose
from jaxdp.randomness import SELECTION_NOISE, drawn_alone, fingerprint, own_key, step_key
from jaxdp.schedules import check_number

# With a smaller ε the noise would exceed the integers in which it is compared.
_SMALLEST_EPSILON = 1e-7
_LARGEST_COUNT = 2**30

Candidates = Sequence[float] | ArrayLike
"""Public thresholds C_1 < ... < C_J."""


def unclipped_counts(
    loss_fn: LossFn, input_bound: Any, candidates: Candidates, *, leaf: str
) -> Callable[..., jax.Array]:
    r"""Counts the samples that an `adaptive_gradient_clip` would not clip. NOT private.

    $$ q_j = \#\{i : \lVert g_i \rVert_2 \le C_j\} $$

    Here g_i is the cotangent of sample i at the clip. `track_quantile` follows the same count, read
    off the same gradient of the threshold. One forward pass, and a backward pass down to the clip,
    serve all candidates. Counts of disjoint batches add up to those of the whole data set.

    Args:
      loss_fn: the loss of one example, as for `bounded_grads`.
      input_bound: the bound with which `bounded_grads` trains. Longer examples are scaled down, and
        examples that are not finite are left out.
      candidates: C_1 < ... < C_J, each > 0, for `select_clip_value`.
      leaf: path of the clip's threshold in the parameters, as in "clip/clip_value". It is the name
        in `bounds(...).by_name`.

    Returns:
      `counts_fn(params, batch, mask=None, **kwargs) -> int32 [J]`, in ascending order. Masked rows
      count for nothing. A sample with a cotangent of zero is not clipped, and counts.

    Raises:
      TypeError: `loss_fn` is no function.
      ValueError: candidates out of range or order; (when called) no scalar leaf of that name.

    Example:
      >>> from jaxdp import lipschitz
      >>> layer = lipschitz.adaptive_gradient_clip()
      >>> loss_fn = lambda params, x: x * layer.apply(params, jnp.zeros_like(x))
      >>> counts_fn = unclipped_counts(loss_fn, 1.0, [0.1, 0.5, 0.9], leaf="clip_value")
      >>> print(counts_fn(layer.init(jax.random.key(0)), jnp.array([0.05, 0.3, 0.4, 0.95])))
      [1 3 3]
    """
    check_function(loss_fn)
    thresholds = _ascending(candidates)

    def counts_fn(
        params: Any, batch: Any, mask: jax.Array | None = None, **kwargs: Any
    ) -> jax.Array:
        problem = pose(loss_fn, params, batch, mask, kwargs, has_aux=False, trainable=True)
        place = _place(leaf, problem)
        limits = input_limits(input_bound, batch)
        examples, counted = admitted(problem.batch.examples, problem.batch.mask, limits)

        def unclipped(threshold: jax.Array, example: Any) -> jax.Array:
            def loss(threshold: jax.Array) -> jax.Array:
                leaves = [*problem.leaves[:place], threshold, *problem.leaves[place + 1 :]]
                return problem.loss(leaves, example)[0]

            return jax.grad(loss)(threshold) >= 0

        by_sample = jax.vmap(unclipped, (None, 0))
        moved = jnp.asarray(thresholds, problem.leaves[place].dtype)
        found = jax.vmap(by_sample, (0, None))(moved, examples)
        # A sample that one candidate leaves as it is counts at all larger ones, too. It does
        # anyway where the clip stands once; the privacy of a selection rests on it everywhere.
        found = jax.lax.cummax(found.astype(jnp.int32), axis=0)
        return jnp.sum(jnp.where(counted, found, 0), axis=1, dtype=jnp.int32)

    return counts_fn


def select_clip_value(
    counts: ArrayLike,
    candidates: Candidates,
    *,
    quantile: float,
    expected_count: float,
    epsilon: float,
    key: jax.Array,
    step: ArrayLike,
) -> jax.Array:
    r"""The first candidate that enough samples stay below, chosen privately.

    $$ \min \{ j : q_j + \nu_j \ge \gamma n + \rho \}, \qquad
       \rho, \nu_1, \dots, \nu_J \sim \operatorname{Lap}(1/\varepsilon) $$

    or the last candidate if there is no such j. The index j is all that is released.

    Privacy notes:
      * One selection is ε-differentially private when an example is added or removed, and
        2ε-differentially private when one is replaced, for any number of candidates. The caller
        charges it, `Ledger.charge_pure(epsilon)`: nothing else tells the ledger.
      * This holds for the sums of `unclipped_counts` over disjoint batches, where a sample that
        counts at one candidate counts at all larger ones. Other counts need twice the noise, or
        more.
      * Count the whole data set, or a Poisson draw made for this selection alone; then charge
        `charge_pure(epsilon, PoissonSampling(q))`. Never count the batch of a step.
      * n is a public constant. The realised number of samples is as private as the counts.
      * Noise is drawn in float32, by `jaxdp.distributions.laplace`, whose tails reach 44. Nothing
        defends its lowest bits against attacks.

    Args:
      counts: q, integers `[J]`, from `unclipped_counts`.
      candidates: C_1 < ... < C_J that were counted, > 0. They may depend on the data only through
        earlier releases.
      quantile: γ in (0, 1), the share of samples that are not to be clipped.
      expected_count: n in (0, 2³⁰], the number of examples, or the expected size of the draw.
      epsilon: ε ≥ 1e-7. With probability 1 - β the noise moves no comparison by more than
        2 ln((J + 1)/β)/ε samples.
      key: a JAX key; it may be the key of the noise.
      step: number of this selection, such as the logical step, different for each selection with
        this key. Two selections with the same key and step draw the same noise; `selection_draws`
        tells a ledger.

    Returns:
      The value for the threshold's leaf, a float32 scalar; NaN where two members of a `vmap` have
      one key and step.

    Raises:
      TypeError: counts that are no integers.
      ValueError: an argument out of range, order or shape; under a `vmap` that maps the counts, but
        neither key nor step.

    Example:
      >>> counts = jnp.array([120, 480, 805, 990])
      >>> value = select_clip_value(counts, [0.1, 0.2, 0.4, 0.8], quantile=0.75,
      ...     expected_count=1000, epsilon=0.5, key=jax.random.key(0), step=0)
      >>> print(value)
      0.4

    Source: Dwork and Roth 2014, "The Algorithmic Foundations of Differential Privacy", algorithm 1;
    Lyu, Su, Li 2017, "Understanding the Sparse Vector Technique for Differential Privacy", whose
    scales for monotonic queries are twice these. The constants here are derived below.
    """
    thresholds = _ascending(candidates)
    counts = jnp.asarray(check_array("counts", counts, advice="Pass sums of unclipped_counts."))
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise TypeError(
            f"counts must be integers, got {counts.dtype}. Pass sums of unclipped_counts."
        )
    if counts.shape != thresholds.shape:
        raise ValueError(
            f"counts must have one entry for each of the {thresholds.size} candidates, got shape "
            f"{counts.shape}. Pass sums of unclipped_counts for the same candidates."
        )
    advice = "Pass the share of samples that are not to be clipped."
    quantile = check_real("quantile", quantile, above=0, below=1, advice=advice)
    check_number("expected_count", expected_count)
    advice = "Count a Poisson draw of the data, which costs less privacy, too."
    expected_count = check_real(
        "expected_count", expected_count, maximum=_LARGEST_COUNT, advice=advice
    )
    check_number("epsilon", epsilon)
    advice = "Less is a choice at random: make it without looking at the data."
    epsilon = check_real("epsilon", epsilon, minimum=_SMALLEST_EPSILON, advice=advice)
    # Why Lap(1/ε) is enough. Let D' be D with one example more. It counts from some candidate a
    # on: q'_i = q_i for i < a and q'_i = q_i + 1 for i ≥ a. Let x = γn + ρ, with density p, and
    #     P[j] = ∫ p(x) Π_{i<j} P[ν_i < x - q_i] P[ν_j ≥ x - q_j] dx.
    # j < a: nothing in it differs between D and D'. j ≥ a:
    # * P'[j] ≥ e^-ε P[j]. In P'[j] move x to x + 1, where p is at least e^-ε p(x). The last factor
    #   is that of P[j], as q'_j = q_j + 1; the others, P[ν_i < x + 1 - q'_i], are no smaller than
    #   those of P[j], as q'_i ≤ q_i + 1.
    # * P[j] ≥ e^-ε P'[j]. Leave x. The others are no smaller, as q_i ≤ q'_i; the last one is
    #   smaller by e^-ε at most, as q_j = q'_j - 1.
    # That none is reached has no last factor: by the same two steps it is within e^±ε. So each
    # direction pays for one of the two scales only. Were q'_j = q_j possible beside q'_i = q_i + 1
    # for an i < j, as where one example replaces another, the first would pay for both; were both
    # signs possible, too, twice for the second scale. To answer "none" by the last candidate is
    # post-processing.
    draw = step_key(own_key(key, SELECTION_NOISE, ()), _step(step))
    alone = drawn_alone(draw, counts)
    noise = laplace(draw, (thresholds.size + 1,)) / epsilon
    rho, nu = noise[0], noise[1:]
    # Whole numbers are compared, and none of the data is rounded: a float32 beyond 2²⁴ would move
    # by two where one example comes. 2³⁰ is more than the noise can be: at most 2·44.4/ε.
    needed = jnp.clip(jnp.ceil(rho - nu), -(2.0**30), 2.0**30).astype(jnp.int32)
    # Counts beyond int32 would come round to negative ones.
    largest = min(jnp.iinfo(counts.dtype).max, jnp.iinfo(jnp.int32).max)
    counts = jnp.minimum(counts, jnp.asarray(largest, counts.dtype)).astype(jnp.int32)
    margins = counts - round(quantile * expected_count)
    reached = (margins >= needed).at[-1].set(True)
    return jnp.where(alone, jnp.asarray(thresholds)[jnp.argmax(reached)], jnp.nan)


def selection_draws(key: jax.Array, step: int) -> tuple[tuple[str, str, int], ...]:
    """The noise that `select_clip_value` draws with a key and a step: (purpose, fingerprint, step).

    A second selection with both draws the same noise, and the two together may reveal what neither
    reveals alone. A ledger that knows these draws refuses the second one, as with
    `jaxdp.noise_draws`.

    Args:
      key: as for `select_clip_value`.
      step: as for `select_clip_value`, an integer that is known.

    Returns:
      One triple in a tuple, for `Ledger.charge_pure`.

    Example:
      >>> [(purpose, name, step)] = selection_draws(jax.random.key(0), step=3)
      >>> purpose, len(name), step
      ('selection noise', 64, 3)
    """
    return ((SELECTION_NOISE, fingerprint(own_key(key, SELECTION_NOISE, ())), int(_step(step))),)


def _step(step: Any) -> jax.Array:
    """The number of a selection, traced or not."""
    if isinstance(step, Tracer) and not step.ndim and jnp.issubdtype(step.dtype, jnp.integer):
        return step
    advice = "Count the selections with this key from zero."
    return jnp.asarray(check_integer("step", step, minimum=0, maximum=2**31 - 1, advice=advice))


def _ascending(candidates: Candidates) -> np.ndarray:
    """The candidates, float32 `[J]`."""
    advice = "Pass thresholds in ascending order."
    values = np.asarray(check_reals("candidates", candidates, above=0, advice=advice), np.float64)
    with np.errstate(over="ignore"):  # told below
        values = values.astype(np.float32)
    if not (np.all(np.isfinite(values)) and values[0] > 0 and np.all(np.diff(values) > 0)):
        raise ValueError(
            f"candidates must be finite, above 0 and ascending in float32, got {values.tolist()}. "
            "Leave out what float32 cannot tell apart."
        )
    return values


def _place(leaf: str, problem: Problem) -> int:
    """The index of the threshold among the leaves."""
    scalars = [
        name for name, value in zip(problem.names, problem.leaves, strict=True) if not value.shape
    ]
    if leaf not in scalars:
        raise ValueError(
            f"leaf must name a scalar parameter, the threshold of an adaptive_gradient_clip, got "
            f"{shown(leaf)}. The scalars here are {scalars}."
        )
    return problem.names.index(leaf)
