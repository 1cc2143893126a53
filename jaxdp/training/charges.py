"""What each step is charged with before it runs."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdp.accounting import Draws, Ledger, SamplingScheme
from jaxdp.released import noise_draws
from jaxdp.sampling import Sampler
from jaxdp.training.foresight import LANES
from jaxdp.training.identity import step_draws
from jaxdp.training.step import Step, TrainState


class Charge(NamedTuple):
    """What a step is charged with.

    Attributes:
      noise_multipliers: of the Gaussians that it releases.
      sampling: the scheme that draws its batch.
      noise: which noise each of the Gaussians gets.
      batch: which batch it is.
    """

    noise_multipliers: list[float]
    sampling: SamplingScheme
    noise: tuple[Draws, ...]
    batch: tuple[Draws, ...]

    @property
    def draws(self) -> tuple[Draws, ...]:
        """The random numbers of both."""
        return (*self.noise, *self.batch)

    def added(self, ledger: Ledger) -> Ledger:
        """A ledger with it."""
        return ledger.charge(self.noise_multipliers, self.sampling, draws=self.draws)


class _Block(NamedTuple):
    """Steps whose noise is known, by one question.

    Attributes:
      first: the first of them.
      end: the step behind the last one.
      noise_multipliers: float32 [LANES, R].
      counters: int32 [LANES, R].
      streams: purpose and fingerprint of the key of each release.
    """

    first: int
    end: int
    noise_multipliers: np.ndarray
    counters: np.ndarray
    streams: list[tuple[str, str]]

    def noise(self, number: int) -> tuple[list[float], list[tuple[str, str, int]]]:
        """Multipliers and draws of a step."""
        lane = number % LANES
        steps = self.counters[lane].tolist()
        draws = [(*stream, step) for stream, step in zip(self.streams, steps, strict=True)]
        return _as_typed(self.noise_multipliers[lane]), draws


@dataclass
class Charges:
    """The charges of a run, step by step.

    Where the chain's program says so, many steps are known by one question, so that none has to
    wait for those before it; see `jaxdp.training.foresight`. Otherwise each step is asked for, when
    those before it are done.

    Args:
      step: what is executed.
      sampler: draws the batches.
      steps: of the run.
    """

    step: Step
    sampler: Sampler
    steps: int
    _block: _Block | None = field(default=None, init=False)
    _foresees: bool = field(init=False)

    def __post_init__(self) -> None:
        ahead = self.step.ahead
        # Of a step of the user's, which may do anything to the state, it knows nothing.
        known = ahead is not None and ahead.run is self.step.run
        # Operation by operation, the step is not the program that it looked at.
        self._foresees = known and not jax.config.values["jax_disable_jit"]

    @property
    def waits(self) -> bool:
        """Whether the last question has waited for the steps before the one that it was about."""
        return self._block is None

    def coming(self, state: TrainState, batch: Any, number: int) -> Charge:
        """That of the coming step.

        Args:
          state: before the step; read, and waited for, where the step is not known yet.
          batch: a physical batch of it.
          number: the logical step.
        """
        if self._block is None or number >= self._block.end:
            self._block = self._asked_ahead(state, batch, number)
        if self._block is None:
            multipliers = _as_typed(np.asarray(self.step.noise_multipliers(state, batch)))
            noise = noise_draws(state.opt_state)
        else:
            multipliers, noise = self._block.noise(number)
        draws = step_draws(noise, self.sampler, number)
        return Charge(multipliers, self.sampler.scheme, draws[: len(noise)], draws[len(noise) :])

    def _asked_ahead(self, state: TrainState, batch: Any, number: int) -> _Block | None:
        if not self._foresees or self.step.ahead is None:
            return None
        count = min(LANES, self.steps - number)
        foreseen = self.step.ahead.foresee(state, batch, number, count)
        known = 0 if foreseen is None else int(foreseen.known)
        # A chain that cannot be foreseen now will not be later.
        self._foresees = known == count
        if foreseen is None or known == 0:
            return None
        multipliers, counters = jax.device_get(foreseen[:2])
        streams = [(purpose, key) for purpose, key, _ in noise_draws(state.opt_state)]
        return _Block(number, number + known, multipliers, counters, streams)


def _as_typed(noise_multipliers: np.ndarray) -> list[float]:
    """float32 -> the decimal the user typed: 1.1, not 1.10000002384."""
    return [float(str(value)) for value in noise_multipliers]
