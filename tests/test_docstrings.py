"""Docstrings keep up with the code: Args names every parameter, in order, and nothing else; Raises, a ValueError."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "fcmae").rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef
MOST = 2  # parameters of a public function that its signature and its first line may explain


def parameters(function: Function, is_method: bool) -> list[str]:
    """Names in the signature, in order, without the object or class of a method."""
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    decorators = [node.id for node in function.decorator_list if isinstance(node, ast.Name)]
    if is_method and "staticmethod" not in decorators:
        del names[0]
    names += [args.vararg.arg] if args.vararg else []
    names += [arg.arg for arg in args.kwonlyargs]
    return names + ([args.kwarg.arg] if args.kwarg else [])


def documented(docstring: str) -> list[str] | None:
    """Names in the Args section, in order, or None if there is none; a line that is no "a, b: ..." stands for itself.

    docstring: without its indentation.
    """
    section = re.search(r"^Args:\n((?:(?: .*)?(?:\n|$))+)", docstring, re.M)
    if section is None:
        return None
    names: list[str] = []
    for line in section[1].splitlines():
        if re.match(r" {4}\S", line):  # further in, it goes on with the line before
            entry = re.match(r" {4}(\w+(?:, \w+)*): \S", line)
            names += entry[1].split(", ") if entry else [line.strip()]
    return names


def raises_value_error(function: Function) -> bool:
    """Whether a raise ValueError stands in its own body: not in a function, class or lambda inside it."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise):
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(error, ast.Name) and error.id == "ValueError":
                return True
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return False


def says_value_error(docstring: str) -> bool:
    """Whether the Raises section has a line for ValueError."""
    section = re.search(r"^Raises:\n((?:(?: .*)?(?:\n|$))+)", docstring, re.M)
    return section is not None and re.search(r"^ {4}ValueError: \S", section[1], re.M) is not None


def undeclared(body: list[ast.stmt], inside: str = "", of_class: str = "") -> Iterator[str]:
    """Public functions and methods that raise a ValueError and do not say so.

    An __init__ may say it in the class's docstring (of_class). A method without a docstring has that of the method that
    it overrides.
    """
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from undeclared(node.body, f"{inside}{node.name}.", ast.get_docstring(node) or "")
        elif isinstance(node, Function) and (not node.name.startswith("_") or node.name == "__init__"):
            docstring = ast.get_docstring(node) or ""
            texts = [docstring, of_class] if node.name == "__init__" else [docstring]
            overrides = inside and not docstring and node.name != "__init__"
            if raises_value_error(node) and not overrides and not any(map(says_value_error, texts)):
                yield inside + node.name


def public(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Name, docstring and parameters of every public function, method and class; a class has those of its __init__."""
    for node in body:
        if isinstance(node, Function) and (not node.name.startswith("_") or node.name.endswith("__")):
            yield inside + node.name, ast.get_docstring(node) or "", parameters(node, is_method=bool(inside))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            inits = [f for f in node.body if isinstance(f, Function) and f.name == "__init__"]
            yield (
                inside + node.name,
                ast.get_docstring(node) or "",
                parameters(inits[0], is_method=True) if inits else [],
            )
            yield from public(node.body, f"{inside}{node.name}.")


def problems(source: str) -> list[str]:
    """What is wrong with the docstrings of a module, a sentence each."""
    tree, found = ast.parse(source), list[str]()
    for name, docstring, names in public(tree.body):
        said = documented(docstring)
        if said is not None and said != names:
            found.append(f"{name}: Args has {', '.join(said)} and the signature {', '.join(names)}")
        is_function = name.rpartition(".")[2][0].islower()
        if is_function and len(names) > MOST and said is None and (docstring or "." not in name):
            found.append(f"{name}: {len(names)} parameters and no Args")
    return found + [f"{name}: raises ValueError and has no Raises" for name in undeclared(tree.body)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_name_the_parameters_and_the_errors(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


GOOD = '''
def scale(x, by, *rest, low=0, high=1, **more):
    """Scale.

    Args:
        x: (N,) float: a row.

            A second paragraph: of the same.
        by, rest: factors; note: they are
            floats: not integers.
        low: least.
        high: largest.
        more: what else.

    Returns:
        (N,) float.

    Raises:
        TypeError: if x is none.
        ValueError: if low is more
            than high.
    """
    if low > high:
        raise ValueError("low is more than high")

def short(x, by):
    """Two need no section."""

def _private(x, y, z):
    """Nor does this."""
    raise ValueError

def outer(x):
    """What a function inside raises is its own."""
    def inner():
        raise ValueError
    return inner

class Scale:
    """Scales.

    Args:
        by: a factor.

    Raises:
        ValueError: if it is negative."""

    def __init__(self, by):
        if by < 0:
            raise ValueError("negative")

    def overridden(self, x, y, z):
        raise ValueError("as its base says")

    def between(self, x, low, high):
        """Clip.

        Args:
            x: a row.
            low: least.
            high: largest.
        """

    def __call__(self, x):
        """Scale.

        Args:
            x: (N,) float.
        """

    @staticmethod
    def default(x):
        """Scale by one.

        Args:
            x: (N,) float.
        """

    @classmethod
    def make(cls, by):
        """Make it.

        Args:
            by: a factor.

        Raises:
            ValueError: if it is zero.
        """
        if not by:
            raise ValueError
'''


def test_a_right_docstring_passes() -> None:
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        ("        low: least.\n", "", "scale: Args has"),
        ("        low: least.\n", "        lower: least.\n", "scale: Args has"),
        ("        low: least.\n", "        low: least.\n        extra: nothing.\n", "scale: Args has"),
        (
            "        low: least.\n        high: largest.\n",
            "        high: largest.\n        low: least.\n",
            "scale: Args",
        ),
        ("        low: least.\n", "        low is least.\n", "low is least."),
        (
            "    Args:\n        x: (N,) float: a row.\n",
            "    x: (N,) float: a row.\n",
            "scale: 6 parameters and no Args",
        ),
        ("        by: a factor.", "        factor: it.", "Scale: Args has"),
        ("            x: (N,) float.\n", "            y: (N,) float.\n", "Scale.__call__: Args has"),
        ("def default(x)", "def default(y)", "Scale.default: Args has"),
        ("        ValueError: if low is more\n", "        KeyError: if low is more\n", "scale: raises ValueError"),
        ("    Raises:\n        TypeError", "    Errors:\n        TypeError", "scale: raises ValueError"),
        ("        ValueError: if it is negative.", "        It may.", "Scale.__init__: raises ValueError"),
        ("            ValueError: if it is zero.", "            ValueError", "Scale.make: raises ValueError"),
        (
            "        Args:\n            x: a row.\n",
            "            x: a row.\n",
            "Scale.between: 3 parameters and no Args",
        ),
        ("            by: a factor.\n", "            cls: this.\n            by: a factor.\n", "Scale.make: Args has"),
    ],
)
def test_a_wrong_docstring_is_found(right: str, wrong: str, what: str) -> None:
    assert GOOD.count(right) >= 1
    (found,) = problems(GOOD.replace(right, wrong, 1))
    assert what in found


def test_a_section_may_end_a_docstring_anywhere() -> None:
    assert documented(inspect.cleandoc("Do.\n\n    Args:\n        x: it.\n        y: more.")) == ["x", "y"]
    assert documented("Do.\n\nReturns:\n    x: it.") is None
