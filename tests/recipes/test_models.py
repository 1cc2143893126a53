"""The models: their sizes, what they return, and which images they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp import lipschitz
from jaxdp.recipes.classify import cross_entropy
from jaxdp.recipes.models import IMAGE_MODELS, LIPSCHITZ_MODELS, MODEL_NAMES, build

KEY = jax.random.key(0)

# (model, image shape, classes, parameters)
SIZES = [
    ("tanh-cnn", (28, 28, 1), 10, 26_010),
    ("tanh-mlp", (8, 8, 1), 10, 64 * 64 + 64 + 64 * 10 + 10),
    ("linear", (8, 8, 1), 10, 64 * 10 + 10),
    ("linear", (4, 5, 3), 2, 60 * 2 + 2),
    ("lipschitz-mlp", (28, 28, 1), 10, 784 * 128 + 128 * 10),
    ("lipschitz-mlp", (4, 5, 3), 2, 60 * 128 + 128 * 2),
    ("char-lstm", (16,), 2, 28 * 64 + (64 + 128 + 2) * 512 + 128 * 2 + 2),
]


@pytest.mark.parametrize(("name", "shape", "classes", "size"), SIZES)
def test_the_number_of_parameters(
    name: str, shape: tuple[int, ...], classes: int, size: int
) -> None:
    params = jax.eval_shape(build(name, shape, classes).init, KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("shape", [(16, 16, 1), (28, 28, 1), (32, 20, 3)])
def test_one_image_gives_one_row_of_logits(name: str, shape: tuple[int, ...]) -> None:
    model = build(name, shape, 7)
    params = jax.eval_shape(model.init, KEY)
    logits = jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert (logits.shape, logits.dtype) == ((7,), jnp.float32)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_logits_depend_on_every_part_of_the_image(name: str) -> None:
    model = build(name, (28, 28, 1), 10)
    params = jax.jit(model.init)(KEY)
    image = jax.random.uniform(KEY, (28, 28, 1))

    @jax.jit
    @jax.grad
    def slope(image: jax.Array) -> jax.Array:
        return jnp.sum(model.apply(params, image) ** 2)

    slopes = np.abs(slope(image))[..., 0]
    # Of pooling, only the largest of a window counts: blocks of pixels, not each.
    blocks = slopes[2:26, 2:26].reshape(3, 8, 3, 8).sum(axis=(1, 3))
    assert (blocks > 0).all()


@pytest.mark.parametrize("name", ["tanh-mlp", "linear"])
def test_initialisation_follows_the_key(name: str) -> None:
    init = jax.jit(build(name, (16, 16, 1), 3).init)
    same, other = init(KEY), init(jax.random.key(1))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, init(KEY), same))
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, other, same))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'lipschitz-mlp' or 'char-lstm', got 'resnet'"):
        build("resnet", (28, 28, 1), 10)


def test_a_text_is_read_up_to_its_padding() -> None:
    model = build("char-lstm", (16,), 3)
    params = jax.jit(model.init)(KEY)
    text = jnp.array([13, 1, 18, 25] + [0] * 12)
    logits = model.apply(params, text)
    assert (logits.shape, logits.dtype) == ((3,), jnp.float32)
    np.testing.assert_allclose(model.apply(params, text[:4]), logits, rtol=1e-5)
    assert not jnp.allclose(model.apply(params, text.at[4].set(1)), logits)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_data_of_the_other_sort_are_refused(name: str) -> None:
    shape = (16,) if name in IMAGE_MODELS else (28, 28, 1)
    with pytest.raises(ValueError, match=f"model {name} must get") as caught:
        build(name, shape, 10)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(8, 8, 1), (15, 28, 1), (28, 15, 1)])
def test_an_image_too_small_to_convolve_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 16x16") as caught:
        build("tanh-cnn", shape, 10)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_only_lipschitz_models_are_projected(name: str) -> None:
    model = build(name, (16,) if name == "char-lstm" else (16, 16, 1), 3)
    assert (model.project is not None) == (name in LIPSCHITZ_MODELS)


@pytest.mark.parametrize("name", LIPSCHITZ_MODELS)
def test_the_gradient_of_a_lipschitz_model_is_short_whatever_the_image(name: str) -> None:
    model = build(name, (6, 6, 1), 3)
    assert model.project is not None
    wild = jax.tree.map(lambda leaf: 3 * leaf + 1, jax.jit(model.init)(KEY))
    params = jax.jit(model.project)(wild)
    example = (jnp.zeros((6, 6, 1)), jnp.int32(0))
    attack = lipschitz.falsify(
        cross_entropy(model), params, example, np.inf, key=KEY, classes=3, count=16, steps=3
    )
    assert attack.survived, str(attack)
    # √2 for each of two orthogonal layers; and an attack comes near.
    assert all(found.bound < 1.42 and found.ratio > 0.5 for found in attack.attacks.values())


def test_a_lipschitz_model_sees_contrast_alone() -> None:
    """Neither brightness nor contrast, where there is enough of it, changes its logits."""
    model = build("lipschitz-mlp", (6, 6, 1), 3)
    params = jax.jit(model.init)(KEY)
    image = jax.random.uniform(KEY, (6, 6, 1))
    expected = model.apply(params, image)
    assert float(jnp.linalg.norm(expected)) <= 1.0001
    np.testing.assert_allclose(model.apply(params, 3 * image + 2), expected, atol=1e-5)
    assert float(jnp.linalg.norm(model.apply(params, 1e-3 * image))) < 0.1
