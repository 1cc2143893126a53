"""Which random numbers were used: every step of a stream once, and never one forgotten."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdp.accounting import (
    EPOCHS,
    Draws,
    Ledger,
    LedgerEntry,
    PoissonSampling,
    PureRelease,
    ShuffledEpochs,
)
from jaxdp.accounting.draws import joined

POISSON, OTHER, SHUFFLED = PoissonSampling(0.1), PoissonSampling(0.2), ShuffledEpochs(4)
DELTA = 1e-5
ANY: Any = Ledger()

# Few streams and few steps, so that draws meet.
draws = st.builds(
    Draws, st.sampled_from("pq"), st.sampled_from("ab"), st.integers(0, 12), st.integers(1, 5)
)
Model = set[tuple[str, str, int]]


def covered(*each: Draws) -> Model:
    return {(d.purpose, d.fingerprint, step) for d in each for step in range(d.first, d.end)}


def batches(first: int, count: int = 1, seed: str = "5eed") -> Draws:
    return Draws("batches", seed, first, count)


def noise(first: int, count: int = 1, key: str = "kee1") -> Draws:
    return Draws("gradient noise", key, first, count)


# Ranges, against sets.


@given(st.lists(draws, max_size=12))
def test_ranges_are_the_union_and_refuse_exactly_what_overlaps(new: list[Draws]) -> None:
    known: tuple[Draws, ...] = ()
    for each in new:
        before = covered(*known)
        if before & covered(each):
            with pytest.raises(ValueError, match="draws must be new to the ledger"):
                joined(known, [each])
            continue
        known = joined(known, [each])
        assert covered(*known) == before | covered(each)
        assert len(covered(*known)) == sum(one.count for one in known)
        assert list(known) == sorted(known)
        # Joined where they are contiguous, so that a run of any length is one range.
        assert not any(
            one.stream == two.stream and one.end == two.first for one in known for two in known
        )


@given(st.lists(draws, max_size=8, unique_by=lambda each: (each.stream, each.first)))
def test_the_order_of_charges_does_not_matter(new: list[Draws]) -> None:
    def union(order: list[Draws]) -> tuple[Draws, ...] | None:
        try:
            return joined((), order)
        except ValueError:
            return None

    shuffled = random.Random(0).sample(new, len(new))
    assert union(new) == union(shuffled) == union(new[::-1])


def test_what_is_refused_is_named() -> None:
    with pytest.raises(ValueError, match=r"got steps 3 to 4 of 'batches' \(fingerprint 5eed\) a s"):
        joined((batches(0, 5),), [batches(3, 9)])
    with pytest.raises(ValueError, match="got step 8 of"):
        joined((batches(0, 5), batches(8, 9)), [batches(5, 4)])


# The ledger.

operations = st.lists(
    st.one_of(
        st.tuples(st.just("charge"), st.lists(draws, max_size=2), st.sampled_from([1.0, 2.0])),
        st.tuples(st.just("pure"), st.lists(draws, max_size=2), st.just(0.5)),
        st.tuples(st.just("merge"), st.lists(draws, max_size=2), st.just(1.0)),
        st.tuples(st.just("json"), st.just([]), st.just(0.0)),
    ),
    max_size=12,
)


@given(operations)
def test_a_ledger_never_forgets_a_draw_nor_takes_one_twice(operations: list[Any]) -> None:
    ledger, model, steps, pure = Ledger(), set(), 0, 0
    for kind, new, number in operations:
        # Of each stream one draw for each step.
        new = [replace(each, count=new[0].count) for each in new]
        count = new[0].count if new else 1
        own = covered(*new)
        clash = bool(own & model) or len(own) < count * len(new)
        call: dict[str, Callable[[], Ledger]] = {
            "charge": lambda: ledger.charge(number, POISSON, count, new),  # noqa: B023
            "pure": lambda: ledger.charge_pure(number, draws=new),  # noqa: B023
            "merge": lambda: ledger.merge(Ledger().charge(number, OTHER, count, new)),  # noqa: B023
            "json": lambda: Ledger.from_json(ledger.to_json()),  # noqa: B023
        }
        if clash:
            with pytest.raises(ValueError, match="draws must be new to the ledger"):
                call[kind]()
            continue
        longer = call[kind]()
        model |= own
        steps += count if kind in ("charge", "merge") else 0
        pure += kind == "pure"
        assert longer.extends(ledger) and (longer == ledger or not ledger.extends(longer))
        ledger = longer
        assert covered(*ledger.draws) == model
        assert ledger.steps == steps
        assert sum(isinstance(entry, PureRelease) for entry in ledger.entries) == pure
    assert Ledger.from_json(ledger.to_json()).draws == ledger.draws == replace(ledger).draws


def test_equal_steps_join_where_their_draws_go_on_and_only_there() -> None:
    def charged(*steps: list[Draws]) -> tuple[Any, ...]:
        ledger = Ledger()
        for each in steps:
            ledger = ledger.charge(1.0, POISSON, draws=each)
        return ledger.entries

    entry = LedgerEntry((1.0,), POISSON, 2, (batches(0, 2), noise(7, 2)))
    assert charged([batches(0), noise(7)], [batches(1), noise(8)]) == (entry,)
    for other in ([batches(2), noise(8)], [batches(1, seed="2"), noise(8)], [batches(1)], []):
        assert len(charged([batches(0), noise(7)], other)) == 2


def test_draws_cost_nothing() -> None:
    plain = Ledger().charge(1.1, POISSON, 20).charge_pure(0.1).charge_pure(0.1)
    drawn = (
        Ledger()
        .charge(1.1, POISSON, 20, [batches(0, 20), noise(0, 20)])
        .charge_pure(0.1, draws=[Draws("selection", "a", 0)])
        .charge_pure(0.1, draws=[Draws("selection", "b", 0)])
    )
    for accountant in ("pld", "rdp"):
        assert drawn.epsilon(DELTA, accountant=accountant) == plain.epsilon(
            DELTA, accountant=accountant
        )


def test_the_same_ledger_twice_is_refused_where_it_knows_its_draws() -> None:
    drawn = Ledger().charge(1.0, POISSON, draws=[batches(0)])
    with pytest.raises(ValueError, match="Charge one run after the other, each with a key and"):
        drawn.merge(drawn)
    by_hand = Ledger().charge(1.0, POISSON)
    assert by_hand.merge(by_hand).steps == 2


def test_a_checkpoint_that_was_continued_twice_cannot_be_merged() -> None:
    saved = Ledger().charge(1.0, POISSON, 10, [batches(0, 10), noise(0, 10)])
    one, two = (saved.charge(1.0, POISSON, n, [batches(10, n), noise(10, n)]) for n in (3, 5))
    with pytest.raises(ValueError, match="got steps 0 to 12 of 'batches'"):
        one.merge(two)


@pytest.mark.parametrize("sigma", [2.0, [2.0, 3.0]], ids=["one", "several"])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray, lambda value: value])
def test_noise_multipliers_may_be_arrays(sigma: Any, array: Callable[[Any], Any]) -> None:
    expected = Ledger().charge(sigma, POISSON, 3)
    count: Any = np.int64(3)
    assert Ledger().charge(array(sigma), POISSON, count) == expected
    if isinstance(sigma, list):
        assert Ledger().charge([array(each) for each in sigma], POISSON, 3) == expected


def test_draws_may_be_the_tuples_that_noise_draws_gives() -> None:
    expected = Ledger().charge(1.0, POISSON, draws=[batches(3), noise(7)])
    found = Ledger().charge(1.0, POISSON, draws=[batches(3), ("gradient noise", "kee1", 7)])
    assert found == expected
    pure = Ledger().charge_pure(0.1, draws=[("selection", "a", 3)])
    assert pure == Ledger().charge_pure(0.1, draws=[Draws("selection", "a", 3)])


# What a ledger extends.

BEFORE = Ledger().charge_pure(0.5)
DRAWN_BEFORE = Ledger().charge_pure(0.5, draws=[Draws("selection", "a", 0)])
RUN = Ledger().merge(BEFORE).charge(1.0, POISSON, 3, [batches(0, 3)])

# (longer, shorter, whether it extends it)
EXTENSIONS: dict[str, tuple[Ledger, Ledger, bool]] = {
    "nothing": (RUN, Ledger(), True),
    "itself": (RUN, RUN, True),
    "what it was given": (RUN, BEFORE, True),
    "what it was given twice": (RUN, BEFORE.merge(BEFORE), False),
    "its own past": (RUN.charge(1.0, POISSON, 2, [batches(3, 2)]), RUN, True),
    "its own past with something behind": (RUN.charge_pure(0.1), RUN, True),
    "its own future": (RUN, RUN.charge(1.0, POISSON, 2, [batches(3, 2)]), False),
    "less of something else": (RUN, Ledger().charge(1.0, POISSON, 2), False),
    "as much by hand": (RUN, Ledger().charge(1.0, POISSON, 3), False),
    "the same with other draws": (RUN, Ledger().charge(1.0, POISSON, 3, [batches(3, 3)]), False),
    "the same with other noise": (
        Ledger().charge(1.0, POISSON, 3, [noise(0, 3)]),
        Ledger().charge(1.0, POISSON, 3, [noise(0, 3, "other")]),
        False,
    ),
    "another order": (
        Ledger().charge_pure(0.1).charge_pure(0.2),
        Ledger().charge_pure(0.2).charge_pure(0.1),
        False,
    ),
    "the last entry is longer": (
        Ledger().charge_pure(0.1).charge(1.0, POISSON, 5),
        Ledger().charge_pure(0.1).charge(1.0, POISSON, 3),
        True,
    ),
    "a middle entry is longer": (
        Ledger().charge(1.0, POISSON, 5).charge_pure(0.1),
        Ledger().charge(1.0, POISSON, 3).charge_pure(0.1),
        False,
    ),
    "a release that was made again": (
        Ledger().merge(BEFORE),
        DRAWN_BEFORE,
        False,
    ),
    "a drawn release that is stated again": (Ledger().merge(DRAWN_BEFORE), DRAWN_BEFORE, True),
    "one that is not there": (RUN, Ledger().charge_pure(10.0), False),
    "one more than was given": (RUN, BEFORE.charge_pure(10.0), False),
}


@pytest.mark.parametrize(("longer", "shorter", "expected"), EXTENSIONS.values(), ids=EXTENSIONS)
def test_what_a_ledger_extends(longer: Ledger, shorter: Ledger, expected: bool) -> None:
    assert longer.extends(shorter) is expected


# As JSON.


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    ledger = (
        Ledger()
        .charge_pure(0.5, draws=[Draws("selection", "a", 0)])
        .charge(1.5, POISSON, 2, [batches(0, 2)])
        .charge(1.4, POISSON, 2, [batches(2, 2)])
    )
    data = json.loads(ledger.to_json())
    change(data)
    return json.dumps(data)


EDITED = {
    "fewer steps": edited(lambda d: d["current"][1].update(steps=1)),
    "fewer draws": edited(lambda d: d["current"][1]["draws"][0].update(count=1)),
    "the same draws twice": edited(lambda d: d["current"][2]["draws"][0].update(first=1)),
    "an entry twice": edited(lambda d: d["closed"].append(d["current"][1:2])),
    "draws that are no list": edited(lambda d: d["current"][1].update(draws={})),
    "no draws": edited(lambda d: d["current"][1].pop("draws")),
    "half a draw": edited(lambda d: d["current"][1]["draws"][0].update(first=0.5)),
    "a negative step": edited(lambda d: d["current"][1]["draws"][0].update(first=-1)),
    "no purpose": edited(lambda d: d["current"][1]["draws"][0].update(purpose="")),
    "a nameless stream": edited(lambda d: d["current"][1]["draws"][0].update(fingerprint=3)),
    "an unknown field": edited(lambda d: d["current"][1]["draws"][0].update(seed=3)),
    "draws in version 1": edited(lambda d: d.update(version=1)),
    "version 1.0": edited(lambda d: d.update(version=1.0)),
    "version 2.0": edited(lambda d: d.update(version=2.0)),
    "no version": edited(lambda d: d.pop("version")),
    # Python's reader takes the last of two.
    "steps twice": edited(lambda d: None).replace('"steps": 2', '"steps": 1000, "steps": 2', 1),
    "noise twice": edited(lambda d: None).replace(
        '"noise_multipliers": [1.5]', '"noise_multipliers": [0.1], "noise_multipliers": [1.5]'
    ),
    "a rate twice": edited(lambda d: None).replace(
        '"sampling_rate"', '"sampling_rate": 0.9, "sampling_rate"', 1
    ),
    "current twice": edited(lambda d: None).replace('"current"', '"current": [], "current"'),
    "a draw's count twice": edited(lambda d: None).replace('"count": 2', '"count": 9, "count": 2'),
    "the same key twice": edited(lambda d: None).replace('"closed"', '"closed": [], "closed"'),
}  # fmt: skip


@pytest.mark.parametrize("text", EDITED.values(), ids=EDITED.keys())
def test_an_edited_ledger_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="text must be JSON written by Ledger.to_json"):
        Ledger.from_json(text)


def test_the_unedited_ledger_is_read() -> None:
    assert Ledger.from_json(edited(lambda d: None)).steps == 4


def test_what_was_saved_before_draws_were_noted_is_read() -> None:
    """And goes on with draws."""
    text = (
        '{"format": "jaxdp.ledger", "version": 1, "closed": [[{"epsilon": 0.5, "sampling": null}]],'
        ' "current": [{"noise_multipliers": [1.5], "sampling": {"kind": "shuffled_epochs", '
        '"steps_per_epoch": 4}, "steps": 6}]}'
    )
    ledger = Ledger.from_json(text)
    assert ledger == Ledger().merge(Ledger().charge_pure(0.5)).charge(1.5, SHUFFLED, 6)
    assert ledger.draws == ()
    more = ledger.charge(1.5, SHUFFLED, 1, [batches(6)])
    assert more.extends(ledger) and Ledger.from_json(more.to_json()) == more


# Errors.

ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no sequence": (lambda: ANY.charge(1.0, POISSON, draws=3), TypeError, "draws must be"),
    "text": (lambda: ANY.charge(1.0, POISSON, draws="batches"), TypeError, "draws must be"),
    "None": (lambda: ANY.charge(1.0, POISSON, draws=None), TypeError, "draws must be"),
    "tuples of something else": (
        lambda: ANY.charge(1.0, POISSON, draws=[("batches", "5eed")]),
        TypeError,
        "draws must be of type Draws, got",
    ),
    "of no steps": (lambda: ANY.charge(1.0, POISSON, 0, [3]), TypeError, "draws must be of type"),
    "pure": (lambda: ANY.charge_pure(1.0, draws=[3]), TypeError, "draws must be of type Draws"),
    "too few": (
        lambda: ANY.charge(1.0, POISSON, 3, [batches(0, 2)]),
        ValueError,
        "draws must count one of each stream for each of the 3 steps, got 2 of 'batches'",
    ),
    "a stream twice": (
        lambda: ANY.charge(1.0, POISSON, 2, [batches(0, 2), batches(1, 2)]),
        ValueError,
        "got step 1 of 'batches'",
    ),
    "two samplers": (
        lambda: ANY.charge(1.0, SHUFFLED, 1, [Draws(EPOCHS, "a", 0), Draws(EPOCHS, "b", 0)]),
        ValueError,
        "draws must be those of one sampler",
    ),
    "two seeds": (
        lambda: ANY.charge(1.0, POISSON, 1, [batches(0, seed="1"), batches(0, seed="2")]),
        ValueError,
        "draws must be those of one sampler",
    ),
    "again": (
        lambda: Ledger().charge(1.0, POISSON, 1, [noise(3)]).charge(2.0, OTHER, 1, [noise(3)]),
        ValueError,
        r"got step 3 of 'gradient noise' .* Give the run a key of its own \(jaxdp.random_key",
    ),
    "again beside steps": (
        lambda: Ledger().charge(1.0, POISSON, 1, [noise(3)]).charge_pure(0.1, draws=[noise(3)]),
        ValueError,
        "draws must be new to the ledger",
    ),
    "purpose": (lambda: Draws("", "a", 0), ValueError, "purpose must not be empty"),
    "fingerprint": (lambda: ANY_DRAWS("a", 3, 0), TypeError, "fingerprint must be of type str"),
    "first": (lambda: Draws("a", "b", -1), ValueError, "first must be at least 0, got -1"),
    "count": (lambda: Draws("a", "b", 0, 0), ValueError, "count must be at least 1, got 0"),
    "no integer": (lambda: ANY_DRAWS("a", "b", 0.5), TypeError, "first must be an integer"),
    "extends": (lambda: ANY.extends(3), TypeError, "other must be of type Ledger, got 3"),
}
ANY_DRAWS: Any = Draws


@pytest.mark.parametrize(("call", "error", "says"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_rule_and_what_to_do(
    call: Callable[[], object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call()
