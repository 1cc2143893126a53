"""Which noise many coming steps will release, read off the chain's own program in one question.

What a step must be charged with follows from a few numbers of the state: the counter of a schedule,
and the keys. `Ahead` finds out which, by following every value of the program back to what it is
computed from. Where these numbers follow from each other alone, and from no batch and no
parameter, they are known for as many steps as one likes. Where they do not, or where the host is
asked or told, nobody can know, and the loop asks before each step.

The numbers of all steps are computed at once: guessed, as counters that count, and proved. If each
guess is what the chain makes of the one before, all of them are right, by induction; and if a part
of a logical batch that is not the last leaves them alone, in how many parts a batch comes changes
nothing. Steps behind the first guess that fails are not foreseen.
"""

# The types of JAX and optax are partly unknown.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.accumulation import AccumulateState
from jaxdp.engine import walker
from jaxdp.engine.liveness import live_paths
from jaxdp.engine.walker import Equation, Path, Program
from jaxdp.released import Released

LANES = 512
"""How many steps one question is for."""

# What the host answers may change from one question to the next.
_HOST = -1

# Leaves with more numbers than this are no counters.
_LARGEST = 64

# state, batch, mask, values of is_last -> the states of the chain behind the batch
After = Callable[[Any, Any, jax.Array, Sequence[bool]], list[Any]]


class Foreseen(NamedTuple):
    """What is known of steps, each in the lane of its number modulo `LANES`.

    Attributes:
      noise_multipliers: of the Gaussians that they release, float32 [LANES, R].
      counters: the steps of their noise, int32 [LANES, R].
      known: how many steps are foreseen, int32 scalar.
    """

    noise_multipliers: jax.Array
    counters: jax.Array
    known: jax.Array


@dataclass(frozen=True)
class Ahead:
    """Tells the noise of coming steps.

    Attributes:
      run: the step that it tells of; of another one, such as one that wraps it, it knows nothing.
      foresee: `(state, batch, first, count) -> Foreseen`, of `count` ≤ `LANES` steps from the
        logical step `first` on; or None. Of the batch only the shapes matter, and nothing of a
        step is executed.
    """

    run: Callable[..., Any]
    foresee: Callable[[Any, Any, int, int], Foreseen | None]

    @classmethod
    def of(cls, run: Callable[..., Any], after: After) -> "Ahead":
        """Tells of a step.

        Args:
          run: the step.
          after: what its chain makes of its state: `(state, batch, mask, values of is_last) -> the
            states of the chain behind the batch`.
        """

        def foresee(state: Any, batch: Any, first: Any, count: Any) -> Foreseen | None:
            chain = _Chain.of(after, state, batch)
            return None if chain is None else _foreseen(chain, state.opt_state, first, count)

        return cls(run, jax.jit(foresee))


@dataclass(frozen=True)
class _Chain:
    """How a few leaves of the chain's state follow from each other.

    Attributes:
      program: leaves of state and batch -> leaves of the chain's state behind the last part of a
        logical batch, and behind another one where there are such.
      held: which leaves of the chain's state follow from each other.
      released: the places of multiplier, counter and key of every release, among `held`.
      states: how many states come out of the program.
    """

    program: Program
    held: list[int]
    released: list[Released]
    states: int

    @classmethod
    def of(cls, after: After, state: Any, batch: Any) -> "_Chain | None":
        """Of a chain, or None where what it releases depends on anything else."""
        # Without it, a logical batch has one part.
        endings = [True, False] if _nodes(state.opt_state, AccumulateState) else [True]
        def behind(opt_state: Any, others: Any) -> list[Any]:
            params, key, batch, mask = others
            asked = state._replace(params=params, opt_state=opt_state, key=key)
            return after(asked, batch, mask, endings)

        leaves, structure = jax.tree.flatten(state.opt_state)
        others = state.params, state.key, batch, nobody(batch)
        program, _ = walker.trace(behind, state.opt_state, others)
        if [_form(each) for each in program.outputs] != [
            _form(leaf) for _ in endings for leaf in leaves
        ]:
            return None
        places = jax.tree.unflatten(structure, range(len(leaves)))
        released = _nodes(places, Released)
        of_releases = {leaf for each in released for leaf in jax.tree.leaves(each)}
        held = _closed(_sources(program), of_releases, len(leaves))
        if held is None or any(leaves[leaf].size > _LARGEST for leaf in held):
            return None
        if any(leaves[each.step].ndim for each in released):  # of several members
            return None
        ordered = sorted(held)
        among = [jax.tree.map(ordered.index, each) for each in released]
        return cls(program, ordered, among, len(endings))

    def behind(self, values: Sequence[Any]) -> list[list[Any]]:
        """The leaves that are held behind the last part of a batch, and behind another part,
        computed from these leaves and from nothing else."""
        count = len(self.program.outputs) // self.states
        args: list[Any] = [None] * len(self.program.inputs)
        for place, value in zip(self.held, values, strict=True):
            args[place] = value
        starts = [part * count for part in range(self.states)]
        outputs = _evaluated(self.program, args, {s + place for s in starts for place in self.held})
        return [[outputs[start + place] for place in self.held] for start in starts]


def nobody(batch: Any) -> jax.Array:
    """The mask of a batch without samples."""
    return jnp.zeros(jax.tree.leaves(batch)[0].shape[:1], bool)


def _form(leaf: Any) -> tuple[Any, Any]:
    return leaf.shape, leaf.dtype


def _nodes(tree: Any, kind: type) -> list[Any]:
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


def _sources(program: Program) -> list[frozenset[int]]:
    """Of each output, the inputs that it is computed from."""

    def rule(path: Path, eqn: Equation, values: list[frozenset[int]]) -> list[frozenset[int]]:
        # Which members of a `vmap` share a key is asked by a function that reads its operands only
        # there; here is none.
        if (body := eqn.custom_vmap) is not None:
            return walker.evaluate(body, values, rule, lift=_nothing)
        source = frozenset[int]().union(*values)
        return [source | {_HOST} if _asks_the_host(eqn) else source] * len(eqn.outputs)

    inputs = [frozenset({index}) for index in range(len(program.inputs))]
    return walker.evaluate(program, inputs, rule, lift=_nothing)


def _nothing(constant: Any) -> frozenset[int]:
    return frozenset()


def _asks_the_host(eqn: Equation) -> bool:
    nested = [inner for body in eqn.bodies for inner in walker.equations(body)]
    return bool(eqn.effects) or any("callback" in each.name for each in (eqn, *nested))


def _closed(sources: list[frozenset[int]], wanted: set[int], count: int) -> set[int] | None:
    """The leaves of a state of `count` leaves from which the wanted ones come, now and at every
    later step; None where they come from anything else."""
    held = frozenset[int]()
    more = frozenset(wanted)
    while more - held:
        held |= more
        more = frozenset[int]().union(
            *(sources[place] for place in range(len(sources)) if place % count in held)
        )
    return set(held) if held <= set(range(count)) else None


def _evaluated(program: Program, args: list[Any], wanted: set[int]) -> list[Any]:
    """The wanted outputs, from the arguments that are not None; the host is told nothing."""
    live = live_paths(program, [place in wanted for place in range(len(program.outputs))])

    def bound(path: Path, eqn: Equation, values: list[Any]) -> Sequence[Any]:
        if (body := eqn.custom_vmap) is not None:
            return walker.evaluate(body, values, bound)
        if any(value is None for value in values) or _asks_the_host(eqn):
            return [None] * len(eqn.outputs)
        return eqn.bind(values)

    def rule(path: Path, eqn: Equation, values: list[Any]) -> Sequence[Any]:
        return bound(path, eqn, values) if path in live else [None] * len(eqn.outputs)

    return walker.evaluate(program, args, rule)


def _foreseen(chain: _Chain, opt_state: Any, first: Any, count: Any) -> Foreseen:
    """Of `count` steps, those whose numbers are proved."""
    leaves = jax.tree.leaves(opt_state)
    now = [leaves[place] for place in chain.held]
    # A step has a lane of its own, wherever the run began: a compiler may round one lane otherwise
    # than the next, and a run that is resumed is to be charged what it would have been.
    lanes = jnp.arange(LANES, dtype=jnp.int32)
    first, count = jnp.asarray(first, jnp.int32), jnp.asarray(count, jnp.int32)
    ahead = (lanes - first) % LANES
    begins, beyond = ahead == 0, ahead >= count
    ahead = jnp.minimum(ahead, count - 1)  # no schedule is asked about steps beyond

    def all_behind(values: list[jax.Array]) -> list[list[jax.Array]]:
        return jax.vmap(chain.behind)(values)

    once = chain.behind(now)[0]
    guess = [_counted(*pair, ahead) for pair in zip(now, once, strict=True)]
    # What does not count, such as a multiplier, is what the step before makes of it.
    made = [value[lanes - 1] for value in all_behind(guess)[0]]
    guess = [_chosen(begins | beyond, *pair) for pair in zip(guess, made, strict=True)]
    behind, *parts = all_behind(guess)
    right = begins | _equal(guess, [value[lanes - 1] for value in behind])
    for part in parts:
        right &= _equal(guess, part)
    keys = [each.key for each in chain.released]
    right &= _equal([guess[key] for key in keys], [behind[key] for key in keys])
    # A step that begins its noise anew draws another number than the state before it tells of. Its
    # own counter shows that, and perhaps no later one.
    steps = [each.step for each in chain.released]
    right &= _equal([guess[step] + 1 for step in steps], [behind[step] for step in steps])
    in_order = jnp.cumprod(right[(first + lanes) % LANES].astype(jnp.int32))
    return Foreseen(
        jnp.stack([behind[each.noise_multiplier] for each in chain.released], axis=1),
        jnp.stack([guess[each.step] for each in chain.released], axis=1),
        jnp.minimum(jnp.sum(in_order, dtype=jnp.int32), count),
    )


def _counted(now: jax.Array, once: jax.Array, ahead: jax.Array) -> jax.Array:
    """A leaf at steps that are ahead, as a counter goes on; another one as one step leaves it."""
    ahead = ahead.reshape(-1, *[1] * now.ndim)
    if jnp.issubdtype(now.dtype, jnp.integer):
        return now + (once - now) * ahead.astype(now.dtype)
    return jnp.where(ahead == 0, now, once)


def _chosen(chosen: jax.Array, leaf: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.where(chosen.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, other)


def _equal(leaves: list[jax.Array], others: list[jax.Array]) -> jax.Array:
    """In which lanes all leaves are equal, NaN to NaN."""
    alike = jnp.ones(LANES, bool)
    for leaf, other in zip(leaves, others, strict=True):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        same = (leaf == other) | ((leaf != leaf) & (other != other))
        alike &= jnp.all(same.reshape(LANES, -1), axis=1)
    return alike
