"""What a program does besides computing on one example.

The engine traces the loss of ONE example and maps it over a batch afterwards. That keeps samples
apart as long as every equation computes its outputs from its operands, and is mapped as JAX defines
it. This module names the equations of which that is not certain:

* communication over an axis along which samples may be spread (`lax.pmean`, `lax.all_gather`, ...),
  and `lax.axis_index`: what one sample contributes would depend on where another lies;
* mutable arrays: what one sample writes another may read. One that the loss makes for itself is
  its own affair, but the analysis of uses (`engine.uses`) does not follow values through it;
* host functions whose answers come from elsewhere, and effects that must keep an order;
* draws from a generator that is not mapped key by key: JAX makes those of a whole batch from the
  key of its first row, so that what each sample is drawn depends on another one;
* whatever brings its own rule for a batch, and so may look at all samples at once: callbacks and
  foreign functions that are not mapped one by one, `custom_vmap`, kernels, primitives that are not
  JAX's. With a batch of one, and no `vmap` around it, there is nothing else to look at.

What is not known to be harmless is named, too: a new effect is refused until somebody has thought
about it. Backward rules are programs as well; who asks must trace the gradient.
"""

# JAX leaves some arguments of its functions without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Iterator, Set
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jaxdp.engine import walker
from jaxdp.engine.plan import one_example
from jaxdp.engine.reduction import Batch, LeafLoss
from jaxdp.engine.walker import Equation, Program
from jaxdp.varying import model_axes, varying_axes

# "": nothing. "alone": a batch of one sample. "dense": `vmap(grad)`, which needs no analysis.
Excuse = Literal["", "alone", "dense"]

# They change the type of a value, and send nothing.
_TYPES_ONLY = {"pvary", "pcast"}
# The ways to map a host function that show it one sample at a time.
_ONE_BY_ONE = {"sequential", "sequential_unrolled"}
# Values from the host, or to it, that no rule of differentiation knows.
_HOST = {"io_callback", "infeed", "outfeed"}
# They bring their own rule for a batch, or memory of their own.
_KERNEL = "pallas_call"
_OWN_RULE = {
    "custom_vmap_call": "custom_vmap",
    _KERNEL: "a kernel",
    "call_hi_primitive": "a primitive with rules of its own",
}
# Keys of which each has its own draws under `vmap`: those of threefry, as their dtype shows.
_KEYS_APART = "key<fry>"
_KEYS_ONLY = {"random_wrap", "random_unwrap", "random_clone"}
_GENERATORS = {"rng_bit_generator", "rng_uniform"}
_KNOWN_EFFECTS = {"NamedAxisEffect", "DebugEffect"}
_REF_EFFECTS = {"ReadEffect", "WriteEffect", "AccumEffect", "InternalMutableArrayEffect"}

ON_ONE_EXAMPLE = (
    "Compute on one example alone: normalise within it (nn.group_norm, nn.layer_norm) and add up "
    "devices after clipping. Where the devices hold parts of the model, jax.shard_map(..., "
    "check_vma=True) tells these from parts of the batch"
)
_PASS_VALUES = "Pass values in and out: what one sample writes another may read"


class Hazard(NamedTuple):
    """An equation that may show one sample to another, or that the analysis does not understand.

    Attributes:
      what: the primitive, and what is wrong with it.
      where: file, line and function.
      fix: what to do about it.
      excuse: under which circumstances it is harmless.
    """

    what: str
    where: str
    fix: str
    excuse: Excuse = ""


def hazards(program: Program, axes: frozenset[str] = frozenset()) -> list[Hazard]:
    """All of them, in the order of the program.

    Args:
      program: of the loss of one example, or of its gradient.
      axes: named axes along which no two samples are apart.
    """
    named = list(dict.fromkeys(_named(program, axes)))
    if not any(map(walker.is_ref, walker.closed_over(program))):
        return named
    # Memory that was there before, and stays.
    return [
        hazard._replace(excuse="", fix=_PASS_VALUES) if hazard.excuse == "dense" else hazard
        for hazard in named
    ]


def check(
    program: Program,
    loss: LeafLoss,
    leaves: list[jax.Array],
    batch: Batch,
    excused: Set[Excuse] = frozenset(),
) -> bool:
    """Raises at the first hazard of a loss, or of its gradient, that nothing excuses.

    Args:
      program: of the loss of one example.
      loss, leaves, batch: the loss itself, its parameters, its samples.
      excused: the circumstances.

    Returns:
      Whether it is excused by a batch of one sample: see `with_nobody_beside`.

    Raises:
      ValueError: what is wrong, with its line.
    """
    _refuse_hidden_samples(program, leaves, batch)
    apart = model_axes(batch.mask)

    def gradient(leaves: list[jax.Array], example: Any) -> Any:
        return jax.value_and_grad(loss, has_aux=True)(leaves, example)

    seen = _refused(hazards(program, apart), excused)
    if any(eqn.own_derivative for eqn in walker.equations(program)):
        differentiated, _ = walker.trace(gradient, leaves, one_example(batch.examples))
        seen += _refused(hazards(differentiated, apart), excused)
    alone = any(hazard.excuse == "alone" for hazard in seen)
    if alone:
        # Their rules for a batch are programs, too.
        def first_row(leaf: jax.Array) -> jax.Array:
            return leaf[:1]

        rows = jax.tree.map(first_row, batch.examples)
        mapped, _ = walker.trace(jax.vmap(gradient, in_axes=(None, 0)), leaves, rows)
        _refused(hazards(mapped, apart), excused)
    return alone


@custom_vmap
def with_nobody_beside(leaves: list[jax.Array], batch: Batch) -> Batch:
    """The batch, of which a loss with hazards of its own sees one sample at a time. A `vmap` around
    that would show it one of each member."""
    del leaves
    return batch


@with_nobody_beside.def_vmap
def _somebody_beside(size: int, *arguments: Any) -> Any:
    del arguments
    raise ValueError(
        "loss_fn must compute on one example alone, got a vmap around microbatch_size=1, so that a "
        f"callback, kernel or generator of it may see the examples of all {size} members. Compute "
        "the members one after the other, with jax.lax.map."
    )


def _refuse_hidden_samples(program: Program, leaves: list[jax.Array], batch: Batch) -> None:
    """Inside `shard_map`: the rows say along which axes samples are spread. What differs between
    devices beside them would be added up over these before it is clipped."""
    beside = varying_axes(walker.closed_over(program)) - varying_axes((leaves, batch))
    if beside:
        raise ValueError(
            f"arrays that differ between devices along {sorted(beside)} must come with the batch "
            "where they belong to samples, or with the parameters, got some as keyword arguments "
            "or in a closure, so that samples would be added up over the devices before they are "
            "clipped. Pass them in the batch or in the parameters."
        )


def _refused(seen: list[Hazard], excused: Set[Excuse]) -> list[Hazard]:
    """The hazards, all of them excused."""
    for hazard in seen:
        if hazard.excuse not in excused:
            raise ValueError(
                "loss_fn must compute on one example alone, by equations that can be followed, got "
                f"{hazard.what} ({hazard.where}). {hazard.fix}."
            )
    return seen


def _named(
    program: Program, axes: frozenset[str], holder: Equation | None = None
) -> Iterator[Hazard]:
    for eqn in program.equations(holder):
        hazard = _hazard(eqn, axes)
        bodies = [] if eqn.name == _KERNEL else eqn.bodies  # which works on memory of its own
        within = axes | eqn.bound_axes
        inside = [named for body in bodies for named in _named(body, within, eqn)]
        if hazard is not None and (hazard.excuse == "alone" or not inside):
            yield hazard  # else it has its effects from within
        yield from inside


def _hazard(eqn: Equation, axes: frozenset[str]) -> Hazard | None:
    """What is wrong with an equation itself."""
    if eqn.name not in _TYPES_ONLY and (crossed := eqn.named_axes - axes):
        over = ", ".join(map(repr, sorted(crossed)))
        return Hazard(
            f"communication over a named axis: {eqn.name} over {over}",
            eqn.source,
            ON_ONE_EXAMPLE,
        )
    if eqn.name in _HOST:
        return Hazard(
            f"{eqn.name}, whose answers may tell of other samples",
            eqn.source,
            "Prepare the example on the host, or write the function in JAX",
        )
    if eqn.name in _GENERATORS or _draws_together(eqn):
        return Hazard(
            f"{eqn.name} of a generator that draws a whole batch from the key of one sample",
            eqn.source,
            'Use keys of threefry: jax.random.key(seed, impl="threefry2x32")',
            "alone",
        )
    if "vmap_method" in eqn.params and eqn.params["vmap_method"] not in _ONE_BY_ONE:
        return Hazard(
            f"{eqn.name} with vmap_method={eqn.params['vmap_method']!r}, which may see the whole "
            "batch",
            eqn.source,
            'Write the function in JAX, or map it one by one with vmap_method="sequential"',
            "alone",
        )
    if eqn.name in _OWN_RULE or eqn.foreign:
        kind = _OWN_RULE.get(eqn.name, f"{eqn.name}, a primitive that is not JAX's")
        return Hazard(
            f"{kind}, which brings its own rule for a batch and may see all of it",
            eqn.source,
            "Write the function in JAX, or compute one sample at a time with microbatch_size=1",
            "alone",
        )
    if eqn.touches_refs or eqn.effects & _REF_EFFECTS:
        return Hazard(
            f"{eqn.name} of a mutable array",
            eqn.source,
            f"{_PASS_VALUES}. Where the loss makes the array itself, method=\"dense\" "
            "differentiates it as it is",
            "dense",
        )
    unknown = sorted(eqn.effects - _KNOWN_EFFECTS)
    if unknown or eqn.name == "custom_partitioning":
        return Hazard(
            f"{eqn.name}, which does something that is not understood: "
            f"{', '.join(unknown) or 'it may communicate between devices'}",
            eqn.source,
            "Write the function without it",
        )
    return None


def _draws_together(eqn: Equation) -> bool:
    """Whether it draws from keys that do not draw apart from each other in a batch."""
    keys = [aval for aval in eqn.operands if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)]
    apart = all(str(key.dtype) == _KEYS_APART for key in keys)
    return eqn.name.startswith("random_") and eqn.name not in _KEYS_ONLY and not apart
