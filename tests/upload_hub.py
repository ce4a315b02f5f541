"""A hub on loopback that takes uploads."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub


class UploadHub:
    """What such a hub was given: `files` by path, `repos` as they were asked for, `tokens` they came with."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repos: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.blobs: dict[str, bytes] = {}
        self.refuses = False
        self.url = ""

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            self.repos.append(json.loads(body))
            return {"url": f"{self.url}/someone/tiny"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "lfs" if name.endswith(".gguf") else "regular"} for name in names
            ]
            return {"files": [{**mode, "shouldIgnore": False} for mode in modes]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            links = [
                {**each, "actions": {"upload": {"href": f"{self.url}/blob/{each['oid']}"}}}
                for each in objects
            ]
            return {"transfer": "basic", "objects": links}
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return {}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
            return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/someone/tiny/commit/0"}
        return {"sha": "0" * 40, "siblings": [], "id": "someone/tiny"}


@contextlib.contextmanager
def serve_uploads() -> Iterator[UploadHub]:
    """A hub at `url`, as long as the block lasts."""
    hub = UploadHub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not self.path.startswith("/blob/"):
                hub.tokens.add(self.headers.get("Authorization"))
            answer = json.dumps(hub.answer(self.path, body)).encode()
            self.send_response(403 if hub.refuses else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
    with contextlib.suppress(AttributeError):  # older versions keep no session
        huggingface_hub.close_session()
