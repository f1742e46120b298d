"""A stand-in for the Hugging Face hub on this machine: what its client asks for to read and to write models."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LFS = 10_000  # bytes from which a file is stored by git-lfs, as .safetensors always are


def sha1_of_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """Models by name, each with the files of its commits and the commits of its branches."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # uploaded by git-lfs
        self.asked: list[str] = []
        self.listed: dict[str, dict[str, Any]] = {}  # what the listing tells of a file instead of the truth
        self.sent: dict[str, bytes] = {}  # what is sent of a file instead of it
        self.address = ""

    def put(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit of these files, and its hash."""
        self.branches.setdefault(name, {})
        text = json.dumps([name, branch, sorted((path, sha1_of_blob(data)) for path, data in files.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits.setdefault(name, {})[commit] = dict(files)
        self.branches[name][branch] = commit
        return commit

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[name][self.branches[name].get(revision, revision)]

    def downloaded(self) -> list[str]:
        """The files that were sent, in order."""
        return [
            line.split("/resolve/")[1].partition("/")[2]
            for line in self.asked
            if line.startswith("GET /") and "/resolve/" in line
        ]


def directory_of(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def is_large(name: str, data: bytes) -> bool:
    return name.endswith(".safetensors") or len(data) > LFS


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._read()

    def do_HEAD(self) -> None:
        self._read()

    def _read(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.hub.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            found = self._commit(name, revision or "main")
            if found is not None:
                self._json({"id": name, "modelId": name, "sha": found, "siblings": self._siblings(name, found)})
            return
        if "/resolve/" in path:
            name, _, rest = address.path[1:].partition("/resolve/")
            revision, file = map(unquote, rest.split("/", 1))
            found = self._commit(name, revision)
            if found is None:
                return
            data = self.hub.commits[name][found].get(file)
            if data is None:
                self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found})
                return
            large = is_large(file, data)
            digest = hashlib.sha256(data).hexdigest() if large else sha1_of_blob(data)
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": found}
            self._bytes(self.hub.sent.get(file, data), headers)
            return
        self._json({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        data = self._body()
        self.hub.asked.append(f"PUT {self.path}")
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self._json({})

    def do_POST(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"POST {path}")
        if not self.headers.get("Authorization"):
            self._json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.branches:
                self._json({"error": "exists", "url": f"{self.hub.address}/{name}"}, 409)
                return
            self.hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.put(name, {})
            self._json({"url": f"{self.hub.address}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/branch/" in path:
            name, _, branch = path.removeprefix("/api/models/").partition("/branch/")
            self.hub.branches[name].setdefault(branch, self.hub.branches[name]["main"])
            self._json({})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if is_large(file["path"], b" " * file["size"]) else "regular",
                }
                for file in files
            ]  # fmt: skip
            self._json({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.address}/upload/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            name, _, branch = path.removeprefix("/api/models/").partition("/commit/")
            files = dict(self.hub.files(name, branch))
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "lfsFile":
                    files[item["value"]["path"]] = self.hub.objects[item["value"]["oid"]]
            commit = self.hub.put(name, files, branch)
            self._json(
                {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.address}/{name}/commit/{commit}"}
            )
        else:
            self._json({"error": "not found"}, 404)

    def _commit(self, name: str, revision: str) -> str | None:
        if name not in self.hub.branches:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = self.hub.branches[name].get(revision, revision)
        if commit not in self.hub.commits[name]:
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def _siblings(self, name: str, commit: str) -> list[dict[str, Any]]:
        found = []
        for file, data in self.hub.commits[name][commit].items():
            entry: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": sha1_of_blob(data)}
            if is_large(file, data):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            found.append(entry | self.hub.listed.get(file, {}))
        return found

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self._bytes(json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}, code)

    def _bytes(self, data: bytes, headers: dict[str, str], code: int = 200) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The hub at an address of this machine, inside the block."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without models, which the client asks instead of huggingface.co, with an empty cache and a token."""
    from huggingface_hub import constants

    hub = Hub()
    with serving(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol that the stand-in does not speak
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_stand_in")
        yield hub
