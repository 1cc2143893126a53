"""Every public function and class says what it takes, returns and raises, and shows an example.

The examples run as doctests, with the modules that they stand in.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

# What users import from. A name that several of them offer counts once.
OFFERED = (
    "jaxdp",
    "jaxdp.accounting",
    "jaxdp.sampling",
    "jaxdp.nn",
    "jaxdp.lipschitz",
    "jaxdp.distributed",
    "jaxdp.training",
    "jaxdp.recipes.data",
)
SECTION = re.compile(r"^( *)(Args|Attributes|Returns|Yields|Raises|Example):$", re.MULTILINE)


class Public(NamedTuple):
    """A public function, method or class.

    Attributes:
      value: it.
      owner: the class of a method.
    """

    value: Any
    owner: type | None = None


def offered() -> Iterator[tuple[str, Public]]:
    seen = set()
    for room in OFFERED:
        for name, value in vars(importlib.import_module(room)).items():
            value = inspect.unwrap(value)  # what `jax.jit` made of it
            is_object = inspect.isfunction(value) or inspect.isclass(value)
            if name.startswith("_") or not is_object or value in seen:
                continue
            if not value.__module__.startswith("jaxdp"):
                continue
            seen.add(value)
            yield f"{room}.{name}", Public(value)
            if inspect.isclass(value):
                yield from methods(f"{room}.{name}", value)


def methods(prefix: str, owner: type) -> Iterator[tuple[str, Public]]:
    for name, value in vars(owner).items():
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if name.startswith("_") or name in fields(owner) or not inspect.isfunction(value):
            continue
        if any(name in vars(base) for base in owner.__mro__[1:]):
            continue  # its contract stands where it was declared first
        yield f"{prefix}.{name}", Public(value, owner)


def fields(value: type) -> set[str]:
    """Of a data class or a named tuple."""
    names = set(getattr(value, "_fields", ()))
    if dataclasses.is_dataclass(value):
        names |= {field.name for field in dataclasses.fields(value)}
    return {name for name in names if not name.startswith("_")}


PUBLIC = dict(offered())
FUNCTIONS = {name: each for name, each in PUBLIC.items() if inspect.isfunction(each.value)}
CLASSES = {name: each for name, each in PUBLIC.items() if inspect.isclass(each.value)}


def sections(value: Any) -> dict[str, str]:
    """Name -> text of the sections of a docstring, whatever their indent."""
    text = inspect.getdoc(value) or ""
    headers = [match for match in SECTION.finditer(text) if not match.group(1)]
    ends = [match.start() for match in headers[1:]] + [len(text)]
    return {match[2]: text[match.end() : end] for match, end in zip(headers, ends, strict=False)}


def described(text: str) -> set[str]:
    """The names that a section of arguments or attributes has entries for."""
    entries = re.findall(r"^ *([\w*, ]+):(?= |$)", text, re.MULTILINE)
    return {name.strip().lstrip("*") for entry in entries for name in entry.split(",")}


def parameters(public: Public) -> set[str]:
    names = list(inspect.signature(public.value).parameters)
    bound = names[:1] if public.owner is not None and names[:1] in (["self"], ["cls"]) else []
    return {name for name in names if name not in bound}


def raises(value: Any) -> bool:
    """Whether it raises, or asks `jaxdp.checks` and its like to."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called.lstrip("_").startswith(("check_", "checked_")):
                return True
    return False


def returns(value: Any) -> bool:
    return inspect.signature(value).return_annotation not in (None, "None")


# A clip makes its rule and asks for the sum: every clip's example shows it.
SHOWN_BY_OTHERS = {"jaxdp.PerSampleGrads.clipped_sum"}


def shows(value: Any) -> bool:
    return ">>>" in sections(value).get("Example", "")


def shown_by_its_class(name: str, public: Public) -> bool:
    method = name.rpartition(".")[2]
    return public.owner is not None and f".{method}(" in sections(public.owner).get("Example", "")


def test_the_search_finds_what_users_see() -> None:
    functions = {"jaxdp.add_noise", "jaxdp.lipschitz.matrix_norm", "jaxdp.Ledger.epsilon"}
    assert functions <= set(FUNCTIONS)
    assert {"jaxdp.Bounded", "jaxdp.training.Budget", "jaxdp.nn.Layer"} <= set(CLASSES)
    assert len(FUNCTIONS) > 120


def test_sections_are_found_at_any_indent() -> None:
    def example(a: int, b: int) -> int:
        """Adds.

        Args:
            a, b: numbers.

        Returns:
          The sum.
        """
        return a + b

    found = sections(example)
    assert list(found) == ["Args", "Returns"]
    assert described(found["Args"]) == {"a", "b"}


def test_every_argument_is_described() -> None:
    gaps = {
        name: parameters(public) - described(sections(public.value).get("Args", ""))
        for name, public in FUNCTIONS.items()
    }
    assert {name: gap for name, gap in gaps.items() if gap} == {}


def test_what_is_returned_is_described() -> None:
    missing = [
        name
        for name, public in FUNCTIONS.items()
        if returns(public.value) and not {"Returns", "Yields"} & set(sections(public.value))
    ]
    assert missing == []


def test_what_is_raised_is_described() -> None:
    missing = [
        name
        for name, public in FUNCTIONS.items()
        if raises(public.value) and "Raises" not in sections(public.value)
    ]
    assert missing == []


def test_every_function_is_shown_in_an_example() -> None:
    missing = [
        name
        for name, public in FUNCTIONS.items()
        if not (shows(public.value) or shown_by_its_class(name, public) or name in SHOWN_BY_OTHERS)
    ]
    assert missing == []


def test_every_class_describes_its_fields() -> None:
    gaps = {}
    for name, public in CLASSES.items():
        found = sections(public.value)
        gaps[name] = fields(public.value) - described(
            found.get("Attributes", "") + found.get("Args", "")
        )
    assert {name: gap for name, gap in gaps.items() if gap} == {}


def test_every_class_but_an_error_is_shown_in_an_example() -> None:
    missing = [
        name
        for name, public in CLASSES.items()
        if not issubclass(public.value, Exception) and not shows(public.value)
    ]
    assert missing == []
