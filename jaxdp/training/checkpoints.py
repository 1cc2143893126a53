"""Checkpoints of a run: state, ledger, sampler, history and configuration, all or nothing.

    directory/         see `training.places`
      .reports.json    the history of the newest checkpoint, when its last report was told
      9/, 12/, 12.1/   the checkpoints
        state/         the arrays, written by Orbax
        run.json       all else
        SHA256SUMS     the digest of each file above, see `training.files`

A folder gets its name when everything in it is on the disk: a checkpoint is complete or absent. It
is there before anybody sees the parameters in it, and so before the report on them is complete: a
run that goes on from it makes that report again, unless `.reports.json` says that it was told.
"""

import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxdp.accounting import Ledger
from jaxdp.accounting.strict_json import check_keys, parse
from jaxdp.checks import check_integer, shown
from jaxdp.gathering import amid_a_batch, check_between_batches
from jaxdp.sampling import Sampler, sampler_from_dict
from jaxdp.training.configuration import as_json, differences
from jaxdp.training.files import check_seal, seal, sync_folder, write_file
from jaxdp.training.places import (
    SAVING,
    Place,
    all_places,
    check_what_is_there,
    locked,
    newest_place,
)
from jaxdp.training.step import TrainState
from jaxdp.training.told import note_told, told_with

_FORMAT, _VERSION = "jaxdp.checkpoint", 2
_KEYS = (
    *("format", "version", "step", "ledger", "sampler"),
    *("history", "configuration", "structure", "data", "report"),
)

# Version 1 was written when its reports had been told. It stays readable.
_BEFORE_REPORTS = 1


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state, ledger: of the run.
      history: the reports that were told.
      report: the one that is still to be told, without what `evaluate` adds to it; or None.
    """

    state: TrainState
    ledger: Ledger
    history: list[dict[str, Any]]
    report: dict[str, Any] | None


class Checkpoints:
    """A directory of checkpoints of one run, which no other live run can open.

    A checkpoint is believed only if every byte of it is as it was written, and its name, state and
    ledger tell of the same step.

    A checkpoint holds the noise keys and the sampler's seed, which resuming needs: keep it as
    secret as the data, and release the parameters alone. Do not continue a copy of it beside the
    original: both would draw the same noise.

    Args:
      directory: made if missing; of checkpoints alone, but for names that begin with a dot. Where
        there are several processes, one that all of them share.
      keep: how many of the newest to keep, at least 1.
      configuration: what decides the run, for instance its hyperparameters: data for JSON, saved
        with every checkpoint. A checkpoint of another configuration is refused.

    Raises:
      TypeError: an argument of another type; a configuration that is no data for JSON.
      ValueError: keep is below 1; the directory is a file or holds something else.
      OSError: the directory cannot be written, or another run has it open.

    Example:
      >>> import tempfile
      >>> store = Checkpoints(tempfile.mkdtemp(), configuration={"threshold": 0.1})
      >>> store.configuration() is None  # nothing has been saved
      True
      >>> import jax.numpy as jnp, optax
      >>> from jaxdp import FixedSizeSampler, training
      >>> state = training.init({"w": jnp.zeros(2)}, optax.sgd(0.1))
      >>> sampler = FixedSizeSampler(10, batch_size=2, seed=1)
      >>> store.save(state, Ledger(), sampler, history=[])
      >>> store.sampler() == sampler, store.configuration()
      (True, {'threshold': 0.1})
      >>> store.complete(history=[])  # nothing is still to be told of it
      >>> int(store.restore(state, sampler).state.step)
      0
      >>> store.close()
    """

    def __init__(self, directory: str | Path, keep: int = 2, configuration: Any = None):
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(
                f"directory must be a path, got {shown(directory)}. Pass a str or a Path."
            )
        self.directory = Path(directory).absolute()
        self._keep = check_integer("keep", keep, minimum=1, advice="The newest is always kept.")
        self._configuration = as_json("configuration", configuration)
        if self.directory.exists():
            check_what_is_there(self.directory)
        if jax.process_index() == 0:
            # Called by `close`, or when nobody holds this object any more.
            self._unlock = weakref.finalize(self, os.close, locked(self.directory))
        # Synchronous: the next step reuses the buffers that are being written.
        self._arrays = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        self._closed = False

    def save(
        self,
        state: TrainState,
        ledger: Ledger,
        sampler: Sampler,
        history: list[dict[str, Any]],
        data: str | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        """Writes one checkpoint, named by the state's step, and removes the oldest.

        Args:
          state, ledger, sampler, history: of the run.
          data: a digest of what it trains on, where there is one.
          report: the one that is to be told next, without what `evaluate` adds to it: nobody may
            see anything of a state before it is saved. See `complete`.

        Raises:
          ValueError: the ledger misses steps of the state; the state is amid a logical batch, whose
            sums are raw; the directory holds a later step; the checkpoints are closed.
          OSError: it cannot be written; the older checkpoints are untouched.
        """
        self._check_open()
        check_between_batches(state.opt_state)
        step = int(state.step)
        if ledger.steps < step:
            raise ValueError(
                f"ledger must hold every step that was executed, got {ledger.steps} steps for a "
                f"state after {step}. Charge the ledger with each step before it is saved."
            )
        run = {
            "format": _FORMAT,
            "version": _VERSION,
            "step": step,
            "ledger": ledger.to_json(),
            "sampler": sampler.to_dict(),
            "history": history,
            "configuration": self._configuration,
            "structure": _structure(state),
            "data": data,
            "report": report,
        }
        newest = newest_place(self.directory)
        if newest is not None and newest.step > step:
            raise ValueError(
                f"{self.directory} holds a checkpoint of step {newest.step}, so that one of step "
                f"{step} would never be found. Begin this run there, or use another directory."
            )
        again = 0 if newest is None or newest.step < step else newest.again + 1
        try:
            self._write(Place(step, again), run, state)
        except jax.errors.JaxRuntimeError:  # another process has ended
            raise
        except Exception as error:  # of any kind: Orbax has no class of its own for what it raises
            shutil.rmtree(self.directory / SAVING, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {step} cannot be written in {self.directory}: {error}. "
                "Free the disk or choose another directory; older checkpoints are untouched."
            ) from error

    def complete(self, history: list[dict[str, Any]]) -> None:
        """Notes that the report of the newest checkpoint was told. Its arrays stay as they are.

        Args:
          history: with that report in it.

        Raises:
          ValueError: there is no checkpoint; the checkpoints are closed.
          OSError: it cannot be written; the checkpoints are untouched.
        """
        self._check_open()
        newest = newest_place(self.directory)
        if newest is None:
            raise ValueError(
                f"a report must be that of a checkpoint, got none in {self.directory}. Save the "
                "state that it tells of first."
            )
        if jax.process_index() > 0:
            return
        try:
            note_told(self.directory, newest.within(self.directory) / "run.json", history)
        except OSError as error:
            raise OSError(
                f"the report of step {newest.step} cannot be written in {self.directory}: {error}. "
                "Free the disk or choose another directory; the checkpoints are untouched."
            ) from error

    def sampler(self) -> Sampler | None:
        """The sampler of the newest checkpoint, or None where there is none.

        A run whose seed came from the operating system can be resumed only with the sampler that
        was saved: its seed is written nowhere else.

        Returns:
          The sampler, or None.

        Raises:
          ValueError: the checkpoint is damaged.
        """
        newest = newest_place(self.directory)
        if newest is None:
            return None
        try:
            return sampler_from_dict(self._run(newest)["sampler"])
        except TypeError as error:
            raise self._damaged(newest, error) from error

    def configuration(self) -> Any:
        """The configuration in the newest checkpoint, or None where there is none.

        Returns:
          What `Checkpoints` was given by the run that saved it, or None.

        Raises:
          ValueError: the checkpoint is damaged.
        """
        newest = newest_place(self.directory)
        return None if newest is None else self._run(newest)["configuration"]

    def restore(self, like: TrainState, sampler: Sampler, data: str | None = None) -> Saved | None:
        """The newest checkpoint, or None where there is none.

        Args:
          like: a state with the structure, shapes and dtypes of the saved one.
          sampler: the sampler of the run, which must be the one that was saved.
          data: a digest of what it trains on, which must be the one that was saved, where both
            are known.

        Returns:
          State, ledger, history and the report that is to be told, or None.

        Raises:
          ValueError: an array of the state has no entries; the checkpoint belongs to another
            configuration, sampler, model, clip or optimizer, or to other data; it is damaged.
        """
        _check_can_be_saved(like)
        newest = newest_place(self.directory)
        if newest is None:
            return None
        run = self._run(newest)
        different = differences(run["configuration"], self._configuration)
        if different:
            raise ValueError(
                f"the checkpoint in {self.directory} is of a run with another configuration: "
                f"{'; '.join(different)}. Use the same one, or another directory."
            )
        if run["structure"] != _structure(like):
            raise ValueError(
                f"the checkpoint in {self.directory} holds another model, clip or optimizer, or "
                "one that an earlier jaxdp wrote. Use the same ones, or another directory."
            )
        if run["sampler"] != sampler.to_dict():
            raise ValueError(
                f"the checkpoint in {self.directory} was drawn by another sampler, or by an "
                "earlier jaxdp with other batches, so that its ledger does not describe this run. "
                "Use the same sampler, seed and jaxdp, or another directory and a key of its own."
            )
        if data is not None and run["data"] not in (None, data):
            raise ValueError(
                f"the checkpoint in {self.directory} was trained on other data, to which its "
                "ledger says nothing. Use the same data, or another directory."
            )
        try:
            check_seal(newest.within(self.directory))
            state = self._read(newest, like)
            ledger = Ledger.from_json(run["ledger"])
            if not newest.step == int(state.step) <= ledger.steps:
                raise ValueError(
                    f"its state is of step {int(state.step)}, its ledger of {ledger.steps} steps"
                )
            if amid_a_batch(state.opt_state):
                raise ValueError("it was saved amid a logical batch, whose sums are raw")
        except Exception as error:  # of any kind, as above
            raise self._damaged(newest, error) from error
        told = told_with(self.directory, newest.within(self.directory) / "run.json")
        if run["report"] is None or told is None:
            return Saved(state, ledger, run["history"], run["report"])
        return Saved(state, ledger, told, None)

    def close(self) -> None:
        """Lets another run open the directory."""
        self._arrays.close()
        self._closed = True
        if jax.process_index() == 0:
            self._unlock()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(
                "checkpoints must be open, got closed ones, which another run may have. Open "
                "new ones."
            )

    def _write(self, place: Place, run: dict[str, Any], state: TrainState) -> None:
        """All processes write their arrays; the first one writes all else and names the folder."""
        first, saving = jax.process_index() == 0, self.directory / SAVING
        if first:
            shutil.rmtree(saving, ignore_errors=True)
            saving.mkdir()
        _wait_for_all("jaxdp_checkpoint_begins")
        self._arrays.save(
            saving / "state",
            args=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
        )
        if first:
            write_file(saving / "run.json", json.dumps(run).encode())
            seal(saving)
            saving.rename(place.within(self.directory))
            sync_folder(self.directory)
            for old in all_places(self.directory)[: -self._keep]:
                shutil.rmtree(old.within(self.directory))
        _wait_for_all("jaxdp_checkpoint_ends")

    def _read(self, place: Place, like: TrainState) -> TrainState:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._arrays.restore(
            place.within(self.directory) / "state",
            args=ocp.args.StandardRestore(abstract),  # pyright: ignore[reportCallIssue]
        )

    def _run(self, place: Place) -> dict[str, Any]:
        folder = place.within(self.directory)
        try:
            check_seal(folder, only=["run.json"])
            read: Any = parse((folder / "run.json").read_text())
            if isinstance(read, dict) and read.get("version") == _BEFORE_REPORTS:
                read = {"report": None, **read, "version": _VERSION}
            run = dict(check_keys("run.json", read, _KEYS))
            if (run["format"], run["version"], run["step"]) != (_FORMAT, _VERSION, place.step):
                raise ValueError(
                    f"run.json holds {run['format']} {run['version']} of step {run['step']}"
                )
        except (OSError, TypeError, ValueError) as error:
            raise self._damaged(place, error) from error
        return run

    def _damaged(self, place: Place, error: Exception) -> ValueError:
        older = [other for other in all_places(self.directory) if other < place]
        go_on = "begin anew, which spends what it had spent once more"
        if older:  # what was shown of later steps had the noise that comes again
            go_on = f"resume from step {older[-1].step}, with the same program and settings"
        what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        where = place.within(self.directory)
        return ValueError(
            f"the checkpoint {where} is damaged ({what}). Put an intact copy in its place, or "
            f"remove it to {go_on}."
        )


def _wait_for_all(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _check_can_be_saved(state: TrainState) -> None:
    """Before anything is spent: Orbax saves no arrays without entries."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.size == 0:
            raise ValueError(
                f"a state with checkpoints must have entries in all of its arrays, got shape "
                f"{leaf.shape} for {jax.tree_util.keystr(path)}. Leave that parameter out."
            )


def _structure(state: TrainState) -> list[str]:
    """Path, dtype and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves]
