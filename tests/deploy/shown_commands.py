"""Commands of other programs that README and docs show: their words fit the files of deploy/, options of ours parse.

Only what the pages use is known; a command that is not, or names what is not there, is an AssertionError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from alpaca_lora import __version__, cli
from alpaca_lora.commands.schemas import SCHEMAS
from alpaca_lora.config import resolve
from alpaca_lora.server.keys import KEYS_VARIABLE
from tests.deploy.deploy_files import CONFIG, DEPLOY, documents, instructions, serve_config
from tests.package_files import CHECKOUT

IMAGES = (f"alpaca-lora:{__version__}", f"alpaca-lora:{__version__}-cuda")
MOUNTS = ("/var/cache/alpaca-lora", "/srv/adapters", "/srv/models")
SECRETS = "deploy/secrets/"
WITH_VALUE = {
    "-p", "-e", "-v", "-f", "-t", "-n", "-k", "--build-arg", "--stop-timeout", "--tmpfs", "--cap-drop", "--profile",
    "--security-opt", "--gpus", "--entrypoint",
}  # fmt: skip


def judge(words: Sequence[str], where: str) -> None:
    """ConfigError for a wrong option of ours, AssertionError for anything else."""
    program, *rest = words
    assert program in PROGRAMS, f"{where}: {program} is neither ours nor known"
    PROGRAMS[program](rest, where)


def split(words: Sequence[str], stop: int) -> tuple[dict[str, list[str]], list[str]]:
    """(options with their values, other words); from the word number ``stop`` on that is no option all is other."""
    options: dict[str, list[str]] = {}
    rest: list[str] = []
    queue = list(words)
    while queue and len(rest) < stop:
        word = queue.pop(0)
        if not word.startswith("-"):
            rest.append(word)
            continue
        name, equals, value = word.partition("=")
        options.setdefault(name, []).append(value if equals else queue.pop(0) if name in WITH_VALUE else "")
    return options, rest + queue


def _docker(words: Sequence[str], where: str) -> None:
    kind, *rest = words
    {"build": _build, "run": _run, "compose": _compose}[kind](rest, where)


def _build(words: Sequence[str], where: str) -> None:
    options, rest = split(words, 99)
    assert rest == ["."] and set(options) <= {"-f", "-t", "--build-arg"}, where
    (file,), (tag,) = options["-f"], options["-t"]
    known = {rest.split("=")[0] for keyword, rest in instructions((CHECKOUT / file).read_text()) if keyword == "ARG"}
    arguments = dict(word.split("=") for word in options.get("--build-arg", []))
    assert tag in IMAGES and set(arguments) <= known, where
    assert tag.endswith("-cuda") == (arguments.get("VARIANT", "cpu") != "cpu"), where


def _run(words: Sequence[str], where: str) -> None:
    options, (image, *command) = split(words, 1)
    known = {"--rm", "-d", "--read-only", "-p", "-e", "-v", "--stop-timeout", "--tmpfs", "--cap-drop"}
    assert set(options) <= known | {"--security-opt", "--gpus", "--entrypoint"}, where
    assert image in IMAGES and ("--gpus" in options) == image.endswith("-cuda"), where
    assert all(port.startswith("127.0.0.1:") and port.endswith(":8000") for port in options.get("-p", [])), where
    assert set(options.get("-e", [])) <= {KEYS_VARIABLE}, where
    for volume in options.get("-v", []):
        target = volume.split(":")[1]
        assert target in MOUNTS and volume.endswith(":ro") == (target != MOUNTS[0]), where
    if options.get("--entrypoint") == ["python"]:
        compile(command[-1], where, "exec")
    elif command:
        serve_config(command, DEPLOY / "serve.yml")
    if "--entrypoint" not in options:
        config = serve_config(["serve", "--config", CONFIG], DEPLOY / "serve.yml")
        assert int(options["--stop-timeout"][0]) >= config.drain_timeout + 15, where


def _compose(words: Sequence[str], where: str) -> None:
    options, (verb, *rest) = split(words, 1)
    (file,) = options["-f"]
    services = documents(CHECKOUT / file)[0]["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
    flags, names = split(rest, 99)
    assert set(options) <= {"-f", "--profile"} and set(options.get("--profile", [])) <= profiles, where
    assert verb in ("up", "down", "logs") and set(flags) <= {"-d", "--build"} and set(names) <= set(services), where


def _kubectl(words: Sequence[str], where: str) -> None:
    options, (verb, *rest) = split(words, 1)
    assert options in ({}, {"-n": ["alpaca-lora"]}), where
    assert (options != {}) == (verb != "apply" or "files-pod" in str(rest) or "monitor" in str(rest)), where
    folder = DEPLOY / "kubernetes"
    names = {
        f"{one['kind'].lower()}/{one['metadata']['name']}" for path in folder.glob("*.yml")
        if path.name != "serve.yml" for one in documents(path)
    }  # fmt: skip
    flags, other = split(rest, 99)
    if verb == "apply":
        assert other == [] and set(flags) <= {"-f", "-k"}, where
        for path in flags.get("-f", []):
            assert (CHECKOUT / path).is_file(), f"{where}: {path}"
        assert [p for p in flags.get("-k", []) if not (CHECKOUT / p / "kustomization.yaml").is_file()] == [], where
    elif verb == "create":
        assert other == ["secret", "generic", "alpaca-lora-keys"], where
        keys = {PurePosixPath(path).name for path in flags["--from-file"]}
        assert keys == set(documents(folder / "secret.example.yml")[0]["stringData"]), where
    elif verb == "exec":
        pod, dashes, program, command, *more = rest
        assert (f"pod/{pod}" in names, dashes, program) == (True, "--", "alpaca-lora"), where
        assert command in cli.COMMANDS and resolve(SCHEMAS[command], more, command), where
    elif verb == "cp":
        pod, _, target = other[1].partition(":")
        assert f"pod/{pod}" in names and target.startswith(MOUNTS), where
    elif verb == "delete":
        assert "/".join(other) in names, where
    else:
        assert verb in ("wait", "rollout", "port-forward"), f"{where}: kubectl {verb}"
        assert [word for word in other if "/" in word and word not in names] == [], where


def _curl(words: Sequence[str], where: str) -> None:
    address = urlsplit(words[-1])
    routes = "".join(path.read_text() for path in (CHECKOUT / "alpaca_lora/server").glob("app.py"))
    assert (address.hostname, address.port) == ("127.0.0.1", 8000) and f'"{address.path}"' in routes, where


def _export(words: Sequence[str], where: str) -> None:
    assert [word.split("=")[0] for word in words] == [KEYS_VARIABLE], where


def _on_secrets(words: Sequence[str], where: str) -> None:
    """Programs that write below deploy/secrets; test_shown_commands.py runs them."""
    paths = [word for word in words if "/" in word and not re.search(r"[%^$]", word)]
    assert paths and [path for path in paths if not f"{path}/".startswith(SECRETS)] == [], where


PROGRAMS = {
    "docker": _docker, "kubectl": _kubectl, "curl": _curl, "export": _export,
    "mkdir": _on_secrets, "chmod": _on_secrets, "printf": _on_secrets, "sed": _on_secrets, "openssl": _on_secrets,
}  # fmt: skip
