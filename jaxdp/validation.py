"""Finds the parts of a model that would undo the guarantee, before it is trained.

print(jaxdp.validate(model_fn, params, example))
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.checks import check_callable
from jaxdp.coupling import BatchStatisticsError, refuse_batch_statistics
from jaxdp.engine import walker
from jaxdp.engine.batch_of_one import own_statistics
from jaxdp.engine.effects import ON_ONE_EXAMPLE, hazards
from jaxdp.engine.uses import find_uses
from jaxdp.engine.walker import Equation, Program
from jaxdp.trees import is_float, path_name

Kind = Literal["couples samples", "escapes clipping", "check"]

# They show values to the host, and use what it answers not at all or not alone.
_HOST_OUTPUT = {"io_callback", "debug_callback", "debug_print", "outfeed"}


class Finding(NamedTuple):
    """Something in a model that deserves a look.

    Attributes:
      kind: "couples samples" and "escapes clipping" break the guarantee; "check" may, depending on
        what only you know.
      where: source line, leaf or array.
      what: the problem.
      fix: the remedy.

    Example:
      >>> print(Finding("check", "w", "a parameter without gradient", "Freeze it"))
      check: a parameter without gradient (w). Freeze it.
    """

    kind: Kind
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        return f"{self.kind}: {self.what}{where}. {self.fix}."


class Validation(NamedTuple):
    """The findings of `jaxdp.validate`; printing gives one line for each.

    Attributes:
      findings: the findings, in the order of the program.

    Example:
      >>> Validation((Finding("check", "w", "a parameter without gradient", "Freeze it"),)).ok
      True
      >>> print(Validation(()))
      nothing found
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no finding breaks the guarantee."""
        return all(finding.kind == "check" for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "nothing found"


def validate(model_fn: Callable[[Any, Any], Any], params: Any, example: Any) -> Validation:
    """Lists what in a model would couple samples or escape clipping, with the fix.

    The model is traced on one example; nothing is computed. The function reports:

    * statistics of a batch: a BatchNorm of flax, haiku or another library in training mode, which
      would normalise one example by itself and leave nothing of it; and any communication over a
      named axis (`lax.pmean` in a BatchNorm of equinox), also in the gradient;
    * everything that `jaxdp.per_sample_grads` refuses: mutable arrays, effects that must keep an
      order, `custom_vmap`, kernels and primitives with rules of their own for a batch;
    * host callbacks, which may remember other samples, print them, or send them away;
    * parameters that come back changed by the example, such as running averages: written back,
      they would skip clipping and noise;
    * arrays that the function closes over (scalars aside) and calls of foreign functions. Check
      them: a table is fine, values computed from the training data are not;
    * leaves that the output does not depend on. Check them: they get noise and no gradient;
    * in a loss, a penalty on the parameters. Check it: behind the noise it would cost no privacy.

    A model without findings may still be trained wrongly: the function sees neither the preparation
    of the data nor the inside of foreign functions.

    Args:
      model_fn: `(params, example) -> output` of ONE example: a loss, logits, any pytree.
      params: its parameters (arrays or shapes).
      example: one example (arrays or shapes), without a batch axis.

    Returns:
      A `Validation`.

    Raises:
      Exception: the errors of the model or its gradient while it is traced.

    Example:
      >>> def model_fn(params, x):
      ...     return jax.lax.pmean(params["w"] * x, "batch")
      >>> print(validate(model_fn, {"w": jnp.ones(3)}, jnp.ones(3)))
      couples samples: communication over a named axis: ... Compute on one example alone...
      >>> validate(lambda params, x: params["w"] @ x, {"w": jnp.ones(3)}, jnp.ones(3)).ok
      True
    """
    advice = "Pass a function of parameters and one example."
    check_callable("model_fn", model_fn, advice=advice)
    leaves, treedef = jax.tree.flatten(params)
    inputs, structure = jax.tree.flatten(example)

    def flat(leaves: list[Any], inputs: list[Any]) -> Any:
        with refuse_batch_statistics():
            return model_fn(
                jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(structure, inputs)
            )

    def gradient(leaves: list[Any], inputs: list[Any]) -> Any:
        """The gradient of all outputs with respect to all parameters."""

        def outputs(moving: list[Any]) -> list[jax.Array]:
            rest = iter(moving)
            return _floats(
                flat([next(rest) if is_float(leaf) else leaf for leaf in leaves], inputs)
            )

        values, pull_back = jax.vjp(outputs, _floats(leaves))
        return pull_back(values)

    try:
        program, output = walker.trace(flat, leaves, inputs)
        programs = [program]
        try:
            programs.append(walker.trace(gradient, leaves, inputs)[0])
        except NameError:
            raise
        except Exception:
            # A program with effects, such as callbacks, may have no gradient, and this JAX may find
            # none for a mutable array. The effect is then reported already.
            if not any(_equations(program)):
                raise
    except NameError as error:
        if "axis name" not in str(error):
            raise
        return Validation((_communication("", str(error).partition(".")[0]),))
    except BatchStatisticsError as error:
        what, _, fix = str(error).removesuffix(".").partition(". ")
        return Validation((Finding("couples samples", "", what, fix),))
    roots = _roots(program, len(leaves))
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    findings = [
        *(finding for each in programs for finding in _equations(each)),
        *_normalised(program, len(leaves)),
        *_returned(output, program, roots, treedef, params),
        *(finding for each in programs for finding in _closed_over(each)),
        *_unused(roots, paths, leaves),
        *_penalties(program, leaves),
    ]
    return Validation(tuple(dict.fromkeys(findings)))  # both programs have the forward pass


def _floats(output: Any) -> list[jax.Array]:
    """The leaves that can have a gradient."""
    return [leaf for leaf in jax.tree.leaves(output) if is_float(leaf)]


def _callback(eqn: Equation) -> bool:
    return "callback" in eqn.name or eqn.name in {"infeed", *_HOST_OUTPUT}


def _communication(where: str, what: str) -> Finding:
    return Finding(
        "couples samples",
        where,
        f"communication over a named axis: {what}",
        ON_ONE_EXAMPLE,
    )


def _equations(program: Program) -> Iterator[Finding]:
    """Findings about equations that training refuses (`engine.effects`), and about host callbacks
    and foreign functions."""
    refused = hazards(program)
    for hazard in refused:
        yield Finding("couples samples", hazard.where, hazard.what, hazard.fix)
    said = {hazard.where for hazard in refused}
    for eqn in walker.equations(program):
        if eqn.source in said:
            continue
        if eqn.name in _HOST_OUTPUT:
            yield Finding(
                "escapes clipping",
                eqn.source,
                f"{eqn.name} shows the example outside of the program",
                "Remove it before training on private data",
            )
        elif eqn.name == "ffi_call":
            yield Finding(
                "check",
                eqn.source,
                "a foreign function, which JAX cannot look into",
                "Fine if it computes on its arguments and keeps nothing",
            )
        elif _callback(eqn):
            yield Finding(
                "couples samples",
                eqn.source,
                f"{eqn.name}, which may remember other samples",
                "Prepare the example on the host, or write the function in JAX",
            )


def _normalised(program: Program, parameters: int) -> Iterator[Finding]:
    for statistic in own_statistics(program, parameters):
        where = statistic.eqn.source
        if statistic.over_batch_alone:
            said = str(BatchStatisticsError.at(where)).removesuffix(".")
            what, _, fix = said.partition(". ")
            yield Finding("couples samples", where, what, fix)
        else:
            yield Finding(
                "check",
                where,
                "a normalisation over a leading axis of length one and others: of a batch it would "
                "mix samples, of one example it is its own",
                "Fine if it is meant for one example, as nn.instance_norm; a BatchNorm learns "
                "averages that are none",
            )


def _roots(program: Program, parameters: int) -> list[frozenset[int]]:
    """The inputs that each output depends on. A parameter counts if the output has a derivative."""

    def rule(_: walker.Path, eqn: Equation, values: list[frozenset[int]]) -> list[frozenset[int]]:
        roots = frozenset().union(*values)
        if eqn.name == "stop_gradient":
            roots = frozenset(root for root in roots if root >= parameters)
        return [roots] * len(eqn.outputs)

    inputs = [frozenset({index}) for index in range(len(program.inputs))]
    return walker.evaluate(program, inputs, rule, lift=lambda _: frozenset())


def _returned(
    output: Any, program: Program, roots: list[frozenset[int]], structure: Any, params: Any
) -> Iterator[Finding]:
    """Findings about outputs that look like a parameter and depend on the example."""
    leaves = jax.tree.leaves_with_path(params)
    numbers = jax.tree.unflatten(output, range(len(roots)))
    shapes = [aval.shape for aval in program.outputs]
    changed = [any(root >= len(leaves) for root in each) for each in roots]
    found = {
        path: None
        for returned, index in jax.tree.leaves_with_path(numbers)
        for path, leaf in leaves
        if changed[index] and shapes[index] == leaf.shape and _same_name(returned, path)
    }
    # The parameters as a whole, alone or as one of several results.
    parts = numbers if isinstance(numbers, tuple | list) else [numbers]
    for part in parts:
        if len(leaves) > 1 and jax.tree.structure(part) == structure:
            pairs = list(zip(jax.tree.leaves(part), leaves, strict=True))
            if all(shapes[index] == leaf.shape for index, (_, leaf) in pairs):
                found |= {path: None for index, (path, _) in pairs if changed[index]}
    for path in found:
        yield Finding(
            "escapes clipping",
            path_name(path),
            "the parameter comes back changed by the example",
            "Take it from its gradient, or keep it fixed: written back as it is, it tells what the "
            "example was",
        )


def _same_name(returned: Any, path: Any) -> bool:
    """Whether an output has the name of a parameter: its path ends with the whole path of the
    parameter, or is the end of that path and has two names. Places in a sequence are no names."""
    common = min(len(returned), len(path))
    tails = [tuple(map(str, each[len(each) - common :])) for each in (returned, path)]
    tail = path[len(path) - common :]
    names = sum(not isinstance(entry, jax.tree_util.SequenceKey) for entry in tail)
    return tails[0] == tails[1] and names >= (1 if common == len(path) else 2)


def _closed_over(program: Program) -> Iterator[Finding]:
    for constant in walker.closed_over(program):
        dtype, shape = jnp.result_type(constant), jnp.shape(constant)
        where = f"{dtype}{list(shape)}"
        if str(jax.typeof(constant)).startswith("Ref"):
            yield Finding(
                "couples samples",
                where,
                "a mutable array that the function closes over",
                "Pass values in and out: what one sample writes another may read",
            )
        elif jnp.issubdtype(dtype, jax.dtypes.prng_key):
            yield Finding(
                "check",
                where,
                "a random key that the function closes over: every sample draws the same numbers",
                "Make a key for each sample part of the example",
            )
        elif math.prod(shape) > 1:
            yield Finding(
                "check",
                where,
                "an array that the function closes over",
                "Fine if it is public; if it was computed from the training data, it takes every "
                "sample into every gradient",
            )


def _unused(roots: list[frozenset[int]], paths: list[Any], leaves: list[Any]) -> Iterator[Finding]:
    used = frozenset().union(*roots)
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if index not in used and is_float(leaf):
            yield Finding(
                "check",
                path_name(path),
                "a parameter without gradient: in training it gets noise alone",
                "Freeze it: per_sample_grads(..., trainable=...)",
            )


def _penalties(program: Program, leaves: list[Any]) -> Iterator[Finding]:
    if not program.outputs or not is_float(program.outputs[0]) or program.outputs[0].shape != ():
        return
    rest = len(program.outputs) - 1
    for use in find_uses(program, leaves, [True] + [False] * rest):
        if use.shared:
            yield Finding(
                "check",
                use.eqn.source,
                "a penalty on the parameters, which no example reaches",
                "Add its gradient behind the noise, as optax.add_decayed_weights does: there it "
                "takes up none of the threshold and costs no privacy",
            )
