"""Programs small enough to be counted by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.bench.scripts import script

roofline = script("roofline")
H100, V5P = roofline.MACHINES["H100"], roofline.MACHINES["v5p"]
MACHINES = pytest.mark.parametrize("machine", [H100, V5P], ids=["H100", "v5p"])

M, K, N = 8, 32, 16
FLOPS = 2 * M * K * N
ENTRIES = M * K + K * N + M * N


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def cost(fun: Callable[..., Any], machine: Any, *args: Any) -> Any:
    return roofline.cost(fun, args, machine)


@MACHINES
def test_a_product_in_bfloat16_takes_one_pass(machine: Any) -> None:
    a, b = shape(M, K, dtype=jnp.bfloat16), shape(K, N, dtype=jnp.bfloat16)
    found = cost(jnp.matmul, machine, a, b)
    assert found[:3] == (FLOPS, FLOPS, 2 * ENTRIES)
    assert found.seconds == max(FLOPS / machine.flops, 2 * ENTRIES / machine.bandwidth)


@pytest.mark.parametrize(
    ("machine", "precision", "passes"),
    [
        (H100, None, 2),
        (H100, lax.Precision.DEFAULT, 2),
        (H100, lax.Precision.HIGH, 2),
        (H100, lax.Precision.HIGHEST, 15),
        (V5P, None, 1),
        (V5P, lax.Precision.DEFAULT, 1),
        (V5P, lax.Precision.HIGH, 3),
        (V5P, lax.Precision.HIGHEST, 6),
        (V5P, (lax.Precision.DEFAULT, lax.Precision.HIGHEST), 6),
    ],
)
def test_a_product_in_float32_takes_the_passes_of_its_precision(
    machine: Any, precision: Any, passes: int
) -> None:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=precision)

    found = cost(product, machine, shape(M, K), shape(K, N))
    assert found[:3] == (FLOPS, passes * FLOPS, 4 * ENTRIES)


def test_a_product_of_two_types_is_one_in_float32() -> None:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot(a, b, preferred_element_type=jnp.float32)

    found = cost(product, H100, shape(M, K), shape(K, N, dtype=jnp.bfloat16))
    assert found[:2] == (FLOPS, 2 * FLOPS)


@MACHINES
def test_elementwise_equations_are_one_reading_and_one_writing(machine: Any) -> None:
    found = cost(lambda x: jnp.exp(x) * x + x, machine, shape(M, N))
    assert found == (0, 0, 4 * 2 * M * N, 4 * 2 * M * N / machine.bandwidth)


def test_what_a_product_consumes_is_written_before() -> None:
    def fun(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(jnp.exp(a), b)

    # exp reads and writes a; the product reads that and b, and writes.
    assert cost(fun, H100, shape(M, K), shape(K, N)).bytes == 4 * (2 * M * K + ENTRIES)


def test_a_sum_reads_its_operand_and_writes_its_result() -> None:
    found = cost(lambda x: jnp.sum(jnp.square(x), axis=1), H100, shape(M, N))
    assert found[:3] == (0, 0, 4 * (M * N + M))


def test_equal_equations_count_once_and_unused_ones_not_at_all() -> None:
    def fun(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        jnp.matmul(jnp.sin(a), b)
        return jnp.matmul(a, b), jnp.matmul(a, b)

    found = cost(fun, H100, shape(M, K), shape(K, N))
    assert found[:3] == (FLOPS, 2 * FLOPS, 4 * ENTRIES)


@MACHINES
def test_a_loop_counts_as_often_as_it_runs(machine: Any) -> None:
    def loop(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.scan(lambda x, _: (jnp.matmul(x, b), None), a, length=7)[0]

    once = cost(jnp.matmul, machine, shape(M, K), shape(K, K))
    found = cost(loop, machine, shape(M, K), shape(K, K))
    assert found == pytest.approx([7 * figure for figure in once])
    assert found.flops == 7 * 2 * M * K * K


def test_a_branch_counts_as_its_dearest() -> None:
    def fun(which: jax.Array, a: jax.Array) -> jax.Array:
        return lax.cond(which, lambda: a @ a, lambda: a @ a @ a)

    found = cost(fun, H100, shape(dtype=jnp.bool_), shape(K, K))
    assert found.flops == 2 * 2 * K**3


@MACHINES
def test_a_convolution_counts_its_kernel_at_every_pixel(machine: Any) -> None:
    def convolution(x: jax.Array, k: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers)

    x, k = shape(2, 10, 10, 3, dtype=jnp.bfloat16), shape(3, 3, 3, 5, dtype=jnp.bfloat16)
    flops = 2 * (2 * 10 * 10 * 5) * (3 * 3 * 3)
    moved = 2 * (2 * 10 * 10 * 3 + 3 * 3 * 3 * 5 + 2 * 10 * 10 * 5)
    assert cost(convolution, machine, x, k)[:3] == (flops, flops, moved)
