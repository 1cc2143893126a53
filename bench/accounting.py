"""Claim: with a schedule of σ, a budget and the PLD accountant cost at most 20 ms a step.

    python bench/accounting.py [--only NAME] [--at-most SECONDS]

For each schedule it runs what `fit` runs beside the training: `Budget.allows` before every step, a
charge, and `Ledger.epsilon` at every report, in a process of its own, so that no schedule finds the
answers of another. Times are CPU time; the ledgers and the answers are exact. Written to
`bench/results/accounting_cpu.json`, unless `--only` leaves out a schedule.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jaxdp.accounting import Ledger, PoissonSampling
from jaxdp.training.budget import Budget

DELTA = 1e-5
# name -> (σ of a step, steps, sampling rate, ε, steps between reports)
Schedule = tuple[Callable[[int], float], int, float, float, int]
SCHEDULES: dict[str, Schedule] = {
    "constant": (lambda t: 1.1, 2500, 0.01, 2.5, 100),
    "2 to 1, stopped by steps": (lambda t: 2.0 - t / 1000, 1000, 0.01, 3.0, 100),
    "2 to 1, stopped by the budget": (lambda t: 2.0 - t / 1000, 1000, 0.01, 0.9, 100),
    "1 to 2, stopped by the budget": (lambda t: 1.0 + t / 1000, 1000, 0.01, 0.9, 100),
    "short: 2 to 1 in 100 steps": (lambda t: 2.0 - t / 100, 100, 0.04, 1.5, 25),
    "to and fro": (lambda t: (1.1, 2.2)[t % 2], 1000, 0.01, 1.2, 100),
    "waves": (lambda t: 1.5 + 0.5 * math.sin(t / 30), 1000, 0.01, 1.1, 100),
    "long: 2 to 0.8": (lambda t: 2.0 * 0.4 ** (t / 10_000), 10_000, 0.004, 2.0, 250),
}


def run(name: str, at_most: float) -> tuple[int, int, float, float, float]:
    """Steps executed, distinct σ, seconds for the budget, for the reports, and the ε spent."""
    sigma, steps, rate, epsilon, every = SCHEDULES[name]
    scheme, ledger, budget = PoissonSampling(rate), Ledger(), Budget(epsilon, DELTA)
    asking = reporting = 0.0
    for step in range(steps):
        start = time.process_time()
        allowed = budget.allows(ledger, [sigma(step)], scheme)
        asking += time.process_time() - start
        if not allowed or asking + reporting > at_most:
            break
        ledger = ledger.charge(sigma(step), scheme)
        if ledger.steps % every == 0:
            start = time.process_time()
            ledger.epsilon(DELTA)
            reporting += time.process_time() - start
    distinct = len({sigma(step) for step in range(ledger.steps)})
    return ledger.steps, distinct, asking, reporting, ledger.epsilon(DELTA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="schedules whose name holds this")
    parser.add_argument("--at-most", type=float, default=120.0, help="seconds for one schedule")
    options = parser.parse_args()
    print("| schedule | steps | distinct σ | budget, ms/step | reports, ms/step | ε of budget |")
    print("|---|---|---|---|---|---|")
    figures: dict[str, dict[str, Any]] = {}
    fresh = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    for name in SCHEDULES:
        if options.only in name:
            done = fresh.submit(run, name, options.at_most).result()
            steps, distinct, asking, reporting, spent = done
            each = 1e3 / max(steps, 1)
            limit = SCHEDULES[name][3]
            print(
                f"| {name} | {steps} | {distinct} | {asking * each:.1f} | {reporting * each:.1f} "
                f"| {spent:.4f} of {limit} |",
                flush=True,
            )
            figures[name] = {
                "steps": steps,
                "distinct_sigmas": distinct,
                "budget_ms_per_step": round(asking * each, 2),
                "reports_ms_per_step": round(reporting * each, 2),
                "epsilon_spent": spent,
                "epsilon_of_budget": limit,
            }
    fresh.shutdown()
    if not options.only:
        path = Path(__file__).parent / "results" / "accounting_cpu.json"
        path.write_text(json.dumps({"delta": DELTA, "schedules": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
