"""`jaxdp.explain` names what is materialised and why, and the budget decides what is chosen."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxdp
from tests.helpers import KEY

B, T, D = 8, 6, 16


def loss(params: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["dense"] + params["bias"][None])
    h = h @ jnp.exp(params["derived"])
    return jnp.sum(jnp.sort(h * params["scale"][None], axis=0)[0])


def rematerialised(params: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(jax.checkpoint(layer), x, params)
    return jnp.sum(h**2)


PARAMS = {
    "bias": jnp.zeros(D),
    "dense": jnp.ones((D, D)),
    "derived": jnp.zeros((D, D)),
    "integers": jnp.arange(3),
    "scale": jnp.ones(D),
    "unused": jnp.ones(2),
}
X = jax.random.normal(KEY, (B, T, D))
STACK = jax.random.normal(KEY, (3, D, D))


def test_every_leaf_with_its_sites_method_and_reason() -> None:
    explanation = jaxdp.explain(loss, PARAMS, X)
    found = {leaf.leaf: (leaf.sites, leaf.form, leaf.reason) for leaf in explanation.leaves}
    assert found == {
        "bias": ("add", "materialized", "promoted: add"),
        "dense": ("dot_general", "gram", ""),
        "derived": (
            "dot_general",
            "materialized",
            "computed from parameters before its use",
        ),
        "scale": ("mul", "materialized", "promoted: mul"),
        "unused": ("", "unused", ""),
    }
    assert explanation.method == "slots"


def test_flops_and_bytes_of_a_product_over_time() -> None:
    (leaf,) = jaxdp.explain(lambda w, x: jnp.sum((x @ w) ** 2), jnp.ones((D, D)), X).leaves
    # Two Gram matrices of T vectors of D entries; the operands and the cotangents are kept.
    assert leaf.flops == B * 2 * T * T * (D + D)
    assert leaf.bytes == 4 * B * T * (D + D)


def test_the_table_has_one_line_for_each_leaf() -> None:
    first, header, *rows = str(jaxdp.explain(loss, PARAMS, X)).splitlines()
    assert first == "method slots (the fastest)"
    assert header.split() == ["leaf", "shape", "sites", "form", "MFLOP", "KiB", "reason"]
    assert [row.split()[0] for row in rows] == ["bias", "dense", "derived", "scale", "unused"]
    assert "16×16" in rows[1]


def test_a_loss_that_rematerialises_keeps_no_more_than_the_ordinary_gradient() -> None:
    keys = jax.random.split(KEY, 2)
    stack = jax.random.normal(keys[0], (4, 64, 64)) / 8
    x = jax.random.normal(keys[1], (16, 32, 64))
    ordinary = 16 * (4 + 1) * 4 * 32 * 64  # the input of each layer and the last output
    explanation = jaxdp.explain(rematerialised, stack, x)
    assert (explanation.method, explanation.microbatch_size) == ("slots", 8)
    (leaf,) = explanation.leaves
    assert leaf.bytes == 16 * 2 * 4 * 4 * 32 * 64
    assert leaf.bytes / 2 <= ordinary < leaf.bytes

    auto, dense = (
        jaxdp.per_sample_grads(rematerialised, method=method)(stack, x)
        for method in ("auto", "dense")
    )
    weights = jnp.linspace(-1, 1, 16)
    assert jnp.allclose(auto.norms(), dense.norms(), rtol=1e-3)  # certificates of each method
    assert jnp.allclose(auto.weighted_sum(weights), dense.weighted_sum(weights), atol=1e-4)


def test_convolutions_in_a_block_are_not_put_into_a_loop_on_a_cpu() -> None:
    def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
        layer = jax.checkpoint(lambda x: jnp.tanh(jax.lax.conv(x, kernel, (1, 1), "SAME")))
        return jnp.sum(layer(x)[0, 0])

    explanation = jaxdp.explain(loss, jnp.ones((64, 64, 3, 3)), jnp.ones((64, 1, 64, 8, 8)))
    assert (explanation.method, explanation.microbatch_size) == ("taps", None)


def test_a_small_loss_that_rematerialises_is_tapped() -> None:
    explanation = jaxdp.explain(rematerialised, STACK, X)
    (leaf,) = explanation.leaves
    assert explanation.method == "taps"
    assert (leaf.sites, leaf.form) == ("dot_general in scan of 3 in remat", "tap: gram")
    assert leaf.bytes == 0


def test_a_recurrent_loss_goes_through_the_batch_in_parts_that_its_stacks_fit() -> None:
    """What its loop stacks for slots, the ordinary gradient drops step by step."""

    def recurrent(w: jax.Array, x: jax.Array) -> jax.Array:
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h @ w + x), None), jnp.zeros(D), x)
        return jnp.sum(h**2)

    rows = jnp.ones((512, 64, D))
    explanation = jaxdp.explain(recurrent, STACK[0], rows)
    assert (explanation.method, explanation.microbatch_size) == ("slots", 256)
    # Where little is kept, a loop costs more than it saves; what the user asks for is done.
    assert jaxdp.explain(recurrent, STACK[0], X).microbatch_size is None
    assert jaxdp.explain(recurrent, STACK[0], rows, method="slots").microbatch_size is None
    assert jaxdp.explain(recurrent, STACK[0], rows, microbatch_size=512).microbatch_size == 512


@pytest.mark.parametrize("method", ["dense", "slots", "taps", "fused"])
def test_an_explicit_method_is_taken(method: str) -> None:
    assert jaxdp.explain(rematerialised, STACK, X, method=method).method == method


def test_dense_materialises_every_leaf() -> None:
    explanation = jaxdp.explain(loss, PARAMS, X, method="dense")
    assert {leaf.form for leaf in explanation.leaves} == {"materialized"}
    assert explanation.leaves[1].bytes == 4 * B * D * D


def test_slots_if_the_budget_holds_what_they_keep() -> None:
    kept = 3 * 2 * 4 * B * T * D  # operands and cotangents of three layers
    assert jaxdp.explain(rematerialised, STACK, X, memory_budget=kept).method == "slots"
    assert jaxdp.explain(rematerialised, STACK, X, memory_budget=kept - 1).method == "taps"


def test_microbatches_that_fit_the_budget() -> None:
    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h @ w + x), None), jnp.zeros(D), x)
        return jnp.sum(h**2)

    each = 2 * 4 * T * D  # a shared kernel is never tapped
    explanation = jaxdp.explain(product, STACK[0], X, memory_budget=3 * each)
    assert explanation.microbatch_size == 3
    grads = jaxdp.per_sample_grads(product, memory_budget=3 * each)(STACK[0], X)
    expected = jaxdp.per_sample_grads(product, method="dense")(STACK[0], X)
    # Of 64 positions, rounded up: the certificate of a Gram matrix.
    assert jnp.allclose(grads.norms(), expected.norms(), rtol=2e-4)
    with pytest.raises(ValueError, match=f"at least {each} bytes .* got {each - 1}"):
        jaxdp.explain(product, STACK[0], X, memory_budget=each - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ghost"}, "method must be 'auto' or 'dense' .*got 'ghost'"),
        ({"memory_budget": 0}, "memory_budget must be at least 1, got 0"),
        ({"microbatch_size": 0}, "microbatch_size must be at least 1, got 0"),
    ],
)
def test_bad_options_raise_before_there_is_a_batch(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxdp.per_sample_grads(loss, **options)
    with pytest.raises(ValueError, match=message):
        jaxdp.explain(loss, PARAMS, X, **options)


def test_on_several_devices_each_chooses_for_its_own_rows() -> None:
    """The budget is one device's: what a quarter of the rows needs is enough for each of four."""
    sharding = jaxdp.distributed.data_parallel(4)
    whole = jaxdp.explain(loss, PARAMS, X)
    spread = jaxdp.explain(loss, PARAMS, X, sharding=sharding)
    assert (whole.devices, spread.devices) == (1, 4)
    assert spread._replace(devices=1) == jaxdp.explain(loss, PARAMS, X[: B // 4])
    assert "on each of 4 devices" in str(spread) and "devices" not in str(whole)

    kept = sum(leaf.bytes for leaf in spread.leaves)
    options: dict[str, Any] = {"method": "slots", "memory_budget": kept}
    assert jaxdp.explain(loss, PARAMS, X, sharding=sharding, **options).microbatch_size is None
    assert jaxdp.explain(loss, PARAMS, X, **options).microbatch_size == B // 4


def test_what_a_mesh_says_of_the_rows_needs_no_argument() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
        spread = jaxdp.explain(loss, PARAMS, rows)
    assert spread.devices == 4
    assert spread._replace(devices=1) == jaxdp.explain(loss, PARAMS, X[: B // 4])


def test_rows_that_do_not_divide_among_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="the rows of a batch must divide among 3 devices, got 8"):
        jaxdp.explain(loss, PARAMS, X, sharding=jaxdp.distributed.data_parallel(3))
