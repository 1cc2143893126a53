"""Where a run's metrics go.

Some of them look at raw training data, and no ε covers them. Sinks that others may read get them
under names that say so: `not_private/loss`.
"""

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from jaxdp.checks import shown

LogFn = Callable[[Mapping[str, Any]], None]

NOT_PRIVATE = ("loss", "nonfinite", "samples_per_second")
"""What a report tells of raw training data; the realised batch sizes can be read off the last."""


def marked(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a report, those that are not private under names that say so.

    What `evaluate` returned keeps its name: it is as public as the data it was computed from.

    Args:
      metrics: a row of `Run.history`.

    Example:
      >>> marked({"step": 1, "epsilon": 0.5, "loss": 1.25})
      {'step': 1, 'epsilon': 0.5, 'not_private/loss': 1.25}
    """
    return {
        f"not_private/{name}" if name in NOT_PRIVATE else name: value
        for name, value in metrics.items()
    }


def log_function(log_fn: str | LogFn | None) -> LogFn:
    """Resolves a name to a function that takes a dict of metrics, with its `step` in it.

    Args:
      log_fn: "logging" (logger "jaxdp", level INFO), "wandb" (into the run you have begun, or one
        of the project "jaxdp" that is begun here), "tensorboard" (tensorboardX, into ./runs), "all"
        (the three), any callable that takes a dict, or None for nothing. Those with a name get the
        metrics as `marked`, a callable as they are in `Run.history`.

    Raises:
      TypeError: neither a name nor a callable.
      ValueError: an unknown name.
      ImportError: the package of the name is not installed.
      OSError: wandb cannot begin a run, or the directory for tensorboard cannot be written.

    Example:
      >>> seen = []
      >>> log_function(seen.append)({"step": 1, "epsilon": 0.5})
      >>> seen
      [{'step': 1, 'epsilon': 0.5}]
    """
    makers = {"logging": _logging, "wandb": _wandb, "tensorboard": _tensorboard}
    if log_fn is None:
        return lambda metrics: None
    if callable(log_fn):
        return log_fn
    if isinstance(log_fn, str) and log_fn == "all":
        functions = [make() for make in makers.values()]

        def log_all(metrics: Mapping[str, Any]) -> None:
            for function in functions:
                function(metrics)

        return log_all
    if not isinstance(log_fn, str) or log_fn not in makers:
        kind = ValueError if isinstance(log_fn, str) else TypeError
        raise kind(
            f"log_fn must be one of {[*makers, 'all']}, a function or None, got {shown(log_fn)}. "
            "Leave it out to log nothing."
        )
    return makers[log_fn]()


def _logging() -> LogFn:
    logger = logging.getLogger("jaxdp")
    return lambda metrics: logger.info(
        " ".join(f"{name}={value}" for name, value in marked(metrics).items())
    )


def _wandb() -> LogFn:
    wandb = _import("wandb", "wandb")
    if wandb.run is None:
        try:
            wandb.init(project="jaxdp")
        except wandb.errors.Error as error:
            raise OSError(
                f"log_fn='wandb' cannot begin a run: {error} Log in, begin a run of your own, or "
                "set WANDB_MODE=offline."
            ) from error
    return lambda metrics: wandb.log(marked(metrics), step=metrics["step"])


def _tensorboard() -> LogFn:
    writer = _import("tensorboardX", "tensorboard").SummaryWriter()

    def log(metrics: Mapping[str, Any]) -> None:
        for name, value in marked(metrics).items():
            if name != "step":
                writer.add_scalar(name, value, metrics["step"])
        writer.flush()

    return log


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"log_fn={extra!r} needs the package {module}. Run pip install 'jaxdp[{extra}]'."
        ) from error
