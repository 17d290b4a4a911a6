"""deploy/Dockerfile: hadolint, and that it agrees with the code. No container engine is asked."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from alpaca_lora import cli
from alpaca_lora.kernels.cpu.library import COMPILERS
from alpaca_lora.server.gate import LOOPBACK
from alpaca_lora.server.keys import KEYS_VARIABLE
from alpaca_lora.server.options import ServeOptions
from tests.deploy.deploy_files import CONFIG, DEPLOY, documents, instructions, serve_config, tool
from tests.package_files import CHECKOUT, read_files
from tests.server.open_server import open_server, until

TEXT = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
PARTS = list(instructions(TEXT))
RUNTIME = PARTS[max(place for place, (keyword, _) in enumerate(PARTS) if keyword == "FROM") :]
SECRET = re.compile(r"(?i)key|token|secret|passw|credential")


def last(keyword: str) -> str:
    return [rest for found, rest in RUNTIME if found == keyword][-1]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for keyword, rest in RUNTIME if keyword == "ENV" for word in shlex.split(rest))


def sources(text: str) -> list[str]:
    """What COPY takes from the checkout."""
    copies = [rest.split() for keyword, rest in instructions(text) if keyword == "COPY"]
    return [word for words in copies if not words[0].startswith("--from") for word in words[:-1]]


def let_through(path: str, ignore: str) -> bool:
    """Whether .dockerignore leaves a file to the engine: the last pattern that fits it or a folder above decides."""
    above = [path, *(parent.as_posix() for parent in Path(path).parents if parent.name)]
    decided = True
    for line in ignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        names = [Path(name).name for name in above] if pattern.startswith("**/") else above
        if any(fnmatch.fnmatchcase(name, pattern.lstrip("!").removeprefix("**/")) for name in names):
            decided = pattern.startswith("!")
    return decided


# ---- the file


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    done = tool("hadolint", "deploy/Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    broken = tmp_path / "Dockerfile"
    broken.write_text(TEXT.replace("--no-install-recommends ", ""))
    assert "DL3015" in tool("hadolint", str(broken)).stdout


def test_what_is_copied_is_there_and_nothing_else_goes_to_the_engine() -> None:
    ignore = (CHECKOUT / ".dockerignore").read_text(encoding="utf-8")
    wanted = sources(TEXT)
    assert len(wanted) > 4
    for source in wanted:
        assert (CHECKOUT / source).exists() and let_through(source, ignore), source
    assert let_through("alpaca_lora/server/static/index.html", ignore)
    for name in ("deploy/secrets/api_keys", ".git/config", "runs/shop/adapter_model.safetensors", "tests/tiny.py"):
        assert not let_through(name, ignore), name
    assert not let_through("alpaca_lora/server/__pycache__/app.cpython-311.pyc", ignore)
    assert let_through("deploy/secrets/api_keys", "*\n!deploy")  # the test sees it


def test_torch_is_the_pinned_one_and_alone_comes_from_its_index() -> None:
    pipeline = next(rest for _, rest in PARTS if "--index-url" in rest)
    found = re.search(r"\$\((grep [^)]+)\)", pipeline)
    assert found and "--no-deps" in pipeline
    said = subprocess.run(shlex.split(found[1]), cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"torch==[\d.]+\n", said)
    assert re.findall(r"https?://([^/\s]+)", "".join(rest for _, rest in PARTS)) == ["download.pytorch.org"]


def test_the_extras_exist() -> None:
    extras = set(tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    asked = re.search(r"'\.\[([a-z,]+)\]'", TEXT)
    assert asked and {"serve"} <= set(asked[1].split(",")) <= extras
    assert "-c constraints.txt" in TEXT


def test_it_runs_as_a_number_that_is_not_root() -> None:
    user, group = map(int, last("USER").split(":"))
    assert user >= 10_000 and group >= 10_000
    assert f"--uid {user} --gid {group}" in TEXT and f"-o {user} -g {group}" in TEXT


def test_no_secret_is_built_in() -> None:
    names = [word.split("=")[0] for keyword, rest in PARTS if keyword in ("ENV", "ARG") for word in shlex.split(rest)]
    assert [name for name in names if SECRET.search(name)] == []
    assert SECRET.search(KEYS_VARIABLE)  # the test sees it


def test_there_is_a_compiler_where_the_kernels_are_made() -> None:
    """`find_compiler` is asked on every start, also where the cache has the kernels."""
    packages = next(rest for keyword, rest in RUNTIME if keyword == "RUN").split("&&")[1].split()
    assert set(COMPILERS) & set(packages) and "libc6-dev" in packages


def test_variables_are_read_by_somebody() -> None:
    ours = {name for name in environment() if name.startswith("ALPACA_LORA")}
    text = "".join(file.text for file in read_files("alpaca_lora"))
    assert ours and [name for name in ours if f'"{name}"' not in text] == []
    constants = Path(next(path for path in map(Path, sys.path) if (path / "huggingface_hub").is_dir()))
    assert '"HF_HOME"' in (constants / "huggingface_hub" / "constants.py").read_text()
    cache = environment()["ALPACA_LORA_HOME"]
    assert environment()["HOME"] == cache and environment()["HF_HOME"].startswith(cache)
    assert f"install -d -o 10001 -g 10001 {cache}" in TEXT


# ---- what it starts


def test_the_command_is_ours_and_its_configuration_is_read() -> None:
    init, dashes, program = json.loads(last("ENTRYPOINT"))
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    assert (init, dashes, scripts[program]) == ("tini", "--", f"{cli.__name__}:main") and "tini" in TEXT
    assert f"COPY deploy/serve.yml {CONFIG}" in TEXT
    config = serve_config(json.loads(last("CMD")), DEPLOY / "serve.yml")
    assert config.host not in LOOPBACK and config.api_keys_file is None
    assert str(config.port) == last("EXPOSE") and config.port == ServeOptions.model_fields["port"].default
    assert config.adapter_dir in TEXT


def health_check() -> list[str]:
    found = re.search(r"CMD (\[.*\])$", last("HEALTHCHECK"))
    assert found
    return json.loads(found[1])


def test_compose_checks_health_in_the_same_way() -> None:
    services = documents(DEPLOY / "compose.yml")[0]["services"]
    assert services["server"]["healthcheck"]["test"] == ["CMD", *health_check()]


@pytest.mark.parametrize("state", ["well", "failed", "gone"])
def test_the_health_check_sees_how_it_is(state: str) -> None:
    python, *words = health_check()
    assert python == "python" and "8000" in words[-1]
    with open_server() as server:
        port = server.url.rpartition(":")[2]
        if state == "failed":
            server.engine.poison = RuntimeError("broken")
            for _ in range(3):
                assert server.chat().status_code == 500
            until(lambda: server.service.bridge.failure is not None)
        if state == "gone":
            port = "1"
        command = [sys.executable, *words[:-1], words[-1].replace("8000", port)]
        # a proxy that the environment names is not asked
        proxies = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        done = subprocess.run(command, env=proxies, capture_output=True, timeout=20)
    assert (done.returncode == 0) == (state == "well")
