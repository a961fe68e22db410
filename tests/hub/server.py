"""A model hub in one file, for tests: speaks the calls that huggingface_hub makes for downloads and small uploads.

Repositories are held in memory, as branches of commits. A repository in `private` asks for the token `TOKEN`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"


class Hub:
    """Repositories: name -> branch -> list of (commit id, files by path)."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, list[tuple[str, dict[str, bytes]]]]] = {}
        self.private: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.messages: list[str] = []

    def commit(self, repo: str, files: dict[str, bytes | None], branch: str = "main") -> str:
        """Add (or, with None, delete) files on a branch; returns the commit's id."""
        branches = self.repos.setdefault(repo, {"main": []})
        start = branches.get(branch) or branches["main"]
        held = dict(start[-1][1]) if start else {}
        for path, content in files.items():
            held.pop(path, None)
            if content is not None:
                held[path] = content
        number = sum(len(commits) for commits in branches.values())
        name = hashlib.sha1(f"{repo} {branch} {number}".encode()).hexdigest()
        branches.setdefault(branch, []).append((name, held))
        return name

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit id and files at a branch or a commit."""
        branches = self.repos[repo]
        if revision in branches:
            return branches[revision][-1] if branches[revision] else ("0" * 40, {})
        return next((c for commits in branches.values() for c in commits if c[0] == revision), None)

    def serve(self) -> tuple[ThreadingHTTPServer, str]:
        """Start in a thread on a free port; returns the server and its address."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def answer(self, body: Any = b"", status: int = 200, **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: str, status: int = 404) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def allowed(self, repo: str) -> bool:
        """Whether the repository is there for this caller; answers for it where not."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo not in self.hub.repos or (repo in self.hub.private and token != TOKEN):
            self.refuse("RepoNotFound", 401 if repo in self.hub.private else 404)
            return False
        return True

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if path == "/api/whoami-v2":
            self.answer({"name": "tester", "type": "user", "orgs": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path):
            self.listing(found[1], found[2], found[3] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(found[1], found[2], found[3])
        else:
            self.refuse("NotFound")

    do_HEAD = do_GET  # noqa: N815

    def listing(self, repo: str, kind: str | None, revision: str) -> None:
        if not self.allowed(repo):
            return
        commit = self.hub.at(repo, revision)
        if commit is None:
            self.refuse("RevisionNotFound")
        elif kind == "tree":
            self.answer([{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                         for p, c in sorted(commit[1].items())])  # fmt: skip
        else:
            self.answer({"id": repo, "modelId": repo, "sha": commit[0], "private": repo in self.hub.private, "tags": [],
                         "downloads": 0, "likes": 0, "siblings": [{"rfilename": p} for p in sorted(commit[1])]})  # fmt: skip

    def file(self, repo: str, revision: str, name: str) -> None:
        if not self.allowed(repo):
            return
        commit = self.hub.at(repo, revision)
        if commit is None:
            self.refuse("RevisionNotFound")
        elif name not in commit[1]:
            self.answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit[0])
        else:
            content = commit[1][name]
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit[0],
                        Content_Type="application/octet-stream")  # fmt: skip

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        if path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization", "") != f"Bearer {TOKEN}":
            self.refuse("Unauthorized", 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
            if self.allowed(found[1]):
                getattr(self, found[2])(found[1], found[3], body)
        else:
            self.refuse("NotFound")

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        if repo in self.hub.repos:
            self.answer({"error": "there already", "url": self.address(repo)}, 409)
            return
        self.hub.repos[repo] = {"main": []}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        self.answer({"url": self.address(repo), "name": repo, "id": repo})

    def address(self, repo: str) -> str:
        return f"http://{self.headers['Host']}/{repo}"

    def branch(self, repo: str, name: str, body: bytes) -> None:
        self.hub.repos[repo].setdefault(name, list(self.hub.repos[repo]["main"]))
        self.answer({})

    def preupload(self, repo: str, revision: str, body: bytes) -> None:
        if revision not in self.hub.repos[repo]:
            self.refuse("RevisionNotFound")
            return
        files = json.loads(body)["files"]
        self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})

    def commit(self, repo: str, revision: str, body: bytes) -> None:
        files: dict[str, bytes | None] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                files[value["path"]] = None
        name = self.hub.commit(repo, files, revision)
        self.answer({"success": True, "commitOid": name, "commitUrl": f"{self.address(repo)}/commit/{name}"})
