"""The command table, help without torch, and one message and exit code for each way to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alpaca_lora import __version__, cli
from alpaca_lora.commands.schemas import SCHEMAS
from alpaca_lora.errors import (
    AdapterError,
    AlpacaLoraError,
    DataError,
    MachineError,
    ModelFileError,
    NumericalError,
    Stopped,
)
from tests.package_files import CHECKOUT

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def _run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return _run


@pytest.fixture
def pull(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], None]:
    """Put a function in the place of what ``alpaca-lora pull`` does."""

    def _set(does: Callable[[Any], Any]) -> None:
        def run(config: Any, *, resolved: Any, console: Any) -> Any:
            console.print("a word for people")
            return does(config)

        monkeypatch.setattr("alpaca_lora.commands.pull.run", run)

    return _set


def raises(error: BaseException) -> Callable[[Any], Any]:
    def _raise(config: Any) -> Any:
        raise error

    return _raise


def spawn(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_the_overview_names_every_command(run: Run, argv: tuple[str, ...]) -> None:
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert all(f"\n  {command} " in out for command in cli.COMMANDS)


def test_the_overview_imports_nothing_it_does_not_need() -> None:
    code = (
        "import sys; from alpaca_lora.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'pydantic', 'yaml', 'rich', 'numpy') if m in sys.modules])"
    )
    assert spawn("-c", code, cwd=CHECKOUT).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_a_commands_help_shows_every_key(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    for key, field in SCHEMAS[command].model_fields.items():
        assert f"\n  --{key}  " in out
        assert (field.description or "?").split()[0] in out


def test_a_commands_help_does_not_import_torch() -> None:
    code = "import sys; from alpaca_lora.cli import main; main(['finetune', '--help']); print('torch' in sys.modules)"
    assert spawn("-c", code, cwd=CHECKOUT).stdout.splitlines()[-1] == "False"


def test_help_names_type_default_and_room(run: Run) -> None:
    out = run("finetune", "--help")[1]
    assert "\nadapter:\n" in out
    assert "  --lora_r  an integer >= 1 and <= 16384\n" in out
    assert "(default: q_proj,v_proj)" in " ".join(out.split())
    assert "(required)" in out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"alpaca-lora {__version__}\n", "")


def test_an_unknown_command_names_the_nearest(run: Run) -> None:
    code, out, err = run("finetuen")
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown command 'finetuen', expected one of finetune, check")
    assert err.endswith("did you mean 'finetune'?\n")


def test_a_configuration_error_comes_before_torch_and_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "bad.yml"
    path.write_text("base_model: m\nlora_rank: 8\n")
    code = (
        "import sys; from alpaca_lora.cli import main;"
        f"code = main(['finetune', '--config', {str(path)!r}, '--data_path', 'x']);"
        "print('torch' in sys.modules, code)"
    )
    done = spawn("-c", code, cwd=CHECKOUT)
    assert done.stdout == "False 2\n"
    assert done.stderr == f"error: {path}:2: lora_rank: unknown key of finetune, did you mean 'lora_r'?\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterError("x"), 2),
        (DataError("x"), 3),
        (ModelFileError("x"), 3),
        (MachineError("x"), 4),
        (NumericalError("x"), 5),
        (Stopped(2, "x"), 130),
        (Stopped(15, "x"), 143),
    ],
)
def test_each_error_has_one_message_and_its_exit_code(run: Run, pull, error: AlpacaLoraError, code: int) -> None:
    pull(raises(error))
    found, out, err = run("pull", "name")
    assert found == code
    assert out == ""
    assert err.splitlines()[1:] == ["x" if code >= 128 else "error: x"]


def test_errors_as_json(run: Run, pull) -> None:
    pull(raises(DataError("not JSON", file="d.jsonl", line=7, field="output", expected="text", fix="quote it")))
    code, out, err = run("--json", "pull")
    assert "error: d.jsonl:7: output: not JSON, expected text, quote it" in err
    assert json.loads(out.splitlines()[-1]) == {
        "error": {
            "type": "DataError",
            "message": "d.jsonl:7: output: not JSON, expected text, quote it",
            "file": "d.jsonl",
            "line": 7,
            "field": "output",
            "expected": "text",
            "fix": "quote it",
        },
        "exit_code": code,
    }


def test_the_result_is_the_last_line_with_json_and_nothing_without(run: Run, pull) -> None:
    pull(lambda config: {"name": config.name, "text": "你好"})
    assert run("pull", "a/b", "--json") == (0, '{"name": "a/b", "text": "你好"}\n', "a word for people\n")
    assert run("pull", "a/b") == (0, "", "a word for people\n")


def test_debug_shows_the_traceback(run: Run, pull) -> None:
    pull(raises(DataError("x")))
    assert "Traceback" in run("pull", "--debug")[2]
    assert "Traceback" not in run("pull")[2]


def test_an_interrupt(run: Run, pull) -> None:
    pull(raises(KeyboardInterrupt()))
    code, out, err = run("pull", "--json")
    assert code == 130
    assert err.splitlines()[-1] == "interrupted"
    assert json.loads(out)["exit_code"] == 130


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str], pull) -> None:
    pull(raises(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["pull", "--json"])
    assert json.loads(capsys.readouterr().out)["exit_code"] == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "alpaca_lora", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=CHECKOUT
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # long before python has started
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (141, b"")


@pytest.mark.parametrize(
    ("door", "command"), [(["finetune.py"], "finetune"), (["generate.py"], "generate"), (["-m", "alpaca_lora"], None)]
)
def test_the_doors_lead_to_the_commands(door: list[str], command: str | None) -> None:
    done = spawn(*door, "--help", cwd=CHECKOUT)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: alpaca-lora {command or 'COMMAND'} ")


def test_a_door_opens_from_another_folder(tmp_path: Path) -> None:
    done = spawn(str(CHECKOUT / "finetune.py"), cwd=tmp_path)
    assert (done.returncode, done.stderr.count("missing")) == (2, 2)
