"""The program as the image runs it, without an engine: a read-only root, no home, no capabilities, two places to write.

Needs the right to make a mount namespace, which root on Linux has; nothing outside of it changes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from tests.package_files import CHECKOUT

KEY = "locked-up-key-of-16"
# tmpfs on each folder named before the word `--`, the rest of the file system read-only, then the command
SCRIPT = """
set -e
mount --make-rprivate /
mount -o remount,ro,bind /
while [ "$1" != -- ]; do mount -t tmpfs -o "$2" tmpfs "$1"; shift 2; done
shift
exec setpriv --bounding-set -all --inh-caps -all --ambient-caps -all --no-new-privs "$@"
"""
QUESTION = "from alpaca_lora.kernels.cpu.library import library; print(library().reason)"


def can_unshare() -> bool:
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        return False
    done = subprocess.run(["unshare", "--mount", "sh", "-c", SCRIPT, "sh", "--", "true"], capture_output=True)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason="needs a mount namespace of its own")


def locked(mounts: Sequence[tuple[Path, str]], *words: str) -> list[str]:
    places = [word for folder, options in mounts for word in (str(folder), options)]
    return ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", *places, "--", sys.executable, *words]


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """The folder of ALPACA_LORA_HOME and that of temporary files."""
    folders = tmp_path / "cache", tmp_path / "tmp"
    for folder in folders:
        folder.mkdir()
    return folders


def environment(cache: Path, temporary: Path, **more: str) -> dict[str, str]:
    path = os.environ["PATH"]
    return {"PATH": path, "ALPACA_LORA_HOME": str(cache), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a compiler")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("mode=755", "noexec"), "compiled by"),  # as compose.yml and deployment.yml have it
        (("noexec", "noexec"), "plain torch .*failed to map"),  # a cache that programs cannot be executed from
        (("mode=755", "ro"), "plain torch .*Read-only"),  # no room for the compiler
    ],
)
def test_where_the_kernels_are_made(places: tuple[Path, Path], options: tuple[str, str], said: str) -> None:
    command = locked(list(zip(places, options, strict=True)), "-c", QUESTION)
    done = subprocess.run(command, env=environment(*places), capture_output=True, text=True, cwd=CHECKOUT, timeout=120)
    assert re.match(said, done.stdout), done.stdout + done.stderr


@pytest.mark.slow
def test_the_service_answers(tiny_base: Path, places: tuple[Path, Path]) -> None:
    words = ["-m", "alpaca_lora", "serve", "--base_model", str(tiny_base), "--port", "0", "--host", "0.0.0.0"]
    words += ["--served_model_name", "tiny", "--device", "cpu", "--kv_cache_gb", "0.01"]
    command = locked([(places[0], "mode=755"), (places[1], "noexec")], *words)
    keys = environment(*places, ALPACA_LORA_API_KEYS=f"app:{KEY}", HOME="/nonexistent")
    with subprocess.Popen(command, env=keys, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        assert process.stderr is not None
        timer = threading.Timer(120, process.kill)
        timer.start()
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"http://\S+:(\d+)/ serves", line):
                    break
            else:
                raise AssertionError("".join(lines))
            with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=60) as client:
                assert client.get("/health").json() == {"status": "ok"}
                body = {"model": "tiny", "prompt": "Say 3", "max_tokens": 3}
                answer = client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"})
                assert json.loads(answer.text)["usage"]["completion_tokens"] >= 1
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
            assert process.wait(60) == 143
        finally:
            timer.cancel()
            process.kill()
