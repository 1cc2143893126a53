"""What a loss does besides computing on one example: refused with its line, or harmless."""

import functools
from collections.abc import Callable
from typing import Any

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax import ref as ref_ops
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdp
from jaxdp.engine import effects, walker
from tests.oracle import check_against_oracle

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
W = jnp.array([1.0, -2.0, 0.5])
SHAPE = jax.ShapeDtypeStruct((3,), jnp.float32)

Loss = Callable[[Any, Any], jax.Array]
Body = Callable[[jax.Array, jax.Array], jax.Array]

SHARED = jax.new_ref(jnp.zeros(3))


def _written(w: jax.Array, x: jax.Array) -> jax.Array:
    ref = jax.new_ref(jnp.zeros(3))
    ref[...] = w
    return ref[...] * x


def _added_to(w: jax.Array, x: jax.Array) -> jax.Array:
    ref = jax.new_ref(x)
    for _ in range(2):
        ref[...] += w
    return ref[...] * x


def _swapped(w: jax.Array, x: jax.Array) -> jax.Array:
    ref = jax.new_ref(x * 2)
    return ref_ops.swap(ref, ..., w * x) * w


def _closed_over(w: jax.Array, x: jax.Array) -> jax.Array:
    before = SHARED[...]
    SHARED[...] = lax.stop_gradient(x)
    return w * x + before


def _discharged(w: jax.Array, x: jax.Array) -> jax.Array:
    def body(ref: Any) -> None:
        ref[...] = ref[...] * w

    return pl.run_state(body)(x)


@jax.custom_batching.custom_vmap
def _centred(x: jax.Array) -> jax.Array:
    return x * 1.0


@_centred.def_vmap
def _(size: int, batched: Any, x: jax.Array) -> Any:
    return x - jnp.mean(x, axis=0, keepdims=True), True


def _host(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32) * 2


def _called_back(method: str | None) -> Body:
    return lambda w, x: w * jax.pure_callback(_host, SHAPE, x, vmap_method=method)


def _kernel(w: jax.Array, x: jax.Array) -> jax.Array:
    def double(source: Any, target: Any) -> None:
        target[...] = source[...] * 2

    return w * pl.pallas_call(double, out_shape=SHAPE, interpret=True)(x)


def _foreign_function(method: str | None) -> Body:
    return lambda w, x: w * jax.ffi.ffi_call("nowhere", SHAPE, vmap_method=method)(x)


def _partitioned(w: jax.Array, x: jax.Array) -> jax.Array:
    double = custom_partitioning(lambda x: x * 2)
    double.def_partition(
        partition=lambda *args: None,
        infer_sharding_from_operands=lambda *args: None,
        sharding_rule="i -> i",
    )
    return w * double(x)


_largest_p = core.Primitive("largest_of_all")
_largest_p.def_impl(lambda x: x)
_largest_p.def_abstract_eval(lambda x: x)
batching.primitive_batchers[_largest_p] = lambda values, dims: (
    jnp.broadcast_to(jnp.max(values[0], axis=dims[0], keepdims=True), values[0].shape),
    dims[0],
)
mlir.register_lowering(_largest_p, mlir.lower_fun(lambda x: x, multiple_results=False))

# Name -> (what the loss does, what the sentence names, what excuses it).
BODIES: dict[str, tuple[Body, str, effects.Excuse]] = {
    "ref": (_written, "new_ref of a mutable array", "dense"),
    "ref that is added to": (_added_to, "new_ref of a mutable array", "dense"),
    "ref that is swapped": (_swapped, "new_ref of a mutable array", "dense"),
    "ref of others": (_closed_over, "of a mutable array", ""),
    "callback of the batch": (_called_back("expand_dims"), "pure_callback", "alone"),
    "callback of copies": (_called_back("broadcast_all"), "pure_callback", "alone"),
    "callback without a method": (_called_back(None), "pure_callback", "alone"),
    "host": (
        lambda w, x: w * lax.stop_gradient(io_callback(_host, SHAPE, x)),
        "io_callback",
        "",
    ),
    "ordered host": (
        lambda w, x: w * lax.stop_gradient(io_callback(_host, SHAPE, x, ordered=True)),
        "io_callback",
        "",
    ),
    "ordered print": (
        lambda w, x: (jax.debug.callback(print, x, ordered=True), w * x)[1],
        "OrderedDebugEffect",
        "",
    ),
    "custom_vmap": (lambda w, x: w * _centred(x), "custom_vmap", "alone"),
    "sequential_vmap": (
        lambda w, x: w * jax.custom_batching.sequential_vmap(jnp.sin)(x),
        "custom_vmap",
        "alone",
    ),
    "kernel": (_kernel, "kernel", "alone"),
    "foreign function": (_foreign_function("broadcast_all"), "ffi_call", "alone"),
    "partition": (_partitioned, "custom_partitioning", ""),
    "another's primitive": (lambda w, x: w * x * eqxi.unvmap_max(x), "unvmap_max", "alone"),
    "own primitive": (lambda w, x: w * _largest_p.bind(x), "largest_of_all", "alone"),
}


def _plain(body: Body) -> Loss:
    return lambda w, x: jnp.sum(jnp.tanh(body(w, x)))


def _in_scan(body: Body) -> Loss:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(lax.scan(lambda h, _: (h + body(w, x), None), x, None, length=2)[0])

    return loss


def _in_cond(body: Body) -> Loss:
    return lambda w, x: jnp.sum(lax.cond(x[0] > 0, body, lambda w, x: w * x, w, x))


def _in_remat(body: Body) -> Loss:
    return lambda w, x: jnp.sum(jnp.tanh(jax.checkpoint(body)(w, x)))


def _in_jit(body: Body) -> Loss:
    return lambda w, x: jnp.sum(jnp.tanh(jax.jit(body)(w, x)))


def _in_while(body: Body) -> Loss:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        still = lax.stop_gradient((w, x))
        end = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, body(*still)), (0, x))
        return jnp.sum(w * x * lax.stop_gradient(end[1]))

    return loss


def _in_custom_jvp(body: Body) -> Loss:
    @jax.custom_jvp
    def inner(w: jax.Array, x: jax.Array) -> jax.Array:
        return w * x

    @inner.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (w, x), (dw, _) = primals, tangents
        return inner(w, x), dw * lax.stop_gradient(body(w, x))

    return lambda w, x: jnp.sum(inner(w, x))


def _in_forward(body: Body) -> Loss:
    @jax.custom_vjp
    def inner(w: jax.Array, x: jax.Array) -> jax.Array:
        return w * x

    inner.defvjp(lambda w, x: (body(w, x), x), lambda x, g: (g * x, g))
    return lambda w, x: jnp.sum(inner(w, x))


def _in_backward(body: Body) -> Loss:
    @jax.custom_vjp
    def inner(w: jax.Array, x: jax.Array) -> jax.Array:
        return w * x

    inner.defvjp(lambda w, x: (w * x, (w, x)), lambda kept, g: (g * body(*kept), g))
    return lambda w, x: jnp.sum(jnp.tanh(inner(w, x)))


def _in_transpose(body: Body) -> Loss:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        def backward(kept: Any, g: jax.Array) -> jax.Array:
            return g * body(x, kept)

        scaled = jax.custom_derivatives.linear_call(lambda x, w: x * w, backward, x, w)
        return jnp.sum(scaled)

    return loss


WRAPPERS = (
    _plain,
    _in_scan,
    _in_cond,
    _in_remat,
    _in_jit,
    _in_while,
    _in_custom_jvp,
    _in_forward,
    _in_backward,
    _in_transpose,
)
# What JAX can trace within a loop or branch, or a rule, too.
NESTED = ("callback of the batch", "custom_vmap", "ref that is added to", "own primitive")


def ask(loss: Loss, method: str = "auto", **options: Any) -> jax.Array:
    """What a handle does with a loss when it is traced; nothing runs."""
    grads_fn = jaxdp.per_sample_grads(loss, method=method, **options)
    clip: Any = jaxdp.clip_flat(1.0)

    def step(w: jax.Array, x: jax.Array) -> Any:
        return clip.update(grads_fn(w, x), clip.init(w), w)[0].value

    return jax.eval_shape(step, W, X)


def refused(loss: Loss, method: str = "auto", **options: Any) -> str:
    with pytest.raises(ValueError, match="loss_fn must compute on one example alone") as error:
        ask(loss, method, **options)
    return str(error.value)


@pytest.mark.parametrize("method", ["auto", "taps", "dense"])
@pytest.mark.parametrize("name", BODIES)
def test_an_effect_is_refused_with_its_line(name: str, method: str) -> None:
    body, named, excuse = BODIES[name]
    loss = _plain(body)
    if method == "dense" and excuse == "dense":
        ask(loss, method)
        return
    said = refused(loss, method)
    assert named in said and ".py:" in said
    assert ("microbatch_size=1" in said) == (excuse == "alone" and "call" not in named)


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_an_effect_is_found_within(wrap: Callable[[Body], Loss], name: str) -> None:
    body, named, _ = BODIES[name]
    assert named in refused(wrap(body))
    if "ref" not in name:
        assert named in refused(wrap(body), "dense")
    # And before training.
    found = jaxdp.validate(wrap(body), W, X[0])
    assert not found.ok and named in str(found)


@pytest.mark.parametrize("name", [name for name in BODIES if BODIES[name][2] != "alone"])
def test_what_is_memory_or_order_stays_refused_one_at_a_time(name: str) -> None:
    assert BODIES[name][1] in refused(_plain(BODIES[name][0]), microbatch_size=1)


def test_state_that_is_run_by_itself_is_refused() -> None:
    said = refused(_plain(_discharged))
    assert "of a mutable array" in said and "test_effects.py" in said


def test_the_release_that_a_mutable_array_let_escape() -> None:
    """The parameter is used through the array, which the analysis of uses cannot see: by taps the
    gradient of that use was released unclipped."""

    def loss(p: Any, x: jax.Array) -> jax.Array:
        ref = jax.new_ref(jnp.zeros(3))
        ref[...] = p["w"]
        h = jax.checkpoint(lambda w, x: jnp.tanh(w @ x))(p["v"], x)
        return jnp.sum(ref[...] * x) * 10 + jnp.sum(h) + jnp.dot(p["w"], x * 1e-3)

    params = {"w": jnp.arange(3.0) + 1, "v": jnp.ones((8, 3))}
    for method in ("auto", "slots", "taps", "fused"):
        with pytest.raises(ValueError, match=r"new_ref of a mutable array \(.*test_effects.py"):
            jaxdp.per_sample_grads(loss, method=method)(params, jnp.asarray(X)).norms()
    check_against_oracle(loss, params, jnp.asarray(X), method="dense", double=False)


@pytest.mark.parametrize("name", ["custom_vmap", "callback of the batch", "own primitive"])
def test_one_sample_at_a_time_sees_no_other(name: str) -> None:
    loss = _plain(BODIES[name][0])
    for method in ("slots", "dense"):
        grads_fn = jaxdp.per_sample_grads(loss, method=method, microbatch_size=1)
        clipped = _summed(grads_fn, X) - _summed(grads_fn, X[1:])
        alone = _summed(grads_fn, X[:1])
        np.testing.assert_allclose(clipped, alone, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["custom_vmap", "callback of copies", "own primitive"])
def test_one_sample_of_each_member_is_more_than_one(name: str, compiled: bool) -> None:
    """What sees one sample at a time would see one of each member of an ensemble."""
    loss = _plain(BODIES[name][0])
    batches = jnp.stack([X, X[::-1]])
    for method in ("slots", "taps", "dense"):
        grads_fn = jaxdp.per_sample_grads(loss, method=method, microbatch_size=1)
        member = functools.partial(_summed, grads_fn)
        member = jax.jit(member) if compiled else member
        with pytest.raises(ValueError, match=r"vmap around microbatch_size=1.*jax\.lax\.map"):
            jax.vmap(member)(batches)
        one_by_one = jax.lax.map(member, batches)
        np.testing.assert_allclose(one_by_one[1], member(batches[1]), rtol=1e-5)


def test_loops_of_equinox_run_one_sample_at_a_time() -> None:
    """Their loops ask all samples of a batch whether one of them goes on."""

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        end = eqxi.while_loop(
            lambda h: jnp.sum(h) < 9.0,
            lambda h: h + jnp.abs(w * x) + 0.5,
            x,
            kind="checkpointed",
            max_steps=8,
        )
        return jnp.sum(jnp.sin(end) * w)

    assert "unvmap_any" in refused(loss)
    options = {"method": "slots", "microbatch_size": 1, "double": False}
    check_against_oracle(loss, W, jnp.asarray(X), **options)


def _summed(grads_fn: Any, rows: Any) -> jax.Array:
    clip: Any = jaxdp.clip_flat(1.0)
    return clip.update(grads_fn(W, rows), clip.init(W), W)[0].value


def test_a_rule_for_a_batch_is_looked_into() -> None:
    """With one sample at a time a rule is harmless, unless it asks other devices."""

    @jax.custom_batching.custom_vmap
    def averaged(x: jax.Array) -> jax.Array:
        return x * 1.0

    @averaged.def_vmap
    def _(size: int, batched: Any, x: jax.Array) -> Any:
        return lax.pmean(x, "data"), True

    assert "psum over 'data'" in refused(
        lambda w, x: jnp.sum(w * averaged(x)), microbatch_size=1, sharding=_rows()
    )


def _rows(devices: int = 4) -> NamedSharding:
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, P("data"))


COLLECTIVES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "psum": lambda x: lax.psum(x, "data"),
    "pmean of a tuple": lambda x: lax.pmean(x, ("data",)),
    "pmax": lambda x: lax.pmax(lax.stop_gradient(x), "data"),
    "all_gather": lambda x: jnp.sum(lax.all_gather(x, "data"), axis=0),
    "ppermute": lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]),
    "pbroadcast": lambda x: lax.pbroadcast(x, ("data",), 0),
    "psum_scatter": lambda x: lax.psum_scatter(jnp.tile(x, 4), "data", tiled=True),
    "all_to_all": lambda x: lax.all_to_all(jnp.tile(x, 4), "data", 0, 0, tiled=True)[:3],
    "axis_index": lambda x: x * lax.axis_index("data").astype(x.dtype),
}


@functools.cache
def _with_backward(name: str) -> Callable[[jax.Array], jax.Array]:
    @jax.custom_vjp
    def unchanged(x: jax.Array) -> jax.Array:
        return x

    unchanged.defvjp(lambda x: (x, None), lambda _, g: (COLLECTIVES[name](g),))
    return unchanged


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_no_sample_may_ask_another_device(name: str, backward: bool) -> None:
    mix = _with_backward(name) if backward else COLLECTIVES[name]

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(mix(w * x)))

    for method in ("auto", "taps", "dense"):
        said = refused(loss, method, sharding=_rows())
        assert "communication over a named axis" in said and "'data'" in said


@pytest.mark.parametrize("check_vma", [True, False])
def test_nor_inside_shard_map(check_vma: bool) -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(w * (x - lax.pmean(x, "data")))

    def on_device(x: jax.Array) -> jax.Array:
        return jaxdp.per_sample_grads(loss)(W, x).norms()

    mesh = _rows().mesh
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )
    with pytest.raises(ValueError, match="communication over a named axis: psum"):
        jax.eval_shape(run, X)


def test_nor_members_of_a_named_map() -> None:
    """An axis of `vmap`: it may be one of samples."""

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(w * (x - lax.pmean(x, "batch")))

    def norms(x: jax.Array) -> jax.Array:
        return jaxdp.per_sample_grads(loss)(W, x).norms()

    with pytest.raises(ValueError, match="psum over 'batch'"):
        jax.eval_shape(jax.vmap(norms, axis_name="batch"), X[None])


def test_axes_within_the_loss_and_of_the_model_are_free() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def within(w: jax.Array, x: jax.Array) -> jax.Array:
        total = jax.vmap(lambda a: a / lax.psum(a, "i"), axis_name="i")(1 + jnp.square(x))
        return jnp.sum(w * total)

    def over_devices(w: jax.Array, x: jax.Array) -> jax.Array:
        add = jax.shard_map(
            lambda x: lax.psum(x, "model"), mesh=mesh, in_specs=P("model"), out_specs=P()
        )
        return jnp.sum(w[:2] * add(jnp.tile(x[:2], 2)))

    for loss in (within, over_devices):
        check_against_oracle(loss, W, jnp.asarray(X), method="auto", double=False)


def test_what_is_harmless_is_not_refused() -> None:
    def loss(w: jax.Array, example: Any) -> jax.Array:
        x, key = example
        jax.debug.callback(lambda _: None, x)
        doubled = jax.pure_callback(_host, SHAPE, x, vmap_method="sequential")
        return jnp.sum(w * doubled * jax.random.normal(key, (3,)))

    keys = jax.random.split(jax.random.key(0), 4)
    check_against_oracle(loss, W, (jnp.asarray(X), keys), method="auto", double=False)


def test_every_primitive_of_jax_is_known_as_its_own() -> None:
    names = [name for name in dir(core.primitives) if name.endswith("_p")]
    program, _ = walker.trace(lambda x: _largest_p.bind(x) + eqxi.unvmap_max(x), W)
    assert [eqn.name for eqn in walker.equations(program) if eqn.foreign] == [
        "largest_of_all",
        "unvmap_max",
    ]
    assert len(names) > 100
    assert all(walker.is_of_jax(getattr(core.primitives, name)) for name in names)


def _dropped(w: jax.Array, example: Any) -> jax.Array:
    x, key = example
    return jnp.sum(jnp.where(jax.random.bernoulli(key, 0.5, (3,)), w * x, 0))


def _gamma(w: jax.Array, example: Any) -> jax.Array:
    x, key = example
    return jnp.sum(w * x) * jax.random.gamma(key, 2.0)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("loss", [_dropped, _gamma])
def test_keys_that_draw_together_in_a_batch_are_refused(loss: Loss, impl: str) -> None:
    """JAX draws the bits of a whole batch from the key of its first row."""
    batch = (X, jax.random.split(jax.random.key(0, impl=impl), len(X)))
    for method in ("auto", "taps", "dense"):
        with pytest.raises(ValueError, match=r"draws a whole batch from the key of one.*threefry"):
            jaxdp.per_sample_grads(loss, method=method)(W, batch).norms()
    alone = jaxdp.per_sample_grads(loss, microbatch_size=1)
    assert alone(W, batch).norms().shape == (4,)
    with pytest.raises(ValueError, match=r"vmap around microbatch_size=1"):
        jax.vmap(lambda w: alone(w, batch).norms())(jnp.stack([W, W]))
    fine = (X, jax.random.split(jax.random.key(0, impl="threefry2x32"), len(X)))
    for method in ("slots", "taps", "dense"):
        check_against_oracle(loss, W, fine, method=method, double=False)


def test_samples_that_do_not_come_with_the_batch_are_refused() -> None:
    """Inside shard_map: they would be added up over the devices before they are clipped."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    data = jnp.ones((8, 3))

    def closed(w: jax.Array, rows: jax.Array) -> jax.Array:
        return jaxdp.per_sample_grads(lambda w, i: w @ rows[i])(w, jnp.arange(2)).norms()

    def keyword(w: jax.Array, rows: jax.Array) -> jax.Array:
        grads_fn = jaxdp.per_sample_grads(lambda w, i, rows: w @ rows[i])
        return grads_fn(w, jnp.arange(2), rows=rows).norms()

    for run in (closed, keyword):
        mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
        with pytest.raises(ValueError, match=r"along \['data'\] must come with the batch"):
            mapped(W, data)
