"""Google Cloud Storage on loopback: the part of its JSON API that gcsfs and tensorstore speak.

    python -m tests.tools.bucket_server --port=9000 bucket

Objects are kept in memory. Conditions on generations hold, as a lock needs them, and requests can
be made to fail. Clients find it by `environment(port)`.
"""

import argparse
import base64
import datetime
import email.utils
import http.server
import json
import re
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
LISTING = re.compile(r"/storage/v1/b/([^/]+)/o/?")
BUCKET = re.compile(r"/storage/v1/b/([^/]+)")
UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")
COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")


def environment(port: int) -> dict[str, str]:
  """Variables with which clients speak to this server, and to no other."""
  url = f"http://127.0.0.1:{port}"
  return {
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
  }


class Refused(Exception):
  """An answer that is an error: its status and words."""


class Store:
  """Buckets, and what happens to requests.

  Attributes:
    buckets: bucket -> name -> {"data": bytes, and the fields of its metadata}.
    fault: (method, path with query) -> None to answer, a status to fail with, 0 to hang up.
    writable: whether objects may be written and deleted.
    clock: seconds by which the server's clock is ahead.
    requests: methods and paths of what was asked.
  """

  def __init__(self, *buckets: str):
    self.buckets: dict[str, dict[str, dict]] = {name: {} for name in buckets}
    self.fault: Callable[[str, str], int | None] = lambda method, path: None
    self.writable = True
    self.clock = 0.0
    self.requests: list[tuple[str, str]] = []
    self.uploads: dict[str, tuple[str, str, dict, bytearray]] = {}
    self.generation = 0
    self.lock = threading.RLock()

  def bucket(self, name: str) -> dict:
    if name not in self.buckets:
      raise Refused(404, "The specified bucket does not exist.")
    return self.buckets[name]

  def find(self, bucket: str, name: str) -> dict:
    found = self.bucket(bucket).get(name)
    if found is None:
      raise Refused(404, f"No such object: {bucket}/{name}")
    return found

  def write(self, bucket: str, name: str, data: bytes, query: dict) -> dict:
    import google_crc32c  # comes with gcsfs

    with self.lock:
      objects = self.bucket(bucket)
      self.check_write(objects.get(name), query)
      self.generation += 1
      crc = struct.pack(">I", google_crc32c.value(data))
      seconds = datetime.timedelta(seconds=self.clock)
      now = (datetime.datetime.now(datetime.UTC) + seconds).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
      objects[name] = {
        "kind": "storage#object", "name": name, "bucket": bucket, "data": data,
        "size": str(len(data)), "generation": str(self.generation), "metageneration": "1",
        "updated": now, "timeCreated": now, "crc32c": base64.b64encode(crc).decode(),
        "contentType": "application/octet-stream",
      }  # fmt: skip
      return objects[name]

  def check_write(self, there: dict | None, query: dict) -> None:
    if not self.writable:
      raise Refused(403, "does not have storage.objects.create access to the object")
    wanted = query.get("ifGenerationMatch")
    if wanted is not None and wanted != (there["generation"] if there else "0"):
      raise Refused(412, "At least one of the pre-conditions you specified did not hold.")

  def delete(self, bucket: str, name: str, query: dict) -> None:
    with self.lock:
      self.check_write(self.find(bucket, name), query)
      del self.bucket(bucket)[name]

  def list(self, bucket: str, query: dict) -> dict:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    items, prefixes = [], set()
    for name, found in sorted(self.bucket(bucket).items()):
      start, end = query.get("startOffset", ""), query.get("endOffset")
      if not name.startswith(prefix) or name < start or (end and name >= end):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
      else:
        items.append(metadata(found))
    size, skip = int(query.get("maxResults", 1000)), int(query.get("pageToken", 0))
    page = {"kind": "storage#objects", "items": items[skip : skip + size]}
    if len(items) > skip + size:
      page["nextPageToken"] = str(skip + size)
    return page | ({"prefixes": sorted(prefixes)} if prefixes and not skip else {})


def metadata(found: dict) -> dict:
  return {key: value for key, value in found.items() if key != "data"}


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  store: Store

  def log_message(self, *_) -> None:
    pass

  def date_time_string(self, timestamp: float | None = None) -> str:
    return super().date_time_string(timestamp or time.time() + self.store.clock)

  def handle_one(self) -> None:
    body = self.body()
    self.store.requests.append((self.command, self.path))
    fault = self.store.fault(self.command, self.path)
    if fault == 0:
      self.close_connection = True
      self.connection.close()
      return
    try:
      if fault:
        raise Refused(fault, "made to fail")
      self.reply(*self.answer(self.command, self.path, body))
    except Refused as refused:
      status, text = refused.args
      error = {"code": status, "message": text, "errors": [{"message": text}]}
      self.reply(status, json.dumps({"error": error}).encode())

  do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = handle_one

  def body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    parts = []
    while size := int(self.rfile.readline().split(b";")[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def reply(self, status: int, content: bytes = b"", headers: dict | None = None) -> None:
    self.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def answer(self, method: str, url: str, body: bytes) -> tuple:
    """Status, content and headers."""
    parts = urllib.parse.urlsplit(url)
    query = {k: v[0] for k, v in urllib.parse.parse_qs(parts.query).items()}
    quoted = lambda match: [urllib.parse.unquote(group) for group in match.groups()]
    path, store = parts.path, self.store
    if path == "/batch/storage/v1":
      return self.batch(body)
    if match := UPLOAD.fullmatch(path):
      return self.upload(*quoted(match), query, body)
    if match := COPY.fullmatch(path):
      source, name, target, new = quoted(match)
      copied = metadata(store.write(target, new, store.find(source, name)["data"], query))
      return 200, json.dumps({"done": True, "resource": copied, **copied}).encode()
    if match := OBJECT.fullmatch(path):
      bucket, name = quoted(match)
      if method == "DELETE":
        store.delete(bucket, name, query)
        return 204, b""
      found = store.find(bucket, name)
      if query.get("alt") == "media":
        return self.media(found)
      return 200, json.dumps(metadata(found)).encode()
    if match := LISTING.fullmatch(path):
      return 200, json.dumps(store.list(*quoted(match), query)).encode()
    if match := BUCKET.fullmatch(path):
      (name,) = quoted(match)
      store.bucket(name)
      return 200, json.dumps({"kind": "storage#bucket", "name": name}).encode()
    raise Refused(404, f"Not Found: {method} {path}")

  def media(self, found: dict) -> tuple:
    data, size = found["data"], len(found["data"])
    headers = {
      "Content-Type": "application/octet-stream",
      "x-goog-generation": found["generation"],
      "x-goog-hash": f"crc32c={found['crc32c']}",
      "Last-Modified": email.utils.formatdate(usegmt=True),
    }
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if not match:
      return 200, data, headers
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= size:
      raise Refused(416, "The requested range cannot be satisfied.")
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return 206, data[start:stop], headers

  def upload(self, bucket: str, query: dict, body: bytes) -> tuple:
    store, kind = self.store, query.get("uploadType")
    if kind == "resumable" and "upload_id" not in query:
      store.bucket(bucket)
      name = query.get("name") or json.loads(body)["name"]
      store.check_write(None, {})
      number = str(len(store.uploads))
      store.uploads[number] = (bucket, name, query, bytearray())
      where = f"http://{self.headers['Host']}{self.path.split('?')[0]}"
      return 200, b"", {"Location": f"{where}?uploadType=resumable&upload_id={number}"}
    if "upload_id" in query:
      bucket, name, first, data = store.uploads[query["upload_id"]]
      match = re.fullmatch(r"bytes (\*|(\d+)-(\d+))/(\*|\d+)", self.headers["Content-Range"])
      if match[2]:
        data[int(match[2]) :] = body
      if match[4] == "*" or len(data) < int(match[4]):
        return 308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {}
      return 200, json.dumps(metadata(store.write(bucket, name, bytes(data), first))).encode()
    if kind == "multipart":
      boundary = re.search(r"boundary=['\"]?([^'\"]+)", self.headers["Content-Type"])[1].encode()
      _, described, content, _ = body.split(b"--" + boundary, 3)
      name = json.loads(described.split(b"\r\n\r\n" if b"\r\n\r\n" in described else b"\n\n", 1)[1])
      separator = b"\r\n\r\n" if b"\r\n\r\n" in content else b"\n\n"
      content = content.split(separator, 1)[1]
      content = content[: -2 if content.endswith(b"\r\n") else -1]
      found = store.write(bucket, query.get("name") or name["name"], content, query)
    else:
      found = store.write(bucket, query["name"], body, query)
    return 200, json.dumps(metadata(found)).encode(), {"x-goog-generation": found["generation"]}

  def batch(self, body: bytes) -> tuple:
    boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
    answers = []
    for part in body.split(b"--" + boundary)[1:-1]:
      method, url = re.search(rb"(DELETE|GET|PATCH) (\S+) HTTP", part).groups()
      number = re.search(rb"Content-ID: (\S+)", part, re.IGNORECASE)
      try:
        status, content, *_ = self.answer(method.decode(), urllib.parse.urlsplit(url.decode()).path
                                          , b"")  # fmt: skip
      except Refused as refused:
        status, content = refused.args[0], json.dumps({"error": refused.args[1]}).encode()
      known = number[1].decode().strip("<>") if number else ""
      answers.append(
        f"--answer\r\nContent-Type: application/http\r\nContent-ID: <response-{known}>\r\n\r\n"
        f"HTTP/1.1 {status} -\r\nContent-Length: {len(content)}\r\n\r\n{content.decode()}\r\n"
      )
    text = "".join(answers) + "--answer--\r\n"
    return 200, text.encode(), {"Content-Type": "multipart/mixed; boundary=answer"}


class Server:
  """The server in a thread of this process, as a context manager.

  Attributes:
    store: its buckets.
    port: where it listens.
  """

  def __init__(self, *buckets: str, port: int = 0):
    self.store = Store(*buckets)
    handler = type("Bound", (Handler,), {"store": self.store})
    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    self._server.handle_error = lambda *_: None  # clients hang up on what they no longer want
    self.port = self._server.server_address[1]

  def __enter__(self) -> "Server":
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._server.shutdown()
    self._server.server_close()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("buckets", nargs="+")
  parser.add_argument("--port", type=int, default=9000)
  args = parser.parse_args()
  with Server(*args.buckets, port=args.port) as server:
    for name, value in environment(server.port).items():
      print(f"export {name}={value}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
  main()
