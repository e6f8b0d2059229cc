"""What networks have in common; `rpn_jax.models.Network` is the whole contract."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Windows(NamedTuple):
  """The inference protocol of sliding windows, in pixels.

  Attributes:
    short_side: of the resized image.
    crop: side of a window.
    stride: from one window to the next.
  """

  short_side: int
  crop: int
  stride: int


class Defaults:
  """Mixin of a network on the vision tower alone, with cached text embeddings."""

  towers = ("visual",)

  def text_input(self, encoder, names: Sequence[str]) -> Any:
    return encoder.embed(names)

  def merged(self, params: dict, prompts: dict) -> tuple:
    return self, params, prompts


def read_fields(settings, names: Sequence[str]) -> dict[str, Any]:
  """Fields of an object or of a mapping."""
  if hasattr(settings, "keys"):
    return {name: settings[name] for name in names}
  return {name: getattr(settings, name) for name in names}
