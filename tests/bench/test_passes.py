"""Passes of clipped steps, counted, stay within the goals of `bench/passes.py`."""

from typing import Any

import pytest

from tests.bench.scripts import as_users_run_it, script

passes = script("passes")
roofline = script("roofline")


@pytest.mark.parametrize(
    ("name", "clip", "machine", "most"),
    [
        ("mlp", "flat", "H100", 1.25),
        ("mlp", "per_layer", "v5p", 1.25),
        ("transformer", "flat", "v5p", 1.25),
        ("transformer", "per_layer", "H100", 1.25),
        ("gpt2_block", "flat", "H100", 1.10),
        ("gpt2_block", "per_layer", "v5p", 1.10),
        ("cifar_cnn", "flat", "H100", 1.25),
        ("cifar_cnn", "per_layer", "v5p", 1.25),
        ("gpt2", "flat", "H100", 1.10),
        pytest.param("gpt2", "flat", "v5p", 1.10, marks=pytest.mark.slow),
        pytest.param("gpt2", "per_layer", "v5p", 1.10, marks=pytest.mark.slow),
        pytest.param("gpt2_remat", "flat", "v5p", 1.10, marks=pytest.mark.slow),
    ],
)
def test_a_clipped_step_takes_few_passes_more(
    name: str, clip: str, machine: Any, most: float
) -> None:
    with as_users_run_it():
        ratios = passes.measure(name, clip, roofline.MACHINES[machine])
    assert 1.0 <= ratios["passes"] <= most


def test_a_second_backward_pass_is_seen() -> None:
    """Of the eight products of the MLP, the two that pass a cotangent on are made once more."""
    with as_users_run_it():
        case, machine = passes.CASES["mlp"](1), roofline.MACHINES["H100"]
        plain = passes.ordinary(case, machine)
        taps = passes.clipped(case, "flat", machine, method="taps")
    layers = [784 * 512, 512 * 512, 512 * 10]
    again = sum(layers[1:]) / (3 * sum(layers) - layers[0])
    assert taps.passes / plain.passes == pytest.approx(1 + again, rel=1e-3)
