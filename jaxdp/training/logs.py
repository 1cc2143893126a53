"""Where a run's metrics go."""

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

LogFn = Callable[[Mapping[str, Any]], None]


def log_function(log_fn: str | LogFn | None) -> LogFn:
    """Resolves a name to a function that takes a dict of metrics, with its `step` in it.

    Args:
      log_fn: "logging" (logger "jaxdp", level INFO), "wandb" (`wandb.log`, into the run you have
        begun), "tensorboard" (tensorboardX, into ./runs), "all" (the three), any callable that
        takes a dict, or None for nothing.

    Raises:
      ValueError: an unknown name.
      ImportError: the package of the name is not installed.

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
    if log_fn == "all":
        functions = [make() for make in makers.values()]

        def log_all(metrics: Mapping[str, Any]) -> None:
            for function in functions:
                function(metrics)

        return log_all
    if log_fn not in makers:
        raise ValueError(
            f"log_fn must be one of {[*makers, 'all']}, a callable or None, got {log_fn!r}"
        )
    return makers[log_fn]()


def _logging() -> LogFn:
    logger = logging.getLogger("jaxdp")
    return lambda metrics: logger.info(
        " ".join(f"{name}={value}" for name, value in metrics.items())
    )


def _wandb() -> LogFn:
    wandb = _import("wandb", "wandb")
    return lambda metrics: wandb.log(dict(metrics), step=metrics["step"])


def _tensorboard() -> LogFn:
    writer = _import("tensorboardX", "tensorboard").SummaryWriter()

    def log(metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if name != "step":
                writer.add_scalar(name, value, metrics["step"])
        writer.flush()

    return log


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"log_fn={extra!r} needs the package {module}: pip install 'jaxdp[{extra}]'"
        ) from error
