"""Models passed on: exported, shared to a hub on loopback by its own client, loaded by name."""

import dataclasses
import json
import re
import shutil
import time
import types

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from PIL import Image

from configs import cat_seg as cat_seg_config
from configs import open_vocab
from configs import shapes as shapes_config
from rpn_jax import Segmenter, cli
from rpn_jax.base import paths, transfer
from rpn_jax.inference import published
from rpn_jax.inference.predictor import Predictor
from rpn_jax.inference.segmenter import note_of
from rpn_jax.tasks import demo, evaluate, model_card
from rpn_jax.weights import checkpoints, clip_file, exported, hub, prompts_file, upload
from rpn_jax.weights.clip_file import with_normalization
from tests import tiny
from tests.models.test_network import CAT_SEG
from tests.tools.hub_server import Fault, point_client, serve
from tests.weights.checks import one_line, same

# huggingface_hub 2.4.0 sends large files so.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ADDRESS, CLIP = "hf://me/shapes", "hf://you/clip"
WORDS = ["plain orange", "sand", "a zebra"]
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)


def test_a_card_names_the_set_that_training_scored(tmp_path):
  """Not the first of those that are evaluated afterwards."""
  config = open_vocab.get_config().to_dict()
  scores = {"step": 7, **dict.fromkeys(evaluate.COLUMNS, 0.5)}
  content = {"config": config, "last": scores, "best": scores}
  paths.write_json(tmp_path / "metrics.json", content)
  assert {row.set for row in model_card.read_scores(tmp_path, 7)} == {"coco_stuff171"}
  config["eval"]["sets"] = ["ade150"]
  paths.write_json(tmp_path / "eval.json", content)
  assert {row.set for row in model_card.read_scores(tmp_path, 7)} == {"coco_stuff171", "ade150"}


@pytest.fixture(scope="module")
def shipped():
  return Segmenter.load()


def write_export(folder, content, predictor):
  """What an export has, without a run."""
  folder.mkdir()
  prompts_file.save(folder / exported.PROMPTS, content)
  caption = "A scene."
  card = model_card.render(content, predictor, content.names, folder, caption, "MIT")
  (folder / exported.CARD).write_text(card)
  Image.new("RGB", (8, 8)).save(folder / exported.PICTURE)
  return folder


@pytest.fixture(scope="module")
def folder(shipped, tmp_path_factory):
  """The prompts of the package as an export."""
  content = prompts_file.load(clip_file.ASSETS / "shapes_prompts.safetensors")
  clip = exported.portable_clip("shapes_clip.safetensors", shipped.predictor.clip)
  content = content._replace(config=exported.portable(content.config, clip))
  return write_export(tmp_path_factory.mktemp("run") / "export", content, shipped.predictor)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  path = tmp_path_factory.mktemp("clip") / "model.safetensors"
  tiny.save(path)
  with serve({}) as server:
    server.clip = {"model.safetensors": path.read_bytes(), "config.json": b"{}"}
    yield server


@pytest.fixture
def server(served, tmp_path, monkeypatch):
  """An empty cache, the accounts `me` and `you`, a CLIP of the latter; the token is of `me`."""
  served.repositories.clear()
  for state in (served.commits, served.objects, served.private, served.faults, served.log):
    state.clear()
  served.repositories["you/clip"] = dict(served.clip)
  served.users.update({"hf_me": "me", "hf_you": "you"})
  point_client(served, tmp_path, monkeypatch)
  monkeypatch.setenv("HF_TOKEN", "hf_me")
  monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0, 0.0))
  clock = types.SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic)
  monkeypatch.setattr(_http, "time", clock)
  paths.cache_dir.cache_clear()
  yield served
  paths.cache_dir.cache_clear()
  huggingface_hub.close_session()


def share(folder, address=ADDRESS, **options) -> upload.Shared:
  repository = upload.check_address(address).repository
  return upload.share(upload.contents(folder, address), repository, **options)


# As `Segmenter.load` does it, before a network is built.
load = exported.load_prompts


def test_the_whole_way(server, folder, shipped, tmp_path, monkeypatch, capsys):
  """Listed, uploaded in one commit, loaded by name into an empty cache, then without a network."""
  assert cli.main(["share", str(folder), ADDRESS, "--dry-run"]) == 0
  assert server.log == [] and "Nothing was uploaded" in capsys.readouterr().out
  assert cli.main(["share", str(folder), ADDRESS]) == 0
  said = capsys.readouterr().out
  assert all(name in said.partition("is at commit")[0] for name in exported.FILES)
  assert len(server.commits["me/shapes"]) == 2  # the first one is empty
  files = server.repositories["me/shapes"]
  assert set(files) == {*exported.FILES, ".gitattributes"}
  assert files[exported.PROMPTS] == (folder / exported.PROMPTS).read_bytes()
  for place in ("api", "create", "yaml", "preupload", "batch", "put", "verify", "commit"):
    assert any(line.split()[1] == place for line in server.log), place

  monkeypatch.delenv("HF_TOKEN")
  wanted = shipped(demo.SCENE, WORDS)
  loaded = Segmenter.load(ADDRESS)
  assert loaded.method == shipped.method.replace("step 3000 of shapes", f"step 3000 of {ADDRESS}")
  assert "knows drawn shapes" in loaded.method and "knows drawn shapes" in note_of(ADDRESS)
  np.testing.assert_array_equal(loaded(demo.SCENE, WORDS).scores, wanted.scores)

  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  server.log.clear()
  command = ["segment", str(demo.SCENE), ", ".join(WORDS), f"--model={ADDRESS}"]
  assert cli.main([*command, f"--out={tmp_path / 'out'}"]) == 0
  with Image.open(tmp_path / "out/scene_labels.png") as labels:
    np.testing.assert_array_equal(np.asarray(labels), wanted.labels)
  one_line("has one only, its last: leave it out", Segmenter.load, ADDRESS, checkpoint="best")
  models = demo.Models([ADDRESS])
  result = demo.segment(models, str(demo.SCENE), "sand", "", 0.0, ADDRESS, demo.OWN_METHOD)
  assert ADDRESS in result.method and "knows drawn shapes" in models.note(ADDRESS)
  assert server.log == []
  assert cli.main(["weights"]) == 0 and ADDRESS in capsys.readouterr().out
  assert cli.main(["weights", "rm", ADDRESS]) == 0
  one_line("HF_HUB_OFFLINE is set, so nothing is fetched: unset it", Segmenter.load, ADDRESS)


def settings(method: str, tuner: str = "rpn"):
  """A config around the CLIP of the hub."""
  if method == "cat_seg":
    config = cat_seg_config.get_config("runlocal").unlock()
    cat_seg_config.recipe(config, window=32)
    config.cat_seg.update(dataclasses.asdict(CAT_SEG))
  else:
    config = shapes_config.get_config("runlocal").unlock()
    config.model.tuner, config.model.m2oe_experts = tuner, 2
    config.data.crop = config.data.short_side = config.eval.crop = 32
    config.eval.stride = 24
  config.clip = CLIP
  return with_normalization(config.lock())


def made_up(config, names=("a", "b")):
  """An export's content with random prompts, and its predictor."""
  predictor = Predictor.from_config(config)
  rng = np.random.default_rng(1)
  draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
  prompts = jax.tree.map(draw, predictor.prompt_shapes(config.data.crop))
  stored = exported.portable(config.to_dict(), config.clip)
  fingerprint = predictor.encoder.fingerprint
  return prompts_file.Prompts(prompts, fingerprint, stored, names, 4), predictor


CASES = [("rpn", "lora+ssf")]
CASES += [
  pytest.param(*case, marks=pytest.mark.slow) for case in (("rpn", "full"), ("cat_seg", ""))
]
CASES += [
  pytest.param("rpn", tuner, marks=pytest.mark.slow)
  for tuner in published.TUNERS
  if tuner != "full"
]


@pytest.mark.parametrize("method, tuner", CASES)
def test_every_tuner_and_cat_seg(server, tmp_path, method, tuner):
  """What was trained, parts of the tower too, comes back to the bit, and its CLIP with it."""
  content, predictor = made_up(settings(method, tuner))
  share(write_export(tmp_path / "export", content, predictor))
  hub.remove(checkpoints.find(CLIP))
  server.log.clear()
  loaded = Segmenter.load(ADDRESS)
  same(loaded.predictor.prompts, content.prompts)
  assert server.log.count("GET cdn - -") == 2  # the model and its CLIP
  assert loaded.step == 4 and f"of {ADDRESS}" in loaded.method
  if method == "cat_seg":
    local = Segmenter.load(tmp_path / "export")
    np.testing.assert_array_equal(loaded(IMAGE, "a, b").scores, local(IMAGE, "a, b").scores)


def test_a_second_share(server, folder, tmp_path, capsys):
  first = share(folder)
  server.log.clear()
  assert share(folder) == first._replace(changed=False)
  assert server.log == ["GET api - token"]
  copy = shutil.copytree(folder, tmp_path / "export")
  card = copy / exported.CARD
  card.write_text(card.read_text().replace("license: other", "license: mit"))
  third = share(copy)
  assert third.changed and len(server.commits["me/shapes"]) == 3
  assert "PUT put - -" not in server.log  # the hub has the others
  assert cli.main(["share", str(copy), ADDRESS]) == 0
  assert f"has these very files already, at commit {third.commit[:12]}" in capsys.readouterr().out


def test_revisions(server, folder, tmp_path):
  first = share(folder).commit
  content = prompts_file.load(folder / exported.PROMPTS)
  copy = shutil.copytree(folder, tmp_path / "export")
  prompts_file.save(copy / exported.PROMPTS, content._replace(step=3001))
  second = share(copy).commit
  steps = [load(f"{ADDRESS}@{sha}").step for sha in (first, second, "main")]
  assert steps == [3000, 3001, 3001]
  one_line("HTTP 404, no such revision", load, f"{ADDRESS}@v9")
  # What is here stays until it is removed.
  load(ADDRESS)
  share(folder)
  assert load(ADDRESS).step == 3001
  hub.remove(checkpoints.find(ADDRESS))
  assert load(ADDRESS).step == 3000


# What is refused


def test_tokens_and_owners(server, folder, monkeypatch):
  one_line("hf://you/x was not shared: HTTP 403, you may not write", share, folder, "hf://you/x")
  one_line("HTTP 403, you may not write there", share, folder, "hf://nobody/x")
  assert list(server.repositories) == ["you/clip"]
  share(folder, private=True)
  one_line("HTTP 404, no such repository", load, "hf://me/none")
  monkeypatch.setenv("HF_TOKEN", "hf_you")
  one_line("HTTP 404, no such repository", load, ADDRESS)
  one_line("HTTP 403, you may not write there", share, folder)
  monkeypatch.setenv("HF_TOKEN", "hf_me")
  assert load(ADDRESS).step == 3000
  monkeypatch.setenv("HF_TOKEN", "hf_old")
  invalid = "HTTP 401: the token is not valid: set HF_TOKEN"
  one_line(f"{ADDRESS} was not shared: {invalid}", share, folder)
  one_line(invalid, load, "hf://me/other")
  monkeypatch.delenv("HF_TOKEN")
  server.log.clear()
  one_line("expected a token of the hub with the right to write, got none", share, folder)
  assert server.log == []
  one_line("HTTP 401: no such repository, or a private one", load, "hf://me/shapes@main")


def test_a_public_repository_does_not_become_private_in_silence(server, folder):
  share(folder)
  assert "me/shapes" not in server.private
  one_line("exists and is public: make it private", share, folder, private=True)


def test_a_repository_of_something_else_is_left_alone(server, folder):
  server.repositories["me/bert"] = {"model.safetensors": b"", "README.md": b"BERT"}
  one_line(r"hf://me/bert holds something else \(model.safet", share, folder, "hf://me/bert")
  server.repositories["me/notes"] = {"LICENSE": b"MIT", ".gitattributes": b""}
  assert share(folder, "hf://me/notes").changed


BROKEN = {
  "cut": ("put", Fault(cut=1000), "the connection broke|no connection"),
  "500": ("put", Fault(status=500), "HTTP 500: try again later"),
  "commit": ("commit", Fault(status=503), "HTTP 503: try again later"),
  "html": (
    "preupload", Fault(body=b"<html>", headers={"Content-Type": "text/html"}),
    "the answer is not the hub's but some page",
  ),
}  # fmt: skip


@pytest.mark.parametrize("place, fault, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_upload_commits_nothing(server, folder, place, fault, message):
  server.faults[place] = fault
  error = one_line(message, share, folder)
  assert error.endswith("a commit has all of the files or is not made")
  assert server.repositories["me/shapes"].keys() == {".gitattributes"}
  one_line("no prompts.safetensors of a trained model", load, ADDRESS)
  del server.faults[place]
  assert share(folder).changed and load(ADDRESS).step == 3000


def test_a_short_interruption_is_not_noticed(server, folder):
  server.faults["put"] = Fault(cut=1000, times=1)
  assert share(folder).changed and "PUT put cut" in server.log


def test_a_card_that_the_hub_refuses(server, folder, tmp_path):
  copy = shutil.copytree(folder, tmp_path / "export")
  (copy / exported.CARD).write_text("my model")
  one_line('Invalid metadata in README.md. - "license" must be a string', share, copy)


def test_folders_that_are_no_export(folder, tmp_path):
  contents = lambda path: upload.contents(path, ADDRESS)
  one_line("expected the folder of an export, .* is none", contents, tmp_path / "none")
  one_line("it has no prompts.safetensors: --mode=export", contents, tmp_path)
  copy = shutil.copytree(folder, tmp_path / "export")
  (copy / ".env").write_text("HF_TOKEN=secret")
  one_line("expected nothing but .*, got also .env: move these out", contents, copy)
  (copy / ".env").unlink()
  content = prompts_file.load(copy / exported.PROMPTS)
  for config in ({}, content.config | {"clip": ""}):  # as of a checkpoint of the official RPN
    prompts_file.save(copy / exported.PROMPTS, content._replace(config=config))
    one_line("expected the CLIP weights of an export in .*, it names none: share", contents, copy)
  for changes in ({"clip": "/home/me/clip.safetensors"}, {"prompts": "x"}, {"clip": "../c.pt"}):
    edited = content._replace(config=content.config | changes)
    prompts_file.save(copy / exported.PROMPTS, edited)
    one_line("names paths of this machine", contents, copy)
  for address in ("me/shapes", "hf://me/shapes@v1", "hf://me/shapes/a.safetensors", "ViT-B/16"):
    one_line("expected hf://owner/name to share to", upload.check_address, address)
  one_line("did you mean 'hf://me/x'", upload.check_address, "https://huggingface.co/me/x")


def test_tampered_files(server, folder):
  share(folder)
  content = bytearray(server.repositories["me/shapes"][exported.PROMPTS])
  content[-100] ^= 1
  server.faults["cdn"] = Fault(body=bytes(content), times=1)
  one_line("expected the checksum .*the file was damaged on its way", load, ADDRESS)
  load(ADDRESS)
  # On the disk, and by whoever uploads without this project: the file has a checksum of its own.
  hub.cached(checkpoints.find(ADDRESS)).write_bytes(content)
  one_line("is damaged: its values differ from their checksum", load, ADDRESS)
  hub.remove(checkpoints.find(ADDRESS))
  server.repositories["me/shapes"][exported.PROMPTS] = bytes(content)
  one_line("is damaged: its values differ from their checksum", load, ADDRESS)


def test_what_is_at_an_address_is_told_apart(server, folder):
  assert "training-free" in Segmenter.load(CLIP, templates="single").method
  one_line(f"{CLIP} holds CLIP weights: use it as --config.clip", exported.load_prompts, CLIP)
  one_line("needs a training run or its prompts", Segmenter.load, CLIP, method="rpn")
  one_line("clip='x' is for a trained model", Segmenter.load, CLIP, clip="x")
  share(folder)
  for use in (clip_file.load_clip, lambda name: with_normalization(unset(name))):
    one_line(f"expected CLIP weights, {ADDRESS} is a trained model", use, ADDRESS)
  server.repositories["you/bert"] = {"README.md": b"", "model.ckpt": b""}
  one_line("no prompts.safetensors of a trained model, and no weights", load, "hf://you/bert")
  server.repositories["you/odd"] = {exported.PROMPTS: b"not safetensors at all"}
  one_line("expected CLIP weights", load, "hf://you/odd")


def unset(name):
  config = shapes_config.get_config("runlocal").unlock()
  config.clip, config.data.mean = name, None
  return config


# The CLIP of a model


def test_how_clip_is_called(server, tmp_path):
  clip = tiny.TINY
  assert exported.portable_clip("vit-b-16", clip) == "ViT-B/16"
  assert exported.portable_clip("shapes_clip.safetensors", clip) == "shapes_clip.safetensors"
  named = clip_file.find_weights(CLIP)
  assert exported.portable_clip(str(named), clip) == CLIP  # a copy from the cache folder
  path = tmp_path / "ViT-B-16.safetensors"
  tiny.save(path)
  assert exported.portable_clip(str(path), clip) == path.name  # another architecture
  published = checkpoints.CHECKPOINTS["ViT-B/16"].config
  assert exported.portable_clip(str(path), published) == "ViT-B/16"
  nearly = path.rename(tmp_path / "ViT-B-17.safetensors")
  assert exported.portable_clip(str(nearly), published) == nearly.name


def test_no_path_of_this_machine_is_passed_on():
  config = settings_with_paths()
  portable = exported.portable(config, "ViT-B/16")
  assert "/secret" not in json.dumps(portable) and "/secret" in json.dumps(config)
  assert exported.holds_paths(config) and not exported.holds_paths(portable)


def settings_with_paths() -> dict:
  config = shapes_config.get_config("runlocal").unlock()
  config.clip = config.prompts = config.data.data_dir = config.data.local_copy = "/secret/x"
  return config.to_dict()


def test_a_clip_without_a_public_name(server, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  content, predictor = made_up(settings("rpn", "lora"))
  content = content._replace(config=content.config | {"clip": "mine.safetensors"})
  share(write_export(tmp_path / "export", content, predictor))
  card = server.repositories["me/shapes"][exported.CARD].decode()
  assert "`mine.safetensors`, which is not public: `--clip=FILE`" in card
  message = one_line("needs the CLIP weights mine.safetensors", Segmenter.load, ADDRESS)
  assert content.clip in message and "--clip=FILE" in message
  tiny.save(tmp_path / "elsewhere.safetensors")
  assert Segmenter.load(ADDRESS, clip="elsewhere.safetensors").step == 4
  (tmp_path / "elsewhere.safetensors").rename("mine.safetensors")
  assert Segmenter.load(ADDRESS).step == 4
  tiny.save(tmp_path / "mine.safetensors", seed=1)
  one_line(r"around the CLIP weights \w+, config.clip has \w+ \(mine", Segmenter.load, ADDRESS)
  # A stranger's file leads nowhere else.
  stolen = content._replace(config=content.config | {"clip": str(tmp_path / "mine.safetensors")})
  prompts_file.save(hub.cached(checkpoints.find(ADDRESS)), stolen)
  one_line("which are not public and not here", Segmenter.load, ADDRESS)


# The card


def test_the_card(server, folder):
  share(folder)
  card = huggingface_hub.ModelCard((folder / exported.CARD).read_text())
  assert card.data.license == "other" and card.data.library_name == "rpn_jax"
  for target in re.findall(r"\]\(([^)]+)\)", card.content):
    assert (folder / target).exists() or target.startswith("https://")
  text = server.repositories["me/shapes"][exported.CARD].decode()
  assert exported.ADDRESS in card.content and exported.ADDRESS not in text
  (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
  (command,) = re.findall(r"```sh\n(.*?)```", text, re.S)
  assert len(code.splitlines()) == 3 and f'"{ADDRESS}"' in code and f"={ADDRESS}" in command
  assert "**Note: its CLIP, shapes_clip, knows drawn shapes and no photographs.**" in text
  assert re.search(r"^\*\*|^# .* on shapes$", text, re.M)
