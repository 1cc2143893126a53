"""The notebooks run from top to bottom, in order, on what is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted(Path(__file__).parent.parent.glob("notebooks/*.ipynb"))
# The first runs by default; others take a minute of training each.
CASES = [
    pytest.param(path, marks=[pytest.mark.slow] * (rank > 0), id=path.stem)
    for rank, path in enumerate(NOTEBOOKS)
]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", CASES)
def test_the_notebook_runs(notebook: Path):
    execute = Path(sys.executable).parent / "jupyter-execute"
    run = subprocess.run(
        [execute, notebook],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
