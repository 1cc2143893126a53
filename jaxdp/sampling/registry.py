"""The kinds of samplers that there are, by name, and samplers from their JSON-able form."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar, cast

from jaxdp.accounting.strict_json import check_keys
from jaxdp.checks import check_choice, shown
from jaxdp.sampling.base import Sampler

_Kind = TypeVar("_Kind", bound=type[Sampler])

SAMPLERS: dict[str, type[Sampler]] = {}
"""Every registered kind by its name."""


def register(sampler: _Kind) -> _Kind:
    """Makes a class of samplers one that checkpoints can be resumed with.

    Args:
      sampler: a dataclass below `Sampler`, which says what it must provide.

    Returns:
      The class itself, so that this is its decorator.

    Raises:
      TypeError: it leaves something out that a sampler must provide.
      ValueError: another class has its kind or its stream.

    Example:
      >>> from jaxdp.sampling import PoissonSampler
      >>> SAMPLERS["poisson"] is PoissonSampler
      True
    """
    missing = sorted(getattr(sampler, "__abstractmethods__", ()))
    missing += [name for name in ("kind", "stream") if not hasattr(sampler, name)]
    if missing:
        raise TypeError(
            f"a sampler must provide all that Sampler asks for, got {sampler.__name__} without "
            f"{', '.join(missing)}. Define them in the class."
        )
    for other in SAMPLERS.values():
        for name in ("kind", "stream"):
            if getattr(other, name) == getattr(sampler, name):
                raise ValueError(
                    f"{name} must be the sampler's own, got {getattr(sampler, name)!r} for "
                    f"{sampler.__name__}, which {other.__name__} has. Choose one that is free."
                )
    SAMPLERS[sampler.kind] = sampler
    return sampler


def sampler_from_dict(data: object) -> Sampler:
    """Rebuilds a sampler from what its `to_dict` returned.

    Args:
      data: a mapping with the keys "kind" and "stream" and the sampler's own fields, all of them.

    Returns:
      The equal sampler: it draws the same.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: the kind is unknown, a key is missing or unknown, a field is out of range, or the
        sampler drew other batches in the version of jaxdp that saved it.

    Example:
      >>> from jaxdp.sampling import PoissonSampler
      >>> sampler = PoissonSampler(20, sampling_rate=0.1, seed=1)
      >>> sampler_from_dict(sampler.to_dict()) == sampler
      True
    """
    sampler = SAMPLERS[check_choice("sampler kind", _kind(data), SAMPLERS)]
    names = {field.name for field in dataclasses.fields(sampler)}
    fields = dict(check_keys("sampler", data, names | {"kind", "stream"}))
    # A step that is executed again, with the same noise on another batch, is another release, and
    # the difference of the two has no noise.
    if fields["stream"] != sampler.stream:
        raise ValueError(
            f"stream must be {sampler.stream} for {sampler.__name__}, got "
            f"{shown(fields['stream'])}, which draws other batches. Finish the run with the "
            "version of jaxdp that began it, or begin a new one with a key of its own."
        )
    # None would be filled from defaults and OS entropy, and the draws would silently be others.
    for key in ("physical_batch_size", "seed"):
        if fields[key] is None:
            raise TypeError(
                f"{key} must be an integer, got None. Restore the saved sampler unaltered."
            )
    del fields["kind"], fields["stream"]
    return sampler(**fields)  # pyright: ignore[reportArgumentType]  # each sampler checks its fields


def _kind(data: object) -> object:
    return cast(Mapping[str, object], data).get("kind") if isinstance(data, Mapping) else data
