"""Fails on any import that goes against the arrows of docs/architecture.md.

Reads the sources with ``ast`` and imports nothing. Beside the arrows: no circles between modules, no
file over 400 non-blank lines, no torch in ``data_pipeline`` but in its resizing, and in ``kernels`` nothing but torch,
triton and the standard library.

Usage: ``python tools/check_imports.py [ROOT] [PACKAGE ...]``
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("flamingo_dist", "kernels", "data_pipeline", "jobs")
MAX_LINES = 400

# Room -> rooms it may import beside itself. "flamingo_dist" alone stands for the modules that lie directly in
# that package (shared helpers): every part of the package may use them, so they may use none of the parts.
UPPER = ("parallel", "training", "inference", "evaluation", "planning")
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "data_pipeline": set(),
    "flamingo_dist": {"kernels"},
    "flamingo_dist.models": {"kernels", "flamingo_dist"},
    **{
        f"flamingo_dist.{part}": {"kernels", "flamingo_dist", "flamingo_dist.models"}
        | {f"flamingo_dist.{other}" for other in UPPER}
        for part in UPPER
    },
    "jobs": {"kernels", "data_pipeline", "flamingo_dist", "flamingo_dist.models"}
    | {f"flamingo_dist.{part}" for part in UPPER},
}
CLI = "flamingo_dist.cli"
KERNEL_LIBRARIES = {"torch", "triton"}
MAY_CALL_TORCH = {"data_pipeline.resize"}


@dataclass
class Module:
    """One source file: its dotted name and what it imports."""

    name: str
    path: Path
    lines: int
    imports: dict[str, int] = field(default_factory=dict)
    """Dotted name -> line of its first import. Of ``from a import b`` both ``a`` and ``a.b`` are noted."""
    broken: str = ""
    """Why the file does not parse, if it does not."""


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, name: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Yield every imported dotted name with its line, late imports and type-checking imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            yield base, node.lineno
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func)
            first = node.args[0]
            if function in ("importlib.import_module", "import_module", "__import__") and isinstance(
                first, ast.Constant
            ):
                yield str(first.value), node.lineno


def read_modules(root: Path, packages: tuple[str, ...]) -> dict[str, Module]:
    """Parse every source file of the packages."""
    modules: dict[str, Module] = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            name = module_name(path, root)
            module = Module(name, path, sum(1 for line in source.splitlines() if line.strip()))
            modules[name] = module
            try:
                tree = ast.parse(source, filename=str(path))
            except SyntaxError as error:
                module.broken = f"{path}:{error.lineno}: {error.msg}"
                continue
            for imported, line in imported_names(tree, name, path.name == "__init__.py"):
                module.imports.setdefault(imported, line)
    return modules


def room_of(name: str, modules: dict[str, Module]) -> str:
    """Return the room that a dotted name of ours belongs to."""
    parts = name.split(".")
    if parts[0] != "flamingo_dist" or len(parts) == 1:
        return parts[0]
    second = ".".join(parts[:2])
    if second in (CLI, "flamingo_dist.__main__") or second in ALLOWED:
        return second
    # A new part of flamingo_dist has to be entered in ALLOWED; a helper module or a name in __init__ has not.
    is_package = second in modules and modules[second].path.name == "__init__.py"
    return second if is_package else "flamingo_dist"


def arrow_errors(module: Module, modules: dict[str, Module], packages: tuple[str, ...]) -> list[str]:
    """Return one message for each import of this module that its room may not make."""
    room = room_of(module.name, modules)
    if room == CLI:
        return []
    if room not in ALLOWED and room != "flamingo_dist.__main__":
        return [f"{module.path}:1: room {room} has no entry in ALLOWED of tools/check_imports.py"]
    errors: dict[tuple[int, str], str] = {}  # one message for `from a import b`, though it names a and a.b
    allowed = {CLI, "flamingo_dist"} if room == "flamingo_dist.__main__" else ALLOWED[room]
    for imported, line in module.imports.items():
        top = imported.split(".")[0]
        target = room_of(imported, modules) if top in packages else top
        complaint = ""
        if top in packages and target != room and target not in allowed:
            complaint = f"{room} must not import {target} ({imported})"
        elif top == "tests":
            complaint = f"{room} must not import tests"
        elif room == "data_pipeline" and top == "torch" and module.name not in MAY_CALL_TORCH:
            complaint = "data_pipeline must not import torch but in its resizing: it hands out numpy arrays"
        elif room == "kernels" and top not in sys.stdlib_module_names | KERNEL_LIBRARIES | set(packages):
            complaint = f"kernels may import torch, triton and the standard library, not {top}"
        if complaint:
            errors.setdefault((line, target), f"{module.path}:{line}: {complaint}")
    return list(errors.values())


def circle_errors(modules: dict[str, Module]) -> list[str]:
    """Return one message for each circle of imports found by a depth-first walk."""
    graph = {
        name: [other for other in module.imports if other in modules and other != name]
        for name, module in modules.items()
    }
    done: set[str] = set()
    errors: list[str] = []

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            errors.append("circle: " + " -> ".join([*trail[trail.index(name) :], name]))
            return
        if name in done:
            return
        for other in graph[name]:
            walk(other, [*trail, name])
        done.add(name)

    for name in graph:
        walk(name, [])
    return errors


def check(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Return every violation in the packages under ``root``; an empty list means all is well."""
    modules = read_modules(root, packages)
    if not modules:
        return [f"{root}: no sources of {', '.join(packages)} found"]
    errors: list[str] = []
    for module in modules.values():
        if module.broken:
            errors.append(module.broken)
        errors += arrow_errors(module, modules, packages)
        if module.lines > MAX_LINES:
            errors.append(f"{module.path}: {module.lines} non-blank lines, at most {MAX_LINES}: split it")
    return errors + circle_errors(modules)


def main(arguments: list[str]) -> int:
    """Print every violation and return 1 if there is one."""
    root = Path(arguments[0]) if arguments else Path()
    packages = tuple(arguments[1:]) or PACKAGES
    errors = check(root, packages)
    for error in errors:
        print(error)
    if not errors:
        modules = read_modules(root, packages)
        largest = max(module.lines for module in modules.values())
        print(f"    {len(modules)} modules, largest {largest} lines, no wrong arrow, no circle")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
