"""Draws the rooms of jaxdp and what they import into docs/architecture.md.

    python tools/architecture.py          # writes the drawing and the list of rooms
    python tools/architecture.py --check  # says whether they are what the imports are, exit code 1

A room is a file or a folder right below jaxdp/. Its sentence is the first of its docstring. Rooms
stand in floors: each is one above the highest room that it imports. An arrow that other arrows
imply is left out.
"""

import ast
import graphlib
import sys
from collections.abc import Mapping
from pathlib import Path

TREE = Path(__file__).parent.parent
ROOT = TREE / "jaxdp"
PAGE = TREE / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by tools/architecture.py -->\n", "<!-- end of the drawing -->\n"


def source_files() -> dict[str, Path]:
    """Module name -> file."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["jaxdp", *path.relative_to(ROOT).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


FILES = source_files()


def imported(name: str) -> set[str]:
    """Everything a module imports, anywhere in it, by full name; type-checking blocks included."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively, where absolute names are read"
            assert node.module is not None
            # `from jaxdp import sampling` imports a module, `from jaxdp.x import f` a name.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in FILES else node.module)
    return found


def own(names: set[str]) -> set[str]:
    """Those of jaxdp."""
    return {name for name in names if name == "jaxdp" or name.startswith("jaxdp.")}


def room(name: str) -> str:
    """The file or folder below jaxdp that holds a module."""
    return name.removeprefix("jaxdp.").split(".")[0]


def rooms() -> dict[str, set[str]]:
    """Room -> the rooms that it imports. The root and `__main__` are doors, not rooms."""
    graph: dict[str, set[str]] = {}
    for name in FILES:
        if name not in ("jaxdp", "jaxdp.__main__"):
            others = {room(other) for other in own(imported(name)) - {"jaxdp"}}
            graph.setdefault(room(name), set()).update(others - {room(name)})
    return graph


def everything_below(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Room -> the rooms that it imports, directly or through others."""
    below: dict[str, set[str]] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        below[name] = graph[name].union(*(below[other] for other in graph[name]))
    return below


def floors(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The rooms of each floor, from the ground up."""
    height: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        height[name] = 1 + max((height[other] for other in graph[name]), default=-1)
    return [
        sorted(name for name in height if height[name] == floor)
        for floor in range(max(height.values()) + 1)
    ]


def sentence(name: str) -> str:
    """The first of a room's docstring."""
    module = ast.parse(FILES[f"jaxdp.{name}"].read_text())
    first = (ast.get_docstring(module) or "").partition("\n\n")[0].replace("\n", " ")
    # A bar would end the cell of a table.
    return first.partition(". ")[0].rstrip(".").replace("|", "\\|") + "."


def drawing() -> str:
    """The drawing as Mermaid and the list of rooms, from the top floor down."""
    graph = rooms()
    below = everything_below(graph)
    lines = ["```mermaid", "flowchart TD"]
    for name in sorted(graph):
        implied = set[str]().union(*(below[other] for other in graph[name]))
        lines += [f"    {name} --> {other}" for other in sorted(graph[name] - implied)]
    lines += ["```", "", "| Floor | Room | What it holds |", "| ---: | --- | --- |"]
    for floor, names in reversed(list(enumerate(floors(graph)))):
        for name in names:
            folder = FILES[f"jaxdp.{name}"].name == "__init__.py"
            path = f"{name}/" if folder else f"{name}.py"
            lines.append(f"| {floor} | `{path}` | {sentence(name)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the drawing of the imports as they are."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{drawing()}{END}{tail}"


def main() -> int:
    """Writes or checks the page."""
    if sys.argv[1:] == ["--check"]:
        return int(page() != PAGE.read_text())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
