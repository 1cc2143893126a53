"""Refuses layers that make the loss of one example depend on others.

Batch normalisation in training mode takes its statistics over the batch. In the loss of one
example there is no batch: the layer would normalise the example by itself (and have all-zero
gradients where it has one value per feature), or it would share statistics between samples, and
then no clip could bound what one sample contributes.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class BatchStatisticsError(ValueError):
    """A layer that normalises one example by others."""

    @classmethod
    def at(cls, where: str) -> "BatchStatisticsError":
        """Where a value is normalised by itself."""
        return cls(
            "loss_fn must not normalise over a batch, got a value minus its own mean, or scaled by "
            f"itself, over an axis of length one ({where}): in the loss of one example the batch "
            "is that example, and nothing is left of it. Use nn.GroupNorm or nn.LayerNorm, or "
            "running averages."
        )


def refuse_batch_statistics() -> AbstractContextManager[Any]:
    """While it is entered, a `flax.linen.BatchNorm` that computes batch statistics raises."""
    # Whoever has not imported flax has no flax module.
    linen = sys.modules.get("flax.linen")
    return nullcontext() if linen is None else linen.intercept_methods(_refuse)


def _refuse(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module, batch_norm = context.module, sys.modules["flax.linen"].BatchNorm
    if isinstance(module, batch_norm) and context.method_name == "__call__":
        given = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
        running = module.use_running_average if given is None else given
        if not running:
            raise BatchStatisticsError(
                f"flax BatchNorm {module.name!r} must not compute batch statistics in the loss of "
                "one example, got use_running_average=False: it normalises by other samples, "
                "which no clip can undo. Use nn.GroupNorm or nn.LayerNorm, or running averages."
            )
    return next_fun(*args, **kwargs)
