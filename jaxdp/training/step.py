"""The train state and the jitted step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxdp.bounded import Bounded, Groups, taken_whole
from jaxdp.checks import check_bool, check_callable, check_instance
from jaxdp.engine import walker
from jaxdp.engine.liveness import UNHEARD, live_paths
from jaxdp.engine.walker import Equation, Path
from jaxdp.gathering import emptied
from jaxdp.per_sample import PerSampleGrads
from jaxdp.problem import check_arrays, merged_tree, with_gradient
from jaxdp.released import (
    Released,
    check_whole,
    executed_noise_multipliers,
    initial_state,
    noise_steps,
)
from jaxdp.training.foresight import Ahead, nobody
from jaxdp.trees import path_name


class TrainState(NamedTuple):
    """All that training changes, a pytree.

    Attributes:
      step: logical steps executed, int32 scalar.
      params: the parameters.
      opt_state: state of the optax chain; the noise keys live here.
      key: randomness of the model (dropout), see `example_keys` of `make_step`; not of the noise.

    Example:
      >>> import jax.numpy as jnp
      >>> state = init({"w": jnp.zeros(2)}, optax.sgd(0.1))
      >>> print(state.step, state.params["w"])
      0 [0. 0.]
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    key: jax.Array


class StepMetrics(NamedTuple):
    """What one physical batch looked like. NOT private: for the operator's eyes.

    Attributes:
      loss_sum: Σ of the losses of its samples, float scalar.
      samples: how many rows held a sample, int32 scalar. The realised batch size is a secret.
      nonfinite: how many samples counted for nothing, their gradient not being finite, int32.
      noise_multipliers: of the Gaussians that the last logical step released, float32 [R], read
        from the state behind this batch: what a ledger must hold. Public.
      noise_steps: the step that the noise of each comes to next, int32 [R], read there, too: one
        further than the draw that was made last. Public.

    Example:
      >>> import jax.numpy as jnp
      >>> counts = {"samples": jnp.int32(2), "nonfinite": jnp.int32(0)}
      >>> noise = {"noise_multipliers": jnp.ones(1), "noise_steps": jnp.array([1])}
      >>> metrics = StepMetrics(jnp.float32(3), **counts, **noise)
      >>> print(metrics.loss_sum, metrics.samples)
      3.0 2
    """

    loss_sum: jax.Array
    samples: jax.Array
    nonfinite: jax.Array
    noise_multipliers: jax.Array
    noise_steps: jax.Array


class Step(NamedTuple):
    """A compiled training step.

    Attributes:
      run: `(state, batch, mask, is_last) -> (state, StepMetrics)`. The state given is consumed:
        its buffers are reused.
      noise_multipliers: `(state, batch) -> float32 [R]`, of the R Gaussians that the coming
        logical step will release, for the ledger. Runs nothing but the schedules: of `batch` only
        the shapes matter. Callbacks and prints in the chain are not executed for it, unless they
        stand in a loop, a branch or a block with the noise itself; those see other noise, and no
        sum.
      ahead: tells the noise of many coming steps at once; None where nobody can.

    Example:
      >>> import jax, jax.numpy as jnp, jaxdp
      >>> tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, jax.random.key(0)))
      >>> step = make_step(jaxdp.per_sample_grads(lambda params, x: params @ x), tx)
      >>> mask = jnp.ones(3, bool)
      >>> state, metrics = step.run(init(jnp.ones(2), tx), jnp.ones((3, 2)), mask, True)
      >>> print(state.step, metrics.samples)
      1 3
    """

    run: Callable[[TrainState, Any, ArrayLike, ArrayLike], tuple[TrainState, StepMetrics]]
    noise_multipliers: Callable[[TrainState, Any], jax.Array]
    ahead: Ahead | None = None


_CHAIN = "Pass the optax chain: a clip, jaxdp.add_noise, an optimizer."


def init(
    params: optax.Params, tx: optax.GradientTransformation, key: jax.Array | None = None
) -> TrainState:
    """The state before the first step.

    Everything is copied, since a step reuses the buffers of the state it is given.

    Args:
      params: the parameters, any pytree.
      tx: the optax chain.
      key: randomness of the model, of threefry (`jax.random.key(seed, impl="threefry2x32")`), whose
        keys draw apart from each other in a batch; default that of seed 0.

    Returns:
      A state with copies of the parameters, after zero steps.

    Raises:
      TypeError: a parameter is a random key, or an attribute that is a Python number.
      ValueError: the state of the chain hides a noised release, see `jaxdp.released`.

    Example:
      >>> import jax.numpy as jnp
      >>> int(init({"w": jnp.zeros(2)}, optax.sgd(0.1)).step)
      0
    """
    check_arrays(params)
    check_instance("tx", tx, optax.GradientTransformation, advice=_CHAIN)
    key = jax.random.key(0, impl="threefry2x32") if key is None else key
    state = TrainState(jnp.zeros((), jnp.int32), params, initial_state(tx.init, params), key)
    return jax.tree.map(jnp.copy, state)


def make_step(
    grads_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    example_keys: bool = False,
) -> Step:
    """Compiles one training step: per-sample gradients, then the chain, then the update.

    Args:
      grads_fn: from `jaxdp.per_sample_grads`, or from `jaxdp.lipschitz.bounded_grads` with
        `with_losses=True`.
      tx: the optax chain: a clip, then `jaxdp.add_noise` (inside `jaxdp.accumulate` where logical
        batches may overflow the physical batch), then any optimizer. Bounded gradients need no
        clip.
      example_keys: give the loss a fresh key for each sample: its example is then the pair
        `(example, key)`.

    Returns:
      The compiled `Step`; `run` compiles once per shape of the batch. Integer leaves, and those
      that `grads_fn` holds fixed (`trainable`), stay as they are, whatever the chain makes of them.

    Raises:
      TypeError: (when run) `grads_fn` returns neither per-sample gradients nor a `Bounded` with
        losses; something in the chain takes the `Bounded` of the clip apart, such as a wrapper of
        optax around `jaxdp.add_noise`.
      ValueError: (when run) nothing in the chain draws noise, or the state hides what draws it, see
        `jaxdp.released`; an update has not the shape of its parameter.

    Example:
      >>> import jax, jax.numpy as jnp, jaxdp
      >>> loss_fn = lambda params, example: (params @ example) ** 2
      >>> tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, jax.random.key(0)),
      ...                  optax.sgd(0.1))
      >>> step = make_step(jaxdp.per_sample_grads(loss_fn), tx)
      >>> state, batch = init(jnp.ones(2), tx), jnp.ones((3, 2))
      >>> step.noise_multipliers(state, batch).tolist()
      [1.0]
      >>> state, metrics = step.run(state, batch, jnp.array([True, True, False]), True)
      >>> int(state.step), int(metrics.samples), float(metrics.loss_sum)
      (1, 2, 8.0)
    """
    check_callable("grads_fn", grads_fn, advice="Pass jaxdp.per_sample_grads(loss_fn).")
    check_instance("tx", tx, optax.GradientTransformation, advice=_CHAIN)
    check_bool("example_keys", example_keys, advice="Say whether examples come with a key.")
    chain = optax.with_extra_args_support(tx)

    def with_keys(batch: Any, key: jax.Array) -> Any:
        if not example_keys:
            return batch
        return batch, jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])

    def run(
        state: TrainState, batch: Any, mask: jax.Array, is_last: ArrayLike
    ) -> tuple[TrainState, StepMetrics]:
        key, rows_key = jax.random.split(state.key)
        returned = grads_fn(state.params, with_keys(batch, rows_key), mask)
        grads = _grads(returned)
        with taken_whole():
            updates, opt_state = chain.update(grads, state.opt_state, state.params, is_last=is_last)
        multipliers = _multipliers(updates, opt_state)
        params = _updated(state.params, updates, grads.groups)
        losses, nonfinite = _losses(returned, mask)
        metrics = StepMetrics(
            loss_sum=jnp.sum(losses),
            samples=jnp.sum(mask, dtype=jnp.int32),
            nonfinite=nonfinite,
            noise_multipliers=_in_a_row(multipliers),
            noise_steps=_in_a_row(noise_steps(opt_state)),
        )
        step = state.step + jnp.asarray(is_last, jnp.int32)
        return TrainState(step, params, opt_state, key), metrics

    def after(
        state: TrainState, batch: Any, mask: jax.Array, endings: Sequence[bool]
    ) -> list[optax.OptState]:
        """The state of the chain behind a physical batch, for each value of `is_last`. The chain
        itself says what it is about to release: a second definition could disagree with it."""
        returned = grads_fn(state.params, with_keys(batch, state.key), mask)
        states: list[optax.OptState] = []
        for is_last in endings:
            with taken_whole():
                updates, opt_state = chain.update(
                    _grads(returned), state.opt_state, state.params, is_last=is_last
                )
            check_whole(tx.init, state.params, state.opt_state, opt_state)
            _multipliers(updates, opt_state)
            states.append(opt_state)
        return states

    def coming(state: TrainState, batch: Any) -> jax.Array:
        # What the chain may do besides must not see the coming noise alone, and later with the
        # sum: nothing raw goes in, and other noise is drawn.
        empty, key = jax.tree.map(jnp.zeros_like, (batch, state.key))
        asked = state._replace(opt_state=_rehearsed(state.opt_state), key=key)
        [opt_state] = after(asked, empty, nobody(batch), [True])
        return jnp.stack(executed_noise_multipliers(opt_state))

    def noise_multipliers(state: TrainState, batch: Any) -> jax.Array:
        return _quietly(coming, state, batch)

    jitted = jax.jit(run, donate_argnums=0)
    return Step(jitted, jax.jit(noise_multipliers), Ahead.of(jitted, after))


def _multipliers(updates: Any, opt_state: optax.OptState) -> list[jax.Array]:
    """Those of what a chain has released. Where its updates are still sums of samples, what its
    state tells is of something else, such as the count of an adaptive clip."""
    released = executed_noise_multipliers(opt_state)
    if not released or any(map(_is_raw, jax.tree.leaves(updates, is_leaf=_is_raw))):
        raise ValueError(
            "the chain must draw noise to be private, got neither jaxdp.add_noise nor another "
            "noised release of the gradients. Put jaxdp.add_noise(...) behind the clip."
        )
    return released


def _in_a_row(numbers: list[jax.Array]) -> jax.Array:
    """Of every release, and of every member where a state has several, float32 or int32 [R]."""
    return jnp.concatenate([jnp.ravel(each) for each in numbers])


def _is_raw(node: Any) -> bool:
    return isinstance(node, PerSampleGrads | Bounded)


def _quietly(fun: Callable[..., Any], *arguments: Any) -> Any:
    """`fun(*arguments)` and nothing else: what its result does not depend on, such as callbacks and
    prints of the user's, is traced but not executed. Within a loop, a branch or a block that the
    result does come out of, they are."""
    program, structure = walker.trace(fun, *arguments)
    needed = [True] * len(program.returns)
    live = live_paths(program, needed, unheard=UNHEARD | {"IOEffect", "OrderedIOEffect"})

    def rule(path: Path, eqn: Equation, values: list[Any]) -> Sequence[Any]:
        return eqn.bind(values) if path in live else [None] * len(eqn.outputs)

    results = walker.evaluate(program, jax.tree.leaves(arguments), rule)
    return jax.tree.unflatten(structure, results)


def _rehearsed(opt_state: optax.OptState) -> optax.OptState:
    """A state with other noise to come, and no sums or counts of samples."""

    def replaced(node: Any) -> Any:
        return node.rehearsed() if isinstance(node, Released) else node

    empty = emptied(opt_state)
    return jax.tree.map(replaced, empty, is_leaf=lambda node: isinstance(node, Released))


def _grads(returned: Any) -> Any:
    """What goes into the chain: a handle, or a `Bounded` beside its losses."""
    grads = returned[0] if isinstance(returned, tuple) and len(returned) == 2 else returned
    if not _is_raw(grads) or isinstance(returned, Bounded):
        raise TypeError(
            "grads_fn must return jaxdp.PerSampleGrads, or a Bounded and its losses, got "
            f"{type(returned).__name__}. Take it from jaxdp.per_sample_grads(loss_fn), or from "
            "jaxdp.lipschitz.bounded_grads(loss_fn, ..., with_losses=True)."
        )
    return grads


def _updated(params: Any, updates: Any, groups: Groups) -> Any:
    """The parameters after the update; leaves that no gradient moves are what they were, where
    weight decay, say, would change them."""
    paths = jax.tree.leaves_with_path(params)
    for (path, leaf), update in zip(paths, jax.tree.leaves(updates), strict=True):
        if jnp.shape(update) != jnp.shape(leaf):
            raise ValueError(
                "an update must have the shape of its parameter, got "
                f"{jnp.shape(update)} for {path_name(path)} "
                f"of shape {jnp.shape(leaf)}. Let every leaf pass the clip and jaxdp.add_noise, "
                "which a branch of optax.partition or optax.masked may lack."
            )
    moved = with_gradient(jax.tree.leaves(optax.apply_updates(params, updates)), groups)
    return merged_tree(params, groups, moved, lambda leaf: leaf)


def _losses(returned: Any, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Losses `[B]`, and how many samples are not finite. A handle is asked after the chain, whose
    pass it remembers."""
    if not isinstance(returned, tuple):
        return returned.losses, returned.nonfinite
    _, losses = returned
    return losses, jnp.sum(mask & ~jnp.isfinite(losses), dtype=jnp.int32)
