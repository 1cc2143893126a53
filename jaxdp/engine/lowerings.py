"""Chooses how the per-sample gradients of a loss are computed."""

import math
from typing import Any, NamedTuple

import jax

from jaxdp.engine.dense import Dense
from jaxdp.engine.fused import Fused
from jaxdp.engine.plan import Plan, one_example
from jaxdp.engine.reduction import Batch, LeafLoss, Lowering
from jaxdp.engine.slots import Slots
from jaxdp.engine.taps import Taps, tapped_uses

METHODS = ("auto", "dense", "slots", "taps", "fused")


class Choice(NamedTuple):
    """A lowering, how many samples at a time (None: all), and why."""

    name: str
    lowering: Lowering
    microbatch_size: int | None
    reason: str


def choose(
    method: str,
    loss: LeafLoss,
    leaves: list[jax.Array],
    batch: Batch,
    *,
    microbatch_size: int | None = None,
    memory_budget: int | None = None,
) -> Choice:
    """The lowering of that name, or for "auto" the one that suits the loss.

    Without a budget: taps for a loss that rematerialises, since it asks for memory; slots for any
    other. With one: slots if what they keep fits, else taps, else the one that keeps less in
    microbatches that fit. An empty batch has nothing to factor, and is left to dense.
    """
    if method == "dense" or batch.mask.shape[0] == 0:
        names = {"dense": Dense(loss, leaves)}
    else:
        plan = Plan.of(loss, leaves, one_example(batch.examples))
        made = {"slots": Slots, "taps": Taps, "fused": Fused}
        names = {name: lowering(plan, leaves) for name, lowering in made.items()}
        tapped = tapped_uses(plan.uses, leaves, one_weight=True)
        if method != "auto":
            names = {method: names[method]}
        elif memory_budget is not None:
            names = {name: names[name] for name in ("slots", "taps")}
        elif any(use.in_remat for use in tapped.values()):
            return Choice("taps", names["taps"], microbatch_size, "the loss rematerialises")
        else:
            return Choice("slots", names["slots"], microbatch_size, "the fastest")
    if memory_budget is None:
        ((name, lowering),) = names.items()
        return Choice(name, lowering, microbatch_size, "as asked")
    return _within(memory_budget, names, leaves, batch, microbatch_size)


def _within(
    budget: int,
    names: dict[str, Any],
    leaves: list[jax.Array],
    batch: Batch,
    microbatch_size: int | None,
) -> Choice:
    count = batch.mask.shape[0]
    size = min(microbatch_size or count, count)
    each = {
        name: kept_bytes(lowering, leaves, batch) / max(count, 1)
        for name, lowering in names.items()
    }
    for name, lowering in names.items():
        if each[name] * size <= budget:
            return Choice(name, lowering, microbatch_size, f"keeps {round(each[name] * size):,} B")
    name = min(each, key=lambda name: each[name])
    size = int(budget // each[name])
    if size == 0:
        raise ValueError(
            f"memory_budget must hold what one sample needs, at least {math.ceil(each[name])} "
            f"bytes with method {name!r}, got {budget}"
        )
    reason = f"{size} samples at a time keep {round(each[name] * size):,} B"
    return Choice(name, names[name], size, reason)


def kept_bytes(lowering: Lowering, leaves: list[jax.Array], batch: Batch) -> int:
    """What a lowering keeps of a batch until its norms are known: operands and cotangents, or
    per-sample gradients."""
    if isinstance(lowering, Dense):
        count = batch.mask.shape[0]
        return count * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert isinstance(lowering, Slots | Taps | Fused)
    plan = lowering.plan
    if isinstance(lowering, Taps):
        tapped = tapped_uses(plan.uses, leaves, one_weight=True)
        plan = plan._replace(uses={n: u for n, u in plan.uses.items() if n not in tapped})

    def arrays(batch: Batch) -> list[jax.Array]:
        factors, *_ = Slots(plan, leaves).factors(batch)
        return list({id(array): array for array in jax.tree.leaves(factors)}.values())

    kept = jax.eval_shape(arrays, batch)
    return sum(array.size * array.dtype.itemsize for array in kept)
