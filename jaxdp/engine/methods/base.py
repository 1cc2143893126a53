"""What a method must provide.

A method knows the loss. It computes the per-sample gradients of any batch, or the norms and the
weighted sums that are asked of them. To add one, write a class with these members in a file of its
own, and register it in `engine.methods`; CONTRIBUTING.md shows how.
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

import jax

from jaxdp.engine.effects import Excuse
from jaxdp.engine.explanation import LeafExplanation
from jaxdp.engine.plan import TracedLoss
from jaxdp.engine.reduction import Batch, Reduction, Rows
from jaxdp.engine.weighting import Weighting


class Reducer(Protocol):
    """What can be asked of the per-sample gradients of a batch."""

    def reduce(self, batch: Batch, weighting: Weighting | None) -> Reduction:
        """Norms, and weighted sums if `weighting` is given."""
        ...

    def rows(self, batch: Batch) -> Rows:
        """The gradients themselves."""
        ...


class Method(Reducer, Protocol):
    """A way to compute the per-sample gradients of a loss.

    All methods give the same numbers, up to rounding. Norms are certificates
    (`Reduction.norms`), and rows of weight zero count for nothing, whatever they hold.

    Attributes:
      excuses: what `engine.effects` finds in a loss and this method computes rightly all the same.
      most_at_once: how many samples it may add up in one sum that is not its own (`engine.sums`);
        None where it adds up in blocks itself.
    """

    excuses: ClassVar[frozenset[Excuse]]

    @property
    def most_at_once(self) -> int | None: ...

    @classmethod
    def of(cls, traced: TracedLoss) -> Self:
        """The method for this loss."""
        ...

    def kept_bytes(self, batch: Batch) -> int:
        """What it keeps of a batch until the norms are known."""
        ...

    def explained(self, names: list[str], batch: Batch) -> list[LeafExplanation]:
        """What it does with each leaf, by the names of the leaves; nothing is computed."""
        ...


def distinct_bytes(run: Callable[..., Any], *args: Any) -> int:
    """Bytes of the arrays that `run(*args)` returns; what it returns twice counts once."""

    def each_once(*args: Any) -> list[jax.Array]:
        return list({id(array): array for array in jax.tree.leaves(run(*args))}.values())

    return sum(array.size * array.dtype.itemsize for array in jax.eval_shape(each_once, *args))
