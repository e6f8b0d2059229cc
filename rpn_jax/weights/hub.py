"""Weights by name: fetched once, converted once, then read from the cache folder without a network.

The cache holds a file of this project's safetensors per name, written atomically; its header says
where it is from. Only the process with the lock fetches; the others of a host wait for its file.
"""

import contextlib
import glob
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from rpn_jax.base import paths
from rpn_jax.base.errors import InputError
from rpn_jax.weights import transfer
from rpn_jax.weights.arrays import read_index, read_safetensors
from rpn_jax.weights.checkpoints import ANY_LAYOUT, CHECKPOINTS, INDEX, PROMPTS, Checkpoint, find
from rpn_jax.weights.transfer import TransferError, checksum_like

# (file or folder of weights, checkpoint, file to write, header entries): checks and converts.
Convert = Callable[[pathlib.Path, Checkpoint, pathlib.Path, dict[str, str]], None]

# What tells the architecture, the normalization and the tokenizer, beside the weights.
_CONFIGS = (
  "config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json",
  "tokenizer_config.json", "tokenizer.json", "vocab.json",
)  # fmt: skip


def folder() -> pathlib.Path:
  """Where weights are kept; it may not exist, or not be writable.

  Raises:
    InputError: there is no home folder.
  """
  try:
    return paths.cache_path() / "weights"
  except RuntimeError as error:
    raise InputError(f"{error}, so weights cannot be kept: set XDG_CACHE_HOME") from None


def cached(checkpoint: Checkpoint) -> pathlib.Path:
  """The file of converted weights, which may not exist yet."""
  return folder() / f"{checkpoint.slug}.safetensors"


def get(checkpoint: Checkpoint, convert: Convert) -> pathlib.Path:
  """The file of converted weights, fetched if it is not here yet.

  Raises:
    InputError: the weights cannot be fetched, or are not what they should be.
  """
  path = cached(checkpoint)
  if not path.exists():
    with _locked(checkpoint):
      if not path.exists():  # another process may have been faster
        _fetch(checkpoint, path, convert)
  return path


def adopt(checkpoint: Checkpoint, source: pathlib.Path, convert: Convert) -> pathlib.Path:
  """Takes weights that were downloaded by hand as those of a name.

  Raises:
    InputError: they are not what they should be.
  """
  with _locked(checkpoint):
    convert(source, checkpoint, cached(checkpoint), {"origin": str(source)})
  _say_here(checkpoint)
  return cached(checkpoint)


def remove(checkpoint: Checkpoint) -> int:
  """Removes the weights of a name, and what an interrupted transfer left; returns the bytes."""
  with _locked(checkpoint):
    written = [cached(checkpoint), *_half_written(checkpoint)]
    files = [*written, *_unfinished(checkpoint).rglob("*")]
    size = sum(file.stat().st_size for file in files if file.is_file())
    for file in written:
      file.unlink(missing_ok=True)
    shutil.rmtree(_unfinished(checkpoint), ignore_errors=True)
  return size


def state(checkpoint: Checkpoint) -> str:
  """What is here of a checkpoint, for a table."""
  if cached(checkpoint).exists():
    return f"{cached(checkpoint).stat().st_size / transfer.MB:,.0f} MB"
  parts = sum(file.stat().st_size for file in _unfinished(checkpoint).rglob("*.part"))
  return f"{parts / transfer.MB:,.0f} MB so far" if parts else ""


def others() -> list[Checkpoint]:
  """Checkpoints that are here by an address of their own, hf://owner/name."""
  names = [read_safetensors(file)[1].get("name", "") for file in folder().glob("*.safetensors")]
  return [found for name in sorted(names) if name not in CHECKPOINTS and (found := find(name))]


def holds_weights(path: pathlib.Path) -> bool:
  """Whether a folder is a downloaded repository of weights, rather than the workdir of a run."""
  return any((path / name).is_file() for name in ANY_LAYOUT)


@contextlib.contextmanager
def _locked(checkpoint: Checkpoint) -> Iterator[None]:
  """
  Raises:
    InputError: weights cannot be kept.
  """
  try:
    folder().mkdir(parents=True, exist_ok=True)
    reason = "" if os.access(folder(), os.W_OK | os.X_OK) else "it cannot be written"
  except OSError as error:
    reason = str(error.strerror)
  if reason:
    raise InputError(
      f"expected a folder to keep weights in, got {folder()} ({reason}): set XDG_CACHE_HOME to a "
      "writable folder"
    )
  lock = folder() / f".{checkpoint.slug}.lock"
  with paths.locked(lock, f"{checkpoint.name} in {folder()}", wait=True):
    yield


def _unfinished(checkpoint: Checkpoint) -> pathlib.Path:
  return folder() / f".{checkpoint.slug}"


def _half_written(checkpoint: Checkpoint) -> list[pathlib.Path]:
  """What a conversion leaves that was killed."""
  return list(folder().glob(f".{glob.escape(cached(checkpoint).name)}.*.tmp"))


def _fetch(checkpoint: Checkpoint, path: pathlib.Path, convert: Convert) -> None:
  staging = _unfinished(checkpoint)
  for file in _half_written(checkpoint):
    file.unlink()
  staging.mkdir(exist_ok=True)
  found = _in_cache_of_the_hub(checkpoint)
  try:
    source, origin = found or _download(checkpoint, staging)
  except InputError:
    with contextlib.suppress(OSError):  # what has come stays
      staging.rmdir()
    raise
  size = sum(file.stat().st_size for file in _with_shards(source))
  transfer.check_space(path.parent, 4 * checkpoint.parameters or size)
  try:
    convert(source, checkpoint, path, origin)
  except InputError:  # another conversion of the same bytes would end alike
    shutil.rmtree(staging, ignore_errors=True)
    raise
  shutil.rmtree(staging, ignore_errors=True)
  _say_here(checkpoint)


def _say_here(checkpoint: Checkpoint) -> None:
  license = checkpoint.license or f"see {checkpoint.page}"
  print(f"{checkpoint.name} is here now: {cached(checkpoint)} (license: {license})", flush=True)


def _download(checkpoint: Checkpoint, staging: pathlib.Path) -> tuple[pathlib.Path, dict[str, str]]:
  """The verified file of weights, and where it is from: the hub, or else the second address."""
  reasons: list[str] = []
  for attempt in (_from_hub, _from_url) if checkpoint.url else (_from_hub,):
    try:
      return attempt(checkpoint, staging)
    except TransferError as error:
      reasons.append(str(error))
  if reasons[1:]:  # what to do is said once
    reasons[1] = f"{checkpoint.url}: {reasons[1].partition(': ')[0]}"
  if checkpoint.listed:
    file = " or ".join(checkpoint.files)
  else:
    file = f"{PROMPTS} of a trained model, or CLIP's weights with the config beside them,"
  raise InputError(
    f"{checkpoint.name} could not be fetched: {'; '.join(reasons)}. By hand: get {file} from "
    f"{checkpoint.page}, then run: rpn weights get {checkpoint.name} --from=FILE"
  )


def _from_hub(checkpoint: Checkpoint, staging: pathlib.Path) -> tuple[pathlib.Path, dict[str, str]]:
  from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    try_to_load_from_cache,
  )
  from huggingface_hub.utils import build_hf_headers

  endpoint, timeout = constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT
  with transfer.explained():
    listed = HfApi(endpoint=endpoint).model_info(
      checkpoint.repository, revision=checkpoint.revision, timeout=timeout
    )
    names = {entry.rfilename for entry in listed.siblings or ()}
  wanted = next((name for name in checkpoint.files if name in names), None)
  if wanted is None:
    usual = [name for name in checkpoint.files if not name.endswith(INDEX)] or checkpoint.files
    what = " or ".join(usual)
    if usual[0] == PROMPTS:
      what = f"{PROMPTS} of a trained model, and no weights of CLIP ({', '.join(usual[1:])})"
    raise TransferError(f"the repository has no {what}: name a file of it")
  beside = pathlib.PurePosixPath(wanted).parent
  configs = [name for name in (str(beside / file) for file in _CONFIGS) if name in names]
  commit = listed.sha or checkpoint.revision

  def fetch(name: str, label: str) -> None:
    url = hf_hub_url(checkpoint.repository, name, revision=commit, endpoint=endpoint)
    with transfer.explained():
      known = get_hf_file_metadata(url, timeout=timeout, endpoint=endpoint)
      if not known.commit_hash or not known.etag:
        raise ValueError("these headers are not the hub's")
    if name not in configs and len(known.etag) not in (40, 64):
      if known.size is None:
        raise TransferError(f"{endpoint} tells neither size nor checksum of {name}")
      print(f"{endpoint} tells no checksum of {name}: only its size is compared", flush=True)
    path = staging / os.path.basename(name)
    found = try_to_load_from_cache(checkpoint.repository, name, revision=commit)
    if isinstance(found, str) and known.etag == checksum_like(pathlib.Path(found), known.etag):
      path.unlink(missing_ok=True)
      path.symlink_to(found)  # what another program fetched, but not all of it
      return
    transfer.fetch(
      url, path, label,
      size=known.size, checksum=known.etag, headers=build_hf_headers(),
    )  # fmt: skip

  for name in configs:
    fetch(name, name)
  fetch(wanted, checkpoint.name)
  path = staging / os.path.basename(wanted)
  for shard in _with_shards(path)[1:]:
    fetch(str(beside / shard.name), shard.name)
  return path, {"origin": f"hf://{checkpoint.repository}@{commit}/{wanted}"}


def _with_shards(path: pathlib.Path) -> list[pathlib.Path]:
  """A file of weights, and those that it names if it is an index."""
  shards = set(read_index(path).values()) if path.name.endswith(INDEX) else ()
  return [path, *(path.parent / name for name in sorted(shards))]


def _from_url(checkpoint: Checkpoint, staging: pathlib.Path) -> tuple[pathlib.Path, dict[str, str]]:
  path = staging / os.path.basename(checkpoint.url)
  transfer.fetch(checkpoint.url, path, checkpoint.name, checksum=checkpoint.sha256)
  return path, {"origin": checkpoint.url}


def _in_cache_of_the_hub(checkpoint: Checkpoint) -> tuple[pathlib.Path, dict[str, str]] | None:
  """What another program has fetched with huggingface_hub, if its checksum is right."""
  from huggingface_hub import try_to_load_from_cache

  for name in checkpoint.files:
    found = try_to_load_from_cache(checkpoint.repository, name, revision=checkpoint.revision)
    if not isinstance(found, str):
      continue
    path = pathlib.Path(found)
    told = os.path.basename(name) == PROMPTS or checkpoint.config
    if not told and not _tells_all(path.parent):
      continue
    files = _with_shards(path)
    if not all(file.is_file() for file in files):
      continue  # some shards are not there
    damaged = [file for file in files if not _like_its_blob(file)]
    if not damaged:
      return path, {"origin": str(path)}
    print(f"{damaged[0]} is damaged and left out: its checksum differs from its name", flush=True)
  return None


def _tells_all(folder: pathlib.Path) -> bool:
  """Whether configs tell activation, mean and std: who loads a model alone fetches one of two."""
  there = {name for name in _CONFIGS if (folder / name).exists()}
  images = {"preprocessor_config.json", "processor_config.json"} & there
  return "open_clip_config.json" in there or ("config.json" in there and bool(images))


def _like_its_blob(path: pathlib.Path) -> bool:
  """Whether the checksum of a link is the name of its blob; other files tell none."""
  checksum = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
  return checksum_like(path, checksum) in ("", checksum)
