"""What a ledger holds: steps, and what was released beside them; and both as JSON-able data.

Example:
    >>> from jaxdp.accounting.schemes import PoissonSampling
    >>> step = LedgerEntry((1.1,), PoissonSampling(0.04), steps=1)
    >>> appended((step,), step)
    (LedgerEntry(noise_multipliers=(1.1,), sampling=PoissonSampling(sampling_rate=0.04), steps=2),)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jaxdp.accounting.draws import BATCHES, EPOCHS, Draws, check_draws, continued, draws_from_list
from jaxdp.accounting.mechanisms import Release
from jaxdp.accounting.pure import PureRelease
from jaxdp.accounting.schemes import (
    SamplingScheme,
    as_noise_multipliers,
    check_scheme,
    combined_noise_multiplier,
    scheme_from_dict,
)
from jaxdp.checks import check_integer, check_keys, shown


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Consecutive equal steps of one run.

    Args:
        noise_multipliers: one σ_k ≥ 0 for each Gaussian that a step released from its batch; they
            count as one Gaussian with (Σ σ_k⁻²)^(-1/2).
        sampling: the scheme that really drew the batches.
        steps: how many such steps were executed, ≥ 1.
        draws: the random numbers that they were made of, one of each stream for each step; none
            where nobody knows. Left out of `repr`, which they would fill.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, a stream comes twice, or its draws are not as many as
            the steps.

    Example:
        >>> from jaxdp.accounting import PoissonSampling
        >>> LedgerEntry((1.0,), PoissonSampling(0.1), steps=5).steps
        5
    """

    noise_multipliers: tuple[float, ...]
    sampling: SamplingScheme
    steps: int
    draws: tuple[Draws, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multipliers", as_noise_multipliers(self.noise_multipliers))
        check_scheme(self.sampling)
        advice = "Leave out what was not executed."
        steps = check_integer("steps", self.steps, minimum=1, advice=advice)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "draws", check_draws(self.draws))
        for each in self.draws:
            if each.count != steps:
                raise ValueError(
                    f"draws must count one of each stream for each of the {steps} steps, got "
                    f"{each.count} of {each.purpose!r}. Charge steps apart that drew otherwise."
                )

    def release(self) -> Release:
        """What is to account for.

        Returns:
            The steps with one noise multiplier, and with their epochs where they are known.

        Example:
            >>> from jaxdp.accounting import PoissonSampling
            >>> LedgerEntry((3.0, 4.0), PoissonSampling(0.1), steps=5).release().noise_multiplier
            2.4
        """
        sigma = combined_noise_multiplier(self.noise_multipliers)
        # Of a sampler that does not say how it cuts its epochs, its steps tell where they lie.
        drawn = {each.purpose: each for each in self.draws}
        return Release(sigma, self.sampling, self.steps, drawn.get(EPOCHS, drawn.get(BATCHES)))


Entry = LedgerEntry | PureRelease
"""What a ledger holds: steps, and what was released beside them."""


def appended(run: tuple[Entry, ...], entry: LedgerEntry) -> tuple[Entry, ...]:
    """A run with more steps.

    Args:
        run: the entries so far.
        entry: the steps that follow.

    Returns:
        The longer run; steps that are equal to the last ones, and go on with their draws, join
        these.

    Example:
        >>> from jaxdp.accounting import PoissonSampling
        >>> step = LedgerEntry((1.0,), PoissonSampling(0.1), steps=1)
        >>> len(appended((step,), step))
        1
    """
    longer = _joined(run[-1], entry) if run else None
    return (*run, entry) if longer is None else (*run[:-1], longer)


def _joined(last: Entry, entry: LedgerEntry) -> LedgerEntry | None:
    if not isinstance(last, LedgerEntry):
        return None
    if (last.noise_multipliers, last.sampling) != (entry.noise_multipliers, entry.sampling):
        return None
    draws = continued(last.draws, entry.draws)
    return None if draws is None else replace(last, steps=last.steps + entry.steps, draws=draws)


def begins_with(run: tuple[Entry, ...], begin: tuple[Entry, ...]) -> bool:
    """Whether a run is another one, or goes on where that one ended.

    Args:
        run: the entries of a run.
        begin: those of an earlier state of it, or of another run.

    Returns:
        Whether everything in `begin` comes first in `run`, draws included.

    Example:
        >>> from jaxdp.accounting import PoissonSampling
        >>> one, two = (LedgerEntry((1.0,), PoissonSampling(0.1), steps=n) for n in (1, 2))
        >>> begins_with((two,), (one,)), begins_with((one,), (two,))
        (True, False)
    """
    if not begin:
        return True
    *before, last = begin
    here = run[len(before)] if len(run) > len(before) else None
    return run[: len(before)] == tuple(before) and (last == here or _goes_on(last, here))


def _goes_on(last: Entry, here: Entry | None) -> bool:
    if not isinstance(last, LedgerEntry) or not isinstance(here, LedgerEntry):
        return False
    if here.steps <= last.steps or len(here.draws) != len(last.draws):
        return False
    shorter = tuple(replace(each, count=last.steps) for each in here.draws)
    return replace(here, steps=last.steps, draws=shorter) == last


def entry_to_dict(entry: Entry) -> dict[str, object]:
    """An entry as JSON-able data for `entry_from_dict`.

    Args:
        entry: steps or a pure release.

    Returns:
        Its fields.

    Example:
        >>> entry_to_dict(PureRelease(0.5))
        {'epsilon': 0.5, 'sampling': None, 'draws': []}
    """
    draws = [each.to_dict() for each in entry.draws]
    if isinstance(entry, PureRelease):
        sampling = None if entry.sampling is None else entry.sampling.to_dict()
        return {"epsilon": entry.epsilon, "sampling": sampling, "draws": draws}
    return {
        "noise_multipliers": list(entry.noise_multipliers),
        "sampling": entry.sampling.to_dict(),
        "steps": entry.steps,
        "draws": draws,
    }


def entry_from_dict(data: object, *, with_draws: bool) -> Entry:
    """Rebuilds the entry that `entry_to_dict` wrote.

    Args:
        data: parsed JSON.
        with_draws: False for what was written before draws were noted.

    Returns:
        The equal entry.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is missing, unknown or out of range.

    Example:
        >>> entry_from_dict({"epsilon": 0.5, "sampling": None}, with_draws=False)
        PureRelease(epsilon=0.5, sampling=None)
    """
    # Each kind of entry has keys of its own, so that a reader refuses a kind that it does not know.
    pure = isinstance(data, Mapping) and "epsilon" in data
    name = "pure release" if pure else "ledger entry"
    keys = {"epsilon", "sampling"} if pure else {"noise_multipliers", "sampling", "steps"}
    fields = check_keys(name, data, keys | ({"draws"} if with_draws else set()))
    draws = draws_from_list(fields["draws"]) if with_draws else ()
    sampling = None if fields["sampling"] is None else scheme_from_dict(fields["sampling"])
    # pyright sees objects; each entry checks its fields.
    if pure:
        return PureRelease(fields["epsilon"], sampling, draws)  # pyright: ignore[reportArgumentType]
    sigmas = fields["noise_multipliers"]
    if not isinstance(sigmas, list):
        raise ValueError(f"noise_multipliers must be a JSON list, got {shown(sigmas)}.")
    return LedgerEntry(tuple(sigmas), sampling, fields["steps"], draws)  # pyright: ignore[reportArgumentType]
