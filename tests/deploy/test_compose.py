"""deploy/compose.yml: the schema of the Compose specification, and that its parts fit each other and the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from alpaca_lora import __version__
from alpaca_lora.errors import AlpacaLoraError
from tests.deploy.deploy_files import (
    CONFIG,
    DEPLOY,
    ENDING_SECONDS,
    changed,
    documents,
    instructions,
    serve_config,
    tool,
)

FILE = DEPLOY / "compose.yml"
COMPOSE = documents(FILE)[0]
PORT = re.compile(r"127\.0\.0\.1:(?:\$\{\w+:-(\d+)\}|(\d+)):(\d+)")
OURS = ("server", "server-cuda")
CACHE = "/var/cache/alpaca-lora"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def problems(document: Any) -> list[str]:
    """What a service of the file lacks, has open, or names that is not there."""
    found = []
    for name, service in document["services"].items():
        found += [f"{name}: {what}" for what in (*_open(service), *_unknown(service, document))]
        if name in OURS:
            found += [f"{name}: {what}" for what in _ours(service, document)]
    unused = {
        f"{kind}: {name} is used by nobody"
        for kind in ("configs", "secrets", "volumes")
        for name in document[kind]
        if not any(name in _names(service, kind) for service in document["services"].values())
    }
    free = [name for name in OURS if not document["services"][name].get("profiles")]
    return [*found, *sorted(unused), *([] if free == ["server"] else ["not the server alone runs by default"])]


def _open(service: Any) -> list[str]:
    wanted = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    found = [f"{key} is not {value}" for key, value in wanted.items() if service.get(key) != value]
    found += [f"port {port} is open to others" for port in service.get("ports", []) if not PORT.fullmatch(port)]
    if ":latest" in service["image"] or ":" not in service["image"]:
        found.append("an image without a version")
    return found


def _names(service: Any, kind: str) -> list[str]:
    if kind == "volumes":
        return [volume.split(":")[0] for volume in service.get("volumes", []) if volume[0] not in ".$"]
    return [one["source"] if isinstance(one, dict) else one for one in service.get(kind, [])]


def _unknown(service: Any, document: Any) -> list[str]:
    found = [
        f"{kind}: {name} is defined nowhere"
        for kind in ("configs", "secrets", "volumes")
        for name in _names(service, kind)
        if name not in document[kind]
    ]
    for name in _names(service, "configs"):
        if not (DEPLOY / document["configs"].get(name, {}).get("file", "none")).is_file():
            found.append(f"the file of {name} is not there")
    found += [f"{name} is no service" for name in service.get("depends_on", []) if name not in document["services"]]
    return found


def _ours(service: Any, document: Any) -> list[str]:
    targets = {one["target"]: document["configs"][one["source"]]["file"] for one in service["configs"]}
    try:
        config = serve_config(service["command"], DEPLOY / targets[CONFIG])
    except (AlpacaLoraError, KeyError) as error:
        return [f"the command: {error}"]
    found = []
    if config.api_keys_file not in [f"/run/secrets/{name}" for name in service["secrets"]]:
        found.append("api_keys_file is no secret")
    if seconds(service["stop_grace_period"]) < config.drain_timeout + ENDING_SECONDS:
        found.append("the grace period ends before the answers")
    mounts = {volume.split(":")[-2 if volume.endswith(":ro") else -1]: volume for volume in service["volumes"]}
    if not mounts.get(str(config.adapter_dir), "").endswith(":ro"):
        found.append("adapter_dir is not mounted, or can be written to")
    if mounts.get(CACHE, "").split(":")[0] not in document["volumes"]:
        found.append("the cache is no volume")
    if not any(one.split(":")[0] == "/tmp" for one in service["tmpfs"]):
        found.append("no /tmp")
    if not service["ports"][0].endswith(f":{config.port}"):
        found.append("another port than that of the service")
    if not service["image"].startswith(f"alpaca-lora:{__version__}"):
        found.append("an image of another version")
    if not {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"]):
        found.append("no limits")
    if not (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file():
        found.append("no Dockerfile")
    known = {rest.split("=")[0] for keyword, rest in instructions(DOCKERFILE) if keyword == "ARG"}
    return found + [f"{name} is no ARG" for name in service["build"].get("args", {}) if name not in known]


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found, text
    return float(found[1])


def test_it_fits_the_specification(tmp_path: Path) -> None:
    check = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    done = tool(*check, str(FILE))
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "compose.yml"
    broken.write_text(yaml.safe_dump(changed(COMPOSE, ("services", "server", "read_olny"), True)))
    assert "read_olny" in tool(*check, str(broken)).stdout


def test_its_parts_agree() -> None:
    assert problems(COMPOSE) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("services", "server", "read_only"), ...),
        (("services", "grafana", "cap_drop"), []),
        (("services", "server", "ports"), ["8000:8000"]),
        (("services", "server", "ports"), ["127.0.0.1:8000:8080"]),
        (("services", "server", "stop_grace_period"), "30s"),
        (("services", "server", "command", 3), "--api_key_file"),
        (("services", "server", "command", 4), "/run/secrets/keys"),
        (("services", "server", "volumes"), ["cache:/var/cache/alpaca-lora"]),
        (("services", "server", "volumes", 2), "../runs:/var/cache/alpaca-lora"),
        (("services", "server", "tmpfs"), ["/run"]),
        (("services", "server", "image"), "alpaca-lora:latest"),
        (("services", "server", "deploy", "resources", "limits", "memory"), ...),
        (("services", "server", "profiles"), ["cpu"]),
        (("services", "server", "secrets"), ["api_keys", "other"]),
        (("services", "server-cuda", "build", "args"), {"VARIANTE": "cu130"}),
        (("services", "server-cuda", "profiles"), ...),
        (("services", "prometheus", "image"), "prom/prometheus"),
        (("services", "prometheus", "volumes"), []),
        (("services", "grafana", "depends_on"), ["prom"]),
        (("configs", "alerts", "file"), "monitoring/alarms.yml"),
    ],
)
def test_a_broken_copy_is_noticed(path: tuple[str | int, ...], value: Any) -> None:
    assert problems(changed(COMPOSE, path, value)) != []


def test_both_services_answer_to_the_name_that_prometheus_asks() -> None:
    for name in OURS:
        assert COMPOSE["services"][name]["networks"]["default"]["aliases"] == ["alpaca-lora"]


def test_secrets_are_files_that_git_does_not_see() -> None:
    ignored = (DEPLOY / ".gitignore").read_text().splitlines()
    assert "secrets/" in ignored
    assert [one["file"] for one in COMPOSE["secrets"].values() if not one["file"].startswith("secrets/")] == []


def test_the_cache_is_where_the_image_has_it() -> None:
    assert f"ALPACA_LORA_HOME={CACHE}" in DOCKERFILE


def test_the_gpu_is_asked_for_by_the_service_that_needs_it() -> None:
    devices = [
        service["deploy"]["resources"].get("reservations", {}).get("devices")
        for service in map(COMPOSE["services"].get, OURS)
    ]
    assert devices[0] is None and devices[1][0]["capabilities"] == ["gpu"]
