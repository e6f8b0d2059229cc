"""What networks have in common; `rpn_jax.models.Network` is the whole contract."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from rpn_jax.models.clip import CLIPConfig


class Windows(NamedTuple):
  """The inference protocol that a network was made for, in pixels.

  Attributes:
    short_side: of the resized image.
    crop: side of a window.
    stride: from one window to the next.
    long_side: limit of the long side of the resized image; 0 is none.
    layout: how windows are laid over the image, one of `inference.layouts.LAYOUTS`.
    square: side of the square that the layout of that name resizes the image to.
    resize: whose way of resizing, one of `pixels.RESIZES`.
  """

  short_side: int
  crop: int
  stride: int
  long_side: int = 0
  layout: str = "windows"
  square: int = 0
  resize: str = "mmsegmentation"


class Defaults:
  """Mixin of a network on the vision tower alone, with cached text embeddings."""

  clip: CLIPConfig
  towers: tuple[str, ...] = ("visual",)

  @property
  def input_multiple(self) -> int:
    return self.clip.patch_size

  def text_input(self, encoder: Any, names: Sequence[str]) -> Any:
    return encoder.embed(names)

  @classmethod
  def windows(cls, clip: CLIPConfig) -> Windows:
    """SCLIP's protocol in proportion to the tower's own input: 336, 224 and 112 pixels at 224."""
    side = clip.image_size
    return Windows(short_side=side * 3 // 2, crop=side, stride=side // 2)

  def encode_text(self, text: Any) -> Any:
    return text

  def merged(self, params: dict, prompts: dict) -> tuple:
    return self, params, prompts


def as_record(settings: Any) -> Any:
  """Settings as an object that a module can have as an attribute: hashable, equal by its fields."""
  if not hasattr(settings, "keys"):
    return settings
  fields = {k: tuple(x) if isinstance(x, list) else x for k, x in sorted(settings.items())}
  return _record_class(tuple(fields))(**fields)


@functools.cache  # one class for equal names, so that records are comparable
def _record_class(names: tuple[str, ...]) -> type:
  return dataclasses.make_dataclass(
    "Settings", names, frozen=True, namespace={"__reduce__": _reduced}
  )


def _reduced(record: Any) -> tuple:
  """How a record is pickled and copied: its class has no name to find it by."""
  return as_record, ({f.name: getattr(record, f.name) for f in dataclasses.fields(record)},)
