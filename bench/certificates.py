"""Claim: certified norms are at most 1.01 times the norms themselves, on every model up to T 512.

    python bench/certificates.py [--models mlp lstm] [--rows N]

What a clip divides by is a certificate: a bound that no rounding error exceeds
(`jaxdp.engine.factors.gram`). For every model of `bench/zoo.py` and each method, over the samples
of a small batch: the median and the worst ratio of the certificate to the norm of the gradient that
`jax.grad` gives for this sample alone, whose squares are added up in double precision. The same for
the leaf whose median is largest, of those that hold at least a thousandth of the gradient. Written
to `bench/results/certificates_<device>.json`.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import zoo
from rich.console import Console
from rich.table import Table

import jaxdp

GOAL = 1.01
METHODS = ("slots", "taps")
# A leaf with less of the gradient than this is left out: its own norm may be all rounding.
SHARE = 1e-3


def true_norms(case: zoo.Case, rows: int) -> np.ndarray:
    """`[rows, leaves]`, of one gradient after the other."""
    grad = jax.jit(jax.grad(case.loss_fn))

    def of_row(row: int) -> list[float]:
        example = jax.tree.map(lambda leaf: leaf[row], case.batch)
        leaves = jax.tree.leaves(grad(case.params, example))
        return [float(np.sqrt(np.sum(np.square(leaf, dtype=np.float64)))) for leaf in leaves]

    return np.array([of_row(row) for row in range(rows)])


def certified_norms(case: zoo.Case, rows: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the whole gradient `[rows]`, and of each leaf `[rows, leaves]`."""
    groups = tuple(range(len(jax.tree.leaves(case.params))))

    @jax.jit
    def norms(params: Any, batch: Any) -> Any:
        grads = jaxdp.per_sample_grads(case.loss_fn, method=method)(params, batch)
        return grads.norms(), grads.norms(groups)

    part = jax.tree.map(lambda leaf: leaf[:rows], case.batch)
    whole, leaves = norms(case.params, part)
    return np.asarray(whole, np.float64), np.asarray(leaves, np.float64)


def measure(name: str, rows: int) -> dict[str, Any]:
    """The figures of one model."""
    case = zoo.CASES[name](1)
    rows = min(rows, case.batch_size)
    true = true_norms(case, rows)
    whole = np.sqrt(np.sum(np.square(true), axis=1))
    large = np.all(true >= SHARE * whole[:, None], axis=0)
    figures: dict[str, Any] = {"rows": rows}
    for method in METHODS:
        certified, leaves = certified_norms(case, rows, method)
        ratios = certified / whole
        by_leaf = np.median(leaves[:, large] / true[:, large], axis=0)
        figures[method] = {
            "median": float(np.median(ratios)),
            "worst": float(np.max(ratios)),
            "worst_leaf_median": float(np.max(by_leaf)),
        }
    return figures


def shown(results: dict[str, Any]) -> Table:
    """One line for each model and method."""
    table = Table(title="certificate / norm", title_justify="left")
    for column in ("model", "method", "median", "worst", "worst leaf, median", ""):
        table.add_column(column)
    for model, figures in results.items():
        for method in METHODS:
            found = figures[method]
            texts = [f"{found[key]:.6f}" for key in ("median", "worst", "worst_leaf_median")]
            holds = found["median"] <= GOAL
            table.add_row(model, method, *texts, "" if holds else f"above {GOAL}")
    return table


def main() -> None:
    """Measures, prints a table, writes the figures, and fails where the claim does."""
    parser = argparse.ArgumentParser(description="certified norms against norms")
    parser.add_argument("--models", nargs="+", choices=zoo.CASES, metavar="MODEL")
    parser.add_argument("--rows", type=int, default=16, help="samples of each model")
    options = parser.parse_args()
    console = Console()
    results = {}
    for name in options.models or zoo.CASES:
        results[name] = measure(name, options.rows)
        console.print(shown({name: results[name]}))
    console.print(shown(results))
    device = re.sub(r"[^a-z0-9]+", "_", jax.devices()[0].device_kind.lower())
    if not options.models:  # a partial run would replace the figures of a complete one
        out = Path("bench/results") / f"certificates_{device}.json"
        out.write_text(json.dumps({"jax": jax.__version__, "models": results}, indent=2) + "\n")
        console.print(f"wrote {out}")
    missed = [name for name, found in results.items() for m in METHODS if found[m]["median"] > GOAL]
    if missed:
        raise SystemExit(f"above {GOAL}: {', '.join(dict.fromkeys(missed))}")


if __name__ == "__main__":
    main()
