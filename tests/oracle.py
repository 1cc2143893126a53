"""Per-sample gradients computed without jaxdp, and the check of a handle's answers against them.

The reference is `vmap(grad)` in double precision. Norms, clip weights and sums are recomputed from
it with NumPy in float64, never with jaxdp's own rules: both must be right for a check to pass.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from tests.helpers import is_float

# Methods that compute without materialising, whatever the program.
METHODS = ("auto", "slots", "taps", "fused")


class Case(NamedTuple):
    """A loss of one example, data for it, and how closely its gradients must be met.

    Attributes:
      loss_fn: `(params, example) -> loss`, or `(loss, aux)`.
      params: pytree.
      batch: pytree of `[B, ...]`.
      options: for `per_sample_grads`: has_aux, trainable.
      tolerance: relative error of norms and sums.
      double: whether the reference runs in double precision. False for a program that rounds to
        a narrower type, or draws random numbers in the type of its input: there double precision
        is another program, and the reference runs in the program's own types.
    """

    loss_fn: Callable[[Any, Any], Any]
    params: Any
    batch: Any
    options: Mapping[str, Any] = {}
    tolerance: float = 1e-5
    double: bool = True


class Reference(NamedTuple):
    """Per-sample gradients in float64.

    Attributes:
      moving: for each leaf of the parameters whether it has a gradient.
      grads: `[B, *leaf.shape]` of each leaf that has one.
      losses: `[B]`.
      aux: pytree of `[B, ...]`, None without aux.
    """

    moving: list[bool]
    grads: list[np.ndarray]
    losses: np.ndarray
    aux: Any


def every_method(names: Iterable[str], slow: Iterable[str] = ()) -> list[Any]:
    """Names with methods. The default run takes one method of each in turn, the rest is slow.

    A mistake in what the methods share shows with any of them; one in a method shows in many rows.

    Args:
      names: of the cases.
      slow: names that are slow with every method.
    """

    def pair(index: int, name: str, method: str) -> Any:
        default = method == METHODS[index % len(METHODS)] and name not in slow
        marks = () if default else pytest.mark.slow
        return pytest.param(name, method, marks=marks, id=f"{name}-{method}")

    return [pair(index, name, method) for index, name in enumerate(names) for method in METHODS]


def differentiate(case: Case) -> Reference:
    """The reference for every row of the batch."""
    leaves, treedef = jax.tree.flatten(case.params)
    trainable = case.options.get("trainable", True)
    flags = jax.tree.map(
        lambda flag, part: jax.tree.map(lambda _: flag, part), trainable, case.params
    )
    moving = [
        flag and is_float(leaf) for flag, leaf in zip(jax.tree.leaves(flags), leaves, strict=True)
    ]

    def loss(values: list[Any], fixed: list[Any], example: Any) -> tuple[jax.Array, Any]:
        moved, still = iter(values), iter(fixed)
        merged = jax.tree.unflatten(treedef, [next(moved if move else still) for move in moving])
        value = case.loss_fn(merged, example)
        return value if case.options.get("has_aux", False) else (value, None)

    with ExitStack() as stack:
        batch = case.batch
        if case.double:
            stack.enter_context(jax.enable_x64(True))
            # Casts to float32 inside of a program would meet float64, which strictness refuses.
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            leaves, batch = jax.tree.map(_double, (leaves, batch))
        values = [leaf for leaf, move in zip(leaves, moving, strict=True) if move]
        fixed = [leaf for leaf, move in zip(leaves, moving, strict=True) if not move]
        run = jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, None, 0))
        (losses, aux), grads = jax.jit(run)(values, fixed, batch)
        aux = jax.tree.map(_plain, aux)
        return Reference(moving, [_plain(grad) for grad in grads], _plain(losses), aux)


def check_against_oracle(
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    *,
    method: str,
    mask: Any = None,
    tolerance: float = 1e-5,
    double: bool = True,
    reference: Reference | None = None,
    **options: Any,
) -> None:
    """Raises AssertionError unless everything that a handle answers is right.

    Compared are norms per leaf and in total, the sums of a flat and of a per-layer clip whose
    thresholds about half of the samples exceed, a weighted sum, the materialised gradients, losses
    and aux. Errors are relative to the whole tree, so that a leaf whose gradient is zero may hold
    rounding errors.

    Args:
      loss_fn, params, batch, tolerance, double: see `Case`.
      method: how jaxdp computes.
      mask: bool `[B]`. Rows under False are filled with NaN: they must not count, whatever they
        hold.
      reference: of `differentiate`, if that has run for another method already.
      **options: for `per_sample_grads`: has_aux, trainable.
    """
    case = Case(loss_fn, params, batch, options, tolerance, double)
    count = len(jax.tree.leaves(batch)[0])
    mask = np.ones(count, bool) if mask is None else np.asarray(mask)
    truth = _Truth(differentiate(case) if reference is None else reference, mask)
    answers = _ask(case._replace(batch=_poisoned(batch, mask)), method, mask, truth)

    scale = _scale(truth)
    _check_norms("norm", answers.norms, truth.totals, scale, tolerance)
    for index, column in enumerate(truth.norms.T):
        name = f"norm of leaf {index}"
        _check_norms(name, answers.leaf_norms[:, index], column, scale, tolerance)
    assert not np.any(answers.norms[~mask]), "a masked row has a norm"
    assert not np.any(answers.losses[~mask]), "a masked row has a loss"

    _check_sums(answers, truth, tolerance)
    _check_rows(answers.rows, truth, mask, scale, tolerance)
    losses = np.where(mask, truth.reference.losses, 0)
    _check_values("losses", answers.losses, losses, tolerance)
    aux = jax.tree.leaves(truth.reference.aux)
    for got, expected in zip(jax.tree.leaves(answers.aux), aux, strict=True):
        _check_values("aux", got[mask], expected[mask], tolerance)
    assert answers.nonfinite == 0, "a finite sample is taken for one that is not"


def check_case(
    case: Case, method: str, mask: Any = None, reference: Reference | None = None
) -> None:
    """`check_against_oracle` of a case."""
    check_against_oracle(
        case.loss_fn,
        case.params,
        case.batch,
        method=method,
        mask=mask,
        tolerance=case.tolerance,
        double=case.double,
        reference=reference,
        **case.options,
    )


def check_spoiled_sample(case: Case, method: str, reference: Reference) -> None:
    """Raises AssertionError unless the sample that holds NaN, and it alone, counts for nothing.

    It is not masked: whatever computes the sums must leave it out by selection. Its weight is zero
    in the weighted sum.
    """
    everyone = np.ones(len(reference.losses), bool)
    others = np.arange(len(everyone)) != _SILENT
    truth = _Truth(reference, others)
    answers = _ask(case._replace(batch=_poisoned(case.batch, others)), method, everyone, truth)
    assert answers.nonfinite == 1
    scale = _scale(truth)
    norms = np.where(others, answers.norms, 0)
    _check_norms("norm", norms, truth.totals, scale, case.tolerance)
    _check_sums(answers, truth, case.tolerance)


# The sample whose weight is zero in the weighted sum.
_SILENT = 1

# Programs are made of numbers about one: a gradient, or a sum, that is far smaller is what rounding
# errors leave of terms that cancel.
_CANCELLED = 1e-2

# Where a norm is the square root of a sum that cancels, its rounding error may be added to it, so
# that it is never too small. By this factor it may be too large, and clip weights too small.
_ROUNDED_UP = 10


class _Truth:
    """What a handle must answer, from the reference of a batch and the mask."""

    def __init__(self, reference: Reference, mask: np.ndarray):
        self.reference = reference
        self.grads = [_keep(mask, grad) for grad in reference.grads]
        squares = [np.sum(grad.reshape(len(mask), -1) ** 2, axis=1) for grad in self.grads]
        self.norms = np.sqrt(np.stack(squares, axis=1))
        self.totals = np.linalg.norm(self.norms, axis=1)
        self.threshold = _middle(self.totals[mask])
        self.leaf_thresholds = np.array([_middle(column[mask]) for column in self.norms.T])
        leaves = len(self.grads)
        self.flat = np.repeat(_shrink(self.totals, self.threshold)[:, None], leaves, axis=1)
        self.per_layer = _shrink(self.norms, self.leaf_thresholds[None, :])
        # Zero once, negative somewhere, and no two alike.
        index = np.arange(len(mask))
        self.weights = np.where(index == _SILENT, 0.0, 1.5 - 0.7 * index)
        self.given = np.repeat(self.weights[:, None], leaves, axis=1)


class _Answers(NamedTuple):
    norms: Any
    leaf_norms: Any
    sums: dict[str, Any]
    rows: Any
    losses: Any
    aux: Any
    nonfinite: Any


def _ask(case: Case, method: str, mask: np.ndarray, truth: _Truth) -> _Answers:
    """Everything in one jit. Norms come first: alone, before a sum has computed them."""
    grads_fn = jaxdp.per_sample_grads(case.loss_fn, method=method, **case.options)
    like = jax.tree.structure(case.params)
    ranks = iter(range(len(truth.grads)))
    groups = tuple(next(ranks) if move else None for move in truth.reference.moving)

    def ask(params: Any, batch: Any, mask: Any, total: Any, each: Any, weights: Any) -> _Answers:
        grads = grads_fn(params, batch, mask)
        norms, leaf_norms = grads.norms(), grads.norms(groups)
        flat = jaxdp.clip_flat(total)
        # A leaf without gradient needs a threshold, too, which counts for nothing.
        thresholds = [1.0 if k is None else each[k] for k in groups]
        per_layer = jaxdp.clip_per_layer(jax.tree.unflatten(like, thresholds))
        sums = {
            "flat clip": _clipped(flat, grads, params),
            "per-layer clip": _clipped(per_layer, grads, params),
            "weighted sum": grads.weighted_sum(weights),
        }
        rows = grads.materialize()
        return _Answers(norms, leaf_norms, sums, rows, grads.losses, grads.aux, grads.nonfinite)

    numbers = (truth.threshold, truth.leaf_thresholds, truth.weights)
    answers = jax.jit(ask)(case.params, case.batch, mask, *map(jnp.float32, numbers))
    for tree in (*answers.sums.values(), answers.rows):
        assert jax.tree.structure(tree) == like, "gradients are no tree like the parameters"
    for got, leaf in zip(jax.tree.leaves(answers.rows), jax.tree.leaves(case.params), strict=True):
        assert got.dtype == leaf.dtype, "gradients are of another type than their parameter"
        assert got.shape == (len(mask), *leaf.shape)
    return jax.tree.map(_plain, answers)


def _clipped(clip: Any, grads: jaxdp.PerSampleGrads, params: Any) -> Any:
    bounded, _ = clip.update(grads, clip.init(params))
    return bounded.value


def _scale(truth: "_Truth") -> np.ndarray:
    """What the errors of each sample are measured by."""
    return np.maximum(truth.totals + 1e-6 * np.max(truth.totals), _CANCELLED)


def _check_norms(
    name: str, got: np.ndarray, expected: np.ndarray, scale: np.ndarray, tolerance: float
) -> None:
    """A norm that is too small is a leak. One that is too large by a little more costs nothing."""
    error = (got - expected) / scale
    worst = int(np.argmax(np.abs(error)))
    assert np.all((-tolerance <= error) & (error <= _ROUNDED_UP * tolerance)), (
        f"{name} too {'small' if error[worst] < 0 else 'large'}: sample {worst} has "
        f"{got[worst]:.7g}, not {expected[worst]:.7g} (error {error[worst]:.2g} of its gradient)"
    )


def _check_sums(answers: _Answers, truth: _Truth, tolerance: float) -> None:
    sums = {
        "flat clip": (truth.flat, _ROUNDED_UP * tolerance),
        "per-layer clip": (truth.per_layer, _ROUNDED_UP * tolerance),
        "weighted sum": (truth.given, tolerance),
    }
    for name, (weights, allowed) in sums.items():
        _check_sum(name, answers.sums[name], truth, weights, allowed)


def _check_sum(name: str, got: Any, truth: _Truth, weights: np.ndarray, tolerance: float) -> None:
    """Relative to the sum, or to the largest sample in it if the samples cancel."""
    leaves = jax.tree.leaves(got)
    for leaf, move in zip(leaves, truth.reference.moving, strict=True):
        assert move or not np.any(leaf), f"{name}: a leaf without gradient is not zero"
    summed = [leaf for leaf, move in zip(leaves, truth.reference.moving, strict=True) if move]
    expected = [np.tensordot(weights[:, k], grad, 1) for k, grad in enumerate(truth.grads)]
    largest = np.max(np.max(np.abs(weights), axis=1) * truth.totals)
    scale = max(_norm(expected), largest, _CANCELLED)
    for index, (a, b) in enumerate(zip(summed, expected, strict=True)):
        error = _norm([a - b])
        assert error <= tolerance * scale, (
            f"{name}: leaf {index} is off by {error / scale:.2g} of the sum"
        )


def _check_rows(
    rows: Any, truth: _Truth, mask: np.ndarray, scale: np.ndarray, tolerance: float
) -> None:
    leaves = zip(jax.tree.leaves(rows), truth.reference.moving, strict=True)
    moved = [leaf for leaf, move in leaves if move or np.any(leaf)]
    for index, (got, expected) in enumerate(zip(moved, truth.grads, strict=True)):
        errors = np.linalg.norm((got - expected).reshape(len(mask), -1), axis=1)
        assert not np.any(got[~mask]), f"materialised leaf {index} is not zero in a masked row"
        assert np.all(errors <= tolerance * scale), (
            f"materialised leaf {index} is off by {np.max(errors / scale):.2g}"
        )


def _check_values(name: str, got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert got.shape == expected.shape, f"{name} has shape {got.shape}, not {expected.shape}"
    scale = max(1.0, np.max(np.abs(expected), initial=0))
    error = np.max(np.abs(got.astype(np.float64) - expected), initial=0)
    assert error <= tolerance * scale, f"{name} is off by {error:.2g}"


def _double(leaf: Any) -> Any:
    return jnp.asarray(np.asarray(leaf), jnp.float64) if is_float(leaf) else leaf


def _plain(leaf: Any) -> np.ndarray:
    """NumPy; floats as float64."""
    array = np.asarray(leaf)
    return array.astype(np.float64) if is_float(array) else array


def _norm(leaves: list[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))


def _keep(mask: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.where(mask.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)


def _poisoned(batch: Any, mask: np.ndarray) -> Any:
    def poison(leaf: Any) -> Any:
        if not is_float(leaf):
            return leaf
        if isinstance(leaf, np.ndarray):  # nothing to compile
            spoiled = leaf.copy()
            spoiled[~mask] = np.nan
            return spoiled
        return jnp.where(mask.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.nan).astype(leaf.dtype)

    return jax.tree.map(poison, batch)


def _middle(norms: np.ndarray) -> float:
    """A threshold that about half of the samples exceed; one if none has a gradient."""
    return float(np.median(norms)) if np.any(norms) and np.median(norms) > 0 else 1.0


def _shrink(norms: np.ndarray, thresholds: Any) -> np.ndarray:
    """min(1, C/norm), which is 1 at norm zero."""
    return thresholds / np.maximum(norms, thresholds)
