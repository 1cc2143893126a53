"""First names, labelled by the list that they stand in.

    >>> encoded = encode(["Ada"])
    >>> encoded[0, :5].tolist()
    [1, 4, 1, 0, 0]

A name is a row of `LENGTH` character ids: 1 to 26 for the letters of the English alphabet, 27 for
any other character, 0 behind the last. Alphabet and length are constants: what the data set holds
decides nothing about how it is read.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxdp.recipes.data.dataset import DataError, Dataset, import_optional, split

# Longer names lose their end; the census has none of more than eleven letters.
LENGTH = 16
VOCABULARY = 28
_OTHER = 27


def load_names(name: str, test_fraction: float) -> Dataset:
    """The female (0) and male (1) first names of the US census of 1990: 5,494 of them, of which
    331 stand in both lists; 78% are female.

    Raises:
      DataError: the package `names` is not installed, or holds no such lists.
    """
    package = import_optional("names", needed_by=name, install="names")
    lists = [_read(name, Path(package.FILES[f"first:{label}"])) for label in ("female", "male")]
    labels = np.repeat(np.arange(2, dtype=np.int32), [len(names) for names in lists])
    parts = split(name, encode([each for names in lists for each in names]), labels, test_fraction)
    return Dataset(name, *parts, num_classes=2)


def encode(names: Sequence[str]) -> NDArray[np.int32]:
    """Character ids `[N, LENGTH]`."""
    rows = np.zeros((len(names), LENGTH), np.int32)
    for row, name in zip(rows, names, strict=True):
        ids = [_id(character) for character in name.upper()[:LENGTH]]
        row[: len(ids)] = ids
    return rows


def _id(character: str) -> int:
    return ord(character) - ord("A") + 1 if "A" <= character <= "Z" else _OTHER


def _read(name: str, path: Path) -> list[str]:
    """The first word of each line: behind it stand frequencies."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        found = [line.split()[0] for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: {path} cannot be read ({error}).") from error
    if not found:
        raise DataError(f"{name}: {path} holds no names.")
    return found
