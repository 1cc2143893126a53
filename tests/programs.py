"""A hypothesis strategy of small losses: random compositions of what `program_table` has alone.

A program is a chain of blocks. Each maps an activation to an activation, and asks for weights of
the shapes it needs; a weight is a leaf, a leaf that another block uses already, or an expression of
leaves. Blocks that hold blocks (checkpoint, jit, cond, loops over time or layers) nest.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.oracle import Case
from tests.program_table import (
    Integers,
    arrays,
    clipped_backward,
    convolve,
    normalised,
    ramp,
    scaled_by,
    straight_through,
    total,
)

Shape = tuple[int, ...]
Params = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

# Ids look up tables of this length; every example has this many ids.
VOCABULARY, IDS = 4, 7

# How deep blocks that hold blocks nest.
DEEPEST = 2


class Weight(NamedTuple):
    """An expression of leaves."""

    text: str
    of: Callable[[Params], jax.Array]


class Block(NamedTuple):
    """A map of activations. `apply(params, example, x)`; `shape` is the result's."""

    text: str
    apply: Callable[[Params, Any, jax.Array], jax.Array]
    shape: Shape


class Program(NamedTuple):
    """A case and a mask for its rows. It prints as its text."""

    case: Case
    mask: list[bool] | None
    text: str

    def __repr__(self) -> str:
        return self.text


MakeWeight = Callable[["Draft", Shape], Weight]
MakeBlock = Callable[["Draft", Shape], Block]


class Draft:
    """The leaves that a program has so far, and the drawing of weights from them.

    Args:
      draw: of a composite strategy.
      outer: the draft around this one, for the body of a loop over layers: its leaves are shared
        by all layers, the body's own get a leading axis.
    """

    def __init__(self, draw: Draw, outer: "Draft | None" = None):
        self.draw = draw
        self.own: dict[str, Shape] = {}
        self.nesting = 0 if outer is None else outer.nesting
        self._outer = outer
        self._count: list[int] = [0] if outer is None else outer._count

    @property
    def leaves(self) -> dict[str, Shape]:
        """Every leaf that a block may use here."""
        return self.own if self._outer is None else self._outer.leaves | self.own

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def flip(self) -> bool:
        return self.draw(st.booleans())

    def count(self, largest: int) -> int:
        return self.draw(st.integers(1, largest))

    def size(self, largest: int) -> int:
        """Of an axis. Two is the simplest: at one, many a mistake cannot be seen."""
        return self.pick(*(size for size in (2, 3, 1, 4, 5, 6, 7, 8) if size <= largest))

    def leaf(self, shape: Shape) -> Weight:
        """A leaf of its own."""
        name = f"p{self._count[0]}"
        self._count[0] += 1
        self.own[name] = shape
        return Weight(f"{name}{list(shape)}", lambda params: params[name])

    def weight(self, shape: Shape) -> Weight:
        """A leaf of its own, one that is there, or an expression of leaves."""
        return self.draw(st.sampled_from((Draft.leaf, Draft.known, _expression)))(self, shape)

    def known(self, shape: Shape) -> Weight:
        """A leaf of this shape that is there already, if there is one."""
        names = [name for name, size in self.leaves.items() if size == shape]
        if not names:
            return self.leaf(shape)
        name = self.pick(*names)
        return Weight(name, lambda params: params[name])


# ---- weights ------------------------------------------------------------------------------------


def _changed(source: Weight, text: str, change: Callable[[jax.Array], jax.Array]) -> Weight:
    return Weight(text.format(source.text), lambda params: change(source.of(params)))


def _transposed(draft: Draft, shape: Shape) -> Weight:
    return _changed(draft.known(shape[::-1]), "{}.T", jnp.transpose)


def _sliced(draft: Draft, shape: Shape) -> Weight:
    """Rows of a leaf that may be there already, so that slices overlap or lie apart."""
    longer = [
        name
        for name, size in draft.leaves.items()
        if len(size) == len(shape) and size[0] > shape[0] and size[1:] == shape[1:]
    ]
    if longer:
        name = draft.pick(*longer)
        length, source = draft.leaves[name][0], Weight(name, lambda params: params[name])
    else:
        length = shape[0] + draft.size(2)
        source = draft.leaf((length, *shape[1:]))
    start = draft.draw(st.integers(0, length - shape[0]))
    stop = start + shape[0]
    return _changed(source, f"{{}}[{start}:{stop}]", lambda leaf: leaf[start:stop])


def _joined(draft: Draft, shape: Shape) -> Weight:
    if shape[0] < 2:
        return draft.leaf(shape)
    first = draft.draw(st.integers(1, shape[0] - 1))
    parts = [draft.known((size, *shape[1:])) for size in (first, shape[0] - first)]
    text = f"concatenate({parts[0].text}, {parts[1].text})"
    return Weight(text, lambda params: jnp.concatenate([part.of(params) for part in parts]))


def _reshaped(draft: Draft, shape: Shape) -> Weight:
    flat = draft.known((int(np.prod(shape)),))
    return _changed(flat, f"{{}}.reshape{shape}", lambda leaf: leaf.reshape(shape))


def _squeezed(draft: Draft, shape: Shape) -> Weight:
    return _changed(draft.known((1, *shape)), "{}.squeeze(0)", lambda leaf: leaf.squeeze(0))


def _broadcast(draft: Draft, shape: Shape) -> Weight:
    axis = draft.draw(st.integers(0, len(shape) - 1))
    small = draft.known((*shape[:axis], 1, *shape[axis + 1 :]))
    return _changed(small, f"broadcast({{}}, {shape})", lambda leaf: jnp.broadcast_to(leaf, shape))


def _added(draft: Draft, shape: Shape) -> Weight:
    a, b = draft.known(shape), draft.known(shape)
    return Weight(f"({a.text} - 0.5 * {b.text})", lambda p: a.of(p) - 0.5 * b.of(p))


def _scaled(draft: Draft, shape: Shape) -> Weight:
    """Columns scaled by a leaf."""
    matrix = draft.known(shape)
    scale = draft.known((1,) * (len(shape) - 1) + shape[-1:])
    return Weight(f"({matrix.text} * {scale.text})", lambda p: matrix.of(p) * scale.of(p))


def _product(draft: Draft, shape: Shape) -> Weight:
    if len(shape) != 2:
        return draft.leaf(shape)
    rank = draft.size(2)
    a, b = draft.known((shape[0], rank)), draft.known((rank, shape[1]))
    return Weight(f"({a.text} @ {b.text})", lambda p: a.of(p) @ b.of(p))


def _narrowed(draft: Draft, shape: Shape) -> Weight:
    """Rarely: a program with a bfloat16 is held to a coarse tolerance only."""
    if draft.count(6) < 6:
        return draft.leaf(shape)
    source = draft.known(shape)
    return _changed(source, "bfloat16({})", lambda w: w.astype(jnp.bfloat16).astype(w.dtype))


def _of_leaf(text: str, change: Callable[[jax.Array], jax.Array]) -> MakeWeight:
    return lambda draft, shape: _changed(draft.known(shape), text, change)


EXPRESSIONS: tuple[MakeWeight, ...] = (
    _transposed,
    _sliced,
    _joined,
    _reshaped,
    _squeezed,
    _broadcast,
    _of_leaf("(0.5 * {})", lambda w: 0.5 * w),
    _of_leaf("{}[::-1]", lambda w: w[::-1]),
    _added,
    _scaled,
    _product,
    _of_leaf("normalised({})", lambda w: w / jnp.sqrt(1 + jnp.sum(w * w))),
    _of_leaf("exp({})", lambda w: 0.5 * jnp.exp(w)),
    _of_leaf("stop_gradient({})", lax.stop_gradient),
    _of_leaf("checkpoint(sin)({})", jax.checkpoint(jnp.sin)),
    _narrowed,
)


def _expression(draft: Draft, shape: Shape) -> Weight:
    return draft.pick(*EXPRESSIONS)(draft, shape)


# ---- blocks that keep the shape, whatever it is -------------------------------------------------


def _elementwise(text: str, change: Callable[[jax.Array], jax.Array]) -> MakeBlock:
    return lambda draft, shape: Block(f"x = {text}", lambda p, e, x: change(x), shape)


def _with_weight(text: str, join: Callable[[jax.Array, jax.Array], jax.Array]) -> MakeBlock:
    """Joins the activation and a weight of its last axis, full shape, first axis, or of one."""

    def block(draft: Draft, shape: Shape) -> Block:
        ones = (1,) * (len(shape) - 1)
        weight = draft.weight(draft.pick(ones + shape[-1:], shape, shape[:1] + ones, (*ones, 1)))

        def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
            return join(x, jnp.broadcast_to(weight.of(p), x.shape))

        return Block(f"x = {text.format(weight.text)}", apply, shape)

    return block


def _square(draft: Draft, shape: Shape) -> Block:
    """A product that keeps the shape, so that one leaf fits many places."""
    weight = draft.weight((shape[-1], shape[-1]))
    return Block(f"x = x @ {weight.text}", lambda p, e, x: x @ weight.of(p), shape)


def _layer_norm(draft: Draft, shape: Shape) -> Block:
    last = (1,) * (len(shape) - 1) + shape[-1:]
    scale, bias = draft.weight(last), draft.weight(last)
    return Block(
        f"x = layer_norm(x) * (1 + {scale.text}) + {bias.text}",
        lambda p, e, x: normalised(x) * (1 + scale.of(p)) + bias.of(p),
        shape,
    )


def _residual(draft: Draft, shape: Shape) -> Block:
    inner = _inner(draft, shape)
    return Block(f"x = x + ({inner.text})", lambda p, e, x: x + inner.apply(p, e, x), shape)


def _checkpoint(draft: Draft, shape: Shape) -> Block:
    inner = _inner(draft, shape)
    return Block(f"checkpoint({inner.text})", jax.checkpoint(inner.apply), shape)


def _jit(draft: Draft, shape: Shape) -> Block:
    """One trace called twice, the second time on the result of the first."""
    inner = _inner(draft, shape)
    call = jax.jit(inner.apply)
    return Block(f"jit twice({inner.text})", lambda p, e, x: call(p, e, call(p, e, x)), shape)


def _cond(draft: Draft, shape: Shape) -> Block:
    yes, no = _inner(draft, shape), _inner(draft, shape)
    condition = draft.pick("ids[0] < 2", "True")

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        on = e["ids"][0] < 2 if condition != "True" else jnp.array(True)
        return lax.cond(on, lambda x: yes.apply(p, e, x), lambda x: no.apply(p, e, x), x)

    return Block(f"if {condition} ({yes.text}) else ({no.text})", apply, shape)


def _switch(draft: Draft, shape: Shape) -> Block:
    branches = [_inner(draft, shape) for _ in range(3)]

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        calls = [functools.partial(branch.apply, p, e) for branch in branches]
        return lax.switch(e["ids"][1], calls, x)

    text = ", ".join(f"({branch.text})" for branch in branches)
    return Block(f"switch ids[1] {text}", apply, shape)


def _loop(draft: Draft, shape: Shape) -> Block:
    inner, count = _inner(draft, shape), draft.count(3)
    return Block(
        f"fori_loop {count} ({inner.text})",
        lambda p, e, x: lax.fori_loop(0, count, lambda i, x: tame(inner.apply(p, e, x)), x),
        shape,
    )


def _carried(draft: Draft, shape: Shape) -> Block:
    """A loop whose state holds the parameters beside the activation."""
    inner, count, decay = _inner(draft, shape), draft.count(3), draft.pick(1.0, 0.9)

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        def step(carry: Any, _: None) -> Any:
            x, p = carry
            kept = p if decay == 1 else jax.tree.map(lambda leaf: decay * leaf, p)
            return (tame(inner.apply(p, e, x)), kept), None

        return lax.scan(step, (x, p), None, length=count)[0][0]

    return Block(f"scan {count}, carrying {decay} * params ({inner.text})", apply, shape)


def _layers(draft: Draft, shape: Shape) -> Block:
    """A scan over stacked layers."""
    body, count = Draft(draft.draw, draft), draft.count(3)
    inner = _inner(body, shape)
    reverse, remat = draft.flip(), draft.flip()
    draft.own.update({name: (count, *size) for name, size in body.own.items()})

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, own: Params) -> Any:
            return tame(inner.apply(p | own, e, x)), None

        own = {name: p[name] for name in body.own}
        run = jax.checkpoint(layer) if remat else layer
        return lax.scan(run, x, own, length=count, reverse=reverse)[0]

    options = ", reverse" * reverse + ", checkpoint" * remat
    own = ", ".join(body.own)
    return Block(f"scan {count} layers of [{own}]{options} ({inner.text})", apply, shape)


# ---- blocks that keep the shape of a vector, or of a sequence -----------------------------------


def _looked_up_once(draft: Draft, shape: Shape) -> Block:
    table = draft.weight((VOCABULARY, *shape))
    text = f"x = x + {table.text}[ids[0]]"
    return Block(text, lambda p, e, x: x + table.of(p)[e["ids"][0]], shape)


def _looked_up(draft: Draft, shape: Shape) -> Block:
    length, one_hot = min(shape[0], IDS), draft.flip()
    table = draft.weight((VOCABULARY, shape[1]))

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        ids, rows = e["ids"][:length], table.of(p)
        found = jax.nn.one_hot(ids, VOCABULARY, dtype=x.dtype) @ rows if one_hot else rows[ids]
        return x.at[:length].add(found)

    return Block(f"x[:{length}] += {table.text}[{'one_hot ' * one_hot}ids]", apply, shape)


def _looked_up_matrix(draft: Draft, shape: Shape) -> Block:
    experts = draft.weight((VOCABULARY, shape[1], shape[1]))
    text = f"x = x @ {experts.text}[ids[2]]"
    return Block(text, lambda p, e, x: x @ experts.of(p)[e["ids"][2]], shape)


def _heads(draft: Draft, shape: Shape) -> Block:
    heads, width = draft.size(2), draft.size(2)
    into = draft.weight((shape[1], heads, width))
    out = draft.weight((heads, width, shape[1]))

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.sin(jnp.einsum("td,dhk->htk", x, into.of(p)))
        return jnp.einsum("htk,hkd->td", hidden, out.of(p))

    return Block(f"x = heads(x, {into.text}, {out.text})", apply, shape)


def _attention(draft: Draft, shape: Shape) -> Block:
    width = draft.size(3)
    query, key = draft.weight((shape[1], width)), draft.weight((shape[1], width))
    value = draft.weight((shape[1], shape[1]))

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        scores = jax.nn.softmax((x @ query.of(p)) @ (x @ key.of(p)).T)
        return x + scores @ (x @ value.of(p))

    return Block(f"x = x + attention({query.text}, {key.text}, {value.text})", apply, shape)


def _at_each_time(draft: Draft, shape: Shape) -> Block:
    """Blocks on vectors, mapped over time."""
    inner, by = _inner(draft, shape[1:]), draft.pick("vmap", "map")

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        at = functools.partial(inner.apply, p, e)
        return jax.vmap(at)(x) if by == "vmap" else lax.map(at, x)

    return Block(f"{by} over time ({inner.text})", apply, shape)


# ---- blocks that change the shape ---------------------------------------------------------------


def _dense(draft: Draft, shape: Shape) -> Block:
    width = draft.size(8)
    weight = draft.weight((shape[-1], width))
    return Block(f"x = x @ {weight.text}", lambda p, e, x: x @ weight.of(p), (*shape[:-1], width))


def _dense_from_the_left(draft: Draft, shape: Shape) -> Block:
    width = draft.size(8)
    weight = draft.weight((width, shape[-1]))
    return Block(
        f"x = einsum('ji,...i->...j', {weight.text}, x)",
        lambda p, e, x: jnp.einsum("ji,...i->...j", weight.of(p), x),
        (*shape[:-1], width),
    )


def _tied(draft: Draft, shape: Shape) -> Block:
    """A lookup and an output layer of the same table."""
    table = draft.weight((VOCABULARY, shape[-1]))

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        rows = table.of(p)
        found = jnp.mean(rows[e["ids"]], 0)
        return (x + jnp.broadcast_to(found, x.shape)) @ rows.T

    text = f"x = (x + mean({table.text}[ids])) @ {table.text}.T"
    return Block(text, apply, (*shape[:-1], VOCABULARY))


def _stretched(draft: Draft, shape: Shape) -> Block:
    """A vector to a sequence."""
    length = draft.size(7)
    weight = draft.weight((length,))
    text = f"x = outer({weight.text}, x)"
    return Block(text, lambda p, e, x: jnp.outer(weight.of(p), x), (length, *shape))


def _averaged(draft: Draft, shape: Shape) -> Block:
    return Block("x = mean(x, 0)", lambda p, e, x: jnp.mean(x, 0), shape[1:])


def _with_own_matrices(draft: Draft, shape: Shape) -> Block:
    """Another matrix at each time."""
    width = draft.size(3)
    weight = draft.weight((*shape, width))
    return Block(
        f"x = einsum('td,tde->te', x, {weight.text})",
        lambda p, e, x: jnp.einsum("td,tde->te", x, weight.of(p)),
        (shape[0], width),
    )


def _mixed_over_time(draft: Draft, shape: Shape) -> Block:
    length = draft.size(7)
    weight = draft.weight((shape[0], length))
    return Block(
        f"x = einsum('td,ts->sd', x, {weight.text})",
        lambda p, e, x: jnp.einsum("td,ts->sd", x, weight.of(p)),
        (length, shape[1]),
    )


def _straight_through(draft: Draft, shape: Shape) -> Block:
    """A custom_vjp that takes a parameter."""
    width = draft.size(4)
    weight = draft.weight((shape[1], width))
    return Block(
        f"x = straight_through({weight.text}, x)",
        lambda p, e, x: straight_through(weight.of(p), x),
        (shape[0], width),
    )


def _recurrent(draft: Draft, shape: Shape) -> Block:
    width = draft.size(8)
    into, across = draft.weight((shape[1], width)), draft.weight((width, width))
    bias = draft.weight((width,))
    start = draft.weight((width,)) if draft.flip() else None
    reverse, unrolled, remat = draft.flip(), draft.flip(), draft.flip()

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        def step(h: jax.Array, t: jax.Array) -> Any:
            # Scaled, or else the state would be chaotic, and rounding errors would grow with it.
            h = jnp.sin(h @ across.of(p) / math.sqrt(width) + t @ into.of(p) + bias.of(p))
            return h, h

        run = jax.checkpoint(step) if remat else step
        h = jnp.zeros(width, x.dtype) if start is None else start.of(p)
        if not unrolled:
            return lax.scan(run, h, x, reverse=reverse)[1]
        states = []
        for t in x[::-1] if reverse else x:
            h, _ = run(h, t)
            states.append(h)
        return jnp.stack(states)

    weights = ", ".join(weight.text for weight in (into, across, bias, start) if weight)
    options = ", reverse" * reverse + ", unrolled" * unrolled + ", checkpoint" * remat
    return Block(f"x = recurrent({weights}{options})", apply, (shape[0], width))


def _convolution(draft: Draft, shape: Shape) -> Block:
    *space, channels = shape
    groups = draft.pick(*sorted({1, 2 - channels % 2, channels}))
    window = tuple(draft.size(min(3, size)) for size in space)
    kernel_shape = (*window, channels // groups, groups * draft.size(2))
    kernel = draft.weight(kernel_shape)
    kind = draft.pick("SAME", "VALID", "strided", "dilated", "transposed", "uneven")
    choices: dict[str, tuple[Any, dict[str, Any]]] = {
        "SAME": ("SAME", {}),
        "VALID": ("VALID", {}),
        "strided": ("SAME", {"window_strides": (2,) * len(space)}),
        "dilated": ("SAME", {"rhs_dilation": (2,) * len(space)}),
        "transposed": ([(n - 1, n - 1) for n in window], {"lhs_dilation": (2,) * len(space)}),
        "uneven": ([(2, 0)] * len(space), {}),
    }
    padding, options = choices[kind]

    def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve(x, kernel, padding, feature_group_count=groups, **options)

    arguments = (jax.ShapeDtypeStruct(size, jnp.float32) for size in (shape, kernel_shape))
    suffix = f", {groups} groups" if groups > 1 else ""
    return Block(
        f"x = conv(x, {kernel.text}, {kind}{suffix})",
        lambda p, e, x: convolved(x, kernel.of(p)),
        jax.eval_shape(convolved, *arguments).shape,
    )


def _flattened(draft: Draft, shape: Shape) -> Block:
    """An image to a sequence of pixels."""
    pixels = (shape[0] * shape[1], shape[2])
    return Block("x = pixels(x)", lambda p, e, x: x.reshape(pixels), pixels)


# Simple ones first: a failing program shrinks towards them.
KEEPING: tuple[MakeBlock, ...] = (
    _square,
    _with_weight("x + {}", lambda x, w: x + w),
    _with_weight("{} - x", lambda x, w: w - x),
    _with_weight("x * (1 + {})", lambda x, w: x * (1 + w)),
    _with_weight("x / (1 + {}**2)", lambda x, w: x / (1 + w**2)),
    _with_weight("maximum(x, {})", jnp.maximum),
    _with_weight("minimum(x, {})", jnp.minimum),
    _with_weight("where(x > 0, x, {} * x)", lambda x, w: jnp.where(x > 0, x, w * x)),
    _with_weight("scaled_by({}, x)", lambda x, w: scaled_by(w, x)),
    _elementwise("tanh(x)", jnp.tanh),
    _elementwise("ramp(x)", ramp),
    _elementwise("clipped_backward(x)", clipped_backward),
    _elementwise("x * stop_gradient(cos(x))", lambda x: x * lax.stop_gradient(jnp.cos(x))),
    _elementwise("sort(x)", lambda x: jnp.sort(x, axis=0)),
    _elementwise("cumsum(x)", lambda x: 0.5 * jnp.cumsum(x, axis=0)),
    _layer_norm,
)
KEEPING_OF_RANK: dict[int, tuple[MakeBlock, ...]] = {
    1: (_looked_up_once,),
    2: (_looked_up, _looked_up_matrix, _heads, _attention),
    3: (),
}
HOLDING: tuple[MakeBlock, ...] = (
    _residual,
    _checkpoint,
    _jit,
    _cond,
    _switch,
    _loop,
    _carried,
    _layers,
)
HOLDING_OF_RANK: dict[int, tuple[MakeBlock, ...]] = {1: (), 2: (_at_each_time,), 3: ()}
CHANGING: tuple[MakeBlock, ...] = (_dense, _dense_from_the_left, _tied)
CHANGING_OF_RANK: dict[int, tuple[MakeBlock, ...]] = {
    1: (_stretched,),
    2: (
        _recurrent,
        _convolution,
        _mixed_over_time,
        _with_own_matrices,
        _straight_through,
        _averaged,
    ),
    3: (_convolution, _averaged, _flattened),
}


def _inner(draft: Draft, shape: Shape) -> Block:
    """One or two blocks that keep the shape, to be held by another."""
    draft.nesting += 1
    rank = len(shape)
    choices = KEEPING + KEEPING_OF_RANK[rank]
    if draft.nesting < DEEPEST:
        choices += HOLDING + HOLDING_OF_RANK[rank]
    count = draft.count(2) if draft.nesting == 1 else 1
    blocks = [draft.pick(*choices)(draft, shape) for _ in range(count)]
    draft.nesting -= 1

    def apply(p: Params, e: Any, x: jax.Array) -> jax.Array:
        for block in blocks:
            x = block.apply(p, e, x)
        return x

    return Block("; ".join(block.text for block in blocks), apply, shape)


def _outermost(draft: Draft, shape: Shape) -> Block:
    """One of all blocks."""
    rank = len(shape)
    keeping = KEEPING + KEEPING_OF_RANK[rank]
    changing = CHANGING + CHANGING_OF_RANK[rank]
    holding = HOLDING + HOLDING_OF_RANK[rank]
    return draft.pick(*draft.pick(keeping, changing, holding))(draft, shape)


def tame(x: jax.Array) -> jax.Array:
    """Bounded in the mean square, so that no program overflows, nor amplifies rounding."""
    return x * lax.rsqrt(1 + jnp.mean(x * x))


# ---- programs -----------------------------------------------------------------------------------


class Extra(NamedTuple):
    """What a loss does beside its blocks: a term, aux, options of `per_sample_grads`."""

    text: str
    term: Callable[[Params], jax.Array] | None = None
    aux: Callable[[Params, jax.Array], Any] | None = None
    options: dict[str, Any] = {}


def _decay(draft: Draft) -> Extra:
    leaf = draft.known((draft.size(3),))
    return Extra(f"loss += 0.3 * sum({leaf.text}**2)", lambda p: 0.3 * jnp.sum(leaf.of(p) ** 2))


def _alone(draft: Draft) -> Extra:
    weight = draft.weight((2, draft.size(3)))
    return Extra(f"loss += sum(sin({weight.text}))", lambda p: total(weight.of(p)))


def _unused(draft: Draft) -> Extra:
    return Extra(f"unused: {draft.leaf((draft.size(3),)).text}")


def _frozen(draft: Draft) -> Extra:
    """One leaf is frozen, another is not."""
    while len(draft.own) < 2:
        draft.leaf((1,))
    name = draft.pick(*draft.own)
    trainable = {leaf: leaf != name for leaf in draft.own}
    return Extra(f"frozen: {name}", options={"trainable": trainable})


def _aux(draft: Draft) -> Extra:
    leaf = draft.known((draft.size(3),))
    text = f"aux: x, x > 0, {leaf.text}"
    return Extra(text, aux=lambda p, x: (x, x > 0, leaf.of(p)), options={"has_aux": True})


# Freezing comes last: it names every leaf.
EXTRAS = (_decay, _alone, _unused, _aux, _frozen)


@st.composite
def programs(draw: Draw) -> Program:
    """Losses of one example with parameters, a batch, and a mask."""
    draft = Draft(draw)
    start = tuple(draft.size(largest) for largest in draft.pick((8,), (7, 8), (4, 4, 4)))
    shape, blocks = start, []
    for _ in range(draft.count(3)):
        blocks.append(_outermost(draft, shape))
        shape = blocks[-1].shape
    if not draft.own:
        blocks.append(_square(draft, shape))
    extras = [make(draft) for make in EXTRAS if draft.pick(False, False, False, True)]
    rows, seed = draft.count(5), draw(st.integers(0, 99))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=rows, max_size=rows))

    def loss_fn(p: Params, e: Any) -> Any:
        x = e["x"]
        for block in blocks:
            x = tame(block.apply(p, e, x))
        value = total(x) + sum(extra.term(p) for extra in extras if extra.term is not None)
        aux = [extra.aux(p, x) for extra in extras if extra.aux is not None]
        return (value, aux[0]) if aux else value

    rng = np.random.default_rng(seed)
    params = arrays(draft.own, rng)
    batch = arrays({"ids": Integers(VOCABULARY, (IDS,)), "x": start}, rng, (rows,))
    options = {key: value for extra in extras for key, value in extra.options.items()}
    lines = [
        f"x: {list(start)}, rows: {rows}, mask: {mask}, seed: {seed}, params: {draft.own}",
        *(block.text for block in blocks),
        *(extra.text for extra in extras),
    ]
    text = "\n".join(lines)
    # Far from zero a cosine loses a digit or two.
    tolerance, double = (2e-2, False) if "bfloat16" in text else (5e-5, True)
    case = Case(loss_fn, params, batch, options, tolerance, double)
    return Program(case, mask, text)
