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


# An error may end with a sentence that stands elsewhere: one of these names, or a constant.
SENTENCES = {"advice", "error", "sentence", "what_next"}
# Its errors are reasons, which the sentences of its callers quote.
REASONS = "training/files.py"


def end(message: ast.expr) -> ast.expr:
    """What it says last."""
    if isinstance(message, ast.BinOp):
        return end(message.right)
    last = message.values[-1] if isinstance(message, ast.JoinedStr) else message
    return last.value if isinstance(last, ast.FormattedValue) else last


def ends_as_a_sentence(message: ast.expr) -> bool:
    last = end(message)
    if isinstance(last, ast.Name):
        return last.id in SENTENCES or last.id.isupper()
    return isinstance(last, ast.Constant) and str(last.value).endswith(".")


def makes_an_error(function: Function) -> bool:
    return ast.unparse(function.returns or ast.Constant(None)).strip("'").endswith("Error")


def caught(attempt: ast.Try) -> set[ast.AST]:
    """The raises in a `try` that its own handlers catch: reasons, which their sentences quote."""
    types = [handler.type for handler in attempt.handlers if handler.type is not None]
    names = {ast.unparse(node) for each in types for node in ast.walk(each)}
    return {
        node
        for statement in attempt.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if "Exception" in names or ast.unparse(node.exc.func) in names
    }


def half_sentences(source: str, makers: set[str]) -> list[int]:
    """Lines of the errors, raised or made by a function, that do not end with a full stop.

    What is raised through one of the `makers` of errors is looked at where that makes it.
    """
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    reasons = {node for each in nodes if isinstance(each, ast.Try) for node in caught(each)}
    raised = [node for node in nodes if isinstance(node, ast.Raise) and node not in reasons]
    made = [
        node
        for each in nodes
        if isinstance(each, Function) and makes_an_error(each)
        for node in ast.walk(each)
        if isinstance(node, ast.Return)
    ]
    errors = [node.exc for node in raised] + [node.value for node in made]
    messages = [
        error.args[0]
        for error in errors
        if isinstance(error, ast.Call) and error.args
        if ast.unparse(error.func).rpartition(".")[2] not in makers
    ]
    ends = {last.id for last in map(end, messages) if isinstance(last, ast.Name)}
    elsewhere = [
        node.value
        for node in nodes
        if (isinstance(node, ast.keyword) and node.arg in SENTENCES)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ends)
        if isinstance(node.value, ast.Constant | ast.JoinedStr | ast.BinOp)
    ]
    return sorted(each.lineno for each in messages + elsewhere if not ends_as_a_sentence(each))


def test_a_half_sentence_is_seen() -> None:
    source = """
raise ValueError("x must be 1. Pass it.")
raise ValueError(f"x must be {y}. {advice}")
raise ValueError("a" f"b {y}")
raise ValueError("x is 1")
raise _damaged("disk")
advice = "Pass it"
check(y, advice="pass it")

def _damaged(what) -> "ValueError":
    return ValueError(f"it is damaged ({what})")

try:
    raise OSError("no file")
    raise TypeError("no text")
except (OSError, ValueError) as error:
    raise ValueError(f"cannot be read ({error}). Free the disk.") from error
"""
    assert half_sentences(source, {"_damaged"}) == [4, 5, 7, 8, 11, 15]


def test_errors_end_with_a_full_stop() -> None:
    """They read "NAME must be RULE, got VALUE. What to do next." """
    sources = {name: path.read_text() for name, path in FILES.items() if name != REASONS}
    makers = {
        qualified.rpartition(".")[2]
        for source in sources.values()
        for qualified, function in functions(source).items()
        if makes_an_error(function)
    }
    open_ended = {name: half_sentences(source, makers) for name, source in sources.items()}
    assert {name: lines for name, lines in open_ended.items() if lines} == {}
