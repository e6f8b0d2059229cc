"""A server on the loopback interface that answers as the Hugging Face hub does, or fails to order.

It speaks what huggingface_hub 2.4.0 was seen to request: the list of a repository's files
(`/api/models/…`), and `/resolve/` with HEAD and GET. Large files are a redirect to another host
with their size and SHA-256 in the headers, which honors ranges; small ones are a redirect to the
same host, with git's checksum as ETag. An upload creates the repository, asks how each file is to
be sent (preupload), sends large ones as the LFS protocol says, and commits; commits can be read by
their hash.

    with serve({"owner/name": {"config.json": b"…"}}) as hub: …  # hub.endpoint is HF_ENDPOINT
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import re
import threading
import time
from collections.abc import Iterator

from huggingface_hub import constants

COMMIT = "c0ffee" * 6 + "c0de"
LARGE = (".safetensors", ".bin", ".pt", ".png")


@dataclasses.dataclass
class Fault:
  """What goes wrong at a place: "api", "resolve", "cdn" (bytes of large files) or "file"; in an
  upload "create", "yaml", "preupload", "batch", "put" (bytes of large files), "verify" or "commit".

  Attributes:
    status: instead of the answer.
    headers: more of them.
    body: instead of the true one.
    cut: bytes after which the connection is closed, of what is sent or received.
    slow: seconds before the answer.
    times: how often, then all is well, or it goes on with `then`.
  """

  status: int = 0
  headers: dict = dataclasses.field(default_factory=dict)
  body: bytes | None = None
  cut: int | None = None
  slow: float = 0.0
  times: int = 1000
  then: "Fault | None" = None


@dataclasses.dataclass
class Hub:
  """State of the server.

  Attributes:
    repositories: {owner/name: {file: content}}.
    files: {name: content} at `url(name)`, a plain file server that tells versions by ETag.
    faults: {place: Fault}; of a single file at the place "file/NAME".
    log: "METHOD place range authorization" of each request.
    if_range: whether the header of that name is honored.
    users: {token: account}; without any, every token is taken and none may write.
    private: repositories that only their owners see.
    commits: {owner/name: {hash: its files}}, of uploads.
    objects: {SHA-256: content} that was sent and not necessarily committed.
  """

  repositories: dict
  files: dict
  faults: dict
  log: list
  ports: tuple[int, int] = (0, 0)
  if_range: bool = True
  users: dict = dataclasses.field(default_factory=dict)
  private: set = dataclasses.field(default_factory=set)
  commits: dict = dataclasses.field(default_factory=dict)
  objects: dict = dataclasses.field(default_factory=dict)

  def head(self, repository: str) -> str:
    """The hash of the newest commit."""
    return next(reversed(self.commits.get(repository, {COMMIT: {}})))

  def at(self, repository: str, revision: str) -> dict | None:
    """The files of a revision; None if there is no such revision."""
    if revision in ("main", self.head(repository)):
      return self.repositories[repository]
    return self.commits.get(repository, {}).get(revision)

  @property
  def endpoint(self) -> str:
    return f"http://127.0.0.1:{self.ports[0]}"

  def url(self, name: str) -> str:
    return f"http://127.0.0.1:{self.ports[1]}/files/{name}"


def git_checksum(content: bytes) -> str:
  return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def checksum(name: str, content: bytes) -> str:
  """As the hub keeps it: of large files SHA-256, of others git's."""
  return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_checksum(content)


def listed(name: str, content: bytes) -> dict:
  """A file in the list of a repository."""
  entry = {"rfilename": name, "size": len(content), "blobId": git_checksum(content)}
  if name.endswith(LARGE):
    entry["lfs"] = {"size": len(content), "sha256": checksum(name, content), "pointerSize": 135}
  return entry


def make_handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name = ""  # of a file of the plain server

    def log_message(self, *_):
      pass

    def do_HEAD(self):
      self.answer(body=False)

    def do_GET(self):
      self.answer(body=True)

    def do_POST(self):
      self.take()

    def do_PUT(self):
      self.take()

    @property
    def account(self) -> str | None:
      """Of the token; None for one that is not known, "" for none."""
      token = self.headers.get("Authorization", "").removeprefix("Bearer ")
      return hub.users.get(token) if token and hub.users else ""

    def refused(self, repository: str, body: bool) -> bool:
      """Answers what may not be seen: an unknown token, a repository that is private or is not."""
      owner = repository.split("/")[0]
      if self.account is None:
        message = {"X-Error-Message": "Invalid credentials in Authorization header"}
        self.send(401, message, b"", body)
      elif repository not in hub.repositories or (
        repository in hub.private and self.account != owner
      ):
        status = 404 if self.account else 401  # whoever is known hears more
        self.send(status, {"X-Error-Code": "RepoNotFound"}, b"Repository not found", body)
      else:
        return False
      return True

    def answer(self, body: bool) -> None:
      if match := re.fullmatch(
        r"/api/models/([^/]+/[^/?]+)(?:/revision/([^/?]+))?(\?.*)?", self.path
      ):
        self.place = "api"
        if self.refused(match[1], body):
          return None
        files = hub.at(match[1], match[2] or "main")
        if files is None:
          return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
        sha = hub.head(match[1]) if match[2] in (None, "main") else match[2]
        info = {"id": match[1], "sha": sha, "private": match[1] in hub.private}
        info["siblings"] = [listed(name, content) for name, content in files.items()]
        content = json.dumps(info).encode()
        return self.send(200, {"Content-Type": "application/json"}, content, body)
      if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
        self.place, name = "resolve", match[3]
        if self.refused(match[1], body):
          return None
        content = (hub.at(match[1], match[2]) or {}).get(name)
        if content is None:
          return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"Entry not found", body)
        headers = {"X-Repo-Commit": hub.head(match[1])}
        if name.endswith(LARGE):
          digest = hashlib.sha256(content).hexdigest()
          headers |= {
            "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
            "ETag": '"storage"', "Location": f"http://127.0.0.1:{hub.ports[1]}/cdn/{digest}",
          }  # fmt: skip
          return self.send(302, headers, b"", body)
        headers["Location"] = f"/api/resolve-cache/models/{match[1]}/{match[2]}/{name}"
        return self.send(307, headers, b"", body)
      if match := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)", self.path):
        self.place, content = "small", hub.at(match[1], match[2])[match[3]]
        headers = {"X-Repo-Commit": hub.head(match[1]), "ETag": f'"{git_checksum(content)}"'}
        return self.send(200, headers, content, body)
      if match := re.fullmatch(r"/cdn/(\w+)", self.path):
        self.place = "cdn"
        trees = [*hub.repositories.values(), *(t for c in hub.commits.values() for t in c.values())]
        every = (content for files in trees for content in files.values())
        return self.part(next(x for x in every if hashlib.sha256(x).hexdigest() == match[1]), body)
      if self.path == "/api/agent-harnesses":  # asked once a day, by the client on its own behalf
        self.place = "client"
        return self.send(404, {}, b"", body)
      self.place, self.name = "file", self.path.removeprefix("/files/")
      if self.name not in hub.files:
        return self.send(404, {}, b"", body)
      content = hub.files[self.name]
      return self.part(content, body, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    # Uploads

    def take(self) -> None:
      """POST and PUT."""
      length, path = int(self.headers.get("Content-Length", 0)), self.path.partition("?")[0]
      if match := re.fullmatch(r"/lfs/(\w+)", path):
        self.place, fault = "put", hub.faults.get("put")
        if fault and fault.times > 0 and fault.cut is not None:
          self.rfile.read(min(fault.cut, length))
          fault.times -= 1
          hub.log.append("PUT put cut")
          self.close_connection = True
          return self.connection.close()
        content = self.rfile.read(length)
        if hashlib.sha256(content).hexdigest() != match[1]:
          return self.send(400, {}, b"another content than was announced", True)
        hub.objects[match[1]] = content
        return self.send(200, {}, b"", True)
      body = self.rfile.read(length)
      if path == "/api/repos/create":
        return self.create(json.loads(body))
      if path == "/api/validate-yaml":
        self.place = "yaml"
        lines = json.loads(body)["content"].splitlines()
        if lines[0] != "---" or not any(line.startswith("license: ") for line in lines):
          errors = {"errors": [{"message": '"license" must be a string'}], "warnings": []}
          return self.say(errors, 400)
        return self.say({"errors": [], "warnings": []})
      if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
        self.place, repository = match[2], match[1]
        action = self.preupload if match[2] == "preupload" else self.commit
      elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
        self.place, repository, action = "batch", match[1], self.batch
      elif match := re.fullmatch(r"/([^/]+/[^/]+)/verify", path):
        self.place, repository, action = "verify", match[1], self.verify
      else:
        self.place = "unknown"
        return self.send(404, {}, b"", True)
      if self.refused(repository, True):
        return None
      if self.account != repository.split("/")[0]:
        return self.send(403, {}, b"You don't have write access", True)
      return action(repository, body)

    def say(self, content: dict, status: int = 200) -> None:
      headers = {"Content-Type": "application/json"}
      self.send(status, headers, json.dumps(content).encode(), True)

    def create(self, wanted: dict) -> None:
      self.place, repository = "create", f"{wanted['organization']}/{wanted['name']}"
      if not self.account:
        message = {"X-Error-Message": "Invalid credentials in Authorization header"}
        return self.send(401, message, b"", True)
      if self.account != wanted["organization"]:
        return self.send(403, {}, b"You don't have the rights to create a model there", True)
      if repository in hub.repositories:
        return self.send(409, {}, b"You already created this model repo", True)
      hub.repositories[repository] = {".gitattributes": b"*.safetensors filter=lfs"}
      if wanted.get("visibility") == "private":
        hub.private.add(repository)
      return self.say({"url": f"{hub.endpoint}/{repository}"})

    def preupload(self, repository: str, body: bytes) -> None:
      answers = []
      for file in json.loads(body)["files"]:
        content = hub.repositories[repository].get(file["path"])
        large = file["path"].endswith(LARGE)
        answers.append({
          "path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
          "oid": None if content is None else checksum(file["path"], content),
        })  # fmt: skip
      self.say({"files": answers})

    def batch(self, repository: str, body: bytes) -> None:
      objects = []
      for wanted in json.loads(body)["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.objects:
          answer["actions"] = {
            "upload": {"href": f"http://127.0.0.1:{hub.ports[1]}/lfs/{wanted['oid']}"},
            "verify": {"href": f"{hub.endpoint}/{repository}/verify"},
          }
        objects.append(answer)
      self.say({"transfer": "basic", "objects": objects})

    def verify(self, repository: str, body: bytes) -> None:
      sent = json.loads(body)
      right = len(hub.objects.get(sent["oid"], b"")) == sent["size"]
      self.send(200 if right else 404, {}, b"", True)

    def commit(self, repository: str, body: bytes) -> None:
      files = dict(hub.repositories[repository])
      for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
          files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
          if value["oid"] not in hub.objects:
            return self.send(400, {}, b"this object was not uploaded", True)
          files[value["path"]] = hub.objects[value["oid"]]
      commits = hub.commits.setdefault(repository, {COMMIT: hub.repositories[repository]})
      sha = hashlib.sha1(str(len(commits)).encode() + body).hexdigest()
      fault = hub.faults.get("commit")
      if not (fault and fault.times > 0):
        commits[sha] = hub.repositories[repository] = files
      self.say({"commitUrl": f"{hub.endpoint}/{repository}/commit/{sha}", "commitOid": sha})

    def part(self, content: bytes, body: bool, version: dict | None = None) -> None:
      version = version or {}
      match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
      if hub.if_range and self.headers.get("If-Range", version.get("ETag")) != version.get("ETag"):
        match = None
      begin = int(match[1]) if match else 0
      if match and begin >= len(content):
        return self.send(416, {"Content-Range": f"bytes */{len(content)}"}, b"", body)
      headers = {"Content-Type": "application/octet-stream", **version}
      if match:
        headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
      return self.send(206 if match else 200, headers, content[begin:], body)

    def send(self, status: int, headers: dict, content: bytes, body: bool) -> None:
      asked = (self.headers.get("Range", "-"), "token" if "Authorization" in self.headers else "-")
      if self.place != "client":
        hub.log.append(" ".join((self.command, self.place, *asked)))
      fault = hub.faults.get(f"{self.place}/{self.name}", hub.faults.get(self.place))
      if fault and fault.times <= 0:
        fault = fault.then
      cut = None
      if fault and fault.times > 0:
        fault.times -= 1
        time.sleep(fault.slow)
        cut = fault.cut
        headers |= fault.headers
        if fault.status:
          status, content = fault.status, b""
          headers.pop("X-Error-Code", None)
          headers |= fault.headers
        content = content if fault.body is None else fault.body
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      if body:
        self.wfile.write(content[:cut])
      if cut is not None:
        self.close_connection = True

  return Handler


class Server(http.server.ThreadingHTTPServer):
  daemon_threads = True

  def handle_error(self, request, client_address):
    """A client that hangs up is part of the tests."""


def point_client(hub: Hub, folder: pathlib.Path, monkeypatch) -> None:
  """Lets huggingface_hub of this process talk to the server, with empty caches in a folder."""
  template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
  monkeypatch.delenv("HF_TOKEN", raising=False)
  for name, value in {
    "ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
    "HF_HUB_CACHE": str(folder / "hub"), "HF_TOKEN_PATH": str(folder / "token"),
  }.items():  # fmt: skip
    monkeypatch.setattr(constants, name, value)


@contextlib.contextmanager
def serve(repositories: dict, files: dict | None = None) -> Iterator[Hub]:
  """Serves until the block ends, on two ports: the hub, and the host of the bytes."""
  hub = Hub(repositories, files or {}, {}, [])
  handler = make_handler(hub)
  servers = [Server(("127.0.0.1", 0), handler) for _ in range(2)]
  hub.ports = tuple(server.server_address[1] for server in servers)
  threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
  for thread in threads:
    thread.start()
  try:
    yield hub
  finally:
    for server, thread in zip(servers, threads):
      server.shutdown()
      server.server_close()
      thread.join()
