"""Zero-shot classification of whole images with CLIP (Radford et al., 2021, section 3.1)."""

import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.base import pixels
from rpn_jax.base.console import progress, table
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_json
from rpn_jax.base.words import check_names
from rpn_jax.devices import devices_text
from rpn_jax.inference.predictor import Experiment
from rpn_jax.models import kernels
from rpn_jax.models.clip import VisionTransformer, l2_normalize

BATCH = 16  # images per call of the tower
SHOWN = 5  # classes per image in the table on the terminal
SHOWN_IMAGES = 20  # images in it
KEPT = 20  # classes per image in classify.json


def find_labelled(folder: str) -> tuple[tuple[str, ...], list[tuple[pathlib.Path, int]]]:
  """Class names and (file, class id) of a folder with one subfolder per class, as ImageNet's.

  The name of a class is that of its subfolder, with blanks for underscores.

  Raises:
    InputError: no such subfolders.
  """
  root = pathlib.Path(folder)
  subfolders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
  if not subfolders:
    raise InputError(
      f'--image={folder}: --mode=classify needs --classes="a cat, a dog", or a folder here with '
      "one subfolder per class"
    )
  names = check_names([p.name.replace("_", " ") for p in subfolders])
  return names, [(f, i) for i, p in enumerate(subfolders) for f in pixels.find(str(p))]


def probabilities(experiment: Experiment, names: Sequence[str]) -> Callable:
  """A function images (B, side, side, 3) -> softmax(scale · cosine) (B, C), as CLIP's logits."""
  tower = VisionTransformer(
    experiment.clip_config,
    jnp.dtype(experiment.config.dtype),
    kernels=kernels.for_platform(jax.local_devices()[0].platform),
  )
  params, text = experiment.params["visual"], experiment.text(names)
  scale = np.exp(experiment.clip["logit_scale"])

  @jax.jit
  def apply(params, image):
    image_BxE = l2_normalize(tower.apply({"params": params}, image))
    return jax.nn.softmax(scale * image_BxE @ text.T)

  return lambda image: np.asarray(apply(params, image))


def classify(config, workdir, image: str | None, classes: str | None) -> dict:
  """Writes `classify.json` to the workdir and prints the likeliest classes of every image.

  Only the frozen CLIP of the config is used, with its templates, and no prompts.

  Args:
    config: of the run.
    workdir: of the run; it need not exist.
    image: a file, or a folder; without `classes` a folder with one subfolder per class.
    classes: names separated by commas.

  Returns:
    The content of `classify.json`: `images` {file: {class: probability}}, the likeliest KEPT
    classes first, and with known labels `top1` and, of more than five classes, `top5`.

  Raises:
    InputError: no images, or no classes.
  """
  if not image:
    raise InputError("--mode=classify needs --image=FILE_OR_FOLDER")
  if classes:
    names = check_names(classes.split(","))
    files, labels = pixels.find(image), None
  else:
    names, pairs = find_labelled(image)
    files, labels = zip(*pairs)
  experiment = Experiment(config, workdir)
  apply = probabilities(experiment, names)
  side = experiment.clip_config.image_size
  orders, results = [], {}
  for start in progress(range(0, len(files), BATCH), f"classify on {devices_text()}", "batch"):
    batch = files[start : start + BATCH]
    inputs = np.stack([pixels.for_classification(file, side) for file in batch])
    padding = [(0, min(BATCH, len(files)) - len(batch))] + 3 * [(0, 0)]  # one program for all
    for file, row in zip(batch, apply(np.pad(inputs, padding))):
      order = np.argsort(-row)[:KEPT]
      orders.append(order)
      results[str(file)] = {names[i]: round(float(row[i]), 6) for i in order}

  content = {"clip": config.clip, "templates": config.templates, "classes": list(names)}
  if labels:
    for k in (1, 5) if len(names) > 5 else (1,):
      hits = [label in order[:k] for label, order in zip(labels, orders)]
      content[f"top{k}"] = float(np.mean(hits))
  content["images"] = results
  experiment.workdir.mkdir(parents=True, exist_ok=True)
  path = experiment.workdir / "classify.json"
  write_json(path, content)
  report(content, path)
  return content


def report(content: dict, path: pathlib.Path) -> None:
  """The table, the accuracies and where to find the rest."""
  rows = []
  for file, scores in list(content["images"].items())[:SHOWN_IMAGES]:
    for k, (name, p) in enumerate(list(scores.items())[:SHOWN]):
      rows.append(["" if k else pathlib.Path(file).name, name, f"{100 * p:.1f}"])
  print("\n" + table(rows, ["image", "class", "%"]))
  for k in ("top1", "top5"):
    if k in content:
      print(f"\n{k} of {len(content['images'])} images: {100 * content[k]:.1f} %", end="")
  print(f"\nEvery image is in {path}.")
