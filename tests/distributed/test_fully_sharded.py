"""Parameters that are spread along the axis of the rows: a device gathers what it computes with."""

# optax and shard_map type less than they let through.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdp
from jaxdp.engine.parts import Cut, InParts, gathered_when_used, on_any_device, part_of, together
from tests import helpers
from tests.helpers import KEY

DEVICES, ROWS, LAYERS, POSITIONS, WIDTH, HIDDEN = 4, 16, 3, 5, 8, 16
PARAMS = {
    "embedding": jax.random.normal(jax.random.key(1), (12, WIDTH)),
    "up": jax.random.normal(jax.random.key(2), (LAYERS, WIDTH, HIDDEN)) / 3,
    "down": jax.random.normal(jax.random.key(3), (LAYERS, WIDTH, HIDDEN)) / 4,
    "bias": jnp.zeros((LAYERS, HIDDEN)),
    "frozen": jax.random.normal(jax.random.key(4), (LAYERS, WIDTH, WIDTH)) / 3,
    "head": jax.random.normal(jax.random.key(5), (WIDTH, 4)),
}
PLACES = {
    "embedding": P(None, "data"),
    "up": P(None, None, "data"),
    "down": P(None, "data"),
    "bias": P(None, "data"),
    "frozen": P(None, "data"),
    "head": P("data"),
}
TRAINABLE = dict.fromkeys(PARAMS, True) | {"frozen": False}
# The rows of the second device are masked, and the third has one that is not finite.
MASK = jnp.arange(ROWS) // 4 != 1
TOKENS = jax.random.randint(KEY, (ROWS, POSITIONS), 0, 12)
BATCH = (TOKENS, jnp.ones(ROWS).at[9].set(jnp.inf))


def loss_fn(params: Any, example: Any, *, remat: bool, dtype: Any = jnp.float32) -> jax.Array:
    """A stack of layers whose second kernel is turned; half a precision where it is asked for."""
    tokens, scale = example

    def layer(x: jax.Array, of_layer: Any) -> tuple[jax.Array, None]:
        up, down = (of_layer[name].astype(dtype) for name in ("up", "down"))
        hidden = jnp.tanh(x.astype(dtype) @ up + of_layer["bias"].astype(dtype)[None])
        return x + (hidden @ down.T).astype(x.dtype) + x @ of_layer["frozen"], None

    stack = {name: params[name] for name in ("up", "down", "bias", "frozen")}
    x = params["embedding"][tokens]
    x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, stack)
    return scale * jnp.sum(jnp.mean(x, axis=0) @ params["head"] * jnp.arange(4.0))


def asked(params: Any, batch: Any, mask: Any, *, remat: bool = False, **options: Any) -> Any:
    """What a step asks for."""
    dtype = options.pop("dtype", jnp.float32)
    loss = functools.partial(loss_fn, remat=remat, dtype=dtype)
    grads = jaxdp.per_sample_grads(loss, trainable=TRAINABLE, **options)(params, batch, mask)
    clip = jaxdp.clip_flat(0.5)
    total, _ = clip.update(grads, clip.init(params), params)
    counted = grads.counted
    return {
        "sum": total.value,
        "norms": jnp.where(counted, grads.norms(), 0.0),
        "losses": jnp.where(counted, grads.losses, 0.0),
        "nonfinite": grads.nonfinite,
    }


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    kinds = (jax.sharding.AxisType.Explicit,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def spread(batch: Any = BATCH, mask: Any = MASK) -> tuple[Any, Any, Any]:
    """Parameters, batch and mask on four devices."""
    mesh = mesh_of(data=DEVICES)
    places = {name: NamedSharding(mesh, spec) for name, spec in PLACES.items()}
    rows = NamedSharding(mesh, P("data"))
    return jax.tree.map(jax.device_put, PARAMS, places), *jax.device_put((batch, mask), rows)


def gathers(compiled: Any) -> list[tuple[int, ...]]:
    """The shape of each array that is gathered."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    return [tuple(map(int, shape.split(","))) for shape in found]


OPTIONS: dict[str, dict[str, Any]] = {
    "slots": {"method": "slots"},
    "slots, remat": {"method": "slots", "remat": True},
    "taps": {"method": "taps"},
    "taps, remat": {"method": "taps", "remat": True},
    "taps in microbatches": {"method": "taps", "remat": True, "microbatch_size": 2},
    "fused": {"method": "fused"},
    "microbatches": {"method": "slots", "microbatch_size": 3},
    "bfloat16": {"method": "slots", "dtype": jnp.bfloat16},
}


@pytest.mark.anew
@pytest.mark.sweep
@pytest.mark.parametrize("case", list(OPTIONS))
def test_layers_are_gathered_one_at_a_time(case: str) -> None:
    """The numbers of one device, from parameters of which nobody ever has a whole stack."""
    options = OPTIONS[case]
    run = jax.jit(functools.partial(asked, **options))
    expected = run(PARAMS, BATCH, MASK)
    assert int(expected["nonfinite"]) == 1
    held = spread()
    compiled = run.lower(*held).compile()
    got = compiled(*held)
    helpers.assert_trees_close(jax.device_get(got), expected, rtol=2e-5, atol=2e-5)
    assert all(np.prod(shape) <= WIDTH * HIDDEN for shape in gathers(compiled))
    for name in set(PARAMS) - {"frozen"}:
        total = got["sum"][name]
        assert total.sharding.is_equivalent_to(held[0][name].sharding, total.ndim)


@pytest.mark.parametrize("method", ["dense", "slots"])
def test_whoever_needs_wholes_gets_wholes(method: str) -> None:
    """Rows of gradients, and sums that the caller weighs."""

    def run(params: Any, batch: Any, mask: Any) -> Any:
        loss = functools.partial(loss_fn, remat=False)
        grads = jaxdp.per_sample_grads(loss, trainable=TRAINABLE, method=method)
        found = grads(params, batch, mask)
        return grads(params, batch, mask).materialize(), found.weighted_sum(jnp.arange(16.0))

    given = TOKENS, jnp.ones(ROWS)
    got = jax.jit(run)(*spread(given))
    expected = jax.jit(run)(PARAMS, given, MASK)
    helpers.assert_trees_close(jax.device_get(got), expected, rtol=2e-5, atol=2e-4)


# Which rows are masked, which of them are not finite: of each device none, some or all.
ROWS_OF = {
    "what is masked is not finite": (MASK, jnp.where(MASK, 1.0, jnp.nan)),
    "nobody is left of a device": (MASK, jnp.where(jnp.arange(ROWS) < 12, 1.0, jnp.inf)),
    "nobody is left": (MASK, jnp.full(ROWS, jnp.nan)),
    "nobody is there": (jnp.zeros(ROWS, bool), jnp.full(ROWS, jnp.nan)),
}


@pytest.mark.sweep
@pytest.mark.parametrize("case", ["taps", "taps in microbatches", "fused", "microbatches"])
@pytest.mark.parametrize("rows", list(ROWS_OF))
def test_devices_go_together_whoever_is_left_on_each(rows: str, case: str) -> None:
    """A device without samples gathers with the others, and what it computes poisons nobody."""
    mask, scale = ROWS_OF[rows]
    run = jax.jit(functools.partial(asked, **OPTIONS[case]))
    got = run(*spread((TOKENS, scale), mask))
    expected = run(PARAMS, (TOKENS, scale), mask)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(expected["sum"]))
    helpers.assert_trees_close(jax.device_get(got), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.anew
@pytest.mark.sweep
@pytest.mark.parametrize("case", ["taps, remat", "slots"])
def test_parameters_that_are_spread_along_some_of_the_axes(case: str) -> None:
    """Rows along two axes and parts along one of them, beside a model that XLA spreads."""
    mesh = mesh_of(pod=2, data=2, model=2)
    places = {name: NamedSharding(mesh, spec) for name, spec in PLACES.items()}
    places["up"] = NamedSharding(mesh, P(None, "model", "data"))
    places["down"] = NamedSharding(mesh, P(None, None, ("pod", "data")))
    rows = NamedSharding(mesh, P(("pod", "data")))
    held = jax.tree.map(jax.device_put, PARAMS, places), *jax.device_put((BATCH, MASK), rows)
    run = jax.jit(functools.partial(asked, **OPTIONS[case]))
    got = run(*held)
    expected = run(PARAMS, BATCH, MASK)
    helpers.assert_trees_close(jax.device_get(got), expected, rtol=2e-5, atol=2e-5)
    for name in set(PARAMS) - {"frozen"}:
        assert got["sum"][name].sharding.is_equivalent_to(places[name], PARAMS[name].ndim)


@pytest.mark.parametrize("flags", [(False, False, True, False), (False,) * 4, (True,) * 4])
def test_where_devices_gather_they_decide_together(flags: tuple[bool, ...]) -> None:
    mesh = mesh_of(data=4)

    def run(part: jax.Array, flag: jax.Array) -> jax.Array:
        assert not together(flag)
        with gathered_when_used([part], [Cut(-1, ("data",))]) as (whole,):
            assert together(flag) and isinstance(part_of(whole), InParts)
            return on_any_device(flag, flag)

    spec = P("data")
    decided = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    given = jax.device_put((jnp.zeros(8), jnp.array(flags)), NamedSharding(mesh, spec))
    assert jax.device_get(jax.jit(decided)(*given)).tolist() == [any(flags)] * 4


@pytest.mark.anew
def test_sums_of_a_rematerialised_stack_are_scattered_layer_by_layer() -> None:
    run = jax.jit(functools.partial(asked, method="taps", remat=True))
    text = str(run.lower(*spread()).compile().as_text())
    shapes = set(re.findall(r"= f32\[([\d,]*)\]\S* reduce-scatter\(", text))
    assert {"8,4", "16,2"} <= shapes  # a quarter of a layer of either kernel
    assert not {"3,8,4", "3,2,16", "3,16,2"} & shapes
    assert f"f32[{LAYERS},{WIDTH},{HIDDEN}]" not in text
