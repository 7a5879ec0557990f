"""A stand-in for the Hugging Face hub: the part of its HTTP API that downloads and uploads use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """The commits of a repository, each with all its files."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # without which it is not there
    gated: bool = False

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """Add a commit and let branches or tags point to it."""
        content = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
        name = hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest()
        self.commits[name] = files
        self.refs.update(dict.fromkeys(refs or ("main",), name))
        return name

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """Repositories by name; ``cut`` limits the bytes of a file that one answer gives."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.cut: int | None = None
        self.large: dict[str, bytes] = {}  # uploaded objects by SHA-256
        self.refuses_commits = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            repository = self._repository("/".join(parts[2:4]))
            if repository is None:
                return
            kind, revision = (parts[4], parts[5]) if len(parts) > 5 else ("revision", "main")
            commit = self._commit(repository, revision)
            if commit is None:
                return
            files = repository.commits[commit]
            if kind == "tree":
                self._json([self._entry(name, data) for name, data in sorted(files.items())])
            else:
                self._json(
                    {"id": "/".join(parts[2:4]), "sha": commit, "siblings": [{"rfilename": n} for n in files]}
                )
        elif len(parts) > 4 and parts[2] == "resolve":
            repository = self._repository("/".join(parts[:2]))
            if repository is None:
                return
            commit = self._commit(repository, parts[3])
            if commit is not None:
                self._file(commit, repository.commits[commit].get("/".join(parts[4:])))
        else:
            self._error(404, "EntryNotFound")

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(("POST", path, None))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            raw = json.loads(body)
            name = f"{raw['organization']}/{raw['name']}" if raw.get("organization") else raw["name"]
            made = self.server.repositories.setdefault(name, Repository())
            if not made.commits:
                made.commit({".gitattributes": b""})
            self._json({"url": f"{self.server.url}/{name}", "name": name})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": item["oid"], "size": item["size"],
                 "actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]  # fmt: skip
            self._json({"transfer": "basic", "objects": objects})
        elif len(parts) > 4 and parts[4] == "preupload":
            modes = [
                {"path": item["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if item["path"].endswith((".onnx", ".data", ".safetensors", ".bin")) else "regular"}
                for item in json.loads(body)["files"]
            ]  # fmt: skip
            self._json({"files": modes})
        elif len(parts) > 4 and parts[4] == "commit" and self.server.refuses_commits:
            self._error(403, "")
        elif len(parts) > 4 and parts[4] == "commit":
            repository = self.server.repositories["/".join(parts[2:4])]
            files = dict(repository.commits[repository.refs[parts[5]]])
            for line in body.splitlines():
                row = json.loads(line)
                value = row["value"]
                if row["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif row["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                elif row["key"] == "deletedFile":
                    files.pop(value["path"], None)
            commit = repository.commit(files, parts[5])
            url = f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{commit}"
            self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        else:
            self._json({})

    def do_PUT(self) -> None:
        self.server.requests.append(("PUT", self.path, None))
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self._json({})

    def _repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is not None and found.token and self.headers.get("Authorization") != f"Bearer {found.token}":
            self._error(*((403, "GatedRepo") if found.gated else (401, "RepoNotFound")))
            return None
        if found is None:
            self._error(404, "RepoNotFound")
        return found

    def _commit(self, repository: Repository, revision: str) -> str | None:
        commit = repository.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound")
        return commit

    @staticmethod
    def _entry(name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _file(self, commit: str, data: bytes | None) -> None:
        if data is None:
            self._error(404, "EntryNotFound")
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        part = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            if self.server.cut is not None and len(part) > self.server.cut:
                self.wfile.write(part[: self.server.cut])
                self.close_connection = True
                return
            self.wfile.write(part)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
