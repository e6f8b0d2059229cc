"""From miniature raw files to a training step, for every data set and its config."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import coco_stuff, context, folder, open_vocab, shapes, voc
from data_pipelines import DATA_SETS, datasets, pipeline, prepare, records, registry, vocabularies
from data_pipelines import shapes as drawn
from data_pipelines.sources import own_data
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.training import losses, pseudo_labels
from tests.data_pipelines import raw_ade_coco, raw_pascal
from tests.data_pipelines.test_vocabularies import PUBLISHED

MODULES = {"voc": voc, "context": context, "coco_stuff": coco_stuff, "folder": folder}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Every set, prepared from its miniature raw files."""
  root = tmp_path_factory.mktemp("data")
  for name, rows in registry.prepared_sets().items():
    if rows[0].builder is None or issubclass(registry.builder_class(name), own_data.Annotations):
      continue  # test_own_data.py
    raw = root / "raw" / name
    raw.mkdir(parents=True)
    module = raw_pascal if hasattr(raw_pascal, name) else raw_ade_coco
    getattr(module, name)(raw)
    prepare.prepare(name, raw, root / "prepared", allow_partial=True)
  return root / "prepared"


def make(module, data_dir, arg, **changes):
  config = module.get_config(arg)
  with config.unlocked():
    config.data.data_dir = str(data_dir)
    config.data.crop = config.data.short_side = 32
    config.data.scale = (128, 32)
    config.data.batch_size = 2
    config.data.update(mean=pixels.CLIP_MEAN, std=pixels.CLIP_STD)
    if module is folder:
      config.data.variant = "folder"
    config.update_from_flattened_dict(changes)
  return config


def as_halves(logits, label, step):
  """Two classes, side by side."""
  return jax.numpy.broadcast_to(jax.numpy.arange(label.shape[-1]) // 16, label.shape)


@functools.partial(jax.jit, static_argnums=(2, 3))
def step(bias, label, classes, relabel):
  """A stand-in network, one bias per class, and the loss it is trained with."""

  def loss(bias):
    logits = jax.numpy.broadcast_to(bias, (*label.shape[:1], 4, 4, classes))
    targets = label if relabel is None else relabel(logits, label, 1)
    return sum(term.value for term in losses.sigmoid_loss(logits, targets).values())

  return jax.value_and_grad(loss)(bias)


@pytest.mark.parametrize(
  ("name", "setting"),
  [("voc", s) for s in datasets.SETTINGS]
  + [
    pytest.param(n, s, marks=[pytest.mark.slow] if s != "zero_shot" else [])
    for n in ("context", "coco_stuff")
    for s in datasets.SETTINGS
  ]
  + [("folder", "supervised")],
)
def test_raw_files_to_train_step(name, setting, data_dir):
  data = datasets.load(make(MODULES[name], data_dir, f"runlocal,setting={setting}"))
  batch = next(data.train_batches(0))
  assert batch["image"].shape == (2, 32, 32, 3) and batch["label"].shape == (2, 32, 32)
  known = set(np.unique(batch["label"])) - {255, data.unlabelled}
  if setting == "transductive":
    assert known <= set(data.seen)
    relabel = functools.partial(
      pseudo_labels.relabel, unseen=data.unseen, unlabelled=data.unlabelled, ignore=255, start=0,
    )  # fmt: skip
  elif setting == "annotation_free":
    assert not known and len(data.trained) == len(data.names) and not data.penalized
    relabel = as_halves  # what a teacher sees
  else:
    relabel = None
    assert known <= set(range(len(data.trained)))
  classes = len(data.trained)
  value, gradient = step(np.zeros(classes, np.float32), batch["label"], classes, relabel)
  assert np.isfinite(value) and np.isfinite(gradient).all() and (gradient != 0).any()


def test_pixels_without_a_label_are_filled_and_padding_is_not(data_dir):
  same_crops = {"data.recipe": "detectron2", "data.ratio": (0.5, 2.0)}

  def label(setting, **changes):
    config = make(voc, data_dir, f"runlocal,setting={setting}", **same_crops, **changes)
    return next(datasets.load(config).train_batches(0))["label"]

  padding = label("annotation_free") == 255
  seen, got = (
    label("transductive", **{"self_training.pixels": which}) for which in ("unseen", "unlabelled")
  )
  unlabelled = (seen == 255) & ~padding
  assert padding.any() and unlabelled.any() and (seen[padding] == 255).all()
  np.testing.assert_array_equal(got, np.where(unlabelled, 254, seen))


@pytest.mark.parametrize("name", ["voc20", "context60", "ade150"])
def test_without_annotations_masks_change_nothing(name, data_dir, monkeypatch):
  """Not even which part of an image is cut out; and no split is needed."""
  changes = {"data.name": name, "data.ratio": (0.5, 2.0)}
  config = make(voc, data_dir, "runlocal,annotation_free", **changes)
  batches = [next(datasets.load(config).train_batches(0))]
  source = datasets._source
  for paint in (
    lambda label, rng: rng.permutation(label.ravel()).reshape(label.shape),
    lambda label, rng: np.full_like(label, 255),
    lambda label, rng: rng.integers(0, 65536, label.shape, np.uint16),
  ):
    monkeypatch.setattr(datasets, "_source", lambda *a, paint=paint: Painted(source(*a), paint))
    batches.append(next(datasets.load(config).train_batches(0)))
  for batch in batches[1:]:
    jax.tree.map(np.testing.assert_array_equal, batch, batches[0])
  assert set(np.unique(batches[0]["label"])) == {254, 255}  # the padding


@dataclasses.dataclass(frozen=True)
class Painted:
  """A source with other labels."""

  source: object
  paint: object

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    example = pipeline.check_example(self.source[i])
    return {**example, "label": self.paint(example["label"], np.random.default_rng(i))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_evaluation_labels_are_the_prepared_ones(name, data_dir):
  config = make(open_vocab, data_dir, "", **{"eval.sets": (name,)})
  (data,) = datasets.load_evaluations(config)
  vocabulary = vocabularies.load(name)
  assert data.names == vocabulary.names and data.penalized == () and data.unlabelled is None
  source = records.source(DATA_SETS[name].prepared, data_dir, "val")
  examples = data.eval_examples()
  assert len(examples) == len(source)
  for i in range(len(source)):
    # Every raw value through the vocabulary's table, pixel by pixel, in plain Python.
    raw = source[i]["label"]
    fallback = vocabulary.ignore if vocabulary.unlisted == "ignore" else None
    ids = {**vocabulary.ids, vocabulary.ignore: vocabulary.ignore}
    want = [[ids.get(int(value), fallback) for value in row] for row in raw]
    np.testing.assert_array_equal(examples[i]["label"], np.array(want))
    assert min(examples[i]["image"].shape[:2]) == 32


def test_the_open_vocabulary_list_is_opened_in_order(data_dir):
  config = make(open_vocab, data_dir, "runlocal", **{"data.eval_images": 1})
  opened = datasets.load_evaluations(config)
  assert [d.name for d in opened] == list(config.eval.sets)
  assert [d.ignore for d in opened[:2]] == [65535, 65535]
  assert all(len(d.eval_examples()) == 1 for d in opened)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"data.name": "ade15"}, "did you mean 'ade150'"),
    ({"data.setting": "zeroshot"}, "did you mean 'zero_shot'"),
    ({"data.name": "ade150"}, "has none; use config.data.setting='supervised'"),
    ({"data.data_dir": "/no/such"}, r"python -m data_pipelines\.prepare voc"),
  ],
)
def test_what_is_refused(changes, words, data_dir):
  with pytest.raises(InputError, match=words):
    next(datasets.load(make(voc, data_dir, "runlocal", **changes)).train_batches(0))


def test_a_set_with_a_prompted_background_is_not_trained_on(data_dir):
  config = make(voc, data_dir, "runlocal,supervised", **{"data.name": "voc20b"})
  with pytest.raises(InputError, match="59 names are scored as 21 classes"):
    datasets.load(config).train_batches(0)


def test_names_of_evaluations_are_worded_where_a_set_has_the_wording():
  config = config_of_shapes()
  config.eval.sets = ("context59", "ade150")
  context59, ade150 = datasets.load_evaluations(config)
  assert "table" in context59.names
  config.eval.naming = "catseg"
  worded, same = datasets.load_evaluations(config)
  assert "diningtable" in worded.names and "table" not in worded.names
  assert same.names == ade150.names


@pytest.mark.parametrize("sets", [(), ("ade847", "voc20b")])
def test_a_wording_that_no_evaluated_set_has(sets):
  config = config_of_shapes()
  config.eval.sets, config.eval.naming = sets, "sclip"
  with pytest.raises(InputError, match=r"of which none has that wording; .*data\.naming for the"):
    datasets.load_evaluations(config)


def test_names_whose_best_should_count(capsys):
  config = config_of_shapes()
  config.eval.sets, config.eval.naming = ("voc21", "context59", "ade847"), "sclip"
  config.synonyms = "max"
  datasets.load_evaluations(config)
  assert capsys.readouterr().out == ""
  config.synonyms = "mean"
  datasets.load_evaluations(config)
  out = capsys.readouterr().out
  assert out.startswith("voc21: naming=sclip has several names for 3 of 21 classes; published")
  assert out.count("\n") == 1


def config_of_shapes():
  config = shapes.get_config("runlocal").unlock()
  config.data.update({"train_images": 4, "eval_images": 2, "batch_size": 2, "threads": 0})
  config.data.update({"mean": pixels.CLIP_MEAN, "std": pixels.CLIP_STD})
  return config


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("shapes", r"shapes has no variants, got config\.data\.variant='x'; leave it out"),
    ("crowds", r"crowds has no variants, got config\.data\.variant='x'; leave it out"),
    ("voc20", r"voc has no configs, got 'x'; leave it out"),
    ("ade847", r"config of ade847 'x' is not known"),
  ],
)
def test_a_variant_that_a_set_does_not_have(name, message):
  config = config_of_shapes()
  config.data.update(name=name, variant="x", setting="supervised")
  with pytest.raises(InputError, match=message):
    datasets.load(config)


def test_the_recipe_of_the_config(tmp_path):
  images = {}
  for recipe in ("mmsegmentation", "detectron2"):
    config = config_of_shapes()
    config.data.update({"data_dir": str(tmp_path), "recipe": recipe, "mean": (0, 0, 0)})
    config.data.update({"std": (1 / 255,) * 3, "short_side": 40, "long_side": 32})
    data = datasets.load(config)
    batch = next(data.train_batches(0))
    assert batch["image"].shape == (2, config.data.crop, config.data.crop, 3)
    examples = data.eval_examples()
    assert max(examples[0]["image"].shape[:2]) == 32
    images[recipe] = examples[0]["image"]
  # Without antialias edges are harder.
  assert abs(images["mmsegmentation"] - images["detectron2"]).max() > 1


@pytest.mark.parametrize("setting", datasets.HELD_OUT_SETTINGS)
def test_a_part_of_the_training_images_takes_the_evaluation_sets_place(setting, tmp_path):
  changes = {"data.train_images": 10, "data.eval_images": 2}
  whole = datasets.load(make(shapes, tmp_path, f"setting={setting}", **changes))
  data = datasets.load(
    make(shapes, tmp_path, f"setting={setting}", **changes, **{"data.held_out": 0.3})
  )
  held = [example["id"] for example in data.eval_examples()]
  rest, positions = datasets.split_off(10, 0.3)
  images = drawn.source(tmp_path, "train", drawn.ShapesConfig(num_train=10, num_val=2))
  assert held == [images[i]["id"] for i in positions] and len(held) == 3
  assert sorted(rest + positions) == list(range(10))
  assert set(data.train_indices(0)) <= set(range(7))
  # Nothing is known of classes that are not trained on.
  assert data.names == tuple(whole.names[i] for i in whole.trained) and not data.unseen
  assert data.trained == data.seen == data.scored_as == tuple(range(len(data.names)))
  for example, i in zip(data.eval_examples(), positions):
    expected = np.array([*(whole.trained), 255])[np.minimum(example["label"], len(whole.trained))]
    known = np.isin(images[i]["label"], whole.trained)
    np.testing.assert_array_equal(expected[known], images[i]["label"][known])
    assert (expected[~known] == 255).all()


def test_a_split_of_ones_own_takes_the_place_of_the_data_sets(tmp_path):
  names = ("plain red", "grass", "dotted blue")
  changes = {"data.train_images": 6, "data.eval_images": 2}
  data = datasets.load(make(shapes, tmp_path, "", **changes, **{"data.unseen": names}))
  assert {data.names[i] for i in data.unseen} == set(names)
  assert sorted(data.seen + data.unseen) == list(range(27))
  assert data.trained == data.penalized == data.seen
  examples = data.eval_examples()
  scenes = drawn.source(tmp_path, "val", drawn.ShapesConfig(num_train=6, num_val=2))
  for example, scene in zip(examples, scenes):  # evaluation has all classes
    np.testing.assert_array_equal(example["label"], scene["label"])
  batches = data.train_batches(0)
  labels = {int(i) for _ in range(4) for i in np.unique(next(batches)["label"])}
  assert max(labels - {255}) < len(data.seen)  # and training those that are seen, in their order
  with pytest.raises(InputError, match=r"config\.data\.unseen: class 'red' is not known"):
    datasets.load(make(shapes, tmp_path, "", **{"data.unseen": ("red",)}))
  with pytest.raises(InputError, match="names every class"):
    datasets.load(make(shapes, tmp_path, "", **{"data.unseen": data.names}))
  with pytest.raises(InputError, match="is for setting=zero_shot or transductive, got supervised"):
    datasets.load(make(shapes, tmp_path, "setting=supervised", **{"data.unseen": names}))


def test_what_cannot_be_held_out_is_refused(tmp_path):
  with pytest.raises(InputError, match="is for setting=zero_shot or supervised, got transductive"):
    datasets.load(make(shapes, tmp_path, "setting=transductive", **{"data.held_out": 0.2}))
  with pytest.raises(InputError, match="of 3 training images leaves none on one side"):
    datasets.split_off(3, 0.1)
