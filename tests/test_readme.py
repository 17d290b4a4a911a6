"""README.md, README.zh.md and docs say what is so: commands parse and run, links lead somewhere, tables are complete.

Commands run on a tiny model folder and a few rows in a copy of the checkout's layout; only `make` and `pull`, which
need a network, are looked at and not run.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from alpaca_lora import cli, errors
from alpaca_lora.commands.schemas import SCHEMAS
from alpaca_lora.config import resolve
from alpaca_lora.data.cleaning import RULE_NAMES
from alpaca_lora.data.formats import FIELD_PAIRS
from alpaca_lora.inference.options import GenerationOptions
from alpaca_lora.models.families import FAMILIES
from alpaca_lora.quantization.options import QuantizeOptions
from alpaca_lora.quantization.scheme import SCHEMES
from alpaca_lora.text.messages import instruction
from alpaca_lora.text.templates import INSTRUCTION_TEMPLATES, load_template
from alpaca_lora.training.identity import FREE_KEYS
from alpaca_lora.weights.huggingface import write_folder
from alpaca_lora.weights.packaged import ALIASES
from tests.deploy import shown_commands
from tests.package_files import CHECKOUT, PACKAGE, read_files
from tests.tiny import ByteTokenizer, tiny_model

PAGES = [CHECKOUT / "README.md", CHECKOUT / "README.zh.md", CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "CHANGELOG.md"]
PAGES += sorted((CHECKOUT / "docs").rglob("*.md"))
LANGUAGES = {"sh", "text", "yaml", "json", "python"}
ALIAS = "smollm2-135m"
DOORS = {"finetune.py": "finetune", "generate.py": "generate"}
SMALL = {"max_steps": "2", "batch_size": "4", "num_threads": "1", "dtype": "float32", "device": "cpu"}


@dataclass(frozen=True)
class Block:
    """A fenced block: ``page`` and ``line`` (1-based) of its fence, its language and its text."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One line of a ``sh`` block, as words; comments are gone."""

    where: str
    words: tuple[str, ...]

    @property
    def of_ours(self) -> list[str] | None:
        """The words after ``alpaca-lora``, None for other programs."""
        first, *rest = self.words
        if first == "alpaca-lora":
            return rest
        if first == "python" and rest[0] in DOORS:
            return [DOORS[rest[0]], *rest[1:]]
        return None


def blocks(path: Path) -> Iterator[Block]:
    opened: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif opened is None:
            opened, lines = (number, line[3:].strip()), []
        else:
            yield Block(path.relative_to(CHECKOUT).as_posix(), *opened, "\n".join(lines))
            opened = None
    assert opened is None, f"{path}: a block is not closed"


def commands(path: Path) -> list[Command]:
    return [
        Command(f"{block.page}:{number}", tuple(words))
        for block in blocks(path)
        if block.language == "sh"
        for number, line in enumerate(block.text.splitlines(), block.line + 1)
        if (words := shlex.split(line, comments=True))
    ]


ALL_COMMANDS = [command for page in PAGES for command in commands(page)]
OURS = {tuple(command.of_ours): command.where for command in ALL_COMMANDS if command.of_ours is not None}


def page(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


# ---- what can be seen without running


def test_each_block_says_its_language() -> None:
    wrong = [
        f"{b.page}:{b.line}: {b.language!r}" for path in PAGES for b in blocks(path) if b.language not in LANGUAGES
    ]
    assert wrong == []


def test_both_readmes_show_the_same_commands() -> None:
    english, chinese = (commands(CHECKOUT / name) for name in ("README.md", "README.zh.md"))
    assert [command.words for command in english] == [command.words for command in chinese]
    assert len(english) >= 10


def test_every_command_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    targets = set(re.findall(r"^([a-z]+):", page("Makefile"), re.MULTILINE))
    for command in ALL_COMMANDS:
        if command.of_ours is not None:
            judge(command.of_ours, command.where)
        elif command.words[0] == "make":
            assert set(command.words[1:]) <= targets, command
        elif command.words != (".", ".venv/bin/activate"):
            shown_commands.judge(command.words, command.where)


def judge(words: list[str], where: str) -> None:
    """The words are a command with keys that it has, values that fit, and files that are in the checkout."""
    if words[0] == "--help":
        return
    assert words[0] in cli.COMMANDS, where
    if "--help" in words:
        return
    value: Any = resolve(SCHEMAS[words[0]], words[1:], words[0]).value
    rows = [*getattr(value, "data_path", []), getattr(value, "calibration_data", None)]
    for path in filter(None, rows):
        assert path.startswith("../shared/") or (CHECKOUT / path).is_file(), f"{where}: {path}"


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(errors.ConfigError):
        judge(["finetune", "--base_model", ALIAS, "--data_path", "x.json", "--lora_rank", "8"], "here")
    with pytest.raises(AssertionError):
        judge(["export"], "here")


def test_links_lead_to_files() -> None:
    lost = []
    for path in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            file = target.partition("#")[0]
            if not target.startswith("http") and file and not (path.parent / file).exists():
                lost.append(f"{path.relative_to(CHECKOUT)}: {target}")
    assert lost == []


def test_programs_that_are_named_exist() -> None:
    for path in PAGES:
        for name in re.findall(r"`(?:python )?((?:benchmarks|examples|configs|tests)/[\w./]+\.\w+)`", path.read_text()):
            made_by_running = name.startswith("benchmarks/results/")
            assert made_by_running or (CHECKOUT / name).is_file(), f"{path}: {name}"


def tree_of(text: str) -> set[str]:
    """The files of the package that the tree in the README names; a room's line stands for its ``__init__.py``."""
    tree = text[text.index("\nalpaca_lora/\n") + 1 :].partition("```")[0]
    names, room = set(), ""
    for line in tree.splitlines()[1:]:
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        assert len(line.split()) > 1, f"{name}: nothing is said of it"
        if name.endswith("/"):
            room = name
            names.add(f"{room}__init__.py")
        else:
            names.add(name if indent == 2 else room + name)
    return names


def test_the_tree_names_every_file_and_no_other() -> None:
    files = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert tree_of(page("README.md")) == files


# ---- tables that must be complete


def listed(text: str) -> set[str]:
    """What stands in backticks in the first column of tables."""
    first = re.findall(r"^\| (`[^|]+?) \|", text, re.MULTILINE)
    return {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}


def test_tables_are_complete() -> None:
    data, text, models = page("docs/data.md"), page("docs/text.md"), page("docs/models.md")
    assert set(RULE_NAMES) == listed(data) - {"over_length", "truncate", "drop", "error"}
    assert {"/".join(pair) for pair in FIELD_PAIRS} - {"instruction/output", "prompt/completion"} <= set(
        re.findall(r"\w+/\w+", data)
    )
    assert listed(text) == {*INSTRUCTION_TEMPLATES, "chat"}
    assert listed(models) >= {*ALIASES, *FAMILIES}
    for alias, model in ALIASES.items():
        assert f"| `{alias}` |" in models and f"| {model.num_bytes / 1e6:.0f} MB |" in models
    quantization = listed(page("docs/quantization.md"))
    assert quantization == {*SCHEMES, *get_args(QuantizeOptions.model_fields["rounding"].annotation)}
    told = page("docs/quantization.md") + page("docs/adapters.md")
    shards = {"max_shard_gb"}  # as of merge
    assert [key for key in QuantizeOptions.model_fields if f"{key}" not in told and key not in shards] == []
    asked = set(GenerationOptions.model_fields) - {"lora_weights", "prompt", "input"}
    assert asked <= listed(page("docs/generate.md"))


def test_the_keys_that_may_change_on_resume() -> None:
    paragraph = page("docs/training.md").partition("may differ")[2].partition("The last")[0].partition(":")[2]
    assert sorted(paragraph.split()) == sorted(FREE_KEYS)


def test_exit_codes() -> None:
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    for name in ("README.md", "README.zh.md"):
        shown = {
            int(code)
            for row in re.findall(r"^\| ([\d, 、]+) \|", page(name), re.MULTILINE)
            for code in re.findall(r"\d+", row)
        }
        assert shown == codes | {0, 130, 143}


def test_every_letter_of_a_shape_is_explained() -> None:
    explained = {row[0] for row in re.findall(r"^\| (\w) \|", page("docs/shapes.md"), re.MULTILINE)}
    suffix = re.compile(r"\b[a-z][a-z0-9]*(?:_[a-z0-9]+)*_([A-Z1]*[A-Z][A-Z1]*)\b")
    ours = {m for file in read_files("alpaca_lora") for m in suffix.findall(file.text)} - {"A", "B"}
    assert {letter for shape in ours for letter in shape} <= explained


# ---- what is run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like the checkout, whose alias is a tiny model folder and whose Alpaca rows are thirty."""
    root = tmp_path_factory.mktemp("world")
    place = root / "checkout"
    place.mkdir()
    model, tokenizer = tiny_model(), ByteTokenizer(add_bos=False)
    config = model.config.to_hf()
    write_folder(place / ALIAS, model.named_parameters(), config, tokenizer_saver=tokenizer.save)
    shutil.copytree(CHECKOUT / "configs", place / "configs")
    rows = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i * i}."} for i in range(30)]
    for name in ("../shared/data/alpaca_data.json", "examples/shop/shop_train.json"):
        (place / name).parent.mkdir(parents=True)
        (place / name).write_text(json.dumps(rows))
    (root / "shared/data/sst2").mkdir()
    for name, count in (("train", 24), ("dev", 8)):
        lines = [f"{'good' if i % 2 else 'bad'} film {name} {i}\t{i % 2}\n" for i in range(count)]
        (root / f"shared/data/sst2/{name}.tsv").write_text("".join(lines))
    for name in ("docs/text.md", "docs/quantization.md"):
        for block in blocks(CHECKOUT / name):
            if block.language == "yaml":
                (place / block.text.split()[1]).write_text(block.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPACA_LORA_HOME", str(root / "home"))
        patch.chdir(place)
        yield place


def small(words: list[str]) -> list[str]:
    """The command with few steps and rows, on this processor."""
    known = SCHEMAS[words[0]].model_fields
    result = list(words)
    extra = {**SMALL, "num_sample_answers": "1", "max_new_tokens": "4"}
    for key, value in extra.items():
        flag = f"--{key}"
        if flag in result:
            result[result.index(flag) + 1] = value
        elif key in known and not (key == "num_sample_answers" and "configs/classify.yml" in words):
            result += [flag, value]
    return result


def execute(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as a reader would who begins with it, or goes on with what the command before it made."""
    if "--help" in words:
        assert cli.main(words) == 0
        return
    monkeypatch.setattr(sys, "stdin", io.StringIO("When do you open?\n"))
    if words[0] in ("finetune", "merge", "combine", "quantize"):
        value: Any = resolve(SCHEMAS[words[0]], words[1:], words[0]).value
        shutil.rmtree(value.output_dir, ignore_errors=True)
    if "--resume_from_checkpoint" in words:
        at = words.index("--resume_from_checkpoint")
        assert cli.main(small(words[:at] + words[at + 2 :])) == 0
    assert cli.main(small(words)) == 0


@pytest.mark.slow
def test_the_commands_run(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, where in OURS.items():
        if words[0] in ("pull", "serve"):  # a network, no end: tests/commands/test_pull.py and test_serve.py run them
            continue
        try:
            execute(list(words), monkeypatch)
        except AssertionError as error:
            raise AssertionError(f"{where}: {' '.join(words)}\n{capsys.readouterr().err[-2000:]}") from error
    assert (world / "lora-alpaca/adapter_model.safetensors").is_file()
    assert (world / "runs/shop-merged/config.json").is_file()
    run_python()


def run_python() -> None:
    """The Python of the pages, on what the commands left."""
    found = [block for path in PAGES for block in blocks(path) if block.language == "python"]
    assert len(found) >= 2
    for block in found:
        code = block.text.replace("path/of/the/base", ALIAS)
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{block.page}:{block.line}: {done.stderr}"


@pytest.mark.parametrize("door", DOORS)
def test_the_doors_open(door: str) -> None:
    done = subprocess.run([sys.executable, door, "--help"], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"alpaca-lora {DOORS[door]}" in done.stdout


def test_the_errors_of_the_readme_are_real(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yml").write_text(f"base_model: {ALIAS}\ndata_path: rows.jsonl\nlora_rank: 8\n")
    good = json.dumps({"instruction": "Say 3", "output": "three"})
    Path("rows.jsonl").write_text("\n".join([good] * 16 + ['{"instruction": "Say 3", "output": 3}']))
    assert cli.main(["finetune", "--config", "c.yml"]) == 2
    assert cli.main(small(["finetune", "--base_model", ALIAS, "--data_path", "rows.jsonl", "--output_dir", "o"])) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for name in ("README.md", "README.zh.md"):
        shown = next(b.text for b in blocks(CHECKOUT / name) if b.language == "text" and b.text.startswith("error:"))
        assert shown.splitlines() == said


def test_the_template_of_the_page_renders_as_shown(world: Path) -> None:
    template = load_template("question.yml", ByteTokenizer())
    row = instruction("Is it open?", "the shop", "Yes.")
    shown = [block.text for block in blocks(CHECKOUT / "docs/text.md") if block.language == "text"]
    assert template.render(row).text in shown


def test_what_a_run_leaves_is_what_the_readme_says(world: Path) -> None:
    words = ["finetune", "--base_model", ALIAS, "--data_path", "examples/shop/shop_train.json", "--output_dir", "left"]
    assert cli.main(small(words)) == 0
    left = {re.sub(r"-\d+$", "-N/", path.name) for path in Path("left").iterdir()}
    for name in ("README.md", "README.zh.md"):
        assert left <= listed(page(name))
