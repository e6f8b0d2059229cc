"""Segmentation of anyone's images into anyone's words."""

import pathlib
from collections.abc import Callable, Sequence

from rpn_jax import visualize
from rpn_jax.errors import InputError
from rpn_jax.experiment import Experiment
from rpn_jax.logging import progress
from rpn_jax.text_cache import check_names

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def find_images(path: str) -> list[pathlib.Path]:
  """The image files a path names: itself, or those directly in the folder."""
  root = pathlib.Path(path)
  if not root.exists():
    raise InputError(f"--image={path}: no such file or folder")
  if root.is_file():
    return [root]
  files = sorted(p for p in root.iterdir() if p.suffix.lower() in SUFFIXES)
  if not files:
    raise InputError(f"--image={path}: no {', '.join(SUFFIXES)} file in this folder")
  return files


def predict(
  config, workdir, image: str, classes: str, load: Callable[[pathlib.Path], dict]
) -> list[pathlib.Path]:
  """Writes an overlay with legend and an index PNG per image to `workdir/predictions`.

  Args:
    config: of the run.
    workdir: of the run; its newest checkpoint is used.
    image: a file or a folder.
    classes: names separated by commas; they need not have been trained on.
    load: path -> {image: normalised (h, w, 3) float32 for the network, original: (H, W, 3) uint8}.

  Returns:
    The files written.
  """
  names: Sequence[str] = check_names(classes.split(","))
  files = find_images(image)
  experiment = Experiment(config, workdir)
  _, prompts = experiment.restored_prompts()
  segmenter = experiment.segmenter(prompts, experiment.text(names))
  directory = experiment.workdir / "predictions"
  directory.mkdir(parents=True, exist_ok=True)
  # Two files of one name but another suffix must not overwrite each other.
  repeated = len({f.stem for f in files}) < len(files)
  written = []
  for file in progress(files, "predict", "image"):
    example = load(file)
    original = example["original"]
    label = segmenter(example["image"], original.shape[:2])
    stem = file.name.replace(".", "_") if repeated else file.stem
    written += visualize.save_prediction(directory, stem, original, label, names)
  print("\n".join(str(path) for path in written))
  return written
