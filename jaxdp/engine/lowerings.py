"""Chooses the lowering."""

from typing import Any

import jax

from jaxdp.engine.dense import Dense
from jaxdp.engine.fused import Fused
from jaxdp.engine.plan import Plan, one_example
from jaxdp.engine.reduction import LeafLoss, Lowering
from jaxdp.engine.slots import Slots
from jaxdp.engine.taps import Taps


def choose(method: str, loss: LeafLoss, leaves: list[jax.Array], examples: Any) -> Lowering:
    """The lowering of that name."""
    if method == "dense":
        return Dense(loss, leaves)
    plan = Plan.of(loss, leaves, one_example(examples))
    return {"slots": Slots, "taps": Taps, "fused": Fused, "auto": Slots}[method](plan, leaves)
