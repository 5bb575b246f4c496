"""A Hugging Face hub on the loopback device, as far as downloads need one. Standard library only."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890123456789012345678901234567890"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub:
    """with Hub({"user/model": {"a.gguf": b"..."}}) as hub: ... hub.url is what HF_ENDPOINT should be."""

    def __init__(self, repositories: dict[str, dict[str, bytes]] | None = None) -> None:
        self.repositories = repositories or {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """(method, path, headers), in order."""
        self.cuts: dict[str, int] = {}
        """File name -> after how many bytes of the next reply the connection breaks."""
        self.stalls: dict[str, int] = {}
        """File name -> after how many bytes of a reply nothing more comes until `hold` is set."""
        self.answers: dict[str, tuple[int, dict[str, str]]] = {}
        """Repository -> (status, headers) instead of everything."""
        self.ranges = True
        """Whether it honours Range."""
        self.hold = threading.Event()
        """GETs of files wait for this."""
        self.hold.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()

    def gets(self, file: str) -> list[str | None]:
        """The Range header of each GET of a file."""
        return [headers.get("Range") for method, path, headers in self.requests if method == "GET" and path.endswith("/" + file)]

    def _answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((handler.command, path, dict(handler.headers)))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            return self._list(handler, found[1])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(handler, found[1], found[2], body)
        _send(handler, 404, {}, b"")

    def _refused(self, handler: BaseHTTPRequestHandler, repo: str) -> bool:
        if repo in self.answers:
            _send(handler, *self.answers[repo], b"{}")
        elif repo not in self.repositories:
            _send(handler, 404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        else:
            return False
        return True

    def _list(self, handler: BaseHTTPRequestHandler, repo: str) -> None:
        if self._refused(handler, repo):
            return
        siblings = [
            {"rfilename": name, "size": len(data), "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}}
            for name, data in sorted(self.repositories[repo].items())
        ]
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
        _send(handler, 200, {"Content-Type": "application/json"}, json.dumps(info | {"siblings": siblings}).encode())

    def _file(self, handler: BaseHTTPRequestHandler, repo: str, name: str, body: bool) -> None:
        if self._refused(handler, repo):
            return
        if name not in self.repositories[repo]:
            return _send(handler, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        data = self.repositories[repo][name]
        headers = {"ETag": f'"{sha256(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if wanted and self.ranges:
            start = int(wanted[1])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        if not body:
            return _send(handler, status, headers, data, body=False)
        cut = self.cuts.pop(name, None)
        self.hold.wait(60)
        stall = self.stalls.get(name)
        _send(handler, status, headers, data[: cut if cut is not None else stall], length=len(data))
        if stall is not None:
            self.hold.clear()
            self.hold.wait(60)
        if cut is not None or stall is not None:
            handler.close_connection = True


def _send(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    data: bytes,
    body: bool = True,
    length: int | None = None,
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    if body and handler.command != "HEAD":
        handler.wfile.write(data)
