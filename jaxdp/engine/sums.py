r"""Sums over samples, to which one sample adds hardly more than its own contribution.

In floating point, taking one sample away can change how the sum of all the others is rounded. In
one running total of n samples of norm at most C that grows like n²: data made for it reach 1.25 C
with 4,096 samples and 65 C with 65,536. So samples are added up in blocks of m, and blocks in
pairs; where the blocks come one after the other, by compensated summation.

**Theorem.** Let x_1 … x_n be contributions of norm at most C, added up in blocks of at most m (in
any order within a block), and the K blocks in pairs, pairs of pairs, and so on. Where one of them
is replaced by zero, the result changes by at most

$$ C \, \bigl( 1 + 2 m γ_m + 4 n u (1 + γ_{m + \log_2 K}) \bigr),
   \qquad γ_k = \frac{k u}{1 - k u}. $$

*Proof.* Entry by entry a block sum is Σ_i x_i (1 + θ_i) with |θ_i| ≤ γ_m: m products of a weight
and an entry, and their sum (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section
3.1). All blocks but one are the same, to the last bit, with and without the sample; that one
changes by its contribution and by two errors of at most γ_m Σ_i ‖x_i‖ ≤ γ_m·m·C. On the way up the
tree only the sums above that block change; each is rounded once, by at most u times its norm, with
and without the sample, and a sum over l blocks has a norm of at most (1 + γ)·l·m·C. The numbers l
double from level to level, so that these errors are 2u·(2 + 4 + … + K)·m·C ≤ 4u·n·C, times
(1 + γ). ∎

By `Running` the last term is 2n(u + γ_K²)(1 + γ_m) instead: a compensated sum of numbers b_k is off
by at most u|Σ b_k| + γ_K² Σ|b_k| (Ogita, Rump, Oishi 2005, "Accurate Sum and Dot Product",
proposition 4.5), with and without the sample.

A neighbour is a data set in which the contribution of one sample is zero: the others keep their
places. docs/rounding.md has numbers, and tells which sums are XLA's own.

Source: Casacuberta et al. 2022, "Widespread Underestimation of Sensitivity in Differentially
Private Libraries and How to Fix It" (arXiv 2207.10635), on running totals.
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.engine.numerics import widened
from jaxdp.engine.platforms import platform
from jaxdp.engine.rounding import norms, rounded_up

# m. Its square, times 2u, is what rounding within a block may add: 0.03 C in float32. A batch of
# K blocks keeps K sums until they are added up.
BLOCK = 512


class Running(NamedTuple):
    """A sum of arrays that come one after the other: compensated, unless they are one block.

    Attributes:
      total: the running total, any pytree.
      lost: what its additions have rounded away; None within one block, where contributions may
        be added up in any order.
    """

    total: Any
    lost: Any | None

    @classmethod
    def start(cls, zeros: Any, samples: float = math.inf) -> "Running":
        """The sum over no terms, from zeros like them, of terms that hold `samples` in all."""

        def nothing_lost(array: jax.Array) -> jax.Array:
            return jnp.zeros_like(array)

        return cls(zeros, None if samples <= BLOCK else jax.tree.map(nothing_lost, zeros))

    def add(self, term: Any) -> "Running":
        """The sum with one more term."""
        if self.lost is None:
            return Running(jax.tree.map(jnp.add, self.total, term), None)
        # Behind a barrier: a compiler that computes the term anew for each of its uses may round
        # it in several ways.
        term = jax.lax.optimization_barrier(term)
        total = jax.tree.map(jnp.add, self.total, term)
        error = jax.tree.map(_rounded_away, self.total, term, total)
        return Running(total, jax.tree.map(jnp.add, self.lost, error))

    @property
    def value(self) -> Any:
        """The sum."""
        if self.lost is None:
            return self.total
        return jax.tree.map(jnp.add, self.total, self.lost)


def _rounded_away(a: jax.Array, b: jax.Array, total: jax.Array) -> jax.Array:
    """a + b − total, exactly (Knuth's TwoSum); zero where the total is not finite, or no float."""
    if not jnp.issubdtype(total.dtype, jnp.inexact):
        return jnp.zeros_like(total)
    added = total - a
    error = (a - (total - added)) + (b - added)
    return jnp.where(jnp.isfinite(total), error, jnp.zeros_like(error))


def in_blocks(contract: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`contract(*arrays)`, a sum over samples, in blocks and pairs.

    Args:
      contract: `arrays [b, ...] -> sum over their first axes`, linear in the samples.
      arrays: `[B, ...]` each.
    """
    if arrays[0].shape[0] <= BLOCK:
        return contract(*arrays)
    sums = jax.vmap(contract)(*map(as_blocks, arrays))
    while sums.shape[0] > 1:
        half, odd = divmod(sums.shape[0], 2)
        pairs = sums[:half] + sums[half : 2 * half]
        sums = jnp.concatenate([pairs, sums[2 * half :]]) if odd else pairs
    return sums[0]


def in_turns(contract: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """The same, one block after the other: for what is slow for several blocks at once, or in a
    loop, as convolutions are.

    Args:
      contract, arrays: as for `in_blocks`.
    """
    if arrays[0].shape[0] <= BLOCK:
        return contract(*arrays)
    blocks = list(map(as_blocks, arrays))
    sums = [contract(*(each[k] for each in blocks)) for k in range(blocks[0].shape[0])]
    while len(sums) > 1:
        pairs = [a + b for a, b in zip(sums[::2], sums[1::2], strict=False)]
        sums = pairs + sums[2 * len(pairs) :]
    return sums[0]


def as_blocks(array: jax.Array) -> jax.Array:
    """`[B, ...] -> [blocks, block, ...]`, filled up with zeros."""
    count = array.shape[0]
    size = block_size(count)
    blocks = -(-count // size)
    if missing := blocks * size - count:
        array = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    return array.reshape(blocks, size, *array.shape[1:])


def block_size(count: int) -> int:
    """The largest one that divides the samples without a rest, unless that is a small one: to fill
    up the last block copies all of them."""
    dividing = [size for size in range(BLOCK // 4, BLOCK + 1) if count % size == 0]
    return max(dividing, default=BLOCK)


def weighted_sum(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Σ_i w_i x_i over the samples, in at least float32."""
    rows = widened(rows)

    def contract(weights: jax.Array, rows: jax.Array) -> jax.Array:
        if platform() != "cpu":
            # As fast as rows are read; a matrix unit would need several passes.
            return jnp.sum(weights.reshape(-1, *[1] * (rows.ndim - 1)) * rows, axis=0)
        # There a product and a sum are ten times slower than a contraction.
        return jnp.tensordot(weights, rows, 1, precision=jax.lax.Precision.HIGHEST)

    return in_blocks(contract, weights.astype(rows.dtype), rows)


def row_norms(rows: jax.Array) -> jax.Array:
    """Certified norms of rows `[B, ...]`: one sample alone has its entries times its weight, which
    may have been cast, and its sum may be cast in turn."""
    flat = widened(rows).reshape(rows.shape[0], math.prod(rows.shape[1:]))
    return rounded_up(norms(flat), 3)
