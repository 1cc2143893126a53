"""`Bounded`: what it may cross, what it may be combined with, and what it refuses."""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false
# pyright: reportUnusedExpression=false

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxdp
from jaxdp.bounded import Bounded
from tests import helpers
from tests.helpers import KEY

VALUE = {"a": jnp.array([1.0, -2.0]), "b": jnp.ones((2, 3)), "count": jnp.arange(2)}
GROUPS = (0, 1, None)


def bounded(scale: float = 1.0) -> Bounded:
    value = jax.tree.map(lambda leaf: leaf * scale if helpers.is_float(leaf) else leaf, VALUE)
    return Bounded(value, jnp.array([3.0, 4.0]), GROUPS)


def test_the_total_sensitivity_is_the_root_of_the_sum_of_squares() -> None:
    assert float(bounded().total_sensitivity) == 5.0
    assert float(Bounded(jnp.ones(3), 2.5).total_sensitivity) == 2.5


def test_without_groups_every_float_leaf_is_in_one_and_integers_in_none() -> None:
    assert Bounded(VALUE, 1.0).groups == (0, 0, None)


CROSSINGS: dict[str, Callable[[Bounded], Bounded]] = {
    "jit": jax.jit(lambda b: b),
    "scan": lambda b: jax.lax.scan(lambda carry, _: (carry, None), b, None, length=2)[0],
    "cond": lambda b: jax.lax.cond(jnp.array(True), lambda x: x, lambda x: x * 2.0, b),
    "while": lambda b: jax.lax.fori_loop(0, 2, lambda _, x: x, b),
    "shard_map": lambda b: jax.shard_map(
        lambda x: x, mesh=jax.make_mesh((2,), ("i",)), in_specs=P(), out_specs=P()
    )(b),
    "vmap": lambda b: jax.tree.map(
        lambda leaf: leaf[1], jax.vmap(lambda _, x: x, (0, None))(jnp.arange(2), b)
    ),
    "device_put": lambda b: jax.device_put(b, jax.devices()[1]),
}


@pytest.mark.parametrize("crossing", list(CROSSINGS))
def test_it_crosses_transformations_unchanged(crossing: str) -> None:
    got = CROSSINGS[crossing](bounded())
    assert isinstance(got, Bounded)
    assert got.groups == GROUPS
    helpers.assert_trees_equal(got.value, VALUE)
    helpers.assert_trees_equal(got.sensitivity, jnp.array([3.0, 4.0]))


def test_after_a_crossing_it_still_refuses_arithmetic() -> None:
    for crossing in CROSSINGS.values():
        with pytest.raises(TypeError, match="put jaxdp.add_noise"):
            crossing(bounded()) / 2.0


def test_a_clip_inside_shard_map_sums_over_devices_with_the_sensitivity_of_one() -> None:
    """Each sample lies on one device: the sum of the devices' sums moves by C at most."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    clip = jaxdp.clip_flat(1.0)
    rows = helpers.small_grads(8)

    def local(shard: Any) -> Bounded:
        # The mask says that devices along "data" hold other samples, not other parts of a model.
        mask = jax.lax.pcast(jnp.ones(2, bool), "data", to="varying")
        grads = jaxdp.PerSampleGrads.from_arrays(shard, mask)
        total, _ = clip.update(grads, clip.init(helpers.PARAMS))  # pyright: ignore[reportArgumentType]
        return Bounded(jax.lax.psum(total.value, "data"), total.sensitivity, total.groups)

    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P()))(rows)
    helpers.assert_trees_close(got, clip.update(rows, clip.init(helpers.PARAMS))[0])


def test_a_clip_under_vmap_bounds_each_of_the_models() -> None:
    clip = jaxdp.clip_flat(1.0)
    rows = jax.tree.map(lambda leaf: jnp.stack([leaf, 2.0 * leaf]), helpers.small_grads(3))
    both = jax.jit(jax.vmap(lambda g: clip.update(g, clip.init(helpers.PARAMS))[0]))(rows)

    def of(model: int, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[model], tree)

    for model in range(2):
        one, _ = clip.update(of(model, rows), clip.init(helpers.PARAMS))
        helpers.assert_trees_close(of(model, both), one)


def test_adding_disjoint_sums_adds_values_and_keeps_the_larger_sensitivity() -> None:
    other = Bounded(VALUE, jnp.array([1.0, 7.0]), GROUPS)
    total = bounded() + other
    helpers.assert_trees_close(total.value, jax.tree.map(lambda leaf: leaf + leaf, VALUE))
    assert total.sensitivity.tolist() == [3.0, 7.0]
    assert total.groups == GROUPS


@pytest.mark.parametrize("factor", [0.5, 2, -3.0, jnp.float32(0.25), np.float32(4.0)])
def test_scaling_acts_on_value_and_sensitivity_alike(factor: Any) -> None:
    jitted = jax.jit(lambda b: b * factor)
    for scaled in (bounded() * factor, factor * bounded(), jitted(bounded())):
        helpers.assert_trees_close(scaled.value, bounded(float(factor)).value)
        expected = [3.0 * abs(float(factor)), 4.0 * abs(float(factor))]
        assert scaled.sensitivity.tolist() == expected


def test_leaves_without_a_group_are_not_scaled() -> None:
    assert (bounded() * 3.0).value["count"].tolist() == [0, 1]


REFUSED: dict[str, Callable[[Bounded], Any]] = {
    "add an array": lambda b: b + jnp.ones(2),
    "add to an array": lambda b: jnp.ones(2) + b,
    "add to zero": lambda b: sum([b, b]),
    "subtract": lambda b: b - b,
    "subtract from": lambda b: 1.0 - b,
    "divide": lambda b: b / 2.0,
    "divide by": lambda b: 1.0 / b,
    "power": lambda b: b**2,
    "multiply two": lambda b: b * b,
    "scale by an array": lambda b: b * jnp.ones(2),
}


@pytest.mark.parametrize("operation", list(REFUSED))
def test_other_arithmetic_says_what_is_missing(operation: str) -> None:
    with pytest.raises(TypeError, match=r"cannot combine .* with Bounded: .* jaxdp.add_noise"):
        REFUSED[operation](bounded())


# How a transformation picks the leaves that it changes.
PICKED: dict[str, Callable[[Any, Any], bool]] = {
    "path": lambda path, _: "'b'" in jax.tree_util.keystr(path),
    "number of axes": lambda _, leaf: leaf.ndim > 0,
    "size": lambda _, leaf: leaf.size > 1,
    "large size": lambda _, leaf: leaf.size > 5,
    "shape": lambda _, leaf: leaf.shape == (3, 2),
    "dtype": lambda _, leaf: jnp.issubdtype(leaf.dtype, jnp.floating),
    "dtype and shape": lambda _, leaf: helpers.is_float(leaf) and leaf.ndim > 0,
}


def _scale_some(b: Bounded, picked: Callable[[Any, Any], bool]) -> Bounded:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 10 if picked(path, leaf) else leaf, b
    )


def _scaling(picked: Callable[[Any, Any], bool]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        del params
        return _scale_some(updates, picked)

    return optax.stateless(update)


MAPS: dict[str, Callable[[Bounded], Any]] = {
    "scale": lambda b: jax.tree.map(lambda leaf: leaf * 2, b),
    "scale under jit": jax.jit(lambda b: jax.tree.map(lambda leaf: leaf * 2, b)),
    "clip": lambda b: jax.tree.map(lambda leaf: jnp.clip(leaf, -1, 1), b),
    "norm": lambda b: jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(b))),
    "psum": lambda b: jax.vmap(lambda _: jax.lax.psum(b, "i"), axis_name="i")(jnp.arange(2)),
    "grad": lambda b: jax.grad(lambda x: jnp.sum(x.value["a"]))(b),
    **{
        f"scale by {name}": functools.partial(_scale_some, picked=picked)
        for name, picked in PICKED.items()
    },
    "scale by path under jit": jax.jit(functools.partial(_scale_some, picked=PICKED["path"])),
    "factor by path": lambda b: jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (10 if PICKED["path"](path, leaf) else 1), b
    ),
    "scale by size, with the rest copied": lambda b: jax.tree.map(
        lambda leaf: leaf * 10 if leaf.size > 1 else jnp.copy(leaf), b
    ),
    "flags of numpy": lambda b: jax.tree.map(lambda leaf: np.prod(leaf.shape) > 1, b),
}


@pytest.mark.parametrize("name", list(MAPS))
def test_a_map_over_its_leaves_cannot_change_the_value_behind_the_sensitivity(name: str) -> None:
    with pytest.raises((TypeError, NotImplementedError)):
        MAPS[name](Bounded({"a": jnp.ones((3, 2)), "b": jnp.ones(())}, 1.0))


def test_a_bounded_is_no_array() -> None:
    with pytest.raises(TypeError):
        jnp.asarray(bounded())
    with pytest.raises(TypeError):
        jnp.sum(bounded())  # pyright: ignore[reportArgumentType]


def test_bounded_of_different_clips_cannot_be_added() -> None:
    with pytest.raises(ValueError, match="must have the same groups, .* Add sums of the same clip"):
        bounded() + Bounded(VALUE, 1.0)


@pytest.mark.parametrize(
    ("sensitivity", "groups", "message"),
    [
        (1.0, (0,), "one group per leaf, got 1 groups for 3 leaves"),
        (jnp.ones((2, 2)), GROUPS, r"one number for each group of leaves, got shape \(2, 2\)"),
        (1.0, GROUPS, r"got shape \(\) for groups \[0, 1\]"),
        (jnp.ones(2), (0, -1, None), r"got shape \(2,\) for groups \[-1, 0\]"),
    ],
)
def test_groups_and_sensitivity_that_do_not_fit_are_refused(
    sensitivity: Any, groups: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Bounded(VALUE, sensitivity, groups)


def test_its_repr_says_that_noise_is_missing() -> None:
    assert "put jaxdp.add_noise(...)" in repr(bounded())


@pytest.mark.parametrize("params", [helpers.PARAMS, jnp.ones(3)], ids=["tree", "single_array"])
@pytest.mark.parametrize(
    "optimizer",
    {
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "adam": optax.adam(0.1),
        "adamw": optax.adamw(0.1),
        "scale": optax.scale(0.1),
        "clip": optax.clip(1.0),
        "weight_decay": optax.add_decayed_weights(0.1),
        "ema": optax.ema(0.9),
        "sign": optax.scale_by_sign(),
    }.items(),
    ids=lambda item: item[0],
)
def test_an_optimizer_right_behind_a_clip_says_that_noise_is_missing(
    optimizer: Any, params: Any
) -> None:
    """Structure and dtype errors are JAX's; the names in them are jaxdp's."""
    tx = optax.chain(jaxdp.clip_flat(1.0), optimizer[1])
    rows = jax.tree.map(lambda leaf: jnp.ones((2, *leaf.shape)), params)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises((TypeError, ValueError), match=r"jaxdp.*add_noise"):
            update(rows, tx.init(params), params)


@pytest.mark.parametrize(
    "between",
    [
        optax.clip_by_global_norm(1.0),
        optax.clip(1.0),
        optax.scale(100.0),
        optax.trace(0.9),
        optax.normalize_by_update_norm(),
        *map(_scaling, PICKED.values()),
        optax.masked(optax.scale(10.0), functools.partial(jax.tree.map, helpers.is_float)),
        optax.masked(optax.scale(10.0), lambda tree: jax.tree.map(lambda x: np.ndim(x) > 0, tree)),
        optax.masked(
            optax.scale(10.0), lambda tree: jax.tree.map(lambda x: np.prod(x.shape) > 1, tree)
        ),
    ],
)
def test_nothing_may_stand_between_clip_and_noise(between: Any) -> None:
    tx = optax.chain(jaxdp.clip_flat(1.0), between, jaxdp.add_noise(1.0, KEY))
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        tx.update(helpers.small_grads(2), tx.init(helpers.PARAMS), helpers.PARAMS)


@pytest.mark.parametrize("params", [helpers.PARAMS, jnp.ones(3)], ids=["tree", "single_array"])
def test_apply_updates_refuses_a_sum_without_noise(params: Any) -> None:
    tx = jaxdp.clip_flat(1.0)
    rows = jax.tree.map(lambda leaf: jnp.ones((2, *leaf.shape)), params)
    total, _ = tx.update(rows, tx.init(params))
    with pytest.raises((TypeError, ValueError), match=r"put jaxdp.add_noise"):
        optax.apply_updates(params, total)  # pyright: ignore[reportArgumentType]
