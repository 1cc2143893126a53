"""Every public name is documented, and imports run one way."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import jaxdp
from tools.architecture import FILES, PAGE, imported, own, page

# Each module belongs to the room of its longest prefix here. A module may import from its own room
# and from rooms below; rooms on the same floor know nothing of each other.
ROOMS = {
    "jaxdp.interrupts": 0,
    "jaxdp.checks": -1,
    "jaxdp.tables": 0,
    "jaxdp.trees": 0,
    "jaxdp.schedules": 0,
    "jaxdp.randomness": 0,
    "jaxdp.shares": -1,
    "jaxdp.distributions": 0,
    "jaxdp.coupling": 0,
    "jaxdp.varying": 0,
    "jaxdp.accounting": 0,
    "jaxdp.bounded": 1,
    "jaxdp.released": 1,
    "jaxdp.gathering": 1,
    "jaxdp.nn": 1,
    "jaxdp.sampling": 1,
    # Within the engine: programs, boxes and arithmetic know nothing of each other, factors nothing
    # of programs, kinds of site nothing of where they are looked for.
    "jaxdp.engine.walker": 1,
    "jaxdp.engine.boxes": 1,
    "jaxdp.engine.platforms": 0,
    "jaxdp.engine.rounding": 1,
    "jaxdp.engine.numerics": 1.2,
    "jaxdp.engine.precision": 1.3,
    "jaxdp.engine.sums": 1.4,
    "jaxdp.engine.factors": 1.6,
    "jaxdp.engine.views": 1.6,
    "jaxdp.engine.kinds": 1.8,
    "jaxdp.engine": 2,
    "jaxdp.problem": 3,
    "jaxdp.options": 4,
    "jaxdp.per_sample": 5,
    "jaxdp.explanation": 5,
    "jaxdp.validation": 5,
    "jaxdp.clipping": 6,
    "jaxdp.noise": 6,
    "jaxdp.accumulation": 6,
    "jaxdp.lipschitz": 7,
    "jaxdp.distributed": 7,
    "jaxdp.training": 8,
    "jaxdp.recipes": 9,
    "jaxdp.cli": 10,
    # The two doors: the table of contents of the package, and `python -m jaxdp`.
    "jaxdp": 11,
    "jaxdp.__main__": 11,
}
WITHOUT_JAX = ("jaxdp.checks", "jaxdp.accounting", "jaxdp.sampling")


def room(name: str) -> str:
    candidates = [known for known in ROOMS if name == known or name.startswith(known + ".")]
    return max(candidates, key=len)


def test_the_test_sees_the_imports() -> None:
    assert "jaxdp.bounded" in imported("jaxdp.noise")
    assert "jax" in imported("jaxdp.noise")
    assert {"jaxdp.engine.methods.dense", "jaxdp.cli"} <= set(FILES)


@pytest.mark.parametrize("name", list(FILES))
def test_a_module_imports_from_its_own_room_and_from_below(name: str) -> None:
    here = room(name)
    assert here != "jaxdp" or name == "jaxdp", f"{name} has no room yet: give it one in ROOMS"
    for other in own(imported(name)):
        there = room(other)
        assert there == here or ROOMS[there] < ROOMS[here], f"{name} imports {other}"


@pytest.mark.parametrize(
    "name", [name for name in FILES if name.startswith("jaxdp.engine.kinds.")]
)
def test_no_kind_of_site_knows_another(name: str) -> None:
    kinds = {other for other in imported(name) if other.startswith("jaxdp.engine.kinds")}
    assert kinds <= {"jaxdp.engine.kinds.base"}


def test_the_drawing_of_the_house_is_what_the_imports_are() -> None:
    assert PAGE.read_text() == page(), "run python tools/architecture.py"


def everything_imported(name: str) -> set[str]:
    """What a module imports, directly or through other modules of the package."""
    seen, waiting = set(), {name}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        if module in FILES:
            waiting |= imported(module) - seen
    return seen


@pytest.mark.parametrize(
    "name", [name for name in FILES if name.startswith(WITHOUT_JAX)]
)
def test_checks_accounting_and_sampling_import_no_jax(name: str) -> None:
    roots = {other.split(".")[0] for other in everything_imported(name)}
    assert not roots & {"jax", "jaxlib", "optax", "flax", "chex", "orbax"}


@pytest.mark.parametrize("name", list(FILES))
def test_nothing_is_imported_from_the_inside_of_jax(name: str) -> None:
    inside = [other for other in imported(name) if "._src" in other or other.startswith("jaxlib")]
    assert inside == []
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        assert not (isinstance(node, ast.Attribute) and node.attr == "_src")


# What JAX calls the parts of a program, which differs between its versions.
PARTS_OF_PROGRAMS = {"jaxpr", "consts", "eqns", "invars", "outvars", "in_avals", "out_avals"}


@pytest.mark.parametrize("name", [name for name in FILES if name != "jaxdp.engine.walker"])
def test_one_module_looks_into_programs(name: str) -> None:
    attributes = {
        node.attr
        for node in ast.walk(ast.parse(FILES[name].read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert not attributes & PARTS_OF_PROGRAMS


def modules() -> list[str]:
    found = pkgutil.walk_packages(jaxdp.__path__, "jaxdp.")
    return ["jaxdp", *(info.name for info in found if not info.name.endswith("__main__"))]


def public_objects() -> Iterator[tuple[str, Any]]:
    """(qualified name, object) of every public function, class, method and property."""
    for module_name in modules():
        module = importlib.import_module(module_name)
        yield module_name, module
        for name, value in vars(module).items():
            if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            if value.__module__ != module_name:
                continue
            yield f"{module_name}.{name}", value
            if inspect.isclass(value):
                yield from public_members(f"{module_name}.{name}", value)


def is_protocol(cls: type) -> bool:
    return getattr(cls, "_is_protocol", False)


def described_by_protocols(cls: type) -> set[str]:
    """Methods whose contract stands in a protocol of the package that the class fulfils: what the
    protocol describes there once need not be repeated; what it leaves bare must be."""
    described = set()
    for module_name in modules():
        for protocol in vars(importlib.import_module(module_name)).values():
            if not (inspect.isclass(protocol) and is_protocol(protocol)):
                continue
            members = {name for name in vars(protocol) if not name.startswith("_")}
            if members and members <= set(vars(cls)) | set(cls.__annotations__):
                described |= {name for name in members if vars(protocol)[name].__doc__}
    return described


def public_members(prefix: str, cls: type) -> Iterator[tuple[str, Any]]:
    fields = set()
    if dataclasses.is_dataclass(cls):
        fields = {field.name for field in dataclasses.fields(cls)}
    # Fields are documented in the class itself.
    if is_protocol(cls):
        return
    skipped = fields | set(getattr(cls, "_fields", ())) | described_by_protocols(cls)
    for name, value in vars(cls).items():
        if name.startswith("_") or name in skipped:
            continue
        if isinstance(value, classmethod | staticmethod):
            value = value.__func__
        if inspect.isfunction(value) or isinstance(value, property):
            yield f"{prefix}.{name}", value


PUBLIC = dict(public_objects())


def own_docstring(value: Any) -> str | None:
    """Its own: not that of a base class, nor the signature that dataclasses and tuples make up."""
    text = value.__doc__ if not inspect.isclass(value) else value.__dict__.get("__doc__")
    if inspect.isclass(value) and text is not None and text.startswith(f"{value.__name__}("):
        return None
    return text


def test_the_search_finds_what_users_see() -> None:
    assert {
        "jaxdp.noise.add_noise",
        "jaxdp.per_sample.PerSampleGrads.norms",
        "jaxdp.per_sample.PerSampleGrads.losses",
        "jaxdp.per_sample.PerSampleGrads.from_arrays",
        "jaxdp.clipping.base.ClipState",
        "jaxdp.engine.weighting.ClipRule",
    } <= set(PUBLIC)
    assert len(PUBLIC) > 100


@pytest.mark.parametrize("name", list(PUBLIC))
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert own_docstring(PUBLIC[name])


@pytest.mark.parametrize(
    "module",
    [jaxdp, jaxdp.accounting, jaxdp.lipschitz, jaxdp.nn, jaxdp.training],
    ids=lambda module: module.__name__,
)
def test_every_exported_name_has_a_docstring(module: Any) -> None:
    exported = [name for name in vars(module) if not name.startswith("_")]
    assert exported
    for name in exported:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert own_docstring(value), f"{module.__name__}.{name} has no docstring"


def test_the_root_offers_the_road_in_its_order() -> None:
    """Others script against these names."""
    road = {
        "per_sample_grads",
        "PerSampleGrads",
        "clip_flat",
        "clip_per_layer",
        "clip_by_group",
        "clip_automatic",
        "clip_adaptive",
        "Bounded",
        "add_noise",
        "accumulate",
        "executed_noise_multipliers",
        "PoissonSampler",
        "Ledger",
        "accounting",
        "training",
    }
    assert road <= set(vars(jaxdp))


def test_the_root_is_a_table_of_contents_without_logic() -> None:
    body = ast.parse(FILES["jaxdp"].read_text()).body
    docstring, *rest = body
    assert isinstance(docstring, ast.Expr)
    for node in rest:
        is_metadata = isinstance(node, ast.Assign) and "__version__" in ast.unparse(node)
        assert isinstance(node, ast.ImportFrom) or is_metadata
