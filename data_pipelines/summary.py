"""What is told of a data set when it is prepared."""

import pathlib

from data_pipelines import records, vocabularies
from data_pipelines.sources.builder import SegmentationBuilder

NAMES_SHOWN = 10  # of classes
_SINGLE_CLASS = (
  "there is a single class, which a network learns to see everywhere: give the other pixels one"
)


def of_classes(tally: records.Tally, classes: vocabularies.Vocabulary) -> dict:
  """Which classes occur, and the share of pixels without one."""
  found, unlabeled = set(), 0
  for value, count in tally.pixels.items():
    class_id = classes.ids.get(value, classes.ignore)
    if class_id == classes.ignore:
      unlabeled += count
    else:
      found.add(class_id)
  return {
    "classes": classes.num_classes,
    "classes_found": len(found),
    "classes_missing": [n for n, i in zip(classes.names, classes.scored_as) if i not in found],
    "unlabelled_pixels": round(unlabeled / tally.pixels.total(), 6),
  }


def report(cls: type[SegmentationBuilder], summary: dict, folder: pathlib.Path) -> str:
  """What `prepare` prints of a set when it is prepared.

  Args:
    cls: its builder.
    summary: what `summary.json` holds.
    folder: where the set is.
  """
  lines = [
    f"{split:<6} {count:>9,} images {summary['shards'][split]:>5} shards"
    for split, count in summary["images"].items()
  ]
  lines.append(
    f"{summary['bytes'] / 1e6:,.1f} MB in {summary['seconds']:.0f} s; "
    f"{summary['classes_found']} of {summary['classes']} classes found; "
    f"{summary['unlabelled_pixels']:.1%} of the pixels without a class"
  )
  if missing := summary["classes_missing"]:
    more = len(missing) - NAMES_SHOWN
    rest = f" and {more} more (all in summary.json)" if more > 0 else ""
    lines.append(f"not found: {'; '.join(missing[:NAMES_SHOWN])}{rest}")
  if blank := summary["images_without_a_class"]:
    lines.append(f"images without a pixel of any class, to learn nothing from: {blank:,}")
  if empty := summary["annotations_without_a_pixel"]:
    lines.append(
      f"annotations that no pixel's center is in, outside of their image or too small: {empty:,}"
    )
  if summary["background"]:
    lines.append(f"pixels without annotation are of the class {summary['background']!r}")
  elif "background" in cls.options:
    lines.append("pixels without annotation have no class; --background=NAME gives them one")
  if cls.own_classes and summary["classes"] == 1 and summary["unlabelled_pixels"]:
    lines.append(_SINGLE_CLASS)
  upright, stored = (summary["exif"][how] for how in ("upright", "stored"))
  if upright or stored:
    images = "image" if upright == 1 else "images"
    lines.append(
      f"{upright:,} {images} turned upright as their EXIF data says, {stored:,} used as stored "
      "because their masks have the stored size"
    )
  lines.append(f"prepared in {folder}; look at preview.png there")
  if cls.own_classes:
    name = "" if summary["name"] == "folder" else f" --config.data.name={summary['name']}"
    lines.append(
      f"to train on it: --config=configs/folder.py{name} --config.data.variant={summary['config']}"
    )
  return "\n".join(lines)
