"""The package's source files as syntax trees, for the tests that hold the rules of the house."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = CHECKOUT / "alpaca_lora"


@dataclass(frozen=True)
class SourceFile:
    """One python file. ``name``: its path below the checkout; ``module``: its dotted name, without ``__init__``."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.path.relative_to(CHECKOUT).as_posix()

    @property
    def module(self) -> str:
        parts = self.path.relative_to(CHECKOUT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_files(*folders: str) -> list[SourceFile]:
    """Every python file below the named folders of the checkout."""
    paths = sorted(path for folder in folders for path in (CHECKOUT / folder).rglob("*.py"))
    texts = [(path, path.read_text(encoding="utf-8")) for path in paths]
    return [SourceFile(path, text, ast.parse(text, str(path))) for path, text in texts]


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of each import below `tree`; ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""
