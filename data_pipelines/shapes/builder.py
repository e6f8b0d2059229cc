"""The scenes of `shapes` and `crowds` on disk: drawn once, by a TFDS builder, when first used."""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from data_pipelines.shapes.world import GROUNDS, OBJECTS, compose, random_grounds
from rpn_jax.base import paths
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError

_SCENE_SIZES = ((96, 96), (96, 128), (128, 96))  # height, width in pixels

# Number of objects in a scene and their diameters in pixels, each from … to. "crowds" has many
# small objects, which a model trained on "shapes" has not met.
WORLDS = {"shapes": ((3, 6), (22, 44)), "crowds": ((6, 12), (16, 26))}


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
  """Which scenes to write, how many, and from which seed.

  The name says all of it, so that every choice has its own folder.
  """

  name: str = ""
  world: str = "shapes"  # a key of WORLDS
  num_train: int = 1600
  num_val: int = 120
  seed: int = 0

  def __post_init__(self):
    world = "" if self.world == "shapes" else f"{self.world}_"
    self.name = f"{world}train{self.num_train}_val{self.num_val}_seed{self.seed}"


def _scene(config, split, index):
  """Image and label map of scene `index` of a split, a pure function of its arguments."""
  objects, diameter = WORLDS[config.world]
  rng = np.random.default_rng((config.seed, ("train", "val").index(split), index))
  height, width = _SCENE_SIZES[rng.integers(len(_SCENE_SIZES))]
  object_ids = rng.integers(len(OBJECTS), size=rng.integers(*objects, endpoint=True))
  # The first object is never left out and the first ground hardly ever hidden. Taking the classes
  # in turn for them puts every class into every split of 24 scenes or more.
  object_ids[0] = index % len(OBJECTS)
  ground_ids = random_grounds(rng)
  turn = len(OBJECTS) + index % len(GROUNDS)
  ground_ids = [turn, *(g for g in ground_ids[1:] if g != turn)]
  return compose(rng, height, width, object_ids, ground_ids, diameter)


def _encoded(array, **options):
  """An image file, as bytes, of uint8 [H,W,3] or [H,W]."""
  # TFDS encodes arrays by TensorFlow, which is not required here, but takes bytes as they are.
  file = io.BytesIO()
  Image.fromarray(array).save(file, **options)
  return file.getvalue()


class Shapes(tfds.core.GeneratorBasedBuilder):
  """Scenes with a short side of 96 pixels, in the splits "train" and "val".

  Both splits have all of `CLASSES`, seen and unseen; hiding the unseen ones from training is up to
  the input pipeline. Features: `image`, a JPEG; `label`, a lossless map of class ids with one
  channel; `id`.
  """

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [ShapesConfig()]  # noqa: RUF012 (a list is what TFDS asks for)
  # TFDS would look this up by importlib_resources, which it uses but does not install.
  code_path = pathlib.Path(__file__)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Procedurally drawn objects on textured grounds, every pixel labeled.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
          "label": tfds.features.Image(
            shape=(None, None, 1), dtype=np.uint8, encoding_format="png"
          ),
          "id": tfds.features.Text(),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    config = self.builder_config
    return {
      "train": self._generate_examples("train", config.num_train),
      "val": self._generate_examples("val", config.num_val),
    }

  def _generate_examples(self, split, count):
    for i in progress(range(count), f"draw {split}", "scene"):
      image, label = _scene(self.builder_config, split, i)
      name = f"{split}_{i:05d}"
      yield (
        name,
        {
          "image": _encoded(image, format="JPEG", quality=95, subsampling=0),
          "label": _encoded(label, format="PNG"),
          "id": name,
        },
      )


def _builder(data_dir, config):
  """The builder for a config, whether or not it is one of BUILDER_CONFIGS."""
  # TFDS takes a config with a listed name only if it is the listed object.
  config = Shapes.builder_configs.get(config.name, config)
  return Shapes(data_dir=paths.expand(data_dir), config=config, file_format="array_record")


def _folder(data_dir, config):
  """Where TFDS keeps the scenes; asking a builder would fail if they are damaged."""
  return paths.expand(data_dir) / Shapes.name / config.name / str(Shapes.VERSION)


def _is_complete(folder, config):
  """Whether `folder` has every split, with all scenes."""
  expected = {"train": config.num_train, "val": config.num_val}
  try:
    splits = tfds.builder_from_directory(folder).info.splits
    counts = {name: split.num_examples for name, split in splits.items()}
    files = [path for split in splits.values() for path in split.filepaths]
  except Exception:  # TFDS fails in many ways on a damaged folder
    return False
  return counts == expected and all(os.path.isfile(path) for path in files)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps TFDS from printing and from drawing bars of its own."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()
    logging.set_verbosity(verbosity)


def prepare(data_dir: str | os.PathLike, config: ShapesConfig | None = None) -> pathlib.Path:
  """Draws the scenes below `data_dir` unless they are there, and returns their folder.

  It takes some seconds the first time. A folder that an earlier attempt left half written is
  replaced.

  Args:
    data_dir: the root of all prepared sets; made if missing.
    config: how many scenes and which seed; by default 1600 for training and 120 for validation.

  Raises:
    InputError: `data_dir` cannot be written to.
  """
  config = config or ShapesConfig()
  folder = _folder(data_dir, config)
  try:
    with _quiet():
      if not _is_complete(folder, config):
        if folder.exists():
          shutil.rmtree(folder)  # else TFDS takes whatever it holds for the whole
        folder.parent.mkdir(parents=True, exist_ok=True)
        _builder(data_dir, config).download_and_prepare()
  except OSError as error:
    # Another run may have written the scenes meanwhile; they are the same, bit by bit.
    if _is_complete(folder, config):
      return folder
    raise InputError(
      f"expected a folder to write scenes to, got {data_dir!s} ({error}); "
      "choose a data_dir that is writable and has a few MiB of free space"
    ) from error
  return folder


class _Scenes:
  """A TFDS data source with plain values; see `source`. Random access, fit for grain."""

  def __init__(self, records):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
    if not 0 <= index < len(self):  # array_record raises ValueError, which breaks iteration
      raise IndexError(f"scene {index} of a source of {len(self)} scenes")
    record = self._records[index]
    return {
      "image": record["image"],
      "label": record["label"][..., 0],
      "id": record["id"].decode(),
    }


def source(data_dir: str | os.PathLike, split: str, config: ShapesConfig | None = None) -> _Scenes:
  """Random access to the scenes that `prepare` drew below `data_dir`.

  Args:
    data_dir: as given to `prepare`.
    split: "train" or "val", or a TFDS slice such as "train[:10%]".
    config: as given to `prepare`.

  Returns:
    A sequence of {"image": uint8 [H,W,3] in RGB, "label": uint8 [H,W] of indices into `CLASSES`,
    "id": str}.

  Raises:
    InputError: the scenes are not there, or there is no such split.
  """
  config = config or ShapesConfig()
  folder = _folder(data_dir, config)
  with _quiet():
    if not _is_complete(folder, config):
      raise InputError(
        f"expected prepared scenes, got none or only some in {folder}; "
        "run data_pipelines.shapes.prepare first"
      )
    try:
      return _Scenes(tfds.builder_from_directory(folder).as_data_source(split=split))
    except ValueError as error:
      raise InputError(
        f'expected split "train" or "val" or a slice of one, got {split!r} for '
        f"{folder} ({error}); correct the name"
      ) from error


def _open(world: str, data_config, split: str) -> _Scenes:
  """The scenes that a run asks for, drawn if they are not there.

  Args:
    world: a key of WORLDS.
    data_config: `config.data` of the run: data_dir, train_images (optional) and eval_images, which
      is 0 for the default number.
    split: "train" or "val".
  """
  counts = {"num_train": data_config.get("train_images"), "num_val": data_config.eval_images}
  config = ShapesConfig(world=world, **{k: v for k, v in counts.items() if v})
  prepare(data_config.data_dir, config)
  return source(data_config.data_dir, split, config)


open_shapes = functools.partial(_open, "shapes")
open_crowds = functools.partial(_open, "crowds")
# As a builder has it, for the card of an exported model.
open_shapes.license = open_crowds.license = "drawn by rpn_jax: MIT"  # type: ignore[attr-defined]
