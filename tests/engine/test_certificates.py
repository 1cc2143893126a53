"""Norms are certificates: no data makes a sample add more than its share.

Every loss is linear in its parameters, so that the gradient of a sample is Σ_t u_t v_tᵀ of vectors
that the attacker chose: equal entries, whose rounding errors all go one way, in pairs that cancel
but for these, in all lengths. Held against sums in double precision: the norm that the engine sees,
which may not be below the true one, and what a clip lets through, which may not be above its
threshold.
"""

# optax types updates as trees of arrays; jaxdp sends PerSampleGrads and Bounded through it.
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxdp
from jaxdp.clipping import SMALLEST_THRESHOLD

# What is compiled must round as it does for users.
pytestmark = pytest.mark.optimized

METHODS = ("slots", "taps", "fused", "dense")
TOLERANCE = 1e-5


class Family(NamedTuple):
    """Attacks that differ in their data alone.

    Attributes:
      loss_fn: linear in its parameter.
      shape: of the parameter.
      draw: one example, from a generator of random numbers.
      gradient: of an example, in double precision.
      rows: the methods that materialise its gradient.
    """

    loss_fn: Callable[[Any, Any], jax.Array]
    shape: tuple[int, ...]
    draw: Callable[[np.random.Generator], Any]
    gradient: Callable[[Any], np.ndarray]
    rows: tuple[str, ...] = ("dense",)

    def by_rows(self) -> "Family":
        """The same, of a size at which every method but taps materialises."""
        return self._replace(rows=("dense", "slots", "fused"))


# ---- what the attacker draws --------------------------------------------------------------------


def entries(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """`[count, length]`: equal entries, equal but for few, of one sign, or at random."""
    kind = rng.integers(4)
    if kind < 2:
        made = np.full((count, length), rng.uniform(0.5, 2))
        if kind == 1:
            made[:, : 1 + length // 16] *= rng.uniform(0.1, 10)
    elif kind == 2:
        made = rng.uniform(0.5, 1, (count, length))
    else:
        made = rng.normal(size=(count, length))
    return made


def pairs(
    rng: np.random.Generator, positions: int, d: int, p: int
) -> tuple[np.ndarray, np.ndarray]:
    """u `[T, d]` and v `[T, p]` in float32 whose products cancel in pairs, up to a relative
    difference of 1e-8 to 1e-1; one position alone has no other to cancel with."""
    half = max(1, positions // 2)
    same = rng.integers(2)
    u = np.repeat(entries(rng, 1, d), half, axis=0) if same else entries(rng, half, d)
    v = np.repeat(entries(rng, 1, p), half, axis=0) if same else entries(rng, half, p)
    apart = 10.0 ** rng.uniform(-8, -1)
    wobble = rng.normal(size=(half, 1)) if rng.integers(2) else rng.normal(size=(half, d))
    scale = 10.0 ** rng.uniform(-6, 6)
    u, v = u * scale, v * 10.0 ** rng.uniform(-6, 6)
    twins, opposite = u * (1 + apart * wobble), -v
    # Rounded first, so that pairs cancel after it, too.
    u, twins = u.astype(np.float32), twins.astype(np.float32)
    v, opposite = v.astype(np.float32), opposite.astype(np.float32)
    u, v = np.concatenate([u, twins])[:positions], np.concatenate([v, opposite])[:positions]
    order = rng.permutation(len(u)) if rng.integers(2) else np.arange(len(u))
    filled = [(0, positions - len(u)), (0, 0)]
    return np.pad(u[order], filled), np.pad(v[order], filled)


def outer(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.asarray(u, np.float64).T @ np.asarray(v, np.float64)


# ---- families -----------------------------------------------------------------------------------


def product(w: Any, example: Any) -> jax.Array:
    u, v = example
    return jnp.vdot(v, u @ w)


def products(positions: int, d: int, p: int) -> Family:
    """A linear layer at T positions."""
    return Family(
        product, (d, p), lambda rng: pairs(rng, positions, d, p), lambda example: outer(*example)
    )


def half_product(w: Any, example: Any) -> jax.Array:
    u, v = example
    return jnp.vdot(v, (u @ w)).astype(jnp.float32)


def half_products(positions: int, d: int, p: int) -> Family:
    """The same in bfloat16."""

    def draw(rng: np.random.Generator) -> Any:
        return tuple(jnp.asarray(x, jnp.bfloat16) for x in pairs(rng, positions, d, p))

    return Family(half_product, (d, p), draw, lambda example: outer(*example))


def both_sides(w: Any, example: Any) -> jax.Array:
    u, v, x, y = example
    return jnp.vdot(v, u @ w) + jnp.vdot(y, x @ w.T)


def products_of_both_sides(positions: int, d: int, p: int) -> Family:
    """A kernel that is multiplied by, and transposed multiplied by again."""

    def draw(rng: np.random.Generator) -> Any:
        u, v = pairs(rng, 2 * positions, d, p)
        half = positions
        return u[:half], v[:half], v[half:], u[half:]

    return Family(both_sides, (d, p), draw, lambda e: outer(e[0], e[1]) + outer(e[3], e[2]))


def twins(w: Any, example: Any) -> jax.Array:
    x, y, v, opposite = example
    return jnp.vdot(v, x @ w) + jnp.vdot(opposite, y @ w)


def twin_inputs(d: int, p: int) -> Family:
    """One weight on two inputs: a blank image, and the same one dimmed."""

    def draw(rng: np.random.Generator) -> Any:
        u, v = pairs(rng, 2, d, p)
        return u[0], u[1], v[0], v[1]

    return Family(twins, (d, p), draw, lambda e: outer(np.stack(e[:2]), np.stack(e[2:])))


def tied(table: Any, example: Any) -> jax.Array:
    ids, w, u, v = example
    return jnp.sum(w * table[ids]) + jnp.sum(u * (v @ table.T))


def tied_tables(words: int, p: int, positions: int) -> Family:
    """A table that is looked up, ids repeated, and multiplied by."""

    def draw(rng: np.random.Generator) -> Any:
        # Word 0 is looked up at all positions, and so is the output there.
        u, rows = pairs(rng, 2 * positions, 1, p)
        one_hot = np.zeros((positions, words), np.float32)
        one_hot[:, 0] = u[positions:, 0]
        ids = np.zeros(positions, np.int32)
        looked_up = (u[:positions] * rows[:positions]).astype(np.float32)
        return ids, looked_up, one_hot, rows[positions:]

    def gradient(example: Any) -> np.ndarray:
        ids, w, u, v = example
        total = outer(u, v)
        np.add.at(total, ids, np.asarray(w, np.float64))
        return total

    return Family(tied, (words, p), draw, gradient)


def look_up(table: Any, example: Any) -> jax.Array:
    ids, w = example
    return jnp.vdot(w, table[ids])


def look_ups(words: int, p: int, positions: int) -> Family:
    """Look-ups of few ids many times."""

    def draw(rng: np.random.Generator) -> Any:
        _, rows = pairs(rng, positions, 1, p)
        return rng.integers(0, 2, positions).astype(np.int32), rows

    def gradient(example: Any) -> np.ndarray:
        total = np.zeros((words, p))
        np.add.at(total, example[0], np.asarray(example[1], np.float64))
        return total

    return Family(look_up, (words, p), draw, gradient)


def convolution(k: Any, example: Any) -> jax.Array:
    x, v = example
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(x[None], k, (1,), "VALID", dimension_numbers=numbers)
    return jnp.vdot(v, y[0])


def convolutions(positions: int, channels: int, outputs: int, window: int = 3) -> Family:
    """A convolution of stretches that are equal under cotangents that are opposite."""

    def draw(rng: np.random.Generator) -> Any:
        u, v = pairs(rng, 2, channels, outputs)
        apart = np.zeros((window, channels), np.float32)
        length = positions // 2 + window - 1
        x = np.concatenate([np.repeat(u[:1], length, 0), apart, np.repeat(u[1:], length, 0)])
        beside = np.zeros((len(x) - window + 1, outputs), np.float32)
        beside[: positions // 2], beside[-(positions // 2) :] = v[0], v[1]
        return x, beside

    def gradient(example: Any) -> np.ndarray:
        x, v = (np.asarray(array, np.float64) for array in example)
        return np.stack([x[o : o + len(v)].T @ v for o in range(window)])

    return Family(convolution, (window, channels, outputs), draw, gradient)


def in_a_loop(w: Any, example: Any) -> jax.Array:
    u, v = example
    block = jax.checkpoint(lambda layer: jnp.vdot(v, u @ layer))
    return jnp.sum(lax.map(block, w))


def products_in_a_loop(steps: int, positions: int, d: int, p: int) -> Family:
    """Layers of a scan, rematerialised."""
    return Family(
        in_a_loop,
        (steps, d, p),
        lambda rng: pairs(rng, positions, d, p),
        lambda example: np.repeat(outer(*example)[None], steps, axis=0),
    )


def bias(b: Any, v: Any) -> jax.Array:
    return jnp.sum(v * b[None])


def vectors(positions: int, length: int) -> Family:
    """A bias at T positions: rows that are materialised."""
    return Family(
        bias,
        (length,),
        lambda rng: pairs(rng, positions, 1, length)[1],
        lambda v: np.sum(np.asarray(v, np.float64), axis=0),
    )


# ---- released, and seen -------------------------------------------------------------------------


@functools.cache
def answers(loss_fn: Any, method: str, make_clip: Any) -> Callable[..., Any]:
    """Compiled `(parameter, examples, thresholds) -> (sums, norms)` of every example alone."""
    grads_fn = jaxdp.per_sample_grads(loss_fn, method=method)

    def alone(params: Any, examples: Any, thresholds: jax.Array) -> Any:
        def one(chosen: Any) -> Any:
            example, threshold = chosen
            grads = grads_fn(params, jax.tree.map(lambda leaf: leaf[None], example))
            clip = make_clip(threshold)
            return clip.update(grads, clip.init(params))[0].value, grads.norms()[0]

        return lax.map(one, (examples, thresholds))

    return jax.jit(alone)


def check(family: Family, method: str, examples: list[Any]) -> None:
    """Nothing above the threshold, however small, and no norm below the true one."""
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
    dtype = jnp.bfloat16 if family.loss_fn is half_product else jnp.float32
    params = jnp.zeros(family.shape, dtype)
    true = np.array([np.linalg.norm(family.gradient(example)) for example in examples])
    run = answers(family.loss_fn, method, jaxdp.clip_flat)
    _, seen = run(params, batch, np.ones(len(examples), np.float32))
    seen = np.asarray(seen, np.float64)
    # Where rows are materialised, the norm is theirs, and they are off by the rounding of up to 512
    # terms; everywhere else it is not below that of the exact sum.
    terms = [jax.tree.map(np.abs, example) for example in examples]
    off = np.array([np.linalg.norm(family.gradient(example)) for example in terms])
    slack = 515 * 2.0**-24 * off if method in family.rows else 1e-12 * true
    # An infinite norm is a sample that counts for nothing.
    assert np.all(seen >= true - slack), np.max(true / seen)
    factors = np.random.default_rng(1).uniform(1e-3, 0.9, len(seen))
    thresholds = np.where(np.isfinite(seen), factors * seen, 1.0).astype(np.float32)
    thresholds = np.maximum(thresholds, np.float32(SMALLEST_THRESHOLD))
    sums, _ = run(params, batch, thresholds)
    flat = np.asarray(sums, np.float64).reshape(len(examples), -1)
    worst = np.max(np.linalg.norm(flat, axis=1) / thresholds)
    assert worst <= 1 + TOLERANCE, f"a sample adds {worst:.8g} times its threshold"


def drawn(family: Family, tries: int, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [family.draw(rng) for _ in range(tries)]


# Lengths, positions and kinds of use that have been broken, each small enough to be tried often.
FAMILIES = {
    "one position": products(1, 64, 48),
    "rows": products(64, 16, 8).by_rows(),
    "rows of many positions": products(512, 8, 8).by_rows(),
    "two long vectors": products(2, 4096, 64),
    "Gram": products(8, 1024, 64),
    "Gram of few entries": products(4, 30, 40),
    "bfloat16": half_products(4, 256, 64),
    "bfloat16, rows": half_products(64, 16, 8)._replace(rows=METHODS),
    "both sides": products_of_both_sides(2, 784, 32),
    "twins": twin_inputs(3072, 16),
    "tied, narrow": tied_tables(8, 16, 1),
    "tied": tied_tables(8, 64, 4),
    "tied, wide": tied_tables(8, 1024, 1),
    "look-ups": look_ups(4, 48, 64).by_rows(),
    "convolution by Gram": convolutions(4, 256, 64),
    "convolution by rows": convolutions(64, 8, 8).by_rows(),
    "loop": products_in_a_loop(2, 4, 64, 32),
    "bias": vectors(64, 40)._replace(rows=METHODS),
}


def in_turn(names: Any) -> list[Any]:
    """All names with all methods; the default run takes one method of each, in turn, and slots."""
    return [
        pytest.param(
            name,
            method,
            id=f"{name}-{method}",
            marks=() if shift == 0 or shift == 1 + index % 3 else pytest.mark.slow,
        )
        for index, name in enumerate(names)
        for shift, method in enumerate(METHODS)
    ]


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "method"), in_turn(FAMILIES))
def test_no_data_makes_a_sample_add_more_than_its_share(name: str, method: str) -> None:
    check(FAMILIES[name], method, drawn(FAMILIES[name], 40, seed=0))


@pytest.mark.parametrize("name", ["rows", "look-ups", "convolution by rows"])
def test_taps_bound_the_sum_of_another_pass(name: str) -> None:
    """It rounds in another way than the rows that the norm was computed from."""
    check(FAMILIES[name], "taps", drawn(FAMILIES[name], 60, seed=2))


def test_repeated_ids_of_a_tied_table() -> None:
    """All look-ups are of one word, so that the cross term counts each of them."""
    check(FAMILIES["tied"], "slots", drawn(FAMILIES["tied"], 60, seed=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("method", METHODS)
def test_nor_in_ten_thousand_tries(name: str, method: str) -> None:
    """150 for each of 18 families and four methods."""
    check(FAMILIES[name], method, drawn(FAMILIES[name], 150, seed=1))


# ---- the sizes that were broken -----------------------------------------------------------------

TABLES = {
    **{f"tied, {p} entries": (tied_tables(8, p, 1), 60) for p in (8, 16, 32, 64, 256, 1024)},
    "tied, 768 entries, 16 positions": (tied_tables(64, 768, 16), 20),
    "layer 1024 by 64, 8 positions": (products(8, 1024, 64), 60),
    "layer 4096 by 2, 2 positions": (products(2, 4096, 2), 60),
    "layer 768 by 768, 32 positions": (products(32, 768, 768), 10),
}
LARGE = {
    "layer 1536 by 64, 8 positions": (products(8, 1536, 64), 150),
    "layer 768 by 768, 64 positions": (products(64, 768, 768), 30),
    "layer 2048 by 128, 64 positions": (products(64, 2048, 128), 60),
    "layer 4096 by 256, 64 positions": (products(64, 4096, 256), 30),
    "layer 768 by 3072, 512 positions": (products(512, 768, 3072).by_rows(), 3),
    "convolution of 1024 channels": (convolutions(4, 1024, 64), 60),
    "convolution of 2048 channels": (convolutions(4, 2048, 64), 30),
    "twins of 12288 entries": (twin_inputs(12_288, 8), 60),
    "twins of 150528 entries": (twin_inputs(150_528, 2), 30),
    "two positions of 65536 entries": (products(2, 65_536, 4), 30),
    "head of 50257 words": (products(8, 64, 50_257), 3),
}


@pytest.mark.parametrize("name", list(TABLES))
def test_the_sizes_that_were_broken(name: str) -> None:
    family, tries = TABLES[name]
    check(family, "slots", [in_the_direction_that_cancels(family, k) for k in range(tries)])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slots", "taps"])
@pytest.mark.parametrize("name", list(LARGE))
def test_the_large_sizes_that_were_broken(name: str, method: str) -> None:
    family, tries = LARGE[name]
    check(family, method, [in_the_direction_that_cancels(family, k) for k in range(tries)])


def in_the_direction_that_cancels(family: Family, seed: int) -> Any:
    """Constant vectors, half of them times 1 + e, under cotangents of opposite sign: all products
    round the same way. Where the family has another form, what it draws itself."""
    rng = np.random.default_rng(seed)
    a, apart = rng.uniform(0.5, 2), 10.0 ** rng.uniform(-4.5, -2)
    example = family.draw(rng)
    if family.loss_fn is product:
        u, v = (np.zeros_like(x) for x in example)
        half = len(u) // 2
        u[:half], u[half:] = a, a * (1 + apart)
        v[:half], v[half:] = 1e6, -1e6
        return u, v
    if family.loss_fn is tied:
        ids, w, u, v = (np.zeros_like(x) for x in example)
        w[...], v[...] = 1e6 * a * (1 + apart), a
        u[..., 0] = -1e6
        return ids, w, u, v
    if family.loss_fn is twins:
        x, y, v, opposite = example
        larger = np.full_like(y, a * (1 + apart))
        return np.full_like(x, a), larger, np.full_like(v, 1e6), np.full_like(opposite, -1e6)
    return example


# ---- norms that were too large, without cancellation --------------------------------------------


def test_padding_of_large_values_does_not_raise_the_norm() -> None:
    """Steps that hold −9999 under a cotangent of zero: two traces made the norm 35 times too
    large, S has zeros there."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(16, 256)), rng.normal(size=(16, 64))
    u[8:], v[8:] = -9999, 0
    ratio_of(products(16, 256, 64), (u.astype(np.float32), v.astype(np.float32)), 1.001)


def test_a_first_token_that_is_large_does_not_raise_the_norm() -> None:
    """Ahead of a layer norm it has a cotangent that is small in turn."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(16, 256)), rng.normal(size=(16, 64))
    u[0] *= 3000
    v[0] /= 3000
    ratio_of(products(16, 256, 64), (u.astype(np.float32), v.astype(np.float32)), 1.001)


def test_one_of_two_products_that_is_large_does_not_raise_the_norm() -> None:
    """As in the penalty of a critic, whose two products differ in size by the penalty's weight."""
    rng = np.random.default_rng(0)
    example = [rng.normal(size=(2, n)).astype(np.float32) for n in (784, 32, 32, 784)]
    example[0] *= np.float32(1e3)
    example[1] /= np.float32(1e3)
    ratio_of(products_of_both_sides(2, 784, 32), tuple(example), 1.001)


def ratio_of(family: Family, example: Any, most: float) -> None:
    true = np.linalg.norm(family.gradient(example))
    batch = jax.tree.map(lambda leaf: leaf[None], example)
    run = answers(family.loss_fn, "slots", jaxdp.clip_flat)
    _, seen = run(jnp.zeros(family.shape), batch, np.ones(1, np.float32))
    assert 1 <= float(seen[0]) / true <= most


# ---- what is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["slots", "taps", "fused"])
@pytest.mark.parametrize(
    ("large", "small"), [(1e20, 1e-30), (3e38, 1e-38), (np.inf, 0.0), (np.nan, 0.0)]
)
def test_a_norm_that_is_not_known_is_infinite_and_the_sample_counts_for_nothing(
    large: float, small: float, method: str
) -> None:
    """A floor under −∞ would be a norm of zero; so would a zero times a number that is none."""
    u, v = np.full((1, 4, 30), large, np.float32), np.full((1, 4, 40), small, np.float32)
    v[:, 2:] *= -1
    grads = jaxdp.per_sample_grads(product, method=method)(jnp.zeros((30, 40)), (u, v))
    clip = jaxdp.clip_flat(1.0)
    released = clip.update(grads, clip.init(None))[0].value
    assert not np.isfinite(grads.norms()[0])
    assert int(grads.nonfinite) == 1
    assert np.all(np.asarray(released) == 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threshold", [1e-6, 1e-12, 1e-18, 1e-22, 1e-30])
def test_small_thresholds_hold_where_factors_would_vanish(threshold: float, method: str) -> None:
    """The weight of a sample takes one of two terms that cancel below the smallest number."""
    rng = np.random.default_rng(3)
    family, examples = products(4, 30, 40), []
    for scale in 10.0 ** np.linspace(-15, 12, 28):
        u, v = pairs(rng, 4, 30, 40)
        examples.append((u * np.float32(scale), (v / np.float32(scale)).astype(np.float32)))
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
    run = answers(family.loss_fn, method, jaxdp.clip_flat)
    sums, _ = run(jnp.zeros(family.shape), batch, np.full(len(examples), threshold, np.float32))
    flat = np.asarray(sums, np.float64).reshape(len(examples), -1)
    # The clips raise a threshold to what their sensitivity then says.
    limit = max(threshold, SMALLEST_THRESHOLD) * (1 + TOLERANCE)
    assert np.max(np.linalg.norm(flat, axis=1)) <= limit


# ---- how tight they are -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "most"),
    [
        (products(1, 784, 512), "slots", 1.00002),
        (products(64, 128, 512), "slots", 1.003),
        (products(64, 128, 512), "taps", 1.003),
        (products(256, 768, 768), "slots", 1.01),
        (products(512, 64, 64), "taps", 1.01),
        (convolutions(16, 512, 512), "slots", 1.003),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_certificate_is_close_to_the_norm(family: Family, method: str, most: float) -> None:
    rng = np.random.default_rng(0)
    shapes = [leaf.shape for leaf in family.draw(rng)]
    example = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    true = np.linalg.norm(family.gradient(example))
    batch = jax.tree.map(lambda leaf: leaf[None], example)
    run = answers(family.loss_fn, method, jaxdp.clip_flat)
    _, seen = run(jnp.zeros(family.shape), batch, np.ones(1, np.float32))
    assert 1 <= float(seen[0]) / true <= most


def test_the_second_pass_of_taps_is_as_precise_as_its_norms() -> None:
    """Whatever precision the model asks of its products: on a GPU the default is TF32."""

    def loss(w: jax.Array, example: Any) -> jax.Array:
        u, v = example
        return jnp.vdot(v, jnp.dot(u, w, precision=lax.Precision.DEFAULT))

    def total(w: jax.Array, batch: Any) -> jax.Array:
        grads = jaxdp.per_sample_grads(loss, method="taps")(w, batch)
        clip = jaxdp.clip_flat(1.0)
        return clip.update(grads, clip.init(w))[0].value

    w, batch = jnp.ones((30, 40)), (jnp.ones((2, 4, 30)), jnp.ones((2, 4, 40)))
    text = jax.jit(total).lower(w, batch).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    of_kernel = [line for line in products if "tensor<30x40x" in line.split("->")[-1]]
    of_kernel += [line for line in products if "tensor<40x30x" in line.split("->")[-1]]
    assert of_kernel
    assert all("HIGHEST" in line for line in of_kernel), of_kernel
