"""Clips of the cotangent in the backward pass, so that all bounds below them become small.

The threshold is fixed (`clip_gradient`, `gradient_clip`), or follows a quantile of the norms that
it meets (`adaptive_gradient_clip`). In the second case the threshold is one more parameter: its
gradient gets noise and is charged to the ledger as every other leaf. `select_clip_value` chooses
the threshold between epochs instead.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxdp.checks import check_array, check_real, shown
from jaxdp.clipping.thresholds import adaptive_limits
from jaxdp.engine.numerics import once, square_sums
from jaxdp.engine.rounding import roundings
from jaxdp.engine.walker import Equation
from jaxdp.lipschitz.declaration import declare
from jaxdp.lipschitz.rounding import divisor, up
from jaxdp.lipschitz.rules.registry import PullBack
from jaxdp.lipschitz.value import SHARED, Cotangent, Range, Value
from jaxdp.nn.composition import function
from jaxdp.nn.layer import Layer, Params
from jaxdp.schedules import check_number
from jaxdp.trees import is_float


def clip_gradient(x: jax.Array, clip_value: ArrayLike) -> jax.Array:
    """Returns x, and clips the cotangent g of x in the backward pass.

    The cotangent becomes g · min(1, C/‖g‖), and zero where g is not finite. So the
    bound on all gradients below becomes small, at the price of a bias where the clip acts. C has
    the unit of one example's gradient: also under `jax.vmap` each example is clipped alone, before
    any mean over the batch.

    Args:
      x: any shape. It must depend on the example; without that the clip has no bound.
      clip_value: C ≥ 0, a scalar that depends on no example. It may be traced; a negative one
        counts as zero.

    Returns:
      x.

    Raises:
      TypeError: x that holds no floating-point numbers; a clip value that is no number.
      ValueError: a clip value that is known and negative or not finite.

    Example:
      >>> loss_fn = lambda x: 10 * jnp.sum(clip_gradient(x, 1.0))
      >>> print(jax.grad(loss_fn)(jnp.ones(4)))
      [0.5 0.5 0.5 0.5]

    Source: Béthune et al. 2023, "DP-SGD Without Clipping: The Lipschitz Neural Network Way", with
    C per sample.
    """
    advice = "Clip an array that the loss is differentiated through."
    if not is_float(check_array("x", x, advice=advice)):
        raise TypeError(f"x must be of floating-point numbers, got {shown(x)}. {advice}")
    x = jnp.asarray(x)
    check_number("clip_value", clip_value, zero=True)
    return _clip_gradient(x, jnp.asarray(clip_value, x.dtype))


def gradient_clip(clip_value: float) -> Layer:
    """`clip_gradient` as a layer.

    Args:
      clip_value: C > 0.

    Returns:
      A layer, shape kept, without parameters.

    Raises:
      ValueError: C is not positive and finite.

    Example:
      >>> print(gradient_clip(1.0).apply({}, jnp.ones(2)))
      [1. 1.]
    """
    check_number("clip_value", clip_value)
    return function(lambda x: clip_gradient(x, clip_value))


def adaptive_gradient_clip(initial: float = 1.0) -> Layer:
    """`clip_gradient` at a threshold C that `track_quantile` or `select_clip_value` moves.

    The gradient of C for a sample is ½ if the cotangent of the sample was not clipped, -½ if it
    was, and zero if there is none. It is no derivative. Its sum over samples tells how many
    were clipped, which moves C towards a quantile, and its bound of ½ is the sensitivity of that
    sum.

    Args:
      initial: C at the start, > 0.

    Returns:
      A layer, shape kept. Parameters: clip_value, a scalar. Where it falls below zero it counts as
      zero.

    Raises:
      ValueError: C is not positive and finite.

    Example:
      >>> layer = adaptive_gradient_clip(0.5)
      >>> params = layer.init(jax.random.key(0))
      >>> loss_fn = lambda params, x: jnp.sum(layer.apply(params, x))
      >>> counts, clipped = jax.grad(loss_fn, argnums=(0, 1))(params, jnp.ones(4))
      >>> print(counts["clip_value"], clipped)
      -0.5 [0.25 0.25 0.25 0.25]

    Source: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", for the
    count, here of cotangents.
    """
    check_number("initial", initial)

    def apply(params: Params, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return _counted_clip(x, params["clip_value"])

    return Layer(init=lambda key: {"clip_value": initial * jnp.ones(())}, apply=apply)


class TrackQuantileState(NamedTuple):
    """State of `track_quantile`.

    Attributes:
      lowest: the least value of each threshold, like the thresholds.
      highest: the largest value of each threshold, like the thresholds.
    """

    lowest: Any
    highest: Any


def track_quantile(
    quantile: float = 0.5, *, learning_rate: float = 0.2, expected_batch_size: float
) -> optax.GradientTransformation:
    r"""The optimizer of the thresholds of `adaptive_gradient_clip`:

    $$ C \leftarrow C \exp(-\eta (\tilde b - \gamma)), \qquad
       \tilde b = \tfrac12 + \tfrac1B \Bigl( \sum_i (b_i - \tfrac12) + \text{noise} \Bigr) $$

    where b_i is one if sample i was not clipped, else zero. C stays between a millionth and a
    million times its value at `init`: where cotangents vanish it stops falling, and when they
    return it follows them.

    Args:
      quantile: γ in (0, 1), the quantile of the norms that C moves to.
      learning_rate: η > 0.
      expected_batch_size: B.

    Returns:
      A transformation from noised sums, which `jaxdp.add_noise` gives, to updates. Put it on the
      thresholds alone, by `optax.partition`.

    Raises:
      ValueError: an argument outside of its range; (in `update`) no params are given.

    Example:
      >>> import jaxdp
      >>> labels = lambda params: {"clip": "clip", "w": "weights"}
      >>> tx = optax.chain(
      ...     jaxdp.add_noise(1.0, jax.random.key(0), allocation="per_layer"),
      ...     optax.partition({
      ...         "clip": track_quantile(0.9, expected_batch_size=256.0),
      ...         "weights": optax.chain(optax.scale(1 / 256), optax.sgd(0.1)),
      ...     }, labels),
      ... )

    Source: as `adaptive_gradient_clip`, algorithm 1.
    """
    advice = "Pass the share of samples that are not to be clipped."
    quantile = check_real("quantile", quantile, above=0, below=1, advice=advice)
    check_number("learning_rate", learning_rate)
    check_number("expected_batch_size", expected_batch_size)

    def init(params: Any) -> TrackQuantileState:
        limits = [adaptive_limits(leaf) for leaf in jax.tree.leaves(params)]
        unflatten = jax.tree.structure(params).unflatten
        return TrackQuantileState(*map(unflatten, zip(*limits, strict=True)))

    def update(
        updates: Any, state: TrackQuantileState, params: Any = None
    ) -> tuple[Any, TrackQuantileState]:
        if params is None:
            raise ValueError(
                "track_quantile needs the parameters, got None. Call "
                "tx.update(updates, state, params)."
            )

        def moved(
            count: jax.Array, clip_value: jax.Array, lowest: jax.Array, highest: jax.Array
        ) -> jax.Array:
            kept = 0.5 + count / expected_batch_size
            target = clip_value * jnp.exp(-learning_rate * (kept - quantile))
            return jnp.clip(target, lowest, highest) - clip_value

        return jax.tree.map(moved, updates, params, state.lowest, state.highest), state

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


@jax.custom_vjp
def _clipping_identity(x: jax.Array, clip_value: jax.Array) -> jax.Array:
    return x


def _identity_forward(x: jax.Array, clip_value: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, clip_value


def _clipped_cotangent(clip_value: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    clip_value = jnp.maximum(clip_value, 0)
    cotangent = once(cotangent)
    size = _size(cotangent)
    factor = jnp.where(size <= clip_value, jnp.ones_like(size), clip_value / size)
    # A cotangent that is not finite is replaced by zeros: a factor of zero would keep NaN.
    clipped = jnp.where(jnp.isfinite(size), factor * cotangent, jnp.zeros_like(cotangent))
    return clipped, jnp.zeros_like(clip_value)


def _size(cotangent: jax.Array) -> jax.Array:
    """The L2 norm; entries are divided by the largest one first: squares vanish and overflow."""
    scale = divisor(jnp.max(jnp.abs(cotangent), initial=0))
    share = cotangent / scale
    return scale * jnp.sqrt(square_sums(share.reshape(1, -1))[0])


_clipping_identity.defvjp(_identity_forward, _clipped_cotangent)


def _clip_rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    x, clip_value = values
    if clip_value.array is None:
        raise NotImplementedError(
            f"a clip of gradients needs a threshold that depends on no example ({eqn.source}). "
            "Take it from the parameters, or a constant."
        )
    if not x.per_sample:
        raise NotImplementedError(
            f"a clip of gradients needs a value that depends on the example ({eqn.source}), since "
            f"{SHARED}. Put the clip behind the example."
        )

    # The norm, the quotient and the product are rounded.
    most = up(jnp.maximum(clip_value.high, 0), roundings(x.size) // 2 + 4)

    def pull_back(bounds: Sequence[Cotangent]) -> Sequence[Cotangent]:
        (bound,) = bounds
        # An infinite bound becomes finite here, since a cotangent that is not finite is dropped.
        return [None if bound is None else jnp.minimum(bound, most), None]

    return [x.range], pull_back


_clip_gradient = declare(_clipping_identity, _clip_rule, whole=True)


@jax.custom_vjp
def _counting_identity(x: jax.Array, clip_value: jax.Array) -> jax.Array:
    return x


def _counted_cotangent(clip_value: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    clipped, _ = _clipped_cotangent(clip_value, cotangent)
    size = _size(cotangent)
    within = jnp.where(size <= jnp.maximum(clip_value, 0), 0.5, -0.5).astype(clip_value.dtype)
    # A row without a sample has the cotangent zero, and must not be counted.
    return clipped, jnp.where(size > 0, within, 0)


_counting_identity.defvjp(_identity_forward, _counted_cotangent)


def _count_rule(eqn: Equation, values: Sequence[Value]) -> tuple[Sequence[Range], PullBack]:
    ranges, clipped = _clip_rule(eqn, values)

    def pull_back(bounds: Sequence[Cotangent]) -> Sequence[Cotangent]:
        return [clipped(bounds)[0], None if bounds[0] is None else jnp.float32(0.5)]

    return ranges, pull_back


_counted_clip = declare(_counting_identity, _count_rule, whole=True)
