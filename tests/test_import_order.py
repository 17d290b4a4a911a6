"""Imports go down only: docs/architecture.md, "Import order"."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys

import pytest

from tests.package_files import CHECKOUT, PACKAGE, SourceFile, imported_modules, read_files

# top to bottom; rooms on one line never import each other, but for the ground floor: config is three files
FLOORS = (
    ("__main__",),
    ("cli", "command_help"),
    ("commands",),
    ("server",),
    ("training", "inference"),
    ("adapters", "quantization"),
    ("models",),
    ("data", "weights", "kernels"),
    ("text", "safety"),
    ("config", "device"),
    ("flags",),
    ("yaml_reader",),
    ("errors", "home"),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "alpaca_lora" and len(parts) > 1 else None


def wrong_imports(files: list[SourceFile]) -> list[str]:
    wrong = []
    for file in files:
        room = room_of(file.module)
        if room is None:
            continue  # the package itself hands out names of any room, lazily
        for module, line in imported_modules(file.tree):
            other = room_of(module)
            if module.startswith("."):
                wrong.append(f"{file.name}:{line}: relative import {module}")
            elif other in LEVEL and other != room and LEVEL[other] <= LEVEL[room]:
                wrong.append(f"{file.name}:{line}: {room} imports {other}")
    return wrong


def test_every_room_has_its_floor() -> None:
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.stem != "__init__"}
    rooms -= {"__pycache__", "py"}
    assert {room for room in rooms if not room.startswith(("py.", "."))} == set(LEVEL)


def test_imports_go_down_only() -> None:
    assert wrong_imports(read_files("alpaca_lora")) == []


def test_the_test_sees_an_upward_import() -> None:
    text = "from alpaca_lora.training.trainer import Trainer\nimport alpaca_lora.text.messages\n"
    file = SourceFile(PACKAGE / "models" / "load.py", text, ast.parse(text))
    assert set(wrong_imports([file])) == {"alpaca_lora/models/load.py:1: models imports training"}


def test_the_architecture_page_draws_the_same_order() -> None:
    page = (CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("## Import order", 1)[1].split("## ", 1)[0]
    drawn = [tuple(re.findall(r"\w+", line)) for line in section.splitlines() if line.startswith("    ")]
    levels = [[LEVEL[room] for room in line] for line in drawn]
    assert {room for line in drawn for room in line} == set(LEVEL) - {
        "__main__",
        "command_help",
        "flags",
        "yaml_reader",
    }
    assert all(max(upper) < min(lower) for upper, lower in itertools.pairwise(levels))


@pytest.mark.parametrize("module", ["alpaca_lora.cli", "alpaca_lora.config", "alpaca_lora.commands.schemas"])
def test_the_command_line_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]"
