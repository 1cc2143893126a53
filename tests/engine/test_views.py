"""Views against NumPy: the same chain of operations, run on an array of positions.

Every entry of every leaf has a number. What NumPy makes of these numbers is what the view of the
result must show, entry by entry; -1 stands for a constant.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdp.engine import boxes, views, walker
from jaxdp.engine.boxes import Box, Dim, Target
from jaxdp.engine.views import Part, View

Shapes = Sequence[tuple[int, ...]]


def view_of(fun: Callable[..., Any], shapes: Shapes) -> View | None:
    """What the engine knows of the result of `fun`, a function of the leaves."""
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program, _ = walker.trace(fun, *leaves)

    def rule(path: Any, eqn: Any, values: list[Any]) -> list[Any]:
        if all(value == () for value in values):
            return [()] * len(eqn.outputs)
        return views.apply(eqn, values)

    known = [views.whole(index, shape) for index, shape in enumerate(shapes)]
    (view,) = walker.evaluate(program, known, rule, lift=lambda _: ())
    return view


def parts_of(fun: Callable[..., Any], shapes: Shapes) -> list[Part]:
    return list(view_of(fun, shapes) or ())


def numbers_of(shapes: Shapes) -> list[np.ndarray]:
    """The numbers of all entries of all leaves."""
    ends = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
    return [
        np.arange(start, start + math.prod(shape)).reshape(shape)
        for start, shape in zip(ends, shapes, strict=False)
    ]


def positions_of(part: Part, steps: Sequence[int] = ()) -> np.ndarray:
    """Positions in the flat leaf, of the shape of the part, at these steps of its loops."""
    base = part.offset + sum(
        step * loop.stride for step, loop in zip(steps, part.loops, strict=True)
    )
    grids = np.indices(part.shape) if part.dims else np.zeros((0,), int)
    strided = [grid * dim.stride for grid, dim in zip(grids, part.dims, strict=True)]
    return np.full(part.shape, base) + sum(strided, np.zeros(part.shape, int))


def shown(view: View, shape: Sequence[int], shapes: Shapes, steps: Sequence[int] = ()) -> Any:
    """The numbers of the entries that a view of this shape shows."""
    numbers, result = numbers_of(shapes), np.full(shape, -1)
    for part in view:
        window = boxes.indices(part.window)
        assert np.all(result[window] == -1), "two parts show the same entry"
        result[window] = numbers[part.source].ravel()[positions_of(part, steps)]
    return result


# ---- random chains ------------------------------------------------------------------------------


class Chain(NamedTuple):
    """A function of some leaves that only rearranges them, as text, for JAX, and its result."""

    text: str
    shapes: Shapes
    fun: Callable[..., Any]
    expected: np.ndarray

    def __repr__(self) -> str:
        return f"{self.text} of {self.shapes}"


Change = tuple[str, Callable[[Any], Any], Callable[[np.ndarray], np.ndarray]]
Draw = Callable[[st.SearchStrategy[Any]], Any]


def _transpose(draw: Draw, shape: tuple[int, ...]) -> Change:
    order = draw(st.permutations(range(len(shape))))
    return f"transpose{order}", lambda x: x.transpose(order), lambda x: x.transpose(order)


def _reshape(draw: Draw, shape: tuple[int, ...]) -> Change:
    """Axes merged, split, or both."""
    size, sizes = math.prod(shape), []
    while size > 1 and len(sizes) < 3:
        divisors = [k for k in range(2, size + 1) if size % k == 0]
        sizes.append(draw(st.sampled_from(divisors)))
        size //= sizes[-1]
    new = (*sizes, size) if draw(st.booleans()) or size > 1 else tuple(sizes)
    return f"reshape{new}", lambda x: x.reshape(new), lambda x: x.reshape(new)


def _slice(draw: Draw, shape: tuple[int, ...]) -> Change:
    starts = [draw(st.integers(0, max(0, size - 1))) for size in shape]
    limits = [
        draw(st.integers(min(low + 1, size), size)) for low, size in zip(starts, shape, strict=True)
    ]
    steps = [draw(st.sampled_from((1, 1, 2, 3))) for _ in shape]
    window = tuple(map(slice, starts, limits, steps))
    return f"{window}", lambda x: lax.slice(x, starts, limits, steps), lambda x: x[window]


def _split(draw: Draw, shape: tuple[int, ...]) -> Change:
    """One of the pieces."""
    axis = draw(st.integers(0, len(shape) - 1))
    at = draw(st.integers(0, shape[axis]))
    sizes, which = (at, shape[axis] - at), draw(st.integers(0, 1))
    return (
        f"split{sizes, axis}[{which}]",
        lambda x: lax.split(x, sizes, axis)[which],
        lambda x: np.split(x, [at], axis)[which],
    )


def _expand(draw: Draw, shape: tuple[int, ...]) -> Change:
    axis = draw(st.integers(0, len(shape)))
    return f"expand{axis}", lambda x: jnp.expand_dims(x, axis), lambda x: np.expand_dims(x, axis)


def _squeeze(draw: Draw, shape: tuple[int, ...]) -> Change:
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return f"squeeze{axes}", lambda x: lax.squeeze(x, axes), lambda x: np.squeeze(x, axes)


def _broadcast(draw: Draw, shape: tuple[int, ...]) -> Change:
    """A new axis, and axes of length one repeated."""
    axis, count = draw(st.integers(0, len(shape))), draw(st.integers(1, 3))
    longer = [draw(st.integers(1, 3)) if size == 1 else size for size in shape]
    new = (*longer[:axis], count, *longer[axis:])
    kept = [k for k in range(len(new)) if k != axis]
    return (
        f"broadcast{new, kept}",
        lambda x: lax.broadcast_in_dim(x, new, kept),
        lambda x: np.broadcast_to(np.expand_dims(x, axis), new),
    )


def _cast(draw: Draw, shape: tuple[int, ...]) -> Change:
    dtype = draw(st.sampled_from((jnp.bfloat16, jnp.float32)))
    return "cast", lambda x: x.astype(dtype).astype(jnp.float32), lambda x: x


def _with_constant(draw: Draw, shape: tuple[int, ...]) -> Change:
    """Constants joined on one side."""
    axis = draw(st.integers(0, len(shape) - 1))
    more = (*shape[:axis], draw(st.integers(1, 2)), *shape[axis + 1 :])
    first = draw(st.booleans())

    def join(x: Any, constant: Any, concatenate: Any) -> Any:
        return concatenate([constant, x] if first else [x, constant], axis)

    return (
        f"constant{more, axis}",
        lambda x: join(x, jnp.zeros(more), lax.concatenate),
        lambda x: join(x, np.full(more, -1), np.concatenate),
    )


CHANGES = (_transpose, _reshape, _slice, _split, _expand, _squeeze, _broadcast, _cast)
FLAT = (_expand, _broadcast, _cast)  # those that a scalar knows


@st.composite
def chains(draw: Draw) -> Chain:
    """One to three leaves, each changed, then joined, then changed again."""
    rank = draw(st.integers(1, 3))
    count = draw(st.integers(1, 3))
    sizes = st.sampled_from((2, 3, 4, 1, 6))
    shape = tuple(draw(sizes) for _ in range(rank))
    axis = draw(st.integers(0, rank - 1))
    shapes = [(*shape[:axis], draw(sizes), *shape[axis + 1 :]) for _ in range(count)]
    text, steps = [], []
    value = np.concatenate(numbers_of(shapes), axis)
    if count > 1:
        text.append(f"concatenate({axis})")
    for _ in range(draw(st.integers(1, 6))):
        if value.size == 0:
            break
        options = (*CHANGES, _with_constant) if value.ndim else FLAT
        name, change, same_in_numpy = draw(st.sampled_from(options))(draw, value.shape)
        text.append(name)
        steps.append(change)
        value = same_in_numpy(value)

    def fun(*leaves: Any) -> Any:
        result = leaves[0] if len(leaves) == 1 else lax.concatenate(leaves, axis)
        for step in steps:
            result = step(result)
        return result

    return Chain(" ".join(text), shapes, fun, value)


EXAMPLES = hypothesis.settings(max_examples=150)
FEW = hypothesis.settings(max_examples=40)  # each compiles
MORE = hypothesis.settings(max_examples=3000)


def check_view(chain: Chain) -> None:
    view = view_of(chain.fun, chain.shapes)
    if view is None:
        assert "reshape" in chain.text, "only a reshape may need a copy"
        return
    np.testing.assert_array_equal(shown(view, chain.expected.shape, chain.shapes), chain.expected)


def check_boxes(chain: Chain) -> None:
    for part in parts_of(chain.fun, chain.shapes):
        shape = chain.shapes[part.source]
        at = views.box(part, shape)
        seen = set(positions_of(part).ravel().tolist())
        is_box = seen == inside(smallest_box(seen, shape), shape)
        assert (at is not None) <= is_box, "a box of entries that the part does not show"
        assert at is None or inside(at, shape) == seen
        assert at is not None or not is_box or part.repeats or misses_only(part, shape)


def misses_only(part: Part, shape: Sequence[int]) -> bool:
    """`box` may give up where axes of the part are runs across several axes of the leaf."""
    own = {math.prod(shape[k + 1 :]) for k in range(len(shape))}
    return any(dim.size > 1 and dim.stride not in own for dim in part.dims)


def check_placed(chain: Chain) -> None:
    rng = np.random.default_rng(0)
    for part in parts_of(chain.fun, chain.shapes):
        shape = chain.shapes[part.source]
        at = views.box(part, shape)
        if at is None:
            continue
        rows = rng.integers(-9, 9, size=(2, *part.shape)).astype(np.float32)
        expected = np.zeros((2, math.prod(shape)), np.float32)
        for row, into in zip(rows, expected, strict=True):
            np.add.at(into, positions_of(part).ravel(), row.ravel())
        got = Target(at, shape).place(jnp.asarray(rows), part.dims)
        np.testing.assert_array_equal(got, expected.reshape(2, *shape))


def smallest_box(positions: set[int], shape: Sequence[int]) -> Box:
    axes = np.unravel_index(sorted(positions), shape)
    return tuple((int(np.min(axis)), int(np.ptp(axis)) + 1) for axis in axes)


def inside(at: Box, shape: Sequence[int]) -> set[int]:
    """The positions in a box."""
    ranges = [range(start, start + count) for start, count in at]
    return {int(np.ravel_multi_index(entry, shape)) for entry in itertools.product(*ranges)}


@EXAMPLES
@hypothesis.given(chain=chains())
def test_a_view_shows_what_numpy_makes_of_the_entries(chain: Chain) -> None:
    check_view(chain)


@EXAMPLES
@hypothesis.given(chain=chains())
def test_a_box_holds_exactly_what_the_view_shows(chain: Chain) -> None:
    check_boxes(chain)


@FEW
@hypothesis.given(chain=chains())
def test_gradients_are_placed_where_they_belong(chain: Chain) -> None:
    check_placed(chain)


@pytest.mark.slow
@MORE
@hypothesis.given(chain=chains())
def test_many_chains(chain: Chain) -> None:
    check_view(chain)
    check_boxes(chain)
    check_placed(chain)


# ---- what must be seen --------------------------------------------------------------------------

# A view that is not recognised costs time only, but it costs: these are in every model.
SEEN = {
    "transposed": (lambda w: w.T, [(3, 4)]),
    "heads split": (lambda w: w.reshape(4, 2, 3), [(4, 6)]),
    "heads split and turned": (lambda w: w.reshape(4, 2, 3).transpose(1, 0, 2), [(4, 6)]),
    "heads merged": (lambda w: w.reshape(4, 6), [(4, 2, 3)]),
    "flat leaf": (lambda w: w[6:18].reshape(3, 4), [(20,)]),
    "transposed and back": (lambda w: w.T.reshape(2, 2, 3).reshape(4, 3).T, [(3, 4)]),
    "one layer": (lambda w: w[1], [(3, 2, 4)]),
    "query, key and value": (lambda w: jnp.split(w, 3, axis=1)[1], [(4, 6)]),
    "joined": (lambda a, b: jnp.concatenate([a, b], axis=1), [(2, 3), (2, 1)]),
    "stacked": (lambda a, b: jnp.concatenate([a[None], b[None]]), [(2, 3), (2, 3)]),
    "row": (lambda b: b[None, :], [(3,)]),
    "half precision": (lambda w: w.astype(jnp.bfloat16), [(2, 3)]),
}


@pytest.mark.parametrize("name", list(SEEN))
def test_what_models_do_is_recognised_as_boxes(name: str) -> None:
    fun, shapes = SEEN[name]
    view = view_of(fun, shapes)
    assert view
    assert all(views.box(part, shapes[part.source]) for part in view)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_leaves_are_stacked_and_taken_apart(axis: int) -> None:
    shapes = [(2, 3), (2, 3), (2, 3)]
    stacked = view_of(lambda *leaves: jnp.stack(leaves, axis), shapes)
    assert stacked
    expected = np.stack(numbers_of(shapes), axis)
    np.testing.assert_array_equal(shown(stacked, expected.shape, shapes), expected)
    (whole,) = numbers_of([(2, 3, 4)])
    for index, entry in enumerate(np.moveaxis(whole, axis, 0)):
        one = view_of(lambda leaf, index=index: jnp.unstack(leaf, axis=axis)[index], [(2, 3, 4)])
        assert one
        np.testing.assert_array_equal(shown(one, entry.shape, [(2, 3, 4)]), entry)


NO_BOX = {
    "every second row": (lambda w: w[::2], [(6, 2)]),
    "every second column": (lambda w: w[:, ::3], [(2, 6)]),
    "parts of rows in one flat piece": (lambda w: w.reshape(12)[1:5], [(4, 3)]),
    "whole rows from the middle of one": (lambda w: w.reshape(12)[1:7], [(4, 3)]),
}


@pytest.mark.parametrize("name", list(NO_BOX))
def test_what_is_no_box_is_not_taken_for_one(name: str) -> None:
    fun, shapes = NO_BOX[name]
    (part,) = parts_of(fun, shapes)
    assert views.box(part, shapes[0]) is None


NO_VIEW = {
    "sum": lambda a, b: a + b,
    "scaled by another": lambda a, b: a * b,
    "scaled by next to nothing": lambda a, b: 1e-30 * a,
    "divided into": lambda a, b: 2.0 / a,
    "padded with itself": lambda a, b: jnp.pad(a, ((0, 1), (0, 0)), mode="edge") * a[:1],
    "reversed": lambda a, b: a[::-1],
    "rounded to integers": lambda a, b: a.astype(jnp.int32),
    "a copy": lambda a, b: a.T.reshape(-1),
}


def test_a_number_stands_before_the_entries() -> None:
    for fun, scale in (
        (lambda a: 2.0 * a, 2.0),
        (lambda a: -(a / 4.0), -0.25),
        (lambda a: (3.0 * (2.0 * a)).T, 6.0),
    ):
        (part,) = parts_of(fun, [(2, 3)])
        assert part.scale == scale


@pytest.mark.parametrize("name", list(NO_VIEW))
def test_what_is_no_view_is_not_taken_for_one(name: str) -> None:
    assert view_of(NO_VIEW[name], [(2, 3), (2, 3)]) is None


# ---- loops --------------------------------------------------------------------------------------


@EXAMPLES
@hypothesis.given(chain=chains())
def test_a_loop_steps_through_the_first_axis(chain: Chain) -> None:
    hypothesis.assume(chain.expected.ndim and len(chain.expected))
    length = len(chain.expected)
    stepped = views.step_through(view_of(chain.fun, chain.shapes), length)
    if stepped is None:
        return
    shape = chain.expected.shape[1:]
    for step in range(length):
        got = shown(stepped, shape, chain.shapes, (step,))
        np.testing.assert_array_equal(got, chain.expected[step])
    for part in stepped:
        leaf = chain.shapes[part.source]
        seen = {p for step in range(length) for p in positions_of(part, (step,)).ravel().tolist()}
        at = views.box(part, leaf)
        assert at is None or inside(at, leaf) == seen


@EXAMPLES
@hypothesis.given(chain=chains(), length=st.integers(1, 3))
def test_a_loop_shares_a_constant(chain: Chain, length: int) -> None:
    view = view_of(chain.fun, chain.shapes)
    shared = views.share(view, length)
    assert (shared is None) == (view is None)
    for step in range(length):
        got = shown(shared or (), chain.expected.shape, chain.shapes, (step,)) if shared else None
        assert got is None or np.array_equal(got, chain.expected)


def test_a_loop_within_a_loop() -> None:
    """The outer one through layers, the inner one through rows of a layer, then a shared one."""
    shape = (2, 3, 4)
    view = views.step_through(views.step_through(views.whole(0, shape), 2), 3)
    (part,) = list(views.share(view, 5) or ())
    assert part.loops == ((2, 12), (3, 4), (5, 0))
    for outer, inner, again in itertools.product(range(2), range(3), range(5)):
        expected = np.arange(24).reshape(shape)[outer, inner]
        np.testing.assert_array_equal(positions_of(part, (outer, inner, again)), expected)
    assert views.box(part, shape) == ((0, 2), (0, 3), (0, 4))
    fewer = part._replace(loops=(Dim(2, 12), Dim(2, 4), Dim(5, 0)))
    assert views.box(fewer, shape) == ((0, 2), (0, 2), (0, 4))


def test_steps_that_show_different_leaves_are_no_view() -> None:
    view = view_of(lambda a, b: jnp.concatenate([a[None], b[None]]), [(3,), (3,)])
    assert view
    assert views.step_through(view, 2) is None


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_a_whole_leaf_shows_itself(shape: tuple[int, ...]) -> None:
    (part,) = views.whole(0, shape)
    np.testing.assert_array_equal(positions_of(part), numbers_of([shape])[0])
    assert views.box(part, shape) == tuple((0, size) for size in shape)
