"""Checkpoints of a run with Orbax: state, ledger, sampler and history, all or nothing."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxdp.accounting import Ledger
from jaxdp.sampling import Sampler, sampler_from_dict
from jaxdp.training.step import TrainState


class Saved(NamedTuple):
    """What a checkpoint holds beside the state."""

    state: TrainState
    ledger: Ledger
    history: list[dict[str, Any]]


class Checkpoints:
    """A directory of checkpoints, each complete or absent (Orbax commits by renaming).

    A checkpoint holds the noise keys and the sampler's seed, which resuming needs: keep it as
    secret as the data, and release the parameters alone.

    Args:
      directory: made if missing.
      keep: how many of the newest to keep, at least 1.

    Raises:
      ValueError: keep is below 1.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"checkpoints need a directory, got the file {self.directory}")
        # Synchronous: the next step reuses the buffers that are being written.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(
        self, state: TrainState, ledger: Ledger, sampler: Sampler, history: list[dict[str, Any]]
    ) -> None:
        """Writes one checkpoint, named by the state's step."""
        run = {
            "ledger": ledger.to_json(),
            "sampler": sampler.to_dict(),
            "history": history,
            "structure": _structure(state),
        }
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
                run=ocp.args.JsonSave(run),  # pyright: ignore[reportCallIssue]
            ),
        )

    def sampler(self) -> Sampler | None:
        """The sampler of the newest checkpoint, or None where there is none.

        A run whose seed came from the operating system can be resumed only with the sampler that
        was saved: its seed is written nowhere else.
        """
        step = self._manager.latest_step()
        return None if step is None else sampler_from_dict(self._run(step)["sampler"])

    def restore(self, like: TrainState, sampler: Sampler) -> Saved | None:
        """The newest checkpoint, or None where there is none.

        Args:
          like: a state with the structure, shapes and dtypes of the saved one.
          sampler: the sampler of the run, which must be the one that was saved.

        Raises:
          ValueError: the checkpoint belongs to another sampler or another model, clip or
            optimizer; it is damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        run = self._run(step)
        if run["structure"] != _structure(like):
            raise ValueError(
                f"the checkpoint in {self.directory} holds another model, clip or optimizer: use "
                "the same ones, or another directory"
            )
        if run["sampler"] != sampler.to_dict():
            raise ValueError(
                f"the checkpoint in {self.directory} was drawn by another sampler, so that its "
                "ledger does not describe this run: use the same sampler and seed, or another "
                "directory"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = self._read(step, "state", ocp.args.StandardRestore(abstract))  # pyright: ignore[reportCallIssue]
        return Saved(state, Ledger.from_json(run["ledger"]), run["history"])

    def _run(self, step: int) -> dict[str, Any]:
        return self._read(step, "run", ocp.args.JsonRestore())  # pyright: ignore[reportCallIssue]

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(
                f"the checkpoint of step {step} in {self.directory} is damaged: remove it to "
                "resume from an older one"
            ) from error

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()


def _structure(state: TrainState) -> list[str]:
    """Path, dtype and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves]
