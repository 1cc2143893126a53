"""What a release under noise leaves in an optimizer state, for the ledger.

Every transformation that draws noise carries one `Released` in its state, and everybody who must
know of its noise finds it there, by its type, wherever it lies: in a chain, under
`jaxdp.accumulate`, `optax.masked` or `optax.partition`, or in a state of the user's own, whatever
the names of its fields. A mechanism of your own carries one, too:

    class State(NamedTuple):
        released: Released
        momentum: Any

    released = Released.begin(key, "my noise", params)                  # in init
    noise = normal(released.coming_key(), shape)                        # in update
    state = State(released.after(sigma), momentum)

A transformation that holds another one's state must hold it whole: of a state that is flattened to
its arrays nobody knows which of them are of a release, and its noise would be charged to nobody.
`jaxdp.training` and `jaxdp.accumulate` count what is begun, and refuse a state in which it is not
found; a loop of your own asks `initial_state`.
"""

# The types of JAX and optax are partly unknown.
# pyright: reportMissingTypeStubs=false
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxdp.randomness import drawn_alone, fingerprints, own_key, rehearsal_key, step_key

Init = Callable[[optax.Params], optax.OptState]
"""The `init` of a transformation."""

# What `Released.begin` has made since somebody asked, for each that asks.
_Begun = dict[tuple[str, int, str], jax.Array]
_watched: ContextVar[tuple[_Begun, ...]] = ContextVar("watched", default=())


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Released:
    """One noised release of every logical step: what the last one drew, and what the next one will.

    Attributes:
      step: the coming logical step, int32 scalar.
      noise_multiplier: of the last step, relative to the sensitivity of what was released, float32
        scalar; the ledger is charged with it. NaN before the first.
      key: where the noise comes from, of this purpose and these leaves alone. Secret.
      purpose: what the noise is for, see `jaxdp.randomness`.

    Example:
      >>> import jaxdp
      >>> tx = optax.chain(jaxdp.add_noise(1.5, jax.random.key(0)), optax.sgd(0.1))
      >>> noise_state, _ = tx.init(jnp.ones(2))
      >>> type(noise_state).__name__, noise_state.purpose
      ('Released', 'gradient noise')
    """

    step: jax.Array
    noise_multiplier: jax.Array
    key: jax.Array
    purpose: str = field(metadata={"static": True})

    @classmethod
    def begin(cls, key: jax.Array, purpose: str, params: optax.Params) -> "Released":
        """Before the first step.

        Args:
          key: the user's, of one run.
          purpose: what the noise is for: noise of two purposes is independent, whatever the key.
          params: the parameters that the transformation sees; leaves may be abstract.

        Returns:
          What `init` puts into the state.

        Raises:
          TypeError: `key` is no key.
          ValueError: a generator whose derived keys are not known to be independent; under a `vmap`
            that maps `params`, but not the key.

        Example:
          >>> released = Released.begin(jax.random.key(0), "my noise", jnp.zeros(3))
          >>> int(released.step), float(released.noise_multiplier)
          (0, nan)
        """
        own = own_key(key, purpose, params)
        # Told apart by what the noise is drawn from. The key is kept, so that no other has its id.
        for begun in _watched.get():
            begun[purpose, id(key), str(jax.tree.structure(params))] = key
        drawn_alone(own, params)
        never = jnp.full((), jnp.nan, jnp.float32)
        return cls(jnp.zeros((), jnp.int32), never, own, purpose)

    def coming_key(self) -> jax.Array:
        """The key that the noise of the coming step is drawn from.

        Returns:
          A key, another one at every step.

        Example:
          >>> released = Released.begin(jax.random.key(0), "my noise", jnp.zeros(3))
          >>> later = released.after(jnp.float32(1.5))
          >>> bool(jnp.all(released.coming_key() == later.coming_key()))
          False
        """
        return step_key(self.key, self.step)

    def rehearsed(self, unless: ArrayLike = False) -> "Released":
        """The same with a key of no step of the run: what is drawn from it tells nothing of the
        coming noise.

        Args:
          unless: bool scalar; where it is true, the key is what it was.

        Returns:
          What a rehearsal gives to `update`; it goes back into no state.

        Example:
          >>> released = Released.begin(jax.random.key(0), "my noise", jnp.zeros(3))
          >>> [bool(released.rehearsed(unless).key == released.key) for unless in (False, True)]
          [False, True]
        """
        return replace(self, key=jnp.where(unless, self.key, rehearsal_key(self.key)))

    def after(self, noise_multiplier: jax.Array, is_last: ArrayLike = True) -> "Released":
        """Behind the coming step.

        Args:
          noise_multiplier: what it drew.
          is_last: whether it ends its logical batch; before, nothing is released.

        Returns:
          What `update` puts into the state.

        Example:
          >>> released = Released.begin(jax.random.key(0), "my noise", jnp.zeros(3))
          >>> released = released.after(jnp.float32(1.5))
          >>> int(released.step), float(released.noise_multiplier)
          (1, 1.5)
        """
        return replace(
            self,
            step=jnp.where(is_last, self.step + 1, self.step),
            noise_multiplier=jnp.where(is_last, noise_multiplier, self.noise_multiplier),
        )


def initial_state(init: Init, params: optax.Params) -> optax.OptState:
    """`init(params)`, in which every noised release that it begins is found.

    Args:
      init: of a chain.
      params: the parameters; leaves may be abstract where `init` allows it.

    Returns:
      The state.

    Raises:
      ValueError: the state hides a `Released`.

    Example:
      >>> import jaxdp
      >>> noise = jaxdp.add_noise(1.5, jax.random.key(0))
      >>> state = initial_state(noise.init, jnp.ones(2))
      >>> initial_state(lambda params: jax.tree.leaves(noise.init(params)), jnp.ones(2))
      Traceback (most recent call last):
      ValueError: the state of a chain must hold each Released that is begun, got 0 of 1 for ...
    """
    watched, begun = _watching(init)
    state = watched(params)
    _refuse_hidden(begun, state)
    return state


def check_whole(init: Init, params: optax.Params, *states: optax.OptState) -> None:
    """Raises unless states hold every noised release that `init` begins.

    Args:
      init: of a chain; it is traced, not run.
      params: the parameters; leaves may be abstract.
      states: of that chain.

    Raises:
      ValueError: a state hides a `Released`.

    Example:
      >>> import jaxdp
      >>> tx = jaxdp.add_noise(1.5, jax.random.key(0))
      >>> check_whole(tx.init, jnp.ones(2), tx.init(jnp.ones(2)))
    """
    watched, begun = _watching(init)
    jax.eval_shape(watched, params)
    for state in states:
        _refuse_hidden(begun, state)


def _watching(init: Init) -> tuple[Init, _Begun]:
    """`init`, and what it begins. Another function every time: of one that was traced before JAX
    may keep the result."""
    begun: _Begun = {}

    def watched(params: optax.Params) -> optax.OptState:
        token = _watched.set((*_watched.get(), begun))
        try:
            return init(params)
        finally:
            _watched.reset(token)

    return watched, begun


def _refuse_hidden(begun: _Begun, opt_state: optax.OptState) -> None:
    made = Counter(purpose for purpose, _, _ in begun)
    found = Counter(released.purpose for released in _all_released(opt_state))
    for purpose, count in made.items():
        if found[purpose] < count:
            raise ValueError(
                "the state of a chain must hold each Released that is begun, got "
                f"{found[purpose]} of {count} for {purpose!r}, so that a transformation hides a "
                "release, which would be charged to nobody. Let it keep the state of its inner "
                "transformation whole, as a field or an entry, not the arrays alone."
            )


def executed_noise_multipliers(opt_state: optax.OptState) -> list[jax.Array]:
    """Noise multipliers of everything that the last logical step released, from its state.

    Finds the noise of every `add_noise` and `clip_adaptive`, wherever it lies in the chain. This
    is what a ledger must be charged with: it is read where the noise is drawn, so that it cannot
    disagree with it.

    Args:
      opt_state: state of an optax chain.

    Returns:
      Float32 scalars, in the order of the state.

    Example:
      >>> import jax, jax.numpy as jnp, jaxdp
      >>> tx = optax.chain(jaxdp.add_noise(1.5, jax.random.key(0)), optax.sgd(1e-3))
      >>> total = jaxdp.Bounded(jnp.ones(2), sensitivity=1.0)
      >>> _, state = tx.update(total, tx.init(jnp.ones(2)), jnp.ones(2))
      >>> [float(sigma) for sigma in jaxdp.executed_noise_multipliers(state)]
      [1.5]
    """
    return [released.noise_multiplier for released in _all_released(opt_state)]


def noise_steps(opt_state: optax.OptState) -> list[jax.Array]:
    """The coming step of everything that is released: what `noise_draws` tells, without the keys.

    Args:
      opt_state: state of an optax chain; leaves may be traced.

    Returns:
      Int32, in the order of `executed_noise_multipliers`, and of the same shapes.

    Example:
      >>> import jax, jax.numpy as jnp, jaxdp
      >>> noise = jaxdp.add_noise(1.5, jax.random.key(0))
      >>> [int(step) for step in noise_steps(noise.init(jnp.ones(2)))]
      [0]
    """
    found = _all_released(opt_state)
    return [jnp.broadcast_to(each.step, jnp.shape(each.noise_multiplier)) for each in found]


def noise_draws(opt_state: optax.OptState) -> tuple[tuple[str, str, int], ...]:
    """Which noise comes next: (purpose, fingerprint of the key, step) of everything that is drawn.

    Two runs that state the same draw the same: a ledger that keeps what it was charged for refuses
    the second one. A run that goes on from its saved state does not repeat itself.

    Args:
      opt_state: state of an optax chain, not traced. Of a `jax.vmap` over states, each member is
        told.

    Returns:
      One triple for each release, in the order of the state.

    Raises:
      ValueError: two noised releases would be drawn from one key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxdp
      >>> tx = optax.chain(jaxdp.add_noise(1.5, jax.random.key(0)), optax.sgd(1e-3))
      >>> state = tx.init(jnp.ones(2))
      >>> [(purpose, len(key), step) for purpose, key, step in jaxdp.noise_draws(state)]
      [('gradient noise', 64, 0)]
      >>> _, state = tx.update(jaxdp.Bounded(jnp.ones(2), 1.0), state, jnp.ones(2))
      >>> jaxdp.noise_draws(state)[0][2]
      1
    """
    draws: list[tuple[str, str, int]] = []
    for released in _all_released(opt_state):
        keys = fingerprints(released.key)
        steps = np.broadcast_to(np.ravel(jax.device_get(released.step)), len(keys))
        draws += [(released.purpose, key, int(step)) for key, step in zip(keys, steps, strict=True)]
    if len({(purpose, key) for purpose, key, _ in draws}) < len(draws):
        raise ValueError(
            "every noised release must have a key of its own, got one key twice. Give the members "
            "of an ensemble the keys jax.random.split(key, members), see jaxdp.add_noise."
        )
    return tuple(draws)


def _all_released(opt_state: optax.OptState) -> list[Released]:
    # By type: a name, such as that of an attribute, may be another's, and what is looked for may
    # lie inside. A `Released` holds arrays alone, so that nothing lies inside one.
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, Released))
    return [node for node in nodes if isinstance(node, Released)]
