"""Files that a model folder names, held inside of that folder. Knows paths and bounded JSON; no weight format."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from alpaca_lora.errors import ModelFileError

MAX_JSON_BYTES = 32 * 2**20
MAX_NAME = 255


def contained_file(
    folder: str | os.PathLike[str], name: str, *, named_by: Path | None = None, field: str | None = None
) -> Path:
    """``folder / name`` if it is a file directly inside of ``folder``, links followed; else ModelFileError.

    ``named_by`` and ``field`` say in which file and for which tensor the name stood. The hub's cache keeps a model's
    files as links from ``snapshots/<revision>`` to the ``blobs`` of the same model: those two count as one folder.
    """
    root, said_in = Path(folder), named_by or Path(folder)
    if not name or name in (".", "..") or len(name) > MAX_NAME or any(c in name for c in "/\\:\0"):
        expected = "a plain file name in the same folder"
        raise ModelFileError(f"names the file {name[:200]!r}", file=said_in, field=field, expected=expected)
    path = root / name
    home = root.resolve()
    real = path.resolve()
    if real.parent != home and real.parent != _blobs(home):
        fix = "put the file itself into the folder"
        raise ModelFileError(f"{name!r} is a link to a file outside of the folder", file=said_in, field=field, fix=fix)
    if not real.is_file():
        what = "is missing" if field is None else f"the file {name!r} that holds it is missing"
        raise ModelFileError(what, file=path if field is None else said_in, field=field, fix="fetch the model again")
    return path


def _blobs(snapshot: Path) -> Path | None:
    """``.../models--org--name/blobs`` of the snapshot folder ``.../models--org--name/snapshots/<revision>``; None for
    other folders."""
    model = snapshot.parent.parent
    return model / "blobs" if snapshot.parent.name == "snapshots" and model.name.startswith("models--") else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 32 MB; ModelFileError naming the line of what is not JSON."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise ModelFileError("is too large", file=path, expected=f"at most {MAX_JSON_BYTES} bytes")
        value = json.loads(raw.decode("utf-8-sig"))
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", file=path) from error
    except json.JSONDecodeError as error:
        raise ModelFileError(f"is not JSON ({error.msg})", file=path, line=error.lineno) from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ModelFileError(f"is not JSON ({error})", file=path) from error
    if not isinstance(value, dict):
        raise ModelFileError("is not a JSON object", file=path)
    return value
