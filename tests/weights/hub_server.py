"""A stand-in for the hub on 127.0.0.1: the two paths that a snapshot download asks for, over a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves ``folder`` as the repository ``name``; ``asked`` are the files it was asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(body=True)

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0]
                if path.startswith(f"/{name}/resolve/"):
                    file = folder / path.split("/", 5)[5]
                    asked.append(file.name)
                    content = file.read_bytes()
                    headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
                    self.send(200, content, headers, body=body)
                elif path.startswith(f"/api/models/{name}/tree/"):
                    self.send(200, json.dumps(self.entries()).encode(), {}, body=body)
                elif path.startswith(f"/api/models/{name}"):
                    siblings = [{"rfilename": entry["path"]} for entry in self.entries()]
                    info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False}
                    self.send(200, json.dumps(info).encode(), {}, body=body)
                else:
                    error = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                    self.send(404, b"{}", error, body=body)

            def entries(self) -> list[dict[str, object]]:
                files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
                return [
                    {
                        "type": "file",
                        "path": str(p.relative_to(folder)),
                        "size": p.stat().st_size,
                        "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                    }
                    for p in files
                ]

            def send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
