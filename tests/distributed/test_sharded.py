"""Batches that are spread over devices under `jit`, and models that are."""

# optax and shard_map type less than they let through.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdp
from jaxdp import lipschitz, nn
from jaxdp.distributed import all_reduce, exchanged
from tests import helpers
from tests.helpers import KEY

DEVICES, ROWS = 4, 16
TYPES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
MASK = jnp.arange(ROWS) % 3 != 0

MODELS: dict[str, tuple[nn.Layer, tuple[int, ...]]] = {
    "mlp": (nn.sequential(nn.linear(6, 16), jnp.tanh, nn.linear(16, 4)), (6,)),
    # Per-sample kernels come from a loop over samples, which XLA alone would gather.
    "cnn": (
        nn.sequential(nn.conv2d(2, 16, 3, padding=1), jnp.tanh, nn.flatten(), nn.linear(1024, 4)),
        (8, 8, 2),
    ),
    # A loop that begins with zeros, as losses for one device do.
    "lstm": (
        nn.sequential(nn.lstm(3, 8), lambda found: found[0][-1], nn.linear(8, 4)),
        (5, 3),
    ),
}


def mesh_of(types: str, **axes: int) -> jax.sharding.Mesh:
    kinds = (TYPES[types],) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def problem(model: str) -> tuple[Callable[..., Any], Any, Any]:
    """Loss, parameters and batch, one of whose samples is not finite."""
    layer, shape = MODELS[model]
    x = np.random.default_rng(0).normal(size=(ROWS, *shape)).astype(np.float32)
    x[4] = np.nan

    def loss_fn(params: Any, example: Any) -> jax.Array:
        logits = layer.apply(params, example[0])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, example[1])

    return loss_fn, layer.init(KEY), (x, jnp.arange(ROWS) % 4)


def asked(grads_fn: Callable[..., Any], params: Any, batch: Any, mask: Any) -> dict[str, Any]:
    """What a step asks for, and noise."""
    grads = grads_fn(params, batch, mask)
    tx = optax.chain(jaxdp.clip_flat(0.1), jaxdp.add_noise(1.0, KEY))
    return {
        "updates": tx.update(grads, tx.init(params), params)[0],
        "norms": jnp.where(grads.counted, grads.norms(), 0.0),
        "losses": jnp.where(grads.counted, grads.losses, 0.0),
        "nonfinite": grads.nonfinite,
    }


METHODS = {
    "auto": {},
    "taps": {"method": "taps"},
    "fused": {"method": "fused"},
    "microbatches": {"microbatch_size": 2},
    "dense": {"method": "dense"},
}
MORE = pytest.mark.slow
CASES = [
    ("mlp", "explicit", "auto"),
    ("cnn", "explicit", "auto"),
    ("lstm", "explicit", "auto"),
    ("lstm", "auto", "microbatches"),
    ("cnn", "auto", "microbatches"),
    ("mlp", "auto", "taps"),
    *(
        pytest.param(model, types, method, marks=MORE)
        for model in MODELS
        for types in TYPES
        for method in METHODS
    ),
]


@pytest.mark.anew
@pytest.mark.sweep
@pytest.mark.parametrize(("model", "types", "method"), CASES)
def test_gradients_are_computed_where_their_rows_lie(model: str, types: str, method: str) -> None:
    """The numbers of one device, and nothing is exchanged but one sum of gradients."""
    loss_fn, params, batch = problem(model)
    one = jaxdp.per_sample_grads(loss_fn, **METHODS[method])
    expected = jax.jit(functools.partial(asked, one))(params, batch, MASK)
    rows = NamedSharding(mesh_of(types, data=DEVICES), P("data"))
    # A mesh with explicit axes needs no word.
    told = rows if types == "auto" else None
    grads_fn = jaxdp.per_sample_grads(loss_fn, sharding=told, **METHODS[method])
    spread = jax.device_put((batch, MASK), rows)
    held = jax.device_put(params, NamedSharding(rows.mesh, P()))
    lowered = jax.jit(functools.partial(asked, grads_fn)).lower(held, *spread)
    entries = sum(leaf.size for leaf in jax.tree.leaves(params))
    compiled = lowered.compile()
    assert exchanged(compiled) == {"all-reduce": entries + 1}  # how many are not finite
    got = compiled(held, *spread)
    helpers.assert_trees_close(jax.device_get(got), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("types", list(TYPES))
def test_weights_and_rows_stay_with_their_samples(types: str) -> None:
    loss_fn, params, batch = problem("mlp")
    rows = NamedSharding(mesh_of(types, data=DEVICES), P("data"))

    def run(sharding: Any, params: Any, batch: Any, mask: Any, weights: Any) -> Any:
        grads = jaxdp.per_sample_grads(loss_fn, sharding=sharding)(params, batch, mask)
        finite = jax.tree.map(jnp.nan_to_num, grads.materialize())
        return grads.weighted_sum(weights), finite

    weights = jnp.arange(ROWS, dtype=jnp.float32)
    expected = jax.jit(functools.partial(run, None))(params, batch, MASK, weights)
    told = rows if types == "auto" else None
    held = jax.device_put(params, NamedSharding(rows.mesh, P()))
    spread = jax.device_put((batch, MASK, weights), rows)
    got = jax.jit(functools.partial(run, told))(held, *spread)
    helpers.assert_trees_close(jax.device_get(got), expected, rtol=2e-5, atol=2e-5)


def test_a_mesh_that_says_nothing_gives_the_same_numbers() -> None:
    """XLA may gather rows then; what comes out is the same."""
    loss_fn, params, batch = problem("cnn")
    run = jax.jit(functools.partial(asked, jaxdp.per_sample_grads(loss_fn)))
    rows = NamedSharding(mesh_of("auto", data=DEVICES), P("data"))
    got = run(params, *jax.device_put((batch, MASK), rows))
    expected = run(params, batch, MASK)
    helpers.assert_trees_close(jax.device_get(got), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("types", list(TYPES))
def test_gradients_without_clipping_are_computed_where_their_rows_lie(types: str) -> None:
    layer, _ = MODELS["mlp"]

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return lipschitz.softmax_cross_entropy(layer.apply(params, example[0]), example[1])

    rows = NamedSharding(mesh_of(types, data=DEVICES), P("data"))
    _, params, batch = problem("mlp")
    options: dict[str, Any] = {
        "input_bound": (1.0, jnp.inf),
        "thresholds": {"0": 0.1, "2": jnp.inf},
        "with_losses": True,
    }
    one = lipschitz.bounded_grads(loss_fn, **options)
    spread = lipschitz.bounded_grads(loss_fn, sharding=rows if types == "auto" else None, **options)

    def run(grads_fn: Any, params: Any, batch: Any, mask: Any) -> Any:
        total, losses = grads_fn(params, batch, mask)
        return total.value, total.sensitivity, losses

    expected = jax.jit(functools.partial(run, one))(params, batch, MASK)
    got = jax.jit(functools.partial(run, spread))(
        jax.device_put(params, NamedSharding(rows.mesh, P())),
        *jax.device_put((batch, MASK), rows),
    )
    helpers.assert_trees_close(jax.device_get(got), expected, rtol=2e-5, atol=1e-6)


# Where the parameters of the MLP lie, in the order kernel, bias of both layers.
PLACES = {
    "fully sharded": (
        {"data": 4},
        {"kernel": P("data"), "bias": P()},
        {"kernel": P("data"), "bias": P()},
    ),
    "tensor parallel": (
        {"data": 2, "model": 2},
        {"kernel": P(None, "model"), "bias": P("model")},
        {"kernel": P("model"), "bias": P()},
    ),
}


@pytest.mark.sweep
@pytest.mark.parametrize("types", list(TYPES))
@pytest.mark.parametrize("place", list(PLACES))
def test_parameters_that_are_spread_under_jit(place: str, types: str) -> None:
    """Norms are those of the whole model, noise is that of one device, each part where it lies."""
    axes, first, second = PLACES[place]
    mesh = mesh_of(types, **axes)
    layer = nn.sequential(nn.linear(8, 16), jnp.tanh, nn.linear(16, 4))
    _, _, batch = problem("mlp")
    batch = (np.random.default_rng(1).normal(size=(ROWS, 8)).astype(np.float32), batch[1])
    params = layer.init(KEY)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        logits = layer.apply(params, example[0])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, example[1])

    rows = NamedSharding(mesh, P("data"))
    told = rows if types == "auto" else None
    expected = jax.jit(functools.partial(asked, jaxdp.per_sample_grads(loss_fn)))(
        params, batch, MASK
    )
    places = {"0": first, "2": second}
    held = jax.tree.map(
        lambda leaf, at: jax.device_put(leaf, NamedSharding(mesh, at)), params, places
    )
    grads_fn = jaxdp.per_sample_grads(loss_fn, sharding=told)
    got = jax.jit(functools.partial(asked, grads_fn))(held, *jax.device_put((batch, MASK), rows))
    helpers.assert_trees_close(jax.device_get(got), expected, rtol=2e-5, atol=2e-6)
    if types == "explicit":
        for leaf, at in zip(jax.tree.leaves(got["updates"]), jax.tree.leaves(held), strict=True):
            assert leaf.sharding.is_equivalent_to(at.sharding, leaf.ndim)


@pytest.mark.anew
def test_noise_of_a_spread_parameter_is_made_in_parts() -> None:
    """No device makes noise that is not its own: nothing is exchanged, and all bits of one part
    are fewer than those of the whole."""
    mesh = mesh_of("explicit", data=DEVICES)
    params = jax.device_put(jnp.zeros((64, 32)), NamedSharding(mesh, P("data")))
    noise = jaxdp.add_noise(1.0, KEY)

    def run(value: Any) -> Any:
        total = jaxdp.Bounded(value, 1.0)
        return noise.update(total, noise.init(value), value)[0]

    compiled = jax.jit(run).lower(params).compile()
    assert exchanged(compiled) == {}
    assert "u32[64,32]" not in str(compiled.as_text())
    whole = jax.jit(run)(jnp.zeros((64, 32)))
    helpers.assert_trees_equal(jax.device_get(jax.jit(run)(params)), jax.device_get(whole))


# Tensor parallelism by hand: columns of w1 and rows of w2 on different devices.
SPLIT = {"w1": P(None, "model"), "b1": P("model"), "w2": P("model")}
SPLIT |= dict.fromkeys(("embed", "scale", "b2"), P())


def split_problem() -> tuple[Any, Any]:
    keys = jax.random.split(KEY, 5)
    params = {
        "embed": jax.random.normal(keys[0], (9, 6)),
        "scale": 1.0 + 0.1 * jax.random.normal(keys[1], (6,)),
        "w1": jax.random.normal(keys[2], (6, 8)) / 2.0,
        "b1": jnp.zeros(8),
        "w2": jax.random.normal(keys[3], (8, 3)) / 3.0,
        "b2": jnp.zeros(3),
    }
    tokens = jax.random.randint(keys[4], (ROWS, 5), 0, 9)
    return params, (tokens, jnp.arange(ROWS) % 3)


def split_loss(total: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Megatron's two layers on T tokens; `total` adds up the products of all devices."""

    def loss_fn(params: Any, example: Any) -> jax.Array:
        tokens, label = example
        x = params["embed"][tokens] * params["scale"][None]
        hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
        logits = jnp.mean(total(hidden @ params["w2"]) + params["b2"][None], axis=0)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)

    return loss_fn


def split_step(loss_fn: Any, *between: Any, sigma: float, **options: Any) -> Callable[..., Any]:
    grads_fn = jaxdp.per_sample_grads(loss_fn, **options)
    tx = optax.chain(jaxdp.clip_flat(0.2), *between, jaxdp.add_noise(sigma, KEY))

    def step(params: Any, batch: Any, mask: Any) -> Any:
        grads = grads_fn(params, batch, mask)
        return tx.update(grads, tx.init(params), params)[0], grads.norms()

    return step


def over_model(step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh_of("auto", data=2, model=2),
            in_specs=(SPLIT, P("data"), P("data")),
            out_specs=(SPLIT, P("data")),
            **options,
        )
    )


@pytest.mark.sweep
@pytest.mark.parametrize("method", ["slots", "taps", "fused", "dense"])
def test_a_model_that_is_spread_by_hand_has_one_norm(method: str) -> None:
    """Squares of all parts add up before the root; clipping each part alone would let a sample
    contribute √2 times the threshold here. Parameters that all devices hold count once."""
    params, batch = split_problem()
    plain = split_step(split_loss(lambda x: x), sigma=0.0)
    split = split_step(
        split_loss(lambda x: jax.lax.psum(x, "model")),
        all_reduce("data"),
        sigma=0.0,
        method=method,
    )
    expected = jax.jit(plain)(params, batch, MASK)
    got = over_model(split)(params, batch, MASK)
    helpers.assert_trees_close(got, expected, rtol=2e-5, atol=1e-6)


def test_noise_of_a_model_that_is_spread_by_hand() -> None:
    """Each part has noise of its own, with the deviation of the whole; what all devices hold has
    the same noise everywhere (or `shard_map` would not let it out)."""
    rows = 2000
    wide = {"w": jnp.zeros((2, rows)), "b": jnp.zeros(rows)}
    grads_fn = jaxdp.per_sample_grads(
        lambda p, x: x * jax.lax.psum(jnp.sum(p["w"]), "model") + x * jnp.sum(p["b"])
    )
    tx = optax.chain(jaxdp.clip_flat(1.0), all_reduce("data"), jaxdp.add_noise(2.0, KEY))
    places = {"w": P("model"), "b": P()}

    def step(params: Any, batch: Any, mask: Any) -> Any:
        return tx.update(grads_fn(params, batch, mask), tx.init(params), params)[0]

    split = jax.shard_map(
        step,
        mesh=mesh_of("auto", data=2, model=2),
        in_specs=(places, P("data"), P("data")),
        out_specs=places,
    )
    noise = jax.jit(split)(wide, jnp.zeros(4), jnp.zeros(4, bool))
    first, second = np.asarray(noise["w"])
    # Correlations and deviations of 2,000 draws: 5 standard errors, 6e-7 each.
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.12
    for part in (first, second, np.asarray(noise["b"])):
        assert abs(part.std() / 2.0 - 1) < 0.08


def test_a_spread_model_without_types_is_refused() -> None:
    """Without `check_vma` nothing tells that the parts of a norm are missing."""
    params, batch = split_problem()
    step = split_step(split_loss(lambda x: jax.lax.psum(x, "model")), all_reduce("data"), sigma=1.0)
    with pytest.raises(ValueError, match="psum over 'model'.*check_vma=True"):
        over_model(step, check_vma=False)(params, batch, MASK)


def test_errors_say_what_to_do() -> None:
    loss_fn, params, batch = problem("mlp")
    mesh = mesh_of("auto", data=DEVICES)

    def grads(sharding: NamedSharding, rows: int = ROWS) -> Any:
        part = jax.tree.map(lambda leaf: leaf[:rows], batch)
        return jaxdp.per_sample_grads(loss_fn, sharding=sharding)(params, part)

    with pytest.raises(ValueError, match=r"must divide among 4 devices, got 6. Choose a physical"):
        grads(NamedSharding(mesh, P("data")), 6)
    with pytest.raises(ValueError, match=r"sharding must spread the rows of the batch alone, got"):
        grads(NamedSharding(mesh, P(None, "data")))
    typed = NamedSharding(mesh_of("explicit", a=2, b=2), P("a"))
    x = jax.device_put(batch[0], typed)
    y = jax.device_put(batch[1], NamedSharding(typed.mesh, P("b")))
    with pytest.raises(ValueError, match="must have their rows on the same devices, got"):
        jaxdp.per_sample_grads(loss_fn)(params, (x, y))
