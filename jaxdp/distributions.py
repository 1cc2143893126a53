r"""Normal and Laplace draws whose tails do not end where the noise is needed.

A draw of `jax.random.normal` in float32 comes from 23 bits and lies between -5.42 and 5.22: what is
beyond cannot happen, so that seeing it tells two data sets apart. Here every word of the generator
is used, by the method of Box and Muller:

$$ u = U / 2^{64}, \quad E = -\ln u, \quad r = \sqrt{2 E}, \quad
   x = r \cos\theta, \quad y = r \sin\theta $$

with U uniform among the odd numbers below 2⁶⁴, from two words, and θ on a circle of 2³² points that
lie symmetric about both axes, from a third (2⁶⁴ points from two words in float64).

**How far that is from a normal.** Fill each cell: let V be uniform within 2⁻⁶⁴ of u, and Θ within
π·2⁻³² of θ. Then V is uniform on (0, 1) and Θ on the circle, so that Z = R(cos Θ, sin Θ) with
R = (-2 ln V)^(1/2) is exactly N(0, I), and the pair X that is returned lies next to it:

* |X - Z| ≤ 2⁻²⁰|X| + 2⁻²⁷ where R ≤ 7, and ≤ 2⁻¹² where R ≤ 8.5; R > 8.5 has the chance e^(-36.1),
  below 2⁻⁵². Proof: |r - R| = 2|ln(u/V)| / (r + R), and |ln(u/V)| ≤ 2⁻⁶³/u = 2⁻⁶³ e^(r²/2), which
  is below 2⁻²⁷ at r = 7 and 2⁻¹⁰ at 8.5; where r < 1, |r - R| ≤ (2|ln(u/V)|)^(1/2) < 2⁻³⁰. The
  angle moves by π·2⁻³²·R < 2⁻²⁷·⁵ for R ≤ 7. The lemma below is the first term.
* The largest value is (128 ln 2)^(1/2) = 9.42. Zero is never drawn; the smallest size is 2⁻⁶¹·⁸.
* X and -X have the same chance, exactly, and so have (X, Y) and (-Y, X).

**Lemma.** In float32 the returned x is r cos θ·(1 + ε) with |ε| ≤ 15v < 2⁻²⁰, where v = 2⁻²⁴ bounds
the relative error of one operation (+, -, ·, /, √, conversion of a word), for every U and θ; in
float64 v = 2⁻⁵³. Fused multiply-adds only save errors. Where an operation is right to one unit in
the last place, v and the bound double. With g = 1 - m for the mantissa m in [½, 1) of u, which is
computed from the complement of U without cancellation:

| value                        | error  | because                                                |
|------------------------------|--------|--------------------------------------------------------|
| g                            | 3v     | two conversions, two additions                         |
| s = g/(2 - g) ≤ 1/3          | 6v     | 4/3 of that, and two operations                        |
| -ln m = 2 artanh s           | 10v    | 6v, Σ s^(2k)/(2k+1) to 2.5v, a product; cut off < 0.3v |
| E = zeros·ln 2 - ln m        | 11v    | terms of one sign                                      |
| r                            | 6.5v   | half, and a root                                       |
| φ, θ without its quadrant    | 4v     | exact but for conversion, ½, π/2³¹ and a product       |
| sin φ, cos φ, size ≤ π/4     | 7.5v   | 4v, series in φ² to 2.5v, a product; cut off < 0.1v    |
| r cos θ, r sin θ             | 15v    | a product                                              |

What this does not give: the noise still lies on a grid of floating-point numbers, and so does the
sum that it is added to. Nothing here hides their lowest bits.

Source: Box and Muller 1958, "A Note on the Generation of Random Normal Deviates".
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdp.shares import names_in, placed

_WORD = 2.0**-32
_FEW_WORDS = 2**17  # as many as a cache holds
# Taylor series, cut off where the rest is below the rounding of the precision: of artanh(s)/s in
# s² ≤ 1/9, of sin(φ)/φ and of cos(φ) in φ² ≤ π²/16.
_TERMS = {32: (7, 5, 6), 64: (17, 9, 10)}


def normal(
    key: jax.Array,
    shape: Sequence[int],
    dtype: Any = jnp.float32,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Independent standard normal numbers with tails to 8.5 standard deviations.

    Args:
      key: a JAX key of any implementation. Each member of a `vmap` gets the numbers of its own key.
      shape: of the result.
      dtype: float32 or float64.
      out_sharding: how the result lies on a mesh. The numbers are the same for every sharding, and
        each device draws those of its own part.

    Returns:
      An array of that shape. Two numbers share three words of the generator (four in float64).

    Raises:
      TypeError: another dtype.

    Example:
      >>> draws = normal(jax.random.key(0), (1000, 1000))
      >>> print(f"{draws.mean():.2f} {draws.std():.2f}")
      0.00 1.00

    Source: see the module, which says how far the law is from the normal one, and proves it.
    """
    shape = tuple(shape)
    bits = _bits(dtype)
    if 0 in shape:
        return jnp.zeros(shape, dtype)
    # Both halves of a pair are used: along one axis neighbours are a pair, an even one if any is.
    # That they are neighbours keeps them on one device where that axis is spread over devices.
    whole = shape or (1,)
    axis = max(range(len(whole)), key=lambda a: (whole[a] % 2 == 0, whole[a]))
    pairs = -(-whole[axis] // 2)
    halved = (*whole[:axis], pairs, *whole[axis + 1 :])
    sharding = _of_words(out_sharding, halved, axis, even=whole[axis] % 2 == 0)
    words = _words(key, 3 if bits == 32 else 4, halved, sharding)
    both = jnp.stack(box_muller(*words), axis + 1)
    drawn = both.reshape(*whole[:axis], 2 * pairs, *whole[axis + 1 :])
    drawn = jax.lax.slice_in_dim(drawn, 0, whole[axis], axis=axis).reshape(shape)
    return drawn if out_sharding is None else placed(drawn, out_sharding)


def laplace(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Independent Laplace numbers of scale 1, float32: an exponential of two words and a sign.

    `jax.random.laplace` comes from 23 bits and ends at 16.6; these end at 44.4, of which the chance
    is 2⁻⁶³. They are ±E(1 + ε) with |ε| ≤ 11·2⁻²⁴, E as in the lemma of the module.

    Args:
      key: a JAX key of any implementation. Each member of a `vmap` gets the numbers of its own key.
      shape: of the result.

    Returns:
      An array of that shape.

    Example:
      >>> print(f"{jnp.abs(laplace(jax.random.key(0), (1_000_000,))).mean():.2f}")
      1.00
    """
    high, low, sign = _words(key, 3, tuple(shape))
    size = exponential(high, low)
    return jnp.where(sign >> 31 == 1, size, -size)


def box_muller(
    high: jax.Array, low: jax.Array, angle: jax.Array, fine: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The pair (x, y) of the module, from uniform words of 32 bits.

    Args:
      high, low: words of U. The last bit of `low` counts as set.
      angle: word of θ. Its first two bits are the quadrant, counted from the positive x axis.
      fine: further bits of θ; the result is float64 where they are given.

    Returns:
      Two arrays of the words' shape.
    """
    dtype = jnp.float32 if fine is None else jnp.float64
    _, sines, cosines = _TERMS[_bits(dtype)]
    r = jnp.sqrt(2 * exponential(high, low, dtype))
    # The other 30 bits, signed, are φ in (-π/4, π/4): there both series end early, and what is
    # close to zero is so by a product, not by a difference.
    steps = (jax.lax.bitcast_convert_type(angle << 2, jnp.int32) >> 2).astype(dtype)
    steps += 0.5 if fine is None else (fine.astype(dtype) + 0.5) * _WORD
    phi = steps * (math.pi / 2**31)
    sine = phi * _series(phi * phi, [(-1) ** k / math.factorial(2 * k + 1) for k in range(sines)])
    cosine = _series(phi * phi, [(-1) ** k / math.factorial(2 * k) for k in range(cosines)])
    quadrant = angle >> 30
    turned = quadrant & 1 == 1
    x, y = jnp.where(turned, -sine, cosine), jnp.where(turned, cosine, sine)
    r = jnp.where(quadrant >= 2, -r, r)
    return r * x, r * y


def exponential(high: jax.Array, low: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """-ln u for u = U/2⁶⁴, U the odd number of 64 bits with these words: exponential of scale 1.

    Args:
      high, low: uniform words of 32 bits. The last bit of `low` counts as set.
      dtype: float32 or float64.

    Returns:
      An array of their shape, between 2⁻⁶⁴ and 64 ln 2.
    """
    low = low | 1
    # u = 2^-zeros m with m in [½, 1), as two words again. A shift by 32 gives zero.
    none = high == 0
    first, second = jnp.where(none, low, high), jnp.where(none, 0, low)
    shift = jax.lax.clz(first)
    zeros = jnp.where(none, shift + 32, shift)
    m_high, m_low = (first << shift) | (second >> (32 - shift)), second << shift
    # 1 - m, of which every bit is known: the complement of m, and one.
    g = ((~m_high).astype(dtype) + ((~m_low).astype(dtype) + 1) * _WORD) * _WORD
    s = g / (2 - g)
    count, _, _ = _TERMS[_bits(dtype)]
    minus_ln_m = s * _series(s * s, [2 / (2 * k + 1) for k in range(count)])
    return zeros.astype(dtype) * math.log(2) + minus_ln_m


def _words(
    key: jax.Array, count: int, shape: tuple[int, ...], sharding: NamedSharding | None = None
) -> list[jax.Array]:
    """Arrays of uniform words. Large ones are drawn one after the other: all at once they would not
    fit a CPU's cache, and take twice the time."""
    if count * math.prod(shape) <= _FEW_WORDS:
        at = sharding and NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        return list(_bits_of(key, (count, *shape), at))

    def draw(each: jax.Array) -> jax.Array:
        return _bits_of(each, shape, sharding)

    return list(jax.lax.map(draw, jax.random.split(key, count)))


def _bits_of(key: jax.Array, shape: tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
    """Uniform words that are a function of this key, also among those of other members of a `vmap`.

    The generator "rbg" draws for all members at once, from the key of the first: what another one
    gets then says nothing of its own key and step, and repeats while the first stands still.
    """

    explicit = sharding is not None and AxisType.Explicit in sharding.mesh.axis_types

    def draw(key: jax.Array) -> jax.Array:
        words = jax.random.bits(key, shape, jnp.uint32, out_sharding=sharding if explicit else None)
        # Over axes that are automatic XLA is told behind the draw.
        return words if sharding is None or explicit else placed(words, sharding)

    if str(jax.random.key_impl(key)) == "threefry2x32":
        return draw(key)
    return sequential_vmap(draw)(key)


def _series(x: jax.Array, coefficients: Sequence[float]) -> jax.Array:
    """Σ_k coefficients[k] x^k, by Horner's rule."""
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def _bits(dtype: Any) -> int:
    bits = {jnp.dtype(jnp.float32): 32, jnp.dtype(jnp.float64): 64}.get(jnp.dtype(dtype))
    if bits is None:
        raise TypeError(
            f"dtype must be float32 or float64, got {jnp.dtype(dtype).name}. Draw in float32 and "
            "cast after the noise was added."
        )
    return bits


def _of_words(
    sharding: NamedSharding | None, halved: tuple[int, ...], axis: int, *, even: bool
) -> NamedSharding | None:
    """How the words lie on the devices: as the result, unless its parts would break pairs apart."""
    if sharding is None:
        return None
    spec = [*sharding.spec, *(None,) * (len(halved) - len(sharding.spec))]
    parts = math.prod(sharding.mesh.shape[name] for name in names_in(spec[axis]))
    if not even or halved[axis] % parts:
        spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
