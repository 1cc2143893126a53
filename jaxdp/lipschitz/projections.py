"""Projections of weights onto sets of small norm, and the transformation that applies them.

A bound does not depend on a projection: it is computed from the current weights. Projections keep
it small.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdp.checks import check_callable, shown
from jaxdp.lipschitz.operator_norm import check_floats, matrix_norm
from jaxdp.schedules import check_number

_BJORCK_STEPS = 12

_ARRAY = "Pass one array of floats: map over trees of them."
_MATRIX = "Pass one matrix: map over trees of them."


def onto_ball(array: jax.Array, norm: float = 1.0) -> jax.Array:
    """The nearest array of L2 (Frobenius) norm at most `norm`.

    Args:
      array: any shape, floating-point.
      norm: the radius, above zero.

    Returns:
      The array, scaled down where it is longer.

    Raises:
      TypeError: an array of another dtype; a norm that is no number.
      ValueError: a norm that is not positive and finite.

    Example:
      >>> print(onto_ball(jnp.array([3.0, 4.0])))
      [0.6 0.8]
    """
    limit = check_number("norm", norm)
    array = check_floats("array", array, minimum_axes=0, advice=_ARRAY)
    size = jnp.sqrt(jnp.sum(jnp.square(array)))
    return array * jnp.where(size > limit, limit / size, jnp.ones_like(size))


def onto_spectral_ball(matrix: jax.Array, norm: float = 1.0) -> jax.Array:
    """The matrix `[m, n]`, scaled down where its largest singular value exceeds `norm`.

    Args:
      matrix: `[m, n]`, floating-point.
      norm: the largest singular value that is allowed, above zero.

    Returns:
      The matrix, scaled down where it exceeds that.

    Raises:
      TypeError: a matrix of another dtype; a norm that is no number.
      ValueError: an array without two axes; a norm that is not positive and finite.

    Example:
      >>> print(onto_spectral_ball(jnp.diag(jnp.array([4.0, 1.0]))).round(3))
      [[1.   0.  ]
       [0.   0.25]]
    """
    limit = check_number("norm", norm)
    matrix = _one_matrix(matrix)
    size = matrix_norm(matrix)
    return matrix * jnp.where(size > limit, limit / size, jnp.ones_like(size))


def orthogonal(matrix: jax.Array) -> jax.Array:
    """A matrix near to the given one whose singular values are near to one.

    It is computed by Björck's iteration W ← 3/2 W - 1/2 W Wᵀ W, which moves every singular value in
    (0, √3) towards one, from the matrix divided by an upper bound on its norm. Tiny singular values
    remain below one.

    Args:
      matrix: `[m, n]`, floating-point.

    Returns:
      The matrix after the iteration, `[m, n]`.

    Raises:
      TypeError: the matrix is no array of floats.
      ValueError: it has another number of axes than two.

    Example:
      >>> near = orthogonal(jnp.array([[2.0, 1.0], [0.0, 1.0]]))
      >>> print(jnp.linalg.svd(near, compute_uv=False).round(3))
      [1. 1.]

    Source: Björck and Bowie 1971, "An Iterative Algorithm for Computing the Best Estimate of an
    Orthogonal Matrix"; Anil et al. 2019, "Sorting Out Lipschitz Function Approximation", section
    4.2.
    """
    return _orthogonal(_one_matrix(matrix))


def _one_matrix(matrix: jax.Array) -> jax.Array:
    matrix = check_floats("matrix", matrix, minimum_axes=2, advice=_MATRIX)
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have two axes, got {shown(matrix)}. {_MATRIX}")
    return matrix


@jax.jit
def _orthogonal(matrix: jax.Array) -> jax.Array:
    tall = matrix.shape[0] >= matrix.shape[1]
    w = matrix if tall else matrix.T
    w = w / jnp.maximum(matrix_norm(w), jnp.finfo(w.dtype).tiny)

    def step(_: int, w: jax.Array) -> jax.Array:
        gram = jnp.matmul(w.T, w, precision=jax.lax.Precision.HIGHEST)
        return 1.5 * w - 0.5 * jnp.matmul(w, gram, precision=jax.lax.Precision.HIGHEST)

    w = jax.lax.fori_loop(0, _BJORCK_STEPS, step, w)
    return w if tall else w.T


def project(projection: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Changes the updates so that they take the parameters to a projection. It ends a chain.

    Args:
      projection: `params -> params`, as `Layer.project`.

    Returns:
      A stateless transformation. Put it behind the optimizer; it is post-processing, since noise
      was added before.

    Raises:
      ValueError: (in `update`) no params are given.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), project(onto_ball))
      >>> params = jnp.array([0.0, 0.0])
      >>> updates, _ = tx.update(jnp.array([-3.0, -4.0]), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [0.6 0.8]
    """
    check_callable("projection", projection, advice="Pass a function of the parameters.")

    def update(updates: Any, params: Any) -> Any:
        if params is None:
            raise ValueError(
                "project needs the parameters, got None. Call tx.update(updates, state, params)."
            )
        nearest = projection(optax.apply_updates(params, updates))
        return jax.tree.map(jnp.subtract, nearest, params)

    return optax.stateless(update)
