"""Locks in a bucket, which has none: an object that is created only if absent, with a lease."""

import contextlib
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from rpn_jax.base import buckets
from rpn_jax.base.errors import InputError

# A lock that was not renewed for so long belongs to nobody.
LEASE_SECONDS = 60
RENEW_SECONDS = 15
# How often another process's lock is looked at.
POLL_SECONDS = 2


@contextlib.contextmanager
def held(
  path: str | os.PathLike, resource: str, remedy: str = "", *, wait: bool = False
) -> Iterator[None]:
  """Holds a lock during the block; see `paths.locked`.

  The lock is renewed by a thread. One that a killed process left is taken over at once if it was on
  this machine, else when its lease ends, which is waited for. A process that cannot renew its lock
  in time may lose it: the object then has another content.

  Raises:
    InputError: without `wait`, another process, which is named, holds the lock.
    OSError: the storage cannot be reached, or refuses.
  """
  lock = buckets.open_path(path)
  content = f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(8)} {_mark()}\n"
  generation = _acquire(lock, content.encode(), resource, remedy, wait)
  ended, state = threading.Event(), [generation]
  thread = threading.Thread(target=_renew, args=(lock, content.encode(), state, ended), daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join(RENEW_SECONDS)
    with contextlib.suppress(OSError):  # its lease ends by itself
      buckets.remove(lock, state[0])


def _acquire(lock: pathlib.Path, content: bytes, resource: str, remedy: str, wait: bool) -> str:
  """The generation of the lock, once it is ours."""
  seen = None
  while True:
    with contextlib.suppress(FileExistsError):
      return buckets.write(lock, content, "0")
    try:
      found, there = buckets.version(lock), buckets.read(lock)
    except FileNotFoundError:  # given back meanwhile
      continue
    name, _, rest = there.decode(errors="replace").partition("\n")
    holder = " ".join(name.split()) or "another process"
    alive = _is_alive(rest.strip().partition(" ")[2])
    if alive is False or found.age > LEASE_SECONDS:
      with contextlib.suppress(FileExistsError):
        generation = buckets.write(lock, content, found.generation)
        print(f"{resource} was left by {holder}, which is gone: taking over", flush=True)
        return generation
      continue
    renewed = seen not in (None, found.generation)
    if (alive or renewed) and not wait:
      remedy = f", or {remedy}" if remedy else ""
      raise InputError(f"{resource} is in use by {holder}: wait for it to end{remedy}")
    if seen is None:
      print(
        f"{resource} is in use by {holder}: waiting, {LEASE_SECONDS} s at most if it is gone",
        flush=True,
      )
    seen = found.generation
    time.sleep(POLL_SECONDS)


def _renew(lock: pathlib.Path, content: bytes, state: list[str], ended: threading.Event) -> None:
  """Writes the lock again and again, until it is lost or the block has ended."""
  while not ended.wait(RENEW_SECONDS):
    try:
      state[0] = buckets.write(lock, content, state[0])
    except FileExistsError:
      return  # who holds it now has written another content
    except OSError:
      continue


def _mark(pid: int | None = None) -> str:
  """What no other process, of whatever machine, container or time, has: "" where unknown."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    space = os.readlink("/proc/self/ns/pid")
    stat = pathlib.Path(f"/proc/{pid or os.getpid()}/stat").read_text(encoding="utf-8")
    return f"{boot}/{space}/{pid or os.getpid()}/{stat.rpartition(')')[2].split()[19]}"
  except OSError:
    return ""


def _is_alive(mark: str) -> bool | None:
  """Whether the process of a mark is there; None if it is not of this machine."""
  parts = mark.split("/")
  if len(parts) != 4 or parts[:2] != _mark().split("/")[:2]:
    return None
  return _mark(int(parts[2])) == mark
