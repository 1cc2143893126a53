"""From a name or a path to a data set."""

import os
from collections.abc import Callable
from pathlib import Path

from jaxdp.recipes.data import images, names
from jaxdp.recipes.data.dataset import DataError, Dataset

_PACKAGED: dict[str, Callable[[str, float], Dataset]] = {
    "digits": images.load_digits,
    "mnist-sample": images.load_mnist_sample,
    "names": names.load_names,
}


def load(name_or_path: str | os.PathLike[str], *, test_fraction: float = 0.2) -> Dataset:
    """Loads a labelled data set by name, or images from a directory or a file.

    Args:
      name_or_path: `"digits"`, `"mnist-sample"`, `"names"`, a directory that holds
        `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
        `t10k-labels-idx1-ubyte` (each plain or with `.gz`; Debian's package
        dataset-fashion-mnist installs such a directory), or an `.npz` file. Images are
        `[N, H, W]` or `[N, H, W, C]`: uint8 (divided by 255), uint16 (divided by 65535) or
        floats in [0, 1]. Labels are non-negative integers `[N]`.
      test_fraction: the share of the rows, strictly between 0 and 1, kept for testing where the
        source has no test part of its own; the split is the same in every run.

    Returns:
      A `Dataset`.

    Raises:
      DataError: the name is unknown; a file is missing, cannot be read, or does not hold what its
        header promises; images and labels disagree in number; a shape, dtype, pixel or label is
        out of the ranges above; a package that ships the data is not installed.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> file = tempfile.NamedTemporaryFile(suffix=".npz")
      >>> np.savez(file.name, x=np.zeros((10, 8, 8), np.uint8), y=np.arange(10) % 2)
      >>> load(file.name).train_x.shape
      (8, 8, 8, 1)
      >>> file.close()
    """
    if not 0.0 < test_fraction < 1.0:
        raise DataError(
            f"test_fraction must lie strictly between 0 and 1, got test_fraction={test_fraction}."
        )
    name = os.fspath(name_or_path)
    path = Path(name)
    if name in _PACKAGED:
        return _PACKAGED[name](name, test_fraction)
    if path.is_dir():
        return images.load_idx_directory(name, path)
    if path.suffix == ".npz":
        return images.load_npz(name, path, test_fraction)
    if path.is_file():
        raise DataError(f"{name} is no data set: give a directory of IDX files or an .npz file.")
    if len(path.parts) > 1:
        raise DataError(f"{name} does not exist: give a directory of IDX files or an .npz file.")
    known = ", ".join(_PACKAGED)
    raise DataError(
        f"Unknown data set {name!r}: known names are {known}; "
        "otherwise give a directory of IDX files or an .npz file."
    )
