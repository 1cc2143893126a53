"""Which equations of a program some of its outputs need."""

from collections.abc import Sequence

from jaxdp.engine.walker import Path, Program

# Effects that nothing in the program can notice.
UNHEARD = frozenset({"DebugEffect", "OrderedDebugEffect"})


def live_paths(
    program: Program,
    needed: Sequence[bool],
    path: Path = (),
    unheard: frozenset[str] = UNHEARD,
) -> frozenset[Path]:
    """The equations on which the needed outputs depend, or that have an effect: calls entered,
    bodies whole.

    Args:
      program: from `walker.trace`, or the body of a loop or block.
      needed: for each output whether it is asked for.
      path: of the equation that holds this program.
      unheard: effects that keep no equation alive.
    """
    live, _ = _live(program, needed, path, unheard)
    return frozenset(live)


def _live(
    program: Program, needed: Sequence[bool], path: Path, unheard: frozenset[str]
) -> tuple[set[Path], list[bool]]:
    """Live paths, and which inputs are needed."""
    wanted = {key for key, need in zip(program.returns, needed, strict=True) if need}
    live: set[Path] = set()
    for index, eqn in reversed(list(enumerate(program.equations()))):
        outputs = [key in wanted for key in eqn.writes]
        if not any(outputs) and not eqn.effects - unheard:
            continue
        place = (*path, index)
        live.add(place)
        inputs = [True] * len(eqn.operands)
        if (call := eqn.call) is not None:
            inside, inputs = _live(call, outputs, place, unheard)
            live |= inside
        wanted |= {key for key, need in zip(eqn.reads, inputs, strict=True) if need}
    return live, [key in wanted for key in program.takes]
