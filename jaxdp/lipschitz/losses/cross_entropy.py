"""Cross-entropies: of one class among several, and of outputs that are each true or false."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdp.engine.numerics import once
from jaxdp.lipschitz.losses.arguments import (
    check_logits,
    checked_label,
    checked_scale,
    checked_target,
)
from jaxdp.lipschitz.losses.declared import declared, is_label, nan_without_class
from jaxdp.lipschitz.rounding import times
from jaxdp.lipschitz.value import Value


def softmax_cross_entropy(
    logits: jax.Array, label: ArrayLike, *, temperature: float = 1.0
) -> jax.Array:
    """-log(softmax(τz)_y) / τ.

    Its gradient is p - e_y with p = softmax(τz), of norm at most √2. Where ‖z‖ ≤ Z it is also at
    most

    * √(1 - 1/K) + τZ/2: what it is at zero, and the softmax is ½-Lipschitz;
    * √(q² + q p_max), since the other entries are at most p_max and their sum is at most q, where
      q = 1 - 1/(1 + (K-1) exp(√2 τZ)) and, by Jensen's inequality,
      p_max = 1/(1 + (K-1) exp(-τZ √(K/(K-1)))).

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
    classes = check_logits("softmax_cross_entropy", logits)
    label = checked_label(label, classes)
    loss = _softmax_cross_entropy(checked_scale("temperature", temperature), classes)
    return nan_without_class(loss(logits, label), label)


def binary_cross_entropy(
    logits: jax.Array, targets: ArrayLike, *, temperature: float = 1.0
) -> jax.Array:
    """The mean over outputs of the cross-entropy of sigmoid(τz), divided by τ.

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
    targets = checked_target("binary_cross_entropy", "logits", logits, "targets", targets)
    count = math.prod(logits.shape)
    return _binary_cross_entropy(checked_scale("temperature", temperature), count)(logits, targets)


def _log_softmax(logits: jax.Array) -> jax.Array:
    """`jax.nn.log_softmax`, made finite for all finite logits.

    A compiler may round the logits in one way for their maximum and in another for the difference.
    So no difference is taken above zero, and no sum of the exponentials below one.
    """
    below = logits - jax.lax.stop_gradient(jnp.max(logits))
    below = jnp.where(below > 0, 0, below)
    total = jnp.sum(jnp.exp(below))
    return below - jnp.log(jnp.where(total < 1, 1, total))


@functools.cache
def _softmax_cross_entropy(temperature: float, classes: int) -> Callable[..., jax.Array]:
    def softmax_cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
        log_shares = _log_softmax(once(temperature * logits))
        # A sum, not a look-up, which gives NaN for a label that is no class.
        return -jnp.sum(log_shares, where=is_label(logits, label)) / temperature

    def slope(logits: Value) -> jax.Array:
        reach = times(temperature, logits.norm)
        near_zero = math.sqrt(1 - 1 / classes) + reach / 2
        missing = 1 - 1 / (1 + (classes - 1) * jnp.exp(math.sqrt(2) * reach))
        spread = math.sqrt(classes / (classes - 1))
        most = 1 / (1 + (classes - 1) * jnp.exp(-spread * reach))
        bounded = jnp.sqrt(jnp.square(missing) + missing * most)
        return jnp.minimum(jnp.minimum(near_zero, bounded), math.sqrt(2))

    at_zero = math.log(classes) / temperature
    return declared(softmax_cross_entropy, slope, count=classes, reach=temperature, at_zero=at_zero)


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
    return declared(binary_cross_entropy, slope, count=count, reach=temperature, at_zero=at_zero)
