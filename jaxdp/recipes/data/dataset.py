"""What a data set is, and what its sources have in common."""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_SPLIT_SEED = 0


class DataError(ValueError):
    """A data set that cannot be used; the message is one sentence that names the source."""


class Dataset(NamedTuple):
    """Labelled images or texts, split into a training and a test part.

    Attributes:
      name: the name or path it was loaded from.
      train_x: images float32 `[N, H, W, C]`, pixels in [0, 1]; or texts int32 `[N, T]`, ids of
        characters, 0 behind the last.
      train_y: int32 `[N]`, labels in `0 .. num_classes - 1`.
      test_x: `[M, ...]`, as `train_x`.
      test_y: int32 `[M]`.
      num_classes: one more than the largest label of both parts.

    Example:
      >>> images, labels = np.zeros((2, 8, 8, 1), np.float32), np.zeros(2, np.int32)
      >>> Dataset("zeros", images, labels, images, labels, num_classes=1).train_x.shape
      (2, 8, 8, 1)
    """

    name: str
    train_x: NDArray[np.float32] | NDArray[np.int32]
    train_y: NDArray[np.int32]
    test_x: NDArray[np.float32] | NDArray[np.int32]
    test_y: NDArray[np.int32]
    num_classes: int


def split(
    name: str, examples: NDArray[Any], labels: NDArray[Any], test_fraction: float
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Training examples and labels, test examples and labels: the same rows in every run.

    Raises:
      DataError: one of the parts would be empty.
    """
    rows = len(labels)
    test_rows = round(rows * test_fraction)
    if not 0 < test_rows < rows:
        raise DataError(
            f"{name}: test_fraction={test_fraction} of {rows} rows leaves the training or the "
            "test part empty."
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(rows)
    test, train = order[:test_rows], order[test_rows:]
    return examples[train], labels[train], examples[test], labels[test]


def import_optional(module: str, *, needed_by: str, install: str) -> ModuleType:
    """A module that ships data.

    Raises:
      DataError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"The data set {needed_by!r} needs {module.partition('.')[0]} ({error}): "
            f"pip install {install}."
        ) from error


def reason(error: Exception) -> str:
    """The first sentence of an exception's text, without its stop; numpy's go on with advice."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0].rstrip(".")
