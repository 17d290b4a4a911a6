"""The files of deploy/ as data, and what the code says of the same things."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from alpaca_lora.commands.schemas import ServeConfig
from alpaca_lora.config import resolve
from alpaca_lora.server.app import STOP_SECONDS
from alpaca_lora.server.listener import GOODBYE_SECONDS, GRACEFUL_SECONDS
from tests.package_files import CHECKOUT

DEPLOY = CHECKOUT / "deploy"
CONFIG = "/etc/alpaca-lora/serve.yml"  # in every container
# after drain_timeout: last events, open connections, the step that runs
ENDING_SECONDS = GOODBYE_SECONDS + GRACEFUL_SECONDS + STOP_SECONDS


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def yaml_files() -> list[Path]:
    return sorted(path for suffix in ("*.yml", "*.yaml") for path in DEPLOY.rglob(suffix))


def serve_config(words: Sequence[str], config: Path) -> ServeConfig:
    """What `serve` makes of its words in a container where ``config`` is mounted as `CONFIG`."""
    command, *flags = words
    assert command == "serve", words
    resolved = resolve(ServeConfig, [str(config) if word == CONFIG else word for word in flags], command)
    assert resolved.notices == (), resolved.notices
    return resolved.value


def changed(document: Any, path: Sequence[str | int], value: Any) -> Any:
    """A copy with another value at ``path``; `...` removes it."""
    result = copy.deepcopy(document)
    *parents, last = path
    place = result
    for step in parents:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return result


def tool(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A program of the development environment."""
    return subprocess.run(
        [str(Path(sys.executable).parent / name), *words], capture_output=True, text=True, timeout=120, cwd=CHECKOUT
    )


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(keyword, the rest of it in one line) of a Dockerfile, comments left out."""
    joined = ""
    for line in text.splitlines():
        if line.lstrip().startswith("#") or not line.strip():
            continue
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        keyword, _, rest = joined.partition(" ")
        yield keyword.upper(), rest.strip()
        joined = ""
