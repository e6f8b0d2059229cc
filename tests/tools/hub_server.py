"""A server on the loopback interface that answers as the Hugging Face hub does, or fails to order.

It speaks what huggingface_hub 2.4.0 was seen to request: the list of a repository's files
(`/api/models/…/revision/…`), and `/resolve/` with HEAD and GET. Large files are a redirect to
another host with their size and SHA-256 in the headers, which honors ranges; small ones are a
redirect to the same host, with git's checksum as ETag.

    with serve({"owner/name": {"config.json": b"…"}}) as hub: …  # hub.endpoint is HF_ENDPOINT
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator

COMMIT = "c0ffee" * 6 + "c0de"
LARGE = (".safetensors", ".bin", ".pt")


@dataclasses.dataclass
class Fault:
  """What goes wrong at a place: "api", "resolve", "cdn" (bytes of large files) or "file".

  Attributes:
    status: instead of the answer.
    headers: more of them.
    body: instead of the true one.
    cut: bytes after which the connection is closed.
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
  """

  repositories: dict
  files: dict
  faults: dict
  log: list
  ports: tuple[int, int] = (0, 0)
  if_range: bool = True

  @property
  def endpoint(self) -> str:
    return f"http://127.0.0.1:{self.ports[0]}"

  def url(self, name: str) -> str:
    return f"http://127.0.0.1:{self.ports[1]}/files/{name}"


def git_checksum(content: bytes) -> str:
  return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


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

    def answer(self, body: bool) -> None:
      if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/?]+)(\?.*)?", self.path):
        self.place, files = "api", hub.repositories.get(match[1])
        if files is None:
          return self.send(401, {"X-Error-Code": "RepoNotFound"}, b"Repository not found", body)
        listed = [{"rfilename": name} for name in files]
        content = json.dumps({"id": match[1], "sha": COMMIT, "siblings": listed}).encode()
        return self.send(200, {"Content-Type": "application/json"}, content, body)
      if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
        self.place, name = "resolve", match[3]
        content = hub.repositories.get(match[1], {}).get(name)
        if content is None:
          return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"Entry not found", body)
        headers = {"X-Repo-Commit": COMMIT}
        if name.endswith(LARGE):
          digest = hashlib.sha256(content).hexdigest()
          headers |= {
            "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
            "ETag": '"storage"', "Location": f"http://127.0.0.1:{hub.ports[1]}/cdn/{digest}",
          }  # fmt: skip
          return self.send(302, headers, b"", body)
        headers["Location"] = f"/api/resolve-cache/models/{match[1]}/{name}"
        return self.send(307, headers, b"", body)
      if match := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/(.+)", self.path):
        self.place, content = "small", hub.repositories[match[1]][match[2]]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_checksum(content)}"'}
        return self.send(200, headers, content, body)
      if match := re.fullmatch(r"/cdn/(\w+)", self.path):
        self.place = "cdn"
        every = (content for files in hub.repositories.values() for content in files.values())
        return self.part(next(x for x in every if hashlib.sha256(x).hexdigest() == match[1]), body)
      if self.path == "/api/agent-harnesses":  # asked once a day, by the client on its own behalf
        self.place = "client"
        return self.send(404, {}, b"", body)
      self.place, self.name = "file", self.path.removeprefix("/files/")
      if self.name not in hub.files:
        return self.send(404, {}, b"", body)
      content = hub.files[self.name]
      return self.part(content, body, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

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
