"""Tells what in a model would undo the guarantee before it is trained.

print(jaxdp.validate(model_fn, params, example))
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.coupling import BatchStatisticsError, refuse_batch_statistics
from jaxdp.engine import walker
from jaxdp.engine.walker import Equation, Program

Kind = Literal["couples samples", "escapes clipping", "check"]

# They move values between the program and the host. What a host function remembers from one call
# to the next, no program shows.
_HOST = {"pure_callback", "infeed"}
_HOST_OUTPUT = {"io_callback", "debug_callback", "debug_print", "outfeed"}
# Named axes in types, without any communication.
_HARMLESS = {"axis_index", "pvary", "pcast", "pbroadcast"}


class Finding(NamedTuple):
    """Something in a model that deserves a look.

    Attributes:
      kind: "couples samples" and "escapes clipping" break the guarantee; "check" may, depending on
        what only you know.
      where: source line, leaf or array.
      what: the problem.
      fix: what to do about it.
    """

    kind: Kind
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        return f"{self.kind}: {self.what}{where}. {self.fix}."


class Validation(NamedTuple):
    """What `jaxdp.validate` found; printing it gives one line for each finding.

    Attributes:
      findings: in the order of the program.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found that breaks the guarantee."""
        return all(finding.kind == "check" for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "nothing found"


def validate(model_fn: Callable[[Any, Any], Any], params: Any, example: Any) -> Validation:
    """Lists what in a model would couple samples or escape clipping, with the fix.

    The model is traced on one example; nothing is computed. Reported are:

    * statistics of a batch: a flax BatchNorm in training, and any communication over a named axis
      (`lax.pmean` in a BatchNorm of haiku or equinox);
    * host callbacks, which may remember other samples, print them, or send them away;
    * parameters that come back changed by the example, such as running averages: written back,
      they would skip clipping and noise;
    * arrays that the function closes over, to be checked: a table is fine, values computed from
      the training data are not;
    * leaves that the output does not depend on, to be checked: they get noise and no gradient.

    A model without findings may still be trained wrongly: what happens outside of it, as the
    preparation of the data, is not seen.

    Args:
      model_fn: `(params, example) -> output` of ONE example: a loss, logits, any pytree.
      params: its parameters (arrays or shapes).
      example: one example (arrays or shapes), without a batch axis.

    Returns:
      A `Validation`.

    Example:
      >>> def model_fn(params, x):
      ...     return jax.lax.pmean(params["w"] * x, "batch")
      >>> print(validate(model_fn, {"w": jnp.ones(3)}, jnp.ones(3)))
      couples samples: communication over a named axis: ... Compute on one example alone...
      >>> validate(lambda params, x: params["w"] @ x, {"w": jnp.ones(3)}, jnp.ones(3)).ok
      True
    """
    leaves, treedef = jax.tree.flatten(params)
    inputs, structure = jax.tree.flatten(example)

    def flat(leaves: list[Any], inputs: list[Any]) -> Any:
        with refuse_batch_statistics():
            return model_fn(
                jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(structure, inputs)
            )

    try:
        program, output = walker.trace(flat, leaves, inputs)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        return Validation((_communication("", str(error).partition(".")[0]),))
    except BatchStatisticsError as error:
        what, _, fix = str(error).partition(". ")
        return Validation((Finding("couples samples", "", what, fix),))
    roots = _roots(program, len(leaves))
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    findings = [
        *_equations(program),
        *_returned(output, roots, paths, leaves),
        *_closed_over(program),
        *_unused(roots, paths, leaves),
    ]
    return Validation(tuple(findings))


def _communication(where: str, what: str) -> Finding:
    return Finding(
        "couples samples",
        where,
        f"communication over a named axis: {what}",
        "Compute on one example alone: normalise within it (nn.group_norm, nn.layer_norm) and add "
        "up devices after clipping",
    )


def _equations(program: Program) -> Iterator[Finding]:
    for eqn in walker.equations(program):
        if _named_axes(eqn):
            yield _communication(eqn.source, eqn.name)
        elif eqn.name in _HOST:
            yield Finding(
                "couples samples",
                eqn.source,
                f"{eqn.name}, which may remember other samples",
                "Prepare the example on the host, or write the function in JAX",
            )
        elif eqn.name in _HOST_OUTPUT:
            yield Finding(
                "escapes clipping",
                eqn.source,
                f"{eqn.name} shows the example outside of the program",
                "Remove it before training on private data",
            )


def _named_axes(eqn: Equation) -> bool:
    """Whether values cross a named axis: JAX names such axes by strings, its own by numbers."""
    if eqn.name in _HARMLESS:
        return False
    axes = [eqn.params.get("axes"), eqn.params.get("axis_name")]
    return any(isinstance(axis, str) for axis in jax.tree.leaves(axes))


def _roots(program: Program, parameters: int) -> list[frozenset[int]]:
    """For each output the inputs that it depends on; parameters with a derivative only."""

    def rule(_: walker.Path, eqn: Equation, values: list[frozenset[int]]) -> list[frozenset[int]]:
        roots = frozenset().union(*values)
        if eqn.name == "stop_gradient":
            roots = frozenset(root for root in roots if root >= parameters)
        return [roots] * len(eqn.outputs)

    inputs = [frozenset({index}) for index in range(len(program.in_avals))]
    return walker.evaluate(program, inputs, rule, lift=lambda _: frozenset())


def _returned(
    output: Any, roots: list[frozenset[int]], paths: list[Any], leaves: list[Any]
) -> Iterator[Finding]:
    """Outputs that are named like a parameter and depend on the example."""
    numbered = jax.tree.leaves_with_path(jax.tree.unflatten(output, range(len(roots))))
    for returned, index in numbered:
        depends = any(root >= len(leaves) for root in roots[index])
        for path in paths:
            if depends and _same_name(returned, path):
                yield Finding(
                    "escapes clipping",
                    _name(path),
                    "the parameter comes back changed by the example",
                    "Take it from its gradient, or keep it fixed: written back as it is, it tells "
                    "what the example was",
                )


def _same_name(returned: Any, path: Any) -> bool:
    """Whether one path ends with the other, by more than a position in a sequence."""
    common = min(len(returned), len(path))
    tails = [tuple(map(str, each[len(each) - common :])) for each in (returned, path)]
    named = any(not isinstance(e, jax.tree_util.SequenceKey) for e in path[len(path) - common :])
    return common > 0 and named and tails[0] == tails[1]


def _closed_over(program: Program) -> Iterator[Finding]:
    for constant in walker.closed_over(program):
        dtype, shape = jnp.result_type(constant), jnp.shape(constant)
        where = f"{dtype}{list(shape)}"
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            yield Finding(
                "check",
                where,
                "a random key that the function closes over: every sample draws the same numbers",
                "Make a key for each sample part of the example",
            )
        elif shape:
            yield Finding(
                "check",
                where,
                "an array that the function closes over",
                "Fine if it is public; if it was computed from the training data, it takes every "
                "sample into every gradient",
            )


def _unused(
    roots: list[frozenset[int]], paths: list[Any], leaves: list[Any]
) -> Iterator[Finding]:
    used = frozenset().union(*roots)
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if index not in used and jnp.issubdtype(leaf.dtype, jnp.floating):
            yield Finding(
                "check",
                _name(path),
                "a parameter without gradient: in training it gets noise alone",
                "Freeze it: per_sample_grads(..., trainable=...)",
            )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
