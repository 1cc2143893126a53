"""Norms of sums of outer products, certified: never below what a sample adds to the sum.

For vectors u_t and v_t, t = 1..T, with A_ts = ⟨u_t, u_s⟩ and V_ts = ⟨v_t, v_s⟩,

    G = Σ_t u_t v_tᵀ,   ‖G‖² = Σ_ts A_ts V_ts

without the matrix itself. The terms can cancel down to their rounding errors, below zero even, and
the errors grow with the length of the vectors. So what is returned is an upper bound, a
*certificate* of the norm, for the arithmetic of `engine.rounding`:

**Theorem.** Let S = Σ_t ‖u_t‖‖v_t‖. Let every computed entry Â_ts be off by γ_i ‖u_t‖‖u_s‖ at most,
and V̂_ts by γ_j ‖v_t‖‖v_s‖. Let f be the computed Σ_t (Σ_s Â_ts V̂_ts), each of its terms with k
roundings at most. Then

    ‖G‖² ≤ f + γ_{i+j+k} S²

and the sum over the positions that a method computes of the weighted vectors, in any order, with
n roundings of each term, has the norm w·N at most, with

    N = √(max(f, 0) + γ_{i+j+k} S²) + (γ_n + u_s (1 + γ_n)) S,

where each entry of w·v_t is rounded by u_s besides (`engine.precision`; 0 on a CPU).

*Proof.* Write a_t = ‖u_t‖ and b_t = ‖v_t‖. Entry by entry, |Â_ts V̂_ts − A_ts V_ts| is at most
((1 + γ_i)(1 + γ_j) − 1) a_t a_s b_t b_s by Cauchy–Schwarz for |A_ts| and |V_ts|, and the sum of the
computed terms is off by γ_k Σ |Â_ts V̂_ts| (Higham 2002, theorem 3.1), at most
γ_k (1 + γ_i)(1 + γ_j) a_t a_s b_t b_s for each term. Together that is
((1 + γ_i)(1 + γ_j)(1 + γ_k) − 1) ≤ γ_{i+j+k} times Σ_ts a_t a_s b_t b_s = S². The computed sum G̃ is
off by ((1 + γ_n)(1 + u_s) − 1) Σ_t |w u_t||v_tᵀ| entry by entry, of Frobenius norm
(γ_n + u_s (1 + γ_n)) w S at most. ∎

*An inner product* of d terms in any order has γ_d ‖x‖‖y‖, in m blocks γ_{⌈d/m⌉+m−1}.

*Underflow.* An inner product of d terms, with i roundings, may lose 2d·tiny. With lengths
√(‖u_t‖² + e), e = 2d·tiny / (i·u), this is γ_i e at most, which γ_i √(‖u_t‖² + e) √(‖u_s‖² + e)
holds beside γ_i ‖u_t‖‖u_s‖; so the theorem holds as it stands with these lengths. The sum over T²
terms may lose 2T²·tiny, which is added. The weight w of a sample is multiplied into one of the
factors, which may lose entries of that: √p·tiny ‖u_t‖, at most w·4u ‖u_t‖√e for p ≤ 2²⁶ and w not
below `rounding.least_weight`: four more roundings in n pay for it, and another four where the
product is rounded once more.

*Not finite.* Where f is not finite the certificate is infinite, and the sample counts for nothing.
No zero is made by selection: a length of zero times NaN is NaN.
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.engine.numerics import widened
from jaxdp.engine.platforms import platform
from jaxdp.engine.precision import multiplied, weight_roundoff
from jaxdp.engine.rounding import ROOT, gamma, lost, rounded_up, roundings, total, unit_roundoff
from jaxdp.engine.sums import row_norms

# Inner products are taken in as many blocks as it takes for their roundings times T to stay below
# this; then they raise the norm of positions at random, S² = T ‖G‖², by 0.4% at most.
_OFF_BY_POSITIONS = 2**17
# More blocks than this take too long to compile.
_MOST_BLOCKS = 32

# A Gram matrix is symmetric: of four panels, what lies below the diagonal is left out, which saves
# 3/8 of its products. That pays where a matrix unit has more to multiply than memory to move: from
# so many operations a byte on. (An H100 has 295, a v5p 166; a CPU loses by the smaller products.)
_PANELS = 4
_WORTH_PANELS = {"cpu": math.inf}
_WORTH_PANELS_ELSEWHERE = 300.0

# Roundings of w·u_t, of a weight that was cast, of the product with v_t, of casts of the sum and
# of adding it to other pieces; and those that pay for underflow.
_OF_ONE_TERM = 4 + 4 + 4


def grams(u: jax.Array, v: jax.Array, stored: int) -> tuple["Gram", "Gram"]:
    """Of the vectors `[..., T, d]` and `[..., T, p]`, operands that store so many bits."""
    positions, length = u.shape[-2], max(u.shape[-1], v.shape[-1])
    # Operations of the products, and bytes: of vectors in bfloat16, and of the matrix.
    intensity = 2 * positions**2 * length / (2 * positions * length + 8 * positions**2)
    worth = intensity > _WORTH_PANELS.get(platform(), _WORTH_PANELS_ELSEWHERE)
    panels = _PANELS if worth else 1
    return Gram.of(u, stored, panels), Gram.of(v, stored, panels)


class Gram(NamedTuple):
    """A Gram matrix, and how far rounding may have taken it off.

    Attributes:
      panels: inner products of vectors w_t, `[..., m, T − i·m]` for the i-th: m rows of the matrix,
        from the diagonal on.
      lengths: ‖w_t‖ `[..., T]`, not below the true ones; above zero.
      roundings: k, if an entry is off by γ_k ‖w_t‖‖w_s‖ at most.
    """

    panels: tuple[jax.Array, ...]
    lengths: jax.Array
    roundings: int

    @classmethod
    def of(cls, vectors: jax.Array, stored: int, panels: int = 1) -> "Gram":
        """From the vectors `[..., T, d]`, operands that store so many bits, in so many panels."""
        products, off = inner_products(vectors, stored, panels)
        if platform() == "cpu":
            # Not the diagonal of the products, which XLA would copy before it multiplies them.
            return cls(products, lengths_of(vectors, off), off)
        return cls.of_panels(products, vectors.shape[-1], off)

    @classmethod
    def of_panels(cls, panels: Sequence[jax.Array], terms: int, off: int) -> "Gram":
        """From inner products of so many terms, each with `off` roundings."""
        squares = [cast(jax.Array, jnp.diagonal(panel, axis1=-2, axis2=-1)) for panel in panels]
        lengths = lengths_of_squares(jnp.concatenate(squares, axis=-1), off, terms, off)
        return cls(tuple(panels), lengths, off)


def inner_products(
    vectors: jax.Array, stored: int, panels: int = 1
) -> tuple[tuple[jax.Array, ...], int]:
    """⟨w_t, w_s⟩ of vectors `[..., T, d]`, in so many panels (`Gram`), and their roundings."""
    positions, length = vectors.shape[-2:]
    count = 1
    while count < min(_MOST_BLOCKS, length) and positions * length > count * _OFF_BY_POSITIONS:
        count += 1
    size, height = -(-length // count), -(-positions // panels)
    blocks = range(0, length, size)

    def of_panel(first: int) -> jax.Array:
        def of_block(start: int) -> jax.Array:
            behind = vectors[..., first:, start : start + size]
            return multiplied("...td,...sd->...ts", behind[..., :height, :], behind, stored)

        return reduce(jnp.add, map(of_block, blocks))

    return tuple(map(of_panel, range(0, positions, height))), size + len(blocks) - 1


def lengths_of(vectors: jax.Array, off: int | None = None) -> jax.Array:
    """√(‖w_t‖² + e) `[..., T]` of vectors `[..., T, d]`, not below the true ones.

    Args:
      vectors: w_t.
      off: the roundings of an inner product in e; d if there is none.
    """
    terms = vectors.shape[-1]
    squares = total(jnp.square(widened(vectors)))
    return lengths_of_squares(squares, roundings(terms), terms, off)


def lengths_of_squares(
    squares: jax.Array, off: int, terms: int, entry: int | None = None
) -> jax.Array:
    """The same from computed ‖w_t‖² of so many terms, with `off` roundings each, where an inner
    product has `entry`."""
    dtype = squares.dtype
    flushed = lost(2 * terms, dtype)
    added = flushed + flushed / ((entry or terms) * unit_roundoff(dtype))
    return rounded_up(jnp.sqrt(squares + added), off // 2 + 1 + ROOT)


def mass(inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
    """S = Σ_t ‖u_t‖‖v_t‖ `[...]` from lengths `[..., T]`, not below the true one."""
    return rounded_up(total(inputs * cotangents), roundings(inputs.shape[-1]))


def gram_norms(inputs: Gram, cotangents: Gram, stored: int) -> jax.Array:
    """Certified norms `[...]` of Σ_t u_t v_tᵀ, from the Gram matrices of the u_t and the v_t, where
    the weighted operand stores so many bits."""
    squared, off = gram_sum(inputs, cotangents)
    whole = mass(inputs.lengths, cotangents.lengths)
    return certificate(squared, whole, off, inputs.lengths.shape[-1], stored)


def gram_sum(inputs: Gram, cotangents: Gram) -> tuple[jax.Array, int]:
    """Σ_t Σ_s A_ts V_ts `[...]`, and the roundings i + j + k of the theorem.

    What lies beside the diagonal block of a panel stands for its mirror image, too: doubling does
    not round.
    """

    def of_panel(a: jax.Array, v: jax.Array) -> jax.Array:
        height, width = a.shape[-2:]
        times = np.where(np.arange(width) < height, 1, 2).astype(a.dtype)
        doubled = v * times.reshape((1,) * (v.ndim - 1) + (width,)) if width > height else v
        return total(total(a * doubled))

    panels = [of_panel(a, v) for a, v in zip(inputs.panels, cotangents.panels, strict=True)]
    positions = inputs.lengths.shape[-1]
    off = inputs.roundings + cotangents.roundings + 2 * roundings(positions)
    return reduce(jnp.add, panels), off + len(panels) - 1


def certificate(
    squared: jax.Array, mass: jax.Array, off: int, positions: int, stored: int
) -> jax.Array:
    """N of the theorem, rounded up.

    Args:
      squared: f.
      mass: S.
      off: i + j + k.
      positions: T.
      stored: bits that w·v_t stores.
    """
    dtype = squared.dtype
    # S² before the factor: what is small times what is smaller would be lost.
    error = gamma(off, dtype) * (mass * mass) + lost(2 * positions**2 + 4, dtype)
    norm = jnp.sqrt(jnp.maximum(squared, 0) + error) + sum_error(mass, positions, stored)
    norm = rounded_up(norm, ROOT + 4)
    return jnp.where(jnp.isfinite(squared), norm, jnp.inf)


def inner_error(
    mass: jax.Array, direction: jax.Array, positions: int, off: int, stored: int
) -> jax.Array:
    """By how much ⟨Σ_t u_t v_tᵀ, R⟩ is off at most, computed as Σ_t ⟨u_tᵀ R, v_t⟩.

    R is rounded to operands that store so many bits, and each term `off` times:
    Σ_t |u_t|ᵀ|R||v_t| ≤ S ‖R‖ (Cauchy–Schwarz). And the sum that is released is off from
    Σ_t u_t v_tᵀ by `sum_error`, times ‖R‖.

    Args:
      mass: S `[...]`.
      direction: R.
      positions: T.
      off: roundings.
      stored: bits of R and of the weighted operand.
    """
    # (1 + γ)(1 + u_s) − 1 <= γ + 2 u_s, where γ <= 1.
    rounding = gamma(off, mass.dtype) + 2 * weight_roundoff(stored)
    size = row_norms(direction[None])[0]
    lengths = size * (rounding * mass + sum_error(mass, positions, stored))
    return rounded_up(lengths, 6) + lost(4 * direction.size * positions, mass.dtype)


# A sample whose addends cancel to less than this part of their sizes is clipped as if they did not.
LEAST_PART = 2.0**-8


def uncancelled(norms: jax.Array, mass: jax.Array) -> jax.Array:
    """Certified norms, and at least 2⁻⁸ S.

    Where another program sums over samples and positions, it may add up all samples at one
    position before the next, terms of size w S before they cancel. Then w S ≤ 2⁸ C, and what a
    sample changes besides its own are roundings of that. T positions at random have norms of S/√T.
    """
    return jnp.maximum(norms, LEAST_PART * mass)


def sum_error(mass: jax.Array, positions: int, stored: int) -> jax.Array:
    """(γ_n + u_s (1 + γ_n)) S: by how much a sum over so many positions is off, for a weight of
    one, where the weighted operand stores so many bits."""
    order = gamma(positions + _OF_ONE_TERM, mass.dtype)
    return (order + weight_roundoff(stored) * (1 + order)) * mass
