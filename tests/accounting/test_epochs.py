"""Shuffled epochs: no example took part more often than it is charged."""

import math
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdp.accounting import BATCHES, EPOCHS, Draws, Ledger, ShuffledEpochs
from jaxdp.sampling import ShuffledSampler

DELTA = 1e-5


class Piece(NamedTuple):
    """Steps that one sampler drew."""

    sampler: ShuffledSampler
    first: int
    steps: int
    sigma: float


# Two ways to cut ten examples into four batches, and one into two.
SAMPLERS = [ShuffledSampler(10, batch_size=size, seed=seed) for size in (3, 5) for seed in (1, 2)]
SAMPLERS += [ShuffledSampler(10, batch_size=6, seed=1)]

pieces = st.builds(
    Piece,
    st.sampled_from(SAMPLERS),
    st.integers(0, 9),
    st.integers(1, 9),
    st.sampled_from([0.5, 1.0, 2.0]),
)


def charged(run: list[Piece]) -> Ledger:
    """Of what a sampler has drawn before, nothing is drawn again."""
    ledger = Ledger()
    for sampler, first, count, sigma in run:
        ledger = ledger.charge(sigma, sampler.scheme, count, sampler.draws(first, count))
    return ledger


def cost(ledger: Ledger) -> float:
    """Σ 1/σ² of the plain Gaussians that a ledger accounts for."""
    event: Any = ledger.dp_event()
    found = 0.0
    for part in getattr(event, "events", [event]):
        count, gaussian = getattr(part, "count", 1), getattr(part, "event", part)
        found += count / gaussian.noise_multiplier**2
    return found


def true_cost(run: list[Piece]) -> float:
    """The same of the example that met most, by looking."""
    spent = [0.0] * 10
    for sampler, first, count, sigma in run:
        for step in range(first, first + count):
            for member in sampler.members(step):
                spent[member] += 1 / sigma**2
    return max(spent)


@given(st.lists(pieces, min_size=1, max_size=6))
@settings(max_examples=300)
def test_no_example_took_part_more_often_than_is_charged(run: list[Piece]) -> None:
    kept: list[Piece] = []
    for piece in run:
        try:
            charged([*kept, piece])
        except ValueError as error:
            assert "a second time" in str(error)
        else:
            kept.append(piece)
    assert cost(charged(kept)) >= true_cost(kept) * (1 - 1e-9)


@given(st.integers(0, 9), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_one_sampler_that_goes_on_is_charged_for_the_epochs_that_it_entered(
    first: int, counts: list[int]
) -> None:
    """However it is cut into charges: a resume costs nothing."""
    sampler, begin, run = SAMPLERS[0], first, []
    for count in counts:
        run.append(Piece(sampler, begin, count, 2.0))
        begin += count
    epochs = {step // sampler.steps_per_epoch for step in range(first, begin)}
    assert cost(charged(run)) == pytest.approx(len(epochs) / 4)


def test_a_sampler_that_is_exchanged_in_mid_epoch_counts_anew() -> None:
    """Two steps of two samplers, of two in an epoch, share an example."""
    one, two = (ShuffledSampler(8, batch_size=4, seed=seed) for seed in (1, 0))
    assert set(one.members(0)) & set(two.members(1))
    run = [Piece(one, 0, 1, 2.0), Piece(two, 1, 1, 2.0)]
    assert cost(charged(run)) == pytest.approx(2 / 4)
    whole = [Piece(one, 0, 1, 2.0), Piece(one, 1, 1, 2.0)]
    assert cost(charged(whole)) == pytest.approx(1 / 4)


def test_an_epoch_that_is_entered_in_its_midst_is_not_a_whole_one() -> None:
    sampler = SAMPLERS[0]
    within = [Piece(sampler, 2, 2, 2.0)]
    across = [Piece(sampler, 2, 4, 2.0)]
    assert cost(charged(within)) == pytest.approx(1 / 4)
    assert cost(charged(across)) == pytest.approx(2 / 4) and true_cost(across) == 2 / 4


def test_another_size_of_batches_cuts_another_epoch() -> None:
    """The same permutation, as many batches, and yet an example in two of them."""
    one, two = (ShuffledSampler(10, batch_size=size, seed=1) for size in (6, 5))
    assert one.scheme == two.scheme and set(one.members(0)) & set(two.members(1))
    assert cost(charged([Piece(one, 0, 1, 2.0), Piece(two, 1, 1, 2.0)])) == pytest.approx(2 / 4)


def test_what_other_samplers_drew_in_between_ends_an_epoch() -> None:
    """Nobody says where the later steps lie, so they may be in another epoch."""
    scheme, other = ShuffledEpochs(4), ShuffledEpochs(5)
    ledger = Ledger().charge(2.0, scheme, 2)
    assert cost(ledger.charge(2.0, scheme, 2)) == pytest.approx(1 / 4)
    assert cost(ledger.charge(9e5, other).charge(2.0, scheme, 2)) == pytest.approx(2 / 4)
    drawn = ledger.charge(2.0, scheme, 2, [Draws(EPOCHS, "a", 2, 2)])
    assert cost(drawn) == pytest.approx(2 / 4)
    assert cost(drawn.charge(2.0, scheme, 2)) == pytest.approx(3 / 4)


def test_of_a_sampler_of_one_s_own_its_steps_tell_where_they_lie() -> None:
    for first, epochs in [(0, 1), (2, 2), (4, 1), (7, 2)]:
        ledger = Ledger().charge(2.0, ShuffledEpochs(4), 4, [Draws(BATCHES, "5eed", first, 4)])
        assert cost(ledger) == pytest.approx(epochs / 4)


def test_merged_runs_are_pieces_of_their_own() -> None:
    one, two = (charged([Piece(SAMPLERS[0], first, 2, 2.0)]) for first in (0, 2))
    assert cost(one.merge(two)) == pytest.approx(2 / 4)


def test_the_margin_of_a_budget_knows_the_place_in_the_epoch() -> None:
    """In mid-epoch fewer steps are left than from a start, and exactly as many as fit."""
    sampler = SAMPLERS[0]
    question: Any = {"delta": DELTA, "accountant": "rdp"}
    budget = Ledger().charge(2.0, sampler.scheme, 12).epsilon(**question) * (1 + 1e-9)
    for first in range(6):
        drawn = sampler.draws(first)
        left = Ledger().steps_left(2.0, sampler.scheme, epsilon=budget, draws=drawn, **question)
        assert left == 12 - first % 4

        def spent(count: int, first: int = first) -> float:
            return charged([Piece(sampler, first, count, 2.0)]).epsilon(**question)

        assert spent(left) <= budget < spent(left + 1)


def test_a_long_run_is_counted_at_once() -> None:
    epochs = 10**12
    first, scheme = 2 * epochs + 3, ShuffledEpochs(4)
    drawn = [Draws(EPOCHS, "a", first, 4 * epochs)]
    ledger = Ledger().charge(1.0, scheme, 4 * epochs, drawn)
    assert cost(ledger) == epochs + 1
    assert math.isclose(cost(Ledger().charge(1.0, scheme, 4 * epochs)), epochs)
