"""One file of the Hugging Face hub: `base.transfer` with its client, errors and variables.

The session, headers, cache folder and variables (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, proxies)
are those of huggingface_hub. Its own download is not used: it starts over in every process, and
compares no checksum. Nor is hf_xet, the other protocol of the hub: what is stored there is served
by HTTP as well, with ranges, and nothing but HTTP could be tried where this was written.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from rpn_jax.base import transfer
from rpn_jax.base.errors import InputError
from rpn_jax.base.transfer import MB, TransferError, checksum_like

__all__ = ["MB", "TransferError", "check_space", "checksum_like", "explained", "fetch"]


def _refusal(response: Any) -> str:
  status, code = response.status_code, response.headers.get("X-Error-Code", "")
  if code == "GatedRepo":
    return f"HTTP {status}: accept the terms on the page first, then set HF_TOKEN to your token"
  if status == 401 and "Invalid credentials" in response.headers.get("X-Error-Message", ""):
    return "HTTP 401: the token is not valid: set HF_TOKEN to a valid one, or `hf auth login` again"
  if status == 401:
    return "HTTP 401: no such repository, or a private one: check the name, or set HF_TOKEN"
  if status == 403:
    return "HTTP 403, access refused: check HF_TOKEN, and that no firewall is in between"
  if status == 404:
    missing = {
      "RepoNotFound": "repository", "RevisionNotFound": "revision", "EntryNotFound": "file",
    }.get(code, "page")  # fmt: skip
    return f"HTTP 404, no such {missing}: check the name"
  return transfer.refusal(response)


_HINTS = transfer.Hints(
  "set HF_ENDPOINT to a mirror", "set XDG_CACHE_HOME to another disk", _refusal
)


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Turns the errors of requests into TransferError."""
  import httpx2
  from huggingface_hub import errors

  try:
    yield
  except InputError:
    raise
  except errors.OfflineModeIsEnabled:
    raise TransferError("HF_HUB_OFFLINE is set, so nothing is fetched: unset it") from None
  except errors.HfHubHTTPError as error:
    raise TransferError(_refusal(error.response)) from None
  except httpx2.HTTPError as error:
    raise transfer.explain(error, _HINTS) from None
  except (errors.FileMetadataError, ValueError, TypeError, KeyError):
    # The answer of a portal, a firewall or a mirror of another kind, mostly a page of HTML.
    raise TransferError(
      "the answer is not the hub's but some page: check proxy, login page and HF_ENDPOINT"
    ) from None


def fetch(
  url: str,
  path: pathlib.Path,
  label: str,
  *,
  size: int | None = None,
  checksum: str = "",
  headers: Mapping[str, str] | None = None,
) -> None:
  """`base.transfer.fetch` with the hub's session."""
  from huggingface_hub import constants, get_session

  with explained():
    transfer.fetch(
      url, path, label, client=get_session(), hints=_HINTS, size=size, checksum=checksum,
      headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )  # fmt: skip


def check_space(folder: pathlib.Path, needed: int) -> None:
  """
  Raises:
    InputError: the disk has less than the needed bytes.
  """
  transfer.check_space(folder, needed, _HINTS)
