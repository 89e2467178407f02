"""A stand-in of the Hugging Face hub's HTTP interface, as huggingface_hub calls it, in a thread of this process."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN, OWNER = "hf_of_the_test", "ada"


class Hub(ThreadingHTTPServer):
    """`files`: repository → path → content, as committed. `made`: what was asked for each new repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.made: list[dict[str, Any]] = []
        self.large: dict[str, bytes] = {}  # SHA-256 → content
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body or {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_GET(self) -> None:
        self._answer(404, {"error": "Repository not found"})

    def do_PUT(self) -> None:
        self.server.large[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)

    def do_POST(self) -> None:
        body, path = self._body(), self.path.split("?")[0]
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        _, _, _, owner, name, verb, _ = path.split("/")
        if verb == "preupload":
            return self._preupload(json.loads(body))
        assert verb == "commit", path
        return self._commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])

    def _validate(self, content: str) -> None:
        """What the real one checks of the fields that a card of `push` has."""
        data = yaml.safe_load(content.split("---\n")[1])
        if data.get("license") == "mine":
            return self._answer(400, '"license" must be one of the licences of the hub')
        return self._answer(200, {"errors": [], "warnings": []})

    def _create(self, asked: dict[str, Any]) -> None:
        if asked["organization"] != OWNER:
            return self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        self.server.made.append(asked)
        name = f"{OWNER}/{asked['name']}"
        known = name in self.server.files
        self.server.files.setdefault(name, {})
        return self._answer(409 if known else 200, {"url": f"{self.server.address}/{name}"})

    def _preupload(self, asked: dict[str, Any]) -> None:
        large = (".safetensors", ".png")
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(large) else "regular",
                "shouldIgnore": False,
            }
            for one in asked["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.address}/large/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[name][value["path"]] = self.server.large[value["oid"]]
        self._answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1", "success": True})


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
