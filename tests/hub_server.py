"""A Hub on 127.0.0.1 for the real huggingface_hub client: enough of its HTTP API to load and to push a model, and its faults.

It keeps to what the client relies on: content addressed by ETag (git's sha1, or sha256 for what LFS stores), ranges, error
codes in headers, uploads that nobody sees before the commit that names them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin")
Files = dict[str, bytes]


def etag(path: str, content: bytes) -> str:
    """What the Hub calls this content: its sha256 in LFS, else git's sha1."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """The files of every commit, newest last; a gated one shows them to all, and serves them to the token only."""

    commits: dict[str, Files] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Files) -> str:
        described = repr((list(self.commits), sorted((path, etag(path, content)) for path, content in files.items())))
        sha = hashlib.sha1(described.encode()).hexdigest()
        self.commits[sha] = files
        return sha

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def find(self, revision: str) -> str | None:
        return self.head if revision == "main" else revision if revision in self.commits else None


@dataclass
class Fault:
    """What happens to the next `times` requests for a path that ends with `suffix`."""

    suffix: str
    status: int | None = None
    cut_after: int | None = None
    replace: Callable[[bytes], bytes] | None = None
    method: str = "GET"
    times: int = 1


class Hub:
    """The server's state: what it stores, what it shall do wrong, and what it was asked."""

    token = "hf_secret"

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []

    def add(self, name: str, folder: Path, without: tuple[str, ...] = (), **extra: bytes | str) -> Repo:
        """A repository with the files of a folder, some left out, some added."""
        found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        files = {name: file.read_bytes() for name, file in found.items() if name not in without}
        files |= {path: content.encode() if isinstance(content, str) else content for path, content in extra.items()}
        repo = self.repos[name] = Repo()
        repo.commit(files)
        return repo

    def asked(self, suffix: str, method: str = "GET") -> list[str | None]:
        """The Range header of every request for a path with that end."""
        return [header for verb, path, header in self.requests if verb == method and path.endswith(suffix)]

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and path.endswith(fault.suffix):
                fault.times -= 1
                return fault
        return None


class Refused(Exception):
    """An answer that is an error: status, and the Hub's code for it."""

    def __init__(self, status: int, code: str = "") -> None:
        self.status, self.headers = status, {"X-Error-Code": code} if code else {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.fault = self.hub.fault(self.command, path)
        try:
            if self.fault and self.fault.status:
                raise Refused(self.fault.status)
            for pattern, route in ROUTES.items():
                if match := re.fullmatch(pattern, path):
                    route(self, *match.groups())
                    return
            raise Refused(404)
        except Refused as refused:
            self._send(b"{}", refused.status, refused.headers)

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        self.close_connection = self.close_connection or cut is not None

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repo(self, name: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._known()):
            raise Refused(404 if self._known() else 401, "RepoNotFound")
        if write and not self._known():
            raise Refused(403)
        return repo

    def _files(self, name: str, revision: str) -> tuple[str, Files]:
        repo = self._repo(name)
        if (sha := repo.find(revision)) is None:
            raise Refused(404, "RevisionNotFound")
        return sha, repo.commits[sha]

    def _file(self, name: str, revision: str, path: str) -> None:
        sha, files = self._files(name, revision)
        if self.hub.repos[name].gated and not self._known():
            raise Refused(401, "GatedRepo")
        if path not in files:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        content = files[path]
        headers = {"ETag": f'"{etag(path, content)}"', "X-Repo-Commit": sha}
        if self.fault and self.fault.replace:
            content = self.fault.replace(content)
        cut = self.fault.cut_after if self.fault else None
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(content[start:], 206, headers, cut)
        else:
            self._send(content, 200, headers, cut)

    def _info(self, name: str, revision: str | None) -> None:
        sha, files = self._files(name, revision or "main")
        self._json({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})

    def _tree(self, name: str, revision: str, folder: str | None) -> None:
        _sha, files = self._files(name, revision)
        if folder and not any(path.startswith(folder + "/") for path in files):
            raise Refused(404, "EntryNotFound")
        self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": etag(path, content)}
                for path, content in files.items()
            ]
        )

    def _create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self._known():
            raise Refused(401)
        if name in self.hub.repos:
            self._send(json.dumps({"url": f"{self.hub.endpoint}/{name}"}).encode(), 409)
            return
        repo = self.hub.repos[name] = Repo(private=wanted.get("visibility") == "private" or wanted.get("private", False))
        repo.commit({".gitattributes": b""})
        self._json({"url": f"{self.hub.endpoint}/{name}"})

    def _validate(self) -> None:
        self._json({"warnings": [], "errors": []})

    def _preupload(self, name: str, revision: str) -> None:
        self._repo(name, write=True)
        modes = [
            {
                "path": file["path"],
                "shouldIgnore": False,
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": modes})

    def _batch(self, name: str) -> None:
        self._repo(name, write=True)
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        self.hub.uploads[oid] = self.body
        self._send(b"")

    def _commit(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        files = dict(repo.commits[repo.head])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})


NAME = r"([^/]+/[^/]+)"
ROUTES: dict[str, Callable[..., None]] = {
    "/api/repos/create": Handler._create,
    "/api/validate-yaml": Handler._validate,
    rf"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?": Handler._tree,
    rf"/api/models/{NAME}/preupload/([^/]+)": Handler._preupload,
    rf"/api/models/{NAME}/commit/([^/]+)": Handler._commit,
    rf"/api/models/{NAME}(?:/revision/([^/]+))?": Handler._info,
    rf"/{NAME}\.git/info/lfs/objects/batch": Handler._batch,
    "/upload/([0-9a-f]+)": Handler._upload,
    rf"/{NAME}/resolve/([^/]+)/(.+)": Handler._file,
}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A running Hub, gone with the block."""
    handler = type("HubHandler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
