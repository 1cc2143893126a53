"""Claim: taking one sample away changes a clipped sum by 1.05 times its clip norm at most, wherever
jaxdp adds up itself, also with data made to break it.

    python bench/sums.py

Gradients are numbers of at most C in one coordinate, chosen so that a running total in float32
rounds each of them in another way once the first is missing (Casacuberta et al. 2022). For each way
to add them up, and batches of 512 to 65,536 samples: the change of the sum, relative to C. Beside
it what the theorem of `jaxdp.engine.sums` allows, and NumPy's running total. Ways marked with * are
contractions that XLA adds up as it likes: there is no claim about them, but the measured figure.
Written to `bench/results/sums_<device>.json`.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxdp
from jaxdp.engine.sums import BLOCK

COUNTS = (512, 2048, 4096, 8192, 16384, 65536)
GOAL = 1.05
# Above every gradient: no weight is below 1, and the data is as it was made.
CLIP = 1.01
UNIT = float(jnp.finfo(jnp.float32).eps) / 2
WIDTH = 16


def attack(count: int) -> np.ndarray:
    """With its first number the running total stands above a power of two, without it below."""
    ones = 2 ** int(math.log2(count) - 1)
    ulp = 2.0 ** (math.log2(ones) - 23)
    head = np.concatenate([[1.0, 0.5], np.ones(ones - 1)])
    pairs = np.tile([0.51 * ulp, -1.49 * ulp], count)[: count - len(head)]
    return np.concatenate([head, pairs]).astype(np.float32)


def allowed(count: int) -> float:
    """By the theorem, in blocks and pairs."""

    def gamma(terms: float) -> float:
        return terms * UNIT / (1 - terms * UNIT)

    size = min(count, BLOCK)
    depth = math.ceil(math.log2(max(count / size, 1)))
    return 1 + 2 * size * gamma(size) + 4 * count * UNIT * (1 + gamma(size + depth))


def by(
    loss: Callable[..., Any], shape: tuple[int, ...], example: Callable[..., Any], **options: Any
):
    """`rows -> clipped sum` of a loss whose gradient has the row as its first entry."""
    params = jnp.zeros(shape)
    grads_fn = jaxdp.per_sample_grads(loss, **options)
    clip: Any = jaxdp.clip_flat(CLIP)

    @jax.jit
    def total(batch: Any) -> jax.Array:
        return clip.update(grads_fn(params, batch), clip.init(params), params)[0].value

    return lambda rows: float(total(example(rows)).ravel()[0])


def vector(rows: np.ndarray) -> np.ndarray:
    """`[B] -> [B, WIDTH]`, zeros behind."""
    return np.pad(rows[:, None], [(0, 0), (0, WIDTH - 1)])


def spaced(rows: np.ndarray) -> np.ndarray:
    """Each at the head of a part of four, whose sum it is: `[4 B, WIDTH]`."""
    return vector(np.pad(rows[:, None], [(0, 0), (0, 3)]).ravel())


def repeated(rows: np.ndarray) -> np.ndarray:
    """The same, as four positions whose cotangents are a quarter each."""
    return np.repeat(vector(rows)[:, None], 4, axis=1) / 4


def image(rows: np.ndarray) -> np.ndarray:
    """`[B, WIDTH, 1]`, zeros behind."""
    return vector(rows)[..., None]


def look_up(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An id and the cotangent of its row."""
    return np.zeros(len(rows), np.int32), vector(rows)


def convolution(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Its kernel's first entry meets the first pixel alone."""
    y = jax.lax.conv_general_dilated(
        x[None], kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return y[0, 0, 0]


def in_physical_batches(rows: np.ndarray) -> float:
    """Through `jaxdp.accumulate`, four samples each."""
    params = jnp.zeros(WIDTH)
    grads_fn = jaxdp.per_sample_grads(lambda p, x: p @ x)
    noise = jaxdp.add_noise(0.0, jax.random.key(0))
    tx: Any = optax.chain(jaxdp.clip_flat(CLIP), jaxdp.accumulate(noise))
    parts = spaced(rows).reshape(-1, 4, WIDTH)

    @jax.jit
    def total(parts: jax.Array) -> jax.Array:
        def step(state: Any, part: Any) -> Any:
            batch, is_last = part
            updates, state = tx.update(grads_fn(params, batch), state, params, is_last=is_last)
            return state, updates

        return jax.lax.scan(
            step, tx.init(params), (parts, jnp.arange(len(parts)) == len(parts) - 1)
        )[1][-1]

    return float(total(parts)[0])


def product(p: jax.Array, x: jax.Array) -> jax.Array:
    """A vector's gradient is the example."""
    return p @ x


WAYS: dict[str, Callable[[np.ndarray], float]] = {
    "dense": by(product, (WIDTH,), vector, method="dense"),
    "slots, product": by(product, (WIDTH,), vector, method="slots"),
    "slots, materialized": by(lambda p, x: jnp.sum(p * x), (WIDTH,), vector),
    "slots, look-up": by(lambda p, e: p[e[0]] @ e[1], (4, WIDTH), look_up, method="slots"),
    "taps, product": by(product, (WIDTH,), vector, method="taps"),
    "microbatches of 4": by(product, (WIDTH,), spaced, microbatch_size=4),
    "physical batches of 4": in_physical_batches,
    "* slots, product at 4 positions": by(
        lambda p, x: jnp.sum(x @ p), (WIDTH, 1), repeated, method="slots"
    ),
    "* slots, convolution": by(convolution, (3, 1, 1), image, method="slots"),
}


def change(total: Callable[[np.ndarray], float], count: int) -> float:
    """Of the sum, when the first sample's contribution becomes zero."""
    rows = attack(count)
    shorter = np.concatenate([np.zeros(1, np.float32), rows[1:]])
    return abs(total(rows) - total(shorter))


def running_total(rows: np.ndarray) -> float:
    """One addition after the other."""
    return float(np.cumsum(rows, dtype=np.float32)[-1])


def main() -> None:
    """Measures every way, prints a table and writes the figures as JSON."""
    results: dict[str, Any] = {"allowed": {count: allowed(count) for count in COUNTS}}
    for name, total in {"running total (NumPy)": running_total, **WAYS}.items():
        results[name] = {count: change(total, count) for count in COUNTS}
    device = jax.devices()[0].platform
    path = Path(f"bench/results/sums_{device}.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title=f"Change by one sample / C (goal {GOAL})", title_justify="left")
    for column in ("", *(f"{count:,}" for count in COUNTS)):
        table.add_column(column, justify="right" if column else "left")
    for name, found in results.items():
        table.add_row(name, *(f"{found[count]:.3f}" for count in COUNTS))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
