"""Parameters that are spread along the axis of the rows: each device gathers what it computes with."""

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
from jaxdp.distributed import exchanged
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
BATCH = (jax.random.randint(KEY, (ROWS, POSITIONS), 0, 12), jnp.ones(ROWS).at[9].set(jnp.inf))


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


def spread() -> tuple[Any, Any, Any]:
    """Parameters, batch and mask on four devices."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    places = {name: NamedSharding(mesh, spec) for name, spec in PLACES.items()}
    rows = NamedSharding(mesh, P("data"))
    return jax.tree.map(jax.device_put, PARAMS, places), *jax.device_put((BATCH, MASK), rows)


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


@pytest.mark.parametrize("method", ["dense", "auto"])
def test_whoever_needs_wholes_gets_wholes(method: str) -> None:
    run = jax.jit(functools.partial(asked, method=method))
    got = run(*spread())
    helpers.assert_trees_close(
        jax.device_get(got), run(PARAMS, BATCH, MASK), rtol=2e-5, atol=2e-5
    )
