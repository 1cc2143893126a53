"""The arguments of `jaxdp.per_sample_grads`, and what they make of a problem."""

from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from jaxdp.checks import check_bool, check_choice, check_integer
from jaxdp.engine.methods.base import Reducer
from jaxdp.engine.methods.choice import Choice, choose, method_names
from jaxdp.engine.microbatches import Microbatched
from jaxdp.engine.reduction import Batch
from jaxdp.engine.sharded import Sharded, row_sharding
from jaxdp.problem import LossFn, Problem, check_function, pose, taken_apart


class Options(NamedTuple):
    """The arguments of `per_sample_grads`."""

    loss_fn: LossFn
    has_aux: bool
    method: str
    memory_budget: int | None
    microbatch_size: int | None
    trainable: Any
    sharding: NamedSharding | None = None

    def check(self) -> None:
        """Raises on an argument that no batch could make sense of."""
        check_function(self.loss_fn)
        check_choice("method", self.method, method_names())
        check_bool("has_aux", self.has_aux, advice="Say whether loss_fn returns (loss, aux).")
        for name in ("microbatch_size", "memory_budget"):
            value = getattr(self, name)
            if value is not None:
                check_integer(name, value, minimum=1, advice="Leave it out to let jaxdp choose.")

    def problem(
        self, params: Any, batch: Any, mask: jax.Array | None, kwargs: dict[str, Any]
    ) -> Problem:
        """The arguments of `grads_fn`, checked."""
        options = {"has_aux": self.has_aux, "trainable": self.trainable}
        return pose(self.loss_fn, params, batch, mask, kwargs, **options)

    def choice(self, problem: Problem) -> Choice:
        """The method, and how many samples at a time."""
        return choose(
            self.method,
            problem.loss,
            problem.leaves,
            problem.batch,
            microbatch_size=self.microbatch_size,
            memory_budget=self.memory_budget,
        )

    def reducer(self, problem: Problem, kwargs: dict[str, Any]) -> Reducer:
        """What computes, on each device where the rows of the batch lie on several."""
        rows_at = row_sharding(problem.batch.examples, self.sharding)
        if rows_at is None:
            return self.local_reducer(problem)
        arrays, problem_of = taken_apart(problem, kwargs, self.problem)

        def reducer_of(arrays: Any, rows: Batch) -> Reducer:
            return self.local_reducer(problem_of(arrays, rows))

        return Sharded(reducer_of, arrays, problem.leaves, rows_at)

    def local_reducer(self, problem: Problem) -> Reducer:
        """The same on this device."""
        choice = self.choice(problem)
        if choice.microbatch_size is None:
            return choice.method
        return Microbatched(choice.method, problem.leaves, choice.microbatch_size, choice.alone)
