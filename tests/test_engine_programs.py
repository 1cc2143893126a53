"""Every method against `vmap(grad)` in double precision, on programs by hand and at random."""

import functools

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase

from tests.oracle import (
    METHODS,
    Reference,
    check_case,
    check_spoiled_sample,
    differentiate,
    every_method,
)
from tests.program_table import PROGRAMS
from tests.programs import Program, programs

# A part with the oldest JAX, another with newer ones (tests/conftest.py).
pytestmark = pytest.mark.sweep

# One row in the middle does not count, and holds NaN.
MASK = np.array([True, True, False, True, True])

# `vmap` makes the gradient of a grouped kernel one convolution with batch groups, and XLA computes
# that on CPU as a dense one times a mask of zeros and ones: the NaN of one sample reaches all.
MIXES_NAN = ("conv_grouped", "conv_depthwise", "conv_grouped_with_a_derived_kernel")

SPOILED = MIXES_NAN + (
    "dense_over_time",
    "same_weight_twice",
    "scale",
    "conv_1d",
    "layer_norm",
    "attention",
    "scan_of_a_cell",
    "scan_over_stacked_layers",
    "cond_on_the_sample",
    "custom_vjp_with_a_weight",
    "weight_decay",
)


MICROBATCHED = (
    "low_rank_adapter",
    "parameters_and_activations_in_aux",
    "scan_of_a_cell",
    "embedding_tied",
)


@functools.cache
def reference_of(name: str) -> Reference:
    return differentiate(PROGRAMS[name])


# Of the programs that are there narrow and wide, every second wide one is left to `make slow`.
WIDE = [name for name in PROGRAMS if name.endswith("_wide")]


@pytest.mark.parametrize(("name", "method"), every_method(PROGRAMS, slow=WIDE[::2]))
def test_program(name: str, method: str) -> None:
    check_case(PROGRAMS[name], method, MASK, reference_of(name))


# What taps must leave to slots or may not weigh at the loss, each for a reason of its own.
TAPPED = (
    "leaves_joined",
    "leaves_stacked",
    "same_weight_twice",
    "slices_that_overlap",
    "cotangent_clipped_after_a_product",
    "weights_that_are_scaled_and_named",
)


@pytest.mark.parametrize("name", TAPPED)
def test_program_by_taps(name: str) -> None:
    check_case(PROGRAMS[name], "taps", MASK, reference_of(name))


@pytest.mark.parametrize(("name", "method"), every_method(SPOILED))
def test_a_sample_of_nan_harms_no_other(name: str, method: str) -> None:
    check_spoiled_sample(PROGRAMS[name], method, reference_of(name))


@pytest.mark.parametrize(("name", "method"), every_method(MICROBATCHED))
def test_program_in_microbatches(name: str, method: str) -> None:
    """Two at a time of five: the last microbatch is filled up."""
    case = PROGRAMS[name]
    case = case._replace(options={**case.options, "microbatch_size": 2})
    check_case(case, method, MASK, reference_of(name))


@pytest.mark.xfail(reason="batch groups on CPU multiply by zero", raises=AssertionError)
@pytest.mark.parametrize("name", MIXES_NAN)
def test_a_sample_of_nan_harms_no_other_when_kernels_are_materialised(name: str) -> None:
    check_spoiled_sample(PROGRAMS[name], "dense", reference_of(name))


# Hypothesis spends most of a long run on variations of what it has drawn. Many short runs, each
# with a seed of its own from the name of the test, draw more programs anew.
RUNS = [pytest.param(run, marks=() if run == 0 else pytest.mark.slow) for run in range(48)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("run", RUNS)
@hypothesis.settings(
    max_examples=3,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=(HealthCheck.too_slow,),
    report_multiple_bugs=False,
)
@hypothesis.given(program=programs())
def test_random_program(run: int, method: str, program: Program) -> None:
    check_case(program.case, method, program.mask)
