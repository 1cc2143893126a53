"""Which equations of a loss have operands whose cotangent is the same for every sample."""

from collections.abc import Sequence

from jaxdp.engine.liveness import live_paths
from jaxdp.engine.walker import Equation, Key, Path, Program

# Sums and copies, whose operands have the cotangent of the output, or part of it.
_LINEAR = frozenset(
    {"add", "sub", "add_any", "neg", "copy", "copy_p", "convert_element_type", "reduce_sum"}
    | {"reshape", "squeeze", "broadcast_in_dim", "transpose"}
)


def constant_cotangents(program: Program, needed: Sequence[bool]) -> frozenset[Path]:
    """Equations whose operands reach the loss by sums and constant factors alone, calls entered.

    The derivative of the loss with respect to such an operand is one array, whatever the sample. A
    penalty on the parameters is added to the loss of an example in such an equation.

    Args:
      program: whose first output is the loss.
      needed: for each output whether it is differentiated.
    """
    live = live_paths(program, needed)
    varying = {key for key, need in zip(program.returns[1:], needed[1:], strict=True) if need}
    found, _ = _walk(program, varying, live, ())
    return frozenset(found)


def _walk(
    program: Program, varying: set[Key | None], live: frozenset[Path], path: Path
) -> tuple[set[Path], list[bool]]:
    """Such equations, and which inputs have a cotangent that varies; `varying` grows."""
    found: set[Path] = set()
    for index, eqn in reversed(list(enumerate(program.equations()))):
        place = (*path, index)
        if place not in live:
            continue
        varies = [key in varying for key in eqn.writes]
        if (call := eqn.call) is not None:
            returned = {key for key, does in zip(call.returns, varies, strict=True) if does}
            inside, inputs = _walk(call, returned, live, place)
            found |= inside
        else:
            inputs = [any(varies) or not _constant_factor(eqn)] * len(eqn.operands)
            if not any(inputs):
                found.add(place)
        varying |= {key for key, does in zip(eqn.reads, inputs, strict=True) if does}
    return found, [key in varying for key in program.takes]


def _constant_factor(eqn: Equation) -> bool:
    """Whether the derivative of the output by an operand that is no literal is a constant."""
    if eqn.name == "mul":
        return len(eqn.literals) == 1
    if eqn.name == "div":
        return eqn.reads[1] is None
    return eqn.name in _LINEAR
