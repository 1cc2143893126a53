"""Noise in shares: each device draws its own part, and what comes out is that of one device."""

# optax and shard_map type less than they let through.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import functools
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
from jaxdp.bounded import Bounded
from jaxdp.distributed import data_parallel, exchanged, spread_state
from jaxdp.shares import WORTH_SHARING, names_in, share_of
from tests import helpers
from tests.helpers import KEY

TYPES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
# Shared along the first axis and along the last one; half a precision; too odd, and too small.
SHAPES = {
    "first": ((256, 96), jnp.float32),
    "last": ((25, 16, 64), jnp.float32),
    "half": ((64, 512), jnp.bfloat16),
    "odd": ((129, 135), jnp.float32),
    "small": ((64, 64), jnp.float32),
}
PARAMS = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in SHAPES.items()}
SHARED = sum(PARAMS[name].size for name in ("first", "last", "half"))
SINGLE = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), PARAMS)


def mesh_of(types: str, **axes: int) -> jax.sharding.Mesh:
    kinds = (TYPES[types],) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def noise_of(value: Any, params: Any = None, **options: Any) -> Any:
    """Noise on a sum, of a deviation that is no power of two."""
    tx = jaxdp.add_noise(0.7, options.pop("key", KEY), **options)
    return tx.update(Bounded(value, 1.3), tx.init(value), params)[0]


@functools.cache
def expected() -> Any:
    return jax.device_get(jax.jit(noise_of)(SINGLE, PARAMS))


def told(types: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Types say where things lie if they are explicit; else the caller does."""
    return {} if types == "explicit" else {"sharding": NamedSharding(mesh, P("data"))}


@pytest.mark.anew
@pytest.mark.parametrize("types", list(TYPES))
def test_eight_devices_draw_an_eighth_each_of_the_noise_of_one(types: str) -> None:
    mesh = mesh_of(types, data=8)
    release = functools.partial(noise_of, **told(types, mesh))
    held = jax.device_put((SINGLE, PARAMS), NamedSharding(mesh, P()))
    compiled = jax.jit(release).lower(*held).compile()
    helpers.assert_trees_equal(jax.device_get(compiled(*held)), expected())
    for leaf in jax.tree.leaves(compiled(*held)):
        assert leaf.sharding.is_fully_replicated
        replicas = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(replicas) == 1
    # What was drawn is gathered, and no device has drawn the words of another.
    assert exchanged(compiled) == {"all-gather": SHARED}
    text = str(compiled.as_text())
    assert "u32[3,128,96]" not in text and "u32[3,16,96]" in text


def test_every_share_is_noise_of_its_own() -> None:
    """No share comes twice, none is missing, and no two correlate: by 5.5/√n, which independent
    ones do with probability 28·4·10⁻⁸."""
    mesh = mesh_of("explicit", data=8)
    value = jax.device_put(jnp.zeros((1024, 48)), NamedSharding(mesh, P()))
    noise = np.asarray(jax.jit(noise_of)(value), np.float64)
    shares = noise.reshape(8, -1)
    correlations = np.asarray(np.corrcoef(shares))[np.triu_indices(8, 1)]
    assert np.max(np.abs(correlations)) < 5.5 / np.sqrt(shares.shape[1])
    assert len(np.unique(noise)) > 0.99 * noise.size
    # The deviation of 6,144 draws, each share alone: 6 standard errors, 2e-9 each.
    assert np.all(np.abs(shares.std(axis=1) / (0.7 * 1.3) - 1) < 6 / np.sqrt(2 * 6144))


PLACES = {
    "fully sharded": ({"data": 8}, {"first": P("data"), "last": P(None, None, "data")}),
    "tensor parallel": ({"data": 4, "model": 2}, {"first": P(None, "model"), "odd": P()}),
    "both": ({"data": 4, "model": 2}, {"first": P("model"), "last": P(None, "model", "data")}),
}


@pytest.mark.parametrize("place", list(PLACES))
def test_a_spread_parameter_is_shared_among_those_that_hold_the_same_part(place: str) -> None:
    """Where a leaf is spread already it stays so, and the result lies as the parameter does."""
    axes, specs = PLACES[place]
    mesh = mesh_of("explicit", **axes)
    at = {name: NamedSharding(mesh, specs.get(name, P())) for name in PARAMS}
    value, params = (jax.tree.map(jax.device_put, tree, at) for tree in (SINGLE, PARAMS))
    for given in (params, None):
        got = jax.jit(noise_of)(value, given)
        for name, leaf in got.items():
            assert leaf.sharding.is_equivalent_to(at[name], leaf.ndim)
            known = expected()[name] if given else expected()[name].astype(np.float32)
            if given or name != "half":
                assert np.array_equal(jax.device_get(leaf), known)


def test_the_result_lies_as_the_parameter_does_wherever_the_sum_lies() -> None:
    mesh = mesh_of("explicit", data=8)
    whole, part = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    value, param = SINGLE["first"], PARAMS["first"]
    for of_sum, of_param in ((whole, part), (part, whole)):
        got = jax.jit(noise_of)(jax.device_put(value, of_sum), jax.device_put(param, of_param))
        assert got.sharding.is_equivalent_to(of_param, got.ndim)
        assert np.array_equal(jax.device_get(got), jax.jit(noise_of)(value, param))


@pytest.mark.anew
@pytest.mark.parametrize("types", list(TYPES))
def test_a_generator_that_draws_the_whole_at_once_is_drawn_whole(types: str) -> None:
    """XLA has a flag that lets devices draw parts of it that are not those of the whole."""
    mesh = mesh_of(types, data=8)
    key = jax.random.key(0, impl="rbg")
    release = functools.partial(noise_of, key=key, **told(types, mesh))
    value = jax.device_put(SINGLE["first"], NamedSharding(mesh, P()))
    compiled = jax.jit(release).lower(value).compile()
    assert exchanged(compiled) == {}
    alone = jax.jit(functools.partial(noise_of, key=key))(SINGLE["first"])
    assert np.array_equal(jax.device_get(compiled(value)), alone)


@pytest.mark.anew
def test_inside_shard_map_nothing_is_shared() -> None:
    """What lies on all devices has the same noise on all of them, drawn by each."""
    mesh = mesh_of("auto", data=8)
    release = functools.partial(noise_of, sharding=NamedSharding(mesh, P("data")))
    spread = jax.jit(jax.shard_map(release, mesh=mesh, in_specs=P(), out_specs=P()))
    value = jax.device_put(SINGLE["first"], NamedSharding(mesh, P()))
    assert exchanged(spread.lower(value).compile()) == {}
    assert np.array_equal(jax.device_get(spread(value)), jax.jit(noise_of)(SINGLE["first"]))


@pytest.mark.parametrize("types", list(TYPES))
def test_members_of_a_vmap_and_calls_outside_of_jit_draw_what_they_draw_on_one_device(
    types: str,
) -> None:
    mesh = mesh_of(types, data=8)
    options = told(types, mesh)
    keys, values = jax.random.split(KEY, 2), jnp.zeros((2, *SHAPES["first"][0]))

    def member(key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        return noise_of(value, key=key, **options)

    alone = jax.jit(jax.vmap(member))(keys, values)
    held = jax.device_put((keys, values), NamedSharding(mesh, P()))
    got = jax.jit(jax.vmap(functools.partial(member, **options)))(*held)
    assert np.array_equal(jax.device_get(got), alone)
    eager = noise_of(held[1][0], key=held[0][0], **options)
    helpers.assert_trees_close(jax.device_get(eager), alone[0], rtol=1e-5, atol=1e-6)


def test_what_is_shared_along_which_axis() -> None:
    mesh = mesh_of("explicit", data=4, model=2)

    def spec_of(shape: tuple[int, ...], *held: Any) -> Any:
        leaf = jax.device_put(jnp.zeros(shape), NamedSharding(mesh, P(*held)))
        share = share_of(leaf)
        return None if share is None else tuple(map(names_in, share.spec))

    assert spec_of((WORTH_SHARING // 16, 16)) == (("data", "model"), ())
    assert spec_of((WORTH_SHARING // 16 - 2, 16)) is None
    # In pairs: 8 entries for 8 devices are too few along the axis, 32 are not.
    assert spec_of((8, 2**12)) == ((), ("data", "model"))
    assert spec_of((8, 32, 101)) == ((), ("data", "model"), ())
    # As many of the axes as divide.
    assert spec_of((24, 1001)) == (("data",), ())
    assert spec_of((64, 512), None, "model") == (("data",), ("model",))
    assert spec_of((64, 512), "data", "model") is None
    assert share_of(jnp.zeros((64, 512))) is None


class Job:
    """A run whose loss has no gradient, so that parameters are noise; one leaf is worth sharing."""

    params = {"w": jnp.zeros((128, 160)), "b": jnp.zeros(7)}
    data = np.ones((32, 2), np.float32)

    def __init__(self) -> None:
        behind = optax.chain(jaxdp.add_noise(0.8, KEY), optax.sgd(0.1, momentum=0.5))
        self.tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.accumulate(behind))

        def loss_fn(params: Any, x: jax.Array) -> jax.Array:
            return 0.0 * jnp.sum(params["w"]) * jnp.sum(x) + 0.0 * jnp.sum(params["b"])

        self.step = training.make_step(jaxdp.per_sample_grads(loss_fn), self.tx)
        # Many draws need a second physical batch.
        self.sampler = jaxdp.PoissonSampler(
            32, expected_batch_size=8, physical_batch_size=8, seed=2
        )

    def run(self, steps: int, devices: int, checkpoints: Any = None) -> Any:
        sharding = data_parallel(devices) if devices > 1 else None
        options: dict[str, Any] = {"delta": 1e-5, "progress": False, "checkpoints": checkpoints}
        start = training.init(self.params, self.tx)
        return training.fit(
            start, self.step, self.sampler, self.data, steps=steps, sharding=sharding, **options
        )


@pytest.mark.anew
def test_a_run_draws_the_same_noise_on_any_number_of_devices(tmp_path: Any) -> None:
    """Bit by bit, also where it goes on on others than it was begun on."""
    job = Job()
    alone = job.run(4, 1).state.params
    assert np.asarray(alone["w"]).std() > 0.1
    spread = job.run(4, 8)
    helpers.assert_trees_equal(jax.device_get(spread.state.params), alone)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread.state.params))
    store = training.Checkpoints(tmp_path / "begun on eight")
    job.run(2, 8, store)
    resumed = job.run(4, 2, store)
    helpers.assert_trees_equal(jax.device_get(resumed.state.params), alone)


def test_each_device_holds_its_share_of_the_sums_of_a_logical_batch() -> None:
    job = Job()
    state = training.init(job.params, job.tx)
    placed = spread_state(state, data_parallel(8).mesh)
    after = job.run(2, 8).state
    for opt_state in (placed.opt_state, after.opt_state):
        for sums in jax.tree.leaves(opt_state[1].sums, is_leaf=lambda node: isinstance(node, dict)):
            assert sums["w"].addressable_shards[0].data.shape == (16, 160)
            assert sums["b"].sharding.is_fully_replicated
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(after.params))
    automatic = spread_state(state, mesh_of("auto", data=8))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(automatic))
