"""Losses of the margin between the logit of the label and the others."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdp.checks import check_real, check_sequence
from jaxdp.lipschitz.losses.arguments import (
    check_logits,
    checked_label,
    checked_scale,
)
from jaxdp.lipschitz.losses.declared import declared, is_label, nan_without_class


def multiclass_hinge(logits: jax.Array, label: ArrayLike, *, margin: float = 1.0) -> jax.Array:
    """Σ_{k≠y} max(0, m - z_y + z_k) / K.

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
    classes = check_logits("multiclass_hinge", logits)
    label = checked_label(label, classes)
    return nan_without_class(_hinge(checked_scale("margin", margin), classes)(logits, label), label)


def kantorovich_rubinstein(
    logits: jax.Array, label: ArrayLike, *, proportions: Sequence[float]
) -> jax.Array:
    r"""The Kantorovich-Rubinstein loss of one class against all others, averaged over classes:

    $$ -\frac1K \Bigl( \frac{z_y}{p_y} - \sum_{k \ne y} \frac{z_k}{1 - p_k} \Bigr) $$

    Its mean over samples estimates the mean over classes of E[z_k | y ≠ k] - E[z_k | y = k]. The
    usual form divides by the class counts of the batch, and so couples samples: one that is alone
    in its class outweighs all others. Here the proportions are constants, which must be public.

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
    classes = check_logits("kantorovich_rubinstein", logits)
    label = checked_label(label, classes)
    return nan_without_class(
        _kantorovich_rubinstein(_shares(proportions, classes))(logits, label), label
    )


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
    alpha = checked_scale("alpha", alpha)
    hinge = multiclass_hinge(logits, label, margin=margin)
    return alpha * hinge + kantorovich_rubinstein(logits, label, proportions=proportions)


@functools.cache
def _hinge(margin: float, classes: int) -> Callable[..., jax.Array]:
    def multiclass_hinge(logits: jax.Array, label: jax.Array) -> jax.Array:
        here = is_label(logits, label)
        gaps = jax.nn.relu(margin - jnp.sum(logits, where=here) + logits)
        return jnp.sum(gaps, where=~here) / classes

    slope = math.sqrt(1 - 1 / classes)
    return declared(multiclass_hinge, lambda _: slope, count=classes, at_zero=margin)


@functools.cache
def _kantorovich_rubinstein(proportions: tuple[float, ...]) -> Callable[..., jax.Array]:
    count = len(proportions)
    own = [1 / share for share in proportions]
    other = [1 / (1 - share) for share in proportions]

    def kantorovich_rubinstein(logits: jax.Array, label: jax.Array) -> jax.Array:
        here = is_label(logits, label)
        weights = jnp.where(here, -jnp.asarray(own), jnp.asarray(other)).astype(logits.dtype)
        return jnp.sum(weights * logits) / count

    # A label outside of 0..K-1 belongs to no class.
    labels = [*range(count), None]
    norms = [
        math.hypot(*(own[k] if k == label else other[k] for k in range(count))) for label in labels
    ]
    slope, reach = max(norms) / count, max(own + other)
    return declared(kantorovich_rubinstein, lambda _: slope, count=count, reach=reach, at_zero=0)


def _shares(proportions: Sequence[float], classes: int) -> tuple[float, ...]:
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
