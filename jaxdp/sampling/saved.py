"""Samplers from their JSON-able form, as checkpoints hold it."""

import dataclasses
from collections.abc import Mapping

from jaxdp.checks import check_choice, check_keys
from jaxdp.sampling.base import Sampler
from jaxdp.sampling.fixed_size import FixedSizeSampler
from jaxdp.sampling.poisson import PoissonSampler
from jaxdp.sampling.shuffled import ShuffledSampler

_KINDS: dict[str, type[Sampler]] = {
    sampler.kind: sampler for sampler in (PoissonSampler, FixedSizeSampler, ShuffledSampler)
}


def sampler_from_dict(data: object) -> Sampler:
    """Rebuilds a sampler from what its `to_dict` returned.

    Args:
        data: a mapping with the key "kind" and the sampler's own fields, all of them.

    Returns:
        The equal sampler: it draws the same.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: the kind is unknown, a key is missing or unknown, or a field is out of range.

    Example:
        >>> from jaxdp.sampling import PoissonSampler
        >>> sampler = PoissonSampler(20, sampling_rate=0.1, seed=1)
        >>> sampler_from_dict(sampler.to_dict()) == sampler
        True
    """
    kind = data.get("kind") if isinstance(data, Mapping) else data
    sampler = _KINDS[check_choice("sampler kind", kind, _KINDS)]
    names = {field.name for field in dataclasses.fields(sampler)}
    fields = dict(check_keys("sampler", data, names | {"kind"}))
    # None would be filled from defaults and OS entropy, and the draws would silently be others.
    for key in ("physical_batch_size", "seed"):
        if fields[key] is None:
            raise TypeError(
                f"{key} must be an integer, got None. Restore the saved sampler unaltered."
            )
    del fields["kind"]
    return sampler(**fields)  # pyright: ignore[reportArgumentType]  # each sampler checks its fields
