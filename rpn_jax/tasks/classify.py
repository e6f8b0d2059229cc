"""Zero-shot classification of whole images with CLIP (Radford et al., 2021, section 3.1)."""

import functools
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from rpn_jax.base import colors, paths, picture_files, pictures, pixels
from rpn_jax.base.console import progress, table
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_names, parse_names
from rpn_jax.devices import devices_text
from rpn_jax.inference.classifier import class_probabilities
from rpn_jax.inference.predictor import Predictor
from rpn_jax.tasks.predict import check_skipped

# Images per call of the tower.
BATCH_IMAGES = 16
# Images in the terminal's table, and classes of each.
TABLE_IMAGES, TABLE_CLASSES = 20, 5
# Classes of each image in classify.json.
FILE_CLASSES = 20


def find_labeled(folder: str) -> tuple[tuple[str, ...], picture_files.Found, list[int]]:
  """Class names, images and their class ids, of a folder with a subfolder per class, like ImageNet.

  The subfolder's name is the class name, with spaces for underscores; hidden ones are no classes.
  Images elsewhere, beside the subfolders or below them, are left out.

  Raises:
    InputError: there are no subfolders, or one without images.
  """
  root = paths.expand(folder)
  subfolders = sorted(
    path
    for path in (root.iterdir() if root.is_dir() else ())
    if path.is_dir() and not path.name.startswith(".")
  )
  if not subfolders:
    raise InputError(
      f'--image={folder}: --mode=classify needs --classes="a cat, a dog", or a folder here with '
      "one subfolder per class"
    )
  names = check_names([p.name.replace("_", " ") for p in subfolders])
  found = picture_files.images_of(subfolders)
  if empty := sorted({*subfolders} - {file.parent for file in found.files}):
    raise InputError(f"{empty[0]}: no image in this folder")
  loose = picture_files.images_of([root]).files
  found.left_out += [(file, "beside the folders of the classes") for file in loose]
  for path in subfolders:
    below = picture_files.folders_of_images(path)
    found.left_out += [(each, "folder below that of a class") for each in below]
  ids = {path: i for i, path in enumerate(subfolders)}
  return names, found, [ids[file.parent] for file in found.files]


def classify(config, workdir, image: str | None, classes: str | None) -> dict:
  """Writes `classify.json` to the workdir and prints the most likely classes of every image.

  Only the frozen CLIP of the config is used, with the config's templates, not the prompts.

  Args:
    config: config of the run.
    workdir: directory to write to, created if missing.
    image: a file, or a folder; without `classes` a folder with one subfolder per class.
    classes: names separated by commas, synonyms by `|`.

  Returns:
    The content of `classify.json`: `images` {file: {class: probability}} with the FILE_CLASSES most
    likely classes, sorted; where something had to be decided about images, `read` {file: what};
    where something must be known of the weights, `note`; with known labels `top1` and, for more
    than five classes, `top5`.

  Raises:
    InputError: no images, or no classes; or some could not be read, after the others are written.
  """
  if not image:
    raise InputError("--mode=classify needs --image=FILE_OR_FOLDER")
  if classes:
    names, found, labels = parse_names(classes), picture_files.find(image), None
  else:
    names, found, labels = find_labeled(image)
  files, told, decided = found.files, pictures.Told(), {}

  def tell(name: object, notes: Sequence[colors.Note]) -> None:
    told(name, notes)
    if notes:
      decided[str(name)] = [text for _, text in notes]

  predictor = Predictor.from_config(config)
  apply = class_probabilities(predictor, names)
  clip, workdir = predictor.clip, paths.expand(workdir)
  prepare = functools.partial(
    pixels.for_classification,
    side=clip.image_size,
    mean=clip.mean or pixels.CLIP_MEAN,
    std=clip.std or pixels.CLIP_STD,
    squash=clip.squash,
    told=tell,
  )
  orders, results, unreadable = [], {}, []

  def readable():
    """(file, label, image) without the files that cannot be read, which are told at the end."""
    pairs = list(zip(files, labels or itertools.repeat(None)))
    for file, label in progress(pairs, f"classify on {devices_text()}", "image"):
      try:
        yield file, label, prepare(file)
      except InputError as error:
        unreadable.append(error)

  images = readable()
  while batch := list(itertools.islice(images, BATCH_IMAGES)):
    inputs = np.stack([image for *_, image in batch])
    missing = min(BATCH_IMAGES, len(files)) - len(batch)
    padded = np.pad(inputs, [(0, missing), (0, 0), (0, 0), (0, 0)])  # one program for all batches
    for (file, label, _), probabilities in zip(batch, apply(padded)):
      order = np.argsort(-probabilities)[:FILE_CLASSES]
      orders.append((label, order))
      results[str(file)] = {names[i]: round(float(probabilities[i]), 6) for i in order}

  content = {"clip": config.clip, "templates": config.templates, "classes": list(names)}
  if predictor.note:
    content["note"] = predictor.note
  if labels and orders:
    for k in (1, 5) if len(names) > 5 else (1,):
      hits = [label in order[:k] for label, order in orders]
      content[f"top{k}"] = float(np.mean(hits))
  content["images"] = results
  if decided:
    content["read"] = decided
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / "classify.json"
  if results:
    paths.write_json(path, content)
    report(content, path)
  check_skipped(unreadable, len(files), workdir, paths.expand(image), found.left_out)
  return content


def report(content: dict, path: pathlib.Path) -> None:
  """Prints the table, the accuracies and where to find the rest."""
  rows = []
  for file, scores in list(content["images"].items())[:TABLE_IMAGES]:
    for k, (name, p) in enumerate(list(scores.items())[:TABLE_CLASSES]):
      rows.append(["" if k else pathlib.PurePath(file).name, name, f"{100 * p:.1f}"])
  print("\n" + table(rows, ["image", "class", "%"]))
  for top in ("top1", "top5"):
    if top in content:
      print(f"\n{top} of {len(content['images'])} images: {100 * content[top]:.1f} %", end="")
  print(f"\nEvery image is in {path}{'; ' + content['note'] if 'note' in content else ''}.")
