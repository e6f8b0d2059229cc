"""An exported folder to the hub, in one commit, by the client of huggingface_hub.

Large files go by HTTP (LFS), not by Xet, as downloads do (`transfer`): it is what could be tried.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from rpn_jax.base.errors import InputError
from rpn_jax.weights import prompts_file, transfer
from rpn_jax.weights.checkpoints import PROMPTS, Checkpoint, find
from rpn_jax.weights.exported import ADDRESS, CARD, FILES, holds_paths

# What a repository of a shared model may hold besides: written by the hub, or by its owner.
OWN_FILES = (".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt")
# What the client says itself of an answer of the hub.
_REFUSALS = ("Invalid metadata in README.md", "LFS batch API returned errors")


class Shared(NamedTuple):
  """What `share` did.

  Attributes:
    commit: the newest of the repository.
    changed: whether it was made now.
    page: where a browser finds it.
  """

  commit: str
  changed: bool
  page: str


def check_address(address: str) -> Checkpoint:
  """The repository to upload to.

  Raises:
    InputError: another form than hf://owner/name.
  """
  found = find(address)
  if found is None or found.listed or address != f"hf://{found.repository}":
    raise InputError(
      f"expected hf://owner/name to share to, without revision or file, got {address!r}: use the "
      "name of your account, or of an organization that you may write to"
    )
  return found


def contents(folder: pathlib.Path, address: str) -> dict[str, bytes | pathlib.Path]:
  """What will be uploaded: {name in the repository: path or content}; the card has its address.

  Raises:
    InputError: a folder that holds less or more than an export, or a file that is not one's.
  """
  if not folder.is_dir():
    raise InputError(f"expected the folder of an export, {folder} is none: --mode=export makes one")
  there = sorted(path.name for path in folder.iterdir())
  if missing := [name for name in FILES if name not in there]:
    raise InputError(
      f"expected an export in {folder}, it has no {missing[0]}: --mode=export writes one to "
      "WORKDIR/export"
    )
  if more := [name for name in there if name not in FILES]:
    raise InputError(
      f"expected nothing but {', '.join(FILES)} in {folder}, got also {', '.join(more[:3])}: move "
      "these out, since all of a folder is uploaded"
    )
  content = prompts_file.load(folder / PROMPTS)
  if not content.config.get("clip"):
    raise InputError(
      f"expected the CLIP weights of an export in {folder / PROMPTS}, it names none: share what "
      "--mode=export wrote to WORKDIR/export"
    )
  if holds_paths(content.config):
    raise InputError(
      f"{folder / PROMPTS} names paths of this machine, as of config.clip={content.config['clip']}:"
      " share what --mode=export wrote to WORKDIR/export"
    )
  card = (folder / CARD).read_text(encoding="utf-8").replace(ADDRESS, address)
  return {**{name: folder / name for name in FILES}, CARD: card.encode()}


def share(files: dict[str, bytes | pathlib.Path], repository: str, private: bool = False) -> Shared:
  """Uploads files to a repository, which is created if it is not there.

  Args:
    files: see `contents`.
    repository: owner/name.
    private: create it as private.

  Raises:
    InputError: no token; a repository that is not one's own, holds something else, or is public
      although a private one was asked for; or a transfer that failed. Never is a part committed.
  """
  from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

  if not constants.HF_HUB_OFFLINE and not get_token():
    raise InputError(
      "expected a token of the hub with the right to write, got none: make one at "
      "https://huggingface.co/settings/tokens, then `hf auth login` or HF_TOKEN"
    )
  api = HfApi(endpoint=constants.ENDPOINT)
  with _explained(repository):
    before = _existing(api, repository)
    if before is None:
      api.create_repo(repository, private=private)
    else:
      _check_repository(before, private)
      if _unchanged(before, files):
        return Shared(before.sha, False, f"{constants.ENDPOINT}/{repository}")
    operations = [CommitOperationAdd(name, _source(file)) for name, file in files.items()]
    with _by_http():
      done = api.create_commit(repository, operations, commit_message="A model of rpn_jax")
  return Shared(done.oid, True, f"{constants.ENDPOINT}/{repository}")


def _existing(api: Any, repository: str) -> Any:
  """What the hub tells of a repository; None if there is none."""
  from huggingface_hub.errors import RepositoryNotFoundError

  try:
    return api.model_info(repository, files_metadata=True)
  except RepositoryNotFoundError:
    return None


def _check_repository(info: Any, private: bool) -> None:
  if private and not info.private:
    raise InputError(
      f"hf://{info.id} exists and is public: make it private on its page, or share to another name"
    )
  names = [entry.rfilename for entry in info.siblings or ()]
  strange = [name for name in names if name not in (*FILES, *OWN_FILES)]
  if strange and PROMPTS not in names:
    raise InputError(
      f"hf://{info.id} holds something else ({', '.join(strange[:3])}): share to a repository of "
      "its own"
    )


def _unchanged(info: Any, files: dict[str, bytes | pathlib.Path]) -> bool:
  """Whether a repository has these very files, by the checksums that the hub keeps."""
  known = {e.rfilename: e.lfs.sha256 if e.lfs else e.blob_id for e in info.siblings or ()}
  return all(
    known.get(name) and transfer.checksum_like(file, known[name]) == known[name]
    for name, file in files.items()
  )


def _source(file: bytes | pathlib.Path) -> bytes | str:
  return file if isinstance(file, bytes) else os.fspath(file)


@contextlib.contextmanager
def _by_http() -> Iterator[None]:
  """The client without Xet, and without its bars where there is no terminal."""
  from huggingface_hub import constants, utils

  before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
  bars = not utils.are_progress_bars_disabled()
  if bars and not sys.stderr.isatty():
    utils.disable_progress_bars()
  try:
    yield
  finally:
    constants.HF_HUB_DISABLE_XET = before
    if bars:
      utils.enable_progress_bars()


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
  """
  Raises:
    InputError: for an error of the client, in one line.
  """
  from huggingface_hub import errors

  try:
    with transfer.explained():
      try:
        yield
      except RuntimeError as error:  # of the client, around what a thread of it met
        raise error.__cause__ or transfer.TransferError(str(error)) from None
      except errors.HfHubHTTPError as error:
        if error.response.status_code != 403:
          raise
        raise transfer.TransferError(
          "HTTP 403, you may not write there: the name before the slash has to be your account or "
          "an organization of yours, and the token needs the right to write"
        ) from None
      except ValueError as error:  # of the client, or of JSON
        if not str(error).startswith(_REFUSALS):
          raise
        raise transfer.TransferError(" ".join(str(error).split())) from None
  except transfer.TransferError as error:
    raise InputError(
      f"hf://{repository} was not shared: {error}; a commit has all of the files or is not made"
    ) from None
