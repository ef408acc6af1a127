"""A hub on the loopback interface: the few calls that huggingface_hub makes for a download."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

NAME = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class LoopbackHub:
    """One repository with one commit."""

    endpoint: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # what a client receives
    published: dict[str, bytes] = field(default_factory=dict)  # what the hub says it has
    requests: list[str] = field(default_factory=list)

    def publish(self, files: dict[str, bytes]) -> None:
        self.files, self.published = dict(files), dict(files)

    def entry(self, name: str) -> dict[str, Any]:
        """A file's metadata; safetensors lie in large-file storage."""
        content = self.published[name]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"size": len(content), "blobId": blob, "oid": blob}
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content)}
            entry["lfs"]["pointerSize"] = 130
        return entry

    def etag(self, name: str) -> str:
        entry = self.entry(name)
        return str(entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"])

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": name, **self.entry(name)} for name in self.published]
        return {"id": NAME, "sha": COMMIT, "siblings": siblings}

    def tree(self) -> list[dict[str, Any]]:
        return [{"type": "file", "path": name, **self.entry(name)} for name in self.published]


def handler_of(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            url = urlsplit(self.path)
            hub.requests.append(f"{self.command} {url.path}")
            info = (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/{COMMIT}")
            resolve = f"/{NAME}/resolve/{COMMIT}/"
            if url.path in (*info, f"/api/models/{NAME}/revision/main"):
                self.send_json(hub.info())
            elif url.path == f"/api/models/{NAME}/tree/{COMMIT}":
                self.send_json(hub.tree())
            elif url.path.startswith(resolve):
                name = url.path.removeprefix(resolve)
                self.send(200, hub.files[name], {"ETag": f'"{hub.etag(name)}"'})
            elif url.path.startswith(f"/api/models/{NAME}/"):
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def send_json(self, document: object) -> None:
            self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def loopback_hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()
