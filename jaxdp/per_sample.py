"""Per-sample gradients of the loss of one example, as a lazy handle.

grads_fn = jaxdp.per_sample_grads(loss_fn)
grads = grads_fn(params, batch, mask)      # nothing is computed yet
updates, state = tx.update(grads, state)   # tx begins with one of jaxdp's clips
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from jaxdp.bounded import Bounded, Groups
from jaxdp.checks import check_instance
from jaxdp.engine.methods.base import Reducer
from jaxdp.engine.methods.dense import GivenRows
from jaxdp.engine.numerics import select_rows
from jaxdp.engine.reduction import Batch, Reduction, Rows, zero_sum
from jaxdp.engine.rounding import joint_norm
from jaxdp.engine.weighting import (
    ClipRule,
    GivenWeights,
    Weighting,
    check_groups,
    finite_rows,
    group_norms,
)
from jaxdp.options import Options
from jaxdp.problem import (
    LossFn,
    batch_size,
    checked_mask,
    merged_tree,
    trainable_groups,
    with_gradient,
)
from jaxdp.varying import sample_axes, varying_axes


class PerSampleGrads:
    """Per-sample gradients of one batch, computed when they are asked for.

    It lives inside one function: it is no array and no pytree, so that nothing can be mapped over
    it and it cannot cross a `jit`, `scan` or `vmap` boundary. Build it with
    `jaxdp.per_sample_grads` (or `from_arrays`) and hand it to a clip in the same function.

    Everything it returns is computed from raw data and NOT private.

    Example:
      >>> grads = PerSampleGrads.from_arrays(jnp.array([[3.0, 4.0], [0.0, 1.0]]))
      >>> print(grads.norms().round(3), grads.weighted_sum(jnp.ones(2)), grads.materialize().shape)
      [5. 1.] [3. 5.] (2, 2)
    """

    def __init__(self, reducer: Reducer, batch: Batch, params: Any, groups: Groups):
        """For the engine; users call `jaxdp.per_sample_grads`.

        Args:
          reducer: computes over the leaves that have a gradient.
          batch: the rows.
          params: the parameters' structure, a pytree of `jax.ShapeDtypeStruct`.
          groups: 0 for each leaf of `params` that has a gradient, `None` for the others.
        """
        self._reducer = reducer
        self._batch = batch
        self._groups = groups
        self.params = params
        self._seen: tuple[Any, Reduction] | None = None

    @classmethod
    def from_arrays(cls, grads: Any, mask: jax.Array | None = None) -> "PerSampleGrads":
        """Wraps materialised gradients: a pytree of `[B, *param.shape]`, as `vmap(grad)` gives.

        Args:
          grads: the gradients; leaves that are not floating-point take no part.
          mask: bool `[B]`; rows that are False count for nothing.

        Returns:
          A handle on these gradients.

        Raises:
          TypeError, ValueError: the leaves are not arrays with one common leading axis B; inside
            `shard_map`, no mask tells along which axes the samples are spread.
        """
        count = batch_size(grads, "per-sample gradients")
        grads = jax.tree.map(jnp.asarray, grads)
        params = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), grads)
        groups = trainable_groups(params, trainable=True)
        rows = Rows(with_gradient(jax.tree.leaves(grads), groups), None, None)
        checked = checked_mask(mask, count)
        unknown = sorted(varying_axes(rows.grads) - varying_axes(checked))
        if unknown:
            raise ValueError(
                f"gradients given as arrays that differ along {unknown} may be of other samples "
                "there, or of another part of the model. Use jaxdp.per_sample_grads(loss_fn), or "
                "PerSampleGrads.from_arrays(grads, mask) with a mask that differs along all of "
                "them."
            )
        return cls(GivenRows(), Batch(rows, checked), params, groups)

    @property
    def batch_size(self) -> int:
        """B, the number of rows, masked ones included."""
        return self.mask.shape[0]

    @property
    def mask(self) -> jax.Array:
        """Bool `[B]`: which rows hold a sample."""
        return self._batch.mask

    @property
    def groups(self) -> Groups:
        """For each leaf of `params` 0, or `None` where it has no gradient (integer or frozen)."""
        return self._groups

    @property
    def losses(self) -> jax.Array:
        """Per-sample losses `[B]`, zero in masked rows. Not private."""
        losses = self._reduction().losses
        if losses is None:
            raise ValueError(
                "losses are unknown for gradients given as arrays. Use jaxdp.per_sample_grads."
            )
        return losses

    @property
    def aux(self) -> Any:
        """What the loss returned beside its value, `[B, ...]`; masked rows hold garbage."""
        return self._reduction().aux

    @property
    def counted(self) -> jax.Array:
        """Bool `[B]`: rows that hold a sample whose gradient has a norm that is known to be
        finite; the others count for nothing. Not private."""
        return self.mask & finite_rows(self._reduction().norms)

    @property
    def nonfinite(self) -> jax.Array:
        """How many samples count for nothing because their gradient is not finite. int32 scalar.
        Not private."""
        return jnp.sum(self.mask & ~self.counted, dtype=jnp.int32)

    def norms(self, groups: Groups | None = None) -> jax.Array:
        """Per-sample L2 norms: `[B]` over the whole tree, or `[B, K]` for K groups of leaves.

        They are certificates: never below the norm of the gradient, nor of what a clip makes of
        it, rounding included. Above it by a relative 1e-6 to 1e-5 as a rule, where a weight is
        shared by T positions by up to 1% for T = 512, and by more where the gradients at the
        positions cancel. About 1e-19 times the root of its size for a gradient of zeros.

        Args:
          groups: for each leaf of the parameters a group index in 0..K-1 (`None`: left out).

        Returns:
          The norms, zero in masked rows.

        Raises:
          TypeError: a group is no integer.
          ValueError: the groups have a gap, or are not those of the leaves that have a gradient.
        """
        norms = self._reduction().norms
        if groups is None:
            return joint_norm(norms)
        check_groups(groups)
        return group_norms(norms, self._kept(groups))

    def clipped_sum(self, rule: ClipRule) -> Bounded:
        """Σ_i w_i g_i with the weights of the rule, as a `Bounded` of sensitivity C.

        Args:
          rule: what a clip asks for, such as groups of leaves and their thresholds.

        Returns:
          The sum, with the thresholds of the rule as sensitivities.

        Raises:
          TypeError: a group is no integer; the weight is no function.
          ValueError: the groups have a gap, or are not those of the leaves that have a gradient;
            there is not one threshold for each.
        """
        check_instance("rule", rule, ClipRule, advice="Pass a jaxdp.engine.weighting.ClipRule.")
        rule.check()
        kept = replace(rule, groups=self._kept(rule.groups))
        sums = self._reduce(self._batch, kept)
        value = self._tree(sums, zero_sum)
        axes = sample_axes(self.mask)
        return Bounded(value, jnp.maximum(rule.thresholds, 0), rule.groups, axes)

    def weighted_sum(self, weights: ArrayLike) -> Any:
        """Σ_i w_i g_i for weights `[B]`: a pytree like the parameters. No bound is claimed.

        Rows that are masked, have weight zero or are not `counted` count for nothing.

        Args:
          weights: w, one number for each row.

        Returns:
          The sum; zeros at leaves without a gradient.

        Raises:
          ValueError: weights of another shape.
        """
        weights = jnp.asarray(weights)
        if weights.shape != self.mask.shape:
            raise ValueError(
                f"weights must have shape {self.mask.shape}, got {weights.shape}. Pass one number "
                "for each row."
            )

        groups = (0,) * sum(group is not None for group in self._groups)
        sums = self._reduce(self._batch._replace(weights=weights), GivenWeights(groups))
        return self._tree(sums, zero_sum)

    def materialize(self) -> Any:
        """The per-sample gradients themselves: a pytree of `[B, *param.shape]`.

        Masked rows are zero; leaves without a gradient are zeros of the leaf's dtype.

        Returns:
          Arrays in the dtypes of the parameters.
        """
        grads = self._reducer.rows(self._batch).grads
        rows = [select_rows(self.mask, grad) for grad in grads]

        def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros((self.batch_size, *leaf.shape), leaf.dtype)

        return self._tree(rows, zeros)

    def __repr__(self) -> str:
        return f"PerSampleGrads(batch_size={self.batch_size})"

    def _reduce(self, batch: Batch, weighting: Weighting) -> list[jax.Array]:
        reduction = self._reducer.reduce(batch, weighting)
        self._seen = (get_opaque_trace_state(), reduction._replace(sums=[]))
        return reduction.sums

    def _reduction(self) -> Reduction:
        """Norms, losses and aux: of the last reduction if that ran in this very trace (a tracer
        of another one must not be used here), else computed."""
        trace = get_opaque_trace_state()
        if self._seen is None or self._seen[0] != trace:
            self._seen = (trace, self._reducer.reduce(self._batch, None))
        return self._seen[1]

    def _kept(self, groups: Groups) -> Groups:
        """The groups of the leaves that have a gradient."""
        if tuple(group is None for group in groups) != tuple(g is None for g in self._groups):
            raise ValueError(
                f"groups must be None exactly where a leaf has no gradient, {self._groups}, "
                f"got {groups}. Number the groups of the other leaves."
            )
        return tuple(group for group in groups if group is not None)

    def _tree(self, moving: list[jax.Array], zeros: Callable[[Any], jax.Array]) -> Any:
        """Values of the leaves that have a gradient, and zeros for the others, as a pytree like
        the parameters."""
        return merged_tree(self.params, self._groups, moving, zeros)


def _refuse_to_flatten(_: PerSampleGrads) -> Any:
    raise TypeError(
        "PerSampleGrads is a lazy handle on one batch: it cannot be mapped over, nor cross jit, "
        "scan or vmap, nor go through a transformation ahead of the clip, which could mix samples. "
        "Give it to a clip (jaxdp.clip_flat, ...) in the function that made it, whole, and let the "
        "result through."
    )


# Registered only to refuse: as an unknown leaf, optax would do arithmetic on it and JAX would
# complain about a type, neither of which tells the user what to do.
jax.tree_util.register_pytree_node(PerSampleGrads, _refuse_to_flatten, _refuse_to_flatten)  # pyright: ignore[reportArgumentType]


def per_sample_grads(
    loss_fn: LossFn,
    *,
    has_aux: bool = False,
    method: str = "auto",
    memory_budget: int | None = None,
    microbatch_size: int | None = None,
    trainable: Any = True,
    sharding: NamedSharding | None = None,
) -> Callable[..., PerSampleGrads]:
    r"""Turns the loss of ONE example into a function that gives per-sample gradients of a batch.

    $$ g_i = \nabla_\theta\, \ell(\theta, x_i), \qquad i = 1, \dots, B $$

    Norms and clipped sums are computed from operands and output cotangents of the layers, without
    the gradients themselves wherever that is possible; `jaxdp.explain` tells where it is not.

    Args:
      loss_fn: `(params, example, **kwargs) -> scalar`, pure, without a batch axis anywhere. With
        `has_aux`, `-> (scalar, aux)`. Randomness (dropout) enters as one key per sample in the
        batch: `example = (x, y, key)`.
      has_aux: whether the loss returns a pair; the pairs' second parts are `.aux`.
      method: how to compute. All methods give the same numbers up to rounding; norms are rounded
        up, by about 1e-7 for each position that shares a weight. "slots" runs one backward pass
        and keeps its operands and cotangents until the norms are known. "taps" computes the norms
        in one backward pass and the sums in a second; it keeps operands and cotangents of values
        in half precision only. "fused" runs as "slots" does, but clips every group of leaves as
        soon as the norms of that group are known, which saves memory for per-layer rules. "dense"
        materialises every per-sample gradient, as `vmap(grad)` does. "auto" chooses "slots". For a
        loss that uses `jax.checkpoint` it takes microbatches that keep no more than the ordinary
        gradient does, and "taps" where these microbatches would be too small.
      memory_budget: bytes of operands and cotangents (of gradients, for "dense") that may be kept
        until the norms are known; the workspace of a single layer comes on top. "auto" chooses a
        method that fits; where none does, microbatches that fit. Where rows lie on several devices
        it is the budget of each device, for its own rows.
      microbatch_size: at most this many samples at a time. Needs their memory only; the numbers
        are the same up to the order of summation. Where all rows are masked, as at the end of a
        batch that is filled up, nothing is computed: how long a step takes tells how many samples
        it had, up to a microbatch.
      trainable: bool, or a pytree prefix of the parameters of bools: leaves under False are
        frozen. They are not differentiated, get no noise, and are zero in the sum. Integer leaves
        are always frozen. What follows the noise may move them all the same, as weight decay does:
        `jaxdp.training.make_step` puts them back; a loop of your own ends its chain with
        `optax.masked(optax.set_to_zero(), frozen)`, or closes over what it does not train.
      sharding: of the rows of the batch, where these lie on several devices under `jit`. Numbers
        are right without it; with it every device computes from its own rows, and all that devices
        exchange is one sum of gradients. A mesh with explicit axes, as `jax.make_mesh` makes them,
        says by itself where the rows are.

    Returns:
      `grads_fn(params, batch, mask=None, **kwargs) -> PerSampleGrads`. `batch` is any pytree of
      `[B, ...]` arrays, `mask` is bool `[B]` (False: the row is padding and counts for nothing,
      NaN included); keyword arguments go to `loss_fn` as they are, to every sample alike.

    Raises:
      TypeError: `loss_fn` does not return a real scalar; the mask is not bool; a parameter is a
        random key, or an attribute that is a Python number and not frozen.
      ValueError: batch leaves disagree on B; mask of another shape; nothing to differentiate;
        a budget that one sample exceeds; a layer that computes batch statistics; rows that do not
        divide among the devices; an effect that is not understood (see below).

    Refused is what may show one sample to another, or what cannot be followed, with its line, in
    backward rules, too: communication over an axis along which samples are spread; mutable arrays
    (one that the loss makes for itself is right with method="dense"); `io_callback` and ordered
    effects; and what may look at a whole batch (callbacks and foreign functions that are not mapped
    one by one, `custom_vmap`, kernels, primitives that are not JAX's), unless microbatch_size=1
    leaves nothing else to look at.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, example: (params["w"] @ example[0] - example[1]) ** 2 / 2
      >>> params = {"w": jnp.array([1.0, -1.0])}
      >>> batch = (jnp.array([[3.0, 4.0], [8.0, 6.0]]), jnp.array([0.0, 1.0]))
      >>> grads = per_sample_grads(loss_fn)(params, batch)
      >>> grads.norms().round(4).tolist()
      [5.0, 10.0]
      >>> grads.materialize()["w"].tolist()
      [[-3.0, -4.0], [8.0, 6.0]]

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1, line
    "compute gradient". The methods: see `jaxdp.engine`.
    """
    options = Options(loss_fn, has_aux, method, memory_budget, microbatch_size, trainable, sharding)
    options.check()

    def grads_fn(
        params: Any, batch: Any, mask: jax.Array | None = None, **kwargs: Any
    ) -> PerSampleGrads:
        problem = options.problem(params, batch, mask, kwargs)
        struct = jax.eval_shape(lambda params: params, problem.params)
        reducer = options.reducer(problem, kwargs)
        return PerSampleGrads(reducer, problem.batch, struct, problem.groups)

    return grads_fn
