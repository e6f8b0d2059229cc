"""Arrays from files of every kind, shards among them; what is not weights refused."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rpn_jax.weights import arrays, clip_file
from tests.weights.checks import one_line, same
from tests.weights.files import (
  HEADS,
  OPENCLIP,
  OPENCLIP_CONFIG,
  TINY,
  TORCHSCRIPT,
  hf_config,
  hf_names,
  write_shards,
)  # fmt: skip


def test_fingerprint(tiny):
  first = arrays.fingerprint(tiny)
  assert len(first) == 16 and int(first, 16) >= 0
  assert arrays.fingerprint(jax.tree.map(jnp.asarray, tiny)) == first
  assert arrays.fingerprint({**tiny, "logit_scale": np.float32(9)}) != first
  assert arrays.fingerprint({"a": np.zeros((2, 3))}) != arrays.fingerprint({"a": np.zeros((3, 2))})


def test_shards(tmp_path, tiny, state):
  index = write_shards(tmp_path, hf_names(state, 1, 2))
  (tmp_path / "config.json").write_text(json.dumps(hf_config()))
  for path in (tmp_path, index):
    config, params = clip_file.load(path)
    assert config == TINY
    same(params, tiny)
  places = json.loads(index.read_text())["weight_map"]
  victim = sorted(places)[0]
  outside = tmp_path.parent / "outside.safetensors"
  outside.write_bytes(safetensors.numpy.save({victim: np.zeros(1, "f")}))
  for wrong, match in (
    ({**places, victim: "../outside.safetensors"}, r"got the path '\.\./outside"),
    ({**places, victim: str(outside)}, "got the path"),
    ({**places, victim: "model-00002-of-00003.safetensors"}, "differs"),
    ({**places, victim: "missing.safetensors"}, "does not exist"),
    ({**places, victim: 3}, "weight_map"),
    ({k: v for k, v in places.items() if k != victim}, "differs"),
    ([], "weight_map"),
  ):
    index.write_text(json.dumps({"weight_map": wrong}))
    one_line(match, clip_file.load, index)
  index.write_text("[" * 100_000)
  one_line("cannot be read", clip_file.load, index)


def test_files_of_another_kind(tmp_path, tiny):
  path = tmp_path / "x.pt"
  for content, match in (
    (b"\xff\xd8\xff\xe0\x00\x10JFIF and so on", "neither"),
    (b"", "neither"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "before PyTorch 1.6"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:5\n", "run git lfs pull"),
    (TORCHSCRIPT.read_bytes()[:100_000], "damaged"),
    (OPENCLIP.read_bytes()[:100_000], "damaged"),
    (OPENCLIP.read_bytes()[:20], "damaged"),
    (safetensors.numpy.save({"a": np.zeros(2, np.uint8)}), "U8"),
  ):
    path.write_bytes(content)
    assert str(path) in one_line(match, clip_file.load, path)
  one_line("does not exist", clip_file.load, tmp_path / "missing.pt")
  (tmp_path / "empty").mkdir()
  one_line("such as model.safetensors, got none", clip_file.load, tmp_path / "empty")
  (tmp_path / "y.pt").write_bytes(b"")
  one_line("got several, such as x.pt and y.pt: name the file", clip_file.load, tmp_path)


def test_shards_in_a_bucket_are_copied_and_nothing_else(tmp_path, bucket, tiny, state):
  """By their index; a training's folders and files may lie beside them."""
  index = write_shards(tmp_path, hf_names(state, 1, 2))
  (tmp_path / "config.json").write_text(json.dumps(hf_config()))
  index.rename(index.with_name("model.safetensors.index.fp16.json"))
  wanted = sorted(path.name for path in tmp_path.iterdir())
  for path in tmp_path.iterdir():
    (bucket / path.name).write_bytes(path.read_bytes())
  for name in ("optimizer.bin", "logs/events", "old.json/config.json"):
    (bucket / name).write_text("other")
  same(clip_file.load(bucket)[1], tiny)
  copy = arrays.read_arrays(bucket).path.parent
  assert sorted(path.name for path in copy.iterdir() if path.name != ".lock") == wanted
  (bucket / wanted[1]).unlink()
  one_line("model-00001-of-00003.safetensors does not exist", arrays.read_arrays, bucket)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "weights.safetensors"])
def test_the_only_file_in_a_folder(tmp_path, tiny, state, name):
  (tmp_path / name).write_bytes(safetensors.numpy.save(state))
  same(clip_file.load(tmp_path, HEADS)[1], tiny)


def test_files_of_several_libraries_in_a_folder(tmp_path, tiny, state):
  """As in timm's repositories: its own file holds the image tower alone."""
  (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save({"a": np.zeros(1, "f")}))
  (tmp_path / "config.json").write_text('{"architecture": "vit"}')
  index = write_shards(tmp_path, state)
  index.rename(tmp_path / "open_clip_model.safetensors.index.json")
  (tmp_path / "open_clip_config.json").write_text(json.dumps(OPENCLIP_CONFIG))
  config, params = clip_file.load(tmp_path)
  assert config == dataclasses.replace(TINY, activation="gelu")
  same(params, tiny)
  (tmp_path / "open_clip_config.json").unlink()
  one_line("visual.conv1.weight", clip_file.load, tmp_path)


def test_only_files_are_replaced(tmp_path, tiny):
  os.mkfifo(tmp_path / "fifo")
  (tmp_path / "file").write_text("old")
  (tmp_path / "link").symlink_to("file")
  (tmp_path / "nowhere").symlink_to("missing")
  (tmp_path / "folder").mkdir()
  before = sorted(tmp_path.iterdir())
  for name, kind in (
    ("fifo", "a device"), ("link", "a link"), ("nowhere", "a link"), ("folder", "a folder"),
  ):  # fmt: skip
    one_line(
      f"cannot write .*/{name}, which is .*{kind}", clip_file.save, tmp_path / name, TINY, tiny
    )
  assert sorted(tmp_path.iterdir()) == before and (tmp_path / "fifo").is_fifo()
  assert (tmp_path / "file").read_text() == "old"


def test_written_files_may_be_read_by_whom_the_umask_lets(tmp_path):
  before = os.umask(0o027)
  try:
    arrays.write_safetensors(tmp_path / "x", {"a": np.zeros(3, np.float32)}, {})
  finally:
    os.umask(before)
  assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
