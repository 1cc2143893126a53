"""Every layer gives the numbers of torch's own, over grids of options."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp import nn
from tests.golden import cases
from tests.golden.cases import Golden, masks

# A part with the oldest JAX, another with newer ones (tests/conftest.py).
pytestmark = pytest.mark.sweep

# Of how many cases the default run takes one; `make slow` takes all.
SAMPLED = {
    "conv1d": 24,
    "conv2d": 16,
    "conv3d": 12,
    "conv_transpose": 12,
    "embedding": 4,
    "recurrent": 5,
    "attention": 5,
}
PLAIN = ("linear", "conv1d", "conv2d", "conv3d", "padding_modes", "conv_transpose",
         "normalization", "pooling", "activations")  # fmt: skip


def golden(*families: str) -> list[Any]:
    """The cases of these families, most of a large one marked as slow."""

    def marked(family: str, case: Golden) -> Any:
        slow = zlib.crc32(case.name.encode()) % SAMPLED.get(family, 1) != 0
        return pytest.param(case, marks=pytest.mark.slow if slow else (), id=case.name)

    return [marked(family, case) for family in families for case in cases.load(family)]


def built(case: Golden) -> tuple[nn.Layer, Any]:
    """The layer, with torch's weights; a function stands for itself."""
    factory = getattr(nn, case.layer)
    layer = factory(**case.options) if case.options else nn.function(factory)
    return layer, nn.from_torch_state_dict(layer, case.state_dict())


def run(apply: Callable[..., Any], params: Any, *args: Any) -> Any:
    """Of all examples."""
    examples = [jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32) for a in args]
    mapped = jax.vmap(apply, (None, *[0] * len(args)))
    return jax.jit(mapped)(params, *examples)


def assert_close(got: Any, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Relative to the largest number, or to one."""
    scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("case", golden(*PLAIN))
def test_a_layer_of_one_input(case: Golden) -> None:
    layer, params = built(case)
    assert_close(run(layer.apply, params, case.examples()["x"]), case.outputs["y"])


@pytest.mark.parametrize("case", golden("embedding"))
def test_look_ups_and_their_gradients(case: Golden) -> None:
    layer, params = built(case)

    def loss(params: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = layer.apply(params, ids)
        return 0.5 * jnp.sum(y**2), y

    grads, y = run(jax.grad(loss, has_aux=True), params, case.examples()["x"])
    assert_close(y, case.outputs["y"])
    assert_close(grads["embedding"], case.outputs["grad"])


@pytest.mark.parametrize("case", golden("recurrent"))
def test_sequences_of_several_lengths(case: Golden) -> None:
    layer, params = built(case)
    inputs, lengths = case.examples(), case.settings["lengths"]
    steps = inputs["x"].shape[1]
    given = [inputs[name] for name in ("h", "c") if name in inputs]
    keys = np.arange(len(lengths))

    def apply(params: Any, x: Any, length: Any, number: Any, *start: Any) -> Any:
        # Torch placed its dropout in training; it only draws where the rate is not zero.
        key = jax.random.fold_in(jax.random.key(0), number)
        mask = None if set(lengths) == {steps} else jnp.arange(steps) < length
        state = None if not start else start if len(start) == 2 else start[0]
        return layer.apply(params, x, state, mask=mask, key=key)

    y, final = run(apply, params, inputs["x"], np.asarray(lengths), keys, *given)
    assert_close(y, case.outputs["y"], 1e-6)
    ends = final if case.layer == "lstm" else (final,)
    for name, end in zip("hc", ends, strict=False):
        assert_close(end, case.outputs[name], 1e-6)


@pytest.mark.parametrize("case", golden("attention"))
def test_attention_under_masks(case: Golden) -> None:
    layer, params = built(case)
    given = {name: jnp.asarray(mask) for name, mask in masks(case).items()}
    options = given | ({"is_causal": True} if "is_causal" in given else {})

    def apply(params: Any, *inputs: Any) -> Any:
        return layer.apply(params, *inputs, **options)

    inputs = [
        case.examples()[name] for name in ("queries", "keys", "values") if name in case.inputs
    ]
    assert_close(run(apply, params, *inputs), case.outputs["y"])


CNN = nn.sequential(
    nn.conv2d(2, 4, 3, padding=1),
    nn.group_norm(2, 4),
    nn.relu,
    nn.max_pool(2),
    nn.conv_transpose2d(4, 3, 2, stride=2),
    nn.flatten(channels_first=True),
    nn.linear(3 * 6 * 6, 5),
)


def test_a_whole_network_moves_over() -> None:
    (case,) = (case for case in cases.load("models") if case.name == "cnn")
    params = nn.from_torch_state_dict(CNN, case.state_dict())
    assert_close(run(CNN.apply, params, case.examples()["x"]), case.outputs["y"])


def test_a_private_lstm_of_opacus_moves_over() -> None:
    (case,) = (case for case in cases.load("models") if case.name == "opacus-lstm")
    layer = nn.lstm(3, 4, num_layers=2, bidirectional=True)
    weights = {f"_module.{name}": array for name, array in case.state_dict().items()}
    # A GradSampleModule has each array twice: "weight_hh_l0" is "l0.hh.weight".
    for name in case.shapes:
        kind, part, at = name.split("_", 2)
        weights[f"_module.{at}.{part}.{kind}"] = weights[f"_module.{name}"]
    params = nn.from_torch_state_dict(layer, weights, prefix="_module.")
    y, _ = run(layer.apply, params, case.examples()["x"])
    assert_close(y, case.outputs["y"])


def test_the_comparison_would_notice_a_small_difference() -> None:
    with pytest.raises(AssertionError):
        assert_close(np.array([1.00003]), np.array([1.0]))
