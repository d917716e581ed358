"""A Hub on the loopback interface, in memory, with the routes that huggingface_hub's client uses; it can be broken on
purpose.

    with HubServer() as hub:
        subprocess.run([...], env=os.environ | hub.environment(home, "ada"))

Clients read their endpoint when they are imported, so they run in processes of their own.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


# Token -> account. `grace` may only read, `linus` writes for his organization too.
TOKENS = {
    f"hf_{name}{'x' * 30}": {"name": name, "orgs": orgs, "auth": {"accessToken": {"displayName": "t", "role": role}}}
    for name, role, orgs in (
        ("ada", "write", []),
        ("grace", "read", []),
        ("linus", "write", [{"name": "linux", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}]),
        ("eve", "fineGrained", []),  # of a token that may write nowhere
    )
}
LARGE = (".safetensors", ".parquet", ".png")


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def entry(self, path: str) -> dict:
        """As a tree lists it. The git hash of a large file is that of its pointer."""
        content = self.content
        if self.is_large:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n".encode()
            )
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        large = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": len(content)}}
        return {"type": "file", "path": path, "size": len(self.content), "oid": git} | (large if self.is_large else {})


@dataclass
class Repository:
    """Commits are whole trees; a branch, or a commit's own hash, names one."""

    is_private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        listing = json.dumps([len(self.commits), *((path, blob.sha256) for path, blob in sorted(files.items()))])
        name = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path has a match of `pattern`.

    kind: "error" (answer 500), "truncate" (half of a file, then the connection closes), "damage" (a byte is flipped on
        its way), "lose answer" (done, and the connection closes), "slow" (`seconds` late).
    """

    method: str
    pattern: str
    kind: str
    times: int = 1
    seconds: float = 0.0


class Answer(Exception):
    """Ends the handling of a request."""

    def __init__(self, status: int, body: object = None, code: str | None = None, **headers: str):
        self.status, self.body, self.code, self.headers = status, body, code, headers


class HubServer:
    """Repositories by (type, name), faults to come, and the requests that came, as "METHOD path"."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, name: str | None = None) -> dict[str, str]:
        """Variables of a client of this server, with the token of `name`."""
        token = next((token for token, account in TOKENS.items() if account["name"] == name), "")
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
        return own | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def break_next(self, *fault, **fields) -> None:
        self.faults = [Fault(*fault, **fields)]

    def files(self, name: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[kind, name]
        return {path: blob.content for path, blob in repository.commits[repository.resolve(revision)].items()}

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.pattern, path):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_any(self):
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.payload = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.account = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            self.fault = self.hub.take_fault(self.command, path)
        kind = self.fault.kind if self.fault else None
        if kind == "slow":
            time.sleep(self.fault.seconds)
        try:
            if kind == "error":
                raise Answer(500, {"error": "Internal Error"})
            with self.hub.lock:
                self.route(path)
            raise Answer(404, {"error": f"no route {path}"})
        except Answer as answer:
            if kind == "lose answer":
                self.close_connection = True
                return
            self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def send(self, answer: Answer):
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in answer.headers.items()}}
        if answer.code:
            headers["X-Error-Code"] = answer.code
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        kind = self.fault.kind if self.fault else None
        if self.command != "HEAD":
            if kind == "damage" and self.command == "GET":
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.wfile.write(body[: len(body) // 2] if kind == "truncate" else body)
        self.close_connection |= kind == "truncate"

    # ------------------------------------------------------------------------------------------------------ routes

    def route(self, path: str):
        fixed = {"/api/whoami-v2": self.whoami, "/api/repos/create": self.create}
        if path in fixed:
            fixed[path]()
        if path == "/api/validate-yaml":
            raise Answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/lfs/(\w+)(/verify)?", path):
            self.large_file(found[1], verify=bool(found[2]))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch()
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/((?:refs/[^/]+/)?[^/]+)/(.+)", path):
            self.resolve(found[1] or "models/", found[2], found[3], found[4])
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
            repository = self.repository(found[1], found[2])
            action, _, rest = (found[3] or "revision/main").partition("/")
            handler = getattr(self, f"on_{action.replace('-', '_')}", None)
            if handler is not None:
                handler(repository, found[2], rest)

    def whoami(self):
        raise Answer(200, {"type": "user", **self.account}) if self.account else Answer(401, {"error": "Invalid token"})

    def may_write(self, owner: str):
        if self.account is None:
            raise Answer(401, {"error": "Invalid username or password."})
        organizations = [o["name"] for o in self.account["orgs"] if o["roleInOrg"] == "write"]
        allowed = self.account["auth"]["accessToken"]["role"] == "write"
        if not allowed or owner not in [self.account["name"], *organizations]:
            raise Answer(403, {"error": f"You don't have the rights to write to {owner}"})

    def create(self):
        wanted = json.loads(self.payload)
        owner = wanted.get("organization") or (self.account or {}).get("name")
        self.may_write(owner)
        name, kind = f"{owner}/{wanted['name']}", f"{wanted.get('type') or 'model'}s"
        prefix = "datasets/" if kind == "datasets" else ""
        body = {"url": f"{self.hub.endpoint}/{prefix}{name}", "name": name}
        if (kind, name) in self.hub.repositories:
            raise Answer(409, {"error": "You already created this repo"} | body)
        repository = self.hub.repositories[kind, name] = Repository(wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        raise Answer(200, body)

    def repository(self, kind: str, name: str) -> Repository:
        repository = self.hub.repositories.get((kind, name))
        own = self.account and self.account["name"] == name.split("/")[0]
        if repository is None or (repository.is_private and not own):
            raise Answer(401, {"error": "Repository not found"}, code="RepoNotFound")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> str:
        found = repository.resolve(revision)
        if found is None:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, code="RevisionNotFound")
        return found

    def on_revision(self, repository: Repository, name: str, revision: str):
        commit = self.commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        about = {"id": name, "sha": commit, "private": repository.is_private, "siblings": siblings, "tags": []}
        raise Answer(200, about | {"downloads": 0, "likes": 0, "lastModified": "2025-01-01T00:00:00.000Z"})

    def entries(self, files: dict[str, Blob]) -> dict[str, dict]:
        folders = {p for path in files for p in (path.rsplit("/", n)[0] for n in range(1, path.count("/") + 1))}
        listed = {f: {"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders}
        return listed | {path: blob.entry(path) for path, blob in files.items()}

    def on_tree(self, repository: Repository, name: str, rest: str):
        revision, _, below = rest.partition("/")
        entries = self.entries(repository.commits[self.commit_of(repository, revision)])
        if below and below not in entries:
            raise Answer(404, {"error": "not found"}, code="EntryNotFound")
        start = below + "/" if below else ""
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        chosen = [p for p in entries if p.startswith(start) and (deep or "/" not in p.removeprefix(start))]
        raise Answer(200, [entries[path] for path in sorted(chosen)])

    def on_paths_info(self, repository: Repository, name: str, revision: str):
        paths = parse_qs(self.payload.decode()).get("paths", [])
        entries = self.entries(repository.commits[self.commit_of(repository, revision)])
        raise Answer(200, [entries[path] for path in paths if path in entries])

    def on_branch(self, repository: Repository, name: str, branch: str):
        self.may_write(name.split("/")[0])
        if branch in repository.branches:
            raise Answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = repository.branches["main"]
        raise Answer(200, {})

    def on_preupload(self, repository: Repository, name: str, revision: str):
        self.may_write(name.split("/")[0])
        files = repository.commits[self.commit_of(repository, revision)]
        answer = []
        for file in json.loads(self.payload)["files"]:
            path, there = file["path"], files.get(file["path"])
            oid = there and (there.sha256 if there.is_large else there.entry(path)["oid"])
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": answer})

    def batch(self):
        objects = []
        for one in json.loads(self.payload)["objects"]:
            href = f"{self.hub.endpoint}/lfs/{one['oid']}"
            actions = {"upload": {"href": f"{href}?signature=secret"}, "verify": {"href": f"{href}/verify"}}
            objects.append(one | ({} if one["oid"] in self.hub.large else {"actions": actions}))
        raise Answer(200, {"objects": objects, "transfer": "basic"})

    def large_file(self, oid: str, verify: bool):
        if self.command == "PUT":
            damaged = self.fault and self.fault.kind == "damage"
            self.hub.large[oid] = self.payload[:-1] + bytes([self.payload[-1] ^ 1]) if damaged else self.payload
            raise Answer(200, {})
        content = self.hub.large.get(oid, b"")
        if hashlib.sha256(content).hexdigest() != oid:
            self.hub.large.pop(oid, None)
            raise Answer(422, {"error": f"SHA-256 of the upload is not {oid}"})
        if verify:
            raise Answer(200, {})
        self.send_content(content, {})

    def send_content(self, content: bytes, headers: dict[str, str]):
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, size = int(found[1]), len(content)
            last = min(int(found[2] or size - 1), size - 1)
            headers |= {"Content_Range": f"bytes {first}-{last}/{size}"}
            raise Answer(206, content[first : last + 1], **headers)
        raise Answer(200, content, **headers)

    def on_commit(self, repository: Repository, name: str, branch: str):
        self.may_write(name.split("/")[0])
        head = self.commit_of(repository, branch)
        files, large = dict(repository.commits[head]), self.hub.large
        for item in map(json.loads, self.payload.splitlines()):
            key, value = item["key"], item["value"]
            if key == "header" and value.get("parentCommit") not in (None, head):
                raise Answer(412, {"error": "the branch has moved"})
            if key == "lfsFile" and value["oid"] not in large:
                raise Answer(400, {"error": f"large file {value['path']} was not uploaded"})
            if key == "lfsFile":
                files[value["path"]] = Blob(large[value["oid"]], True)
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            if key == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(branch, files)
        raise Answer(
            200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}"}
        )

    def resolve(self, kind: str, name: str, revision: str, path: str):
        repository = self.repository(kind.rstrip("/"), name)
        commit = self.commit_of(repository, revision)
        blob = repository.commits[commit].get(path)
        if blob is None:
            raise Answer(404, {"error": "Entry not found"}, code="EntryNotFound", X_Repo_Commit=commit)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{blob.sha256 if blob.is_large else blob.entry(path)["oid"]}"'}
        if not blob.is_large:
            self.send_content(blob.content, headers)
        # On another host, as the Hub's store is: the client follows no redirection of a HEAD to there.
        place = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/lfs/{blob.sha256}"
        headers |= {"X_Linked_ETag": headers["ETag"], "X_Linked_Size": str(len(blob.content)), "Location": place}
        raise Answer(302, b"", **headers)
