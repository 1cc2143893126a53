"""What was executed is charged: every step is held against its charge, however the run ends."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import training
from jaxdp.accounting import Ledger, LedgerEntry
from jaxdp.distributions import normal
from jaxdp.released import Released
from tests.training import small

KEY = jax.random.key(5)
RELEASE = "a step must release the noise that it was charged with, got "


def whole(**options: Any) -> jaxdp.PoissonSampler:
    """Every logical batch in one physical batch."""
    return small.poisson(physical_batch_size=small.COUNT, **options)


def left_by(error: type[BaseException], match: str = "", **options: Any) -> training.Run:
    """What a run leaves that ends with an error."""
    arguments: dict[str, Any] = {"sampler": whole()} | options
    with pytest.raises(error, match=match) as found:
        small.fit(**arguments)
    run = training.run_of(found.value)
    assert run is not None
    return run


def notes(error: BaseException) -> str:
    return "\n".join(error.__notes__)


def charges(ledger: Ledger) -> list[tuple[tuple[float, ...], int, bool]]:
    """(noise multipliers, steps, whether with draws) of every entry."""
    steps = [entry for entry in ledger.entries if isinstance(entry, LedgerEntry)]
    return [(each.noise_multipliers, each.steps, bool(each.draws)) for each in steps]


def released(values: list[float], at: Collection[int]) -> training.Step:
    """A step that says, at some of its calls, to have released other noise."""
    true, count = small.step_of(small.chain()), [0]

    def run(*arguments: Any) -> Any:
        state, metrics = true.run(*arguments)
        count[0] += 1
        if count[0] in at:
            metrics = metrics._replace(noise_multipliers=jnp.asarray(values))
        return state, metrics

    return small.foreseen(true._replace(run=run))


def fails_at(call: int, error: type[BaseException]) -> Callable[[Any], Any]:
    calls = [0]

    def called(value: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error("of something else")
        return value

    return called


# Other noise multipliers.


@pytest.mark.parametrize("values", [[0.5], [float("nan")], [2.0, 2.0], [2.001]])
def test_noise_that_was_not_charged_ends_the_run_and_is_charged(values: list[float]) -> None:
    left = left_by(ValueError, RELEASE, step=released(values, {3}), steps=8, report_every=4)
    assert left.state is None
    extra = tuple(np.nan_to_num(np.asarray(values, np.float32)).tolist())
    assert charges(left.ledger) == [((2.0,), 4, True), (pytest.approx(extra), 1, False)]


@pytest.mark.parametrize("at", [range(11, 200), {3, 200}, {200}])
def test_every_step_that_released_other_noise_is_charged(at: Collection[int]) -> None:
    """Not the first one alone: those behind it have released as much."""
    left = left_by(ValueError, RELEASE, step=released([0.5], at), steps=200, report_every=200)
    assert left.state is None
    assert charges(left.ledger) == [((2.0,), 200, True), ((0.5,), len(at), False)]


def test_the_error_tells_of_the_others() -> None:
    with pytest.raises(ValueError, match=r"got noise multipliers \[0.5\] for \[2.0\]. Both") as e:
        small.fit(sampler=whole(), step=released([0.5], {2, 3, 4}), steps=6, report_every=6)
    assert "jaxdp: so it is with 2 more steps" in notes(e.value)


def in_data(fails: Any) -> dict[str, Any]:
    return {"data": lambda indices: fails(small.DATA[indices])}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exception_hides_no_noise_that_was_not_charged(error: type[BaseException]) -> None:
    options = {"step": released([0.5], {3, 5, 7}), "steps": 20, "report_every": 20}
    with pytest.raises(error) as found:
        small.fit(sampler=whole(), **options, **in_data(fails_at(8, error)))
    left = training.run_of(found.value)
    assert left is not None and left.state is None
    assert charges(left.ledger) == [((2.0,), 7, True), ((0.5,), 3, False)]
    assert RELEASE in notes(found.value) and "with 2 more steps" in notes(found.value)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_step_that_raises_hides_no_noise_of_those_before_it(error: type[BaseException]) -> None:
    """There is no state any more, but what the steps have returned is there."""
    true, fails = released([0.5], {3, 5}), fails_at(8, error)
    step = small.foreseen(true._replace(run=lambda *arguments: true.run(*fails(arguments))))
    with pytest.raises(error) as found:
        small.fit(sampler=whole(), step=step, steps=20, report_every=20)
    left = training.run_of(found.value)
    assert left is not None and left.state is None
    assert charges(left.ledger) == [((2.0,), 8, True), ((0.5,), 2, False)]
    assert RELEASE in notes(found.value)


@pytest.mark.parametrize("place", ["evaluate", "log"])
def test_nothing_is_shown_that_was_not_looked_at(place: str) -> None:
    seen: list[Any] = []

    def see(value: Any) -> dict[str, float]:
        seen.append(value)
        return {}

    options: dict[str, Any] = {"evaluate": see} if place == "evaluate" else {"log_fn": see}
    left = left_by(
        ValueError, RELEASE, step=released([0.5], {3}), steps=8, report_every=2, **options
    )
    assert len(seen) == 1 and [row["step"] for row in left.history] == [2]


def test_a_step_that_is_asked_for_is_looked_at_at_once() -> None:
    """Its state was waited for anyway: the next one does not run."""
    true = released([0.5], {3})
    step = true._replace(ahead=None)
    left = left_by(ValueError, RELEASE, step=step, steps=200, report_every=200)
    assert charges(left.ledger) == [((2.0,), 3, True), ((0.5,), 1, False)]


def test_metrics_that_cannot_be_read_end_the_run_and_hide_no_others() -> None:
    """What nobody can look at is no state to go on from."""
    true, count = released([0.5], {2, 5}), [0]

    def run(*arguments: Any) -> Any:
        state, metrics = true.run(*arguments)
        count[0] += 1
        if count[0] == 3:
            metrics.noise_steps.delete()
        return state, metrics

    step = small.foreseen(true._replace(run=run))
    left = left_by(ValueError, RELEASE, step=step, steps=6, report_every=6)
    assert left.state is None
    assert charges(left.ledger) == [((2.0,), 6, True), ((0.5,), 2, False)]


# Other draws.


def restarting(inner: Any, every: int) -> Any:
    """Warm restarts: the state of `inner` begins anew, by selection."""

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        count, held = state
        first = inner.init(params)
        held = jax.tree.map(lambda a, b: jnp.where(count % every == 0, a, b), first, held)
        updates, held = inner.update(updates, held, params, **extra)
        return updates, (count + 1, held)

    return optax.GradientTransformationExtraArgs(init, update)


def noisy() -> Any:
    return optax.chain(jaxdp.add_noise(2.0, KEY), optax.sgd(0.1, momentum=0.9))


RESTARTS: dict[str, Callable[[int], Any]] = {
    "around the noise": lambda every: optax.chain(
        jaxdp.clip_flat(1.0), jaxdp.accumulate(restarting(noisy(), every))
    ),
    "around all": lambda every: optax.chain(
        jaxdp.clip_flat(1.0), restarting(jaxdp.accumulate(noisy()), every)
    ),
    "around the clip": lambda every: optax.chain(
        restarting(
            jaxdp.clip_adaptive(1.0, key=KEY, count_noise_multiplier=4.0, expected_batch_size=6.0),
            every,
        ),
        jaxdp.accumulate(noisy()),
    ),
}


@pytest.mark.parametrize("place", RESTARTS)
@pytest.mark.parametrize(("every", "steps"), [(1, 2), (3, 4), (3, 5), (3, 12)])
def test_noise_that_begins_anew_ends_the_run_before_anybody_sees_it(
    place: str, every: int, steps: int
) -> None:
    """It was drawn before: the difference of the two releases has none."""
    seen: list[Any] = []
    tx = RESTARTS[place](every)
    with pytest.raises(ValueError, match=RELEASE + r"steps \[.*0.*\] of its noise for ") as error:
        small.fit(
            tx,
            whole(),
            steps=steps,
            report_every=1,
            evaluate=lambda params: {"": seen.append(params) or 0.0},
        )
    left = training.run_of(error.value)
    assert left is not None and left.state is None and len(seen) == every
    assert left.ledger.steps == every + 2
    assert left.ledger.epsilon(small.DELTA) == float("inf")


def test_noise_that_begins_anew_is_not_foreseen() -> None:
    """Not even where the counter that shows it comes behind the last step that is asked about."""
    step = small.step_of(tx := RESTARTS["around the noise"](3))
    assert step.ahead is not None
    state, row = small.start(tx), small.DATA[:6]
    for first, count in ((0, 3), (0, 4), (0, 20)):
        found = step.ahead.foresee(state, row, first, count)
        assert found is not None and int(found.known) == 3
    for _ in range(3):
        state, _ = step.run(state, row, np.ones(6, bool), True)
    found = step.ahead.foresee(state, row, 3, 1)
    assert found is not None and int(found.known) == 0


def skipping(steps: int) -> Any:
    """Noise whose counter goes on by several steps at once."""

    def init(params: Any) -> Any:
        return Released.begin(KEY, "noise of a test", params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        for _ in range(steps - 1):
            state = state.after(jnp.float32(2.0))
        noise = normal(state.coming_key(), updates.value.shape, jnp.float32)
        return updates.value + 2.0 * noise, state.after(jnp.float32(2.0))

    noise = optax.GradientTransformationExtraArgs(init, update)
    behind = jaxdp.accumulate(optax.chain(noise, optax.sgd(0.1)))
    return optax.chain(jaxdp.clip_flat(1.0), behind)


def test_noise_that_was_never_drawn_is_charged_as_what_it_is() -> None:
    """And noted, so that nobody draws it again."""
    tx = skipping(3)
    left = left_by(ValueError, RELEASE + r"noise multipliers \[2.0, 2.0, 2.0\]", tx=tx, steps=2)
    assert charges(left.ledger) == [((2.0,), 1, True), ((2.0,) * 3, 1, True)]
    noise = [each for each in left.ledger.draws if each.purpose == "noise of a test"]
    assert [(each.first, each.count) for each in noise] == [(0, 1), (2, 1)]


def test_a_counter_that_leaps_is_no_counter() -> None:
    true = small.step_of(small.chain())

    def run(*arguments: Any) -> Any:
        state, metrics = true.run(*arguments)
        return state, metrics._replace(noise_steps=jnp.array([2**31 - 1]))

    left = left_by(ValueError, RELEASE, step=true._replace(run=run), steps=4)
    assert charges(left.ledger) == [((2.0,), 1, True), ((0.0,), 1, False)]


def test_two_releases_of_one_batch_are_charged_as_such() -> None:
    """A step that runs twice: two steps on batches of their own would cost less."""
    true = small.step_of(small.chain())

    def run(state: Any, *arguments: Any) -> Any:
        state, _ = true.run(state, *arguments)
        return true.run(state, *arguments)

    step = true._replace(run=run)
    left = left_by(ValueError, RELEASE + r"noise multipliers \[2.0, 2.0\]", step=step, steps=4)
    assert charges(left.ledger) == [((2.0,), 1, True), ((2.0, 2.0), 1, True)]
    assert {each.count for each in left.ledger.draws if "noise" in each.purpose} == {2}


def test_noise_for_every_part_of_a_batch_is_charged_for_every_part() -> None:
    """It should look at `is_last`, and does not."""

    def init(params: Any) -> Any:
        return Released.begin(KEY, "noise of a test", params)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        return updates, state.after(jnp.float32(4.0))

    eager = optax.GradientTransformationExtraArgs(init, update)
    inner = jaxdp.accumulate(noisy())
    tx = optax.chain(jaxdp.clip_flat(1.0), eager, inner)
    sampler = small.poisson()
    parts = [len(sampler.draw(step)) for step in range(4)]
    step = next(number for number, count in enumerate(parts) if count > 1)
    with pytest.raises(ValueError, match=f"got {parts[step]} releases for one") as error:
        small.fit(tx, sampler, steps=4)
    left = training.run_of(error.value)
    assert left is not None and left.state is None
    assert left.ledger.steps == step + 2
    last = left.ledger.entries[-1]
    assert isinstance(last, LedgerEntry) and len(last.noise_multipliers) == 2 * parts[step]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_state_with_another_key_is_no_state_to_go_on_from(ahead: bool) -> None:
    """The step may have drawn from it: it is charged for what that would be."""
    true = small.step_of(small.chain())

    def run(*arguments: Any) -> Any:
        state, metrics = true.run(*arguments)
        if int(state.step) == 2:
            state = state._replace(opt_state=rekeyed(state.opt_state))
        return state, metrics

    step = true._replace(run=run)
    seen: list[Any] = []
    with pytest.raises(ValueError) as error:
        small.fit(
            sampler=whole(),
            step=small.foreseen(step) if ahead else step,
            steps=4,
            report_every=2,
            evaluate=lambda params: {"": seen.append(params) or 0.0},
        )
    left = training.run_of(error.value)
    assert str(error.value).startswith("the state behind a step must go on with the noise that ")
    assert left is not None and left.state is None and not seen
    assert charges(left.ledger) == [((2.0,), 2, True), ((2.0,), 1, True)]


def rekeyed(opt_state: Any) -> Any:
    """With another key, at the same step."""

    def replaced(node: Any) -> Any:
        if not isinstance(node, Released):
            return node
        other = Released.begin(KEY, node.purpose, jnp.zeros(3))
        return other.__class__(node.step, node.noise_multiplier, other.key, node.purpose)

    return jax.tree.map(replaced, opt_state, is_leaf=lambda node: isinstance(node, Released))


def test_a_state_that_was_not_compared_is_not_saved(tmp_path: Any) -> None:
    """An exception between two reports saves what the run has come to, if that is what it was
    charged with."""
    true = small.step_of(small.chain())

    def run(*arguments: Any) -> Any:
        state, metrics = true.run(*arguments)
        if int(state.step) == 3:
            state = state._replace(opt_state=rekeyed(state.opt_state))
        return state, metrics

    store = training.Checkpoints(tmp_path)
    step = small.foreseen(true._replace(run=run))
    fails = fails_at(4, OSError)
    with pytest.raises(OSError) as error:
        small.fit(
            sampler=whole(), step=step, steps=9, report_every=9, checkpoints=store, **in_data(fails)
        )
    assert "must go on with the noise" in notes(error.value)
    assert store.restore(small.start(small.chain()), whole()) is None
    store.close()
