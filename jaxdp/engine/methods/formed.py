"""Gradients that are formed while the backward pass goes on.

Where norms come from the matrices or kernels of every sample, operand and cotangent have served as
soon as these are formed. What a compiler does first is its own affair: it may go on with the
backward pass, and keep the cotangents of all layers. So the cotangent goes on to the layer before
behind a barrier, and only when the gradients are formed.

Only a use that is the only one of its parameter is formed here, outside of loops: gradients of
several uses are joined before they are formed.
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp.engine import instrument
from jaxdp.engine.assemble import factor_of
from jaxdp.engine.boxes import Target
from jaxdp.engine.factors.base import Factored
from jaxdp.engine.factors.materialized import Materialized
from jaxdp.engine.instrument import Replacement
from jaxdp.engine.uses import Use
from jaxdp.varying import zeros

# The gradients of a use, by its number: a pytree of `[B, ...]`.
Formed = dict[int, Factored]


def formed_uses(uses: Mapping[int, Use], leaves: list[Any]) -> Formed:
    """The uses whose gradients are formed as soon as they can be, with the shapes of one sample."""
    times = Counter(source for use in uses.values() for source in use.sources)
    twins = {use.twin for use in uses.values()}

    def alone(use: Use) -> bool:
        if use.kind is None or use.lengths or use.in_remat or len(use.view or ()) != 1:
            return False
        return not (use.twin or use.path in twins or any(times[leaf] > 1 for leaf in use.sources))

    forms = {number: _form(use, leaves) for number, use in uses.items() if alone(use)}
    return {number: form for number, form in forms.items() if isinstance(form, Materialized)}


def formed_slots(forms: Formed, uses: Mapping[int, Use], mask: jax.Array) -> Formed:
    """Zeros of which the cotangents will be the gradients."""

    def slot(form: Factored, use: Use) -> Factored:
        like = (mask, use.slotted, *use.eqn.operands)
        return jax.tree.map(
            lambda array: zeros((*mask.shape, *array.shape[1:]), array.dtype, like), form
        )

    return {number: slot(form, uses[number]) for number, form in forms.items()}


def forming(slots: Formed, leaves: list[Any]) -> Replacement:
    """What replaces the equations of these uses: the same, with a backward pass that goes on when
    the gradients are formed."""

    def apply(use: Use, values: list[Any], slot: Any, _: Any) -> tuple[list[Any], list[Any]]:
        output, *rest = use.eqn.bind(values)
        operands = instrument.captured(use, values)
        seen = partial(_formed, use, leaves)
        return [instrument.watched(output, operands, slot, seen, first=True), *rest], []

    return Replacement(apply, slots)


def _form(use: Use, leaves: list[Any]) -> Factored:
    def of_zeros() -> Factored:
        values = [jnp.zeros((1, *aval.shape), aval.dtype) for aval in use.eqn.operands]
        output = use.eqn.outputs[0]
        cotangent = jnp.zeros((1, *output.shape), output.dtype)
        return _formed(use, leaves, instrument.captured(use, values), cotangent)

    return jax.eval_shape(of_zeros)


def _formed(use: Use, leaves: list[Any], operands: Any, cotangent: jax.Array) -> Factored:
    assert use.view is not None
    [part], [at] = use.view, use.boxes
    target = Target(at, tuple(leaves[part.source].shape))
    return factor_of(use, part, target, operands, cotangent).prepared()
