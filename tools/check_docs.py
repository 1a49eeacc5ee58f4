"""Fails where a public name lacks its docstring, a tensor its shape or a setting its meaning.

What must hold everywhere: every public module, class and function has a docstring; a public function
that takes tensors says their shapes, in the docstring (``[B, T]``) or in the arguments' names
(``tokens_BT``); every field of a dataclass whose name ends in ``Config`` has a docstring under it.
Averages with goals of their own are printed.

Usage: ``python tools/check_docs.py [ROOT] [PACKAGE ...]``
"""

import ast
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("flamingo_dist", "kernels", "data_pipeline", "jobs")

# [B, T], [B, M*F, C], [N]; or a name with a shape suffix; or the plain words.
SHAPE_IN_TEXT = re.compile(
    r"\[[A-Z][A-Za-z0-9_]*(?:\s*[,x*]\s*[A-Za-z0-9_+*]+)*\]|\b\w+_[A-Z][A-Z0-9]*\b|\bscalar|shape"
)
SHAPE_IN_NAME = re.compile(r"_[A-Z][A-Z0-9]*$")
FIGURE_SHAPE = re.compile(r"\[[A-Z][A-Za-z0-9_]*(?:\s*[,x*]\s*[A-Za-z0-9_+*]+)*\]|shape")
UNCHECKED_DECORATORS = ("overload", "override", ".setter", ".deleter")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Figures:
    """Counts over all sources, and the averages they make."""

    arguments: int = 0
    annotated: int = 0
    public: int = 0
    documented: int = 0
    tensor: int = 0
    shaped: int = 0
    lengths: list[int] = field(default_factory=list)
    largest_file: int = 0

    def rows(self) -> list[tuple[str, float, str, float]]:
        """Return name, value, direction and goal of each figure."""
        lengths = sorted(self.lengths) or [0]
        p90 = lengths[min(len(lengths) - 1, int(len(lengths) * 0.9))]
        return [
            ("public functions documented, %", _percent(self.documented, self.public), ">=", 85),
            ("tensor docstrings with shapes, %", _percent(self.shaped, self.tensor), ">=", 60),
            ("arguments annotated, %", _percent(self.annotated, self.arguments), ">=", 95),
            ("function lines, 90th percentile", p90, "<=", 45),
            ("largest file, non-blank lines", self.largest_file, "<=", 400),
        ]


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 100.0


def arguments_of(function: Function) -> list[ast.arg]:
    """Return the named arguments, without self and cls."""
    every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def tensor_arguments(function: Function) -> list[str]:
    """Return the names of the arguments that are tensors or hold some; functions returning one do not."""
    annotated = {a.arg: ast.unparse(a.annotation) for a in arguments_of(function) if a.annotation}
    return [name for name, text in annotated.items() if "Tensor" in text and "Callable" not in text]


def count(tree: ast.AST, figures: Figures) -> None:
    """Add every function of a source, nested ones included, to the figures."""
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        arguments = arguments_of(node)
        figures.arguments += len(arguments)
        figures.annotated += sum(argument.annotation is not None for argument in arguments)
        figures.lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
        if not node.name.startswith("_"):
            text = ast.get_docstring(node) or ""
            figures.public += 1
            figures.documented += bool(text)
            if text and tensor_arguments(node):
                figures.tensor += 1
                figures.shaped += bool(FIGURE_SHAPE.search(text))


def function_errors(function: Function, label: str) -> list[str]:
    """Return what a public function's docstring lacks."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    if any(decorator.endswith(UNCHECKED_DECORATORS) for decorator in decorators):
        return []
    text = ast.get_docstring(function)
    if not text:
        return [f"{function.lineno}: {label} has no docstring"]
    tensors = tensor_arguments(function)
    if tensors and not SHAPE_IN_TEXT.search(text) and not all(SHAPE_IN_NAME.search(name) for name in tensors):
        return [
            f"{function.lineno}: {label} takes tensors ({', '.join(tensors)}) and says no shape, e.g. [B, T]"
        ]
    return []


def config_errors(node: ast.ClassDef) -> list[str]:
    """Return the fields of a configuration dataclass that have no docstring under them."""
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    if not is_dataclass or not node.name.endswith("Config"):
        return []
    errors = []
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or "ClassVar" in ast.unparse(statement.annotation):
            continue
        documented = (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        )
        if not documented:
            name = ast.unparse(statement.target)
            errors.append(f"{statement.lineno}: {node.name}.{name} has no docstring under it")
    return errors


def body_errors(body: list[ast.stmt], prefix: str) -> list[str]:
    """Return what the public classes and functions of a module or class lack."""
    errors: list[str] = []
    for node in body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        label = f"{prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            if not ast.get_docstring(node):
                errors.append(f"{node.lineno}: class {label} has no docstring")
            errors += config_errors(node) + body_errors(node.body, f"{label}.")
        else:
            errors += function_errors(node, label)
    return errors


def check(root: Path, packages: tuple[str, ...] = PACKAGES) -> tuple[list[str], Figures]:
    """Return every violation in the packages under ``root``, and the figures over all of them."""
    errors: list[str] = []
    figures = Figures()
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        try:
            tree = ast.parse(source, filename=str(path))
        except SyntaxError as error:
            errors.append(f"{path}:{error.lineno}: {error.msg}")
            continue
        count(tree, figures)
        lines = sum(1 for line in source.splitlines() if line.strip())
        figures.largest_file = max(figures.largest_file, lines)
        # Packages may keep an empty __init__.py; private modules (_x.py) owe no docstring.
        if source.strip() and not ast.get_docstring(tree) and not re.match(r"_(?!_)", path.name):
            errors.append(f"{path}:1: module has no docstring")
        errors += [f"{path}:{error}" for error in body_errors(tree.body, "")]
    for name, value, direction, goal in figures.rows():
        if not (value >= goal if direction == ">=" else value <= goal):
            errors.append(f"figure below its goal: {name} is {value:.0f}, goal {direction} {goal:.0f}")
    return errors, figures


def main(arguments: list[str]) -> int:
    """Print violations and figures and return 1 if there is a violation."""
    errors, figures = check(Path(arguments[0]) if arguments else Path(), tuple(arguments[1:]) or PACKAGES)
    for error in errors:
        print(error)
    for name, value, direction, goal in figures.rows():
        print(f"    {name:34} {value:5.0f}   goal {direction} {goal:.0f}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
