"""`training.fit` on several devices of one process, and what it is made of."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdp
from jaxdp import training
from jaxdp.distributed import check_agreement, data_parallel, join, spread_rows, spread_state
from tests import helpers
from tests.distributed import job
from tests.training import small

# The job itself is plain; promotion is no matter of this file.
pytestmark = pytest.mark.usefixtures("plain_promotion")


@pytest.fixture
def plain_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(
    ("types", "parts"),
    [
        pytest.param(AxisType.Explicit, 1, marks=pytest.mark.slow),
        (AxisType.Explicit, 4),
        (AxisType.Auto, 1),
    ],
)
def test_a_run_on_four_devices_is_that_of_one(types: AxisType, parts: int) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(types,))
    expected = job.train(steps=3)
    got = job.train(steps=3, sharding=NamedSharding(mesh, P("data")), parts=parts)
    helpers.assert_trees_close(
        jax.device_get(got.state.params), expected.state.params, rtol=1e-5, atol=1e-6
    )
    assert got.ledger == expected.ledger
    for leaf in jax.tree.leaves(got.state.params):
        replicas = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 4 and len(replicas) == 1


@contextlib.contextmanager
def compilations() -> Iterator[Counter[str]]:
    """How often each function is compiled."""
    found: Counter[str] = Counter()

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found[kwargs["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


PLACES = {
    "the same on all devices": {"w": P(), "b": P()},
    "spread along the rows": {"w": P("data"), "b": P("data")},
    "spread along columns": {"w": P(None, "data"), "b": P()},
}


@pytest.mark.anew
@pytest.mark.parametrize("types", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("place", list(PLACES))
def test_a_step_is_compiled_once_for_a_state_that_is_spread(place: str, types: AxisType) -> None:
    """Sums, counters, keys and moments come out of a step as they went in."""
    rows = NamedSharding(jax.make_mesh((4,), ("data",), axis_types=(types,)), P("data"))
    params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}
    params = jax.tree.map(
        lambda leaf, at: jax.device_put(leaf, NamedSharding(rows.mesh, at)), params, PLACES[place]
    )

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(x @ params["w"] + params["b"]))

    behind = optax.chain(
        jaxdp.add_noise(1.0, jax.random.key(0)), optax.adam(optax.linear_schedule(0.1, 0.0, 9))
    )
    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(behind))
    told = None if types == AxisType.Explicit else rows
    step: Any = training.make_step(jaxdp.per_sample_grads(loss_fn, sharding=told), tx)
    state, sampler = training.init(params, tx), small.poisson(physical_batch_size=8)
    data = np.ones((small.COUNT, 8), np.float32)
    with compilations() as found:
        small.fit(tx, sampler, state=state, step=step, data=data, sharding=rows, steps=4)
    assert (found["run"], found["foresee"]) == (1, 1)
    if jax.__version_info__ >= (0, 12):  # 0.10 names the layout of a key otherwise within a step
        assert step.run._cache_size() == 1


def test_an_adaptive_clip_is_the_same_on_four_devices() -> None:
    clip = helpers.adaptive(0.5, expected_batch_size=10.0)
    expected = job.train(steps=3, clip=clip)
    got = job.train(steps=3, clip=clip, sharding=data_parallel(4))
    assert got.ledger == expected.ledger
    helpers.assert_trees_close(
        jax.device_get(got.state.params), expected.state.params, rtol=1e-5, atol=1e-6
    )


def test_randomness_of_the_model_is_the_same_on_four_devices() -> None:
    """Each sample has the key that it has on one device."""

    def loss_fn(params: Any, example: Any) -> jax.Array:
        row, key = example
        return jnp.sum(params * row * jax.random.normal(key, row.shape))

    def trained(**options: Any) -> Any:
        behind = optax.chain(jaxdp.add_noise(0.5, jax.random.key(0)), optax.sgd(0.1))
        tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(behind))
        grads_fn = jaxdp.per_sample_grads(loss_fn)
        return training.fit(
            training.init(jnp.ones(3), tx),
            training.make_step(grads_fn, tx, example_keys=True),
            job.SAMPLER,
            np.ones((job.COUNT, 3), np.float32),
            steps=2,
            delta=1e-5,
            progress=False,
            **options,
        ).state.params

    got = jax.device_get(trained(sharding=data_parallel(4)))
    helpers.assert_trees_close(got, trained(), rtol=1e-5, atol=1e-6)


def test_every_device_loads_its_own_rows_once() -> None:
    asked: list[np.ndarray] = []

    def rows_of(indices: np.ndarray) -> Any:
        asked.append(indices)
        return {"x": indices[:, None] * np.ones(3), "y": indices}

    sharding = data_parallel(4)
    batch = spread_rows(rows_of, np.arange(8) * 10, sharding)
    assert [indices.tolist() for indices in asked] == [[0, 10, 20, 30, 40, 50, 60, 70]]
    for leaf in batch.values():
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        np.testing.assert_array_equal(leaf.reshape(8, -1)[:, 0], np.arange(8) * 10)


def test_a_state_goes_to_all_devices_but_for_what_is_spread_already() -> None:
    mesh = data_parallel(4).mesh
    spread = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    state = {"nan": jnp.full((), jnp.nan), "key": jax.random.key(3), "spread": spread}
    placed = spread_state(state, mesh)
    assert placed["spread"] is spread
    assert placed["nan"].sharding.spec == P() and jnp.isnan(placed["nan"])
    assert len(placed["key"].sharding.device_set) == 4
    helpers.assert_trees_equal(
        jax.random.key_data(placed["key"]), jax.random.key_data(state["key"])
    )


def test_a_process_on_its_own_agrees_with_itself() -> None:
    check_agreement(state=jnp.ones(2), arguments=[1, None, "pld"])
    join()


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"devices must be at most 8, got 9"):
        data_parallel(9)
    with pytest.raises(ValueError, match="num_processes=2 and process_id=0 need a coordinator"):
        join(num_processes=2, process_id=0)
    with pytest.raises(ValueError, match="must divide among 3 devices, got 8. Choose a physical"):
        job.train(sharding=data_parallel(3))
    with pytest.raises(ValueError, match="data_parts must divide the 4 devices .* got 3"):
        job.train(sharding=data_parallel(4), parts=3)
    with pytest.raises(ValueError, match="data_parts must divide the 1 devices .* got 2"):
        job.train(parts=2)


def test_a_part_that_may_hold_more_than_its_rows_needs_accumulation() -> None:
    """Two of four examples of one part, of which there is room for one."""
    sampler = jaxdp.FixedSizeSampler(8, batch_size=4, seed=0)
    chain = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, jax.random.key(0)))
    grads_fn = jaxdp.per_sample_grads(lambda params, x: jnp.sum(params * x))
    run: dict[str, Any] = {"steps": 1, "delta": 1e-5, "progress": False, "accountant": "rdp"}
    run |= {"neighboring_relation": "replace_one", "sharding": data_parallel(4)}
    arguments = (
        training.init(jnp.ones(1), chain),
        training.make_step(grads_fn, chain),
        sampler,
        np.ones((8, 1), np.float32),
    )
    assert training.fit(*arguments, **run).ledger.steps == 1
    with pytest.raises(ValueError, match="may need several physical batches"):
        training.fit(*arguments, data_parts=4, **run)
