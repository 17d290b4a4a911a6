"""The command table, the global flags and the exit codes. A command's room is imported only when it runs.

Exit codes: 0 done, 2 user error, 3 data, 4 environment, 5 numerical, 130/143 stopped by a signal; 1 is our defect.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from alpaca_lora import __version__
from alpaca_lora.errors import AlpacaLoraError, UserError, nearest

COMMANDS = {
    "finetune": "fine-tune a base model on a data file; the reference recipe is configs/finetune.yml",
    "check": "everything finetune does before its first step, and two probe steps; trains nothing",
    "generate": "answer a prompt, or chat in the terminal, with a base model and an adapter",
    "serve": "answer over HTTP, in the shapes of OpenAI's API, with many adapters at once, and a page to talk to them",
    "merge": "fold an adapter into its base model and write a Hugging Face folder",
    "combine": "make one LoRA adapter of several that were trained on the same base model",
    "quantize": "write a base model with its weights in fewer bits, as a folder that every command takes",
    "pull": "fetch a model into the cache",
}
SIGPIPE_EXIT = 141
# How often a thread looks for its peers before it sleeps. OpenMP's default is milliseconds of busy waiting at each of
# thousands of products: beside two busy programs on two cores a step took 22 s, with this 4 s; alone both take 1.4 s.
SPIN_COUNT = "10000"
INTERRUPT_EXIT = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code; nothing is raised but defects."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read once, when torch is imported
    debug, as_json = _take(words, "--debug"), _take(words, "--json")
    try:
        code = _run(words, as_json)
        sys.stdout.flush()
    except AlpacaLoraError as error:
        code = _report(error, as_json=as_json, debug=debug)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        code = _report_interrupt(as_json)
    except BrokenPipeError:
        # the reader of our output went away; python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = SIGPIPE_EXIT
    except Exception as error:
        if as_json:
            _print_json({"error": {"type": type(error).__name__, "message": str(error)}, "exit_code": 1})
        raise
    return code


def _run(words: list[str], as_json: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(), end="")
        return 0
    if words[0] == "--version":
        print(f"alpaca-lora {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS)
        fix = f"did you mean {hint[0]!r}?" if hint else "`alpaca-lora --help` lists them"
        raise UserError(f"unknown command {command!r}", expected=f"one of {', '.join(COMMANDS)}", fix=fix)
    schema = importlib.import_module("alpaca_lora.commands.schemas").SCHEMAS[command]
    if "-h" in rest or "--help" in rest:
        page = importlib.import_module("alpaca_lora.command_help").command_help(schema, command, COMMANDS[command])
        print(page, end="")
        return 0
    # the configuration is judged before torch is imported: its errors come at once
    resolved = importlib.import_module("alpaca_lora.config").resolve(schema, rest, command)
    console = importlib.import_module("rich.console").Console(stderr=True)
    run = importlib.import_module(f"alpaca_lora.commands.{command}").run
    try:
        result: dict[str, Any] = run(resolved.value, resolved=resolved, console=console)
    except AlpacaLoraError as error:
        # a room knows the key that is at fault, not where the user wrote it
        raise importlib.import_module("alpaca_lora.config").located(error, resolved.origins) from error
    if as_json:
        _print_json(result)
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: alpaca-lora COMMAND [--config FILE.yml] [--key value ...]\n\n"
        f"{rows}\n\n"
        "  alpaca-lora COMMAND --help   its keys, with types and defaults\n"
        "  --json                       one JSON object as the last line of standard output\n"
        "  --debug                      show tracebacks of errors\n"
        "  --version\n"
    )


def _take(words: list[str], flag: str) -> bool:
    """Remove every `flag` from `words`; True if there was one."""
    found = flag in words
    words[:] = [word for word in words if word != flag]
    return found


def _report(error: AlpacaLoraError, *, as_json: bool, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    sys.stdout.flush()
    print(f"error: {error}" if error.exit_code < 128 else str(error), file=sys.stderr)
    if as_json:
        details = {"type": type(error).__name__, "message": str(error)}
        known = {name: getattr(error, name) for name in ("file", "line", "field", "expected", "fix")}
        known = {name: value if isinstance(value, int) else str(value) for name, value in known.items() if value}
        _print_json({"error": details | known, "exit_code": error.exit_code})
    return error.exit_code


def _report_interrupt(as_json: bool) -> int:
    print("interrupted", file=sys.stderr)
    if as_json:
        details = {"type": "KeyboardInterrupt", "message": "interrupted"}
        _print_json({"error": details, "exit_code": INTERRUPT_EXIT})
    return INTERRUPT_EXIT


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False, allow_nan=False), flush=True)
