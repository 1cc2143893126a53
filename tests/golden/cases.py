"""What torch computed, and the weights and inputs that it computed it from.

`make.py` writes one archive for each family: a list of cases, and for each case the outputs.
Weights and inputs are not stored but drawn again, from a generator that NumPy never changes.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent


class Golden(NamedTuple):
    """One layer, and what torch makes of a few examples.

    Attributes:
      name: of the case.
      layer: of the factory in `jaxdp.nn`.
      options: its arguments.
      shapes: of the arrays in torch's state_dict.
      inputs: of one example, name -> shape; a list of `[high, *shape]` for integers.
      batch_size: how many examples.
      settings: further things that the layer was told.
      outputs: `[batch_size, ...]` each, channels last.
    """

    name: str
    layer: str
    options: dict[str, Any]
    shapes: dict[str, list[int]]
    inputs: dict[str, Any]
    batch_size: int
    settings: dict[str, Any]
    outputs: dict[str, np.ndarray] = {}

    def state_dict(self) -> dict[str, np.ndarray]:
        """The weights, under torch's names."""
        return {name: 0.5 * _normal(self.name, name, shape) for name, shape in self.shapes.items()}

    def examples(self) -> dict[str, np.ndarray]:
        """The inputs `[batch_size, ...]`, channels last."""
        return {name: self._input(name, shape) for name, shape in self.inputs.items()}

    def _input(self, name: str, shape: Any) -> np.ndarray:
        if isinstance(shape, dict):
            rng = np.random.RandomState(_seed(self.name, name))
            size = (self.batch_size, *shape["shape"])
            return rng.randint(shape["high"], size=size).astype(np.int32)
        return _normal(self.name, name, [self.batch_size, *shape])


def load(family: str) -> list[Golden]:
    """All cases of a family, with their outputs."""
    with np.load(HERE / f"{family}.npz") as archive:
        cases = json.loads(str(archive["cases"]))
        outputs: dict[str, dict[str, np.ndarray]] = {}
        for key in archive.files:
            name, _, output = key.partition("/")
            outputs.setdefault(name, {})[output] = archive[key]
    return [Golden(**case, outputs=outputs[case["name"]]) for case in cases]


def save(family: str, cases: list[Golden]) -> None:
    """Writes the archive of a family."""
    arrays: dict[str, Any] = {
        f"{case.name}/{output}": array.astype(np.float32)
        for case in cases
        for output, array in case.outputs.items()
    }
    text = json.dumps([{k: v for k, v in c._asdict().items() if k != "outputs"} for c in cases])
    np.savez_compressed(HERE / f"{family}.npz", cases=np.array(text), **arrays)


def masks(case: Golden) -> dict[str, np.ndarray]:
    """The masks of an attention case, True where allowed, for every example alike."""
    queries, keys = (case.inputs.get(name, [4])[0] for name in ("queries", "keys"))
    rng = np.random.RandomState(0)
    kind, heads = case.settings["mask"], case.options["num_heads"]
    pairs = rng.uniform(size=(heads, queries, keys)) < 0.6
    pairs[..., 0] = True  # torch gives NaN to a query that may attend to nothing
    allowed = np.arange(keys) < keys - 2
    return {
        "none": {},
        "causal": {"is_causal": np.array(True)},
        "pairs": {"mask": pairs[0]},
        "heads": {"mask": pairs},
        "keys": {"key_mask": allowed, "mask": pairs[0]},
    }[kind]


def _normal(case: str, name: str, shape: Any) -> np.ndarray:
    return np.random.RandomState(_seed(case, name)).standard_normal(tuple(shape))


def _seed(case: str, name: str) -> int:
    return zlib.crc32(f"{case}/{name}".encode())
