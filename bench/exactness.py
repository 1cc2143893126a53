"""Whether clipped sums are right on the device at hand, at its real arithmetic.

    python bench/accelerator.py --models

Claim: (1) the clipped sum of every method is that of a loop of `jax.grad` in float32 on the host
CPU, whose norms and sums are taken in float64, up to 16 units of roundoff of what the device
multiplies, and the 1e-4 by which certified norms may be larger. (2) One sample alone never adds
more than C, also where all of its rounding goes one way: its entries are equal, and its weights
lie just above the midpoint of two numbers of the device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import workloads
from jax import lax

import jaxdp
from jaxdp.engine.platforms import platform

METHODS = ("slots", "taps", "fused", "dense")
# Bits of a significand that a product reads of float32, by platform; a model in bfloat16 has 7.
READ = {"cpu": 23, "gpu": 10, "tpu": 7}
# Of a sum: units of roundoff, and by how much its weights are smaller since norms are certified.
UNITS, CERTIFIED = 16, 1e-4
# Of what one sample adds.
TOLERANCE = 1e-5


# ---- clipped sums --------------------------------------------------------------------------------


@functools.cache
def single_gradients(name: str) -> np.ndarray:
    """`[B, parameters]`, in float32 on the host: one sample after the other."""
    build = workloads.IN_SINGLE.get(name, workloads.WORKLOADS[name])
    host = jax.local_devices(backend="cpu")[0]
    with jax.default_device(host), jax.default_matmul_precision("highest"):
        case = build(True).case
        gradient = jax.jit(lambda i: jax.grad(case.loss_fn)(case.params, case.example(i)))
        return np.stack([flat(gradient(i)) for i in range(case.batch_size)])


def flat(tree: Any) -> np.ndarray:
    """All leaves as one vector in float64."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def roundoff(name: str) -> float:
    """Unit roundoff of the operands of a model's products on this platform."""
    bits = 7 if name in workloads.IN_SINGLE else READ[platform()]
    return 2.0 ** -(bits + 1)


def check_sum(name: str, method: str) -> dict[str, Any]:
    """One method's clipped sum of a tiny model, beside the host's.

    Args:
      name: of `workloads.WORKLOADS`.
      method: of `METHODS`.

    Returns:
      The error relative to the norm of the sum, what is allowed, and whether it is.
    """
    rows = single_gradients(name)
    norms = np.linalg.norm(rows, axis=1)
    clip_norm = float(0.7 * np.median(norms))  # a factor that is no power of two
    expected = np.minimum(1, clip_norm / norms) @ rows
    workload = workloads.WORKLOADS[name](True)
    step = jax.jit(workloads.step_of(workload, f"flat_{method}", clip_norm))
    found = flat(step(workload.case.params, workload.case.batch))
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    allowed = UNITS * roundoff(name) + CERTIFIED
    return {"error": error, "allowed": allowed, "passed": error <= allowed}


# ---- one sample alone ----------------------------------------------------------------------------


class Form(NamedTuple):
    """A loss whose gradient is Σ_t u_t v_tᵀ of a batch (u, v), and the shapes of w, u and v."""

    loss_fn: Callable[[Any, Any], jax.Array]
    weight: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def product(dtype: Any) -> Callable[[Any, Any], jax.Array]:
    """⟨v, u w⟩ with a product in this type."""

    def loss_fn(w: Any, example: Any) -> jax.Array:
        u, v = example
        return jnp.vdot(v, (u.astype(dtype) @ w.astype(dtype)).astype(jnp.float32))

    return loss_fn


def convolution(dtype: Any) -> Callable[[Any, Any], jax.Array]:
    """⟨v, u ∗ w⟩ along one axis, with a convolution in this type."""

    def loss_fn(w: Any, example: Any) -> jax.Array:
        u, v = example
        numbers = ("NWC", "WIO", "NWC")
        out = lax.conv_general_dilated(
            u.astype(dtype), w.astype(dtype), (1,), "SAME", dimension_numbers=numbers
        )
        return jnp.vdot(v, out.astype(jnp.float32))

    return loss_fn


FORMS = {
    f"{name}, {jnp.dtype(dtype).name}": Form(make(dtype), *shapes)
    for name, make, shapes in (
        ("outer product", product, ((30, 40), (1, 30), (1, 40))),
        ("Gram", product, ((30, 40), (4, 30), (4, 40))),
        ("rows", product, ((8, 8), (64, 8), (64, 8))),
        ("convolution", convolution, ((3, 30, 40), (1, 4, 30), (1, 4, 40))),
    )
    for dtype in (jnp.float32, jnp.bfloat16)
}
ROWS = 8
# The weights: midpoints of TF32 and bfloat16 lie between 0.5 and 0.511, and others beside them.
WEIGHTS = np.concatenate([np.linspace(0.5, 0.511, 256), np.linspace(0.3, 1.0, 64)])


def attacks(form: Form) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Batches (u, v): equal entries, random ones, and random ones that nearly cancel."""
    random = np.random.default_rng(0)
    shapes = [(ROWS, *shape) for shape in (form.inputs, form.outputs)]
    u, v = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    half = -(-form.outputs[-2] // 2)
    opposite = np.concatenate([v[..., :half, :], -v[..., :half, :] * np.float32(1 + 1e-4)], axis=-2)
    same = np.repeat(u[..., :1, :], form.inputs[-2], axis=-2)
    return {
        "equal entries": (np.ones_like(u), np.ones_like(v)),
        "random": (u, v),
        "cancelling": (same, opposite[..., : form.outputs[-2], :]),
    }


def check_alone(name: str, method: str) -> dict[str, Any]:
    """The most that one sample adds to a sum clipped at C, as a multiple of C, at every weight.

    Args:
      name: of `FORMS`.
      method: of `METHODS`.

    Returns:
      The worst of each attack, and whether all are at most one.
    """
    form = FORMS[name]
    grads_fn = jaxdp.per_sample_grads(form.loss_fn, method=method)
    first = jnp.arange(ROWS) == 0

    @jax.jit
    def alone(w: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
        thresholds = jnp.float32(WEIGHTS) * grads_fn(w, batch).norms()[0]

        def one(threshold: jax.Array) -> Any:
            clip: Any = jaxdp.clip_flat(threshold)
            return clip.update(grads_fn(w, batch, first), clip.init(w))[0].value

        return lax.map(one, thresholds), thresholds

    worst = {}
    for attack, batch in attacks(form).items():
        sums, thresholds = alone(jnp.ones(form.weight), batch)
        rows = np.asarray(sums, np.float64).reshape(len(WEIGHTS), -1)
        ratios = np.linalg.norm(rows, axis=1) / np.asarray(thresholds, np.float64)
        worst[attack] = float(np.max(ratios))  # NaN, where one is: then it has not passed
    return {"worst": worst, "passed": all(ratio <= 1 + TOLERANCE for ratio in worst.values())}
