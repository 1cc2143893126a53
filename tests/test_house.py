"""Files, functions and signatures stay small enough to be read at once."""

import ast
import io
import tokenize
from pathlib import Path

import jaxdp

ROOT = Path(jaxdp.__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}

LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60  # without its docstring, its comments and its blank lines
PARAMETERS = 10  # outside of what users call, where an argument has its name and its default

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> dict[str, Function]:
    """Qualified name -> definition of every function, at any depth."""
    found: dict[str, Function] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if isinstance(child, Function):
                    found[name] = child
                visit(child, f"{name}.")
            else:
                visit(child, prefix)

    visit(ast.parse(source), "")
    return found


def lines_of_code(source: str) -> set[int]:
    """Numbers of the lines that hold anything but comments and blanks."""
    silent = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            found |= set(range(token.start[0], token.end[0] + 1))
    return found


def length(function: Function, code: set[int]) -> int:
    """Lines of code, the signature included."""
    lines = set(range(function.lineno, (function.end_lineno or function.lineno) + 1))
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines & code)


def parameters(function: Function) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len(named) + (arguments.vararg is not None) + (arguments.kwarg is not None)


def is_public(qualified: str) -> bool:
    return not any(part.startswith("_") for part in qualified.split(".") if part != "__init__")


def test_lengths_and_parameters_are_counted() -> None:
    source = '''
def outer(a, *, b, **c):
    """A docstring
    of two lines."""
    # A comment.

    def inner():
        return (
            1
        )
    return inner
'''
    found = functions(source)
    code = lines_of_code(source)
    assert list(found) == ["outer", "outer.inner"]
    assert length(found["outer"], code) == 6
    assert length(found["outer.inner"], code) == 4
    assert parameters(found["outer"]) == 3


def test_files_are_short() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    long = {name: count for name, count in lines.items() if count > LINES_OF_A_FILE}
    assert not long


def test_functions_are_short() -> None:
    long = {}
    for name, path in FILES.items():
        source = path.read_text()
        code = lines_of_code(source)
        for qualified, function in functions(source).items():
            if length(function, code) > LINES_OF_A_FUNCTION:
                long[f"{name}::{qualified}"] = length(function, code)
    assert not long


def test_functions_that_users_do_not_call_have_few_parameters() -> None:
    many = {
        f"{name}::{qualified}": parameters(function)
        for name, path in FILES.items()
        for qualified, function in functions(path.read_text()).items()
        if parameters(function) > PARAMETERS and not is_public(qualified)
    }
    assert not many


# Rooms whose errors read "NAME must be RULE, got VALUE. What to do next."
PUNCTUATED = (
    "checks.py",
    "distributed/",
    "lipschitz/",
    "nn/",
    "problem.py",
    "schedules.py",
    "trees.py",
)
# An error may end with a sentence that stands elsewhere: one of these names, or a constant.
SENTENCES = {"advice", "error", "what_next"}


def ends_as_a_sentence(message: ast.expr) -> bool:
    if isinstance(message, ast.BinOp):
        return ends_as_a_sentence(message.right)
    last = message.values[-1] if isinstance(message, ast.JoinedStr) else message
    if isinstance(last, ast.FormattedValue):
        last = last.value
    if isinstance(last, ast.Name):
        return last.id in SENTENCES or last.id.isupper()
    return isinstance(last, ast.Constant) and str(last.value).endswith(".")


def test_a_half_sentence_is_seen() -> None:
    messages = ['"x must be 1. Pass it."', 'f"x must be {y}. {advice}"', '"a" f"b {y}"', '"x is 1"']
    found = [ends_as_a_sentence(ast.parse(each, mode="eval").body) for each in messages]
    assert found == [True, True, False, False]


def test_errors_end_with_a_full_stop() -> None:
    open_ended = [
        f"{name}:{node.lineno}"
        for name, path in FILES.items()
        if name.startswith(PUNCTUATED)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
        if not ends_as_a_sentence(node.exc.args[0])
    ]
    assert open_ended == []
