"""Gradients of a parameter that the model multiplies by a number first."""

from dataclasses import replace

import jax

from jaxdp.engine.boxes import Target
from jaxdp.engine.factors.base import Factored, Inner, factored, static
from jaxdp.engine.numerics import widened
from jaxdp.engine.rounding import rounded_up


@factored
class Scaled:
    """A number times the gradients of a factor.

    It goes into the weights, not into the cotangents, which may be in half precision: there it
    could overflow, or vanish. The product with a weight is one rounding more, and a weight that
    vanishes counts for nothing.
    """

    factor: Factored
    scale: float = static()

    @property
    def target(self) -> Target:
        """Where the gradients belong."""
        return self.factor.target

    @property
    def form(self) -> str:
        """That of the factor."""
        return self.factor.form

    @property
    def flops(self) -> int:
        """Those of the factor."""
        return self.factor.flops

    def prepared(self) -> Factored:
        return replace(self, factor=self.factor.prepared())

    def certified_norms(self) -> jax.Array:
        return rounded_up(abs(self.scale) * self.factor.certified_norms(), 3)

    def rows(self) -> jax.Array:
        return self.scale * widened(self.factor.rows())

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        return self.factor.weighted_sum(weights * self.scale)

    def inner(self, direction: jax.Array) -> Inner:
        inner = self.factor.inner(direction)
        # The product of the value is rounded, too: by less than the error of a value is.
        return Inner(self.scale * inner.values, rounded_up(2 * abs(self.scale) * inner.errors, 2))

    def join(self, other: Factored) -> Factored | None:
        if not isinstance(other, Scaled) or other.scale != self.scale:
            return None
        joined = self.factor.join(other.factor) or other.factor.join(self.factor)
        return None if joined is None else replace(self, factor=joined)
