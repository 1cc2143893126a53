"""The loop: it executes what it charges, charges what it executes, and says what it did."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import training
from jaxdp.accounting import (
    AccountantName,
    FixedSizeSampling,
    Ledger,
    LedgerEntry,
    PoissonSampling,
    RelationName,
    SamplingScheme,
    ShuffledEpochs,
    calibrate_steps,
)
from jaxdp.sampling import Sampler

COUNT, FEATURES = 40, 3
DELTA = 1e-5
GENERATOR = np.random.default_rng(0)
DATA = (
    GENERATOR.normal(size=(COUNT, FEATURES)).astype(np.float32),
    GENERATOR.normal(size=COUNT).astype(np.float32),
)
KEY = jax.random.key(3)

Chain = optax.GradientTransformation


def loss_fn(params: dict[str, jax.Array], example: tuple[jax.Array, jax.Array]) -> jax.Array:
    return (example[0] @ params["w"] + params["b"] - example[1]) ** 2


def new_params() -> dict[str, jax.Array]:
    return {"w": jnp.zeros(FEATURES), "b": jnp.zeros(())}


def flat(sigma: Any = 2.0, key: jax.Array = KEY) -> Chain:
    inner = optax.chain(jaxdp.add_noise(sigma, key), optax.sgd(0.01, momentum=0.9))
    return optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(inner))


def per_layer(sigma: float, allocation: Any) -> Chain:
    return optax.chain(
        jaxdp.clip_per_layer(1.0),
        jaxdp.accumulate(jaxdp.add_noise(sigma, KEY, allocation)),
        optax.sgd(0.01),
    )


def adaptive(sigma: float, count_sigma: Any) -> Chain:
    clip = jaxdp.clip_adaptive(
        1.0, key=KEY, count_noise_multiplier=count_sigma, expected_batch_size=8.0
    )
    return optax.chain(clip, jaxdp.accumulate(jaxdp.add_noise(sigma, KEY)), optax.sgd(0.01))


def without_accumulation() -> Chain:
    return optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(2.0, KEY), optax.sgd(0.01))


def poisson(**options: Any) -> jaxdp.PoissonSampler:
    return jaxdp.PoissonSampler(COUNT, **({"sampling_rate": 0.2, "seed": 1} | options))


# Compiled once for all tests that ask for the same chain.
FLAT = flat()


@functools.cache
def step_of(tx: Chain) -> training.Step:
    return training.make_step(jaxdp.per_sample_grads(loss_fn), tx)


def fit(
    tx: Chain = FLAT,
    sampler: Sampler | None = None,
    data: Any = DATA,
    *,
    steps: int = 4,
    accountant: Any = "rdp",
    **options: Any,
) -> training.Run:
    return training.fit(
        training.init(new_params(), tx),
        step_of(tx),
        poisson() if sampler is None else sampler,
        data,
        steps=steps,
        accountant=accountant,
        **({"delta": DELTA, "progress": False} | options),
    )


def entries(ledger: Ledger) -> list[tuple[tuple[float, ...], int]]:
    steps = [entry for entry in ledger.entries if isinstance(entry, LedgerEntry)]
    return [(entry.noise_multipliers, entry.steps) for entry in steps]


def without_draws(ledger: Ledger) -> list[Any]:
    return [dataclasses.replace(entry, draws=()) for entry in ledger.entries]


# What is charged.

# Chain -> the entries of four steps.
CHARGES: dict[str, tuple[Chain, list[tuple[tuple[float, ...], int]]]] = {
    # As the user typed it: float32 would make it 1.10000002384.
    "as typed": (flat(1.1), [((1.1,), 4)]),
    "schedule": (
        flat(lambda step: jnp.array([1.3, 1.2, 1.1, 0.7])[step]),
        [((1.3,), 1), ((1.2,), 1), ((1.1,), 1), ((0.7,), 1)],
    ),
    "two values": (flat(lambda step: jnp.where(step < 3, 1.7, 0.9)), [((1.7,), 3), ((0.9,), 1)]),
    "coefficients": (per_layer(1.0, [3.0, 4.0]), [((2.4,), 4)]),
    "adaptive": (adaptive(1.1, 8.8), [((8.8, 1.1), 4)]),
    "adaptive schedule": (
        adaptive(1.1, lambda step: jnp.where(step < 1, 5.5, 6.6)),
        [((5.5, 1.1), 1), ((6.6, 1.1), 3)],
    ),
}


@pytest.mark.parametrize(("tx", "expected"), CHARGES.values(), ids=CHARGES.keys())
def test_the_ledger_holds_the_noise_of_the_chain(
    tx: Chain, expected: list[tuple[tuple[float, ...], int]]
) -> None:
    run = fit(tx)
    assert entries(run.ledger) == expected
    steps = [entry for entry in run.ledger.entries if isinstance(entry, LedgerEntry)]
    assert {entry.sampling for entry in steps} == {PoissonSampling(0.2)}


def test_noise_for_each_of_k_layers_is_charged_as_less() -> None:
    [(noise_multipliers, steps)] = entries(fit(per_layer(2.0, "per_layer")).ledger)
    assert steps == 4 and len(noise_multipliers) == 1
    assert noise_multipliers[0] == pytest.approx(2.0 / math.sqrt(2), rel=1e-6)


SCHEMES: list[tuple[Sampler, SamplingScheme, RelationName]] = [
    (poisson(sampling_rate=0.3), PoissonSampling(0.3), "add_or_remove_one"),
    (
        jaxdp.FixedSizeSampler(COUNT, batch_size=6, seed=1),
        FixedSizeSampling(COUNT, 6),
        "replace_one",
    ),
    (jaxdp.ShuffledSampler(COUNT, batch_size=6, seed=1), ShuffledEpochs(7), "add_or_remove_one"),
]


@pytest.mark.parametrize(
    ("sampler", "scheme", "relation"), SCHEMES, ids=["poisson", "fixed size", "shuffled"]
)
def test_the_ledger_holds_the_scheme_of_the_sampler(
    sampler: Sampler, scheme: SamplingScheme, relation: RelationName
) -> None:
    run = fit(sampler=sampler, neighboring_relation=relation)
    assert without_draws(run.ledger) == [LedgerEntry((2.0,), scheme, 4)]
    expected = run.ledger.epsilon(DELTA, accountant="rdp", neighboring_relation=relation)
    assert run.history[-1]["epsilon"] == expected > 0


def test_a_draw_in_many_physical_batches_is_one_step() -> None:
    sampler = poisson(physical_batch_size=2)
    assert min(len(sampler.draw(step)) for step in range(4)) > 1
    run = fit(sampler=sampler)
    assert without_draws(run.ledger) == [LedgerEntry((2.0,), PoissonSampling(0.2), 4)]
    assert int(run.state.step) == 4


def test_the_size_of_the_physical_batch_changes_nothing_but_rounding() -> None:
    tx = adaptive(1.1, 8.8)
    small, large = (fit(tx, poisson(physical_batch_size=size), steps=6) for size in (3, COUNT))
    for name, leaf in large.state.params.items():
        np.testing.assert_allclose(small.state.params[name], leaf, rtol=2e-5, atol=1e-7)
    assert small.ledger == large.ledger
    assert small.history[-1]["loss"] == pytest.approx(large.history[-1]["loss"], rel=1e-5)


def test_an_empty_draw_is_noised_and_charged() -> None:
    sampler = poisson(sampling_rate=1e-9)
    assert not any(part.mask.any() for step in range(3) for part in sampler.draw(step))
    seen: list[np.ndarray] = []

    def watch(params: Any) -> dict[str, float]:
        seen.append(np.asarray(params["w"]).copy())
        return {}

    run = fit(flat(50.0), sampler, steps=3, report_every=1, evaluate=watch)
    assert run.ledger.steps == 3
    assert np.all(seen[0] != 0) and np.all(seen[1] != seen[0]) and np.all(seen[2] != seen[1])
    assert [row["loss"] for row in run.history] == [0.0] * 3


def test_a_masked_row_never_reaches_the_parameters() -> None:
    """Padding points at row 0, which must count only where it was drawn."""
    sampler = poisson()
    batches = [sampler.draw(step)[0] for step in range(50)]
    batch = next(each for each in batches if 0 not in each.indices[each.mask])
    assert 0 in batch.indices
    poisoned = DATA[0].copy()
    poisoned[0] = np.nan
    step = step_of(FLAT)
    results = [
        step.run(
            training.init(new_params(), FLAT),
            (x[batch.indices], DATA[1][batch.indices]),
            batch.mask,
            True,
        )[0].params["w"]
        for x in (DATA[0], poisoned)
    ]
    np.testing.assert_array_equal(*results)


def test_earlier_charges_on_the_same_data_count() -> None:
    before = Ledger().charge(3.0, PoissonSampling(0.5), steps=2)
    run = fit(ledger=before)
    assert run.ledger.steps == 6 and before.steps == 2
    assert run.history[-1]["epsilon"] == run.ledger.epsilon(DELTA, accountant="rdp")
    assert run.history[-1]["epsilon"] > fit().history[-1]["epsilon"]


def test_an_earlier_run_of_epochs_is_closed_before_a_new_one_begins() -> None:
    """Two half epochs of two runs are two participations, not one epoch."""
    samplers = [jaxdp.ShuffledSampler(COUNT, batch_size=10, seed=seed) for seed in (1, 2)]
    first = fit(sampler=samplers[0], steps=2)
    second = fit(flat(key=jax.random.key(4)), samplers[1], steps=2, ledger=first.ledger)
    both = Ledger().merge(first.ledger).charge(2.0, samplers[1].scheme, 2)
    spent = second.ledger.epsilon(DELTA, accountant="rdp")
    assert spent == both.epsilon(DELTA, accountant="rdp")
    assert spent > first.ledger.epsilon(DELTA, accountant="rdp")


def test_a_state_whose_steps_the_ledger_misses_is_refused() -> None:
    run = fit()
    options: dict[str, Any] = {"steps": 8, "delta": DELTA, "progress": False, "accountant": "rdp"}
    with pytest.raises(ValueError, match="got 0 steps for a state after 4. Pass ledger=run.ledger"):
        training.fit(run.state, step_of(FLAT), poisson(), DATA, **options)
    more = training.fit(run.state, step_of(FLAT), poisson(), DATA, ledger=run.ledger, **options)
    assert more.ledger.steps == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"report_every": 0}, "report_every must be at least 1, got 0"),
    ],
)
def test_counts_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit(**options)


# When it stops.


@pytest.mark.parametrize(
    ("accountant", "relation", "budget"),
    [
        ("pld", "add_or_remove_one", 2.0),
        ("rdp", "add_or_remove_one", 3.0),
        ("pld", "replace_one", 6.0),
    ],
)
def test_it_stops_at_the_last_step_that_fits(
    accountant: AccountantName, relation: RelationName, budget: float
) -> None:
    def spent(ledger: Ledger) -> float:
        return ledger.epsilon(DELTA, accountant=accountant, neighboring_relation=relation)

    run = fit(steps=500, accountant=accountant, neighboring_relation=relation, budget=budget)
    assert run.stopped_by == "budget"
    assert spent(run.ledger) <= budget < spent(run.ledger.charge(2.0, PoissonSampling(0.2)))
    assert run.history[-1]["step"] == run.ledger.steps == int(run.state.step) > 3
    assert run.history[-1]["epsilon"] == spent(run.ledger)


def test_all_releases_of_a_step_count_against_the_budget() -> None:
    # Plain Gaussians, whose accounting is instant.
    sampler = jaxdp.ShuffledSampler(COUNT, batch_size=COUNT, seed=1)
    run = fit(adaptive(10.0, 12.0), sampler, steps=500, budget=3.0)
    expected, without_count = (
        calibrate_steps(
            3.0, noise_multiplier=sigma, delta=DELTA, sampling=sampler.scheme, accountant="rdp"
        )
        for sigma in ([10.0, 12.0], 10.0)
    )
    assert run.ledger.steps == expected < without_count


def test_without_budget_for_one_step_nothing_is_executed_or_charged() -> None:
    tx = flat()
    run = fit(tx, budget=1e-4)
    assert run.stopped_by == "budget"
    assert (run.ledger, run.history, int(run.state.step)) == (Ledger(), [], 0)
    untouched = training.init(new_params(), tx)
    for got, want in zip(jax.tree.leaves(run.state), jax.tree.leaves(untouched), strict=True):
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(got, want)


def test_a_budget_that_suffices_changes_nothing() -> None:
    with_budget, without = fit(budget=100.0), fit()
    assert with_budget.stopped_by == without.stopped_by == "steps"
    np.testing.assert_array_equal(with_budget.state.params["w"], without.state.params["w"])


# What it reports.


def test_it_reports_at_every_period_and_at_the_end() -> None:
    rows: list[Any] = []
    run = fit(
        steps=7,
        report_every=3,
        log_fn=rows.append,
        evaluate=lambda params: {"norm": optax.tree.norm(params)},
    )
    assert [row["step"] for row in run.history] == [3, 6, 7]
    assert rows == run.history
    assert [row["epoch"] for row in rows] == pytest.approx([0.6, 1.2, 1.4])
    assert rows[-1]["norm"] == pytest.approx(float(optax.tree.norm(run.state.params)))
    ledgers = [Ledger().charge(2.0, PoissonSampling(0.2), steps=steps) for steps in (3, 6, 7)]
    assert [row["epsilon"] for row in rows] == [
        ledger.epsilon(DELTA, accountant="rdp") for ledger in ledgers
    ]
    for row in rows:
        assert row["delta"] == DELTA and row["samples_per_second"] > 0 and row["nonfinite"] == 0
        assert all(type(value) in (int, float) for value in row.values())


def test_an_epoch_is_the_default_period() -> None:
    assert [row["step"] for row in fit(steps=11).history] == [5, 10, 11]


def test_the_loss_is_the_mean_since_the_last_report() -> None:
    """Without learning, so that it can be computed by hand."""
    tx = optax.chain(
        jaxdp.clip_flat(1.0),
        jaxdp.accumulate(optax.chain(jaxdp.add_noise(2.0, KEY), optax.scale(0.0))),
    )
    sampler = poisson(physical_batch_size=3)
    run = fit(tx, sampler, steps=4, report_every=2)
    losses = DATA[1] ** 2
    for row, steps in zip(run.history, [(0, 1), (2, 3)], strict=True):
        drawn = np.concatenate(
            [part.indices[part.mask] for step in steps for part in sampler.draw(step)]
        )
        assert row["loss"] == pytest.approx(losses[drawn].mean(), rel=1e-5)


def test_samples_without_a_finite_gradient_are_counted() -> None:
    broken = (DATA[0].copy(), DATA[1])
    broken[0][7] = np.nan
    sampler = poisson()
    parts = [part for step in range(10) for part in sampler.draw(step)]
    run = fit(sampler=sampler, data=broken, steps=10, report_every=10)
    assert run.history[-1]["nonfinite"] == sum(7 in part.indices[part.mask] for part in parts) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.state.params))


def test_data_may_be_a_function_of_indices() -> None:
    asked: list[np.ndarray] = []

    def rows(indices: np.ndarray) -> Any:
        asked.append(indices)
        return tuple(leaf[indices] for leaf in DATA)

    by_function, by_array = fit(data=rows), fit()
    np.testing.assert_array_equal(by_function.state.params["w"], by_array.state.params["w"])
    assert {indices.shape for indices in asked} == {(poisson().physical_batch_size,)}


def test_no_steps_leave_nothing_behind() -> None:
    run = fit(steps=0)
    assert (run.ledger, run.history, run.stopped_by) == (Ledger(), [], "steps")


# What is refused.


def test_a_batch_that_may_overflow_needs_accumulation() -> None:
    with pytest.raises(ValueError, match="jaxdp.accumulate") as caught:
        fit(without_accumulation(), poisson(physical_batch_size=8))
    assert f"physical_batch_size={COUNT}" in str(caught.value)
    fixed = jaxdp.FixedSizeSampler(COUNT, batch_size=8, physical_batch_size=4, seed=1)
    with pytest.raises(ValueError, match="jaxdp.accumulate"):
        fit(without_accumulation(), fixed, neighboring_relation="replace_one")


def test_a_batch_that_cannot_overflow_needs_none() -> None:
    roomy = poisson(physical_batch_size=COUNT)
    fixed = jaxdp.FixedSizeSampler(COUNT, batch_size=8, seed=1)
    assert fit(without_accumulation(), roomy).ledger.steps == 4
    run = fit(without_accumulation(), fixed, neighboring_relation="replace_one")
    assert run.ledger.steps == 4


@pytest.mark.parametrize(
    "data",
    [
        DATA[0][:-1],
        (DATA[0], DATA[1][:-1]),
        (DATA[0], np.float32(1.0)),
        {"x": np.concatenate([DATA[0], DATA[0]]), "y": np.concatenate([DATA[1], DATA[1]])},
    ],
    ids=["short", "one leaf short", "a scalar leaf", "twice as many"],
)
def test_data_of_another_size_than_the_sampler_s_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=f"must hold the {COUNT} examples"):
        fit(data=data)


def _noiseless() -> Chain:
    """Takes the value out of a Bounded: what nobody should do."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates.value, state

    stripped = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(stripped), optax.sgd(0.1))


def _untouched(indices: np.ndarray) -> Any:
    raise AssertionError("an impossible run must fail before it reads data")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no noise": (lambda: fit(_noiseless()), "jaxdp.add_noise"),
    "log": (lambda: fit(data=_untouched, log_fn="nowhere"), "'nowhere'"),
    "accountant": (lambda: fit(data=_untouched, accountant="moments"), "'moments'"),
    "relation": (lambda: fit(data=_untouched, neighboring_relation="some"), "'some'"),
    "delta": (lambda: fit(data=_untouched, delta=2.0), "delta"),
    "scheme without accountant": (
        lambda: fit(
            sampler=jaxdp.FixedSizeSampler(COUNT, batch_size=8, seed=1),
            data=_untouched,
            accountant="pld",
        ),
        "FixedSizeSampling",
    ),
}


@pytest.mark.parametrize(("call", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused_before_the_first_step(
    call: Callable[[], Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.anew
def test_it_compiles_once() -> None:
    tx = flat(lambda step: 1.0 + step.astype(float))
    step = step_of(tx)
    fit(tx, poisson(physical_batch_size=4), steps=8, report_every=2)
    assert step.run._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
    assert step.ahead is not None
    assert step.ahead.foresee._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
    assert step.noise_multipliers._cache_size() == 0  # pyright: ignore[reportFunctionMemberAccess]


def test_the_same_run_twice_is_the_same() -> None:
    first, second = fit(steps=6), fit(steps=6)
    for got, want in zip(
        jax.tree.leaves(first.state.params), jax.tree.leaves(second.state.params), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    assert first.ledger == second.ledger
