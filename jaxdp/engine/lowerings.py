"""Chooses how the per-sample gradients of a loss are computed."""

import math
from typing import NamedTuple

import jax

from jaxdp.engine.dense import Dense
from jaxdp.engine.fused import Fused
from jaxdp.engine.plan import Plan, one_example
from jaxdp.engine.reduction import Batch, LeafLoss, Lowering
from jaxdp.engine.slots import Slots
from jaxdp.engine.taps import Taps, tapped_uses

_FACTORED = {"slots": Slots, "taps": Taps, "fused": Fused}
METHODS = ("auto", "dense", *_FACTORED)


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
    if batch.mask.shape[0] == 0:
        return Choice("dense", Dense(loss, leaves), None, "the batch is empty")
    candidates: dict[str, Lowering] = {}
    rematerialises = False
    if method == "dense":
        candidates["dense"] = Dense(loss, leaves)
    else:
        plan = Plan.of(loss, leaves, one_example(batch.examples))
        for name in ("slots", "taps") if method == "auto" else (method,):
            candidates[name] = _FACTORED[name](plan, leaves)
        tapped = tapped_uses(plan.uses, leaves, one_weight=True)
        rematerialises = any(use.in_remat for use in tapped.values())
    if memory_budget is not None:
        return _within(memory_budget, candidates, leaves, batch, microbatch_size)
    if method != "auto":
        name, reason = method, "as asked"
    elif rematerialises:
        name, reason = "taps", "the loss rematerialises"
    else:
        name, reason = "slots", "the fastest"
    return Choice(name, candidates[name], microbatch_size, reason)


def _within(
    budget: int,
    candidates: dict[str, Lowering],
    leaves: list[jax.Array],
    batch: Batch,
    microbatch_size: int | None,
) -> Choice:
    count = batch.mask.shape[0]
    size = min(microbatch_size or count, count)
    each = {
        name: kept_bytes(lowering, leaves, batch) / count
        for name, lowering in candidates.items()
    }
    for name, lowering in candidates.items():
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
    return Choice(name, candidates[name], size, reason)


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
