"""The arguments of a gradient function, checked once, as a problem of differentiation.

Both roads begin here: per-sample gradients, which will be clipped, and gradients that are bounded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.bounded import Groups
from jaxdp.checks import check_array, check_callable
from jaxdp.coupling import refuse_batch_statistics
from jaxdp.engine.reduction import Batch
from jaxdp.trees import is_float, path_name, prefix_leaves
from jaxdp.varying import vary, varying_axes

LossFn = Callable[..., Any]


class Problem(NamedTuple):
    """A loss, its parameters and a batch.

    Attributes:
      params: all parameters.
      groups: 0 for each leaf that has a gradient, `None` for the others.
      leaves: the leaves that have a gradient.
      batch: the samples.
      loss: `(leaves, example) -> (loss, aux)` for one example.
    """

    params: Any
    groups: Groups
    leaves: list[jax.Array]
    batch: Batch
    loss: Callable[[list[jax.Array], Any], tuple[jax.Array, Any]]

    @property
    def names(self) -> list[str]:
        """Paths of the leaves that have a gradient, as in "body/kernel"."""
        paths = jax.tree.leaves_with_path(self.params)
        return [
            path_name(path)
            for (path, _), group in zip(paths, self.groups, strict=True)
            if group is not None
        ]

    def tree(self, moving: list[Any], fixed: Callable[[Any], Any]) -> Any:
        """A pytree like the parameters: values of the leaves that have a gradient, and
        `fixed(leaf)` of the others."""
        return merged_tree(self.params, self.groups, moving, fixed)


def pose(
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    mask: jax.Array | None,
    kwargs: dict[str, Any],
    *,
    has_aux: bool,
    trainable: Any,
) -> Problem:
    """Checks the arguments of `jaxdp.per_sample_grads` and of its result, and makes the problem.

    Raises:
      TypeError: `loss_fn` is no function or returns no real scalar; the mask is not bool;
        `check_arrays` refuses a parameter.
      ValueError: batch leaves disagree on B; mask of another shape; nothing to differentiate.
    """
    check_function(loss_fn)
    check_arrays(params, trainable)
    mask = checked_mask(mask, batch_size(batch, "batch"))
    rows = Batch(jax.tree.map(jnp.asarray, batch), mask)
    params = jax.tree.map(jnp.asarray, params)
    params, rows = vary((params, rows), varying_axes(rows))
    groups = trainable_groups(params, trainable)

    def loss(moving: list[jax.Array], example: Any) -> tuple[jax.Array, Any]:
        given = merged_tree(params, groups, moving, lambda leaf: leaf)
        with refuse_batch_statistics():
            return checked_loss(loss_fn(given, example, **kwargs), has_aux)

    return Problem(params, groups, with_gradient(jax.tree.leaves(params), groups), rows, loss)


def taken_apart(
    problem: Problem, kwargs: dict[str, Any], posed: Callable[..., Problem]
) -> tuple[Any, Callable[[Any, Batch], Problem]]:
    """Splits a problem into arrays and a function that puts it together again with other rows.

    Functions that must be given every array they use need it so.

    Args:
      problem: a result of `posed(params, batch, mask, kwargs)`.
      kwargs: keyword arguments of the loss, arrays and others.
      posed: `pose` with all further arguments set.

    Returns:
      The arrays, a pytree, and the function `(arrays, rows) -> problem`.
    """
    leaves, treedef = jax.tree.flatten(kwargs)
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    arrays = [leaf for leaf, flag in zip(leaves, is_array, strict=True) if flag]

    def problem_of(given: Any, part: Batch) -> Problem:
        params, arrays = given
        rest = iter(arrays)
        merged = [next(rest) if flag else leaf for leaf, flag in zip(leaves, is_array, strict=True)]
        kwargs = jax.tree.unflatten(treedef, merged)
        return posed(params, part.examples, part.mask, kwargs)._replace(batch=part)

    return (problem.params, arrays), problem_of


def check_function(loss_fn: LossFn) -> None:
    """Raises TypeError unless the loss can be called."""
    check_callable("loss_fn", loss_fn, advice="Pass the loss of one example: (params, example).")


def with_gradient(leaves: list[Any], groups: Groups) -> list[Any]:
    """The leaves that have a gradient."""
    return [leaf for leaf, group in zip(leaves, groups, strict=True) if group is not None]


def merged_tree(params: Any, groups: Groups, moving: list[Any], fixed: Callable[[Any], Any]) -> Any:
    """The inverse of `with_gradient`: a pytree like the parameters, where a leaf without gradient
    is `fixed(leaf)`."""
    leaves, treedef = jax.tree.flatten(params)
    remaining = iter(moving)
    filled = [
        fixed(leaf) if group is None else next(remaining)
        for leaf, group in zip(leaves, groups, strict=True)
    ]
    return jax.tree.unflatten(treedef, filled)


def check_arrays(params: Any, trainable: Any = True) -> None:
    """Raises TypeError at a parameter that no optimizer should be given.

    A Python number that is an attribute of an object is a setting as a rule (the rate of a dropout
    layer), and training would change it; one in a dict or list was put there to be trained. A
    random key has no arithmetic.

    Args:
      params: the parameters.
      trainable: as for `jaxdp.per_sample_grads`: a number under False is no parameter.
    """
    flags = prefix_leaves("trainable", trainable, params)
    for (path, leaf), flag in zip(jax.tree.leaves_with_path(params), flags, strict=True):
        name = path_name(path)
        attribute = path and isinstance(path[-1], jax.tree_util.GetAttrKey)
        if type(leaf) is float and attribute and flag:
            raise TypeError(
                "attributes that are parameters must be arrays, got the number "
                f"{leaf} for {name}. Make it an array if it is to be trained; if it is a setting, "
                "close over it (with Equinox: params, static = eqx.partition(model, "
                "eqx.is_inexact_array)), or make it an array and freeze it (trainable=)."
            )
        if jnp.issubdtype(getattr(leaf, "dtype", int), jax.dtypes.prng_key):
            raise TypeError(
                f"parameters must hold no random keys, got one for {name}. No optimizer can take "
                "it. Close over it, or make a key for each sample part of the batch."
            )
        check_array(f"params ({name})", leaf, advice="Make it an array, or close over it.")


def trainable_groups(params: Any, trainable: Any) -> Groups:
    """0 for each leaf that has a gradient, None for integer and frozen leaves."""
    flags = prefix_leaves("trainable", trainable, params)
    groups = []
    for leaf, flag in zip(jax.tree.leaves(params), flags, strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                "parameters must be real, got a complex leaf of shape "
                f"{leaf.shape}. Split it into its real and imaginary part."
            )
        groups.append(0 if flag and is_float(leaf) else None)
    if all(group is None for group in groups):
        raise ValueError(
            "params must have at least one trainable floating-point leaf, got none. Convert them "
            "(astype), or let trainable= be True for some."
        )
    return tuple(groups)


def batch_size(batch: Any, name: str) -> int:
    """The batch size B, the length of the first axis of every leaf."""
    shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(batch)}
    if not shapes or () in shapes:
        raise ValueError(
            f"every leaf of {name} must have a leading sample axis, got shapes {sorted(shapes)}. "
            "Stack the examples along it."
        )
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(
            f"all leaves of {name} must have the same leading axis, the samples, got sizes "
            f"{sorted(sizes)}. Stack the same number of examples in each."
        )
    return sizes.pop()


def checked_mask(mask: jax.Array | None, count: int) -> jax.Array:
    """The mask, bool `[count]`; without a mask all rows count."""
    if mask is None:
        return jnp.ones((count,), bool)
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(
            f"mask must be boolean, got {mask.dtype}. It selects rows, it does not weigh them."
        )
    if mask.shape != (count,):
        raise ValueError(
            f"mask must have shape ({count},), got {mask.shape}. Pass one entry for each row."
        )
    return mask


def checked_loss(value: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    """The result of the loss of one example, checked, as (loss, aux)."""
    if has_aux:
        if not (isinstance(value, tuple) and len(value) == 2):
            raise TypeError(
                f"loss_fn with has_aux must return (loss, aux), got {type(value)}. Return that "
                "pair, or leave out has_aux."
            )
        loss, aux = value
    else:
        loss, aux = value, None
    shape, dtype = getattr(loss, "shape", None), getattr(loss, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "loss_fn must return one real scalar, the loss of ONE example, got "
            f"{type(loss).__name__} of shape {shape}. Drop the batch axis, or pass "
            "has_aux=True if it returns a pair."
        )
    return loss, aux
