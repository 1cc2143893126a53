"""Operator norms are upper bounds, and tight ones; against dense matrices in float64."""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdp.lipschitz.operator_norm import convolution_norm, matrix_norm, patch_multiplicity

# Tests of it are compiled as for users: it must round up whatever is rounded there.
norm_of_matrix = jax.jit(matrix_norm)


def largest_singular_value(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def orthonormal(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(max(rows, columns), min(rows, columns))))
    return q if rows >= columns else q.T


MATRICES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.normal(size=(60, 40)),
    "wide": lambda rng: rng.normal(size=(3, 200)),
    "one row": lambda rng: rng.normal(size=(1, 50)),
    "orthonormal": lambda rng: orthonormal(300, 200, rng),
    "nearly orthonormal": lambda rng: orthonormal(80, 80, rng) + 0.01 * rng.normal(size=(80, 80)),
    "rank one": lambda rng: np.outer(rng.normal(size=30), rng.normal(size=20)),
    "two equal singular values": lambda rng: np.diag([2.0, 2.0, 1e-3]),
    "all ones": lambda rng: np.ones((50, 70)),
    "tiny": lambda rng: 1e-12 * rng.normal(size=(20, 30)),
    "huge": lambda rng: 1e12 * rng.normal(size=(20, 30)),
    "zero": lambda rng: np.zeros((4, 5)),
    "ill conditioned": lambda rng: (
        orthonormal(40, 40, rng) @ np.diag(np.logspace(0, -8, 40)) @ orthonormal(40, 40, rng)
    ),
}


@pytest.mark.optimized
@pytest.mark.parametrize("kind", list(MATRICES))
def test_a_matrix_norm_is_an_upper_bound_within_three_percent(kind: str) -> None:
    matrix = MATRICES[kind](np.random.default_rng(0)).astype(np.float32)
    true, bound = largest_singular_value(matrix), float(norm_of_matrix(matrix))
    assert true <= bound <= 1.03 * true + 1e-30


@pytest.mark.optimized
@given(
    rows=st.sampled_from([2, 5]),
    columns=st.sampled_from([3, 4]),
    seed=st.integers(0, 10_000),
    spread=st.floats(0, 6),
)
@settings(max_examples=200)
def test_no_matrix_is_longer_than_its_norm(rows: int, columns: int, seed: int, spread: float):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, columns)) * 10 ** rng.uniform(-spread, spread, size=columns)
    matrix = matrix.astype(np.float32)
    assert largest_singular_value(matrix) <= float(norm_of_matrix(matrix))


@pytest.mark.optimized
def test_a_batch_of_complex_matrices() -> None:
    rng = np.random.default_rng(0)
    stack = (rng.normal(size=(5, 4, 6)) + 1j * rng.normal(size=(5, 4, 6))).astype(np.complex64)
    bounds = np.asarray(norm_of_matrix(stack))
    true = np.linalg.norm(stack.astype(np.complex128), 2, axis=(-2, -1))
    assert np.all((true <= bounds) & (bounds <= 1.03 * true))


class Conv:
    """A convolution on an input of a size, as a matrix."""

    def __init__(
        self,
        window: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        channels: tuple[int, int],
        size: Sequence[int],
    ):
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups
        self.size, self.channels = tuple(size), channels[0]
        self.kernel_shape = (*window, channels[0] // groups, channels[1])

    def matrix(self, kernel: jax.Array, padding: str) -> np.ndarray:
        names = "WHD"[: len(self.size)]
        layout = (f"N{names}C", f"{names}IO", f"N{names}C")

        def apply(x: jax.Array) -> jax.Array:
            return jax.lax.conv_general_dilated(
                x.reshape(1, *self.size, self.channels),
                kernel,
                self.stride,
                padding,
                rhs_dilation=self.dilation,
                dimension_numbers=layout,
                feature_group_count=self.groups,
            ).reshape(-1)

        count = math.prod(self.size) * self.channels
        return np.asarray(jax.vmap(apply)(jnp.eye(count))).T


CONVOLUTIONS = {
    "1d": Conv((3,), (1,), (1,), 1, (3, 4), (40,)),
    "1d stride": Conv((5,), (2,), (1,), 1, (2, 4), (41,)),
    "1d stride and dilation": Conv((3,), (2,), (3,), 1, (2, 3), (40,)),
    "1d stride larger than the window": Conv((2,), (3,), (1,), 1, (2, 3), (40,)),
    "2d": Conv((3, 3), (1, 1), (1, 1), 1, (2, 4), (12, 12)),
    "2d stride": Conv((3, 3), (2, 2), (1, 1), 1, (2, 4), (13, 13)),
    "2d dilation, groups": Conv((3, 3), (1, 1), (2, 2), 2, (4, 6), (11, 11)),
    "2d uneven": Conv((4, 2), (3, 1), (1, 2), 1, (1, 3), (13, 12)),
    "depthwise": Conv((3, 3), (1, 1), (1, 1), 4, (4, 4), (9, 9)),
    "pointwise": Conv((1, 1), (1, 1), (1, 1), 1, (5, 4), (4, 4)),
    "3d": Conv((2, 2, 2), (1, 1, 1), (1, 1, 1), 1, (1, 2), (6, 6, 6)),
}
KERNELS = {
    "normal": lambda shape: np.random.default_rng(1).normal(size=shape),
    "constant": np.ones,
    "alternating": lambda shape: (
        (-1.0) ** np.indices(shape[:-2]).sum(0)[..., None, None] * np.ones(shape)
    ),
}


@pytest.mark.sweep
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("kind", list(KERNELS))
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_a_convolution_norm_is_an_upper_bound_and_tight(name: str, kind: str, padding: str) -> None:
    conv = CONVOLUTIONS[name]
    kernel = jnp.asarray(KERNELS[kind](conv.kernel_shape), jnp.float32)
    true = largest_singular_value(conv.matrix(kernel, padding))
    bound = float(convolution_norm(kernel, conv.stride, conv.dilation, conv.groups))
    # What is left between them is the border of a small input.
    assert true <= bound <= 1.5 * true


def test_a_convolution_norm_is_reached_on_a_large_input() -> None:
    conv = Conv((5,), (2,), (1,), 1, (1, 2), (600,))
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=conv.kernel_shape), jnp.float32)
    true = largest_singular_value(conv.matrix(kernel, "VALID"))
    bound = float(convolution_norm(kernel, conv.stride, conv.dilation, conv.groups))
    assert true <= bound <= 1.03 * true


@pytest.mark.parametrize("k, s, d", list(itertools.product((1, 2, 3, 5), (1, 2, 3), (1, 2, 4))))
def test_patch_multiplicity_counts_windows_over_a_position(k: int, s: int, d: int) -> None:
    windows = range(20)
    covered = [p * s + tap * d for p in windows for tap in range(k)]
    assert patch_multiplicity((k,), (s,), (d,), (20,)) == max(map(covered.count, covered))


def test_patch_multiplicity_is_at_most_the_number_of_windows() -> None:
    assert patch_multiplicity((5, 5), (1, 1), (1, 1), (2, 3)) == 6
