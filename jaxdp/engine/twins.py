"""Which values of a program have the same cotangent."""

from typing import Any

from jaxdp.engine.walker import Equation, Key, Program


def cotangent_classes(program: Program) -> list[int | None]:
    """For every equation of the program, at its own level, a number: where two are equal, so are
    the cotangents of the first outputs. None where there is no output.

    A value that is used once, in a sum, has the cotangent of the sum; one that is only split or
    reshaped has the cotangents of what becomes of it. A recurrent cell adds the products of its
    input and of its state, so that both need one array of cotangents, not two.
    """
    equations = program.equations()
    readers: dict[Key, list[Equation | None]] = {}  # None: the program returns it
    for eqn in equations:
        for key in eqn.reads:
            readers.setdefault(key, []).append(eqn)
    for key in program.returns:
        readers.setdefault(key, []).append(None)
    number: dict[Key, int] = {}  # of values: equal for equal cotangents
    numbered: dict[Any, int] = {}  # of what becomes of a value

    def fate(key: Key, shape: tuple[int, ...]) -> Any:
        """What becomes of a value: a number, if its cotangent is that of another one."""
        used_by = readers.get(key, [])
        if len(used_by) != 1 or (eqn := used_by[0]) is None:
            return key
        after = tuple(number[output] for output in eqn.writes)
        if eqn.name in ("add", "add_any") and eqn.outputs[0].shape == shape:
            return after[0]
        if eqn.name in ("split", "reshape", "squeeze"):
            return (eqn.name, str(eqn.params), shape, after)
        return key

    # Backwards, so that what becomes of a value is known before the value.
    for eqn in reversed(equations):
        for key, aval in zip(eqn.writes, eqn.outputs, strict=True):
            becomes, fresh = fate(key, aval.shape), len(number)
            if not isinstance(becomes, int):
                becomes = numbered.setdefault(becomes, fresh)
            number[key] = becomes
    return [number[eqn.writes[0]] if eqn.writes else None for eqn in equations]
