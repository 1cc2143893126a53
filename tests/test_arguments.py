"""Whatever is passed to a public function: a sensible result, or a sentence naming the argument.

A table of public functions, each with arguments that are fine; one argument at a time is replaced
by every value that is wrong somewhere. Allowed is a result, or a TypeError or ValueError that says
which argument must be what; no other exception, and no answer that takes more than ten seconds of
CPU.
"""

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import accounting, distributed, lipschitz, nn, training
from jaxdp.accounting import PoissonSampling, PureRelease
from jaxdp.checks import shown
from jaxdp.sampling import sampler_from_dict
from jaxdp.schedules import check_schedule

SECONDS = 10.0

VALUES: list[Any] = [
    None, "3", b"x", "", float("nan"), float("inf"), -float("inf"), -1, 0, 1, 2, True, False, 0.5,
    1e-300, 1e300, -0.5, 10**9, 10**18, 10**30, 10**5000, 1j, [], {}, (), object(), [1.0], ["a"],
    {"a": 1}, {1, 2}, range(3), lambda x: x, np.array(1), np.array(0.5), np.array([0.5, 1.0]),
    np.ones((2, 2)), np.array("x"), np.array([], object), np.float32(2), np.int64(3),
    np.bool_(True), jnp.array(0.5), jnp.array([1.0, 2.0]), jnp.ones((2, 2)), jax.random.key(0),
    type, Exception("x"),
]  # fmt: skip

Case = tuple[Callable[..., Any], dict[str, Any]]
SPENT = accounting.Ledger().charge(1.0, PoissonSampling(0.1), 10)
ASK: dict[str, Any] = {
    "delta": 1e-5, "accountant": "rdp", "neighboring_relation": "add_or_remove_one",
}  # fmt: skip
SIZED: dict[str, Any] = {"num_examples": 100, "batch_size": 10, "physical_batch_size": 8, "seed": 1}
CONV: dict[str, Any] = {
    "in_channels": 2, "out_channels": 4, "kernel_size": 3, "stride": 1, "padding": 0, "dilation": 1,
    "groups": 1, "bias": True,
}  # fmt: skip
RNN: dict[str, Any] = {
    "input_size": 2, "hidden_size": 3, "num_layers": 1, "bias": True, "dropout": 0.0,
    "bidirectional": False,
}  # fmt: skip


def registered_rule(primitive: Any, **options: Any) -> Any:
    return lipschitz.register_bound_rule(primitive, **options)


def budget(**options: Any) -> bool:
    return training.Budget(**options).allows(SPENT, [1.0], PoissonSampling(0.1))


def sampler(make: Callable[..., Any], **options: Any) -> Any:
    made = make(**options)
    return made.to_dict(), made.scheme, made.expected_batch_size


def loss(params: Any, example: Any) -> Any:
    return jnp.tanh(params @ example)


def pooled(make: Callable[..., nn.Layer], **options: Any) -> Any:
    return make(**options).apply({}, jnp.ones((6, 6, 2)))


def joined_one(devices: Any) -> Any:
    """`join`, which would set the number of devices of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.config, "update", lambda name, value: None)
        return distributed.join(devices=devices)


def fitted(**options: Any) -> Any:
    tx = optax.chain(
        jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, jax.random.key(0)), optax.scale(0.1)
    )
    draws = jaxdp.FixedSizeSampler(10, batch_size=2, seed=1)
    start = training.init(jnp.ones(2), tx)
    told: dict[str, Any] = {
        "sampler": draws, "state": start, "step": stepped(), "data": np.ones((10, 2), np.float32),
    }  # fmt: skip
    given: dict[str, Any] = told | {"progress": False} | options
    return training.fit(**given)


@functools.cache
def stepped() -> training.Step:
    tx = optax.chain(
        jaxdp.clip_flat(1.0), jaxdp.add_noise(1.0, jax.random.key(0)), optax.scale(0.1)
    )
    return training.make_step(jaxdp.per_sample_grads(loss), tx)


LOGITS = {"logits": jnp.array([1.0, 0.0]), "label": 1}
PAIR = {"prediction": jnp.array([1.0, 0.0]), "target": jnp.array([1.0, 1.0])}

# name -> (function, arguments that are fine)
FUNCTIONS: dict[str, Case] = {
    "epsilon": (
        accounting.epsilon,
        {"noise_multiplier": 1.0, "steps": 10, "sampling_rate": 0.1, "sampling": None, **ASK},
    ),
    "epsilon pld": (
        accounting.epsilon,
        {"noise_multiplier": 1.0, "steps": 10, "delta": 1e-5, "sampling_rate": 0.1},
    ),
    "dp_event": (
        accounting.dp_event,
        {"noise_multiplier": 1.0, "sampling": PoissonSampling(0.1), "steps": 3},
    ),
    "calibrate_noise_multiplier": (
        accounting.calibrate_noise_multiplier,
        {"epsilon": 2.0, "steps": 10, "sampling_rate": 0.1, **ASK},
    ),
    "calibrate_steps": (
        accounting.calibrate_steps,
        {"epsilon": 2.0, "noise_multiplier": 1.0, "sampling_rate": 0.1, "at_most": 1000, **ASK},
    ),
    "calibrate_sampling_rate": (
        accounting.calibrate_sampling_rate,
        {"epsilon": 2.0, "noise_multiplier": 1.0, "steps": 10, **ASK},
    ),
    "combined_noise_multiplier": (
        accounting.combined_noise_multiplier, {"noise_multipliers": [1.0, 2.0]}
    ),
    "PoissonSampling": (PoissonSampling, {"sampling_rate": 0.1}),
    "FixedSizeSampling": (
        accounting.FixedSizeSampling, {"num_examples": 10, "batch_size": 2}
    ),
    "ShuffledEpochs": (accounting.ShuffledEpochs, {"steps_per_epoch": 3}),
    "PureRelease": (PureRelease, {"epsilon": 0.5, "sampling": None}),
    "scheme_from_dict": (accounting.scheme_from_dict, {"data": PoissonSampling(0.1).to_dict()}),
    "PoissonSampler": (
        functools.partial(sampler, jaxdp.PoissonSampler),
        {"num_examples": 100, "expected_batch_size": 10, "physical_batch_size": 8, "seed": 1},
    ),
    "PoissonSampler rate": (
        functools.partial(sampler, jaxdp.PoissonSampler),
        {"num_examples": 100, "sampling_rate": 0.1},
    ),
    "FixedSizeSampler": (functools.partial(sampler, jaxdp.FixedSizeSampler), SIZED),
    "ShuffledSampler": (functools.partial(sampler, jaxdp.ShuffledSampler), SIZED),
    "draw": (jaxdp.FixedSizeSampler(**SIZED).draw, {"step": 3, "parts": 2}),
    "part": (jaxdp.FixedSizeSampler(**SIZED).part, {"index": 1, "parts": 2}),
    "batches": (jaxdp.FixedSizeSampler(**SIZED).batches, {"start": 3}),
    "sampler_from_dict": (
        sampler_from_dict,
        {"data": jaxdp.FixedSizeSampler(**SIZED).to_dict()},
    ),
    "schedules": (functools.partial(check_schedule, "value"), {"value": 0.5}),
    "Budget": (budget, {"epsilon": 3.0, **ASK}),
    "linear": (nn.linear, {"in_features": 2, "out_features": 3, "bias": True}),
    "conv_linear": (nn.conv_linear, {"in_features": 2, "out_features": 3, "bias": True}),
    "conv1d": (nn.conv1d, CONV | {"padding_mode": "zeros"}),
    "conv2d": (nn.conv2d, CONV | {"padding_mode": "zeros"}),
    "conv3d": (nn.conv3d, CONV | {"padding_mode": "zeros"}),
    "conv_transpose1d": (nn.conv_transpose1d, CONV | {"output_padding": 0}),
    "conv_transpose2d": (nn.conv_transpose2d, CONV | {"output_padding": 0}),
    "conv_transpose3d": (nn.conv_transpose3d, CONV | {"output_padding": 0}),
    "embedding": (
        nn.embedding,
        {
            "num_embeddings": 5, "embedding_dim": 2, "padding_idx": None, "max_norm": None,
            "norm_type": 2.0, "scale_grad_by_freq": False,
        },
    ),  # fmt: skip
    "lstm": (nn.lstm, RNN),
    "gru": (nn.gru, RNN),
    "rnn": (nn.rnn, RNN | {"nonlinearity": "tanh"}),
    "layer_norm": (nn.layer_norm, {"normalized_shape": 3, "eps": 1e-5}),
    "rms_norm": (nn.rms_norm, {"normalized_shape": 3, "eps": 1e-5}),
    "group_norm": (nn.group_norm, {"num_groups": 2, "num_channels": 4, "eps": 1e-5}),
    "instance_norm": (nn.instance_norm, {"num_features": 3, "eps": 1e-5}),
    "dropout": (nn.dropout, {"rate": 0.5}),
    "flatten": (nn.flatten, {"channels_first": False}),
    "prelu": (nn.prelu, {"num_parameters": 1}),
    "sequence_bias": (nn.sequence_bias, {"embed_dim": 3}),
    "residual": (nn.residual, {"layer": nn.tanh, "shortcut": nn.tanh}),
    "function": (nn.function, {"fun": nn.tanh}),
    "multi_head_attention": (
        nn.multi_head_attention,
        {
            "embed_dim": 4, "num_heads": 2, "dropout": 0.0, "bias": True, "add_bias_kv": False,
            "add_zero_attn": False, "kdim": 4, "vdim": 4,
        },
    ),  # fmt: skip
    "charge": (
        accounting.Ledger().charge,
        {"noise_multiplier": 1.0, "sampling": PoissonSampling(0.1), "steps": 3},
    ),
    "charge_pure": (accounting.Ledger().charge_pure, {"epsilon": 0.5, "sampling": None}),
    "merge": (SPENT.merge, {"other": SPENT}),
    "ledger epsilon": (SPENT.epsilon, ASK),
    "ledger delta": (
        SPENT.delta,
        {"epsilon": 1.0, "accountant": "rdp", "neighboring_relation": "add_or_remove_one"},
    ),
    "steps_left": (
        SPENT.steps_left,
        {
            "noise_multiplier": 1.0, "sampling": PoissonSampling(0.1), "epsilon": 3.0,
            "at_most": 100, **ASK,
        },
    ),  # fmt: skip
    "LedgerEntry": (
        accounting.LedgerEntry,
        {"noise_multipliers": (1.0,), "sampling": PoissonSampling(0.1), "steps": 3},
    ),
    "from_json": (accounting.Ledger.from_json, {"text": SPENT.to_json()}),
    "clip_flat": (jaxdp.clip_flat, {"threshold": 1.0}),
    "clip_per_layer": (jaxdp.clip_per_layer, {"threshold": 1.0}),
    "clip_by_group": (jaxdp.clip_by_group, {"labels": "a", "thresholds": {"a": 1.0}}),
    "clip_automatic": (jaxdp.clip_automatic, {"threshold": 1.0, "stability": 0.01}),
    "clip_adaptive": (
        jaxdp.clip_adaptive,
        {
            "initial_threshold": 1.0, "key": jax.random.key(0), "count_noise_multiplier": 1.0,
            "expected_batch_size": 8, "quantile": 0.5, "learning_rate": 0.2, "per_layer": False,
        },
    ),  # fmt: skip
    "add_noise": (
        jaxdp.add_noise,
        {"noise_multiplier": 1.0, "key": jax.random.key(0), "allocation": "global"},
    ),
    "accumulate": (jaxdp.accumulate, {"inner": optax.identity()}),
    "random_key": (jaxdp.random_key, {}),
    "per_sample_grads": (
        jaxdp.per_sample_grads,
        {
            "loss_fn": loss, "method": "auto", "has_aux": False, "memory_budget": None,
            "microbatch_size": None,
        },
    ),  # fmt: skip
    "explain": (
        functools.partial(jaxdp.explain, params=jnp.ones(2), batch=jnp.ones((3, 2))),
        {
            "loss_fn": loss, "method": "auto", "has_aux": False, "memory_budget": None,
            "microbatch_size": None,
        },
    ),  # fmt: skip
    "validate": (
        functools.partial(jaxdp.validate, params=jnp.ones(2), example=jnp.ones(2)),
        {"model_fn": loss},
    ),
    "Draws": (
        accounting.Draws, {"purpose": "noise", "fingerprint": "ab", "first": 0, "count": 3}
    ),
    "max_pool": (
        functools.partial(pooled, nn.max_pool),
        {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1},
    ),
    "avg_pool": (
        functools.partial(pooled, nn.avg_pool),
        {"kernel_size": 2, "stride": 2, "padding": 0, "count_include_pad": True},
    ),
    "adaptive_avg_pool": (functools.partial(pooled, nn.adaptive_avg_pool), {"output_size": 2}),
    "sequential": (lambda layer: nn.sequential(nn.tanh, layer), {"layer": nn.tanh}),
    "from_torch_state_dict": (
        nn.from_torch_state_dict, {"layer": nn.flatten(), "state_dict": {}, "prefix": ""}
    ),
    "lipschitz linear": (
        lipschitz.linear,
        {"in_features": 2, "out_features": 3, "bias": False, "constraint": "spectral"},
    ),
    "lipschitz conv2d": (
        lipschitz.conv2d,
        {
            "in_channels": 2, "out_channels": 4, "kernel_size": 3, "stride": 1, "padding": 0,
            "constraint": "spectral", "bias": False,
        },
    ),  # fmt: skip
    "lipschitz bias": (lipschitz.bias, {"features": 3, "max_norm": 1.0}),
    "lipschitz residual": (
        lipschitz.residual, {"layer": nn.tanh, "shortcut": nn.tanh, "merge": "add"}
    ),
    "lipschitz bounded_input": (lipschitz.bounded_input, {"bound": 1.0}),
    "group_sort": (lipschitz.group_sort, {"group_size": 2}),
    "householder": (lipschitz.householder, {"features": 2}),
    "l2_norm_pool": (functools.partial(pooled, lipschitz.l2_norm_pool), {"window": 2}),
    "scaled_avg_pool": (functools.partial(pooled, lipschitz.scaled_avg_pool), {"window": 2}),
    "gradient_norm_preserving": (lipschitz.gradient_norm_preserving, {"fun": jnp.tanh}),
    "lipschitz clip_gradient": (
        lipschitz.clip_gradient, {"x": jnp.ones(3), "clip_value": 1.0}
    ),
    "gradient_clip": (lipschitz.gradient_clip, {"clip_value": 1.0}),
    "adaptive_gradient_clip": (lipschitz.adaptive_gradient_clip, {"initial": 1.0}),
    "track_quantile": (
        lipschitz.track_quantile,
        {"quantile": 0.5, "learning_rate": 0.2, "expected_batch_size": 10},
    ),
    "bounded_grads": (
        lipschitz.bounded_grads,
        {"loss_fn": loss, "input_bound": 1.0, "enforce_input_bound": True, "with_losses": False},
    ),
    "bounded_grads called": (
        lambda **options: lipschitz.bounded_grads(loss, **options)(
            jnp.ones(2), jnp.ones((3, 2))
        ),
        {"input_bound": 1.0, "thresholds": 1.0},
    ),
    "bounds": (
        functools.partial(lipschitz.bounds, params=jnp.ones(2), example=jnp.ones(2)),
        {"loss_fn": loss, "input_bound": 1.0},
    ),
    "falsify": (
        functools.partial(
            lipschitz.falsify, params=jnp.ones(2), example=jnp.ones(2), key=jax.random.key(0)
        ),
        {"loss_fn": loss, "input_bound": 1.0, "classes": 2, "count": 2, "steps": 1},
    ),
    "signal_to_noise_average": (
        functools.partial(
            lipschitz.signal_to_noise_average, params=jnp.ones(2), batch=jnp.ones((3, 2))
        ),
        {"loss_fn": loss, "input_bound": 1.0},
    ),
    "signal_to_noise_elementwise": (
        functools.partial(
            lipschitz.signal_to_noise_elementwise, params=jnp.ones(2), batch=jnp.ones((3, 2))
        ),
        {"loss_fn": loss, "input_bound": 1.0},
    ),
    "unclipped_counts": (
        lipschitz.unclipped_counts,
        {"loss_fn": loss, "input_bound": 1.0, "candidates": [0.1, 0.5], "leaf": "clip_value"},
    ),
    "select_clip_value": (
        lipschitz.select_clip_value,
        {
            "counts": jnp.array([3, 5]), "candidates": [0.1, 0.5], "quantile": 0.5,
            "expected_count": 5, "epsilon": 1.0, "key": jax.random.key(0), "step": 0,
        },
    ),  # fmt: skip
    "selection_draws": (lipschitz.selection_draws, {"key": jax.random.key(0), "step": 0}),
    "declare": (lipschitz.declare, {"fun": jnp.tanh, "rule": lambda eqn, values: ([], None)}),
    "project": (lipschitz.project, {"projection": lambda params: params}),
    "matrix_norm": (lipschitz.matrix_norm, {"matrix": jnp.eye(2)}),
    "convolution_norm": (
        lipschitz.convolution_norm,
        {"kernel": jnp.ones((3, 1, 2)), "stride": (1,), "dilation": (1,), "groups": 1},
    ),
    "orthogonal": (lipschitz.orthogonal, {"matrix": jnp.eye(2)}),
    "register_bound_rule": (
        registered_rule, {"whole": False, "exact": False, "primitive": "a_primitive"}
    ),
    "onto_ball": (lipschitz.onto_ball, {"array": jnp.ones(2), "norm": 1.0}),
    "onto_spectral_ball": (lipschitz.onto_spectral_ball, {"matrix": jnp.eye(2), "norm": 1.0}),
    "softmax_cross_entropy": (
        lipschitz.softmax_cross_entropy, {**LOGITS, "temperature": 1.0}
    ),
    "binary_cross_entropy": (
        lipschitz.binary_cross_entropy,
        {"logits": jnp.ones(2), "targets": jnp.ones(2), "temperature": 1.0},
    ),
    "multiclass_hinge": (lipschitz.multiclass_hinge, {**LOGITS, "margin": 1.0}),
    "cosine_similarity": (lipschitz.cosine_similarity, {**PAIR, "least_norm": 1.0}),
    "mean_absolute_error": (lipschitz.mean_absolute_error, PAIR),
    "kantorovich_rubinstein": (
        lipschitz.kantorovich_rubinstein, {**LOGITS, "proportions": (0.5, 0.5)}
    ),
    "hinge_kantorovich_rubinstein": (
        lipschitz.hinge_kantorovich_rubinstein,
        {**LOGITS, "proportions": (0.5, 0.5), "alpha": 10.0, "margin": 1.0},
    ),
    "fit": (
        fitted,
        {
            "steps": 0, "delta": 1e-5, "budget": 1.0, "accountant": "rdp",
            "neighboring_relation": "replace_one", "ledger": accounting.Ledger(),
            "evaluate": None, "report_every": 1, "log_fn": None, "checkpoints": None,
            "progress": False, "sharding": None, "data_parts": 1,
        },
    ),  # fmt: skip
    "fit objects": (
        functools.partial(
            fitted, steps=0, delta=1e-5, accountant="rdp", neighboring_relation="replace_one"
        ),
        {
            "state": training.init(jnp.ones(2), optax.sgd(0.1)), "step": stepped(),
            "sampler": jaxdp.FixedSizeSampler(10, batch_size=2, seed=1),
            "data": np.ones((10, 2), np.float32),
        },
    ),  # fmt: skip
    "make_step": (
        training.make_step,
        {
            "grads_fn": jaxdp.per_sample_grads(loss), "tx": optax.sgd(0.1), "example_keys": False,
        },
    ),  # fmt: skip
    "init": (training.init, {"params": jnp.ones(2), "tx": optax.sgd(0.1)}),
    "run_of": (training.run_of, {"error": ValueError("x")}),
    "data_parallel": (distributed.data_parallel, {"devices": 1}),
    "join": (joined_one, {"devices": 1}),
    "all_reduce": (lambda axis: distributed.all_reduce(axis), {"axis": "data"}),
    "spread_rows": (
        distributed.spread_rows,
        {
            "sharding": distributed.data_parallel(1), "indices": np.arange(4),
            "rows_of": lambda index: 10.0 * index,
        },
    ),  # fmt: skip
    "spread_state": (
        distributed.spread_state, {"mesh": distributed.data_parallel(1).mesh, "state": jnp.ones(2)}
    ),
    "exchanged": (
        distributed.exchanged, {"compiled": jax.jit(jnp.sum).lower(jnp.ones(3)).compile()}
    ),
    "Checkpoints": (training.Checkpoints, {"directory": "/nonexistent/place", "keep": 3}),
}


def told(error: Exception, argument: str, function: str) -> bool:
    """Whether a message names the argument, and what it must be."""
    text = str(error)
    # A mapping is told by what it describes, and a sequence's entry by the name of the sequence.
    names = {argument, argument.rstrip("s"), *SPOKEN.get((function, argument), ())}
    named = any(re.search(rf"\b{re.escape(name)}", text) for name in names)
    return named and " must " in text and "got " in text


# Functions that are called at once: what a wrong one raises is its own error.
CALLED = {("explain", "loss_fn"), ("validate", "model_fn"), ("bounds", "loss_fn"),
    ("falsify", "loss_fn"), ("signal_to_noise_average", "loss_fn"),
    ("signal_to_noise_elementwise", "loss_fn"), ("fit objects", "data")}

# Where a message speaks of the argument by another name.
SPOKEN = {
    ("combined_noise_multiplier", "noise_multipliers"): ("noise_multiplier",),
    ("scheme_from_dict", "data"): ("sampling kind", "sampling scheme"),
    ("sampler_from_dict", "data"): ("sampler kind", "sampler"),
    ("residual", "shortcut"): ("layer",),
    ("lipschitz residual", "shortcut"): ("layer",),
    ("max_pool", "kernel_size"): ("window",),
    ("max_pool", "dilation"): ("window",),
    ("avg_pool", "kernel_size"): ("window",),
    ("embedding", "num_embeddings"): ("padding_idx",),
    ("group_norm", "num_groups"): ("num_channels",),
    ("multi_head_attention", "num_heads"): ("embed_dim",),
    ("calibrate_noise_multiplier", "steps"): ("epsilon",),
    ("calibrate_noise_multiplier", "sampling_rate"): ("epsilon",),
    ("register_bound_rule", "primitive"): ("primitives",),
    ("convolution_norm", "kernel"): ("stride",),
    ("PoissonSampler", "expected_batch_size"): ("sampling_rate", "physical_batch_size"),
}


def faults(cases: dict[str, Case], name: str, argument: str) -> list[str]:
    """What goes wrong with one argument of one function."""
    function, fine = cases[name]
    found = []
    for value in VALUES:
        if callable(value) and (name, argument) in CALLED:
            continue
        start = time.process_time()
        try:
            function(**{**fine, argument: value})
        except (TypeError, ValueError) as error:
            if not told(error, argument, name):
                found.append(f"{argument}={shown(value)}: {type(error).__name__}: {error}"[:300])
        except Exception as error:
            found.append(f"{argument}={shown(value)}: {type(error).__name__}: {error}"[:300])
        if (seconds := time.process_time() - start) > SECONDS:
            found.append(f"{argument}={shown(value)}: {seconds:.0f} s")
    return found


def arguments(cases: dict[str, Case]) -> list[tuple[str, str]]:
    return [(name, argument) for name, (_, fine) in cases.items() for argument in fine]


# One argument of each function by default, all of them where all tests run.
def sampled(cases: dict[str, Case]) -> list[Any]:
    seen: set[str] = set()
    params = []
    for name, argument in arguments(cases):
        marks = [pytest.mark.slow] if name in seen else []
        seen.add(name)
        params.append(pytest.param(name, argument, marks=marks, id=f"{name}-{argument}"))
    return params


@pytest.mark.parametrize(("name", "argument"), sampled(FUNCTIONS))
def test_a_wrong_argument_is_told_in_one_sentence(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # "3" is a fine directory
    assert faults(FUNCTIONS, name, argument) == []


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_the_arguments_of_the_table_are_fine(name: str) -> None:
    function, fine = FUNCTIONS[name]
    assert function(**fine) is not NotImplemented


def test_the_test_sees_a_function_that_checks_nothing() -> None:
    cases: dict[str, Case] = {"root": (lambda x: 1 / x, {"x": 1})}
    seen = faults(cases, "root", "x")
    assert any("ZeroDivisionError" in each for each in seen)
    assert any("TypeError" in each for each in seen)
