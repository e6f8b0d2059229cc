"""Which files are written of a segmentation, and how its masks become annotations."""

import dataclasses
from collections.abc import Sequence

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known

ANNOTATIONS = ("coco", "labelme", "yolo", "voc")
FORMS = ("overlay", "labels", "json", "scores", *ANNOTATIONS)
DEFAULT_FORMS = ("overlay", "labels", "json")

WORDS = {
  "instances": ("regions", "classes"),
  "coco": ("rle", "polygons"),
  "labelme": ("polygons", "masks"),
}
# Of flags.
HELP = {
  "instances": "coco, labelme: an annotation per connected region of a class (regions), or one for "
  "each class of an image (classes)",
  "min_area": "coco, labelme, yolo: regions of fewer pixels are left out",
  "min_hole": "coco, labelme, yolo: holes of fewer pixels are filled",
  "simplify": "polygons: their outline may be off by so many pixels; 0 follows every pixel",
  "coco": "rle, exact, or polygons",
  "labelme": "polygons, or masks, which are exact",
}


@dataclasses.dataclass(frozen=True)
class Options:
  """How masks become annotations.

  Attributes:
    instances: "regions": an annotation for each connected region of a class; "classes": one for
      each class of an image. YOLO's rows are always regions, since they have a single outline.
    min_area: regions of fewer pixels are left out.
    min_hole: holes of fewer pixels are filled; annotations then overlap what was in the hole.
    simplify: tolerance of polygons in pixels. The centers of all pixels that a polygon assigns
      differently are within this distance of its outline; 0 is exact.
    coco: "rle", exact, or "polygons".
    labelme: "polygons", or "masks", exact.

  Raises:
    InputError: an unknown word or a negative number.
  """

  instances: str = "regions"
  min_area: int = 0
  min_hole: int = 0
  simplify: float = 1.0
  coco: str = "rle"
  labelme: str = "polygons"

  def __post_init__(self) -> None:
    for name, words in WORDS.items():
      check_known(f"{name}=", getattr(self, name), words)
    for name in ("min_area", "min_hole", "simplify"):
      if not getattr(self, name) >= 0:  # nor NaN
        raise InputError(f"{name}={getattr(self, name)}: expected a number of pixels, at least 0")

  def check_used(self, forms: Sequence[str]) -> None:
    """Checks that options that were changed have an effect on these forms.

    Raises:
      InputError: one has none.
    """
    regions = {"coco", "labelme"}
    with_polygons = {"yolo"} | {form for form in regions if getattr(self, form) == "polygons"}
    users = {"coco": {"coco"}, "labelme": {"labelme"}, "instances": regions}
    users |= {"min_area": regions | {"yolo"}, "min_hole": regions | {"yolo"}}
    users["simplify"] = with_polygons
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value != field.default and not users[field.name] & set(forms):
        needed = " or ".join(form for form in ANNOTATIONS if form in users[field.name])
        raise InputError(
          f"{field.name}={value} has no effect on {', '.join(forms)}: save {needed}, too, or leave "
          f"{field.name} out"
        )


# Name -> (default, help), for the flags of commands.
FLAGS = {field.name: (field.default, HELP[field.name]) for field in dataclasses.fields(Options)}


def parse_forms(words: str | Sequence[str]) -> tuple[str, ...]:
  """The forms that are named, each once.

  Args:
    words: "overlay,coco", or a list.

  Raises:
    InputError: an unknown form, or none.
  """
  listed = words.split(",") if isinstance(words, str) else words
  forms = tuple(dict.fromkeys(word.strip() for word in listed))
  for form in forms:
    check_known("save=", form, FORMS)
  if not forms:
    raise InputError(f"save: expected at least one of {', '.join(FORMS)}")
  return forms
