"""What `validate` finds, what it leaves alone, and what it says."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from jaxdp import nn
from tests.helpers import KEY

X = jnp.ones(3)
W = {"w": jnp.ones(3)}
TABLE = np.ones((2, 3), np.float32)


def kinds(validation: jaxdp.Validation) -> list[str]:
    return [finding.kind for finding in validation.findings]


class Normalised(linen.Module):
    running: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.BatchNorm(use_running_average=self.running)(x)


def flax_batch_norm(running: bool) -> jaxdp.Validation:
    model = Normalised(running)
    variables = model.init(KEY, X)
    return jaxdp.validate(model.apply, variables, X)


def test_a_clean_model_has_no_findings() -> None:
    pool = nn.function(lambda x: x[:, None])
    model = nn.sequential(
        nn.linear(3, 4), nn.layer_norm(4), nn.gelu, nn.dropout(0.5), pool, nn.adaptive_avg_pool(3)
    )
    params = model.init(KEY)

    def loss(params: Any, example: Any) -> jax.Array:
        return jnp.sum(model.apply(params, example["x"], key=example["key"]) ** 2)

    found = jaxdp.validate(loss, params, {"x": X, "key": KEY})
    assert found.findings == () and found.ok and str(found) == "nothing found"
    shapes = jax.eval_shape(model.init, KEY)
    assert jaxdp.validate(loss, shapes, {"x": X, "key": KEY}).ok


def test_batch_statistics_of_flax() -> None:
    found = flax_batch_norm(running=False)
    assert kinds(found) == ["couples samples"] and not found.ok
    assert "GroupNorm" in found.findings[0].fix
    assert flax_batch_norm(running=True).ok


@pytest.mark.parametrize("collective", [jax.lax.pmean, jax.lax.psum, jax.lax.all_gather])
def test_communication_over_an_axis(collective: Any) -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return collective(params["w"] * x, "batch")

    outside = jaxdp.validate(model, W, X)
    assert kinds(outside) == ["couples samples"] and "batch" in str(outside)

    inside: list[jaxdp.Validation] = []

    def on_device(x: jax.Array) -> jax.Array:
        inside.append(jaxdp.validate(model, W, x[0]))
        return x

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    spec = jax.sharding.PartitionSpec("batch")
    jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones((2, 3)))
    assert "couples samples" in kinds(inside[0]) and not inside[0].ok
    assert "test_validation.py" in str(inside[0])


def test_another_name_error_is_the_users_own() -> None:
    with pytest.raises(NameError, match="undefined"):
        jaxdp.validate(lambda params, x: undefined, W, X)  # noqa: F821  # pyright: ignore


def in_a_loop(fun: Any) -> Any:
    """The same within a scan within a jitted function."""

    @jax.jit
    def model(params: Any, x: jax.Array) -> Any:
        return jax.lax.scan(lambda carry, _: (fun(params, carry), None), x, None, length=2)[0]

    return model


@pytest.mark.parametrize("wrap", [lambda fun: fun, in_a_loop])
def test_host_callbacks(wrap: Any) -> None:
    def remembers(params: Any, x: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct((3,), jnp.float32)
        return params["w"] * jax.pure_callback(lambda x: x, shape, x)

    def prints(params: Any, x: jax.Array) -> jax.Array:
        jax.debug.print("{}", x)
        return params["w"] * x

    found = jaxdp.validate(wrap(remembers), W, X)
    assert kinds(found) == ["couples samples"] and "pure_callback" in str(found)
    found = jaxdp.validate(wrap(prints), W, X)
    assert kinds(found) == ["escapes clipping"] and "test_validation.py" in found.findings[0].where


def test_running_averages_that_come_back() -> None:
    params = {"net": {"w": X}, "stats": {"mean": jnp.zeros(3)}}

    def model(params: Any, x: jax.Array) -> Any:
        mean = params["stats"]["mean"]
        return params["net"]["w"] @ (x - mean), {"stats": {"mean": 0.9 * mean + 0.1 * x}}

    (finding,) = jaxdp.validate(model, params, X).findings
    assert (finding.kind, finding.where) == ("escapes clipping", "stats/mean")
    # Unchanged, or changed by parameters alone, they tell nothing.
    assert jaxdp.validate(lambda p, x: (p["w"] @ x, p), W, X).ok
    assert jaxdp.validate(lambda p, x: (p["w"] @ x, {"w": 2 * p["w"]}), W, X).ok
    # Another name, another shape, and a single key of a longer path are no parameter.
    assert jaxdp.validate(lambda p, x: {"y": p["w"] * x}, W, X).ok
    assert jaxdp.validate(lambda p, x: {"w": p["w"] @ x}, W, X).ok
    assert jaxdp.validate(lambda p, x: {"mu": p["enc"]["mu"] * x}, {"enc": {"mu": X}}, X).ok


def test_running_averages_without_a_name() -> None:
    """Parameters in a list are known by their places."""
    params = [{"w": X}, jnp.zeros(3)]

    def model(params: Any, x: jax.Array) -> Any:
        return params[0]["w"] @ x, [params[0], 0.9 * params[1] + 0.1 * x]

    found = jaxdp.validate(model, params, X)
    assert kinds(found) == ["escapes clipping"] and found.findings[0].where == "1"
    assert jaxdp.validate(lambda p, x: [p[0] * x], [X], X).ok  # one array: any result looks so


@jax.custom_vjp
def synchronised(w: jax.Array) -> jax.Array:
    return w


synchronised.defvjp(lambda w: (w, None), lambda _, g: (jax.lax.pmean(g, "batch"),))


@jax.custom_vjp
def shown(w: jax.Array) -> jax.Array:
    return w


def shown_backward(_: None, g: jax.Array) -> tuple[jax.Array]:
    jax.debug.print("{}", g)
    return (g * jnp.asarray(TABLE)[0],)


shown.defvjp(lambda w: (w, None), shown_backward)


def test_the_backward_pass_is_looked_at() -> None:
    found = jaxdp.validate(lambda p, x: synchronised(p["w"]) @ x, W, X)
    assert kinds(found) == ["couples samples"] and "batch" in str(found)
    found = jaxdp.validate(lambda p, x: shown(p["w"]) @ x, W, X)
    assert kinds(found) == ["escapes clipping", "check"]
    # Leaves and results without a derivative are in nobody's way.
    mixed = {"w": X, "n": jnp.arange(3)}
    found = jaxdp.validate(lambda p, x: (p["w"] @ x, jnp.argmax(x), p["n"][0]), mixed, X)
    assert found.findings == ()


def test_a_mutable_array_that_is_closed_over() -> None:
    seen = jax.new_ref(jnp.zeros(3))

    def model(params: Any, x: jax.Array) -> jax.Array:
        seen[...] = seen[...] + x
        return params["w"] @ x

    found = jaxdp.validate(model, W, X)
    assert "couples samples" in kinds(found) and "mutable" in str(found)


@pytest.mark.parametrize("wrap", [lambda fun: fun, in_a_loop])
def test_arrays_that_are_closed_over_are_to_be_checked(wrap: Any) -> None:
    found = jaxdp.validate(wrap(lambda p, x: p["w"] * x * jnp.sum(jnp.asarray(TABLE))), W, X)
    assert kinds(found) == ["check"] and found.ok
    assert "float32[2, 3]" in found.findings[0].where
    key = jax.random.key(1)
    found = jaxdp.validate(wrap(lambda p, x: p["w"] * x + jax.random.normal(key, (3,))), W, X)
    assert kinds(found) == ["check"] and "same numbers" in str(found)
    assert jaxdp.validate(lambda p, x: 2.0 * p["w"] * x, W, X).findings == ()


def test_parameters_without_gradient_are_to_be_checked() -> None:
    params = {"w": X, "still": X, "idle": X, "count": jnp.arange(3)}

    def model(params: Any, x: jax.Array) -> jax.Array:
        return (params["w"] + jax.lax.stop_gradient(params["still"])) @ x

    found = jaxdp.validate(model, params, X)
    assert [finding.where for finding in found.findings] == ["idle", "still"]
    assert kinds(found) == ["check", "check"] and "trainable" in str(found)


def test_a_penalty_in_a_loss_belongs_behind_the_noise() -> None:
    def loss_fn(p: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(jnp.tanh(p["w"] * x)) + 0.1 * jnp.sum(p["w"] ** 2), x

    (finding,) = jaxdp.validate(loss_fn, W, X).findings
    assert finding.kind == "check" and "a penalty on the parameters" in finding.what
    assert "test_validation.py" in finding.where and "add_decayed_weights" in finding.fix
    weighed = jaxdp.validate(lambda p, x: jnp.sum(p["w"] * x) * jnp.sum(p["w"] ** 2), W, X)
    assert not weighed.findings
    assert not jaxdp.validate(lambda p, x: (p["w"] * x, jnp.sum(p["w"] ** 2)), W, X).findings
    assert jaxdp.validate(lambda p, x: (), {}, X).ok


def test_what_training_refuses_is_found_with_its_line() -> None:
    mapped = jax.custom_batching.sequential_vmap(jnp.sin)

    def written(params: Any, x: jax.Array) -> jax.Array:
        ref = jax.new_ref(params["w"])
        return ref[...] @ x

    def ordered(params: Any, x: jax.Array) -> jax.Array:
        jax.debug.callback(print, x, ordered=True)
        return params["w"] @ x

    for model, what in (
        (lambda p, x: p["w"] @ mapped(x), "custom_vmap"),
        (written, "new_ref of a mutable array"),
        (ordered, "OrderedDebugEffect"),
    ):
        found = jaxdp.validate(model, W, X)
        assert not found.ok and what in str(found) and "test_validation.py" in str(found)


def test_broadcasting_from_one_device_is_communication() -> None:
    found = jaxdp.validate(lambda p, x: p["w"] @ jax.lax.pbroadcast(x, ("data",), 0), W, X)
    assert kinds(found) == ["couples samples"]


def test_a_print_hides_no_backward_rule() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        jax.debug.print("{}", x)
        return synchronised(params["w"]) @ x

    found = jaxdp.validate(model, W, X)
    assert "couples samples" in kinds(found) and "batch" in str(found)


def test_a_host_function_with_a_derivative_hides_no_backward_rule() -> None:
    @jax.custom_jvp
    def doubled(x: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda x: 2 * x, x, x, vmap_method="sequential")

    doubled.defjvp(lambda primals, tangents: (doubled(*primals), jax.lax.psum(tangents[0], "b")))
    found = jaxdp.validate(lambda p, x: jnp.sum(doubled(p["w"] * x)), W, X)
    assert not found.ok and "axis name: b" in str(found)
