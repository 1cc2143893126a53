r"""Losses of one example with a gradient that is bounded, whatever the prediction.

The bound on the gradient with respect to the prediction z, with Z the bound on its norm, K the
number of classes, and n the number of outputs:

| loss                           | bound                                     |
|--------------------------------|-------------------------------------------|
| softmax_cross_entropy          | √2, less where τZ is small: see there     |
| binary_cross_entropy           | min(1/√n, (√n/2 + τZ/4)/n)                |
| multiclass_hinge               | √((K − 1)/K)                              |
| cosine_similarity              | 1/ρ                                       |
| mean_absolute_error            | 1/√n                                      |
| kantorovich_rubinstein         | of p: see there                           |
| hinge_kantorovich_rubinstein   | α times the hinge's, plus the one above   |

Taken apart into primitives each of them has a bound, too, but a useless one. A label that is known
is refused outside of 0..K-1; a traced one there makes the loss NaN, while its gradient stays within
the bound: on the clipless road no example is dropped, so none may spoil the sum.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxdp.checks import check_array, check_real, check_sequence
from jaxdp.engine.numerics import once
from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.declaration import declare
from jaxdp.lipschitz.rounding import divisor, gamma, times
from jaxdp.lipschitz.rules.registry import PullBack
from jaxdp.lipschitz.value import Range, Value, scaled


def softmax_cross_entropy(
    logits: jax.Array, label: ArrayLike, *, temperature: float = 1.0
) -> jax.Array:
    r"""$-\frac1\tau \log \mathrm{softmax}(\tau z)_y$.

    Its gradient is p - e_y with p = softmax(τz), of norm at most √2. Where ‖z‖ ≤ Z it is also at
    most

    * √(1 - 1/K) + τZ/2: what it is at zero, and the softmax is ½-Lipschitz;
    * $\sqrt{q^2 + q\,p_{\max}}$, since the other entries are at most p_max and their sum is at
      most q, where $q = 1 - 1/(1 + (K-1)e^{\sqrt2 \tau Z})$ and, by Jensen's inequality,
      $p_{\max} = 1/(1 + (K-1)e^{-\tau Z\sqrt{K/(K-1)}})$.

    Args:
      logits: z, `[K]`, K ≥ 2.
      label: y, one integer in 0..K-1.
      temperature: τ > 0. The lower, the tighter the bound, and the nearer the loss to a linear
        one.

    Returns:
      The loss, a scalar.

    Raises:
      TypeError: logits that are no floating-point numbers; a label that is no integer.
      ValueError: logits that are no vector of at least two classes; labels that are no scalar; a
        known label out of range; a temperature outside of [1e-12, 1e12].

    Example:
      >>> print(softmax_cross_entropy(jnp.zeros(4), 1).round(3))
      1.386

    Source: Béthune et al. 2023, "DP-SGD Without Clipping: The Lipschitz Neural Network Way". The
    Jacobian of the softmax is diag(p) - pp', whose rows have absolute sums 2p(1 - p) ≤ ½.
    """
    classes = _check_logits("softmax_cross_entropy", logits)
    label = _checked_label(label, classes)
    loss = _softmax_cross_entropy(_scale("temperature", temperature), classes)
    return _or_nan(loss(logits, label), label)


def binary_cross_entropy(
    logits: jax.Array, targets: ArrayLike, *, temperature: float = 1.0
) -> jax.Array:
    r"""The mean over outputs of $\frac1\tau$ times the cross-entropy of sigmoid(τz).

    Args:
      logits: z, any shape with n entries.
      targets: of the same shape, in [0, 1]; cut to it.
      temperature: τ > 0.

    Returns:
      The loss, a scalar.

    Raises:
      TypeError: logits that are no floating-point numbers.
      ValueError: targets of another shape; a temperature outside of [1e-12, 1e12].

    Example:
      >>> print(binary_cross_entropy(jnp.zeros(4), jnp.ones(4)).round(3))
      0.693
    """
    targets = _checked_target("binary_cross_entropy", "logits", logits, "targets", targets)
    count = math.prod(logits.shape)
    return _binary_cross_entropy(_scale("temperature", temperature), count)(logits, targets)


def multiclass_hinge(logits: jax.Array, label: ArrayLike, *, margin: float = 1.0) -> jax.Array:
    r"""$\frac1K \sum_{k \ne y} \max(0, m - z_y + z_k)$.

    Args:
      logits: z, `[K]`, K ≥ 2.
      label: y, one integer in 0..K-1.
      margin: m > 0.

    Returns:
      The loss, a scalar.

    Raises:
      TypeError: logits that are no floating-point numbers; a label that is no integer.
      ValueError: logits that are no vector of at least two classes; labels that are no scalar; a
        known label out of range; a margin outside of [1e-12, 1e12].

    Example:
      >>> print(multiclass_hinge(jnp.array([0.0, 2.0, 1.5, 0.0]), 1))
      0.125

    Source: Crammer and Singer 2001, "On the Algorithmic Implementation of Multiclass Kernel-based
    Vector Machines", as a sum over classes.
    """
    classes = _check_logits("multiclass_hinge", logits)
    label = _checked_label(label, classes)
    return _or_nan(_hinge(_scale("margin", margin), classes)(logits, label), label)


def cosine_similarity(
    prediction: jax.Array, target: ArrayLike, *, least_norm: float = 1.0
) -> jax.Array:
    r"""$-\langle z / \max(\lVert z\rVert, \rho),\; t / \max(\lVert t\rVert, \rho) \rangle$.

    Args:
      prediction: z, any shape.
      target: t, of the same shape.
      least_norm: ρ > 0, which keeps the slope finite at zero.

    Returns:
      The loss, a scalar in [-1, 1].

    Raises:
      TypeError: a prediction of no floating-point numbers.
      ValueError: targets of another shape; a norm outside of [1e-12, 1e12].

    Example:
      >>> print(cosine_similarity(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])).round(3))
      -0.707
    """
    target = _checked_target("cosine_similarity", "prediction", prediction, "target", target)
    least = _scale("least_norm", least_norm)
    return _cosine(least, math.prod(prediction.shape))(prediction, target)


def mean_absolute_error(prediction: jax.Array, target: ArrayLike) -> jax.Array:
    r"""$\frac1n \sum_j |z_j - t_j|$.

    Args:
      prediction: z, any shape with n entries.
      target: t, of the same shape.

    Returns:
      The loss, a scalar.

    Raises:
      TypeError: a prediction of no floating-point numbers.
      ValueError: targets of another shape.

    Example:
      >>> print(mean_absolute_error(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])))
      1.5
    """
    target = _checked_target("mean_absolute_error", "prediction", prediction, "target", target)
    return _mean_absolute_error(math.prod(prediction.shape))(prediction, target)


def kantorovich_rubinstein(
    logits: jax.Array, label: ArrayLike, *, proportions: Sequence[float]
) -> jax.Array:
    r"""The Kantorovich-Rubinstein loss of one class against all others, averaged over classes:

    $$ -\frac1K \Bigl( \frac{z_y}{p_y} - \sum_{k \ne y} \frac{z_k}{1 - p_k} \Bigr) $$

    Its mean over samples estimates the mean over classes of
    $\mathbb{E}[z_k \mid y \ne k] - \mathbb{E}[z_k \mid y = k]$. The usual form divides by the
    class counts of the batch, and so couples samples: one that is alone in its class outweighs
    all others. Here the proportions are constants, which must be public.

    Args:
      logits: z, `[K]`, K ≥ 2.
      label: y, one integer in 0..K-1.
      proportions: p_k, of each class in the data, in [1e-6, 1 - 1e-6].

    Returns:
      The loss, a scalar.

    Raises:
      TypeError, ValueError: as `multiclass_hinge`.
      ValueError: a proportion outside of [1e-6, 1 - 1e-6], or another number of them than of
        classes.

    Example:
      >>> print(kantorovich_rubinstein(jnp.array([1.0, 0.0]), 0, proportions=(0.5, 0.5)))
      -1.0

    Source: Serrurier et al. 2021, "Achieving Robustness in Classification Using Optimal Transport
    With Hinge Regularization", per sample.
    """
    classes = _check_logits("kantorovich_rubinstein", logits)
    label = _checked_label(label, classes)
    return _or_nan(_kantorovich_rubinstein(_public(proportions, classes))(logits, label), label)


def hinge_kantorovich_rubinstein(
    logits: jax.Array,
    label: ArrayLike,
    *,
    proportions: Sequence[float],
    alpha: float = 10.0,
    margin: float = 1.0,
) -> jax.Array:
    """α times `multiclass_hinge` plus `kantorovich_rubinstein`.

    Args:
      logits, label, proportions: as for `kantorovich_rubinstein`.
      alpha: α > 0.
      margin: as for `multiclass_hinge`.

    Returns:
      The loss, a scalar.

    Raises:
      TypeError, ValueError: as `kantorovich_rubinstein`; an α outside of [1e-12, 1e12].

    Example:
      >>> half = (0.5, 0.5)
      >>> print(hinge_kantorovich_rubinstein(jnp.array([1.0, 0.0]), 0, proportions=half, alpha=2.0))
      -1.0

    Source: as `kantorovich_rubinstein`.
    """
    alpha = _scale("alpha", alpha)
    hinge = multiclass_hinge(logits, label, margin=margin)
    return alpha * hinge + kantorovich_rubinstein(logits, label, proportions=proportions)


def _scale(name: str, value: object) -> float:
    return check_real(
        name, value, minimum=_LEAST, maximum=1 / _LEAST, advice="Beyond it float32 overflows."
    )


_LEAST = 1e-12
_OF_ONE_EXAMPLE = "Give the values of one example, as an array."


def _check_logits(loss: str, logits: Any) -> int:
    """How many classes there are."""
    shape = tuple(jnp.shape(check_array("logits", logits, advice=_OF_ONE_EXAMPLE)))
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(
            f"logits must be the [K] of one example, K at least 2, in {loss}, got shape {shape}. "
            "Map it over further axes (jax.vmap), and use binary_cross_entropy for one logit."
        )
    _check_floating("logits", logits)
    return shape[0]


def _check_floating(name: str, array: Any) -> None:
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating-point numbers, got dtype {dtype}. Convert them (astype)."
        )


def _checked_label(label: Any, classes: int) -> jax.Array:
    """The label as int32, -1 for every one that is no class."""
    check_array("label", label, advice="Give the class of one example, an integer.")
    dtype, shape = jnp.result_type(label), tuple(jnp.shape(label))
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"label must be one integer, got dtype {dtype}. Convert it (astype), and one-hot "
            "labels with jnp.argmax."
        )
    if shape:
        raise ValueError(
            f"label must be one integer, got shape {shape}. Give one label for each example, and "
            "one-hot labels as jnp.argmax of them."
        )
    if not isinstance(label, Tracer) and not 0 <= int(label) < classes:
        raise ValueError(
            f"label must be in 0..{classes - 1}, got {int(label)}. Count classes from zero, one "
            "logit for each."
        )
    label = jnp.asarray(label)
    if jnp.iinfo(dtype).bits < 32:  # which may not hold the number of classes
        label = label.astype(jnp.int32)
    is_class = (label >= 0) & (label < classes)
    within = jnp.where(is_class, label, jnp.zeros_like(label)).astype(jnp.int32)
    return jnp.where(is_class, within, -1)


def _or_nan(loss: jax.Array, label: jax.Array) -> jax.Array:
    """The loss, NaN for a label of no class; its gradient is what it is."""
    return loss + jnp.where(label >= 0, 0, jnp.nan).astype(loss.dtype)


def _checked_target(loss: str, name: str, array: Any, target_name: str, target: Any) -> jax.Array:
    """The target in the dtype of the prediction."""
    _check_floating(name, check_array(name, array, advice=_OF_ONE_EXAMPLE))
    check_array(target_name, target, advice=_OF_ONE_EXAMPLE)
    shape, other = tuple(jnp.shape(array)), tuple(jnp.shape(target))
    if shape != other:
        raise ValueError(
            f"{target_name} must have the shape of the {name}, {shape}, in {loss}, got shape "
            f"{other}. Give the values of one example."
        )
    dtype = jnp.result_type(target)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{target_name} must be real, got dtype {dtype}. Give its parts apart.")
    return jnp.asarray(target).astype(jnp.result_type(array))


def _declared(
    fun: Callable[[jax.Array, jax.Array], jax.Array],
    slope: Callable[[Value], ArrayLike],
    *,
    count: int,
    reach: float = 1.0,
    at_zero: float = math.inf,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The loss of so many outputs, with a bound on its gradient with respect to the first argument.

    Args:
      fun: the loss.
      slope: that bound, of exact arithmetic, at least ½ or in proportion to the gradient.
      count: of the outputs.
      reach: by what the prediction is multiplied.
      at_zero: a bound on the loss at zero, for any target.
    """

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        prediction, target = values
        if target.moves:
            raise NotImplementedError(
                f"no bound is known for a target that depends on parameters ({eqn.source}): use "
                "jax.lax.stop_gradient on it"
            )
        # Sums over the outputs, of shares or of squares, are what is rounded; a margin between two
        # outputs must not overflow.
        rounded = 1 + 4 * gamma(count + 16)
        steepest = times(slope(prediction), rounded) + 0 * times(4 * reach, prediction.norm)
        size = at_zero + times(steepest, prediction.norm)
        return [Range(size)], lambda bounds: [scaled(bounds[0], steepest), None]

    return declare(fun, rule, linear=True)


def _is_label(logits: jax.Array, label: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1]) == label


def _log_softmax(logits: jax.Array) -> jax.Array:
    """That of `jax.nn`, finite for finite logits also where a compiler rounds these in one way for
    their maximum and in another for the difference: no difference is above zero, and no sum of the
    exponentials below one."""
    below = logits - jax.lax.stop_gradient(jnp.max(logits))
    below = jnp.where(below > 0, 0, below)
    total = jnp.sum(jnp.exp(below))
    return below - jnp.log(jnp.where(total < 1, 1, total))


@functools.cache
def _softmax_cross_entropy(temperature: float, classes: int) -> Callable[..., jax.Array]:
    def softmax_cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
        log_shares = _log_softmax(once(temperature * logits))
        # A sum, not a look-up, which gives NaN for a label that is no class.
        return -jnp.sum(log_shares, where=_is_label(logits, label)) / temperature

    def slope(logits: Value) -> jax.Array:
        reach = times(temperature, logits.norm)
        near_zero = math.sqrt(1 - 1 / classes) + reach / 2
        missing = 1 - 1 / (1 + (classes - 1) * jnp.exp(math.sqrt(2) * reach))
        spread = math.sqrt(classes / (classes - 1))
        most = 1 / (1 + (classes - 1) * jnp.exp(-spread * reach))
        bounded = jnp.sqrt(jnp.square(missing) + missing * most)
        return jnp.minimum(jnp.minimum(near_zero, bounded), math.sqrt(2))

    at_zero = math.log(classes) / temperature
    return _declared(
        softmax_cross_entropy, slope, count=classes, reach=temperature, at_zero=at_zero
    )


@functools.cache
def _binary_cross_entropy(temperature: float, count: int) -> Callable[..., jax.Array]:
    def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
        targets = jnp.clip(targets, 0, 1)
        scaled_logits = temperature * logits
        losses = jax.nn.softplus(scaled_logits) - targets * scaled_logits
        return jnp.mean(losses) / temperature

    def slope(logits: Value) -> jax.Array:
        entries = max(count, 1)
        reach = times(temperature, logits.norm)
        near = (math.sqrt(entries) / 2 + reach / 4) / entries
        return jnp.minimum(1 / math.sqrt(entries), near)

    at_zero = math.log(2) / temperature
    return _declared(binary_cross_entropy, slope, count=count, reach=temperature, at_zero=at_zero)


@functools.cache
def _hinge(margin: float, classes: int) -> Callable[..., jax.Array]:
    def multiclass_hinge(logits: jax.Array, label: jax.Array) -> jax.Array:
        here = _is_label(logits, label)
        gaps = jax.nn.relu(margin - jnp.sum(logits, where=here) + logits)
        return jnp.sum(gaps, where=~here) / classes

    slope = math.sqrt(1 - 1 / classes)
    return _declared(multiclass_hinge, lambda _: slope, count=classes, at_zero=margin)


@functools.cache
def _cosine(least_norm: float, count: int) -> Callable[..., jax.Array]:
    def shortened(vector: jax.Array) -> jax.Array:
        # Divided by its largest entry first: no square overflows, and the root, which has no
        # gradient at zero, is taken of one at least.
        vector = once(vector)
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vector), initial=0))
        scale = divisor(jnp.maximum(largest, least_norm))
        vector = vector / scale
        return vector * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(vector)), 1))

    def cosine_similarity(prediction: jax.Array, target: jax.Array) -> jax.Array:
        return -jnp.sum(shortened(prediction) * shortened(target))

    return _declared(cosine_similarity, lambda _: 1 / least_norm, count=count, at_zero=0)


@functools.cache
def _mean_absolute_error(count: int) -> Callable[..., jax.Array]:
    def mean_absolute_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.abs(prediction - target))

    return _declared(mean_absolute_error, lambda _: 1 / math.sqrt(max(count, 1)), count=count)


@functools.cache
def _kantorovich_rubinstein(proportions: tuple[float, ...]) -> Callable[..., jax.Array]:
    count = len(proportions)
    own = [1 / share for share in proportions]
    other = [1 / (1 - share) for share in proportions]

    def kantorovich_rubinstein(logits: jax.Array, label: jax.Array) -> jax.Array:
        here = _is_label(logits, label)
        weights = jnp.where(here, -jnp.asarray(own), jnp.asarray(other)).astype(logits.dtype)
        return jnp.sum(weights * logits) / count

    # A label outside of 0..K-1 belongs to no class.
    labels = [*range(count), None]
    norms = [
        math.hypot(*(own[k] if k == label else other[k] for k in range(count))) for label in labels
    ]
    slope, reach = max(norms) / count, max(own + other)
    return _declared(kantorovich_rubinstein, lambda _: slope, count=count, reach=reach, at_zero=0)


def _public(proportions: Sequence[float], classes: int) -> tuple[float, ...]:
    advice = "Give the share of each class in the data, as public numbers."
    shares = check_sequence("proportions", proportions, advice=advice)
    if len(shares) != classes:
        raise ValueError(
            f"proportions must hold one number for each of the {classes} classes, got "
            f"{len(shares)}. Give the share of each class in the data."
        )
    return tuple(
        check_real("proportions", share, minimum=1e-6, maximum=1 - 1e-6, advice=advice)
        for share in shares
    )
