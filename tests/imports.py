"""Imports of every source file, read from its syntax tree without running it."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# folder -> name it is imported by
PACKAGES = {"fastscore": "fastscore", "kernels": "fastscore_kernels"}


@dataclass(frozen=True)
class Import:
    """One imported module: ``lazy`` inside a function, ``typing`` under ``if TYPE_CHECKING``."""

    importer: str
    target: str
    lazy: bool
    typing: bool
    line: int

    @property
    def root(self) -> str:
        return self.target.partition(".")[0]

    @property
    def ours(self) -> bool:
        return self.root in PACKAGES.values()


def module_name(path: Path, root: Path = ROOT) -> str:
    """Dotted name of a source file under one of the package folders."""
    folder, *rest = path.relative_to(root).with_suffix("").parts
    parts = [PACKAGES[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the packages by dotted name."""
    paths = [p for folder in PACKAGES for p in sorted((root / folder).rglob("*.py"))]
    return {module_name(p, root): p for p in paths}


def imports_of(path: Path, name: str, modules: set[str]) -> list[Import]:
    """Imports of one file except those of the standard library, relative ones made absolute.

    ``from package import module`` counts as an import of the module where ``modules`` has it.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node, lazy, typing in _imports(ast.parse(path.read_text(), str(path)).body, False, False):
        for target in _targets(node, package, modules):
            if target.partition(".")[0] not in sys.stdlib_module_names:
                found.append(Import(name, target, lazy, typing, node.lineno))
    return found


def all_imports() -> list[Import]:
    """Imports of all modules of both packages."""
    files = source_files()
    return [i for name, path in files.items() for i in imports_of(path, name, set(files))]


def _imports(
    body: list[ast.stmt], lazy: bool, typing: bool
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, lazy, typing
            continue
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                children = [child for child in value if isinstance(child, ast.AST)]
                yield from _imports(children, inside, typing or (checking and field == "body"))


def _targets(node: ast.Import | ast.ImportFrom, package: str, modules: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
    named = [f"{base}.{alias.name}" for alias in node.names]
    return sorted({name if name in modules else base for name in named})
