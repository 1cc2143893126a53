"""Chooses the lowering."""

from typing import Any

import jax

from jaxdp.engine.dense import Dense
from jaxdp.engine.plan import Plan, example_shapes
from jaxdp.engine.reduction import LeafLoss, Lowering
from jaxdp.engine.slots import Slots


def choose(method: str, loss: LeafLoss, leaves: list[jax.Array], examples: Any) -> Lowering:
    """The lowering of that name."""
    if method == "dense":
        return Dense(loss, leaves)
    return Slots(Plan.of(loss, leaves, example_shapes(examples)), leaves)
