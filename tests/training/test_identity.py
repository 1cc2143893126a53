"""Two runs on one ledger never share noise or batches, and one run goes on as often as it likes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import training
from jaxdp.accounting import Draws, Ledger, LedgerEntry, PoissonSampling, ShuffledEpochs
from jaxdp.released import noise_draws
from tests.training import small
from tests.training.small import chain, fit, poisson, shuffled, start

AGAIN = "draws must be new to the ledger, got steps? 0.* a second time"


def ensemble() -> None:
    """Two members that begin elsewhere: their difference has no noise."""
    first = fit()
    fit(state=start(chain(), (1.0, 0.0, 0.0)), sampler=poisson(2), ledger=first.ledger)


def same_start() -> None:
    first = fit()
    fit(sampler=poisson(2), ledger=first.ledger)


def sweep_over_the_clip() -> None:
    ledger = Ledger()
    for seed, clip in enumerate((1.0, 0.5)):
        ledger = fit(chain(clip=clip), poisson(seed), ledger=ledger).ledger


def sweep_over_the_learning_rate() -> None:
    ledger = Ledger()
    for seed, rate in enumerate((0.1, 0.2)):
        ledger = fit(chain(rate=rate), poisson(seed), ledger=ledger).ledger


def sweep_over_the_noise() -> None:
    ledger = Ledger()
    for seed, sigma in enumerate((2.0, 3.0)):
        ledger = fit(chain(sigma=sigma), poisson(seed), ledger=ledger).ledger


def optimizer_made_anew() -> None:
    """The noise begins again, in mid-run; the batches go on."""
    tx = chain()
    first = fit(tx, steps=2)
    state = first.state._replace(opt_state=tx.init(first.state.params))
    fit(tx, state=state, steps=4, ledger=first.ledger)


def state_from_before() -> None:
    """A state that was kept, and continued twice."""
    first = fit(steps=2)
    kept = jax.tree.map(jnp.copy, first.state)
    fit(state=first.state, steps=4, ledger=first.ledger)
    ledger = fit(state=jax.tree.map(jnp.copy, kept), steps=4, ledger=first.ledger).ledger
    fit(state=kept, steps=3, ledger=ledger)


def one_sampler_for_two_runs() -> None:
    """Fresh noise on the same batches is no sub-sampled release of its own."""
    first = fit(chain(0))
    fit(chain(1), ledger=first.ledger)


def one_seed_at_another_rate() -> None:
    first = fit(chain(0))
    fit(chain(1), poisson(1, sampling_rate=0.5), ledger=first.ledger)


def one_seed_for_two_kinds() -> None:
    first = fit(chain(0), poisson(1))
    fit(chain(1), shuffled(1), ledger=first.ledger)


def one_shuffled_sampler_for_two_runs() -> None:
    first = fit(chain(0), shuffled(1))
    fit(chain(1), shuffled(1), ledger=first.ledger)


def counts_of_two_adaptive_clips() -> None:
    """The gradients have noise of their own, the counts have not."""
    first = fit(chain(0, adaptive=5))
    fit(chain(1, adaptive=5), poisson(2), ledger=first.ledger)


def merged_later() -> None:
    """Two runs that did not know of each other."""
    fit().ledger.merge(fit(state=start(chain(), (1.0, 0.0, 0.0)), sampler=poisson(2)).ledger)


def by_hand() -> None:
    """A loop of one's own says so, too."""
    tx = chain()
    state = start(tx)
    draws = tuple(Draws(*each) for each in noise_draws(state.opt_state))
    fit(tx, ledger=Ledger().charge(2.0, PoissonSampling(0.25), draws=draws))


REPEATS: list[Callable[[], None]] = [
    ensemble,
    same_start,
    sweep_over_the_clip,
    sweep_over_the_learning_rate,
    sweep_over_the_noise,
    optimizer_made_anew,
    one_sampler_for_two_runs,
    one_seed_at_another_rate,
    one_seed_for_two_kinds,
    one_shuffled_sampler_for_two_runs,
    counts_of_two_adaptive_clips,
    merged_later,
    by_hand,
]


@pytest.mark.parametrize("run", REPEATS, ids=lambda run: run.__name__)
def test_a_second_run_on_the_same_random_numbers_is_refused(run: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match=AGAIN) as refused:
        run()
    assert "\n" not in str(refused.value)
    assert "key" in str(refused.value) and "seed" in str(refused.value)


def test_a_state_that_was_continued_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="got steps 2 to 3 of 'gradient noise' .* a second time"):
        state_from_before()


def test_a_refused_run_has_executed_nothing() -> None:
    first, seen = fit(), []
    with pytest.raises(ValueError, match=AGAIN) as refused:
        fit(sampler=poisson(2), ledger=first.ledger, evaluate=lambda params: seen.append(params))
    run = training.run_of(refused.value)
    assert run is not None and not seen
    assert run.ledger == Ledger().merge(first.ledger) and int(run.state.step) == 0


def test_runs_with_keys_and_seeds_of_their_own_compose() -> None:
    first = fit(chain(0, adaptive=5))
    second = fit(chain(1, adaptive=6), poisson(2), ledger=first.ledger)
    assert second.ledger.steps == 8 and len(second.ledger.draws) == 6
    assert first.ledger.merge(fit(chain(7, adaptive=8), poisson(9)).ledger).steps == 8


def test_a_loop_of_one_s_own_says_what_it_draws() -> None:
    """And has the ledger of `fit`."""
    tx, sampler, ledger = chain(0, adaptive=5), shuffled(), Ledger()
    grads_fn = jaxdp.per_sample_grads(small.loss_fn)
    params = jnp.asarray(small.INITIAL)
    opt_state = tx.init(params)

    @jax.jit
    def update(params: Any, opt_state: Any, batch: Any, mask: Any) -> Any:
        updates, opt_state = tx.update(
            grads_fn(params, batch, mask),  # pyright: ignore[reportArgumentType]
            opt_state,
            params,
            is_last=True,  # pyright: ignore[reportCallIssue]
        )
        return optax.apply_updates(params, updates), opt_state

    for step in range(5):
        draws = (*sampler.draws(step), *jaxdp.noise_draws(opt_state))
        [part] = sampler.draw(step)
        params, opt_state = update(params, opt_state, small.DATA[part.indices], part.mask)
        sigmas = [round(float(s), 6) for s in jaxdp.executed_noise_multipliers(opt_state)]
        ledger = ledger.charge(sigmas, sampler.scheme, draws=draws)
    run = fit(tx, sampler, steps=5)
    assert sorted(ledger.draws) == sorted(run.ledger.draws)
    assert ledger.steps == 5 and len(ledger.entries) == 1
    with pytest.raises(ValueError, match=AGAIN):
        ledger.merge(run.ledger)


# One run.


@pytest.mark.parametrize("sampler", [poisson(), shuffled()], ids=["poisson", "shuffled"])
@pytest.mark.parametrize("cuts", [(3, 8), (1, 2, 3, 8), (6, 6, 8)])
def test_a_run_that_goes_on_is_one_run(sampler: Any, cuts: tuple[int, ...]) -> None:
    """In mid-epoch, too: noise, batches, ledger and history are those of a run in one piece."""
    whole = fit(sampler=sampler, steps=8, report_every=8)
    run, ledger, state = None, Ledger(), None
    for steps in cuts:
        run = fit(sampler=sampler, state=state, steps=steps, ledger=ledger, report_every=8)
        state, ledger = run.state, run.ledger
    assert run is not None and run.ledger == whole.ledger
    assert len(run.ledger.entries) == 1
    np.testing.assert_array_equal(run.state.params, whole.state.params)


def test_a_resume_is_the_same_run(tmp_path: Path) -> None:
    whole = fit(steps=6)
    for steps in (2, 4, 6):
        store = training.Checkpoints(tmp_path)
        run = fit(steps=steps, checkpoints=store)
        store.close()
    small.assert_same(run, whole)


def test_the_same_seeds_on_ledgers_of_their_own_are_the_same_run() -> None:
    """An experiment that is repeated: whoever wants both on one record is refused."""
    small.assert_same(fit(), fit())


def test_the_ledger_names_every_stream_by_its_own_counter() -> None:
    tx, sampler = chain(0, adaptive=5), shuffled(seed=271828182845904523)
    run = fit(tx, sampler, steps=5)
    noise = noise_draws(tx.init(jnp.zeros(3)))
    expected = [Draws(purpose, key, 0, 5) for purpose, key, _ in noise] + [*sampler.draws(0, 5)]
    assert sorted(run.ledger.draws) == sorted(expected) and len(expected) == 4
    assert str(sampler.seed) not in run.ledger.to_json()


def test_a_state_that_began_elsewhere_is_charged_where_its_noise_stands() -> None:
    """A new optimizer with a new key in mid-run draws its step 0 at step 2 of the run."""
    first = fit(chain(0), steps=2)
    state = first.state._replace(opt_state=chain(1).init(first.state.params))
    run = fit(chain(1), state=state, steps=4, ledger=first.ledger)
    ranges = {(each.first, each.count) for each in run.ledger.draws if "noise" in each.purpose}
    assert ranges == {(0, 2)} and run.ledger.steps == 4


def test_the_ledger_of_another_run_does_not_hold_the_steps_of_this_one() -> None:
    one, other = fit(chain(0)), fit(chain(1), poisson(2), steps=8)
    with pytest.raises(ValueError, match="got 0 of the 4 draws of 'gradient noise'"):
        fit(chain(0), state=one.state, steps=6, ledger=other.ledger)


def test_an_optimizer_that_has_trained_on_other_data_goes_on() -> None:
    """The steps before are of that data, and in its ledger."""
    other = fit(steps=3)
    state = other.state._replace(step=jnp.zeros((), jnp.int32))
    first = fit(state=state, sampler=poisson(2), steps=2)
    run = fit(state=first.state, sampler=poisson(2), steps=4, ledger=first.ledger)
    assert run.ledger.steps == 4
    assert [each.first for each in run.ledger.draws] == [0, 3]


# What was charged by hand.

POISSON = PoissonSampling(0.25)


def by_hand_once(count: int, sigma: Any = 2.0, scheme: Any = POISSON) -> Ledger:
    return Ledger().charge(sigma, scheme, count)


def test_steps_that_were_charged_by_hand_may_be_those_of_the_state() -> None:
    """A loop of one's own that named no draws, or a ledger from before these were noted."""
    first = fit()
    run = fit(state=first.state, steps=6, ledger=by_hand_once(4))
    assert run.ledger.steps == 6
    more = fit(state=run.state, steps=8, ledger=run.ledger)
    assert more.ledger.steps == 8
    # Another sampler may follow: what was drawn since stands between.
    other = poisson(2, sampling_rate=0.5)
    assert fit(state=more.state, steps=9, ledger=more.ledger, sampler=other).ledger.steps == 9


def test_releases_of_one_step_may_be_charged_by_hand_as_one() -> None:
    tx = chain(adaptive=5)
    for sigma in ([4.0, 2.0], [2.0, 4.0], (2.0**-2 + 4.0**-2) ** -0.5):
        first = fit(tx)
        assert fit(tx, state=first.state, steps=6, ledger=by_hand_once(4, sigma)).ledger.steps == 6


def test_a_schedule_may_be_charged_by_hand() -> None:
    """The state tells of its last step alone."""
    noise = jaxdp.add_noise(lambda step: 2.0 + step, jax.random.key(0))
    behind = jaxdp.accumulate(optax.chain(noise, optax.sgd(0.1)))
    tx = optax.chain(jaxdp.clip_flat(1.0), behind)
    with jax.numpy_dtype_promotion("standard"):
        first, ledger = fit(tx), Ledger()
        for sigma in (2.0, 3.0, 4.0, 5.0):
            ledger = ledger.charge(sigma, POISSON)
        assert fit(tx, state=first.state, steps=6, ledger=ledger).ledger.steps == 6


def drawn_once(count: int, sigma: float = 2.0) -> Ledger:
    """Of another run."""
    return fit(chain(7, sigma=sigma), poisson(9), steps=count).ledger


# Ledgers of as many steps, none of which can be those of the state.
OTHERS: dict[str, Callable[[], Ledger]] = {
    "another noise": lambda: by_hand_once(4, 20.0),
    "less noise": lambda: by_hand_once(4, 1.0),
    "another rate": lambda: by_hand_once(4, scheme=PoissonSampling(0.01)),
    "another scheme": lambda: by_hand_once(4, scheme=ShuffledEpochs(4)),
    "more steps": lambda: by_hand_once(5),
    "more steps ahead of them": lambda: by_hand_once(3, 3.0).charge(2.0, POISSON, 4),
    "the last step alone": lambda: by_hand_once(3, 2.0, PoissonSampling(0.1)).charge(2.0, POISSON),
    "of a run that was closed": lambda: Ledger().merge(by_hand_once(4)),
    "of a run that was closed by another": lambda: drawn_once(1).merge(by_hand_once(4)),
    "ahead of another run": lambda: Ledger((), (*by_hand_once(4).current, *drawn_once(1).current)),
    "behind another run": lambda: drawn_once(4).charge(2.0, POISSON, 4),
}


@pytest.mark.parametrize("ledger", OTHERS.values(), ids=OTHERS.keys())
def test_steps_of_something_else_do_not_pass_for_those_of_the_state(
    ledger: Callable[[], Ledger],
) -> None:
    """An earlier model that was charged by hand, and the ledger of this run forgotten."""
    first = fit()
    says = "got 0 of the 4 draws of 'gradient noise' .* charged by hand pass for these only if"
    with pytest.raises(ValueError, match=says):
        fit(state=first.state, steps=6, ledger=ledger())


def test_the_charges_of_an_earlier_model_do_not_stand_in_for_a_forgotten_run() -> None:
    """As a user forgets it: `ledger=ledger` where `run.ledger` was meant."""
    ledger = Ledger().charge(20.0, PoissonSampling(0.01), 50)
    run = fit(steps=50, ledger=ledger, report_every=50)
    with pytest.raises(ValueError, match="got 0 of the 50 draws .* Pass ledger=run.ledger"):
        fit(state=run.state, steps=51, ledger=ledger)
    assert fit(state=run.state, steps=51, ledger=run.ledger).ledger.steps == 101


def test_draws_in_the_midst_are_not_stood_in_for() -> None:
    """Only what came first can have been charged before draws were noted."""
    first = fit(steps=6)
    [entry] = first.ledger.current
    assert isinstance(entry, LedgerEntry)
    head, middle, tail = (
        LedgerEntry(
            entry.noise_multipliers,
            entry.sampling,
            2,
            tuple(Draws(*each.stream, start, 2) for each in entry.draws),
        )
        for start in (0, 2, 4)
    )
    plain = LedgerEntry(entry.noise_multipliers, entry.sampling, 2)
    ledger = Ledger((), (plain, middle, tail))
    assert fit(state=first.state, steps=6, ledger=ledger).ledger == ledger
    for run in ((head, plain, tail), (plain, head, tail), (head, middle, plain)):
        again = fit(steps=6)
        with pytest.raises(ValueError, match="got 4 of the 6 draws"):
            fit(state=again.state, steps=6, ledger=Ledger((), run))


def test_a_state_that_is_behind_its_ledger_is_refused() -> None:
    """It would draw once more what was drawn; also where no step is left that would."""
    first = fit(steps=4)
    for steps in (2, 4):
        early = fit(steps=2)
        with pytest.raises(ValueError, match="must be new to the ledger, got steps 2 to 3 of 'gra"):
            fit(state=early.state, steps=steps, ledger=first.ledger)


# Where shuffled steps lie.


def spent(ledger: Ledger) -> float:
    return ledger.epsilon(small.DELTA, accountant="rdp")


def gaussians(count: int) -> float:
    return spent(Ledger().charge(2.0, ShuffledEpochs(1), count))


def test_a_sampler_that_is_exchanged_in_mid_epoch_is_charged_anew() -> None:
    first = fit(chain(), shuffled(1), steps=1)
    assert set(shuffled(1).members(0)) & set(shuffled(0).members(1))
    run = fit(chain(), shuffled(0), state=first.state, steps=2, ledger=first.ledger)
    assert spent(first.ledger) == gaussians(1) and spent(run.ledger) == gaussians(2)


def test_a_sampler_that_is_entered_in_mid_epoch_is_charged_for_both_epochs() -> None:
    first = fit(chain(), poisson(), steps=2)
    run = fit(chain(), shuffled(2), state=first.state, steps=6, ledger=first.ledger)
    [_, entry] = run.ledger.entries
    assert isinstance(entry, LedgerEntry) and entry.steps == 4
    assert spent(Ledger((), (entry,))) == gaussians(2)


def test_the_budget_knows_that_a_sampler_is_entered_in_mid_epoch() -> None:
    first = fit(chain(), shuffled(1), steps=2)
    limit = gaussians(2) * (1 + 1e-9)
    run = fit(chain(), shuffled(0), state=first.state, steps=99, ledger=first.ledger, budget=limit)
    # Two steps of the first epoch; the second sampler's next one would be a third participation.
    assert int(run.state.step) == 4 and run.stopped_by == "budget"
    assert spent(run.ledger) == gaussians(2)
    whole = fit(chain(), shuffled(1), steps=99, budget=limit)
    assert int(whole.state.step) == 8


def test_other_sizes_of_batches_are_another_epoch() -> None:
    """Of the same permutation: the ledger sees that other pieces are cut of it."""
    samplers = [
        jaxdp.ShuffledSampler(10, batch_size=size, physical_batch_size=6, seed=1) for size in (6, 5)
    ]
    data = small.DATA[:10]
    first = fit(sampler=samplers[0], data=data, steps=1)
    second = fit(sampler=samplers[1], data=data, state=first.state, steps=2, ledger=first.ledger)
    assert set(samplers[0].members(0)) & set(samplers[1].members(1))
    assert spent(second.ledger) == gaussians(2)
