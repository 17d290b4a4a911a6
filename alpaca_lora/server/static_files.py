"""The page at ``/``: the files of the room's ``static`` folder, read once. No path of a request touches the disk."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

STATIC = Path(__file__).resolve().parent / "static"
INDEX = "index.html"


@dataclass(frozen=True, slots=True)
class StaticFile:
    content: bytes
    media_type: str
    etag: str


class StaticFiles:
    """Path -> file; ``/`` is the index. Files whose name begins with a dot stay in the folder."""

    def __init__(self, folder: Path = STATIC) -> None:
        self.files: dict[str, StaticFile] = {}
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                self.files[f"/{name.as_posix()}"] = _read(path)
        if f"/{INDEX}" in self.files:
            self.files["/"] = self.files[f"/{INDEX}"]

    @property
    def paths(self) -> list[str]:
        return list(self.files)

    async def serve(self, request: Request) -> Response:
        """The file of the request's path; only routes of `paths` lead here."""
        file = self.files[request.scope["path"]]
        headers = {"etag": file.etag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)


def _read(path: Path) -> StaticFile:
    content = path.read_bytes()
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    if kind == "application/javascript":
        kind = "text/javascript"
    return StaticFile(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
