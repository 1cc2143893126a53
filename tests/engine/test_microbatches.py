"""Microbatches: those without a sample are skipped, and nothing else changes."""

# optax and shard_map type less than they let through.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdp
from jaxdp.distributed import exchanged
from jaxdp.engine import microbatches, walker
from jaxdp.engine.numerics import select_rows
from jaxdp.engine.parts import on_any_device
from tests import helpers

METHODS = ("slots", "taps", "fused", "dense")
ROWS, SIZE, FEATURES, WIDTH = 11, 2, 4, 8
KEY = jax.random.key(3, impl="threefry2x32")

# Which rows hold a sample.
MASKS: dict[str, list[int]] = {
    "nobody": [],
    "padding behind": [0, 1, 2],
    "padding ahead": [7, 8, 9],
    "few": [1, 10],
    "everybody": list(range(ROWS)),
}


def mask_of(members: list[int], rows: int = ROWS) -> jax.Array:
    return jnp.isin(jnp.arange(rows), jnp.asarray(members, int))


def visited(members: list[int]) -> set[int]:
    """The rows of the microbatches that hold a sample."""
    return {row for row in range(ROWS) if any(row // SIZE == member // SIZE for member in members)}


def problem(rows: int = ROWS) -> tuple[Any, Any]:
    """Parameters and a batch whose masked rows hold NaN; row 2 does in any case."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(FEATURES, WIDTH)), "v": rng.normal(size=(WIDTH, 3))}
    x = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    x[2] = np.nan
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return params, (jnp.asarray(x), jax.random.split(KEY, rows))


def loss_fn(params: Any, example: Any) -> tuple[jax.Array, Any]:
    """With a penalty, and beside it a value of every sort."""
    x, key = example
    hidden = jnp.tanh(x @ params["w"]) + 0.1 * jax.random.normal(key, (WIDTH,))
    loss = jnp.sum(jnp.square(hidden @ params["v"])) + 0.01 * jnp.sum(jnp.square(params["w"]))
    aux = {"hidden": hidden, "large": loss > 1, "count": jnp.int32(1), "number": 2.0}
    return loss, aux | {"key": jax.random.key_data(key), "next": jax.random.fold_in(key, 1)}


def asked(method: str, params: Any, batch: Any, mask: jax.Array, **options: Any) -> Any:
    """Whatever a handle answers; aux of the rows that hold a sample."""
    options = {"method": method, "microbatch_size": SIZE} | options
    grads = jaxdp.per_sample_grads(loss_fn, has_aux=True, **options)(params, batch, mask)
    clip = jaxdp.clip_per_layer(0.3)
    aux = dict(grads.aux)
    aux["next"] = jax.random.key_data(aux["next"])
    return (
        clip.update(grads, clip.init(params))[0].value,
        grads.weighted_sum(jnp.arange(mask.shape[0], dtype=jnp.float32)),
        grads.materialize(),
        (grads.norms(), grads.losses, grads.nonfinite),
        jax.tree.map(functools.partial(select_rows, mask), aux),
    )


def clipped(grads: jaxdp.PerSampleGrads) -> Any:
    clip = jaxdp.clip_flat(0.3)
    return clip.update(grads, clip.init(grads.params))[0]


@functools.cache
def compiled(method: str) -> Callable[..., Any]:
    """One program, which visits all microbatches if it is told to."""

    @jax.jit
    def run(params: Any, batch: Any, mask: jax.Array, all_of_them: bool) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(microbatches, "on_any_device", lambda flags, rows: flags | all_of_them)
            return asked(method, params, batch, mask)

    return run


@pytest.mark.sweep
@pytest.mark.parametrize("members", list(MASKS))
@pytest.mark.parametrize("method", METHODS)
def test_what_comes_out_is_the_same_to_the_last_bit(method: str, members: str) -> None:
    args = (*problem(), mask_of(MASKS[members]))
    helpers.assert_trees_equal(compiled(method)(*args, False), compiled(method)(*args, True))


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
def test_members_of_a_vmap_that_differ_in_their_masks(method: str) -> None:
    params, batch = problem()
    members = [
        (jax.tree.map(lambda leaf, by=by: by * leaf, params), mask_of(MASKS[name]))
        for by, name in ((1, "padding behind"), (2, "few"))
    ]
    alone = [compiled(method)(scaled, batch, mask, False) for scaled, mask in members]
    expected, (scaled, masks) = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for each in (alone, members)
    )
    got = jax.jit(jax.vmap(functools.partial(asked, method), (0, None, 0)))(scaled, batch, masks)
    helpers.assert_trees_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_runs_for_the_microbatches_that_hold_a_sample(method: str) -> None:
    seen: list[int] = []

    def told(params: Any, example: Any) -> jax.Array:
        jax.debug.callback(lambda row: seen.append(int(row)), example[0])
        return jnp.sum(jnp.square(example[1] @ params["w"]))

    params, (x, _) = problem()
    batch = (jnp.arange(ROWS), jnp.nan_to_num(x))

    @functools.partial(jax.jit, static_argnames="what")
    def ask(mask: jax.Array, what: str) -> Any:
        grads = jaxdp.per_sample_grads(told, method=method, microbatch_size=SIZE)(
            params, batch, mask
        )
        weighted = functools.partial(grads.weighted_sum, jnp.ones(ROWS))
        return {"norms": grads.norms, "rows": grads.materialize, "sum": weighted}[what]()

    for what in ("norms", "rows", "sum"):
        for members in MASKS.values():
            seen.clear()
            jax.block_until_ready(ask(mask_of(members), what=what))
            jax.effects_barrier()
            # Taps put a row that counts in the place of one that does not.
            assert set(members) <= set(seen) <= visited(members)


def test_derivatives_go_through_a_skipped_microbatch() -> None:
    params, (x, keys) = problem()
    batch = (jnp.nan_to_num(x), keys)

    def total(params: Any, mask: jax.Array, size: int | None) -> jax.Array:
        grads_fn = jaxdp.per_sample_grads(
            loss_fn, has_aux=True, method="slots", microbatch_size=size
        )
        grads = grads_fn(params, batch, mask)
        terms = jax.tree.leaves((clipped(grads).value, grads.norms(), grads.losses))
        return sum((jnp.sum(jnp.square(term)) for term in terms), jnp.zeros(()))

    gradient = jax.jit(jax.grad(total), static_argnums=2)
    mask = mask_of(MASKS["padding behind"])
    whole = gradient(params, mask, None)
    helpers.assert_trees_close(gradient(params, mask, SIZE), whole, rtol=1e-4)


@pytest.mark.optimized
def test_sums_are_kept_once() -> None:
    """A branch that returned what is to be added would hold a table besides the sum of tables."""
    table = jnp.zeros((100_000, 4))
    grads_fn = jaxdp.per_sample_grads(lambda p, x: jnp.sum(p[x]), microbatch_size=SIZE)

    def total(table: jax.Array, mask: jax.Array) -> Any:
        return clipped(grads_fn(table, jnp.arange(ROWS), mask)).value

    memory = jax.jit(total).lower(table, mask_of([])).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < table.nbytes / 10


# ---- devices ------------------------------------------------------------------------------------


def on_mesh(loss: Any, mesh: jax.sharding.Mesh, size: int | None, method: str = "slots") -> Any:
    """Sums and norms where rows are spread along "data"."""

    def run(params: Any, batch: Any, mask: jax.Array) -> Any:
        grads_fn = jaxdp.per_sample_grads(loss, has_aux=True, method=method, microbatch_size=size)
        grads = grads_fn(params, batch, mask)
        reduce = jaxdp.distributed.all_reduce("data")
        total, _ = reduce.update(clipped(grads), reduce.init(params), params)
        return total.value, grads.norms(), grads.losses

    places = (P(), P("data"), P("data"))
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=places, out_specs=places))


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def passed_on(params: Any, example: Any) -> tuple[jax.Array, Any]:
    """A loss that sends its activations round the devices of the model; on a CPU, all devices of
    the mesh wait for each other there."""
    hidden = jnp.tanh(example[0] @ params["w"])
    hidden = jax.lax.pcast(hidden, "model", to="varying")
    round_trip = [(device, (device + 1) % 4) for device in range(4)]
    hidden = jax.lax.ppermute(hidden, "model", round_trip)
    return jax.lax.pmean(jnp.sum(jnp.square(hidden @ params["v"])), "model"), example[1]


DISAGREE = {
    "the last device has nobody": [*range(9)],
    "each has others": [0, 1, 2, 3, 10, 11, 14],
    "nobody": [],
}


@pytest.mark.parametrize("members", list(DISAGREE))
def test_devices_that_disagree_about_what_to_skip(members: str) -> None:
    params, batch = problem(16)
    mask = mask_of(DISAGREE[members], 16)
    run = on_mesh(loss_fn, mesh_of(data=4), SIZE)
    assert exchanged(run.lower(params, batch, mask).compile()) == {"all-reduce": 4 * 8 + 8 * 3}
    one = on_mesh(loss_fn, mesh_of(data=1), None)
    helpers.assert_trees_close(run(params, batch, mask), one(params, batch, mask))


def test_devices_that_share_a_model_have_one_flag() -> None:
    """Along the axis of the samples; those of other samples decide for themselves."""
    flags = jnp.array([True, False, False, False, False, False])

    def run(flags: jax.Array) -> jax.Array:
        return on_any_device(flags, flags)

    def found(mesh: jax.sharding.Mesh, **options: Any) -> list[bool]:
        mapped = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), **options)
        return jax.jit(mapped)(flags).tolist()

    apart, shared = mesh_of(data=2), mesh_of(data=2, model=4)
    assert found(apart) == found(apart, check_vma=False) == flags.tolist()
    together = [True, False, False] * 2
    assert found(shared) == together
    assert found(shared, axis_names={"data"}, check_vma=False) == together
    assert jax.jit(run)(flags).tolist() == flags.tolist()


@pytest.mark.parametrize("members", list(DISAGREE))
def test_devices_that_share_a_model_skip_together(members: str) -> None:
    """Else those that skip would be waited for, for ever."""
    params, batch = problem(16)
    mask = mask_of(DISAGREE[members], 16)
    mesh = mesh_of(data=2, model=4)
    whole = on_mesh(passed_on, mesh, None)(params, batch, mask)
    run = on_mesh(passed_on, mesh, SIZE)
    program, _ = walker.trace(run, params, batch, mask)
    assert "pmax" in {eqn.name for eqn in walker.equations(program)}
    helpers.assert_trees_close(run(params, batch, mask), whole)


@pytest.mark.parametrize("method", ["taps", "fused"])
@pytest.mark.parametrize("empty", [False, True])
def test_devices_that_share_a_model_look_again_together(empty: bool, method: str) -> None:
    """One finds a sample that is not finite, and the others go through the pass with it."""
    params, batch = problem(16)
    mask = mask_of([*range(8, 16)] if empty else [*range(16)], 16)
    spoiled = (batch[0].at[9].set(jnp.nan), *batch[1:])

    run = on_mesh(passed_on, mesh_of(data=2, model=4), None, method)
    program, _ = walker.trace(run, params, spoiled, mask)
    loops = [eqn for eqn in walker.equations(program) if eqn.name == "while"]
    assert any("pmax" in str(eqn.params["cond_jaxpr"]) for eqn in loops)
    total, norms, _ = run(params, spoiled, mask)
    alone = on_mesh(passed_on, mesh_of(data=1, model=4), None, method)
    expected, found, _ = alone(params, spoiled, mask)
    assert not jnp.isfinite(norms[9]) and jnp.all(jnp.isfinite(norms[10:]))
    helpers.assert_trees_close((total, norms[10:]), (expected, found[10:]))


@pytest.mark.sweep
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_spread_under_jit_beside_a_model_that_is(
    method: str, types: AxisType
) -> None:
    params, batch = problem(16)
    mask = mask_of(DISAGREE["each has others"], 16)
    expected = jax.jit(functools.partial(asked, method, microbatch_size=None))(params, batch, mask)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(types,) * 2)
    rows = NamedSharding(mesh, P("data"))
    held = {
        "w": jax.device_put(params["w"], NamedSharding(mesh, P(None, "model"))),
        "v": jax.device_put(params["v"], NamedSharding(mesh, P("model"))),
    }
    told = rows if types == AxisType.Auto else None
    run = jax.jit(functools.partial(asked, method, sharding=told))
    got = run(held, *jax.device_put((batch, mask), rows))
    helpers.assert_trees_close(jax.device_get(got), expected, rtol=2e-5, atol=2e-6)
