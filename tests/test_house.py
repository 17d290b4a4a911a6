"""The rules of the house that a machine can hold: sizes, names, state, imports, and no option that nobody reads."""

from __future__ import annotations

import ast
import re

import pytest

from alpaca_lora.commands.schemas import SCHEMAS
from tests.package_files import CHECKOUT, SourceFile, dotted, imported_modules, read_files

MAX_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_NAMES = {"utils", "util", "common", "misc", "helpers", "helper", "legacy", "base2"}
ORACLES = {"transformers", "peft", "accelerate", "datasets", "bitsandbytes", "psutil", "hypothesis", "pytest"}
OPTIONAL = {
    "llguidance",
    "huggingface_hub",
    "wandb",
    "tensorboard",
    "torch.utils.tensorboard",
    "matplotlib",
    "resource",
    "zstandard",
}
MUTATORS = {"append", "add", "update", "pop", "popitem", "clear", "extend", "insert", "remove", "discard", "setdefault"}
HARDWARE = re.compile(
    r"torch\.(cuda|mps|backends\.(mps|cuda|cpu))\b|torch\.set_num_threads|os\.(cpu_count|sched_getaffinity)|psutil\."
)
PICKLES = re.compile(
    r"(torch|joblib|dill|pickle|cloudpickle|marshal|shelve)\.(load|loads|save|dump|dumps|open)|eval|exec"
)

package = read_files("alpaca_lora")
programs = package + read_files("benchmarks", "examples")
everything = programs + read_files("tests")


def calls(file: SourceFile) -> list[tuple[str, int]]:
    return [(dotted(node.func), node.lineno) for node in ast.walk(file.tree) if isinstance(node, ast.Call)]


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_files_are_short() -> None:
    sizes = {file.name: file.text.count("\n") for file in everything}
    assert {name: size for name, size in sizes.items() if size > MAX_LINES} == {}


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{file.name}:{node.lineno}: {node.name} has {size} lines"
        for file in programs
        for node in functions(file.tree)
        if (size := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_no_file_is_named_after_nothing() -> None:
    assert [file.name for file in everything if FORBIDDEN_NAMES & set(re.split(r"[/_.]", file.name))] == []


def test_each_module_says_what_it_is() -> None:
    assert [file.name for file in programs if not ast.get_docstring(file.tree)] == []


def state_problems(file: SourceFile) -> list[str]:
    """Module-level containers that are not constants, constants that are changed, and ``global``."""
    problems = [f"{file.name}:{n.lineno}: global" for n in ast.walk(file.tree) if isinstance(n, ast.Global)]
    containers = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    constants = set()
    for node in file.tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for name in (target.id for target in targets if isinstance(target, ast.Name)):
            if name.strip("_").isupper() or name == "__all__":
                constants.add(name)
            elif isinstance(node.value, containers):  # type: ignore[union-attr]
                problems.append(f"{file.name}:{node.lineno}: {name} is a container that may change")
    for node in ast.walk(file.tree):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Store | ast.Del)
            and dotted(node.value) in constants
        ):
            problems.append(f"{file.name}:{node.lineno}: {dotted(node.value)} is changed")
        owner, _, method = dotted(node.func).rpartition(".") if isinstance(node, ast.Call) else ("", "", "")
        if method in MUTATORS and owner in constants:
            problems.append(f"{file.name}:{node.lineno}: {owner} is changed")
    return problems


def test_no_module_keeps_state() -> None:
    assert [problem for file in package for problem in state_problems(file)] == []


@pytest.mark.parametrize(
    "text", ["seen = []", "CACHE = {}\ndef f(): CACHE[1] = 2", "A = []\nA.append(1)", "def f():\n global x"]
)
def test_the_test_sees_state(text: str) -> None:
    assert state_problems(SourceFile(CHECKOUT / "x.py", text, ast.parse(text)))


def test_only_the_device_room_asks_for_hardware() -> None:
    asked = [
        f"{file.name}:{node.lineno}: {dotted(node)}"
        for file in package
        if file.module != "alpaca_lora.device"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Attribute) and HARDWARE.match(dotted(node))
    ]
    assert asked == []


def test_nothing_is_pickled_and_nothing_is_evaluated() -> None:
    found = [f"{file.name}:{line}: {name}" for file in package for name, line in calls(file) if PICKLES.fullmatch(name)]
    assert found == []
    assert [
        file.name for file in package for module, _ in imported_modules(file.tree) if module in ("pickle", "dill")
    ] == []


def test_the_oracles_are_never_imported() -> None:
    found = [
        f"{file.name}:{line}: {module}"
        for file in package
        for module, line in imported_modules(file.tree)
        if module.split(".")[0] in ORACLES
    ]
    assert found == []


def test_imports_stand_at_the_top_but_for_optional_packages() -> None:
    inner = [
        f"{file.name}:{line}: {module}"
        for file in package
        for function in functions(file.tree)
        for module, line in imported_modules(function)
        if not any(module == name or module.startswith(f"{name}.") for name in OPTIONAL)
    ]
    assert inner == []


def test_every_option_has_a_reader_and_a_description() -> None:
    readers = [file for file in package if file.path.name not in ("options.py", "schemas.py")]
    read = {node.attr for file in readers for node in ast.walk(file.tree) if isinstance(node, ast.Attribute)}
    fields = {key: field for schema in SCHEMAS.values() for key, field in schema.model_fields.items()}
    assert sorted(key for key in fields if key not in read) == []
    assert sorted(key for key, field in fields.items() if not field.description) == []
