"""Chooses how the per-sample gradients of a loss are computed."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.coupling import BatchStatisticsError
from jaxdp.engine import effects
from jaxdp.engine.batch_of_one import own_statistics
from jaxdp.engine.dense import Dense
from jaxdp.engine.fused import Fused
from jaxdp.engine.plan import Plan, one_example, trace
from jaxdp.engine.reduction import Batch, LeafLoss, Lowering
from jaxdp.engine.slots import Slots
from jaxdp.engine.sums import BLOCK
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

    A loss that rematerialises asks for memory: without another budget it gets what the ordinary
    gradient keeps. Any other without a budget has slots on the whole batch. An empty batch has
    nothing to factor, and is left to dense.

    Raises:
      ValueError: what the loss does besides computing on one example is not understood
        (`engine.effects`); it normalises over a batch; one sample exceeds the budget.
    """
    choice = _chosen(
        method, loss, leaves, batch, microbatch_size=microbatch_size, memory_budget=memory_budget
    )
    at_once = min(choice.microbatch_size or batch.mask.shape[0], batch.mask.shape[0])
    if isinstance(choice.lowering, Taps) and at_once > BLOCK:
        # Their sum over samples is XLA's, which may be one running total (`engine.sums`).
        return choice._replace(microbatch_size=BLOCK, reason=f"{choice.reason}; sums in blocks")
    return choice


def _chosen(
    method: str,
    loss: LeafLoss,
    leaves: list[jax.Array],
    batch: Batch,
    *,
    microbatch_size: int | None,
    memory_budget: int | None,
) -> Choice:
    if batch.mask.shape[0] == 0:
        return Choice("dense", Dense(loss, leaves), None, "the batch is empty")
    example = one_example(batch.examples)
    program, structure = trace(loss, leaves, example)
    harmless: set[effects.Excuse] = {"dense"} if method == "dense" else set()
    if microbatch_size == 1:
        harmless.add("alone")
    effects.check(program, loss, leaves, batch, harmless)
    for statistic in own_statistics(program, len(leaves)):
        if statistic.over_batch_alone:
            raise BatchStatisticsError.at(statistic.eqn.source)
    if method == "dense":
        candidates: dict[str, Lowering] = {"dense": Dense(loss, leaves)}
    else:
        plan = Plan.from_program(program, structure, leaves)
        names = ("slots", "taps") if method == "auto" else (method,)
        candidates = {name: _FACTORED[name](plan, leaves) for name in names}
        if method == "auto" and memory_budget is None:
            if not any(use.in_remat for use in plan.uses.values()):
                return Choice("slots", candidates["slots"], microbatch_size, "the fastest")
            budget = ordinary_bytes(loss, leaves, batch)
            fitting = _within(budget, candidates, leaves, batch, microbatch_size)
            # The norms of the biases alone may need more than that.
            return fitting or Choice(
                "taps", candidates["taps"], microbatch_size, "the loss rematerialises"
            )
    if memory_budget is None:
        return Choice(method, candidates[method], microbatch_size, "as asked")
    fitting = _within(memory_budget, candidates, leaves, batch, microbatch_size)
    if fitting is None:
        count = batch.mask.shape[0]
        least = min(kept_bytes(lowering, leaves, batch) for lowering in candidates.values())
        raise ValueError(
            "memory_budget must hold what one sample needs, at least "
            f"{math.ceil(least / count)} bytes with method {method!r}, got {memory_budget}"
        )
    return fitting


def _within(
    budget: int,
    candidates: dict[str, Lowering],
    leaves: list[jax.Array],
    batch: Batch,
    microbatch_size: int | None,
) -> Choice | None:
    """The first that fits: a candidate on all samples, the first one in microbatches that are
    worth it, in any, another one in any. None if not one sample fits.

    Slots in microbatches take less time than taps on the whole batch, as long as a microbatch has
    work enough to hide its overhead.
    """
    count = batch.mask.shape[0]
    asked = min(microbatch_size or count, count)
    each = {
        name: kept_bytes(lowering, leaves, batch) / count for name, lowering in candidates.items()
    }

    def choice(name: str, size: int) -> Choice:
        kept = round(each[name] * size)
        if size == asked:
            return Choice(name, candidates[name], microbatch_size, f"keeps {kept:,} B")
        reason = f"{size} samples at a time keep {kept:,} B"
        return Choice(name, candidates[name], size, reason)

    def fitting(name: str) -> int:
        """How many samples at a time, in parts of about the same size."""
        largest = asked if each[name] * asked <= budget else int(budget // each[name])
        return -(-asked // -(-asked // largest)) if largest else 0

    first, *others = candidates
    size = fitting(first)
    worth_it = not others or each[first] * size >= _worth_a_loop(candidates[first])
    if size == asked or (size > 0 and worth_it):
        return choice(first, size)
    for name in others:
        if fitting(name) == asked:
            return choice(name, asked)
    sizes = {name: fitting(name) for name in candidates}
    name = max(sizes, key=lambda name: sizes[name])
    return choice(name, sizes[name]) if sizes[name] else None


def _worth_a_loop(lowering: Lowering) -> float:
    """How many bytes a microbatch must keep for its work to hide its overhead."""
    if jax.default_backend() != "cpu":
        return 2.0**26
    assert isinstance(lowering, Slots)
    # XLA runs convolutions in loops twenty times slower on a CPU.
    slow = any(use.eqn.name == "conv_general_dilated" for use in lowering.plan.uses.values())
    return math.inf if slow else 2.0**18


def ordinary_bytes(loss: LeafLoss, leaves: list[jax.Array], batch: Batch) -> int:
    """What the ordinary gradient keeps of a batch between its two passes."""

    def residuals(count: int) -> list[jax.Array]:
        examples = jax.tree.map(lambda leaf: leaf[jnp.zeros(count, int)], batch.examples)

        def losses(leaves: list[jax.Array]) -> jax.Array:
            return jax.vmap(lambda example: loss(leaves, example)[0])(examples)

        return _each_once(jax.vjp(losses, leaves)[1])

    def kept(count: int) -> int:
        return _bytes(jax.eval_shape(lambda: residuals(count)))

    # The difference leaves out what is kept once, as the parameters are.
    return (kept(2) - kept(1)) * batch.mask.shape[0]


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

    def factors(batch: Batch) -> list[jax.Array]:
        return _each_once(Slots(plan, leaves).factors(batch)[0])

    return _bytes(jax.eval_shape(factors, batch))


def _each_once(tree: Any) -> list[jax.Array]:
    return list({id(array): array for array in jax.tree.leaves(tree)}.values())


def _bytes(arrays: list[Any]) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)
