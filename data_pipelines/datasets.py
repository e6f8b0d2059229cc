"""From a config to data: opens the data sets that `config.data` and `config.eval` name."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from data_pipelines import (
  local_copy,
  pipeline,
  recipes,
  records,
  registry,
  shapes,
  transforms,
  vocabularies,
)
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known, split_synonyms

SETTINGS = ("zero_shot", "transductive", "supervised", "annotation_free")
# Those in which no label of an unseen class is seen in training.
SPLIT_SETTINGS = ("zero_shot", "transductive")
# Those in which a part of the training images can stand in for the evaluation set.
HELD_OUT_SETTINGS = ("zero_shot", "supervised")
# What a registered benchmark says of its classes; sets of one's own have a list of names.
BENCHMARK_CLASSES = (vocabularies.ClassFiles, vocabularies.Vocabulary)
# What a stored label may be: any uint16.
LABEL_VALUES = range(1 << 16)


@dataclasses.dataclass(frozen=True)
class SegmentationData:
  """A segmentation data set as a training run sees it.

  Attributes:
    name: as registered.
    names: prompted class names.
    seen, unseen: class ids of the two groups that scores are averaged over. All are seen without a
      split, and with one of one's own where the setting trains on every class; those of published
      benchmarks are reported in each setting, as papers do.
    trained: rows of `names` that are prompted in training; training labels index this list.
    penalized: class ids whose scores are lowered at test (config.eval.seen_penalty).
    ignore: label of pixels without a class.
    scored_as: scored class of every prompted name; the identity except where several names stand
      for the background.
    titles: what tables and legends call the scored classes where that is not what is prompted;
      () otherwise.
    unlabelled: training label of pixels that get pseudo-labels; None where none do.
    train_batches: start step -> endless batches {image float32 [B,H,W,3], label int32 [B,H,W]};
      labels are positions in `trained`, `unlabelled`, or `ignore`.
    train_indices: step -> positions, in the training split, of the examples of its batch.
    eval_examples: () -> sized iterable of {image float32 [h,w,3], label int32 [H,W], id}; labels
      are scored classes, or `ignore`.
    contents: () -> what identifies the prepared images and labels, see `records.contents`; {} of a
      set that is drawn, which the config identifies, or has a source of its own.
  """

  name: str
  names: tuple[str, ...]
  seen: tuple[int, ...]
  unseen: tuple[int, ...]
  trained: tuple[int, ...]
  penalized: tuple[int, ...]
  ignore: int
  scored_as: tuple[int, ...]
  titles: tuple[str, ...]
  unlabelled: int | None
  train_batches: Callable[[int], Iterator[dict]]
  train_indices: Callable[[int], list[int]]
  eval_examples: Callable[[], pipeline.EvalExamples]
  contents: Callable[[], dict[str, dict]]


def load(
  config, process: tuple[int, int] = (0, 1), *, names_only: bool = False
) -> SegmentationData:
  """Opens the data set of `config.data`; the synthetic ones are drawn if they are not there.

  Args:
    config: of the run. It says how images are normalized; `weights.clip_file.with_normalization`
      completes one that leaves this to the weights.
    process: (index, count) of the processes: each gets its rows of every training batch. Evaluation
      examples are divided by whoever evaluates.
    names_only: make no local copy of the records, which are not read; see `local_copy`.

  Raises:
    InputError: an unknown name or setting, no normalization, bad data, or a set that is not
      prepared.
  """
  setting = config.data.setting
  check_known("config.data.setting=", setting, SETTINGS)
  share = config.data.held_out
  if share and setting not in HELD_OUT_SETTINGS:
    raise InputError(
      f"config.data.held_out={share:g} is for setting={' or '.join(HELD_OUT_SETTINGS)}, got "
      f"{setting}: there images that are held out would need labels that it must not read; set it "
      "to 0"
    )
  data = _open(config, config.data.name, setting, process, names_only=names_only, held_out=share)
  split = _vocabulary(config.data, registry.get(data.name), config.data.naming).unseen
  if split and not data.unseen and setting not in SPLIT_SETTINGS:
    print(
      f"{data.name}: setting={setting} trains on every class, also on those named as unseen "
      f"({', '.join(data.names[i] for i in split)}); setting=zero_shot leaves these out",
      flush=True,
    )
  return data


def load_evaluations(config) -> list[SegmentationData]:
  """The data sets of `config.eval.sets`, or the training set alone if none is named.

  Every class of these is prompted and none is penalized: the open-vocabulary protocol.

  Raises:
    InputError: see `load`; a `config.eval.naming` that none of them has.
  """
  naming = config.eval.naming
  worded = {n for n in config.eval.sets if naming in vocabularies.namings(n)[1:]}
  if naming != "dataset" and not worded:
    raise InputError(
      f"config.eval.naming={naming!r} words the classes of config.eval.sets, got "
      f"{tuple(config.eval.sets)}, of which none has that wording; leave it out, or use "
      "config.data.naming for the training set"
    )
  if not config.eval.sets:
    return [load(config)]
  return [
    _open(config, name, "supervised", naming=naming if name in worded else "")
    for name in config.eval.sets
  ]


def _open(
  config,
  name: str,
  setting: str,
  process=(0, 1),
  naming: str = "",
  names_only: bool = False,
  held_out: float = 0.0,
) -> SegmentationData:
  """A data set; `naming` is of its classes, by default config.data's for the training set.

  With a share `held_out` of its training images in place of the evaluation set, it has the trained
  classes and no others: nothing that is chosen by such scores has seen an unseen one.
  """
  data_set = registry.get(name)
  c = config.data
  _check_variant(c, data_set)
  if data_set.classes is None or not names_only:
    c = local_copy.localized(c, data_set)
  naming = naming or (c.naming if name == c.name else "dataset")
  vocabulary = _vocabulary(c, data_set, naming)
  _tell_of_synonyms(vocabulary, naming, config.synonyms)
  seen, unseen = vocabulary.seen, vocabulary.unseen
  if own := name == c.name and c.unseen:
    seen, unseen = _own_split(vocabulary, own, c.setting)
  count = len(vocabulary.names)
  if setting in SPLIT_SETTINGS and not unseen:
    raise InputError(
      f"config.data.setting={setting!r} needs a split into seen and unseen classes and {name} has "
      "none; use config.data.setting='supervised'"
    )
  benchmark = isinstance(registry.resolve(data_set.classes), BENCHMARK_CLASSES)
  in_training = c.setting if name == c.name else setting
  if not benchmark and in_training not in SPLIT_SETTINGS:
    seen, unseen = tuple(range(count)), ()
  raw = transforms.LabelMap.from_ids(
    vocabulary.ids, ignore=vocabulary.ignore, unlisted=vocabulary.unlisted
  )
  trained, unlabelled = tuple(range(count)), None
  train_map = raw
  if setting == "zero_shot":
    trained = seen
    train_map = raw.then(transforms.LabelMap.seen(seen, count, ignore=vocabulary.ignore))
  elif setting == "transductive":
    # One value for all of them: which unseen class a pixel has never reaches the training step.
    unlabelled = _unlabelled(vocabulary)
    ids = {i: unlabelled if i in unseen else i for i in range(count)}
    if config.self_training.pixels == "unlabelled":
      ids[vocabulary.ignore] = unlabelled  # not so the padding, which comes later
    train_map = raw.then(transforms.LabelMap.from_ids(ids, ignore=vocabulary.ignore))
  elif setting == "annotation_free":
    # The same label on every pixel, whatever the mask says: only padding, which is no part of the
    # image, is ignored.
    unlabelled = _unlabelled(vocabulary)
    ids = dict.fromkeys(LABEL_VALUES, unlabelled)
    train_map = transforms.LabelMap.from_ids(ids, ignore=vocabulary.ignore)

  if c.mean is None or c.std is None:
    raise InputError(
      f"expected config.data.mean and config.data.std, got {c.mean} and {c.std}, which leave them "
      "to the CLIP weights: set both, or pass the config through clip_file.with_normalization"
    )
  shared = {"recipe": c.recipe, "mean": c.mean, "std": c.std}
  train_transform = recipes.train_transform(
    train_map,
    crop=c.crop,
    scale=c.scale,
    ratio=c.ratio,
    label_resize=c.label_resize,
    photometric=c.photometric,
    # The rule against crops of a single class would find no other: it is off without labels.
    cat_max_ratio=1.0 if setting == "annotation_free" else None,
    **shared,
  )
  eval_transform = recipes.eval_transform(
    c.short_side, train_map if held_out else raw, long_side=c.long_side, **shared
  )

  def source(split: str):
    if not held_out:
      return _source(c, data_set, split)
    images = _source(c, data_set, "train")
    trained_on, held = split_off(len(images), held_out)
    return _Part(images, trained_on if split == "train" else held)

  def train_batches(start_step: int) -> Iterator[dict]:
    if vocabulary.evaluation_only:
      raise InputError(
        f"{name} is for evaluation: {count} names are scored as {vocabulary.num_classes} classes; "
        "train on a set whose names are its classes"
      )
    return pipeline.train_batches(
      source("train"),
      train_transform,
      batch_size=c.batch_size,
      seed=config.seed,
      start_step=start_step,
      shard=process,
      num_threads=c.threads,
      workers=c.workers,
    )

  def train_indices(step: int) -> list[int]:
    count = len(source("train"))
    return pipeline.train_indices(count, batch_size=c.batch_size, seed=config.seed, step=step)

  @functools.cache  # opened once: every evaluation of a run reads the same examples
  def eval_examples() -> pipeline.EvalExamples:
    # The number of scenes that are drawn says nothing of those that are held out.
    limit = 0 if held_out else c.eval_images
    return pipeline.eval_examples(source("val"), eval_transform, limit=limit)

  data = SegmentationData(
    name=name,
    names=vocabulary.names,
    seen=seen,
    unseen=unseen,
    trained=trained,
    penalized=seen if setting == "zero_shot" else (),
    ignore=vocabulary.ignore,
    scored_as=vocabulary.scored_as,
    titles=vocabulary.titles,
    unlabelled=unlabelled,
    train_batches=train_batches,
    train_indices=train_indices,
    eval_examples=eval_examples,
    contents=functools.cache(lambda: _contents(c, data_set)),
  )
  if not held_out:
    return data
  ids = tuple(range(len(trained)))
  return dataclasses.replace(
    data, names=tuple(data.names[i] for i in trained), seen=ids, unseen=(), trained=ids,
    penalized=(), scored_as=ids, titles=(),
  )  # fmt: skip


def split_off(count: int, share: float) -> tuple[list[int], list[int]]:
  """Positions of the images that are trained on and of those held out, the same for all seeds.

  Raises:
    InputError: too few images for both.
  """
  held = round(share * count)
  if not 0 < held < count:
    raise InputError(
      f"config.data.held_out={share:g} of {count} training images leaves none on one side; choose "
      "another share"
    )
  order = np.random.default_rng(0).permutation(count).tolist()
  return sorted(order[held:]), sorted(order[:held])


class _Part:
  """Some examples of a source, by position; as a class, since reader processes get it pickled."""

  def __init__(self, source, positions: Sequence[int]):
    self._source, self._positions = source, positions

  def __len__(self) -> int:
    return len(self._positions)

  def __getitem__(self, index: int) -> dict:
    return self._source[self._positions[index]]


def _vocabulary(c, data_set: registry.DataSet, naming: str) -> vocabularies.Vocabulary:
  if data_set.classes is None:
    return records.stored_vocabulary(data_set.prepared, c.data_dir, c.variant)
  return vocabularies.load(data_set.name, naming)


def _check_variant(c, data_set: registry.DataSet) -> None:
  """Refuses `config.data.variant` where the set has none of that name, before a run begins.

  Raises:
    InputError: see above.
  """
  variant = data_set.variant(c)
  if variant and data_set.prepared == "shapes":
    raise InputError(
      f"{data_set.name} has no variants, got config.data.variant={variant!r}; leave it out"
    )
  if variant and data_set.builder is not None:
    records.config_name(registry.builder_class(data_set.prepared), variant, c.data_dir)


def _unlabelled(vocabulary: vocabularies.Vocabulary) -> int:
  """The training label of pixels that get pseudo-labels, which no class has."""
  value, count = vocabulary.ignore - 1, len(vocabulary.names)
  if count > value:
    raise InputError(
      f"{vocabulary.name}: with exactly {count} classes no label is left for pixels that get "
      "pseudo-labels: prepare the set with a class less or more, or train with "
      "config.data.setting='zero_shot' or 'supervised'"
    )
  return value


def _own_split(
  vocabulary, names: Sequence[str], setting: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Seen and unseen class ids where config.data.unseen names the latter.

  Raises:
    InputError: a name that is none of the classes, all of them, or a setting without a split.
  """
  if setting not in SPLIT_SETTINGS:
    raise InputError(
      f"config.data.unseen={tuple(names)} is for setting={' or '.join(SPLIT_SETTINGS)}, got "
      f"{setting}: leave it out, or change the setting"
    )
  for name in names:
    check_known("config.data.unseen: class ", name, vocabulary.names)
  unseen = tuple(i for i, name in enumerate(vocabulary.names) if name in names)
  classes = sorted({*vocabulary.seen, *vocabulary.unseen})
  if not (seen := tuple(i for i in classes if i not in unseen)):
    raise InputError("config.data.unseen: names every class, so that none is left to train on")
  return seen, unseen


def _tell_of_synonyms(vocabulary: vocabularies.Vocabulary, naming: str, synonyms: str) -> None:
  """Says it where scores are not computed as those of the code whose naming was chosen."""
  count = sum(len(split_synonyms(name)) > 1 for name in vocabulary.names)
  if count and naming != "dataset" and synonyms != "max":
    print(
      f"{vocabulary.name}: naming={naming} has several names for {count} of "
      f"{len(vocabulary.names)} classes; published scores count the best of them "
      f"(--config.synonyms=max), got {synonyms}",
      flush=True,
    )


def _source(c, data_set: registry.DataSet, split: str):
  if data_set.source is not None:
    return registry.resolve(data_set.source)(c, split)
  return records.Records(_folder(c, data_set), split)


def _contents(c, data_set: registry.DataSet) -> dict[str, dict]:
  return {} if data_set.source is not None else records.contents(_folder(c, data_set))


def _folder(c, data_set: registry.DataSet):
  return records.prepared_folder(data_set.prepared, c.data_dir, data_set.variant(c))


def captions(config) -> dict:
  """Image-caption batches of the synthetic shapes and a zero-shot test, for pre-training CLIP.

  Args:
    config: of the run: seed, scenes, steps, batch_size, test_images, clip.image_size (S).

  Returns:
    {"batches": steps done -> the batches after them {image uint8 [B,S,S,3], caption},
    "test_images": uint8 [test_images,S,S,3], "test_labels": int32 [test_images], "test_names":
    their class names}.
  """
  drawn = {"kind": config.scenes, "size": config.clip.image_size}
  source = shapes.CaptionedShapes(config.seed, config.steps * config.batch_size, **drawn)

  def batches(start_step: int) -> Iterator[dict]:
    rest = grain.MapDataset.source(source)[start_step * config.batch_size :]
    stream = rest.batch(config.batch_size, drop_remainder=True)
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

  # Another seed than that of the training images.
  images, labels = shapes.single_object_images(config.test_images, config.seed + 1, **drawn)
  return {
    "batches": batches,
    "test_images": images,
    "test_labels": labels,
    "test_names": shapes.OBJECTS,
  }


def scenes(data_dir: str) -> dict:
  """The scenes of `shapes` with labels of all classes, for `rpn locality`; drawn if not there.

  Returns:
    {"train", "val": sequences of {image uint8 [H,W,3], label uint8 [H,W]}, "names": of classes}.
  """
  shapes.prepare(data_dir)
  splits = {split: shapes.source(data_dir, split) for split in ("train", "val")}
  return {**splits, "names": shapes.CLASSES}
