"""Puts faults back, one at a time, and shows which test notices.

    python tools/mutations.py                   # every fault of tools/faults/*.toml
    python tools/mutations.py noise "second"    # those whose table or name contains a word
    python tools/mutations.py --jobs 4          # four at a time, each in a copy of its own

A fault is a change of one file that would bring back a way to break the guarantee. For each one
the tool copies the tree, makes the change there, and runs the tests that are said to notice it. At
least one must fail; with the tree as it is all of them must pass. A table holds entries like

    [[fault]]
    name = "the slack of a Gram matrix leaves out the length"
    source = "vectors of equal entries"
    file = "jaxdp/engine/factors/gram.py"
    old = '''text that occurs exactly once'''
    new = '''the text with the fault'''
    tests = ["tests/engine/test_certificates.py"]

Exits with 1 if a fault goes unnoticed, if a table does not fit the code, or if a test fails without
any fault.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TABLES = ROOT / "tools" / "faults"
COPIED = ("jaxdp", "tests", "tools", "bench", "docs", "pyproject.toml", "README.md")
# pytest: some tests failed; an import of the mutated tree may fail during collection.
NOTICED = (1, 2)


class Fault(NamedTuple):
    """One entry of a table."""

    table: str
    name: str
    source: str
    file: str
    old: str
    new: str
    tests: list[str]


class Outcome(NamedTuple):
    """What the tests said."""

    noticed: bool
    by: str


def read(words: Sequence[str]) -> list[Fault]:
    """The faults whose table or name contains one of the words; all without words."""
    faults = [
        Fault(path.stem, **entry)
        for path in sorted(TABLES.glob("*.toml"))
        for entry in tomllib.loads(path.read_text())["fault"]
    ]
    for fault in faults:
        found = (ROOT / fault.file).read_text().count(fault.old)
        if found != 1:
            sys.exit(
                f"{fault.table}: {fault.name!r}: {fault.file} must hold its text once, not {found}"
            )
    chosen = [f for f in faults if not words or any(w in f"{f.table} {f.name}" for w in words)]
    return chosen or sys.exit(f"no fault in {TABLES} contains any of {list(words)}")


def copied(directory: Path) -> None:
    """The tree as it is."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, directory / name, ignore=ignore)
        elif source.exists():
            shutil.copy2(source, directory / name)


def run(directory: Path, tests: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
    """These tests in a copy of the tree."""
    environment = os.environ | {"PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *options]
    return subprocess.run(
        [*command, *tests], cwd=directory, env=environment, capture_output=True, text=True
    )


def outcome(fault: Fault) -> Outcome:
    """Which test notices a fault, if one does."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        copied(directory)
        changed = directory / fault.file
        changed.write_text(changed.read_text().replace(fault.old, fault.new))
        done = run(directory, fault.tests, "-x", "-n0")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode in NOTICED and failed:
        return Outcome(True, failed[0])
    return Outcome(False, (done.stdout + done.stderr).strip().splitlines()[-1])


def main() -> int:
    """Runs the tool."""
    parser = argparse.ArgumentParser(description="puts faults back and shows which test notices")
    parser.add_argument("words", nargs="*", help="only faults whose table or name contains one")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time")
    options = parser.parse_args()
    faults = read(options.words)
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    with tempfile.TemporaryDirectory() as name:
        copied(Path(name))
        without = run(Path(name), tests)
    if without.returncode != 0:
        print(without.stdout[-3000:], "These tests fail without any fault.", sep="\n")
        return 1
    unnoticed = []
    with ThreadPoolExecutor(options.jobs) as pool:
        # In the order of the tables, whichever ends first.
        for number, (fault, found) in enumerate(
            zip(faults, pool.map(outcome, faults), strict=True), 1
        ):
            verdict = f"noticed by {found.by}" if found.noticed else f"NOT NOTICED ({found.by})"
            print(
                f"{number:3}/{len(faults)} {fault.table}: {fault.name} ({fault.source}): {verdict}",
                flush=True,
            )
            unnoticed += [] if found.noticed else [fault]
    print(f"{len(faults) - len(unnoticed)} of {len(faults)} faults noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
