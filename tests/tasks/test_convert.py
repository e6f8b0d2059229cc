"""The command rpn convert: CLIP's weights, the authors' checkpoints, what is verified."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rpn_jax import cli
from rpn_jax.base import pixels, transfer
from rpn_jax.base.errors import InputError
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.tasks import convert
from rpn_jax.weights import (
  architecture,
  arrays,
  authors,
  clip_file,
  names,
  prompts_file,
  torch_archive,
)
from tests.weights.checks import same
from tests.weights.files import (
  GOLDEN,
  TORCHSCRIPT,
  dictionary,
  hf_config,
  hf_names,
  number,
  text,
  write_shards,
  write_state,
)  # fmt: skip


def test_command_line(tmp_path, capsys):
  target = tmp_path / "x.safetensors"
  assert convert.main([str(TORCHSCRIPT), str(target), "--dtype", "float16"]) == 0
  printed = capsys.readouterr().out
  count = sum(value.size for value in jax.tree.leaves(clip_file.load(target)[1]))
  note = "knows 64 tokens, CLIP's tokenizer makes ids up to 49407: no text can be embedded"
  told = ("TorchScript archive", "1 x 128 (2 heads)", "images cropped to a square, OpenAI's mean")
  for part in (*told, f"{count:,} parameters", str(target), note):
    assert part in printed
  assert convert.main([str(TORCHSCRIPT), str(target), "--activation", "gelu"]) == 2
  assert "'quick_gelu' as in" in capsys.readouterr().err
  assert convert.main([str(tmp_path / "missing"), str(target)]) == 2
  assert capsys.readouterr().err.count("\n") == 1


def test_paths_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "x.pt").write_bytes(TORCHSCRIPT.read_bytes())
  assert convert.main(["~/x.pt", "~/y.safetensors"]) == 0
  assert (tmp_path / "y.safetensors").is_file()


@pytest.mark.parametrize("command", ["convert", "convert_vit"])
def test_help_shows_a_command_that_runs(command, capsys):
  with pytest.raises(SystemExit) as ended:
    cli.main([command, "--help"])
  assert ended.value.code == 0
  assert f"python -m rpn_jax {command} " in capsys.readouterr().out


def test_verify(tmp_path, capsys, monkeypatch):
  source, target = clip_file.find_weights("shapes_clip.safetensors"), tmp_path / "x.safetensors"
  assert convert.main([str(source), str(target), "--verify"]) == 0
  printed = capsys.readouterr().out
  assert f"sha256 {transfer.sha256(source)}: no file of OpenAI's" in printed
  assert "a photo of a kitten" in printed and re.search(r"\d of 6 in order", printed)
  monkeypatch.setitem(convert.PUBLISHED, transfer.sha256(source), "ViT-X")
  assert convert.main([str(source), str(target), "--verify"]) == 0
  assert "OpenAI's ViT-X" in capsys.readouterr().out
  # A vocabulary of another tokenizer: no similarities, but an answer.
  assert convert.main([str(TORCHSCRIPT), str(target), "--verify"]) == 0
  assert "no similarities of texts: " in capsys.readouterr().out


@pytest.mark.parametrize(
  ("source", "flag", "said"),
  [
    ("shapes_clip", "--clip=x", "--clip is not for weights of CLIP, which the source is"),
    ("shapes_prompts", "--dtype=float32", "--dtype is not for a file of prompts"),
    ("shapes_prompts", "--vision_heads=0", "--vision_heads is not for a file of prompts"),
    ("shapes_prompts", "--verify", "--verify is not for a file of prompts"),
    ("shapes_prompts", "--clip=x", "--clip=x is not for prompts of RPN"),
  ],
)
def test_flags_of_another_kind_of_source(tmp_path, capsys, source, flag, said):
  source = clip_file.find_weights(f"{source}.safetensors")
  assert convert.main([str(source), str(tmp_path / "x.pth"), flag]) == 2
  err = capsys.readouterr().err
  assert said in err and err.endswith("leave it out\n") and err.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_an_mmcv_checkpoint_becomes_prompts_and_goes_back(tmp_path, capsys):
  """By way of files, with every array of the recorded ones equal at the end."""
  recorded = dict(np.load(GOLDEN / "params.npz"))
  clip, prompts = authors.from_authors(recorded)
  # Notes as mmcv leaves them, one of NumPy's numbers among them.
  number_of_numpy = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(" + text("f8")
  number_of_numpy += b"\x89\x88tR(K\x03" + text("<") + b"NNNK\xffK\xffK\x00tbc_codecs\nencode\n("
  number_of_numpy += text("\x00" * 8) + text("latin1") + b"tRtR"
  best = {"best_score": number_of_numpy, "last_ckpt": text("work_dirs/latest.pth")}
  meta = {"epoch": number(1), "env_info": text("Linux\n"), "hook_msgs": dictionary(best)}

  def mmcv(root):
    return dictionary({"meta": dictionary(meta), "state_dict": root, "optimizer": b"}"})

  source = write_state(tmp_path / "rpn.pth", recorded, mmcv)
  # The CLIP around it, with its logit scale.
  params = {**clip, "logit_scale": np.float32(4.6)}
  fields = architecture.fields_from_shapes(recorded, names.AUTHORS, "golden")
  heads = {"vision_heads": 4, "text_heads": 2, "activation": "quick_gelu"}
  clip_file.save(tmp_path / "clip.safetensors", CLIPConfig(**fields, **heads), params)

  ours, back = tmp_path / "prompts.safetensors", tmp_path / "back.pth"
  assert convert.main([str(source), str(ours)]) == 2
  assert "pass --clip=FILE" in capsys.readouterr().err
  option = f"--clip={tmp_path}/clip.safetensors"
  assert convert.main([str(source), str(ours), option, "--dtype=float16"]) == 2
  assert "--dtype is not for a checkpoint of RPN" in capsys.readouterr().err
  assert convert.main([str(source), str(ours), option]) == 0, capsys.readouterr().err
  content = prompts_file.load(ours)
  same(content.prompts, prompts)
  assert content.clip == arrays.fingerprint(params)
  assert content.config["model"]["deep_tokens"] == prompts["deep_tokens"].shape[1]
  # The official code normalizes images as for ImageNet, which no CLIP does.
  config = prompts_file.config_of(ours)
  assert (config.data.mean, config.data.std) == (pixels.IMAGENET_MEAN, pixels.IMAGENET_STD)
  config.data.mean = pixels.CLIP_MEAN
  with pytest.raises(
    InputError, match=r"other settings .*data\.mean: \[0\.485, .* -> \[0\.48145466, "
  ):
    prompts_file.check(content, ours, config.to_dict(), content.clip, lambda: content.prompts)
  # Settings of which the official code has others, and those that no checkpoint holds.
  other = content.config["model"] | {"itp": "no_image", "class_embedding_copies": 1}
  prompts_file.save(tmp_path / "other.safetensors", content._replace(config={"model": other}))
  assert convert.main([str(tmp_path / "other.safetensors"), str(back)]) == 2
  said = capsys.readouterr().err
  assert "class_embedding_copies: 2 -> 1; itp: image_to_pixel -> no_image), and would" in said
  assert said.count("\n") == 1 and not back.exists()
  told = {**content.config, "templates": "imagenet", "data": {"mean": [0.5] * 3}}
  prompts_file.save(ours, content._replace(config=told))
  assert convert.main([str(ours), str(back)]) == 0
  assert "give them there: templates imagenet, mean [0.5, 0.5, 0.5]\n" in capsys.readouterr().out
  kind, state, _ = torch_archive.read(back)
  trainable = json.loads((GOLDEN / "meta.json").read_text())["trainable"]
  assert kind == torch_archive.STATE_DICT
  assert {*state, *authors.UNUSED} == set(trainable)
  for name, value in state.items():
    np.testing.assert_array_equal(value, recorded[name])
  params["text"]["projection"] = params["text"]["projection"] + 1
  clip_file.save(tmp_path / "clip.safetensors", CLIPConfig(**fields, **heads), params)
  assert convert.main([str(source), str(ours), option]) == 2
  assert "text/projection differs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "fields", "count"),
  [
    ("B/32", {"patch_size": 32}, 151_277_313),
    ("B/16", {}, 149_620_737),
    ("L/14", {"patch_size": 14}, 427_616_513),
    ("L/14@336", {"patch_size": 14, "image_size": 336}, 427_944_193),
  ],
)
def test_published_sizes(tmp_path, name, fields, count):
  """Full-size random files of every family and type to one tree of parameters."""
  if name[0] == "L":
    fields = {**fields, "vision_width": 1024, "vision_layers": 24, "vision_heads": 16,
              "embed_dim": 768, "text_width": 768, "text_heads": 12}  # fmt: skip
  config = CLIPConfig(**fields)
  noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float16)
  rules = names.clip_rules(names.OPENAI, config.vision_layers, config.text_layers)
  shapes = architecture.expected_shapes(config)
  state = {}
  for rule in rules:
    shape, axes = shapes[rule.ours], names.LAYOUTS[rule.layout]
    theirs = [shape[i] for i in np.argsort(axes)] if axes else shape
    state[rule.theirs] = np.resize(noise, theirs)
  openai, hf = tmp_path / "openai.safetensors", tmp_path / "hf"
  hf.mkdir()
  safetensors.numpy.save_file(state, openai)
  # bfloat16 holds fewer digits than the noise has: what is equal is its rounding.
  rounded = {k: v.astype(jnp.bfloat16) for k, v in state.items()}
  renamed = hf_names(rounded, config.vision_layers, config.text_layers)
  write_shards(hf, renamed)
  (hf / "config.json").write_text(json.dumps(hf_config(config)))
  del rounded, renamed
  for source, options in ((openai, ["--activation=quick_gelu"]), (hf, [])):
    target = tmp_path / "ours.safetensors"
    assert convert.main([str(source), str(target), *options]) == 0
    again, params = clip_file.load(target)
    assert again == config
    assert sum(value.size for value in jax.tree.leaves(params)) == count
    want = state["visual.transformer.resblocks.11.mlp.c_fc.weight"].T
    want = want if source == openai else want.astype(jnp.bfloat16)
    got = params["visual"]["block_11"]["mlp"]["c_fc"]["kernel"]
    np.testing.assert_array_equal(got, want.astype(np.float32))
    target.unlink()
