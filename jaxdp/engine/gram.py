"""Norms from Gram matrices, rounded up.

With A_ts = ⟨u_t, u_s⟩ and V_ts = ⟨v_t, v_s⟩,

    ‖Σ_t u_t v_tᵀ‖² = Σ_ts A_ts V_ts

without the matrix itself. The terms can cancel, down to their rounding errors and below zero even:
so the error is bounded, and the bound added.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.numerics import lost

# The largest errors found by search were 15 times those of `Gram.off`; they are allowed for where
# the sum is below a thousandth of its terms.
_WORST, _CANCELS = 16, 1e-3


class Gram(NamedTuple):
    """A Gram matrix, and how far rounding may have taken it off.

    Attributes:
      products: inner products `[B, E, T, T]` of vectors w_t.
      trace: Σ_t ‖w_t‖² `[B, E]`, which no norm of the matrix exceeds; above zero.
      off: `[B, E]`, the Frobenius norm of the errors: an entry is off by about ε‖w_t‖‖w_s‖, and
        by what underflowed.
    """

    products: jax.Array
    trace: jax.Array
    off: jax.Array

    @classmethod
    def of(cls, products: jax.Array, trace: jax.Array, entries: int) -> "Gram":
        """From inner products, their trace, and how many products one of them adds up."""
        dtype = products.dtype
        underflow = products.shape[-1] * lost(entries, dtype)
        return cls(products, trace + underflow, jnp.finfo(dtype).eps * trace + underflow)

    def norms(self) -> jax.Array:
        """Frobenius norms `[B, E]`."""
        # Relative to the trace: the squares of the entries themselves may overflow.
        relative = self.products * (1 / self.trace)[..., None, None]
        return self.trace * jnp.sqrt(jnp.sum(jnp.square(relative), axis=(2, 3)))


def gram_norms(inputs: Gram, cotangents: Gram) -> jax.Array:
    """Σ_{e,t,s} A_ts V_ts `[B]` for the Gram matrices A of the u_t and V of the v_t, rounded up.

    By Cauchy–Schwarz errors of Frobenius norms a of A and v of V change the sum by
    ‖A‖v + ‖V‖a + av at most; that is added, so that the norm is never below the true one.
    """
    a, v = inputs.off, cotangents.off
    slack = inputs.norms() * v + cotangents.norms() * a + a * v
    # In two steps, which XLA would merge: T terms add up smaller errors than T² terms.
    rows = jnp.sum(inputs.products * cotangents.products, axis=3)
    total = jnp.sum(jax.lax.optimization_barrier(rows), axis=2)
    # Errors that all go one way, as of vectors with equal entries, are larger; only beside a sum
    # that nearly cancels does that matter.
    cancels = total * jnp.finfo(total.dtype).eps < _CANCELS * slack
    total += jnp.where(cancels, _WORST, 1) * slack
    return jnp.maximum(jnp.sum(total, axis=1), 0)
