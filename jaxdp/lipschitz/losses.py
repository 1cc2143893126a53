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

Taken apart into primitives each of them has a bound, too, but a useless one.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.declaration import declare
from jaxdp.lipschitz.rules.registry import PullBack
from jaxdp.lipschitz.value import Range, Value, scaled
from jaxdp.schedules import checked


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
      logits: z, `[K]`.
      label: y, an integer in 0..K-1.
      temperature: τ > 0. The lower, the tighter the bound, and the nearer the loss to a linear
        one.

    Returns:
      The loss, a scalar.

    Example:
      >>> print(softmax_cross_entropy(jnp.zeros(4), 1).round(3))
      1.386

    Source: Béthune et al. 2023, "DP-SGD Without Clipping: The Lipschitz Neural Network Way". The
    Jacobian of the softmax is diag(p) - pp', whose rows have absolute sums 2p(1 - p) ≤ ½.
    """
    checked("temperature", temperature)
    return _softmax_cross_entropy(temperature)(logits, jnp.asarray(label))


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

    Example:
      >>> print(binary_cross_entropy(jnp.zeros(4), jnp.ones(4)).round(3))
      0.693
    """
    checked("temperature", temperature)
    return _binary_cross_entropy(temperature)(logits, jnp.asarray(targets))


def multiclass_hinge(logits: jax.Array, label: ArrayLike, *, margin: float = 1.0) -> jax.Array:
    r"""$\frac1K \sum_{k \ne y} \max(0, m - z_y + z_k)$.

    Args:
      logits: z, `[K]`.
      label: y, an integer in 0..K-1.
      margin: m > 0.

    Returns:
      The loss, a scalar.

    Example:
      >>> print(multiclass_hinge(jnp.array([0.0, 2.0, 1.5, 0.0]), 1))
      0.125

    Source: Crammer and Singer 2001, "On the Algorithmic Implementation of Multiclass Kernel-based
    Vector Machines", as a sum over classes.
    """
    checked("margin", margin)
    return _hinge(margin)(logits, jnp.asarray(label))


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

    Example:
      >>> print(cosine_similarity(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])).round(3))
      -0.707
    """
    checked("least_norm", least_norm)
    return _cosine(least_norm)(prediction, jnp.asarray(target))


def mean_absolute_error(prediction: jax.Array, target: ArrayLike) -> jax.Array:
    r"""$\frac1n \sum_j |z_j - t_j|$.

    Args:
      prediction: z, any shape with n entries.
      target: t, of the same shape.

    Returns:
      The loss, a scalar.

    Example:
      >>> print(mean_absolute_error(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])))
      1.5
    """
    return _mean_absolute_error(prediction, jnp.asarray(target))


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
      logits: z, `[K]`.
      label: y, an integer in 0..K-1.
      proportions: p_k, of each class in the data, in (0, 1).

    Returns:
      The loss, a scalar.

    Raises:
      ValueError: a proportion outside of (0, 1), or another number of them than of classes.

    Example:
      >>> print(kantorovich_rubinstein(jnp.array([1.0, 0.0]), 0, proportions=(0.5, 0.5)))
      -1.0

    Source: Serrurier et al. 2021, "Achieving Robustness in Classification Using Optimal Transport
    With Hinge Regularization", per sample.
    """
    return _kantorovich_rubinstein(_public(proportions, logits))(logits, jnp.asarray(label))


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
      ValueError: as `kantorovich_rubinstein`.

    Example:
      >>> half = (0.5, 0.5)
      >>> print(hinge_kantorovich_rubinstein(jnp.array([1.0, 0.0]), 0, proportions=half, alpha=2.0))
      -1.0

    Source: as `kantorovich_rubinstein`.
    """
    checked("alpha", alpha)
    hinge = multiclass_hinge(logits, label, margin=margin)
    return alpha * hinge + kantorovich_rubinstein(logits, label, proportions=proportions)


def _declared(
    fun: Callable[[jax.Array, jax.Array], jax.Array], slope: Callable[[Value], ArrayLike]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The loss, with a bound on its gradient with respect to its first argument."""

    def rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
        prediction, target = values
        if target.moves:
            raise NotImplementedError(
                f"no bound is known for a target that depends on parameters ({eqn.source}): use "
                "jax.lax.stop_gradient on it"
            )
        steepest = slope(prediction)
        return [Range()], lambda bounds: [scaled(bounds[0], steepest), None]

    return declare(fun, rule)


def _is_label(logits: jax.Array, label: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1]) == label


@functools.cache
def _softmax_cross_entropy(temperature: float) -> Callable[..., jax.Array]:
    def softmax_cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
        log_shares = jax.nn.log_softmax(temperature * logits)
        # A sum, not a look-up: a label outside of 0..K-1 gives zero, not NaN.
        return -jnp.sum(log_shares, where=_is_label(logits, label)) / temperature

    def slope(logits: Value) -> jax.Array:
        classes = logits.size
        if classes < 2:
            return jnp.zeros(())  # the only class there is has probability one
        reach = temperature * logits.norm
        near_zero = math.sqrt(1 - 1 / classes) + reach / 2
        missing = 1 - 1 / (1 + (classes - 1) * jnp.exp(math.sqrt(2) * reach))
        spread = math.sqrt(classes / (classes - 1))
        most = 1 / (1 + (classes - 1) * jnp.exp(-spread * reach))
        bounded = jnp.sqrt(jnp.square(missing) + missing * most)
        return jnp.minimum(jnp.minimum(near_zero, bounded), math.sqrt(2))

    return _declared(softmax_cross_entropy, slope)


@functools.cache
def _binary_cross_entropy(temperature: float) -> Callable[..., jax.Array]:
    def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
        targets = jnp.clip(targets.astype(logits.dtype), 0, 1)
        scaled_logits = temperature * logits
        losses = jax.nn.softplus(scaled_logits) - targets * scaled_logits
        return jnp.mean(losses) / temperature

    def slope(logits: Value) -> jax.Array:
        count = max(logits.size, 1)
        near = (math.sqrt(count) / 2 + temperature * logits.norm / 4) / count
        return jnp.minimum(1 / math.sqrt(count), near)

    return _declared(binary_cross_entropy, slope)


@functools.cache
def _hinge(margin: float) -> Callable[..., jax.Array]:
    def multiclass_hinge(logits: jax.Array, label: jax.Array) -> jax.Array:
        here = _is_label(logits, label)
        gaps = jax.nn.relu(margin - jnp.sum(logits, where=here) + logits)
        return jnp.sum(gaps, where=~here) / logits.size

    return _declared(multiclass_hinge, lambda logits: math.sqrt(1 - 1 / max(logits.size, 1)))


@functools.cache
def _cosine(least_norm: float) -> Callable[..., jax.Array]:
    def shortened(vector: jax.Array) -> jax.Array:
        squared = jnp.sum(jnp.square(vector))
        # Not the maximum of norms: the root has no gradient at zero.
        return vector * jax.lax.rsqrt(jnp.maximum(squared, least_norm**2))

    def cosine_similarity(prediction: jax.Array, target: jax.Array) -> jax.Array:
        return -jnp.sum(shortened(prediction) * shortened(target))

    return _declared(cosine_similarity, lambda _: 1 / least_norm)


def _absolute_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(prediction - target))


_mean_absolute_error = _declared(_absolute_error, lambda z: 1 / math.sqrt(max(z.size, 1)))


@functools.cache
def _kantorovich_rubinstein(proportions: tuple[float, ...]) -> Callable[..., jax.Array]:
    count = len(proportions)
    if count < 2 or not all(0 < share < 1 for share in proportions):
        raise ValueError(f"proportions must be in (0, 1), one for each class, got {proportions}")
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
    return _declared(kantorovich_rubinstein, lambda _: max(norms) / count)


def _public(proportions: Sequence[float], logits: Any) -> tuple[float, ...]:
    shares = tuple(float(share) for share in proportions)
    if len(shares) != logits.size:
        raise ValueError(
            f"proportions must hold one number for each of the {logits.size} classes, got "
            f"{len(shares)}"
        )
    return shares
