"""The chain inside `shard_map` and `pmap`: the numbers of one device, noise once, or an error."""

# optax and shard_map type less than they let through.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportUnusedExpression=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxdp
from jaxdp.bounded import Bounded
from jaxdp.distributed import all_reduce, exchanged
from tests import helpers
from tests.helpers import KEY, PARAMS

DEVICES, ROWS, EXPECTED = 4, 12, 8.0
MESH = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
RNG = np.random.default_rng(0)
BATCH = jnp.asarray(RNG.normal(size=(ROWS, 2)), jnp.float32)
# Device 2 has no sample at all: its batch is empty, and it must keep in step.
MASK = jnp.array([1, 1, 0, 1, 0, 1, 0, 0, 0, 1, 1, 1], bool)


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(params["body"]["w"] @ x) @ jnp.ones(3) + params["body"]["b"]
    return jnp.sum(jnp.square(hidden * params["head"]))


GRADS = jaxdp.per_sample_grads(loss_fn)


def chain(clip: Any, *between: Any, sigma: float = 1.0) -> optax.GradientTransformation:
    noise = jaxdp.add_noise(sigma, KEY)
    return optax.chain(clip, *between, noise, optax.scale(1 / EXPECTED))


def stepped(tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, batch: Any, mask: Any) -> Any:
        return tx.update(GRADS(params, batch, mask), tx.init(params), params)[0]

    return step


def over_shards(run: Callable[..., Any], *, check_vma: bool = True, spread: bool = True) -> Any:
    rows = P("data") if spread else P()
    specs = (P(), rows, rows)
    return jax.jit(
        jax.shard_map(run, mesh=MESH, in_specs=specs, out_specs=P(), check_vma=check_vma)
    )


def by_device(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), tree)


def mapped(run: Callable[..., Any]) -> Callable[..., Any]:
    """`pmap`; all replicas must be equal to the last bit, and the first is returned."""
    over = jax.pmap(run, "data", in_axes=(None, 0, 0), devices=jax.devices()[:DEVICES])

    def call(params: Any, batch: Any, mask: Any) -> Any:
        replicas = over(params, by_device(batch), by_device(mask))
        for replica in range(1, DEVICES):
            helpers.assert_trees_equal(
                jax.tree.map(lambda leaf, r=replica: leaf[r], replicas),
                jax.tree.map(lambda leaf: leaf[0], replicas),
            )
        return jax.tree.map(lambda leaf: leaf[0], replicas)

    return call


ROADS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "shard_map": over_shards,
    "shard_map without check_vma": lambda run: over_shards(run, check_vma=False),
    "pmap": mapped,
}


@pytest.mark.sweep
@pytest.mark.parametrize("road", list(ROADS))
@pytest.mark.parametrize("clip", ["flat", "per_layer_list"])
def test_it_does_what_one_device_does(road: str, clip: str) -> None:
    """Per-layer clipping is what Opacus's two distributed per-layer optimizers do."""
    make = helpers.CLIPS[clip]
    expected = jax.jit(stepped(chain(make(helpers.THRESHOLDS))))(PARAMS, BATCH, MASK)
    tx = chain(make(helpers.THRESHOLDS), all_reduce("data"))
    got = ROADS[road](stepped(tx))(PARAMS, BATCH, MASK)
    helpers.assert_trees_close(got, expected, rtol=1e-5)


def test_a_schedule_moves_clip_and_noise_together_on_all_devices() -> None:
    def released(clip_at: Any, *between: Any) -> Any:
        tx = chain(jaxdp.clip_per_layer(clip_at), *between)

        def steps(params: Any, batch: Any, mask: Any) -> Any:
            grads, state = GRADS(params, batch, mask), tx.init(params)
            _, state = tx.update(grads, state, params)
            return tx.update(GRADS(params, batch, mask), state, params)[0]

        return steps

    def halved(step: jax.Array) -> jax.Array:
        return 0.5 ** jnp.float32(step)

    expected = jax.jit(released(halved))(PARAMS, BATCH, MASK)
    got = over_shards(released(halved, all_reduce("data")))(PARAMS, BATCH, MASK)
    helpers.assert_trees_close(got, expected, rtol=1e-5)


def test_a_logical_batch_in_two_physical_ones_is_noised_once() -> None:
    def two(*between: Any) -> Callable[..., Any]:
        behind = optax.chain(jaxdp.add_noise(1.0, KEY), optax.scale(1 / EXPECTED))
        tx = optax.chain(jaxdp.clip_flat(0.5), *between, jaxdp.accumulate(behind))

        def run(params: Any, batch: Any, mask: Any) -> Any:
            state = tx.init(params)
            first, state = tx.update(
                GRADS(params, batch, mask), state, params, is_last=jnp.array(False)
            )
            second, _ = tx.update(
                GRADS(params, 2.0 * batch, mask), state, params, is_last=jnp.array(True)
            )
            return first, second

        return run

    expected = jax.jit(two())(PARAMS, BATCH, MASK)
    got = over_shards(two(all_reduce("data")))(PARAMS, BATCH, MASK)
    helpers.assert_trees_close(got, expected, rtol=1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(got[0]))


def test_an_empty_batch_gets_noise_for_one() -> None:
    """Four draws of noise instead of one would have twice the standard deviation."""
    params = jnp.zeros(20_000)
    tx = optax.chain(jaxdp.clip_flat(2.0), all_reduce("data"), jaxdp.add_noise(3.0, KEY))
    grads_fn = jaxdp.per_sample_grads(lambda params, x: jnp.sum(params) * x)

    def run(params: Any, batch: Any, mask: Any) -> Any:
        return tx.update(grads_fn(params, batch, mask), tx.init(params), params)[0]

    nobody = jnp.zeros(ROWS, bool)
    noise = np.asarray(over_shards(run)(params, BATCH[:, 0], nobody))
    # The deviation of 20,000 draws is within 3% with probability 1 - 2e-9.
    assert 0.97 < noise.std() / 6.0 < 1.03


@pytest.mark.parametrize("road", list(ROADS))
def test_noise_for_the_sum_of_one_device_is_refused(road: str) -> None:
    with pytest.raises(ValueError, match=r"along 'data' alone. Put jaxdp.distributed.all_reduce"):
        ROADS[road](stepped(chain(jaxdp.clip_flat(1.0))))(PARAMS, BATCH, MASK)


@pytest.mark.parametrize("road", list(ROADS))
def test_a_sum_that_was_added_up_already_is_refused(road: str) -> None:
    twice = chain(jaxdp.clip_flat(1.0), all_reduce("data"), all_reduce("data"))
    with pytest.raises(ValueError, match="Each would count several times"):
        ROADS[road](stepped(twice))(PARAMS, BATCH, MASK)


def test_a_batch_that_is_the_same_on_all_devices_is_refused() -> None:
    """Its samples would count once for each device, with the noise for one."""
    once = chain(jaxdp.clip_flat(1.0), all_reduce("data"))
    with pytest.raises(ValueError, match=r"along \['data'\].* Shard the batch"):
        over_shards(stepped(once), spread=False)(PARAMS, BATCH, MASK)


def test_samples_that_all_devices_share_are_not_taken_for_parts_of_a_model() -> None:
    """Parameters cast to varying make gradients that vary; the batch is still the same on all. Four
    copies, each clipped to half the threshold, would move the sum by twice the sensitivity."""
    once = stepped(chain(jaxdp.clip_flat(1.0), all_reduce("data")))

    def run(params: Any, batch: Any, mask: Any) -> Any:
        return once(jax.lax.pcast(params, "data", to="varying"), batch, mask)

    with pytest.raises(ValueError, match="Each would count several times"):
        over_shards(run, spread=False)(PARAMS, BATCH, MASK)


def test_gradients_given_as_arrays_must_say_where_the_samples_are() -> None:
    """Taken for parts of one model, their norms would be added up over samples."""
    clip = jaxdp.clip_flat(1.0)

    def run(grads: Any) -> Any:
        return clip.update(grads, clip.init(PARAMS))[0]

    split = jax.shard_map(run, mesh=MESH, in_specs=P("data"), out_specs=P())
    with pytest.raises(ValueError, match=r"differ along \['data'\] may be of other samples"):
        split(helpers.small_grads(8))


def test_a_sum_of_one_device_is_not_noised_outside_either() -> None:
    clip = jaxdp.clip_flat(1.0)

    def clipped(params: Any, batch: Any, mask: Any) -> Any:
        return clip.update(GRADS(params, batch, mask), clip.init(params))[0]

    total = over_shards(clipped, check_vma=False)(PARAMS, BATCH, MASK)
    noise = jaxdp.add_noise(1.0, KEY)
    for bounded in (total, total * 0.5):
        with pytest.raises(ValueError, match="along 'data' alone"):
            noise.update(bounded, noise.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="of one device or both of all devices, got one of each"):
        total + Bounded(total.value, total.sensitivity, total.groups)


def test_an_adaptive_clip_counts_the_samples_of_all_devices() -> None:
    def thresholds(*between: Any) -> Callable[..., Any]:
        clip = helpers.adaptive(0.5)
        tx = optax.chain(clip, *between, jaxdp.add_noise(1.0, KEY))

        def run(params: Any, batch: Any, mask: Any) -> Any:
            updates, state = tx.update(GRADS(params, batch, mask), tx.init(params), params)
            return updates, state[0].thresholds

        return run

    expected = jax.jit(thresholds())(PARAMS, BATCH, MASK)
    got = over_shards(thresholds(all_reduce("data")))(PARAMS, BATCH, MASK)
    helpers.assert_trees_close(got, expected, rtol=1e-5)
    with pytest.raises(NotImplementedError, match=r"cannot see along \['data'\]. Use jit"):
        mapped(thresholds(all_reduce("data")))(PARAMS, BATCH, MASK)


def test_gradients_without_clipping_take_the_same_road() -> None:
    def run(*between: Any) -> Callable[..., Any]:
        grads_fn = jaxdp.lipschitz.bounded_grads(lambda w, x: jnp.tanh(w @ x), 1.0)
        tx = optax.chain(*between, jaxdp.add_noise(1.0, KEY, "per_layer"))

        def updates(params: Any, batch: Any, mask: Any) -> Any:
            return tx.update(grads_fn(params, batch, mask), tx.init(params), params)[0]

        return updates

    w = jnp.array([0.5, -1.0])
    expected = jax.jit(run())(w, BATCH, MASK)
    for road in ROADS.values():
        helpers.assert_trees_close(road(run(all_reduce("data")))(w, BATCH, MASK), expected)


def test_a_layer_with_a_loop_needs_no_word_inside_shard_map() -> None:
    layer = jaxdp.nn.lstm(2, 4)
    params, x = layer.init(KEY), jnp.stack([BATCH, -BATCH, BATCH], axis=1)
    grads_fn = jaxdp.per_sample_grads(lambda p, x: jnp.sum(layer.apply(p, x)[0]))

    def run(*between: Any) -> Callable[..., Any]:
        tx = chain(jaxdp.clip_flat(0.1), *between)
        return lambda p, x, mask: tx.update(grads_fn(p, x, mask), tx.init(p), p)[0]

    expected = jax.jit(run())(params, x, MASK)
    helpers.assert_trees_close(over_shards(run(all_reduce("data")))(params, x, MASK), expected)


def test_two_axes_of_samples_are_one_sum() -> None:
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(2, 2), ("replica", "data"))
    tx = chain(jaxdp.clip_flat(1.0), all_reduce("replica", "data"))
    rows = P(("replica", "data"))
    split = jax.shard_map(stepped(tx), mesh=mesh, in_specs=(P(), rows, rows), out_specs=P())
    expected = jax.jit(stepped(chain(jaxdp.clip_flat(1.0))))(PARAMS, BATCH, MASK)
    helpers.assert_trees_close(jax.jit(split)(PARAMS, BATCH, MASK), expected, rtol=1e-5)


@pytest.mark.anew
def test_devices_exchange_the_gradients_once() -> None:
    tx = chain(jaxdp.clip_per_layer(1.0), all_reduce("data"))
    lowered = over_shards(stepped(tx)).lower(PARAMS, BATCH, MASK)
    entries = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    assert exchanged(lowered.compile()) == {"all-reduce": entries}


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="needs the axis along which samples are spread, got none"):
        all_reduce()
    reduce = all_reduce("data")
    with pytest.raises(TypeError, match="takes the jaxdp.Bounded of a clip, got dict. Put it"):
        reduce.update(PARAMS, reduce.init(PARAMS), PARAMS)
