"""A state amid a logical batch is seen for what it is, wherever in a chain it lies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp.gathering import Gathers, amid_a_batch, check_between_batches, emptied
from jaxdp.released import Released

KEY = jax.random.key(0)
PARAMS = {"w": jnp.zeros(3), "b": jnp.zeros(())}
GRADS = {"w": jnp.ones((4, 3)), "b": jnp.ones(4)}
NOISE = jaxdp.add_noise(1.0, KEY)


def adaptive(**options: Any) -> Any:
    return jaxdp.clip_adaptive(
        1.0, key=KEY, count_noise_multiplier=2.0, expected_batch_size=4.0, **options
    )


def within(inner: Any) -> Any:
    """The state of another transformation as a field of one of the user's."""

    class Held(NamedTuple):
        calls: jax.Array
        held: Any

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, held = inner.update(updates, state.held, params, **extra)
        return updates, Held(state.calls + 1, held)

    return optax.GradientTransformationExtraArgs(
        lambda params: Held(jnp.zeros((), jnp.int32), inner.init(params)), update
    )


# Chain -> the states that hold a part of a batch, in order.
CHAINS: dict[str, tuple[Any, list[str]]] = {
    "accumulate": (optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(NOISE)), ["AccumulateState"]),
    "adaptive": (
        optax.chain(adaptive(), jaxdp.accumulate(NOISE)),
        ["ClipAdaptiveState", "AccumulateState"],
    ),
    "adaptive per layer": (
        optax.chain(adaptive(per_layer=True), jaxdp.accumulate(NOISE)),
        ["ClipAdaptiveState", "AccumulateState"],
    ),
    "nested": (
        optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(jaxdp.accumulate(NOISE))),
        ["AccumulateState"],
    ),
    "within": (
        within(optax.chain(adaptive(), jaxdp.accumulate(NOISE))),
        [
            "ClipAdaptiveState",
            "AccumulateState",
        ],
    ),
    "masked": (
        optax.masked(optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(NOISE)), True),
        ["AccumulateState"],
    ),
}


def half(tx: Any, grads: Any = GRADS) -> Any:
    """The state behind the first of several physical batches."""
    return tx.update(grads, tx.init(PARAMS), PARAMS, is_last=False)[1]


@pytest.mark.parametrize(("tx", "names"), CHAINS.values(), ids=CHAINS.keys())
def test_a_state_amid_a_batch_is_named(tx: Any, names: list[str]) -> None:
    state = half(tx)
    assert amid_a_batch(state) == names
    says = rf"between two logical batches, got raw sums .*in {', '.join(names)}\).* is_last=True"
    with pytest.raises(ValueError, match=says):
        check_between_batches(state)


@pytest.mark.parametrize("tx", [tx for tx, _ in CHAINS.values()], ids=CHAINS.keys())
def test_a_state_between_two_batches_passes(tx: Any) -> None:
    """Also behind batches that held samples, and behind none."""
    state = tx.init(PARAMS)
    check_between_batches(state)
    for is_last in (False, False, True):
        _, state = tx.update(GRADS, state, PARAMS, is_last=is_last)
    check_between_batches(state)


@pytest.mark.parametrize("tx", [tx for tx, _ in CHAINS.values()], ids=CHAINS.keys())
def test_what_is_emptied_gathers_nothing_and_keeps_all_else(tx: Any) -> None:
    found, before = emptied(half(tx)), tx.init(PARAMS)
    assert amid_a_batch(found) == []
    assert jax.tree.structure(found) == jax.tree.structure(before)

    def steps(state: Any) -> list[int]:
        nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Released))
        return [int(node.step) for node in nodes if isinstance(node, Released)]

    assert steps(found) == steps(before)


def test_states_within_states_are_emptied() -> None:
    """Also where the outer one gathers nothing."""
    nested: Any = jaxdp.accumulate(jaxdp.accumulate(NOISE))
    whole: Any = nested.init(PARAMS)
    _, amid = nested.update(jaxdp.Bounded(PARAMS, 1.0), whole, PARAMS, is_last=False)
    state = whole._replace(inner_state=amid._replace(inner_state=NOISE.init(PARAMS)))
    assert amid_a_batch(state) == ["AccumulateState"]
    assert amid_a_batch((state, amid)) == ["AccumulateState"] * 2
    assert amid_a_batch(emptied(state)) == []


@pytest.mark.parametrize("value", [np.nan, -1.0, 1e-30])
def test_anything_but_zeros_is_a_part_of_a_batch(value: float) -> None:
    state: Any = jaxdp.accumulate(NOISE).init(PARAMS)
    total = {"w": jnp.zeros(3).at[1].set(value), "b": jnp.zeros(())}
    sums = state.sums._replace(total=total)
    assert amid_a_batch(state._replace(sums=sums)) == ["AccumulateState"]
    lost = state.sums._replace(lost=total)
    assert amid_a_batch(state._replace(sums=lost)) == ["AccumulateState"]


def test_a_part_whose_samples_add_up_to_nothing_is_one() -> None:
    """Its sensitivity is there."""
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(NOISE))
    nothing = jax.tree.map(jnp.zeros_like, GRADS)
    assert amid_a_batch(half(tx, nothing)) == ["AccumulateState"]


def test_a_state_of_one_s_own_gathers() -> None:
    @Gathers.register
    class Counts(NamedTuple):
        counts: jax.Array

        @property
        def gathered(self) -> Any:
            return self.counts

        def emptied(self) -> "Counts":
            return self._replace(counts=jnp.zeros_like(self.counts))

    assert amid_a_batch({"a": [Counts(jnp.arange(2))]}) == ["Counts"]
    assert amid_a_batch(emptied({"a": [Counts(jnp.arange(2))]})) == []


def test_a_field_of_the_same_name_is_nobody_s() -> None:
    class Other(NamedTuple):
        gathered: jax.Array

    assert amid_a_batch(Other(jnp.ones(2))) == []
