"""Hand-written losses of one example, one for each way in which a parameter can meet a sample.

`PROGRAMS` names them. The heads are `total`, whose derivative differs from entry to entry, so that
a transposed or summed axis shows in the gradient.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.oracle import Case

ROWS = 5

PROGRAMS: dict[str, Case] = {}


class Integers(NamedTuple):
    """Stands for an array of integers from 0 to `limit` - 1, with repetitions."""

    limit: int
    shape: tuple[int, ...] = ()


def arrays(shapes: Any, rng: np.random.Generator, leading: tuple[int, ...] = ()) -> Any:
    """A pytree of shapes, or `Integers`, filled with float32, or int32."""

    def fill(shape: Any) -> np.ndarray:
        if isinstance(shape, Integers):
            return rng.integers(shape.limit, size=leading + shape.shape).astype(np.int32)
        return (0.7 * rng.normal(size=leading + shape)).astype(np.float32)

    return jax.tree.map(fill, shapes, is_leaf=_is_shape)


def _is_shape(node: Any) -> bool:
    plain = isinstance(node, tuple) and all(isinstance(size, int) for size in node)
    return plain or isinstance(node, Integers)


def program(
    params: Any,
    example: Any,
    suffix: str = "",
    tolerance: float = 1e-5,
    double: bool = True,
    fixed: Any = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters a loss into `PROGRAMS` under the function's name and the suffix.

    Args:
      params: pytree of shapes, of one leaf or a dict of them.
      example: pytree of shapes, without the batch axis.
      suffix: of the name.
      tolerance, double: see `Case`.
      fixed: further parameters as they are.
      **options: for `per_sample_grads`.
    """

    def enter(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        rng = np.random.default_rng(0)
        values = arrays(params, rng)
        values = values if fixed is None else values | fixed
        batch = arrays(example, rng, (ROWS,))
        name = loss_fn.__name__ + suffix
        assert name not in PROGRAMS, name
        PROGRAMS[name] = Case(loss_fn, values, batch, options, tolerance, double)
        return loss_fn

    return enter


def total(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(x))


def row(leaf: jax.Array) -> jax.Array:
    """`[d]` as `[1, d]`: strict rank promotion wants it said."""
    return leaf[None, :]


# ---- products -----------------------------------------------------------------------------------


@program({"b": (2,), "w": (3, 2)}, (3,))
def dense_right(p: Any, x: Any) -> Any:
    return total(jnp.tanh(x @ p["w"] + p["b"]))


@program({"w": (2, 3)}, (3,))
def dense_left(p: Any, x: Any) -> Any:
    return total(p["w"] @ x)


@program({"b": (2,), "w": (3, 2)}, (4, 3))
def dense_over_time(p: Any, x: Any) -> Any:
    return total(x @ p["w"] + row(p["b"]))


@program({"w": (2, 2)}, (24, 2))
def dense_over_much_time(p: Any, x: Any) -> Any:
    """Cheaper instantiated than by its Gram matrix."""
    return total(x @ p["w"])


@program({"w": (12, 11)}, (2, 12))
def dense_wide(p: Any, x: Any) -> Any:
    """Cheaper by its Gram matrix than instantiated."""
    return total(x @ p["w"])


@program({"w": (3, 4)}, (2, 5, 3))
def dense_over_two_axes(p: Any, x: Any) -> Any:
    return total(jnp.einsum("hwc,cd->dhw", x, p["w"]))


@program({"w": (3, 2, 4)}, (5, 3, 2))
def einsum_of_two_contracted_axes(p: Any, x: Any) -> Any:
    return total(jnp.einsum("tij,ijd->td", x, p["w"]))


@program({"out": (2, 4, 3), "value": (3, 2, 4)}, (5, 3))
def einsum_of_heads(p: Any, x: Any) -> Any:
    heads = jnp.einsum("td,dhk->htk", x, p["value"])
    return total(jnp.einsum("htk,hkd->td", jnp.tanh(heads), p["out"]))


@program({"w": (4, 3, 2)}, (4, 3))
def einsum_with_a_batch_axis(p: Any, x: Any) -> Any:
    return total(jnp.einsum("td,tde->te", x, p["w"]))


@program({"down": (2, 4, 3), "up": (2, 3, 4)}, (2, 5, 3))
def einsum_of_experts(p: Any, x: Any) -> Any:
    hidden = jnp.einsum("ecd,edf->ecf", x, p["up"])
    return total(jnp.einsum("ecf,efd->ecd", jnp.tanh(hidden), p["down"]))


@program({"w": (4, 2)}, (3, 2))
def einsum_without_contraction(p: Any, x: Any) -> Any:
    return total(jnp.einsum("ab,cb->acb", p["w"], x))


@program({"w": (4,)}, (3,))
def outer_product(p: Any, x: Any) -> Any:
    return total(jnp.outer(p["w"], x))


@program({"w": (2, 3)}, (2, 3))
def full_contraction(p: Any, x: Any) -> Any:
    return jnp.sin(jnp.vdot(p["w"], x))


@program({"w": (4, 3)}, (4, 3))
def einsum_that_sums_an_axis_away(p: Any, x: Any) -> Any:
    return total(jnp.einsum("ab,cd->ad", p["w"], x))


@program({"w": (3, 3)}, (4, 3))
def diagonal_of_a_leaf(p: Any, x: Any) -> Any:
    return total(jnp.einsum("td,dd->td", x, p["w"]))


@program({"w": (3, 3)}, (4, 3))
def quadratic_form(p: Any, x: Any) -> Any:
    return total(jnp.einsum("td,de,te->t", x, p["w"], x))


@program({"w": (3, 3)}, (4, 3))
def same_weight_twice(p: Any, x: Any) -> Any:
    return total(jnp.tanh(x @ p["w"]) @ p["w"])


@program({"w": (3, 4)}, (4, 3))
def weight_and_its_transpose(p: Any, x: Any) -> Any:
    return total(jnp.tanh(x @ p["w"]) @ p["w"].T)


@program({"w": (3, 3)}, (4, 3))
def same_weight_in_parallel(p: Any, x: Any) -> Any:
    """Two uses on related activations, that share one cotangent."""
    return total(x @ p["w"] + jnp.cos(x) @ p["w"])


@program({"w": (3, 3)}, (4, 3))
def same_weight_over_time_and_for_a_vector(p: Any, x: Any) -> Any:
    return total(x @ p["w"]) + total(p["w"] @ jnp.mean(x, 0))


@program({"w": (3, 3)}, (4, 3))
def weight_as_matrix_and_as_scale(p: Any, x: Any) -> Any:
    return total(jnp.tanh(x @ p["w"]) * p["w"][:1])


# ---- elementwise --------------------------------------------------------------------------------


@program({"b": (3,)}, (4, 3))
def bias_alone(p: Any, x: Any) -> Any:
    return total(x + jnp.broadcast_to(p["b"], x.shape))


@program({"b": (4, 3)}, (4, 3))
def bias_of_full_shape(p: Any, x: Any) -> Any:
    return total(x + p["b"])


@program({"b": (4, 1)}, (4, 3))
def bias_along_the_first_axis(p: Any, x: Any) -> Any:
    return total(x + p["b"])


@program({"b": (3,)}, (4, 3))
def subtracted_both_ways(p: Any, x: Any) -> Any:
    return total(x - row(p["b"])) + total(row(p["b"]) - 2 * x)


@program({"s": (3,)}, (4, 3))
def scale(p: Any, x: Any) -> Any:
    return total(x * row(p["s"]))


@program({"s": ()}, (4, 3))
def scalar_scale(p: Any, x: Any) -> Any:
    return total(x * p["s"] - p["s"])


@program({"s": (3,)}, (4, 3))
def divided(p: Any, x: Any) -> Any:
    return total(x / (1 + row(p["s"]) ** 2)) + total(row(p["s"]) / (1 + x**2))


@program({"s": (3,)}, (4, 3))
def exponent(p: Any, x: Any) -> Any:
    return total((1 + x**2) ** row(p["s"]))


@program({"b": (3,), "c": (3,)}, (4, 3))
def maximum_and_minimum(p: Any, x: Any) -> Any:
    return total(jnp.minimum(jnp.maximum(x, row(p["b"])), row(p["c"]) + 0.5))


@program({"low": (), "up": ()}, (4, 3))
def clipped_between_parameters(p: Any, x: Any) -> Any:
    return total(jnp.clip(x, p["low"] - 1, p["up"] + 1) * x)


@program({"a": (3,)}, (4, 3))
def where_on_the_sample(p: Any, x: Any) -> Any:
    return total(jnp.where(x > 0, x, row(p["a"]) * x)) + total(jnp.where(x > 1, row(p["a"]), x))


# ---- convolutions -------------------------------------------------------------------------------


def convolve(x: jax.Array, kernel: jax.Array, padding: Any = "SAME", **options: Any) -> jax.Array:
    """One image `[*space, C]` with a kernel `[*space, C, D]`."""
    strides = options.pop("window_strides", (1,) * (x.ndim - 1))
    space = "HW"[: x.ndim - 1]
    numbers = ("N" + space + "C", space + "IO", "N" + space + "C")
    return lax.conv_general_dilated(
        x[None], kernel, strides, padding, dimension_numbers=numbers, **options
    )[0]


@program({"b": (2,), "k": (3, 3, 2)}, (6, 3))
def conv_1d(p: Any, x: Any) -> Any:
    return total(convolve(x, p["k"], "VALID") + row(p["b"]))


@program({"k": (3, 2, 2, 3)}, (5, 4, 2))
def conv_same_with_stride(p: Any, x: Any) -> Any:
    return total(convolve(x, p["k"], window_strides=(2, 3)))


@program({"k": (2, 2, 2, 3)}, (5, 4, 2))
def conv_valid_with_stride_that_leaves_a_rest(p: Any, x: Any) -> Any:
    return total(convolve(x, p["k"], "VALID", window_strides=(2, 2)))


@program({"k": (2, 3, 2, 2)}, (5, 6, 2))
def conv_dilated(p: Any, x: Any) -> Any:
    return total(convolve(x, p["k"], rhs_dilation=(2, 2)))


@program({"k": (2, 2, 2, 2)}, (3, 3, 2))
def conv_transposed(p: Any, x: Any) -> Any:
    return total(convolve(x, p["k"], ((1, 1), (0, 1)), lhs_dilation=(2, 3)))


@program({"k": (3, 3, 1, 2)}, (4, 4, 1))
def conv_padded_unevenly(p: Any, x: Any) -> Any:
    return total(convolve(x, p["k"], ((2, 0), (-1, 3))))


@program({"k": (2, 2, 2, 6)}, (4, 3, 4))
def conv_grouped(p: Any, x: Any) -> Any:
    return total(convolve(x, p["k"], feature_group_count=2))


@program({"k": (2, 2, 2, 6)}, (4, 3, 4))
def conv_grouped_with_a_derived_kernel(p: Any, x: Any) -> Any:
    return total(convolve(x, jnp.exp(p["k"]), feature_group_count=2))


@program({"k": (2, 2, 1, 6)}, (4, 3, 3))
def conv_depthwise(p: Any, x: Any) -> Any:
    return total(convolve(x, p["k"], feature_group_count=3))


@program({"k": (1, 1, 3, 2)}, (3, 4, 3))
def conv_pointwise(p: Any, x: Any) -> Any:
    return total(convolve(x, p["k"]))


@program({"k": (2, 3, 3, 2)}, (3, 4, 5))
def conv_channels_first(p: Any, x: Any) -> Any:
    return total(lax.conv(x[None], p["k"], (1, 2), "SAME"))


@program({"k": (2, 2, 3)}, (2, 4, 2))
def conv_over_an_inner_batch(p: Any, x: Any) -> Any:
    """Frames of one example: the convolution has a batch axis of its own."""
    numbers = ("NHC", "HIO", "NHC")
    return total(lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=numbers))


@program({"k": (3, 3, 2, 2)}, (4, 4, 2))
def conv_kernel_shared(p: Any, x: Any) -> Any:
    return total(convolve(jnp.tanh(convolve(x, p["k"])), p["k"]))


@program({"image": (4, 4, 2)}, (2, 2, 2, 3))
def conv_whose_image_is_the_parameter(p: Any, x: Any) -> Any:
    return total(convolve(p["image"], x))


@program({"k": (2, 2, 2, 2)}, (3, 4, 4, 2))
def conv_in_a_scan(p: Any, x: Any) -> Any:
    def cell(state: Any, frame: Any) -> Any:
        return jnp.tanh(convolve(state, p["k"]) + frame), None

    return total(lax.scan(cell, jnp.zeros_like(x[0]), x)[0])


@program({"k": (2, 2, 1, 2), "w": (8, 2)}, (4, 4, 1))
def conv_then_pooled(p: Any, x: Any) -> Any:
    hidden = jnp.tanh(convolve(x, p["k"]))
    window = ((2, 2, 1), (2, 2, 1), "VALID")
    largest = lax.reduce_window(hidden, -jnp.inf, lax.max, *window)
    mean = lax.reduce_window(hidden, 0.0, lax.add, *window) / 4
    return total((largest + mean).reshape(-1) @ p["w"])


# ---- lookups ------------------------------------------------------------------------------------


@program({"table": (4, 3), "w": (3, 2)}, Integers(4, (6,)))
def embedding(p: Any, ids: Any) -> Any:
    """Six words of four: some are repeated."""
    return total(jnp.tanh(p["table"][ids] @ p["w"]))


@program({"table": (9, 2)}, Integers(9, (2, 3)))
def embedding_of_a_matrix_of_ids(p: Any, ids: Any) -> Any:
    return total(jnp.take(p["table"], ids, axis=0, mode="clip"))


@program({"table": (4, 3)}, Integers(4))
def embedding_of_one_id(p: Any, index: Any) -> Any:
    return total(p["table"][index])


@program({"table": (4, 3)}, Integers(9, (5,)))
def embedding_of_ids_out_of_range(p: Any, ids: Any) -> Any:
    """Negative ids count from the end; what is beyond the table is filled, or clipped."""
    table = p["table"]
    filled = jnp.take(table, ids - 4, axis=0, mode="fill", fill_value=0.5)
    return total(filled) + total(2 * jnp.take(table, ids - 3, axis=0, mode="clip"))


@program({"table": (4, 3)}, Integers(4, (5,)))
def embedding_by_one_hot(p: Any, ids: Any) -> Any:
    table = p["table"]
    return total(jax.nn.one_hot(ids, 4, dtype=table.dtype) @ table)


@program({"table": (4, 3)}, Integers(4, (5,)))
def embedding_tied(p: Any, ids: Any) -> Any:
    hidden = jnp.tanh(p["table"][ids])
    logits = hidden @ p["table"].T
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], 1))


@program({"table": (4, 3)}, {"first": Integers(4, (3,)), "second": Integers(4, (2,))})
def embedding_of_two_inputs(p: Any, e: Any) -> Any:
    return total(jnp.mean(p["table"][e["first"]], 0) * jnp.sum(p["table"][e["second"]], 0))


@program({"w": (4, 3)}, {"i": Integers(4, (5,)), "j": Integers(3, (5,))})
def lookup_of_single_entries(p: Any, e: Any) -> Any:
    return total(p["w"][e["i"], e["j"]])


@program({"w": (3, 5)}, Integers(5, (4,)))
def lookup_of_columns(p: Any, ids: Any) -> Any:
    return total(p["w"][:, ids]) + total(p["w"][1, ids])


@program({"w": (4, 3)}, Integers(3, (4, 2)))
def lookup_along_an_axis(p: Any, ids: Any) -> Any:
    return total(jnp.take_along_axis(p["w"], ids, axis=1))


@program({"w": (6, 3)}, Integers(6))
def slice_at_a_place_of_the_sample(p: Any, start: Any) -> Any:
    return total(lax.dynamic_slice_in_dim(p["w"], start, 3))


@program({"w": (3, 2, 3)}, {"expert": Integers(3, (4,)), "x": (4, 2)})
def lookup_of_matrices(p: Any, e: Any) -> Any:
    return total(jnp.einsum("td,tde->te", e["x"], p["w"][e["expert"]]))


@program({"b": (3, 2), "w": (6, 2)}, {"ids": Integers(5, (3,)), "x": (6, 2)})
def scattered(p: Any, e: Any) -> Any:
    """A parameter as what is written, and as what is written into."""
    written = e["x"].at[e["ids"]].add(p["b"])
    return total(written) + total(p["w"].at[e["ids"]].set(e["x"][:3]) * e["x"])


@program({"position": (7, 3), "table": (4, 3)}, Integers(4, (5,)))
def positions(p: Any, ids: Any) -> Any:
    return total(jnp.tanh(p["table"][ids] + p["position"][:5]))


# ---- views of a leaf ----------------------------------------------------------------------------


@program({"w": (3, 9)}, (4, 3))
def slices_apart(p: Any, x: Any) -> Any:
    query, key, value = jnp.split(p["w"], 3, axis=1)
    return total(jnp.tanh(x @ query) * (x @ key)) + total(x @ value)


@program({"w": (3, 5)}, (4, 3))
def slices_that_overlap(p: Any, x: Any) -> Any:
    return total(jnp.tanh(x @ p["w"][:, :3]) @ p["w"][:, 2:])


@program({"w": (6, 3)}, (4, 3))
def slices_with_stride(p: Any, x: Any) -> Any:
    return total(x @ p["w"][::2]) + total(x * p["w"][-1:])


@program({"b": (3,), "u": (2, 3), "w": (4, 3)}, (6,))
def leaves_joined(p: Any, x: Any) -> Any:
    joined = jnp.concatenate([p["w"], p["u"]])
    return total(x @ joined + jnp.concatenate([p["b"][1:], p["b"][:1]]))


@program({"u": (3, 2), "w": (3, 2)}, (2, 3))
def leaves_stacked(p: Any, x: Any) -> Any:
    return total(jnp.einsum("nd,nde->ne", x, jnp.stack([p["w"], p["u"]])))


@program((14,), (4, 3))
def one_flat_leaf(p: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ p[:6].reshape(3, 2) + row(p[6:8]))
    return total(hidden @ p[8:].reshape(3, 2).T)


@program({"w": (1, 3, 1, 2)}, (4, 3))
def squeezed_and_expanded(p: Any, x: Any) -> Any:
    return total(jnp.tanh(x @ p["w"].squeeze()) @ p["w"][0, :, 0].T[..., None][:, :, 0])


@program({"column": (3, 1), "row": (2,)}, (4, 3))
def broadcast_to_a_matrix(p: Any, x: Any) -> Any:
    hidden = x @ jnp.broadcast_to(p["column"], (3, 4))
    return total(hidden) + total(x @ jnp.broadcast_to(p["row"], (3, 2)))


@program({"w": (3, 4)}, (4, 3))
def reversed_rolled_and_padded(p: Any, x: Any) -> Any:
    padded = jnp.pad(p["w"], ((0, 0), (1, 0)))
    return total(x @ p["w"][::-1]) + total(x @ jnp.roll(p["w"], 1, 1)) + total(x @ padded)


@program({"w": (4, 4)}, (3, 4))
def masked_and_scaled_by_constants(p: Any, x: Any) -> Any:
    return total(x @ jnp.tril(p["w"])) + total(x @ (p["w"] * 0.3)) + total(x @ -p["w"])


@program({"u": (3, 2), "w": (3, 2)}, (4, 3))
def sum_of_leaves(p: Any, x: Any) -> Any:
    return total(x @ (p["w"] + p["u"])) + total(x @ (p["w"] - 2 * p["u"]))


@program({"w": (3, 3)}, (4, 3))
def symmetrised(p: Any, x: Any) -> Any:
    return total(x @ (p["w"] + p["w"].T))


@program({"d": (3,)}, (4, 3))
def diagonal_matrix(p: Any, x: Any) -> Any:
    return total(x @ jnp.diag(p["d"]))


# ---- weights derived from leaves ----------------------------------------------------------------


@program({"g": (2,), "w": (3, 2)}, (4, 3))
def weight_normalised(p: Any, x: Any) -> Any:
    size = jnp.sqrt(jnp.sum(p["w"] ** 2, 0) + 0.1)
    return total(x @ (p["w"] * row(p["g"] / size)))


@program({"a": (3, 1), "b": (1, 4), "w": (3, 4)}, (5, 3))
def low_rank_added(p: Any, x: Any) -> Any:
    return total(x @ (p["w"] + 0.5 * p["a"] @ p["b"]))


@program({"s": (2,), "w": (3, 2)}, (4, 3))
def columns_scaled(p: Any, x: Any) -> Any:
    return total(x @ (p["w"] * row(p["s"])))


@program({"w": (3, 2)}, (4, 3))
def exponential_weight_beside_the_plain_one(p: Any, x: Any) -> Any:
    return total(x @ jnp.exp(p["w"])) + total(x @ p["w"])


@program({"mix": (3,), "order": (4,)}, (3, 4))
def softmax_sort_and_cumulated_parameters(p: Any, x: Any) -> Any:
    levels = jnp.cumsum(jax.nn.softplus(p["order"]))
    return total(jax.nn.softmax(p["mix"]) @ x - levels) + total(x * row(jnp.sort(p["order"])))


@program({"w": (3, 2, 4)}, {"x": (4,), "z": (3,)})
def weight_mixed_by_the_sample(p: Any, e: Any) -> Any:
    return total(jnp.einsum("k,kde->de", e["z"], p["w"]) @ e["x"])


@program({"w": (3, 3)}, (3,))
def linear_system(p: Any, x: Any) -> Any:
    return total(jnp.linalg.solve(jnp.eye(3, dtype=x.dtype) + 0.3 * p["w"] @ p["w"].T, x))


@program({"k": (6,)}, (6,))
def product_in_the_frequency_domain(p: Any, x: Any) -> Any:
    return total(jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(p["k"]), 6))


@program({"k": (6,)}, (6,))
def factor_that_is_complex(p: Any, x: Any) -> Any:
    return total(jnp.real(jnp.fft.fft(p["k"] * x) * (0.3 + 1j)))


# ---- loops --------------------------------------------------------------------------------------


def cell(p: Any, state: Any, x: Any) -> Any:
    return jnp.tanh(state @ p["u"] + x @ p["w"] + p["b"])


CELL = {"b": (3,), "u": (3, 3), "w": (2, 3)}


@program(CELL, (5, 2))
def scan_of_a_cell(p: Any, x: Any) -> Any:
    state, states = lax.scan(lambda h, t: 2 * (cell(p, h, t),), jnp.zeros_like(p["b"]), x)
    return total(state) + total(states * jnp.cos(states))


@program(CELL, (5, 2))
def scan_in_reverse_and_unrolled_by_two(p: Any, x: Any) -> Any:
    return total(
        lax.scan(
            lambda h, t: 2 * (cell(p, h, t),), jnp.zeros_like(p["b"]), x, reverse=True, unroll=2
        )[1]
    )


@program(CELL, (4, 2))
def cell_unrolled_by_hand(p: Any, x: Any) -> Any:
    state = jnp.zeros_like(p["b"])
    for t in range(4):
        state = cell(p, state, x[t])
    return total(state)


@program(CELL | {"start": (3,)}, (4, 2))
def scan_from_a_state_that_is_learned(p: Any, x: Any) -> Any:
    return total(lax.scan(lambda h, t: (cell(p, h, t), None), p["start"], x)[0])


@program(CELL, (4, 2))
def scan_within_which_and_after_which_a_weight_is_used(p: Any, x: Any) -> Any:
    state = lax.scan(lambda h, t: (cell(p, h, t), None), jnp.zeros_like(p["b"]), x)[0]
    return total(state @ p["u"])


@program({"b": (3, 4), "w": (3, 4, 4)}, (2, 4))
def scan_over_stacked_layers(p: Any, x: Any) -> Any:
    def layer(x: Any, own: Any) -> Any:
        return x + jnp.tanh(x @ own["w"] + row(own["b"])), None

    return total(lax.scan(layer, x, p)[0])


@program({"out": (3, 4, 2), "shared": (4, 4), "w": (3, 4, 4)}, (4,))
def scan_over_layers_with_shared_and_own_weights(p: Any, x: Any) -> Any:
    def layer(x: Any, own: Any) -> Any:
        x = jnp.tanh(x @ own[0] + x @ p["shared"])
        return x, x @ own[1]

    return total(lax.scan(layer, x, (p["w"], p["out"]), reverse=True)[1])


@program({"u": (2, 3, 3), "w": (2, 3, 3)}, (4, 3))
def scan_over_time_in_a_scan_over_layers(p: Any, x: Any) -> Any:
    def layer(x: Any, own: Any) -> Any:
        def step(h: Any, t: Any) -> Any:
            return 2 * (jnp.tanh(h @ own["u"] + t @ own["w"]),)

        return lax.scan(step, jnp.zeros_like(x[0]), x)[1], None

    return total(lax.scan(layer, x, p)[0])


@program({"u": (2, 3, 3), "w": (3, 3)}, (4, 3))
def scan_over_layers_in_a_scan_over_time(p: Any, x: Any) -> Any:
    def step(h: Any, t: Any) -> Any:
        def layer(h: Any, u: Any) -> Any:
            return jnp.tanh(h @ u + t @ p["w"]), None

        return lax.scan(layer, h, p["u"])[0], None

    return total(lax.scan(step, jnp.zeros_like(x[0]), x)[0])


@program({"w": (3, 3)}, (4, 3))
def weight_carried_unchanged(p: Any, x: Any) -> Any:
    def step(carry: Any, t: Any) -> Any:
        h, w = carry
        return (jnp.tanh(h @ w + t), w), None

    h, w = lax.scan(step, (jnp.zeros_like(x[0]), p["w"]), x)[0]
    return total(h @ w)


@program({"w": (3, 3)}, (4, 3))
def weight_carried_and_changed(p: Any, x: Any) -> Any:
    def step(carry: Any, t: Any) -> Any:
        h, w = carry
        return (jnp.tanh(h @ w + t), 0.9 * w), None

    return total(lax.scan(step, (jnp.zeros_like(x[0]), p["w"]), x)[0][0])


@program({"w": (3, 3)}, (4, 3))
def weight_updated_by_the_sample(p: Any, x: Any) -> Any:
    """Fast weights: what is carried begins as a leaf, and each sample makes its own."""

    def step(w: Any, t: Any) -> Any:
        return w + 0.3 * jnp.outer(jnp.tanh(t @ w), t), t @ w

    return total(lax.scan(step, p["w"], x)[1])


@program({"b": (3,), "bias": (4, 3)}, (4, 3))
def scan_over_rows_of_data_and_of_a_leaf(p: Any, x: Any) -> Any:
    def step(h: Any, at: Any) -> Any:
        t, bias = at
        return jnp.tanh(h * t + bias + p["b"]), None

    return total(lax.scan(step, jnp.ones(3, x.dtype), (x, p["bias"]))[0])


@program({"table": (4, 3), "u": (3, 3)}, Integers(4, (5,)))
def scan_with_a_lookup(p: Any, ids: Any) -> Any:
    def step(h: Any, index: Any) -> Any:
        return jnp.tanh(h @ p["u"] + p["table"][index]), None

    return total(lax.scan(step, jnp.zeros_like(p["u"][0]), ids)[0])


@program({"u": (3, 3), "w": (2, 3)}, (2,))
def scan_of_no_step_and_of_one(p: Any, x: Any) -> Any:
    def step(h: Any, t: Any) -> Any:
        return jnp.tanh(h @ p["u"] + t @ p["w"]), None

    h = x @ p["w"]
    for steps in (0, 1):
        h = lax.scan(step, h, jnp.zeros((steps, 2), x.dtype) + x[None])[0]
    return total(h)


@program({"w": (3, 3)}, (3,))
def loop_with_a_fixed_count(p: Any, x: Any) -> Any:
    return total(lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ p["w"] + x), x))


@program({"w": (4, 3, 3)}, (3,))
def loop_that_picks_its_layer(p: Any, x: Any) -> Any:
    return total(lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i] + x), x))


@program({"w": (3, 3)}, (3,))
def loop_that_carries_a_weight(p: Any, x: Any) -> Any:
    def step(i: Any, carry: Any) -> Any:
        h, w = carry
        return jnp.tanh(h @ w), w

    return total(lax.fori_loop(0, 3, step, (x, p["w"]))[0])


@program({"w": (3, 2)}, (3,))
def loop_without_gradient(p: Any, x: Any) -> Any:
    """A while loop has no reverse mode, and needs none behind stop_gradient."""
    w = lax.stop_gradient(p["w"])
    h = lax.while_loop(
        lambda at: at[0] < 3, lambda at: (at[0] + 1, at[1] + jnp.sum(x @ w)), (0, x[0])
    )[1]
    return total(jnp.tanh(h) * (x @ p["w"]))


@program({"a": (3,), "w": (3, 3)}, (4, 3))
def associative_scan_and_map(p: Any, x: Any) -> Any:
    decay = jax.nn.sigmoid(row(p["a"]) * x)

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    states = lax.associative_scan(combine, (decay, x))[1]
    return total(lax.map(lambda h: h @ p["w"], states))


@program({"heads": (2, 3, 3), "w": (3, 3)}, (4, 3))
def vmap_inside(p: Any, x: Any) -> Any:
    hidden = jax.vmap(lambda t: jnp.tanh(t @ p["w"]))(x)
    return total(jax.vmap(lambda w: hidden @ w)(p["heads"]))


# ---- calls and branches -------------------------------------------------------------------------


def block(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w)


@program({"u": (3, 3), "w": (3, 3)}, (4, 3))
def checkpoint_of_a_block(p: Any, x: Any) -> Any:
    return total(jax.checkpoint(block)(p["u"], jax.checkpoint(block)(p["w"], x)))


@program({"w": (3, 3)}, (4, 3))
def checkpoint_of_everything(p: Any, x: Any) -> Any:
    policy = jax.checkpoint_policies.dots_saveable
    once = jax.checkpoint(lambda p, x: total(block(p["w"], block(p["w"], x))), policy=policy)
    return once(p, x)


@program({"shared": (3, 3), "w": (2, 3, 3)}, (4, 3))
def checkpoint_in_a_scan(p: Any, x: Any) -> Any:
    @jax.checkpoint
    def layer(x: Any, own: Any) -> Any:
        return x + block(own, x) @ p["shared"], None

    return total(lax.scan(layer, x, p["w"])[0])


@program(CELL, (4, 2))
def checkpoint_of_a_scan(p: Any, x: Any) -> Any:
    run = jax.checkpoint(
        lambda p, x: lax.scan(lambda h, t: (cell(p, h, t), None), jnp.zeros_like(p["b"]), x)[0]
    )
    return total(run(p, x))


@program({"u": (3, 3), "w": (3, 3)}, (4, 3))
def jit_called_with_two_weights_and_twice_with_one(p: Any, x: Any) -> Any:
    call = jax.jit(block)
    return total(call(p["w"], call(p["u"], call(p["w"], x))))


@program({"u": (3, 3), "w": (3, 3)}, (4, 3))
def jit_in_jit_that_returns_a_weight(p: Any, x: Any) -> Any:
    @jax.jit
    def views(p: Any) -> Any:
        return jax.jit(jnp.transpose)(p["w"]), p["u"] * 2

    w, u = views(p)
    return total(block(w, x) @ u)


@program({"u": (3, 3), "w": (3, 3)}, {"flag": Integers(2), "x": (4, 3)})
def cond_on_the_sample(p: Any, e: Any) -> Any:
    """Both branches use w, one uses u."""
    return total(
        lax.cond(
            e["flag"] == 1,
            lambda x: block(p["w"], x) @ p["u"],
            lambda x: x @ p["w"],
            e["x"],
        )
    )


@program({"u": (3, 3), "w": (3, 3)}, (4, 3))
def cond_on_a_constant_and_on_a_parameter(p: Any, x: Any) -> Any:
    x = lax.cond(jnp.array(True), lambda x: block(p["w"], x), lambda x: x, x)
    return total(lax.cond(p["u"][0, 0] > -9, lambda x: x @ p["u"], lambda x: x @ p["w"], x))


@program({"u": (3,), "w": (3,)}, {"flag": Integers(2), "x": (3,)})
def cond_that_chooses_a_weight(p: Any, e: Any) -> Any:
    chosen = lax.cond(e["flag"] == 1, lambda: p["w"], lambda: p["u"])
    return total(chosen * e["x"])


@program({"u": (3, 3), "w": (3, 3)}, {"flags": Integers(2, (4,)), "x": (4, 3)})
def cond_in_a_scan(p: Any, e: Any) -> Any:
    def step(h: Any, at: Any) -> Any:
        x, flag = at
        mixed = lax.cond(flag == 1, lambda h: h @ p["u"], lambda h: h, h)
        return jnp.tanh(mixed + x @ p["w"]), None

    x = e["x"]
    return total(lax.scan(step, jnp.zeros_like(x[0]), (x, e["flags"]))[0])


@program({"w": (3, 3, 3)}, {"branch": Integers(3), "x": (3,)})
def switch_on_the_sample(p: Any, e: Any) -> Any:
    branches = [functools.partial(lambda k, x: block(p["w"][k], x), k) for k in range(3)]
    return total(lax.switch(e["branch"], branches, e["x"]))


# ---- derivatives of one's own -------------------------------------------------------------------


@jax.custom_jvp
def ramp(x: Any) -> Any:
    return jnp.where(x > 0, x, 0.1 * x)


ramp.defjvp(lambda at, tangent: (ramp(at[0]), jnp.where(at[0] > 0, 1.0, 0.3) * tangent[0]))


@jax.custom_vjp
def clipped_backward(x: Any) -> Any:
    return jnp.sin(x)


clipped_backward.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.clip(x, -0.5, 0.5),))


@jax.custom_vjp
def straight_through(w: Any, x: Any) -> Any:
    return x @ jnp.round(w * 4) / 4


def _straight_through_backward(saved: Any, g: Any) -> Any:
    w, x = saved
    return 0.5 * jnp.einsum("td,te->de", x, g), g @ w.T


straight_through.defvjp(lambda w, x: (straight_through(w, x), (w, x)), _straight_through_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def repeated(count: int, w: Any, x: Any) -> Any:
    return count * (x * w)


repeated.defvjp(
    lambda count, w, x: (repeated(count, w, x), (w, x)),
    lambda count, saved, g: (count * g * saved[1], 2 * count * g * saved[0]),
)


@jax.custom_jvp
def scaled_by(w: Any, x: Any) -> Any:
    return w * x


scaled_by.defjvp(lambda at, d: (scaled_by(*at), 2 * d[0] * at[1] + at[0] * d[1]))


@program({"b": (3,), "w": (3, 3)}, (4, 3))
def custom_derivatives_of_activations(p: Any, x: Any) -> Any:
    return total(clipped_backward(ramp(x @ p["w"] + row(p["b"])) @ p["w"]))


@program({"w": (3, 2)}, (4, 3))
def custom_vjp_with_a_weight(p: Any, x: Any) -> Any:
    return total(straight_through(p["w"], jnp.tanh(x)))


@program({"w": (3, 3)}, (4, 3))
def custom_vjp_with_a_weight_that_is_also_used_plainly(p: Any, x: Any) -> Any:
    return total(straight_through(p["w"], jnp.tanh(x @ p["w"])))


@program({"s": (4, 3), "w": (3, 3)}, (4, 3))
def custom_vjp_with_a_static_argument_and_custom_jvp_with_a_scale(p: Any, x: Any) -> Any:
    return total(scaled_by(p["s"], repeated(2, p["s"], x @ p["w"])))


@program({"frozen": (3, 3), "w": (3, 3)}, (4, 3))
def stopped_gradients(p: Any, x: Any) -> Any:
    hidden = x @ p["w"]
    hidden = hidden + lax.stop_gradient(jnp.cos(hidden)) + x @ lax.stop_gradient(p["frozen"])
    return total(hidden @ lax.stop_gradient(p["w"]))


@program({"w": (3, 4), "v": (4,)}, (3,))
def gradient_penalty(p: Any, x: Any) -> Any:
    """Differentiated twice: once by the sample, once by the parameters."""

    def energy(x: Any) -> Any:
        return jnp.vdot(p["v"], jnp.tanh(x @ p["w"]))

    return jnp.sin(energy(x)) + jnp.sum(jax.grad(energy)(x) ** 2)


@program({"w": (3, 4)}, (3,))
def forward_mode_inside(p: Any, x: Any) -> Any:
    value, slope = jax.jvp(lambda x: jnp.tanh(x @ p["w"]), (x,), (jnp.cos(x),))
    return total(value) + total(slope)


# ---- layers and networks ------------------------------------------------------------------------


def normalised(x: Any) -> Any:
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 0.1)


@program({"bias": (3,), "scale": (3,), "w": (3, 3)}, (4, 3))
def layer_norm(p: Any, x: Any) -> Any:
    return total(normalised(x @ p["w"]) * row(p["scale"]) + row(p["bias"]))


@program({"scale": (3,), "w": (3, 3)}, (4, 3))
def root_mean_square_norm(p: Any, x: Any) -> Any:
    x = x @ p["w"]
    return total(x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1) * row(1 + p["scale"]))


@program({"out": (4, 3), "qkv": (3, 12)}, (5, 3))
def attention(p: Any, x: Any) -> Any:
    """Causal, two heads, one fused projection."""
    query, key, value = jnp.moveaxis((x @ p["qkv"]).reshape(5, 3, 2, 2), 1, 0)
    scores = jnp.einsum("qhd,khd->hqk", query, key)
    scores = jnp.where(jnp.tril(jnp.ones((5, 5), bool))[None], scores, -1e9)
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), value)
    return total(x + mixed.reshape(5, 4) @ p["out"])


@program({"b": (3,), "w": (3, 3)}, (4, 3))
def attention_with_a_key_bias(p: Any, x: Any) -> Any:
    """Softmax does not see the bias: its gradient is zero, out of terms that are not."""
    keys = x @ p["w"] + row(p["b"])
    return total(jax.nn.softmax(x @ keys.T) @ x)


@program({"gate": (3, 4), "down": (4, 3), "up": (3, 4)}, (4, 3))
def gated_residual(p: Any, x: Any) -> Any:
    return total(x + (jax.nn.sigmoid(x @ p["gate"]) * (x @ p["up"])) @ p["down"])


@program({"b": (8,), "u": (2, 8), "w": (3, 8)}, (4, 3))
def long_short_term_memory(p: Any, x: Any) -> Any:
    """Input and state joined to one vector, the weights to one matrix, split in four gates."""
    joined = jnp.concatenate([p["w"], p["u"]])

    def step(carry: Any, t: Any) -> Any:
        h, c = carry
        i, f, g, o = jnp.split(jnp.concatenate([t, h]) @ joined + p["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    zero = jnp.zeros_like(p["u"][:, 0])
    return total(lax.scan(step, (zero, zero), x)[0][0])


@program({"experts": (3, 2, 4), "gate": (2, 3)}, (5, 2))
def mixture_of_experts(p: Any, x: Any) -> Any:
    gates = jax.nn.softmax(x @ p["gate"])
    return total(jnp.einsum("te,tef->tf", gates, jnp.einsum("td,edf->tef", x, p["experts"])))


@program({"experts": (3, 2, 4), "gate": (2, 3)}, (5, 2))
def mixture_of_the_best_experts(p: Any, x: Any) -> Any:
    weight, chosen = lax.top_k(jax.nn.softmax(x @ p["gate"]), 2)
    hidden = jnp.einsum("td,tkdf->tkf", x, p["experts"][chosen])
    return total(jnp.einsum("tk,tkf->tf", weight, hidden))


@program({"w": (3, 4)}, (5, 3))
def sorted_and_cumulated_activations(p: Any, x: Any) -> Any:
    hidden = jnp.sort(x @ p["w"], axis=0)
    return total(0.3 * jnp.cumsum(hidden, axis=0)) + jnp.sin(jnp.max(hidden))


@program({"w": (4, 4)}, {"key": Integers(1000), "x": (4,)})
def dropout(p: Any, e: Any) -> Any:
    # float32 by name: the reference would draw other numbers in double precision.
    kept = jax.random.uniform(jax.random.key(e["key"]), (4,), jnp.float32) < 0.5
    return total(jnp.where(kept, e["x"] @ p["w"], 0.0) @ p["w"])


# ---- what a loss may do besides -----------------------------------------------------------------


@program({"b": (2,), "w": (3, 2)}, (4, 3))
def weight_decay(p: Any, x: Any) -> Any:
    return total(x @ p["w"] + row(p["b"])) + 0.3 * sum(jnp.sum(leaf**2) for leaf in p.values())


@program({"alone": (3,), "w": (3, 2)}, (3,))
def term_of_a_parameter_alone(p: Any, x: Any) -> Any:
    return total(x @ p["w"]) + total(p["alone"])


@program({"w": (3, 2)}, (3,))
def loss_of_parameters_alone(p: Any, x: Any) -> Any:
    return total(p["w"])


@program({"empty": (0, 3), "unused": (2, 2), "w": (3, 2)}, (3,))
def unused_and_empty_leaves(p: Any, x: Any) -> Any:
    return total(x @ p["w"])


@program(
    {"table": (4, 2), "w": (3, 2)},
    (3,),
    fixed={"count": np.int32(3), "ids": np.array([1, 0, 1, 3], np.int32)},
)
def integer_leaves(p: Any, x: Any) -> Any:
    return total(x @ p["w"] * p["count"].astype(x.dtype)) + total(p["table"][p["ids"]] * x[0])


@program(
    {"base": (3, 3), "head": {"b": (2,), "w": (3, 2)}},
    (4, 3),
    trainable={"base": False, "head": True},
)
def frozen_leaf(p: Any, x: Any) -> Any:
    return total(jnp.tanh(x @ p["base"]) @ p["head"]["w"] + row(p["head"]["b"]))


@program(
    {"a": (3, 1), "b": (1, 4), "w": (3, 4)}, (2, 3), trainable={"a": True, "b": True, "w": False}
)
def low_rank_adapter(p: Any, x: Any) -> Any:
    return total(x @ p["w"] + x @ p["a"] @ p["b"])


@program({"w": (3, 2)}, (3,), has_aux=True)
def parameters_and_activations_in_aux(p: Any, x: Any) -> Any:
    hidden = x @ p["w"]
    return total(hidden), {"hidden": hidden, "w": p["w"], "right": hidden > 0, "step": 3}


@program([((3, 2), (2,)), [()]], (3,))
def leaves_in_lists_and_tuples(p: Any, x: Any) -> Any:
    (w, b), [s] = p
    return total(s * (x @ w + b))


@program((), ())
def scalar_parameter(p: Any, x: Any) -> Any:
    return jnp.sin(p * x)


# ---- narrow types -------------------------------------------------------------------------------


def _narrow(dtype: Any, p: Any, x: Any) -> Any:
    hidden = jnp.tanh(x.astype(dtype) @ p["w"].astype(dtype) + row(p["b"].astype(dtype)))
    return total(hidden.astype(p["w"].dtype) @ p["w"])


@program({"b": (3,), "w": (3, 3)}, (4, 3), tolerance=2e-2, double=False)
def bfloat16_in_the_middle(p: Any, x: Any) -> Any:
    return _narrow(jnp.bfloat16, p, x)


@program({"b": (3,), "w": (3, 3)}, (4, 3), tolerance=3e-3, double=False)
def float16_in_the_middle(p: Any, x: Any) -> Any:
    return _narrow(jnp.float16, p, x)


@program(
    {"w": (3, 4)},
    (4, 3),
    tolerance=2e-2,
    double=False,
    fixed={"b": np.array([0.5, -0.25, 1, 0.125], jnp.bfloat16)},
)
def bfloat16_leaf_beside_a_float32_one(p: Any, x: Any) -> Any:
    return total(x @ p["w"] + row(p["b"].astype(x.dtype)))


# ---- what only some methods had wrong -----------------------------------------------------------


@program({"w": (2, 3, 3, 3)}, (4, 3))
def scan_over_layers_in_a_scan_over_groups_of_layers(p: Any, x: Any) -> Any:
    """Two loops walk through one leaf."""

    def group(hidden: Any, layers: Any) -> Any:
        return lax.scan(lambda hidden, w: (jnp.tanh(hidden @ w), None), hidden, layers)

    return total(lax.scan(group, x, p["w"])[0])


@program({"w": (3, 2)}, (4, 3))
def scan_that_passes_on_the_step_before(p: Any, x: Any) -> Any:
    """The carry is a constant at first, and an output one step later."""
    _, before = lax.scan(lambda last, row: (row, last), jnp.zeros(3, x.dtype), x)
    return total(before @ p["w"])


@program({"a": (3, 3), "b": (3, 3)}, (3,))
def constant_out_of_a_scan_scales_a_weight(p: Any, x: Any) -> Any:
    def step(carry: Any, _: None) -> Any:
        return (jnp.tanh(carry[0] @ p["a"]), carry[1] + 1), None

    (hidden, steps), _ = lax.scan(step, (x, jnp.zeros((), x.dtype)), None, length=3)
    return total((p["b"] * steps) @ hidden)


@program({"w": (3, 3)}, (3, 3))
def scale_and_its_transpose(p: Any, x: Any) -> Any:
    """Two materialised gradients of one leaf whose axes are not in the same order."""
    return total(x * p["w"]) + total(x * jnp.sin(x) * p["w"].T)


@program({"k": (6, 1, 2), "w": (5, 2)}, (1, 5, 1))
def conv_without_output(p: Any, x: Any) -> Any:
    numbers = ("NWC", "WIO", "NWC")
    out = lax.conv_general_dilated(x, p["k"], (1,), "VALID", dimension_numbers=numbers)
    return total(out) + total(x[0, :, 0] @ p["w"])


@program({"table": (4, 2), "w": (2, 2)}, (2,))
def look_ups_in_a_scan_of_no_steps(p: Any, x: Any) -> Any:
    def step(hidden: Any, index: Any) -> Any:
        return hidden + p["table"][index + (hidden[0] > 0).astype(jnp.int32)], None

    return total(lax.scan(step, x, jnp.zeros(0, jnp.int32))[0] @ p["w"])


@program({"table": (5, 2)}, Integers(3, (5,)))
def product_with_integers(p: Any, counts: Any) -> Any:
    numbers = (((0,), (0,)), ((), ()))
    wide = p["table"].dtype
    return total(lax.dot_general(counts, p["table"], numbers, preferred_element_type=wide))


@program({"empty": (0, 3), "w": (3, 2)}, (4, 3), microbatch_size=2)
def leaf_without_entries_in_microbatches(p: Any, x: Any) -> Any:
    return total(x @ p["w"]) + jnp.sum(p["empty"]) + total(jnp.broadcast_to(p["w"][0], (0, 2)))


@jax.custom_vjp
def _clip_cotangent(x: jax.Array) -> jax.Array:
    return x


_clip_cotangent.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),))


@program({"w": (3, 2)}, (4, 3))
def cotangent_clipped_after_a_product(p: Any, x: Any) -> Any:
    """A backward pass that is not linear."""
    return 3 * total(_clip_cotangent(x @ p["w"]))


# ---- what real losses contain -------------------------------------------------------------------


def squares(params: Any) -> jax.Array:
    return sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)), jnp.zeros(()))


@program({"b": (2,), "k": (3, 3, 4), "t": (5, 3), "v": (4, 2), "w": (3, 3)}, Integers(5, (6,)))
def penalty_on_every_kind_of_site(p: Any, ids: Any) -> Any:
    x = jnp.tanh(p["t"][ids] @ p["w"])
    numbers = ("NWC", "WIO", "NWC")
    x = lax.conv_general_dilated(x[None], p["k"], (1,), "SAME", dimension_numbers=numbers)[0]
    return total(x @ p["v"] + row(p["b"])) + 0.7 * squares(p) / 2


@program({"t": (7, 4)}, Integers(7, (3,)))
def penalty_on_a_tied_table(p: Any, ids: Any) -> Any:
    return total(jnp.tanh(p["t"][ids]) @ p["t"].T) - 0.4 * squares(p)


@program({"u": (3, 3), "w": (2, 3, 3)}, (4, 3))
def penalties_added_one_by_one(p: Any, x: Any) -> Any:
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])
    loss = jnp.mean(jnp.sin(x @ p["u"]))
    for leaf in p.values():
        loss = loss + 0.3 * jnp.sum(jnp.abs(leaf))
    return loss * 2


@program({"u": (3, 3), "w": (3, 3)}, (4, 3))
def penalty_that_the_sample_weighs(p: Any, x: Any) -> Any:
    """Not the same for all samples."""
    return total(x @ p["w"]) + jnp.sum(x) * squares(p)


@program({"w": (3, 3)}, (4, 3))
def penalty_within_a_jitted_loss(p: Any, x: Any) -> Any:
    return jax.jit(lambda w: total(x @ w) + 0.5 * squares(w))(p["w"])


@program({"unused": (2, 2), "w": (3, 3)}, (4, 3))
def penalty_on_what_is_used_nowhere_else(p: Any, x: Any) -> Any:
    return total(x @ p["w"]) + squares(p)


@program({"u": (3, 3), "v": (3, 2), "w": (2, 3, 3)}, (4, 3))
def weights_that_are_scaled_and_named(p: Any, x: Any) -> Any:
    def layer(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ (checkpoint_name(w, "w") / 3.0)), None

    x, _ = lax.scan(layer, jnp.tanh(x @ (0.25 * p["u"])), p["w"])
    return total(x @ -(p["v"] * 2.0).T.T)


@program({"u": (3, 2), "w": (4, 2)}, (7,))
def scaled_leaves_joined(p: Any, x: Any) -> Any:
    return total(x @ jnp.concatenate([p["u"] * 3.0, -p["w"]]))


@program({"w": (3, 3)}, (4, 3), double=False, tolerance=2e-3)
def weight_of_fewer_bits(p: Any, x: Any) -> Any:
    return total(x @ lax.reduce_precision(p["w"], 8, 10))


# ---- wide and short -----------------------------------------------------------------------------

# Above, most sums over positions are cheaper as matrices. Here products have few positions between
# wide vectors, so that norms come cheaper from their Gram matrices.
WIDE: list[tuple[Callable[..., Any], Any, Any]] = [
    (same_weight_twice, {"w": (11, 11)}, (2, 11)),
    (weight_and_its_transpose, {"w": (11, 12)}, (2, 11)),
    (same_weight_in_parallel, {"w": (11, 12)}, (2, 11)),
    (einsum_with_a_batch_axis, {"w": (2, 9, 8)}, (2, 9)),
    (einsum_of_experts, {"down": (2, 8, 9), "up": (2, 9, 8)}, (2, 3, 9)),
    (embedding_tied, {"table": (9, 16)}, Integers(9, (3,))),
    (penalty_on_a_tied_table, {"t": (9, 16)}, Integers(9, (3,))),
    (
        penalty_on_every_kind_of_site,
        {"b": (9,), "k": (3, 12, 12), "t": (5, 12), "v": (12, 9), "w": (12, 12)},
        Integers(5, (2,)),
    ),
    (weights_that_are_scaled_and_named, {"u": (9, 9), "v": (9, 8), "w": (2, 9, 9)}, (2, 9)),
    (slices_apart, {"w": (9, 24)}, (2, 9)),
    (leaves_joined, {"b": (9,), "u": (4, 9), "w": (7, 9)}, (11,)),
    (leaves_stacked, {"u": (9, 8), "w": (9, 8)}, (2, 9)),
    (sum_of_leaves, {"u": (9, 9), "w": (9, 9)}, (2, 9)),
    (symmetrised, {"w": (9, 9)}, (2, 9)),
    (conv_1d, {"b": (8,), "k": (3, 4, 8)}, (5, 4)),
    (conv_kernel_shared, {"k": (3, 3, 4, 4)}, (2, 2, 4)),
    (conv_in_a_scan, {"k": (2, 2, 4, 4)}, (2, 1, 2, 4)),
    (scan_of_a_cell, {"b": (9,), "u": (9, 9), "w": (8, 9)}, (3, 8)),
    (cell_unrolled_by_hand, {"b": (12,), "u": (12, 12), "w": (8, 12)}, (4, 8)),
    (
        scan_within_which_and_after_which_a_weight_is_used,
        {"b": (12,), "u": (12, 12), "w": (8, 12)},
        (3, 8),
    ),
    (scan_over_time_in_a_scan_over_layers, {"u": (2, 9, 9), "w": (2, 9, 9)}, (3, 9)),
    (scan_over_layers_in_a_scan_over_time, {"u": (2, 12, 12), "w": (12, 12)}, (2, 12)),
    (weight_carried_unchanged, {"w": (12, 12)}, (3, 12)),
    (checkpoint_in_a_scan, {"shared": (12, 12), "w": (2, 12, 12)}, (2, 12)),
    (jit_called_with_two_weights_and_twice_with_one, {"u": (12, 12), "w": (12, 12)}, (2, 12)),
    (cond_in_a_scan, {"u": (9, 9), "w": (9, 9)}, {"flags": Integers(2, (3,)), "x": (3, 9)}),
    (long_short_term_memory, {"b": (16,), "u": (4, 16), "w": (5, 16)}, (3, 5)),
]
for _loss_fn, _params, _example in WIDE:
    program(_params, _example, suffix="_wide")(_loss_fn)
