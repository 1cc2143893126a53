"""Which examples join a step: draws as (indices, mask) of static shape, on the host, in NumPy.

A sampler is a value and a draw is a function of the step: the same seed and step give the same
draw, so resuming a run is `draw(step)`. A draw that is larger than the physical batch continues in
further physical batches; nothing is ever dropped.

Randomness: step t of a sampler reads the raw 64-bit words of
`PCG64(SeedSequence(seed, spawn_key=(stream, t)))`. NumPy promises these streams (NEP 19), unlike
those of `Generator`'s methods, which may change between versions; the arithmetic on the words is
ours. It is in integers and has exactly the law that the accountant is told, where the words are
uniform.

Cost: a Poisson or a fixed-size draw reads about one word for each example that takes part, a
shuffled epoch one for each example of the data.

Privacy notes:
    * The seed is as secret as the data and as the key of the noise. Amplification by sampling holds
      only while nobody knows who took part in which step, and whoever knows the seed, or guesses
      it, knows all of it: `seed=0` is for tests. Left out, it is 128 bits from the operating
      system, which checkpoints keep.
    * Neighbours differ by zeroing out the contribution of one example: n is public, and so are the
      rate B/n and the divisor B that follow from it. For data sets that really differ in size, the
      rate and the divisor would move with n, which no accountant counts (arXiv 2605.15648).
    * A realised batch size is private under Poisson sampling. Divide by `expected_batch_size`.
    * PCG64 is a statistical generator, not a cryptographic one.

Example:
  >>> sampler = PoissonSampler(1000, expected_batch_size=32, seed=7)
  >>> sampler.physical_batch_size
  56
  >>> [batch] = sampler.draw(0)
  >>> batch.indices.shape, batch.mask.dtype, batch.is_last
  ((56,), dtype('bool'), True)
"""

from jaxdp.sampling.base import PhysicalBatch as PhysicalBatch
from jaxdp.sampling.base import Sampler as Sampler
from jaxdp.sampling.fixed_size import FixedSizeSampler as FixedSizeSampler
from jaxdp.sampling.poisson import PoissonSampler as PoissonSampler
from jaxdp.sampling.registry import register as register
from jaxdp.sampling.registry import sampler_from_dict as sampler_from_dict
from jaxdp.sampling.shuffled import ShuffledSampler as ShuffledSampler
