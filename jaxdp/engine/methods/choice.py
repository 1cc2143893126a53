"""Chooses the method for a loss, and how many samples at a time."""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.coupling import BatchStatisticsError
from jaxdp.engine import effects
from jaxdp.engine.batch_of_one import own_statistics
from jaxdp.engine.methods import METHODS
from jaxdp.engine.methods.base import Method, distinct_bytes
from jaxdp.engine.methods.dense import Dense
from jaxdp.engine.plan import Plan, TracedLoss, one_example
from jaxdp.engine.platforms import platform
from jaxdp.engine.reduction import Batch, LeafLoss

# What "auto" chooses from, the preferred one first.
_AUTO = ("slots", "taps")
# How many times the ordinary gradient's memory "auto" takes rather than go through a loss in parts.
_MORE_MEMORY = 1.1


class Choice(NamedTuple):
    """A method, its name, how many samples at a time (None: all), and why; whether it is right only
    as long as one sample is all there is (`effects.with_nobody_beside`)."""

    name: str
    method: Method
    microbatch_size: int | None
    reason: str
    alone: bool = False


def method_names() -> tuple[str, ...]:
    """What `jaxdp.per_sample_grads` takes as a method."""
    return ("auto", *METHODS)


def choose(
    name: str,
    loss: LeafLoss,
    leaves: list[jax.Array],
    batch: Batch,
    *,
    microbatch_size: int | None = None,
    memory_budget: int | None = None,
) -> Choice:
    """The method of that name, or for "auto" the one that suits the loss.

    A loss that rematerialises asks for memory: without another budget it gets what the ordinary
    gradient keeps. Any other without a budget has slots: on the whole batch, unless a loop stacks
    cotangents that the ordinary gradient drops one by one (`_with_stacks`). An empty batch has
    nothing to factor, and is left to dense.

    Raises:
      ValueError: what the loss does besides computing on one example is not understood
        (`engine.effects`); it normalises over a batch; one sample exceeds the budget.
    """
    count = batch.mask.shape[0]
    if count == 0:
        return Choice("dense", Dense(loss, leaves), None, "the batch is empty")
    names = _AUTO if name == "auto" else (name,)
    traced = TracedLoss.of(loss, leaves, one_example(batch.examples))
    alone = _check(traced, batch, names, alone=microbatch_size == 1)
    candidates = {each: METHODS[each].of(traced) for each in names}
    if memory_budget is not None:
        choice = _within(memory_budget, candidates, traced, batch, microbatch_size)
        if choice is None:
            least = min(method.kept_bytes(batch) for method in candidates.values())
            raise ValueError(
                "memory_budget must hold what one sample needs, at least "
                f"{math.ceil(least / count)} bytes with method {name!r}, got {memory_budget}. "
                "Raise it, or leave it out."
            )
    elif name != "auto":
        choice = Choice(name, candidates[name], microbatch_size, "as asked")
    elif any(use.in_remat for use in traced.plan.uses.values()):
        budget = ordinary_bytes(loss, leaves, batch)
        choice = _within(budget, candidates, traced, batch, microbatch_size)
        if choice is None:
            # The norms of the biases alone may need more than that.
            reason = "the loss rematerialises"
            choice = Choice("taps", candidates["taps"], microbatch_size, reason)
    else:
        choice = _with_stacks(candidates["slots"], traced, batch, microbatch_size)
    return _in_blocks(choice, count)._replace(alone=alone)


def _check(traced: TracedLoss, batch: Batch, names: tuple[str, ...], *, alone: bool) -> bool:
    """Raises at what none of these methods computes rightly. Whether something is computed rightly
    since one sample at a time is all there is."""
    excused: set[effects.Excuse] = {"alone"} if alone else set()
    excused |= frozenset.intersection(*(METHODS[name].excuses for name in names))
    needed = effects.check(traced.program, traced.loss, traced.leaves, batch, excused)
    for statistic in own_statistics(traced.program, len(traced.leaves)):
        if statistic.over_batch_alone:
            raise BatchStatisticsError.at(statistic.eqn.source)
    return needed


def _in_blocks(choice: Choice, count: int) -> Choice:
    """The same with no more samples at a time than the method may add up in one sum."""
    most = choice.method.most_at_once
    if most is None or min(choice.microbatch_size or count, count) <= most:
        return choice
    return choice._replace(microbatch_size=most, reason=f"{choice.reason}; sums in blocks")


def _within(
    budget: int,
    candidates: dict[str, Method],
    traced: TracedLoss,
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
    each = {name: method.kept_bytes(batch) / count for name, method in candidates.items()}

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
    worth_it = not others or each[first] * size >= _worth_a_loop(traced.plan)
    if size == asked or (size > 0 and worth_it):
        return choice(first, size)
    for name in others:
        if fitting(name) == asked:
            return choice(name, asked)
    sizes = {name: fitting(name) for name in candidates}
    name = max(sizes, key=lambda name: sizes[name])
    return choice(name, sizes[name]) if sizes[name] else None


def _with_stacks(
    slots: Method, traced: TracedLoss, batch: Batch, microbatch_size: int | None
) -> Choice:
    """Slots on the whole batch, or on as large a part of it that what the loops of the loss stack
    takes no more memory than the ordinary gradient has.

    Outside of loops the ordinary gradient has dropped an activation for almost every cotangent that
    slots keep. A loop has the activations of all steps until the last cotangent is there.
    """
    whole = Choice("slots", slots, microbatch_size, "the fastest")
    count = batch.mask.shape[0]
    stacked = count * _stacked_bytes(traced.plan)
    if microbatch_size is not None or not stacked:
        return whole
    ordinary = ordinary_bytes(traced.loss, traced.leaves, batch)
    parts = math.ceil((ordinary + stacked) / (_MORE_MEMORY * max(ordinary, 1)))
    size = -(-count // min(parts, count))
    if size == count or slots.kept_bytes(batch) * size < _worth_a_loop(traced.plan) * count:
        return whole
    return Choice("slots", slots, size, f"{size} samples at a time for the stacks of its loops")


def _stacked_bytes(plan: Plan) -> int:
    """The cotangents of one sample that slots keep of all steps of loops."""
    slotted = [use for use in plan.uses.values() if use.lengths and use.twin is None]
    return sum(
        math.prod(use.lengths) * use.slotted.size * use.slotted.dtype.itemsize for use in slotted
    )


def _worth_a_loop(plan: Plan) -> float:
    """How many bytes a microbatch must keep for its work to hide the overhead of a loop."""
    if platform() != "cpu":
        return 2.0**26
    # XLA runs convolutions in loops twenty times slower on a CPU.
    slow = any(use.eqn.name == "conv_general_dilated" for use in plan.uses.values())
    return math.inf if slow else 2.0**18


def ordinary_bytes(loss: LeafLoss, leaves: list[jax.Array], batch: Batch) -> int:
    """What the ordinary gradient keeps of a batch between its two passes."""

    def residuals(count: int) -> Any:
        examples = jax.tree.map(lambda leaf: leaf[jnp.zeros(count, int)], batch.examples)

        def losses(leaves: list[jax.Array]) -> jax.Array:
            return jax.vmap(lambda example: loss(leaves, example)[0])(examples)

        return jax.vjp(losses, leaves)[1]

    # The difference leaves out what is kept once, as the parameters are.
    one, two = (distinct_bytes(partial(residuals, count)) for count in (1, 2))
    return (two - one) * batch.mask.shape[0]
