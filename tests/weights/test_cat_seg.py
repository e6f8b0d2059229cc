"""Checkpoints of the official CAT-Seg as people have them: converted, back, and refused."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest
from flax import traverse_util

from rpn_jax import Segmenter
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.models import cost_aggregation
from rpn_jax.models.trained import join
from rpn_jax.tasks import convert
from rpn_jax.weights import cat_seg, clip_file, prompts_file, torch_archive
from rpn_jax.weights.arrays import read_arrays
from tests import tiny


@pytest.fixture(scope="module")
def official(golden_catseg):
  meta = json.loads((golden_catseg / "meta.json").read_text())["geometry"]
  heads = {"vision_heads": meta["vis_heads"], "text_heads": meta["text_heads"]}
  state = read_arrays(golden_catseg / "model_tiny.pth").arrays
  return cat_seg.from_official(state, "the set", heads)


def clip_before(official, folder, changed="(query|value)", name="clip.safetensors"):
  """The CLIP that the checkpoint may have started from: other values where it was trained."""
  import re

  flat = cat_seg._apart(official.params)
  rng = np.random.default_rng(0)
  pattern = re.compile(rf".*in_proj/{changed}")
  flat = {
    path: np.float32(rng.normal(size=x.shape)) if pattern.fullmatch(path) else np.asarray(x)
    for path, x in flat.items()
  }
  params = join(traverse_util.unflatten_dict(flat, sep="/"), {})["params"]
  params = traverse_util.unflatten_dict(
    {p: np.asarray(x) for p, x in traverse_util.flatten_dict(params).items()}
  )
  path = folder / name
  clip_file.save(path, official.clip, params, "float32", {})
  return path


def test_there_and_back(official, golden_catseg, tmp_path, capsys):
  clip, source = clip_before(official, tmp_path), golden_catseg / "model_tiny.pth"
  prompts, back = tmp_path / "cat_seg.safetensors", tmp_path / "back.pth"
  assert convert.main([str(source), str(prompts), f"--clip={clip}"]) == 0
  assert "CAT-Seg on a query_value tuned CLIP" in capsys.readouterr().out
  content = prompts_file.load(prompts)
  assert content.config["cat_seg"]["tuned"] == "query_value"
  trained = {name for name in cat_seg._apart(content.prompts) if name.startswith("visual/")}
  assert trained == {
    f"visual/block_{i}/attn/in_proj/{third}"
    for i in range(official.clip.vision_layers)
    for third in ("query", "value")
  }
  assert convert.main([str(prompts), str(back), f"--clip={clip}"]) == 0
  want, got = read_arrays(source).arrays, read_arrays(back).arrays
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_settings_that_no_checkpoint_holds_are_told(official, golden_catseg, tmp_path, capsys):
  source = golden_catseg / "model_tiny.pth"
  heads = cat_seg.from_official(read_arrays(source).arrays, "").clip  # of the official code
  clip = clip_before(official._replace(clip=heads), tmp_path)
  prompts, back = tmp_path / "cat_seg.safetensors", tmp_path / "back.pth"
  assert convert.main([str(source), str(prompts), f"--clip={clip}"]) == 0
  assert "other towers" not in capsys.readouterr().out
  content = prompts_file.load(prompts)
  mean, half = list(pixels.CLIP_MEAN), [0.5, 0.5, 0.5]
  for section, changes, told in (
    ("cat_seg", {}, ""),
    ("cat_seg", {"class_attention": "full"}, "cat_seg.class_attention: linear -> full"),
    ("data", {"mean": half}, f"data.mean: {mean} -> {half}"),
  ):
    own = {**content.config, section: {**content.config[section], **changes}}
    prompts_file.save(prompts, content._replace(config=own))
    capsys.readouterr()
    assert convert.main([str(prompts), str(back), f"--clip={clip}"]) == 0
    *_, line = capsys.readouterr().out.strip().splitlines()
    assert line.endswith(told) and ("no checkpoint holds" in line) == bool(changes)
  # The same weights in a CLIP that computes something else.
  other = dataclasses.replace(heads, activation="gelu")
  clip = clip_before(official._replace(clip=other), tmp_path)
  for said, arguments in (("other towers", (source, prompts)), ("no checkpoint", (prompts, back))):
    assert convert.main([*map(str, arguments), f"--clip={clip}"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if said in x]
    assert line.endswith("(official -> yours): clip.activation: quick_gelu -> gelu")


def test_what_was_trained_is_told_by_what_differs(official, tmp_path):
  for changed, tuned in (("(query|key)", "query_key"), ("(query|key|value)", "attention")):
    _, clip = clip_file.load_clip(clip_before(official, tmp_path, changed))
    assert cat_seg.trained_part(official, clip, "")[1]["tuned"] == tuned


def recast(source, path, dtype):
  """A file of `torch.save` with its float32 as another type: the storages and their name."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
    for info in old.infolist():
      content = old.read(info)
      if info.filename.endswith("data.pkl"):
        content = content.replace(b"FloatStorage", TORCH[dtype].encode())
      elif "/data/" in info.filename:
        content = np.frombuffer(content, np.float32).astype(dtype).tobytes()
      new.writestr(info.filename, content)
  return path


TORCH = {"float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


@pytest.mark.parametrize("dtype", TORCH)
def test_checkpoints_of_half_precision(official, golden_catseg, tmp_path, capsys, dtype):
  """What is frozen is CLIP's, rounded; what is trained is read as it was rounded."""
  clip, out = clip_before(official, tmp_path), tmp_path / "half.safetensors"
  half = recast(golden_catseg / "model_tiny.pth", tmp_path / "half.pth", dtype)
  assert {x.dtype.name for x in read_arrays(half).arrays.values()} == {dtype}
  assert convert.main([str(half), str(out), f"--clip={clip}"]) == 0
  assert "CAT-Seg on a query_value tuned CLIP" in capsys.readouterr().out
  content = prompts_file.load(out)
  assert content.config["cat_seg"]["window"] == official.fields["window"]
  kernel = content.prompts["cost_embed"]["kernel"]
  want = np.asarray(official.prompts["cost_embed"]["kernel"]).astype(dtype)
  np.testing.assert_array_equal(kernel, want.astype(np.float32))


def test_windows_and_grid_are_those_of_the_masks(official):
  """Also of a grid whose last windows are filled up."""
  layers = [f"layers.{i}.swin_block.block_2.attn_mask" for i in range(2)]
  for window, grid in ((12, 24), (4, 8), (3, 4), (5, 12)):
    *_, mask = cost_aggregation.window_layout(grid, grid, window, window // 2)
    assert cat_seg._window_and_grid(dict.fromkeys(layers, mask), "") == (window, grid)
  *_, other = cost_aggregation.window_layout(8, 8, 4, 2)
  for masks in ([mask, other], [mask[:, :, :-1]] * 2, [mask[0]] * 2, [mask[:-1]] * 2):
    with pytest.raises(InputError, match=r"the same in all layers, in FILE; 'layers.0.*got shape"):
      cat_seg._window_and_grid(dict(zip(layers, masks)), "FILE")


def test_what_a_checkpoint_without_masks_is_taken_as_is_said(
  official, golden_catseg, tmp_path, capsys
):
  clip, bare = clip_before(official, tmp_path), tmp_path / "bare.pth"
  state = read_arrays(golden_catseg / "model_tiny.pth").arrays
  assert any(name.endswith("attn_mask") for name in state)
  torch_archive.write(bare, {k: x for k, x in state.items() if not k.endswith("attn_mask")}, {})
  assert convert.main([str(bare), str(tmp_path / "bare.safetensors"), f"--clip={clip}"]) == 0
  (told,) = [line for line in capsys.readouterr().out.splitlines() if "attn_mask" in line]
  assert "windows of 12 in a grid of 24 x 24 patches are assumed" in told


def test_a_padding_that_the_checkpoint_contradicts(official, golden_catseg, tmp_path, capsys):
  clip, out = clip_before(official, tmp_path), tmp_path / "out.safetensors"
  assert convert.main([str(golden_catseg / "model_tiny.pth"), str(out), f"--clip={clip}"]) == 0
  content, config = prompts_file.load(out), prompts_file.config_of(out)
  assert content.config["cat_seg"]["pad_len"] == 256
  for asked in (0, 8):  # the second has the same arrays
    with config.unlocked():
      config.cat_seg.pad_len = asked
    with pytest.raises(InputError, match=rf"cat_seg\.pad_len: 256 -> {asked}"):
      prompts_file.check(content, out, config.to_dict(), content.clip, lambda: content.prompts)
  # A header that says what the arrays contradict.
  fields = {**content.config["cat_seg"], "pad_len": 0}
  prompts_file.save(out, content._replace(config={**content.config, "cat_seg": fields}))
  width = official.fields["text_width"]
  with pytest.raises(InputError, match=rf"classes_0/padding_guidance: \({width},\) -> "):
    Segmenter.load(out)


def test_what_detectron2_puts_beside_the_model_is_not_read(golden_catseg, official, tmp_path):
  state = read_arrays(golden_catseg / "model_tiny.pth").arrays
  torch_archive.write(tmp_path / "training.pth", state, {"iteration": "79999"}, "model")
  again = cat_seg.from_official(
    read_arrays(tmp_path / "training.pth").arrays,
    "",
    {"vision_heads": official.clip.vision_heads, "text_heads": official.clip.text_heads},
  )
  assert again.fields == official.fields


def convert_error(capsys, *arguments):
  assert convert.main([str(a) for a in arguments]) == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  return line


def test_bad_checkpoints(official, golden_catseg, tmp_path, capsys):
  source, out = golden_catseg / "model_tiny.pth", tmp_path / "out.safetensors"
  clip = f"--clip={clip_before(official, tmp_path)}"
  assert "pass --clip=FILE_OR_NAME" in convert_error(capsys, source, out)
  other = clip_before(official, tmp_path, "nothing", "other.safetensors")
  config, params = clip_file.load_clip(other)
  params["visual"]["ln_pre"]["scale"] = params["visual"]["ln_pre"]["scale"] + 1
  clip_file.save(other, config, params, "float32", {})
  line = convert_error(capsys, source, out, f"--clip={other}")
  assert "visual/ln_pre/scale differs, which CAT-Seg does not train" in line

  tiny.save(other)
  line = convert_error(capsys, source, out, f"--clip={other}")
  assert "has shape" in line and "pass the weights that were trained around" in line
  with pytest.raises(InputError, match=r"model_tiny.pth is a checkpoint of CAT-Seg's .*convert it"):
    clip_file.load_clip(source)

  state = dict(read_arrays(source).arrays)
  broken = tmp_path / "broken.pth"

  def refused(changes, match):
    torch_archive.write(
      broken, {k: v for k, v in {**state, **changes}.items() if v is not None}, {}
    )
    assert match in convert_error(capsys, broken, out, clip)

  refused({"backbone.stem.conv1.weight": np.ones(3)}, "as those of arXiv version 1 have")
  aggregator = "sem_seg_head.predictor.transformer."
  refused({f"{aggregator}head.bias": None}, "missing")
  refused({f"{aggregator}surplus": np.ones(3)}, "unknown")
  refused({f"{aggregator}guidance_projection.0.weight": np.ones(3)}, "with 4 axes")
  broken.write_bytes(source.read_bytes()[:100_000])
  assert str(broken) in convert_error(capsys, broken, out, clip)
  assert not out.exists()
