"""Which state_dicts become parameters, and what is said of those that do not fit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp import nn
from tests.helpers import KEY

MODEL = nn.sequential(nn.linear(2, 3), nn.relu, head=nn.residual(nn.linear(3, 3, bias=False)))


def weights(prefix: str = "") -> dict[str, Any]:
    """What torch would have for `MODEL`."""
    arrays = {
        "0.weight": np.arange(6.0).reshape(3, 2),
        "0.bias": np.arange(3.0),
        "head.layer.weight": np.arange(9.0).reshape(3, 3),
    }
    return {prefix + name: array for name, array in arrays.items()}


def test_names_and_layouts_are_translated() -> None:
    params = nn.from_torch_state_dict(MODEL, weights())
    assert jax.tree.structure(params) == jax.tree.structure(MODEL.init(KEY))
    np.testing.assert_array_equal(params["0"]["kernel"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(params["head"]["layer"]["kernel"], np.arange(9).reshape(3, 3).T)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_a_prefix_names_a_part_of_a_larger_model() -> None:
    given = weights("_module.encoder.") | {"_module.decoder.weight": np.ones(3)}
    params = nn.from_torch_state_dict(MODEL, given, prefix="_module.encoder.")
    np.testing.assert_array_equal(params["0"]["bias"], [0, 1, 2])


def without(name: str) -> dict[str, Any]:
    return {key: array for key, array in weights().items() if key != name}


@pytest.mark.parametrize(
    ("layer", "given", "sentence"),
    [
        (MODEL, without("0.bias"), r"must hold 0\.bias, got"),
        (MODEL, weights() | {"tail.weight": np.ones(3)}, r"nothing but .* \['tail\.weight'\]"),
        (MODEL, weights() | {"0.weight": np.ones((2, 3))}, r"0\.weight .* got .* \(2, 3\)"),
        (MODEL, weights() | {"0.bias": np.ones(4)}, r"0\.bias .* \(3,\), got .* \(4,\)"),
        (
            nn.conv_linear(2, 3),
            {"weight": np.ones((3, 3)), "bias": np.ones(3)},
            r"weight must become .* \(1, 2, 3\), got .* \(3, 3\)",
        ),
        (
            nn.Layer(lambda key: {"w": jnp.ones(1)}, lambda params, x, *, key=None: x),
            {},
            "parameter w must have a torch name",
        ),
    ],
)
def test_what_does_not_fit_is_refused(layer: nn.Layer, given: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        nn.from_torch_state_dict(layer, given)


def test_a_value_that_numpy_cannot_read_is_named() -> None:
    class Unreadable:
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            raise TypeError("Got unsupported ScalarType BFloat16")

    with pytest.raises(TypeError, match=r"0\.bias .*BFloat16.*\.float\(\)"):
        nn.from_torch_state_dict(MODEL, weights() | {"0.bias": Unreadable()})


def test_a_batch_norms_statistics_are_named() -> None:
    given = weights() | {"1.running_mean": np.ones(3), "1.num_batches_tracked": np.array(3)}
    with pytest.raises(ValueError, match="1.running_mean.*batch norm"):
        nn.from_torch_state_dict(MODEL, given)


def test_a_moved_kernel_of_a_square_layer_is_still_transposed() -> None:
    """Where both layouts have one shape, only the rule can tell them apart."""
    square = np.arange(4.0).reshape(2, 2)
    params = nn.from_torch_state_dict(nn.linear(2, 2, bias=False), {"weight": square})
    np.testing.assert_array_equal(params["kernel"], square.T)
    square = np.arange(16.0).reshape(2, 2, 2, 2)
    moved = {"weight": square}
    straight = nn.from_torch_state_dict(nn.conv2d(2, 2, 2, bias=False), moved)
    turned = nn.from_torch_state_dict(nn.conv_transpose2d(2, 2, 2, bias=False), moved)
    np.testing.assert_array_equal(straight["kernel"], square.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(turned["kernel"], square[..., ::-1, ::-1].transpose(2, 3, 0, 1))
