"""Boxes, axes by strides, and loops, against NumPy; `test_views.py` places whole views."""

import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from jaxdp.engine import boxes
from jaxdp.engine.boxes import Box, Dim, Target

EXAMPLES = hypothesis.settings(max_examples=150)
RANGES = st.tuples(st.integers(0, 3), st.integers(1, 3))
SHAPE = (6, 6)


def marked(box: Box) -> np.ndarray:
    mark = np.zeros(SHAPE, bool)
    mark[boxes.indices(box)] = True
    return mark


@EXAMPLES
@hypothesis.given(a=st.tuples(RANGES, RANGES), b=st.tuples(RANGES, RANGES))
def test_disjoint_boxes_have_no_entry_in_common(a: Box, b: Box) -> None:
    assert boxes.disjoint(a, b) == (not np.any(marked(a) & marked(b)))


@EXAMPLES
@hypothesis.given(box=st.tuples(RANGES, RANGES))
def test_gradients_of_a_box_are_zero_outside_of_it(box: Box) -> None:
    counts = [count for _, count in box]
    rows = jnp.ones((2, *counts))
    placed = Target(box, SHAPE).place(rows, boxes.row_major(counts))
    np.testing.assert_array_equal(placed, np.stack([marked(box)] * 2))


@EXAMPLES
@hypothesis.given(
    sizes=st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=3), data=st.data()
)
def test_a_reshape_of_a_whole_leaf_needs_no_copy(sizes: list[int], data: st.DataObject) -> None:
    new = data.draw(st.permutations(sizes))
    result = boxes.reshaped(boxes.row_major(sizes), new)
    assert result is not None
    strides = np.array([dim.stride for dim in result])
    positions = np.tensordot(strides, np.indices(new), 1)
    np.testing.assert_array_equal(positions, np.arange(math.prod(sizes)).reshape(new))


def test_steps_that_see_distinct_slices_come_before_those_that_share_them() -> None:
    loops = (Dim(2, 30), Dim(3, 0), Dim(4, 5))
    array = np.arange(7 * 2 * 3 * 4 * 5).reshape(7, 2, 3, 4, 5)
    got = boxes.split_loops(jnp.asarray(array), loops)
    np.testing.assert_array_equal(got, array.transpose(0, 1, 3, 2, 4).reshape(7, 8, 3, 5))
    assert boxes.distinct(loops) == (loops[0], loops[2])
