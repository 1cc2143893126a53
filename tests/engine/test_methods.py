"""All methods answer alike: with samples that are not finite, and under every transformation.

One model holds every kind of use: products, a convolution, a tied table, a recurrent cell, layers
in a scan, a rematerialised block, elementwise parameters and one that is computed from two others.
A small one that compiles faster holds the hard ones of these, for the tests that compile often.
"""

# pmap, shard_map and optax's types say less than what they let through.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jaxdp
from tests import helpers

METHODS = ("slots", "taps", "fused", "dense")
# Slots remove a bad row from the factors, taps run again without it, fused does as taps.
FEW = [
    "slots",
    "taps",
    pytest.param("fused", marks=pytest.mark.slow),
    pytest.param("dense", marks=pytest.mark.slow),
]
ROWS, LENGTH, WIDTH, WORDS = 5, 4, 3, 6
EVERYONE = np.ones(ROWS, bool)

SMALL = {"bias": (WIDTH,), "cell": (WIDTH, WIDTH), "table": (WORDS, WIDTH)}
LARGE = SMALL | {
    "down": (WIDTH, 2),
    "kernel": (3, WIDTH, WIDTH),
    "scale": (WIDTH,),
    "stack": (2, WIDTH, WIDTH),
    "up": (2, WIDTH),
}
MODELS = {"small": SMALL, "large": LARGE}


def loss_fn(params: Any, example: Any) -> Any:
    """The small model if that is whose parameters are given."""
    x, ids = example
    x = x + params["table"][ids]
    x = _hidden(params, x) if "kernel" in params else _recurrent(params, x + params["bias"][None])
    logits = x @ params["table"].T
    return jnp.sum(jnp.sin(logits)), {"logits": logits}


def _recurrent(params: Any, x: jax.Array) -> jax.Array:
    def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(state @ params["cell"] + x)
        return state, state

    return lax.scan(step, jnp.zeros_like(x[0]), x)[1]


def _hidden(params: Any, x: jax.Array) -> jax.Array:
    window = lax.conv_general_dilated(
        x[None], params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]
    x = _recurrent(params, jnp.tanh(window + params["bias"][None]))
    x, _ = lax.scan(lambda x, layer: (jnp.sin(x @ layer), None), x, params["stack"])
    block = jax.checkpoint(lambda w, x: x + jnp.tanh(x @ w))
    return block(params["down"] @ params["up"], x) * params["scale"][None]


def make(seed: int = 0, model: str = "small") -> tuple[Any, Any]:
    """Parameters and a batch, with repeated words."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(0.7 * rng.normal(size=shape), jnp.float32)

    params = {name: draw(shape) for name, shape in MODELS[model].items()}
    ids = jnp.asarray(rng.integers(WORDS // 2, size=(ROWS, LENGTH)))
    return params, (draw((ROWS, LENGTH, WIDTH)), ids)


class Answers(NamedTuple):
    """What a handle says; `flat` and `per_layer` are pytrees like the parameters."""

    norms: Any
    flat: Any
    per_layer: Any
    losses: Any
    logits: Any
    nonfinite: Any


FLAT, PER_LAYER = 2.0, 0.3


def ask(method: str, params: Any, batch: Any, mask: Any, **options: Any) -> Answers:
    grads_fn = jaxdp.per_sample_grads(loss_fn, has_aux=True, method=method, **options)
    grads = grads_fn(params, batch, mask)

    def clipped(clip: Any) -> Any:
        return clip.update(grads, clip.init(params))[0].value

    return Answers(
        grads.norms(),
        clipped(jaxdp.clip_flat(FLAT)),
        clipped(jaxdp.clip_per_layer(PER_LAYER)),
        grads.losses,
        grads.aux["logits"],
        grads.nonfinite,
    )


@functools.cache
def reference(seed: int, model: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Gradients, losses and logits of every row in double precision."""
    with jax.enable_x64(True):
        params, batch = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64) if helpers.is_float(leaf) else leaf,
            make(seed, model),
        )
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (losses, aux), grads = jax.jit(jax.vmap(value_and_grad, (None, 0)))(params, batch)
        return [np.asarray(leaf) for leaf in grads.values()], np.asarray(losses), aux["logits"]


def truth(good: np.ndarray, seed: int, model: str) -> Answers:
    """What must come out if the rows in `good` count and no other."""
    grads, losses, logits = reference(seed, model)
    columns = [np.linalg.norm(leaf.reshape(ROWS, -1), axis=1) for leaf in grads]
    norms = np.linalg.norm(columns, axis=0)

    def total(weights: list[np.ndarray]) -> dict[str, np.ndarray]:
        pairs = zip(sorted(MODELS[model]), grads, weights, strict=True)
        return {name: np.tensordot(good * weight, leaf, 1) for name, leaf, weight in pairs}

    return Answers(
        norms * good,
        total([np.minimum(1, FLAT / norms)] * len(grads)),
        total([np.minimum(1, PER_LAYER / column) for column in columns]),
        losses * good,
        logits,
        0,
    )


def check(
    got: Answers, good: np.ndarray = EVERYONE, seed: int = 0, model: str = "small"
) -> None:
    """The sums, and everything else in the rows that count."""
    expected = truth(good, seed, model)
    for name in ("flat", "per_layer"):
        for leaf, value in getattr(expected, name).items():
            found = getattr(got, name)[leaf]
            np.testing.assert_allclose(
                found, value, rtol=2e-5, atol=2e-5, err_msg=f"{name} of {leaf}"
            )
    for name in ("norms", "losses", "logits"):
        found, value = np.asarray(getattr(got, name))[good], getattr(expected, name)[good]
        np.testing.assert_allclose(found, value, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
def test_all_methods_agree_and_both_clips_bite(method: str) -> None:
    assert np.any(truth(EVERYONE, 0, "large").norms > FLAT)
    got = jax.jit(functools.partial(ask, method))(*make(model="large"), EVERYONE)
    check(got, model="large")


# ---- samples that are not finite ----------------------------------------------------------------


def square_loss(params: Any, example: Any) -> jax.Array:
    """Its gradient can be infinite at a finite loss (root of zero), its square overflow."""
    x, root = example
    hidden = x @ params["w"] + params["b"]
    return jnp.sum(hidden * hidden) + jnp.sqrt(root * jnp.sum(params["w"] * params["w"]))


SQUARE_PARAMS = {"b": jnp.array([0.5, -0.5]), "w": jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.3, 1.0]])}

# What row 1 becomes. At a root of zero the gradient 0/√0 · … is infinite or NaN, the loss is not.
SPOILED = {
    "nan input": lambda x, root: (x.at[1, 0].set(jnp.nan), root),
    "infinite input": lambda x, root: (x.at[1].set(jnp.inf), root),
    "infinite gradient at a finite loss": lambda x, root: (x, root.at[1].set(0.0)),
    "gradient whose square overflows": lambda x, root: (x.at[1].set(1e12), root),
    "gradient that overflows": lambda x, root: (x.at[1].set(1e30), root),
}


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", list(SPOILED))
def test_a_sample_that_is_not_finite_counts_for_nothing(method: str, how: str) -> None:
    weights = np.array([1.5, 0.0, -0.5, 2.0, 1.0], np.float32)
    rng = np.random.default_rng(3)
    x, root = jnp.asarray(rng.normal(size=(ROWS, 3)), jnp.float32), jnp.ones(ROWS)
    good = np.arange(ROWS) != 1

    @jax.jit
    def run(batch: Any, mask: Any) -> Any:
        grads = jaxdp.per_sample_grads(square_loss, method=method)(SQUARE_PARAMS, batch, mask)
        flat, layers = jaxdp.clip_flat(1.0), jaxdp.clip_per_layer(1.0)
        sums = [clip.update(grads, clip.init(SQUARE_PARAMS))[0].value for clip in (flat, layers)]
        sums.append(grads.weighted_sum(weights))  # zero for this row
        return sums, grads.norms(), grads.losses, grads.nonfinite

    sums, norms, losses, nonfinite = run(SPOILED[how](x, root), EVERYONE)
    without, norms_without, losses_without, none = run((x, root), good)
    assert (int(nonfinite), int(none)) == (1, 0)
    helpers.assert_trees_close(sums, without, rtol=1e-5)
    np.testing.assert_allclose(norms[good], norms_without[good], rtol=1e-5)
    np.testing.assert_allclose(losses[good], losses_without[good], rtol=1e-5)
    # Its loss is reported as it is.
    expected = square_loss(SQUARE_PARAMS, jax.tree.map(lambda leaf: leaf[1], SPOILED[how](x, root)))
    np.testing.assert_allclose(losses[1], expected, rtol=1e-5)


def spoil(batch: Any, rows: np.ndarray) -> Any:
    x, ids = batch
    return jnp.where(rows[:, None, None], jnp.nan, x), ids


# Which rows hold NaN, which are masked.
PATTERNS = {
    "one bad": ([1], []),
    "the first bad": ([0], []),
    "masked rows bad": ([1, 4], [1, 4]),
    "one bad, another masked": ([1], [4]),
    "bad and masked rows mixed": ([0, 1, 4], [0, 4]),
    "all but one bad": ([0, 1, 2, 4], []),
    "all bad": ([0, 1, 2, 3, 4], []),
    "all masked": ([], [0, 1, 2, 3, 4]),
    "all masked and bad": ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    "every row bad or masked": ([0, 1], [2, 3, 4]),
}


def rows_of(indices: list[int]) -> np.ndarray:
    return np.isin(np.arange(ROWS), indices)


def check_pattern(got: Answers, pattern: str, seed: int = 0) -> None:
    bad, masked = map(rows_of, PATTERNS[pattern])
    good = ~bad & ~masked
    check(got, good, seed)
    assert int(got.nonfinite) == np.sum(bad & ~masked)
    assert not np.any(np.asarray(got.norms)[masked]), "a masked row has a norm"
    assert not np.any(np.asarray(got.losses)[masked]), "a masked row has a loss"
    assert np.all(np.isnan(np.asarray(got.losses)[bad & ~masked])), "the loss of NaN is NaN"


def arguments(pattern: str, seed: int = 0) -> tuple[Any, Any, Any]:
    """Parameters, batch and mask."""
    bad, masked = map(rows_of, PATTERNS[pattern])
    params, batch = make(seed)
    return params, spoil(batch, bad), ~masked


@functools.cache
def compiled(method: str, microbatch_size: int | None = None) -> Callable[..., Answers]:
    return jax.jit(functools.partial(ask, method, microbatch_size=microbatch_size))


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_rows_of_nan_and_masked_rows(method: str, pattern: str) -> None:
    check_pattern(compiled(method)(*arguments(pattern)), pattern)


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_rows_of_nan_and_masked_rows_in_microbatches(method: str, pattern: str) -> None:
    """Two of five at a time: the last microbatch holds a copy, and some hold no good row."""
    check_pattern(compiled(method, 2)(*arguments(pattern)), pattern)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_without_jit(method: str) -> None:
    check_pattern(ask(method, *arguments("one bad, another masked")), "one bad, another masked")


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_nan_leave_nothing(method: str) -> None:
    """Every gradient is NaN: the sum is zero, and nothing runs forever."""
    params, batch = make()
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    got = compiled(method)(broken, batch, EVERYONE)
    assert int(got.nonfinite) == ROWS
    nothing = jax.tree.map(jnp.zeros_like, params)
    helpers.assert_trees_equal((got.flat, got.per_layer), (nothing, nothing))


# ---- transformations ----------------------------------------------------------------------------

TOGETHER = ("one bad, another masked", "all bad")


def stacked_arguments() -> Any:
    """Two sets of parameters with a batch each, one of them without any good row."""
    pairs = [arguments(pattern, seed) for seed, pattern in enumerate(TOGETHER)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)


def check_stacked(got: Answers) -> None:
    for seed, pattern in enumerate(TOGETHER):
        check_pattern(jax.tree.map(lambda leaf, seed=seed: leaf[seed], got), pattern, seed)


@pytest.mark.sweep
@pytest.mark.parametrize("method", FEW)
def test_inside_vmap_over_parameters_and_batches(method: str) -> None:
    check_stacked(jax.jit(jax.vmap(functools.partial(ask, method)))(*stacked_arguments()))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_inside_vmap_over_parameters_alone(method: str) -> None:
    params, batch, mask = arguments("one bad, another masked")
    other, _ = make(1)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other)
    run = jax.jit(jax.vmap(functools.partial(ask, method), (0, None, None)))
    got = run(both, batch, mask)
    check_pattern(jax.tree.map(lambda leaf: leaf[0], got), "one bad, another masked")
    alone = compiled(method)(other, batch, mask)
    helpers.assert_trees_close(jax.tree.map(lambda leaf: leaf[1], got), alone, rtol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("method", FEW)
def test_inside_a_scan(method: str) -> None:
    def step(carry: None, args: Any) -> tuple[None, Answers]:
        return carry, ask(method, *args)

    _, got = jax.jit(lambda args: lax.scan(step, None, args))(stacked_arguments())
    check_stacked(got)


@pytest.mark.sweep
@pytest.mark.parametrize("method", FEW)
def test_inside_a_loop_that_changes_the_parameters(method: str) -> None:
    """As a training loop does. The handle traces its program anew in every context."""
    params, batch, mask = arguments("one bad")

    def step(params: Any, _: None) -> tuple[Any, Any]:
        total = ask(method, params, batch, mask).flat
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, total), None

    looped, _ = jax.jit(lambda params: lax.scan(step, params, None, length=3))(params)
    for _ in range(3):
        total = compiled(method)(params, batch, mask).flat
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, total)
    helpers.assert_trees_close(looped, params, rtol=1e-5, atol=1e-5)


@pytest.mark.anew
@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
def test_a_second_call_traces_and_compiles_nothing(method: str) -> None:
    traced = []

    def counting(params: Any, example: Any) -> Any:
        traced.append(None)
        return square_loss(params, example)

    @jax.jit
    def run(params: Any, batch: Any, mask: Any) -> Any:
        clip = jaxdp.clip_flat(1.0)
        grads = jaxdp.per_sample_grads(counting, method=method)(params, batch, mask)
        return clip.update(grads, clip.init(params))[0].value

    x, root = jnp.ones((ROWS, 3)), jnp.ones(ROWS)
    run(SQUARE_PARAMS, (x, root), EVERYONE)
    first = len(traced)
    run(SQUARE_PARAMS, SPOILED["nan input"](x, root), ~EVERYONE)
    assert len(traced) == first
    assert run._cache_size() == 1


# ---- several devices ----------------------------------------------------------------------------

DEVICES = 8
# Two rows for each device, one of them with a bad one, one without any that counts.
MANY = 2 * DEVICES
GOOD = ~np.isin(np.arange(MANY), [3, 6, 7, 9, 14])
MASKED = np.isin(np.arange(MANY), [6, 7, 14])


def many_rows(model: str) -> tuple[Any, Any, Any]:
    params, _ = make(model=model)
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(MANY, LENGTH, WIDTH)), jnp.float32)
    ids = jnp.asarray(rng.integers(WORDS, size=(MANY, LENGTH)))
    return params, (jnp.where(GOOD[:, None, None], x, jnp.nan), ids), ~MASKED


@functools.cache
def on_one_device(model: str) -> Answers:
    return jax.jit(functools.partial(ask, "slots"))(*many_rows(model))


def check_many(got: Answers, model: str = "small") -> None:
    expected = on_one_device(model)
    assert int(expected.nonfinite) == np.sum(~GOOD & ~MASKED)
    # Each method rounds norms up in its own way.
    close = {"rtol": 2e-5, "atol": 1e-5}
    helpers.assert_trees_close(got._replace(logits=()), expected._replace(logits=()), **close)
    np.testing.assert_allclose(got.logits[GOOD], expected.logits[GOOD], rtol=1e-5, atol=1e-5)


def summed_over_devices(answers: Answers) -> Answers:
    """A sum is one over the rows of this device: the caller adds them up."""
    own = (answers.flat, answers.per_layer, answers.nonfinite)
    flat, per_layer, nonfinite = lax.psum(own, "devices")
    return answers._replace(flat=flat, per_layer=per_layer, nonfinite=nonfinite)


@pytest.mark.parametrize("method", FEW)
def test_pmap(method: str) -> None:
    params, *rows = many_rows("small")
    spread = jax.tree.map(lambda leaf: leaf.reshape(DEVICES, 2, *leaf.shape[1:]), rows)

    def run(params: Any, batch: Any, mask: Any) -> Answers:
        return summed_over_devices(ask(method, params, batch, mask))

    by_rows = Answers(0, None, None, 0, 0, None)
    mapped = jax.pmap(run, "devices", in_axes=(None, 0, 0), out_axes=by_rows)
    got = mapped(params, *spread)
    rows = {name: getattr(got, name) for name in ("norms", "losses", "logits")}
    joined = {name: leaf.reshape(MANY, *leaf.shape[2:]) for name, leaf in rows.items()}
    check_many(got._replace(**joined))


SPLIT, EVERYWHERE = PartitionSpec("devices"), PartitionSpec()


def over_devices(run: Callable[..., Answers], *, check_vma: bool) -> Callable[..., Answers]:
    """`run` on every device, with its rows and all of the parameters."""
    return jax.shard_map(
        run,
        mesh=Mesh(np.array(jax.devices()[:DEVICES]), ("devices",)),
        in_specs=(EVERYWHERE, SPLIT, SPLIT),
        out_specs=Answers(SPLIT, EVERYWHERE, EVERYWHERE, SPLIT, SPLIT, EVERYWHERE),
        check_vma=check_vma,
    )


@pytest.mark.parametrize("check_vma", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "params_are", ["replicated", pytest.param("varying", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", FEW)
def test_shard_map(method: str, params_are: str, check_vma: bool) -> None:
    """Where the types say that parameters are the same everywhere, JAX adds up their gradients
    over the devices, which a gradient of one sample must not be."""

    def run(params: Any, batch: Any, mask: Any) -> Answers:
        if params_are == "varying":
            params = lax.pcast(params, "devices", to="varying")
        return summed_over_devices(ask(method, params, batch, mask))

    check_many(jax.jit(over_devices(run, check_vma=check_vma))(*many_rows("small")))


@pytest.mark.slow
@pytest.mark.parametrize("microbatch_size", [None, 1])
@pytest.mark.parametrize("method", METHODS)
def test_shard_map_of_every_kind_of_use(method: str, microbatch_size: int | None) -> None:
    def run(params: Any, batch: Any, mask: Any) -> Answers:
        answers = ask(method, params, batch, mask, microbatch_size=microbatch_size)
        return summed_over_devices(answers)

    check_many(jax.jit(over_devices(run, check_vma=True))(*many_rows("large")), "large")


def test_shard_map_of_a_loss_that_rematerialises() -> None:
    """What the ordinary gradient would keep is counted there, too, before anything is chosen."""
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.normal(size=(4, 64, 64)) / 8, jnp.float32)
    batch = jnp.asarray(rng.normal(size=(16 * DEVICES, 32, 64)), jnp.float32)

    def loss(stack: Any, x: Any) -> jax.Array:
        layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        return jnp.sum(jnp.square(lax.scan(layer, x, stack)[0]))

    assert jaxdp.explain(loss, stack, batch[:16]).microbatch_size == 8
    clip = jaxdp.clip_flat(1.0)

    def clipped(method: str, stack: Any, batch: Any) -> Any:
        grads = jaxdp.per_sample_grads(loss, method=method)(stack, batch)
        return clip.update(grads, clip.init(stack))[0].value

    split = jax.shard_map(
        lambda stack, batch: lax.psum(clipped("auto", stack, batch), "devices"),
        mesh=Mesh(np.array(jax.devices()[:DEVICES]), ("devices",)),
        in_specs=(EVERYWHERE, SPLIT),
        out_specs=EVERYWHERE,
    )
    # Norms from Gram matrices round up by more than those of materialised rows.
    expected = clipped("dense", stack, batch)
    np.testing.assert_allclose(jax.jit(split)(stack, batch), expected, rtol=3e-4, atol=1e-5)


PARTITIONER = "XLA's partitioner gives zeros for vmap(grad) of a kernel over rows that are sharded"


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("slots", "small"),
        pytest.param("taps", "large", marks=pytest.mark.slow),
        pytest.param("fused", "large", marks=pytest.mark.slow),
        pytest.param("slots", "large", marks=pytest.mark.slow),
        ("dense", "small"),
        pytest.param("dense", "large", marks=pytest.mark.xfail(reason=PARTITIONER)),
    ],
)
def test_jit_over_rows_that_are_sharded(method: str, model: str) -> None:
    """The compiler splits the work: nothing is said of devices in the program."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("devices",))
    params, *rows = many_rows(model)
    params = jax.device_put(params, jax.NamedSharding(mesh, EVERYWHERE))
    rows = jax.device_put(rows, jax.NamedSharding(mesh, SPLIT))
    check_many(jax.jit(functools.partial(ask, method))(params, *rows), model)
