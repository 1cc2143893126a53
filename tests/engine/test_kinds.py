"""Each kind of site over the grid of what its primitive can be asked for.

Held against `vmap(grad)` in double precision are the three things that a factor answers: certified
norms, rows, and a weighted sum. Where there are two ways to the norms, each of them is forced.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdp.engine.factors import outer, patches
from jaxdp.engine.methods.slots import Slots
from jaxdp.engine.plan import Plan, TracedLoss
from jaxdp.engine.reduction import Batch
from tests import helpers

ROWS = 3

OF_PRODUCTS = f"{outer.__name__}.form_of_products"
OF_PATCHES = f"{patches.__name__}.form_of_patches"


class Site(NamedTuple):
    """`apply(parameter, input) -> output`, and what to apply it to: shapes, or arrays of ids."""

    apply: Callable[[Any, Any], jax.Array]
    parameter: tuple[int, ...]
    example: Any


def loss_of(site: Site) -> Callable[[Any, Any], jax.Array]:
    def loss(leaf: Any, example: Any) -> jax.Array:
        output = site.apply(leaf, example)
        # Cotangents that differ from entry to entry, and depend on the parameter.
        ramp = jnp.linspace(0.5, 1.5, output.size, dtype=output.dtype).reshape(output.shape)
        return jnp.sum(jnp.sin(output) * ramp)

    return loss


def data_of(site: Site) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    leaf = jnp.asarray(rng.normal(size=site.parameter), jnp.float32)
    if isinstance(site.example, np.ndarray):
        return leaf, jnp.asarray(site.example)
    return leaf, jnp.asarray(rng.normal(size=(ROWS, *site.example)), jnp.float32)


def plan_of(site: Site) -> Plan:
    leaf, batch = data_of(site)
    loss = loss_of(site)
    example = jax.ShapeDtypeStruct(batch.shape[1:], batch.dtype)
    return TracedLoss.of(lambda leaves, x: (loss(leaves[0], x), None), [leaf], example).plan


def check(site: Site, chooser: str = "", *forced: str) -> None:
    """The factors of a site that must have some.

    Args:
      site: has one use.
      chooser: the function, with its module, that decides what norms are computed from.
      *forced: what it is made to decide, besides what it does by itself.
    """
    leaf, batch = data_of(site)
    count = batch.shape[0]
    plan = plan_of(site)
    (use,) = plan.uses.values()
    assert use.kind is not None, f"promoted: {use.reason}"
    weights = jnp.linspace(-1.0, 2.0, count)

    def answer(leaf: jax.Array, batch: jax.Array) -> Any:
        part = Batch(batch, jnp.ones(count, bool), jnp.arange(count))
        ((gradients,), _, _) = Slots(plan, [leaf]).leaf_gradients(part)
        sums = gradients.weighted_sum(weights)
        return gradients.certified_norms(count), sums, gradients.rows(count)

    def every_way(leaf: jax.Array, batch: jax.Array) -> dict[str, Any]:
        answers = {"as chosen": answer(leaf, batch)}
        for form in forced:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(chooser, lambda extent, form=form: form)
                answers[form] = answer(leaf, batch)
        return answers

    answers = jax.jit(every_way)(leaf, batch)
    with jax.enable_x64(True):
        wide = np.asarray(batch, np.float64) if helpers.is_float(batch) else batch
        grad = jax.jit(jax.vmap(jax.grad(loss_of(site)), (None, 0)))
        expected = np.asarray(grad(np.asarray(leaf, np.float64), wide))
    true = np.sum(expected.reshape(count, -1) ** 2, axis=1)
    scale = np.sqrt(np.max(true)) + 1e-30
    expected_sum = np.tensordot(np.asarray(weights, np.float64), expected, 1)
    for form, (norms, total, rows) in answers.items():
        # Gram matrices round up where terms cancel; nothing rounds down, but the cotangents that
        # the norms are made of are in single precision.
        low = true * (1 - 2e-6) - 1e-9 * scale**2
        high = true * (1 + 3e-4) + 2e-5 * scale**2
        squared = np.asarray(norms, np.float64) ** 2
        assert np.all((low <= squared) & (squared <= high)), (form, norms, np.sqrt(true))
        close = {"rtol": 1e-5, "atol": 1e-5 * scale, "err_msg": form}
        np.testing.assert_allclose(rows, expected, **close)
        np.testing.assert_allclose(total, expected_sum, **close)


# ---- dot_general --------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """Shapes and dimension numbers of a product."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


PRODUCTS = {
    "vector and matrix": Numbers((3,), (3, 4), ((0,), (0,))),
    "vector and vector": Numbers((4,), (4,), ((0,), (0,))),
    "matrix and matrix": Numbers((5, 3), (3, 4), ((1,), (0,))),
    "first axes": Numbers((3, 5), (3, 4), ((0,), (0,))),
    "last axes": Numbers((5, 3), (4, 3), ((1,), (1,))),
    "two free axes": Numbers((2, 3, 4), (5, 4, 2), ((2,), (1,))),
    "two contracted axes": Numbers((2, 3, 4), (3, 5, 4), ((1, 2), (0, 2))),
    "two contracted axes, crosswise": Numbers((2, 3, 4), (4, 5, 3), ((1, 2), (2, 0))),
    "all contracted": Numbers((2, 3), (2, 3), ((0, 1), (0, 1))),
    "nothing contracted": Numbers((2, 3), (4,), ((), ())),
    "one batch axis": Numbers((2, 5, 3), (2, 3, 4), ((2,), (1,)), ((0,), (0,))),
    "batch axis within": Numbers((5, 2, 3), (3, 4, 2), ((2,), (0,)), ((1,), (2,))),
    "two batch axes, crosswise": Numbers(
        (2, 3, 4, 2), (3, 2, 2, 5), ((3,), (2,)), ((0, 1), (1, 0))
    ),
    "batch axis alone": Numbers((4,), (4,), ((), ()), ((0,), (0,))),
    "batch and contraction alone": Numbers((4, 3), (4, 3), ((1,), (1,)), ((0,), (0,))),
    "axes of length one": Numbers((1, 5, 1), (1, 1, 4), ((2,), (1,)), ((0,), (0,))),
}


def dot_site(numbers: Numbers, kernel: int) -> Site:
    def apply(leaf: Any, x: Any) -> jax.Array:
        pair = (x, leaf) if kernel else (leaf, x)
        return lax.dot_general(*pair, (numbers.contract, numbers.batch))

    shapes = (numbers.left, numbers.right)
    return Site(apply, shapes[kernel], shapes[1 - kernel])


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", [0, 1])
@pytest.mark.parametrize("name", list(PRODUCTS))
def test_products(name: str, kernel: int) -> None:
    check(dot_site(PRODUCTS[name], kernel), OF_PRODUCTS, "gram", "rows")


KERNEL_CHANGES = {
    "transposed": ((4, 3), lambda w: w.T),
    "reshaped": ((12,), lambda w: w.reshape(3, 4)),
    "a slice": ((5, 6), lambda w: w[1:4, 2:]),
    "a layer": ((2, 3, 4), lambda w: w[1]),
    "axes split off": ((3, 2, 2), lambda w: w.transpose(0, 2, 1).reshape(3, 4)),
}


@pytest.mark.parametrize("name", list(KERNEL_CHANGES))
def test_products_with_a_view(name: str) -> None:
    """Gradients return to the leaf that the kernel is a view of."""
    shape, change = KERNEL_CHANGES[name]
    check(Site(lambda leaf, x: x @ change(leaf), shape, (5, 3)), OF_PRODUCTS, "gram", "rows")


@pytest.mark.parametrize(
    ("extent", "form"),
    [
        (outer.ProductExtent(1, 1, 5, 7), "outer product"),
        (outer.ProductExtent(9, 1, 1, 1), "outer product"),
        # 2 · 10 · 40 = 800 operations against 3 · 400, 200 entries against 400.
        (outer.ProductExtent(1, 10, 20, 20), "gram"),
        # 1200 against 1200, and 450 entries against 400.
        (outer.ProductExtent(1, 14, 20, 20), "gram"),
        (outer.ProductExtent(1, 15, 20, 20), "rows"),
        # Few operations for long thin matrices are never many rows.
        (outer.ProductExtent(1, 2, 1000, 1), "rows"),
        (outer.ProductExtent(1, 2, 1000, 8), "gram"),
        # Attention and perceptron of GPT-2 small: matrices about as large as the vectors, and
        # Gram matrices dearer from some length on.
        (outer.ProductExtent(1, 128, 768, 768), "gram"),
        (outer.ProductExtent(1, 512, 768, 768), "rows"),
        (outer.ProductExtent(1, 512, 768, 3072), "rows"),
        # Its head: matrices of all words would be larger than the logits.
        (outer.ProductExtent(1, 512, 768, 50257), "gram"),
    ],
)
def test_the_form_of_a_product(extent: outer.ProductExtent, form: str) -> None:
    assert outer.form_of_products(extent) == form


@pytest.mark.parametrize(
    ("extent", "form"),
    [
        # Small images with many channels, and what makes each of the two conditions fail.
        (patches.PatchExtent(pixels=16, positions=16, window=9, inputs=64, outputs=64), "gram"),
        (patches.PatchExtent(pixels=1024, positions=1024, window=9, inputs=64, outputs=64), "rows"),
        (patches.PatchExtent(pixels=16, positions=16, window=1, inputs=16, outputs=16), "rows"),
        (patches.PatchExtent(pixels=4, positions=4, window=1, inputs=3, outputs=3), "rows"),
    ],
)
def test_the_form_of_a_convolution(extent: patches.PatchExtent, form: str) -> None:
    assert patches.form_of_patches(extent) == form


# ---- conv_general_dilated -----------------------------------------------------------------------


def conv_site(
    image: tuple[int, ...],
    kernel: tuple[int, ...],
    numbers: tuple[str, str, str] | None = None,
    *,
    strides: Any = None,
    padding: Any = "SAME",
    **options: Any,
) -> Site:
    """A convolution of `image`, with its batch axis; the layout is that of NHWC if none is said."""
    rank = len(image) - 2
    axes = "HWD"[:rank]
    numbers = numbers or (f"N{axes}C", f"{axes}IO", f"N{axes}C")

    def apply(leaf: Any, x: Any) -> jax.Array:
        return lax.conv_general_dilated(
            x, leaf, strides or (1,) * rank, padding, dimension_numbers=numbers, **options
        )

    return Site(apply, kernel, image)


CONVOLUTIONS = {
    "1d": conv_site((1, 6, 2), (3, 2, 3)),
    "1d, strided": conv_site((1, 7, 2), (3, 2, 3), strides=(2,), padding="VALID"),
    "1d, a rest left over": conv_site((1, 8, 2), (3, 2, 3), strides=(3,), padding="VALID"),
    "1d, padded unevenly": conv_site((1, 5, 2), (2, 2, 3), padding=[(3, 1)]),
    "1d, negative padding": conv_site((1, 9, 2), (3, 2, 3), padding=[(-2, -1)]),
    "1d, mixed padding": conv_site((1, 6, 2), (3, 2, 2), padding=[(-1, 2)], strides=(2,)),
    "1d, window dilated": conv_site((1, 9, 2), (3, 2, 2), rhs_dilation=(2,)),
    "1d, image dilated": conv_site((1, 4, 2), (3, 2, 2), lhs_dilation=(3,), padding=[(1, 2)]),
    "1d, both dilated, strided, cut": conv_site(
        (1, 5, 2),
        (2, 2, 2),
        lhs_dilation=(2,),
        rhs_dilation=(3,),
        strides=(2,),
        padding=[(-1, 3)],
    ),
    "1d, window longer than the image": conv_site((1, 2, 2), (5, 2, 3)),
    "1d, several images": conv_site((3, 5, 2), (3, 2, 2)),
    "1d, groups": conv_site((1, 5, 4), (3, 2, 6), feature_group_count=2),
    "1d, depthwise": conv_site((1, 5, 3), (3, 1, 6), feature_group_count=3),
    "2d": conv_site((1, 4, 5, 2), (3, 3, 2, 3)),
    "2d, strides": conv_site((1, 5, 4, 2), (3, 2, 2, 2), strides=(2, 1)),
    "2d, channels first": conv_site((1, 2, 4, 5), (3, 2, 3, 2), ("NCHW", "OIHW", "NCHW")),
    "2d, mixed layouts": conv_site((2, 4, 1, 5), (2, 3, 2, 3), ("CHNW", "IHWO", "WNHC")),
    "2d, pointwise": conv_site((1, 3, 3, 4), (1, 1, 4, 3)),
    "2d, pointwise, strides": conv_site((1, 4, 5, 3), (1, 1, 3, 2), strides=(2, 3)),
    "2d, pointwise, padded": conv_site((2, 3, 2, 3), (1, 1, 3, 2), padding=[(1, 0), (-1, 2)]),
    "2d, pointwise, image dilated": conv_site(
        (1, 3, 2, 3), (1, 1, 3, 2), lhs_dilation=(2, 1), padding=[(0, 1), (0, 0)], strides=(1, 2)
    ),
    "2d, pointwise, mixed layouts": conv_site(
        (4, 3, 2, 5), (1, 3, 1, 4), ("CHNW", "HOWI", "WNHC"), padding="VALID"
    ),
    "2d, pointwise, one pixel": conv_site((1, 1, 1, 4), (1, 1, 4, 3)),
    "2d, pointwise, groups": conv_site((1, 3, 2, 4), (1, 1, 2, 6), feature_group_count=2),
    "2d, dilations": conv_site(
        (1, 4, 3, 2), (2, 2, 2, 2), rhs_dilation=(2, 1), lhs_dilation=(1, 2), padding=[(0, 0)] * 2
    ),
    "2d, groups": conv_site(
        (1, 4, 3, 3), (4, 2, 2, 2), ("NCHW", "OIHW", "NCHW"), feature_group_count=2, padding="VALID"
    ),
    "3d": conv_site((1, 3, 2, 3, 2), (2, 2, 2, 2, 2)),
    "3d, strides": conv_site((1, 3, 4, 3, 1), (2, 2, 2, 1, 2), strides=(1, 2, 2), padding="VALID"),
    "no spatial axis": conv_site((2, 3), (3, 4)),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions(name: str) -> None:
    pointwise = "pointwise" in name and "groups" not in name
    check(CONVOLUTIONS[name], OF_PRODUCTS if pointwise else OF_PATCHES, "gram", "rows")


WINDOWS = list(itertools.product((1, 2, 3), (1, 2), (1, 3), (-1, 0, 2), (-2, 1)))


def outputs_of_window(stride: int, spread: int, dilation: int, low: int, high: int) -> int:
    """How many outputs the kernel of 3 has over an axis of 8."""
    return (7 * spread + 1 + low + high - (2 * dilation + 1)) // stride + 1


def site_of_window(stride: int, spread: int, dilation: int, low: int, high: int) -> Site:
    return conv_site(
        (1, 8, 2),
        (3, 2, 2),
        strides=(stride,),
        padding=[(low, high)],
        lhs_dilation=(spread,),
        rhs_dilation=(dilation,),
    )


@pytest.mark.slow
@pytest.mark.parametrize("window", [each for each in WINDOWS if outputs_of_window(*each) > 0])
def test_every_window(window: tuple[int, ...]) -> None:
    check(site_of_window(*window), OF_PATCHES, "gram", "rows")


@pytest.mark.parametrize("window", [each for each in WINDOWS if outputs_of_window(*each) <= 0])
def test_a_window_without_outputs_is_no_factor(window: tuple[int, ...]) -> None:
    (use,) = plan_of(site_of_window(*window)).uses.values()
    assert use.kind is None and use.reason == "a convolution without output"


# ---- gather and dynamic_slice -------------------------------------------------------------------

REPEATED = np.array([[0, 2, 2, 1], [3, 3, 3, 3], [1, 0, 3, 2]], np.int32)
# Out of range on either side; -1 is the last one where indices wrap.
OUTSIDE = np.array([[0, 7, 2, -9], [-1, 4, 3, 5], [9, 9, 9, 9]], np.int32)
MANY_IDS = np.random.default_rng(0).integers(4, size=(ROWS, 200)).astype(np.int32)


def looked_up(mode: Any) -> Callable[[Any, Any], jax.Array]:
    return lambda leaf, ids: leaf.at[ids].get(mode=mode)


def at_a_place(axis: int) -> Callable[[Any, Any], jax.Array]:
    return lambda leaf, at: lax.dynamic_slice_in_dim(leaf, at, 1, axis)


LOOK_UPS = {
    "repeated ids": Site(lambda t, ids: t[ids], (4, 3), REPEATED),
    "many ids": Site(lambda t, ids: t[ids], (4, 3), MANY_IDS),
    "many ids, half outside": Site(looked_up("fill"), (4, 3), MANY_IDS * 2 - 2),
    "one id": Site(lambda t, i: t[i], (4, 3), REPEATED[:, 0]),
    "a matrix of ids": Site(lambda t, ids: t[ids], (4, 3), REPEATED.reshape(ROWS, 2, 2)),
    "a table of matrices": Site(lambda t, ids: t[ids], (4, 3, 2), REPEATED),
    "a table of numbers": Site(lambda t, ids: t[ids], (4,), REPEATED),
    "a table of one row": Site(lambda t, ids: t[ids], (1, 3), 0 * REPEATED),
    "unsigned ids": Site(lambda t, ids: t[ids], (4, 3), REPEATED.astype(np.uint8)),
    "ids of eight bits": Site(looked_up("clip"), (100, 2), REPEATED.astype(np.int8)),
    "columns": Site(lambda t, ids: t[:, ids], (3, 4), REPEATED),
    "columns by take": Site(lambda t, ids: jnp.take(t, ids, axis=1), (3, 4, 2), REPEATED),
    "a transposed table": Site(lambda t, ids: t.T[ids], (3, 4), REPEATED),
    "a slice of a table": Site(lambda t, ids: t[1:, :2][ids], (5, 3), REPEATED),
    "wrapped ids": Site(lambda t, ids: t[ids], (4, 3), REPEATED - 4),
    "outside, as indexing does": Site(lambda t, ids: t[ids], (4, 3), OUTSIDE),
    "outside, clipped": Site(looked_up("clip"), (4, 3), OUTSIDE),
    "outside, filled": Site(looked_up("fill"), (4, 3), OUTSIDE),
    "inside, promised": Site(looked_up("promise_in_bounds"), (4, 3), REPEATED),
    "a row": Site(at_a_place(0), (4, 3), REPEATED[:, 0]),
    "a column": Site(at_a_place(1), (3, 4), REPEATED[:, 0]),
    "an inner slice": Site(at_a_place(1), (2, 4, 3), REPEATED[:, 0]),
    "a row outside": Site(at_a_place(0), (4, 3), OUTSIDE[:, 1]),
    "a row before the first": Site(at_a_place(0), (4, 3), OUTSIDE[:, 3]),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", list(LOOK_UPS))
def test_look_ups(name: str) -> None:
    check(LOOK_UPS[name])


def one_place(leaf: Any, at: Any) -> jax.Array:
    return lax.dynamic_slice(leaf, (at, at), (1, 1))


# What has no factored form, each for the reason that stands beside it.
REFUSED = {
    "broadcast": Site(lambda w, x: x @ jnp.broadcast_to(w, (3, 4)), (4,), (5, 3)),
    "concatenated kernel": Site(
        lambda k, x: conv_site((1, 5, 2), ()).apply(jnp.concatenate([k, k]), x),
        (2, 2, 2),
        (1, 5, 2),
    ),
    "as the image": Site(
        lambda image, k: conv_site((1, 5, 2), ()).apply(k, image), (1, 5, 2), (3, 2, 2)
    ),
    "batch groups": conv_site((2, 5, 3), (3, 3, 4), batch_group_count=2),
    "concatenated table": Site(lambda t, i: jnp.concatenate([t, t])[i], (2, 3), REPEATED),
    "along several axes": Site(lambda t, i: t[i, i], (4, 4), REPEATED),
    "more than one row": Site(one_place, (4, 4), REPEATED[:, 0]),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_what_cannot_be_factored_says_why(reason: str) -> None:
    (use,) = plan_of(REFUSED[reason]).uses.values()
    assert use.kind is None
    assert reason.split()[-1].rstrip("s") in use.reason
