"""Noise that is foreseen is the noise that is drawn, and what cannot be foreseen is asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import jaxdp
from jaxdp import training
from jaxdp.accounting import LedgerEntry
from jaxdp.distributions import normal
from jaxdp.released import Released, noise_draws
from jaxdp.training import foresight, watch
from jaxdp.training.foresight import LANES
from tests.training import small

KEY = jax.random.key(5)
ROWS = small.DATA[:6]
Chain = optax.GradientTransformationExtraArgs
# (step, number that the state carries, updates, params) -> σ and the next number
Law = Callable[[jax.Array, jax.Array, Any, Any], tuple[Any, Any]]


def own(law: Law, extra: Any = 1.0, advances: Any = True) -> Chain:
    """Noise of the user's, whose σ and counter follow from whatever it likes."""

    def init(params: Any) -> Any:
        return Released.begin(KEY, "noise of a test", params), jnp.asarray(extra)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        released, number = state
        sigma, number = law(released.step, number, updates, params)
        noise = normal(released.coming_key(), updates.value.shape, jnp.float32)
        after = released.after(jnp.asarray(sigma, jnp.float32))
        go: Any = advances(updates) if callable(advances) else advances
        after = dataclasses.replace(after, step=jnp.where(go, after.step, released.step))
        return updates.value + sigma * noise, (after, number)

    return optax.GradientTransformationExtraArgs(init, update)


def accumulated(*noise: Any) -> Any:
    behind = jaxdp.accumulate(optax.chain(*noise, optax.sgd(0.1)))
    return optax.chain(jaxdp.clip_flat(1.0), behind)


def told(step: jax.Array) -> jax.Array:
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return io_callback(lambda step: np.float32(2 + step), scalar, step)


def told_purely(step: jax.Array) -> jax.Array:
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(lambda step: np.float32(2 + step), scalar, step)


def of_parts() -> Any:
    """σ follows from how many physical batches there were."""
    parts = own(lambda step, number, updates, params: (2.0 + number, number))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        count, behind = state
        set_count = jax.tree.map(
            lambda node: (node[0], count) if isinstance(node, tuple) else node,
            behind,
            is_leaf=lambda node: isinstance(node, tuple) and isinstance(node[0], Released),
        )
        updates, behind = inner.update(updates, set_count, params, **extra)
        return updates, (count + 1.0, behind)

    inner = jaxdp.accumulate(parts)
    counted = optax.GradientTransformationExtraArgs(
        lambda params: (jnp.zeros(()), inner.init(params)), update
    )
    return optax.chain(jaxdp.clip_flat(1.0), counted, optax.sgd(0.1))


FORESEEN: dict[str, Any] = {
    "constant": small.chain(1, sigma=1.1),
    "adaptive clip": small.chain(1, adaptive=2),
    "schedule": accumulated(jaxdp.add_noise(lambda step: 2 * 0.99 ** step.astype(float), KEY)),
    "without accumulation": optax.chain(
        jaxdp.clip_flat(1.0),
        jaxdp.add_noise(lambda step: 1.0 + step.astype(float), KEY),
        optax.sgd(0.1),
    ),
    "counter of its own": accumulated(own(lambda step, n, updates, params: (2.0 + n, n + 2), 1)),
}
# Not at all, or not for long.
UNFORESEEN: dict[str, tuple[Any, int]] = {
    "the sum": (
        accumulated(own(lambda step, n, u, params: (2.0 + jnp.abs(jnp.sum(u.value)), n))),
        0,
    ),
    "the parameters": (
        accumulated(own(lambda step, n, u, params: (2.0 + jnp.abs(jnp.sum(params)), n))),
        0,
    ),
    "the step before": (
        accumulated(own(lambda step, n, u, params: (n, n + jnp.abs(jnp.sum(u.value))))),
        0,
    ),
    "a counter that stops": (
        accumulated(own(lambda *_: (2.0, 1.0), advances=lambda u: jnp.sum(u.value) < 9)),
        0,
    ),
    "the host": (accumulated(jaxdp.add_noise(told, KEY)), 0),
    "the host, purely": (accumulated(jaxdp.add_noise(told_purely, KEY)), 0),
    "how many parts": (of_parts(), 0),
    "a sum that grows": (accumulated(own(lambda step, n, u, params: (n, n * 1.25))), 3),
}
# No question ahead of a step tells: the run ends at the first step that shows.
UNKNOWABLE = ("the sum", "how many parts")


def executed(tx: Any, steps: int) -> list[list[float]]:
    """What the state tells after each step."""
    step, state = small.step_of(tx), small.start(tx)
    found = []
    for _ in range(steps):
        state, metrics = step.run(state, ROWS, np.ones(len(ROWS), bool), True)
        found.append(metrics.noise_multipliers.tolist())
    return found


def asked(tx: Any, first: int = 0, count: int = 20) -> Any:
    step = small.step_of(tx)
    assert step.ahead is not None
    return step.ahead.foresee(small.start(tx), ROWS, first, count)


@pytest.mark.parametrize("name", FORESEEN)
@pytest.mark.parametrize("first", [0, LANES - 3])
def test_what_is_foreseen_is_what_is_executed(name: str, first: int) -> None:
    tx = FORESEEN[name]
    found, steps = asked(tx, first), 6
    assert int(found.known) == 20
    lanes = (first + np.arange(steps)) % LANES
    np.testing.assert_allclose(found.noise_multipliers[lanes], executed(tx, steps), rtol=1e-6)
    counters = np.asarray(found.counters)[lanes]
    np.testing.assert_array_equal(counters, np.tile(np.arange(steps)[:, None], counters.shape[1]))


@pytest.mark.parametrize("name", UNFORESEEN)
def test_what_depends_on_anything_else_is_not_foreseen(name: str) -> None:
    tx, most = UNFORESEEN[name]
    found = asked(tx)
    assert found is None or int(found.known) <= most


@pytest.mark.parametrize("name", UNKNOWABLE)
def test_noise_that_nobody_knows_ahead_ends_the_run(name: str) -> None:
    with pytest.raises(ValueError, match="must release the noise that it was charged with") as e:
        small.fit(UNFORESEEN[name][0], steps=7)
    left = training.run_of(e.value)
    assert left is not None and left.state is None


@pytest.mark.parametrize("name", [*FORESEEN, *sorted(set(UNFORESEEN) - set(UNKNOWABLE))])
def test_the_ledger_holds_what_was_executed(name: str) -> None:
    """Whether it was foreseen or not."""
    tx = FORESEEN[name] if name in FORESEEN else UNFORESEEN[name][0]
    seen: list[list[float]] = []
    true = small.step_of(tx)
    size = small.COUNT if name == "without accumulation" else 4
    sampler = small.poisson(physical_batch_size=size)

    def told_of(**options: Any) -> training.Run:
        return small.fit(tx, sampler, steps=7, **options)

    def run(state: Any, batch: Any, mask: Any, is_last: Any) -> Any:
        state, metrics = true.run(state, batch, mask, is_last)
        if is_last:
            seen.append(metrics.noise_multipliers.tolist())
        return state, metrics

    foreseeing = told_of()
    watched = told_of(step=true._replace(run=run))  # of which nothing is foreseen
    entries = [each for each in foreseeing.ledger.entries if isinstance(each, LedgerEntry)]
    charged = [each.noise_multipliers for each in entries for _ in range(each.steps)]
    np.testing.assert_allclose(charged, seen, rtol=1e-6)
    small.assert_same(foreseeing, watched)
    drawn = {each[:2]: each[2] for each in noise_draws(foreseeing.state.opt_state)}
    ends = {each.stream: each.end for each in foreseeing.ledger.draws}
    assert all(ends[stream] == step for stream, step in drawn.items())


def counting(step: training.Step, calls: list[str]) -> training.Step:
    """Notes each question."""
    assert step.ahead is not None
    ahead = step.ahead

    def foresee(*arguments: Any) -> Any:
        calls.append("ahead")
        return ahead.foresee(*arguments)

    def noise_multipliers(*arguments: Any) -> Any:
        calls.append("step")
        return step.noise_multipliers(*arguments)

    replaced = dataclasses.replace(ahead, foresee=foresee)
    return step._replace(ahead=replaced, noise_multipliers=noise_multipliers)


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("constant", 100, ["ahead"]),
        ("schedule", 100, ["ahead"]),
        ("the parameters", 10, ["ahead"] + 10 * ["step"]),
        ("a sum that grows", 10, ["ahead"] + 7 * ["step"]),
    ],
)
def test_many_steps_are_asked_for_at_once(name: str, steps: int, expected: list[str]) -> None:
    tx = FORESEEN[name] if name in FORESEEN else UNFORESEEN[name][0]
    calls: list[str] = []
    run = small.fit(tx, step=counting(small.step_of(tx), calls), steps=steps, report_every=steps)
    assert run.ledger.steps == steps and calls == expected


def test_of_a_step_of_the_user_s_nothing_is_foreseen() -> None:
    """It may do anything to the state: here it draws the noise of its first step twice."""
    true, calls = small.step_of(FORESEEN["schedule"]), [0]
    kept: list[Any] = []

    def run(state: Any, batch: Any, mask: Any, is_last: Any) -> Any:
        kept.append(jax.tree.map(jnp.copy, state.opt_state))
        calls[0] += 1
        state, metrics = true.run(state, batch, mask, is_last)
        return (state._replace(opt_state=kept[1]) if calls[0] == 2 else state), metrics

    sampler = small.poisson(physical_batch_size=small.COUNT)
    with pytest.raises(
        ValueError, match="must go on with the noise .* got step 1 .* for step 2"
    ) as e:
        small.fit(FORESEEN["schedule"], sampler, step=true._replace(run=run), steps=8)
    left = training.run_of(e.value)
    assert left is not None and left.ledger.steps == calls[0] == 2 and left.state is None


def test_a_long_run_asks_again_and_a_resumed_one_is_charged_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tx, calls = FORESEEN["schedule"], list[str]()
    monkeypatch.setattr("jaxdp.training.foresight.LANES", 8)
    monkeypatch.setattr("jaxdp.training.charges.LANES", 8)
    grads_fn = jaxdp.per_sample_grads(small.loss_fn)
    step = counting(training.make_step(grads_fn, tx), calls)
    whole = small.fit(tx, step=step, steps=20)
    assert calls == 3 * ["ahead"]
    half = small.fit(tx, step=step, steps=5)
    rest = small.fit(tx, step=step, steps=20, state=half.state, ledger=half.ledger)
    assert rest.ledger == whole.ledger


def test_no_schedule_is_asked_about_steps_beyond_the_run() -> None:
    tx = accumulated(jaxdp.add_noise(lambda step: jnp.where(step < 5, 2.0, jnp.nan), KEY))
    assert not np.isnan(asked(tx, count=5).noise_multipliers).any()
    assert small.fit(tx, steps=5).ledger.steps == 5


def test_nothing_is_told_to_the_host() -> None:
    seen: list[Any] = []

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        jax.debug.callback(lambda values: seen.append(values), updates)
        return updates, state

    spy = optax.GradientTransformation(lambda params: (), update)
    tx = accumulated(jaxdp.add_noise(2.0, KEY), spy)
    assert int(asked(tx).known) == 20
    jax.effects_barrier()
    assert not seen


# What is looked at, and when.


@pytest.mark.parametrize(("report_every", "looks"), [(100, [100]), (40, [40, 40, 20])])
def test_metrics_are_read_at_reports_alone(
    report_every: int, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    true = watch.Watch.look

    def look(self: watch.Watch, keep: int = 0) -> int:
        found.append(true(self, keep))
        return found[-1]

    monkeypatch.setattr(watch.Watch, "look", look)
    small.fit(steps=100, report_every=report_every)
    assert found == looks


def test_metrics_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MOST", 5)
    piled = small.fit(steps=30, report_every=30)
    monkeypatch.undo()
    small.assert_same(piled, small.fit(steps=30, report_every=30))


def test_no_more_than_two_steps_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before these is waited for."""
    ended: list[Any] = []
    true, metrics = small.step_of(small.chain()), list[Any]()
    sampler = small.poisson(physical_batch_size=small.COUNT)

    def run(*arguments: Any) -> Any:
        assert len(metrics) <= 2 or any(metrics[-3].samples is each for each in ended)
        found = true.run(*arguments)
        metrics.append(found[1])
        return found

    def wait(values: Any) -> Any:
        ended.append(values)
        return values

    monkeypatch.setattr(jax, "block_until_ready", wait)
    # Otherwise it is asked for, and so waited for, at every step.
    step = small.foreseen(true._replace(run=run))
    small.fit(sampler=sampler, step=step, steps=9, report_every=9)
    assert len(metrics) == 9 and len(ended) >= 7


def test_a_step_that_fails_on_the_device_is_charged_with_those_behind_it() -> None:
    """Nobody knows yet that it failed when they are begun."""
    calls = [0]

    def count(total: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError("on the device")
        return total

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        shape = jax.ShapeDtypeStruct(updates.shape, updates.dtype)
        return jax.pure_callback(count, shape, updates), state

    fails = optax.GradientTransformation(lambda params: (), update)
    tx = accumulated(jaxdp.add_noise(2.0, KEY), fails)
    sampler = small.poisson(physical_batch_size=small.COUNT)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="on the device") as error:
        small.fit(tx, sampler, steps=20, report_every=20)
    left = training.run_of(error.value)
    assert left is not None and left.state is None
    assert 3 <= left.ledger.steps <= 3 + watch.IN_FLIGHT


def test_a_rate_for_each_of_many_leaves_is_no_counter() -> None:
    """What is large is not copied for every step."""
    extra = np.ones(foresight._LARGEST + 1, np.float32)  # pyright: ignore[reportPrivateUsage]
    tx = accumulated(own(lambda step, n, u, params: (jnp.sum(n), n), extra))
    assert asked(tx) is None
