"""Config fields: declared once, enforced at the door, printed in docs/configs.md."""

import importlib
import json
import math
import subprocess
import sys

import pytest

from configs import ablations, reference, shapes
from rpn_jax import config
from rpn_jax.base import fields
from rpn_jax.base.errors import InputError
from rpn_jax.config import self_training
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.text import templates
from rpn_jax.training import losses, sharding
from rpn_jax.training.identity import ADDED_FIELDS
from rpn_jax.weights.clip_file import with_normalization
from tests import FIXTURES, ROOT, tiny

DECLARED = {path: f for path, f in fields.declared(config.Run).items() if not fields.is_section(f)}
BOUNDED = [path for path, f in DECLARED.items() if config.spec(f).bounds]
WORDED = [path for path, f in DECLARED.items() if config.spec(f).words]
# What only configs/shapes.py has.
SHAPES_ONLY = {"data.train_images"}
NO_PRESET = ("training_free", "cat_seg", "shapes_clip")
OLD_RUN = FIXTURES / "run_0_2_0/workdir/config.json"


def changed(path: str, value) -> dict:
  """The defaults as nested dictionaries, without their types, and one other value."""
  c = config.defaults().to_dict()
  section, _, name = path.rpartition(".")
  (c[section] if section else c)[name] = value
  return c


def families():
  for name in reference.FAMILIES:
    words = {"ablations": "table5_rpn", "study": "base_rpn"}.get(name, "")
    for preset in ("", "released") if name not in NO_PRESET else ("",):
      c = importlib.import_module(f"configs.{name}").get_config(
        ",".join(filter(None, (words, preset)))
      )
      yield f"{name}:{preset}", c


# What is declared


def test_importing_it_is_fast():
  code = "import sys, rpn_jax.config; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_page_is_fresh():
  assert reference.PAGE.read_text() == reference.markdown(), "run: python -m configs.reference"


def test_every_field_is_in_the_page_with_its_meaning_and_what_is_allowed():
  rows = [line for line in reference.PAGE.read_text().splitlines() if line.startswith("| `")]
  for of in config.TASKS.values():
    for path, f in fields.declared(of).items():
      if fields.is_section(f):
        continue
      spec = config.spec(f)
      of_path = [row for row in rows if row.startswith(f"| `{path}` |")]
      wanted = (f"| {spec.comment} |", *spec.words, *spec.bounds)
      assert len(spec.comment) > 3
      assert any(all(text in row for text in wanted) for row in of_path), path


def test_nothing_undeclared_is_in_any_family():
  for name, c in families():
    found = set(reference.flat(c))
    if c.task == "pretrain":
      clip = {path for path in found if path.startswith("clip.")}
      assert {path.removeprefix("clip.") for path in clip} <= set(CLIPConfig.__dataclass_fields__)
      assert found - clip | {"clip"} == set(fields.declared(config.Pretrain))
    else:
      shapes_only = SHAPES_ONLY if c.data.name == "shapes" else set()
      assert found == set(DECLARED) - SHAPES_ONLY | shapes_only, name
    config.check(c)


def test_a_run_of_0_2_0_has_the_same_config(monkeypatch):
  monkeypatch.chdir(ROOT)
  old = json.loads(OLD_RUN.read_text())["config"]
  c = shapes.get_config("runlocal")
  given = {path: value for path, value in reference.flat(old).items() if path in (
    "clip", "eval_every", "data.data_dir", "data.eval_images", "data.train_images", "data.crop",
    "data.short_side", "eval.crop", "eval.stride",
    "optimizer.warmup_steps",  # was 50 for runs of any length
  )}  # fmt: skip
  c.update_from_flattened_dict({**given, "data.scale": (128, 32)})
  assert c.data.mean is None and c.data.std is None  # left to the weights since
  new = json.loads(json.dumps(with_normalization(c).to_dict()))
  added = {
    "loss": {"skip_empty": False},
    "model": {"oft_block": 16, "context_tokens": 4},
    "optimizer": {"schedule": "poly", "no_decay": ""},
    "data": {"recipe": "mmsegmentation", "label_resize": "floor_nearest", "long_side": 0,
             "local_copy": "", "held_out": 0.0, "unseen": []},
    "self_training": {"teacher": "sclip", "refresh": 0, "confidence": 0.0},
    "eval": {
      "layout": "windows", "square": 640, "keep_padding": True, "naming": "dataset",
      "protocol": "", "refine": "none", "pamr_steps": 10, "pamr_dilations": [8, 16],
      "threshold": 0.0, "area_threshold": 0.0,
    },
    "dense": {
      path.removeprefix("dense."): value for path, value in ADDED_FIELDS.items()
      if path.startswith("dense.")
    },
  }  # fmt: skip
  for section, values in added.items():
    assert {name: new[section].pop(name) for name in values} == values
  del new["cat_seg"]
  assert new == old
  config.check(old)  # as lists


def test_the_schedule_follows_the_steps():
  c = shapes.get_config()
  c.steps = 7
  assert c.optimizer.steps == 7


def test_what_a_continued_or_evaluated_run_may_change():
  assert {
    "log_every", "eval_every", "save_every", "max_skipped", "data_dir", "local_copy", "workers",
    "threads", "parallel", "shard_state", "remat",
  } == config.FREE  # fmt: skip
  assert {
    "eval", "short_side", "long_side", "eval_images", "prompts", "class_pooling_eval",
  } == config.EVALUATION  # fmt: skip


def test_the_words_are_those_of_the_code():
  words = {path: set(config.spec(DECLARED[path]).words) for path in WORDED}
  assert words["loss.name"] == set(losses.LOSSES)
  assert words["parallel"] == set(sharding.MODES)
  assert words["synonyms"] == set(templates.SYNONYMS)


def test_backbones():
  assert CLIPConfig(**config.BACKBONES["b16"].architecture) == CLIPConfig()
  for backbone in config.BACKBONES.values():
    patch = CLIPConfig(**backbone.architecture).patch_size
    assert backbone.title.endswith(f"/{patch}") and backbone.crop % patch == 0
    assert backbone.stride < backbone.crop


def test_a_warm_up_follows_the_steps_until_it_is_set():
  c = config.defaults()
  seen = []
  for c.steps in (20_000, 9_000, 300, 20, 4):
    seen.append(c.optimizer.warmup_steps)
    assert not config.notes_on_schedule(c)
  assert seen == [1500, 1500, 50, 3, 0]
  c.update_from_flattened_dict({"optimizer.warmup_steps": 4})
  (note,) = config.notes_on_schedule(c)
  assert note.startswith("config.optimizer.warmup_steps=4: the rate is still rising at the last of")
  c.steps = 5
  assert c.optimizer.warmup_steps == 4 and not config.notes_on_schedule(c)


@pytest.mark.parametrize(
  "side, trained_at, words",
  [(512, 224, ""), (518, 224, ""), (64, 64, ""), (112, 224, ""),
   (512, 64, "64 pixels that X was trained at: expect slow steps and poor scores; 64 to 128"),
   (64, 224, "224 pixels that X was trained at: expect poor scores; 224 to 448 pixels fit")],
)  # fmt: skip
def test_sizes_far_from_the_towers_own_are_told(side, trained_at, words):
  notes = config.notes_on_sizes({side: "config.data.crop"}, "X", trained_at)
  assert len(notes) == bool(words)
  for note in notes:
    assert note.startswith(f"config.data.crop={side} is far from the {words}")


def test_sections_take_changes_of_their_fields_only():
  c = config.section(config.Loss, name="softmax")
  assert c.to_dict() == {"name": "softmax", "mask_ignored": False, "skip_empty": False}
  with pytest.raises(TypeError, match="Loss has no field nam"):
    config.section(config.Loss, nam="softmax")
  grid = config.section(config.RPNConfig)
  grid.h_grid = (3, 4)  # declared as a tuple, although the default is None
  with pytest.raises(TypeError):
    grid.h_grid = 3


# What is enforced


@pytest.mark.parametrize("path", WORDED)
def test_words_are_enforced(path):
  words = config.spec(DECLARED[path]).words
  message = rf"config\.{path}='{words[0]}z' is not known; did you mean '{words[0]}'"
  with pytest.raises(InputError, match=message):
    config.check(changed(path, words[0] + "z"))
  for word in set(words) - {"pretrain"}:  # which has other fields
    config.check(changed(path, word))


@pytest.mark.parametrize("path", BOUNDED)
def test_bounds_are_enforced(path):
  f = DECLARED[path]
  spec, default = config.spec(f), f.default

  def given(number):
    """The number in the form of the field."""
    of = {
      "model.h_grid": 2, "eval.scales": 1, "data.std": 3, "dense.res_clip_blocks": 4,
      "dense.sc_clip_blocks": 4,
    }.get(path)  # fmt: skip
    count = of or (len(default) if isinstance(default, tuple) else None)
    c = changed(path, (number,) * count if count else number)
    if path == "eval.crop":  # not below the stride
      c["eval"]["stride"] = 1
    if path.startswith("self_training."):
      readers = [name for name, read in self_training.READ.items() if path[14:] in read]
      c["data"]["setting"] = readers[0]
    config.check(c)

  step = 1 if "int" in str(f.type) else 1e-3
  low = spec.above if spec.above is not None else spec.at_least
  wrong = [low if spec.above is not None else low - step, 2.0**80 if step < 1 else 2**80]
  wrong += [spec.at_most + step] if spec.at_most < fields.MAX_VALUE else []
  wrong += [math.nan, math.inf] if step < 1 else []
  for number in wrong:
    with pytest.raises(InputError, match=rf"config\.{path}: expected (at|above)"):
      given(number)
  given(low + step)
  if spec.above is None:
    given(low)
  if spec.at_most < fields.MAX_VALUE:
    given(spec.at_most)


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("data.crop", 0, "config.data.crop: expected at least 1, such as 512, got 0"),
    ("data.crop", "abc", "config.data.crop: expected int, such as 512, got 'abc'"),
    ("data.crop", 32.0, "expected int, such as 512, got 32.0"),
    ("data.crop", True, "expected int, such as 512, got True"),
    ("data.train_images", 0, "config.data.train_images: expected at least 1, got 0"),
    ("data.scale", ("abc",), "expected tuple[int, int], such as (2048, 512), got ('abc',)"),
    ("data.scale", (512,), "expected tuple[int, int]"),
    ("data.photometric", 1, "expected bool, such as True, got 1"),
    ("data.mean", (0.5, 0.5), "expected tuple[float, float, float]"),
    ("data.mean", (0.5, math.nan, 0.5), "config.data.mean: expected at least"),
    ("eval.seen_penalty", math.inf, "config.eval.seen_penalty: expected at most"),
    ("eval.seen_penalty", None, "expected float, such as 0.1, got None"),
    ("eval.sets", "voc20", "expected tuple[str, ...], such as (), got 'voc20'"),
    ("optimizer.groups", (("h", "h"),), "expected tuple[tuple[str, str, float], ...]"),
    ("optimizer.groups", (("a", "h", 1.0), ("a", "x", 9.0)), "of different names, got 'a' twice"),
    ("dense.denoise", 50.0, "config.dense.denoise: expected at most 1, such as 0.0, got 50.0"),
    ("model.h_grid", (3,), "expected tuple[int, int] | None, such as None, got (3,)"),
    ("loss.name", ["sigmoid"], "config.loss.name: expected str"),
    ("templates", 3, "config.templates: expected str | tuple[str, ...]"),
    ("data", 3, "config.data: expected Data, got 3"),
    ("task", [], "config.task: expected str, such as 'segment', got []"),
  ],
)
def test_bad_values(path, value, message):
  with pytest.raises(InputError) as error:
    config.check(changed(path, value))
  assert message in str(error.value)


def test_values_of_other_versions_are_accepted():
  c = config.defaults().to_dict()
  del c["optimizer"]["clip_norm"], c["self_training"]
  c |= {"later": 3}
  c["data"] |= {"scale": [2048, 512], "ratio": [1, 2]}  # JSON's lists; a whole number is a float
  c["templates"] = ["a photo of a {}", "a {}"]
  config.check(c)


def test_pmap_holds_the_whole_state():
  c = config.defaults()
  c.shard_state, c.parallel = True, "pmap"
  with pytest.raises(InputError, match=r'shard_state=True needs config\.parallel="shard_map"'):
    config.check(c)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"self_training.teacher": "maskclip"}, "'zero_shot', since only annotation_free reads it"),
    ({"data.setting": "transductive", "self_training.refresh": 4}, "refresh=4: expected 0 with"),
    ({"data.setting": "supervised", "self_training.confidence": 0.5}, "only annotation_free reads"),
    ({"data.setting": "annotation_free", "self_training.start": 0.1}, "only transductive reads it"),
    (
      {"data.setting": "annotation_free", "eval.seen_penalty": 0.3},
      "0.3: expected 0.1 with .* non",
    ),
    (
      {"data.setting": "annotation_free", "self_training.refresh": 7, "steps": 7},
      "refresh=7: expected less than config.steps=7",
    ),
    ({"self_training.start": 0.1}, ""),  # earlier versions accepted it
    ({"data.setting": "annotation_free", "eval.seen_penalty": 0.0}, ""),
    ({"data.setting": "annotation_free", "self_training.refresh": 6, "steps": 7}, ""),
  ],
)
def test_what_the_setting_does_not_read(changes, message):
  c = config.defaults()
  c.update_from_flattened_dict(changes)
  if not message:
    return config.check(c)
  with pytest.raises(InputError, match=message):
    config.check(c)


def test_windows_leave_no_pixel_out():
  c = config.defaults()
  c.eval.stride = c.eval.crop
  config.check(c)
  c.eval.crop = 256
  message = r"config\.eval\.stride=512: expected at most config\.eval\.crop=256, .* as to 213, or"
  with pytest.raises(InputError, match=message):
    config.check(c)


def test_a_config_file_of_an_earlier_version_is_completed():
  c = config.defaults()
  c.data.crop, c.steps = 256, 100
  del c.remat, c.eval.protocol, c.optimizer.no_decay, c.optimizer.steps, c.self_training
  config.complete(c.lock())
  wanted = config.defaults()
  wanted.data.crop, wanted.steps = 256, 100
  assert c.to_dict() == wanted.to_dict() and c.is_locked


def test_paths_are_expanded(monkeypatch):
  monkeypatch.setenv("HOME", "/home/ada")
  c = config.defaults().lock()
  c.clip, c.prompts, c.data.data_dir, c.templates = "~/clip.pt", "", "~", "~/{}"
  config.complete(c)
  assert (c.clip, c.data.data_dir) == ("/home/ada/clip.pt", "/home/ada")
  assert (c.prompts, c.templates) == ("", "~/{}")
  c.clip = "./weights//~x"
  config.complete(c)
  assert c.clip == "./weights//~x"
  pretraining = config.section(config.Pretrain)
  config.complete(pretraining)
  assert pretraining == config.section(config.Pretrain)


# The network's fields


def test_network_fields():
  fields = config.RPNConfig(tuner="rpn+lora", h_grid=(2, 2))
  assert len({config.RPNConfig(), config.RPNConfig(tuner="rpn"), fields}) == 2
  assert config.section(config.RPNConfig).to_dict() == vars(config.RPNConfig())


def test_wrong_words_are_named():
  with pytest.raises(ValueError, match="combine='sum' is not known; did you mean 'mul'"):
    config.RPNConfig(combine="sum")
  config.RPNConfig(tuner="mine")  # looked up where tuners are


def test_every_row_of_the_ablations_passes_the_check():
  for table, rows in ablations.TABLES.items():
    for row in rows:
      config.check(ablations.get_config(f"{table}_{row},dataset=voc"))


def test_flags_of_the_tests_fit():
  names = [flag.removeprefix("--config.").partition("=")[0] for flag in tiny.FLAGS]
  assert set(names) <= set(DECLARED)
