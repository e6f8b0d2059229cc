"""Arrays from files of every kind, shards among them; what is not weights refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rpn_jax.weights import arrays, clip_file
from tests.weights.checks import one_line, same
from tests.weights.files import OPENCLIP, TINY, TORCHSCRIPT, hf_config, hf_names, write_shards


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
    (TORCHSCRIPT.read_bytes()[:100_000], "damaged"),
    (OPENCLIP.read_bytes()[:100_000], "damaged"),
    (OPENCLIP.read_bytes()[:20], "damaged"),
    (safetensors.numpy.save({"a": np.zeros(2, np.uint8)}), "U8"),
  ):
    path.write_bytes(content)
    assert str(path) in one_line(match, clip_file.load, path)
  one_line("does not exist", clip_file.load, tmp_path / "missing.pt")
  one_line("is a folder without any of", clip_file.load, tmp_path)
