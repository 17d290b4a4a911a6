"""The judge of other programs' commands sees what is wrong; those that make the keys are run."""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from alpaca_lora.errors import AlpacaLoraError
from alpaca_lora.server.keys import KeyRing
from tests.deploy.shown_commands import judge
from tests.package_files import CHECKOUT

PAGE = (CHECKOUT / "docs/deploy.md").read_text(encoding="utf-8")
LINES = [
    line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("docker build -f deploy/Dockerfile -t alpaca-lora:0.1.0 .", "docker build -f Dockerfile -t alpaca-lora:0.1 ."),
        (
            "docker build -f deploy/Dockerfile -t alpaca-lora:0.1.0-cuda --build-arg VARIANT=cu130 .",
            "docker build -f deploy/Dockerfile -t alpaca-lora:0.1.0-cuda --build-arg CUDA=cu130 .",
        ),
        (
            "docker run --stop-timeout 40 -v cache:/var/cache/alpaca-lora alpaca-lora:0.1.0",
            "docker run --stop-timeout 40 -v cache:/root/.cache alpaca-lora:0.1.0",
        ),
        ("docker run --stop-timeout 40 alpaca-lora:0.1.0", "docker run --stop-timeout 10 alpaca-lora:0.1.0"),
        (
            "docker run --stop-timeout 40 alpaca-lora:0.1.0 serve --config /etc/alpaca-lora/serve.yml --quantize int8",
            "docker run --stop-timeout 40 alpaca-lora:0.1.0 serve --config /etc/alpaca-lora/serve.yml --bits 8",
        ),
        ("docker compose -f deploy/compose.yml up -d", "docker compose -f deploy/docker-compose.yml up -d"),
        ("docker compose -f deploy/compose.yml up server-cuda", "docker compose -f deploy/compose.yml up cuda"),
        (
            "docker compose -f deploy/compose.yml --profile monitoring up",
            "docker compose -f deploy/compose.yml --profile metrics up",
        ),
        ("kubectl apply -k deploy/kubernetes", "kubectl apply -k deploy"),
        ("kubectl apply -f deploy/kubernetes/namespace.yml", "kubectl apply -f deploy/kubernetes/names.yml"),
        (
            "kubectl -n alpaca-lora exec files -- alpaca-lora pull x",
            "kubectl -n alpaca-lora exec files -- alpaca-lora get x",
        ),
        (
            "kubectl -n alpaca-lora rollout status deployment/alpaca-lora",
            "kubectl -n alpaca-lora rollout status deployment/x",
        ),
        ("kubectl -n alpaca-lora delete pod files", "kubectl -n alpaca-lora delete pod file"),
        ("curl http://127.0.0.1:8000/ready", "curl http://127.0.0.1:8000/readyz"),
        ("chmod 444 deploy/secrets/api_keys", "chmod 444 deploy/keys"),
        ("export ALPACA_LORA_API_KEYS=x", "helm install alpaca-lora"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_noticed(right: str, wrong: str) -> None:
    judge(shlex.split(right), "here")
    with pytest.raises((AssertionError, OSError, KeyError, AlpacaLoraError)):
        judge(shlex.split(wrong), "here")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_commands_make_keys(tmp_path: Path) -> None:
    ours = [line for line in LINES if line.startswith(("mkdir", "printf", "sed", "openssl", "chmod"))]
    assert len(ours) >= 4
    (tmp_path / "deploy").mkdir()
    for line in ours:
        subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, timeout=20)
    made = tmp_path / "deploy" / "secrets"
    ring = KeyRing.read(str(made / "api_keys"), {})
    key = (made / "metrics_key").read_text().strip()
    caller = ring.find(key)
    assert len(ring) == 3 and caller is not None and (caller.name, caller.is_admin) == ("metrics", False)
    assert {path.name for path in made.iterdir()} == {"api_keys", "metrics_key", "grafana_password"}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o444}
