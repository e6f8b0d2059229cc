"""Writes tests/fixtures/clip_files.zip: files of tiny CLIPs by the libraries that people use.

Each case is a folder as its library leaves it, with random weights, biases and norms too. Cases
that load hold `right.npz`, image and text features of the library for the image and the tokens of
`inputs.npz`. Of the token embedding only the rows in use are not zero, so that 49,408 of them take
no room. The weights of cases that are refused are all zero. Needs an environment of its own, which
the tests do not:

    pip install torch==2.13.0 numpy transformers==5.24.0 open_clip_torch==3.3.0 \
      clip-anytorch==2.6.0
    python tests/tools/make_clip_files.py
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterator

import clip.clip
import clip.model
import numpy as np
import open_clip.model
import open_clip.transform
import torch
import transformers
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.push_to_hf_hub import save_config_for_hf
from PIL import Image

TARGET = pathlib.Path(__file__).parent.parent / "fixtures/clip_files.zip"
IMAGE, PATCH, CONTEXT, JOINT, VOCAB = 16, 8, 8, 8, 49408
TOKENS = torch.zeros(2, CONTEXT, dtype=torch.long)
TOKENS[0, :7] = torch.tensor([49406, 320, 1125, 539, 320, 2368, 49407])
TOKENS[1, :3] = torch.tensor([49406, 1929, 49407])
PIXELS = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(7))


def randomize(model, zero: bool = False) -> torch.nn.Module:
  """Random parameters in steps of 1 / 32, which take little room, or zeros."""
  generator = torch.Generator().manual_seed(20)
  for name, parameter in model.named_parameters():
    values = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() >= 2:
      values *= 1.5 * parameter[0].numel() ** -0.5
    else:
      values = 0.3 * values + (1.0 if parameter.dim() and name.endswith("weight") else 0.0)
    if "token_embedding" in name:
      unused = ~torch.isin(torch.arange(len(values)), TOKENS)
      values[unused] = 0
    parameter.data = (32 * values).round() / 32 * (not zero)
  return model.eval()


@contextlib.contextmanager
def case(archive: zipfile.ZipFile, name: str) -> Iterator[pathlib.Path]:
  with tempfile.TemporaryDirectory() as folder:
    yield pathlib.Path(folder)
    for path in sorted(pathlib.Path(folder).iterdir()):
      entry = zipfile.ZipInfo(f"{name}/{path.name}")
      archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


@torch.no_grad()
def record(folder: pathlib.Path, image: Callable, text: Callable) -> None:
  found = {}
  for key, value in (("image_features", image(PIXELS)), ("text_features", text(TOKENS))):
    # Newer versions of transformers return several things.
    found[key] = getattr(value, "pooler_output", value).float().numpy()
  np.savez_compressed(folder / "right.npz", **found)


def edit(path: pathlib.Path, change: Callable[[dict], None]) -> None:
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


# transformers


def hf_config(vision: dict | None = None, text: dict | None = None, **top):
  return transformers.CLIPConfig(
    projection_dim=JOINT,
    vision_config={
      "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
      "image_size": IMAGE, "patch_size": PATCH, **(vision or {}),
    },
    text_config={
      "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1,
      "num_attention_heads": 4, "max_position_embeddings": CONTEXT, **(text or {}),
    },
    **top,
  )  # fmt: skip


def hf(archive, name: str, refused: bool = False, change=None, **sections) -> None:
  """A folder of CLIPModel; `change` edits config.json as older versions wrote it."""
  with case(archive, name) as folder:
    model = randomize(transformers.CLIPModel(hf_config(**sections)), refused)
    model.save_pretrained(folder)
    if change:
      edit(folder / "config.json", change)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    if not refused:
      record(folder, model.get_image_features, model.get_text_features)


def older(content: dict) -> None:
  """Another number of heads in `text_config` than in `text_config_dict`, which comes first."""
  for tower in ("text", "vision"):
    right = content[f"{tower}_config"]
    content[f"{tower}_config_dict"] = dict(right)
    content[f"{tower}_config"] = {**right, "num_attention_heads": 1, "hidden_act": "quick_gelu"}


def hf_preprocessor(archive) -> None:
  with case(archive, "hf_half") as folder:
    model = randomize(transformers.CLIPModel(hf_config()))
    model.save_pretrained(folder)
    record(folder, model.get_image_features, model.get_text_features)
    half, side = [0.5] * 3, {"height": IMAGE, "width": IMAGE}
    transformers.CLIPImageProcessor(
      image_mean=half, image_std=half, size=side, do_center_crop=False
    ).save_pretrained(folder)


def others(archive) -> None:
  """Models of transformers that are not CLIP, named by the `model_type` in their config."""
  tiny = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1,
          "num_attention_heads": 2}  # fmt: skip
  vision = {**tiny, "image_size": IMAGE, "patch_size": PATCH}
  text = {**tiny, "vocab_size": 60, "max_position_embeddings": CONTEXT}
  kinds: dict[str, tuple] = {
    "metaclip_2": (
      transformers.MetaClip2Model,
      transformers.MetaClip2Config,
      {**text, "vocab_size": 60000},
    ),
    "siglip": (transformers.SiglipModel, transformers.SiglipConfig, text),
    "altclip": (transformers.AltCLIPModel, transformers.AltCLIPConfig, {**text, "project_dim": 8}),
    "chinese_clip": (transformers.ChineseCLIPModel, transformers.ChineseCLIPConfig, text),
    "blip": (transformers.BlipModel, transformers.BlipConfig, text),
  }
  for name, (model, config, text_config) in kinds.items():
    with case(archive, name) as folder:
      settings = config(text_config=text_config, vision_config=vision, projection_dim=JOINT)
      randomize(model(settings), zero=True).save_pretrained(folder)


# open_clip and OpenAI's code


def openclip_config(vision: dict | None = None, text: dict | None = None, **top) -> dict:
  return {
    "embed_dim": JOINT,
    "vision_cfg": {"width": 16, "layers": 2, "head_width": 8, "patch_size": PATCH,
                   "image_size": IMAGE, **(vision or {})},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCAB, "width": 8, "heads": 4,
                 "layers": 1, **(text or {})},
    **top,
  }  # fmt: skip


def openclip_model(config: dict, zero: bool = False) -> torch.nn.Module:
  config = {**config, "vision_cfg": open_clip.model.CLIPVisionCfg(**config["vision_cfg"]),
            "text_cfg": open_clip.model.CLIPTextCfg(**config["text_cfg"])}  # fmt: skip
  custom = config.pop("custom_text", False)
  build = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
  return randomize(build(**config), zero)


def openclip(
  archive, name: str, refused: bool = False, preprocess=None, save=torch.save, wrap=None, **sections
) -> None:
  """A folder of open_clip; `wrap` makes a checkpoint of the state dict."""
  with case(archive, name) as folder:
    config = openclip_config(**sections)
    model = openclip_model(config, refused)
    open_clip.model.set_model_preprocess_cfg(
      model, {**dataclasses.asdict(open_clip.transform.PreprocessCfg()), **(preprocess or {})}
    )
    save_config_for_hf(model, folder / "open_clip_config.json", config)
    state = model.state_dict()
    save(wrap(state) if wrap else state, folder / "open_clip_pytorch_model.bin")
    if not refused:
      record(folder, model.encode_image, model.encode_text)


def training_checkpoint(state: dict) -> dict:
  """As a training with torch.compile and DDP leaves it, with the optimizer's state."""
  parameters = [torch.nn.Parameter(value.clone()) for value in state.values()]
  optimizer = torch.optim.AdamW(parameters)
  for parameter in parameters:
    parameter.grad = torch.zeros_like(parameter)
  optimizer.step()
  named = {f"_orig_mod.module.{name}": value for name, value in state.items()}
  return {"epoch": 3, "name": "run", "optimizer": optimizer.state_dict(), "state_dict": named}


def without_paths(archive: bytes) -> bytes:
  """The TorchScript archive without debug records, which hold paths of this machine."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w") as target:
    for entry in source.infolist():
      if not entry.filename.endswith(".debug_pkl"):
        target.writestr(entry, source.read(entry))
  return buffer.getvalue()


def torchscript(archive) -> None:
  for name, config in (
    ("openclip_script", openclip_config(quick_gelu=True)),
    ("openclip_script_gelu", openclip_config(custom_text=True)),
    ("openclip_script_avg", openclip_config(vision={"pool_type": "avg"})),
  ):
    with case(archive, name) as folder:
      model = openclip_model(config)
      buffer = io.BytesIO()
      torch.jit.save(torch.jit.script(model), buffer)
      (folder / "model.pt").write_bytes(without_paths(buffer.getvalue()))
      record(folder, model.encode_image, model.encode_text)


def openai(archive) -> None:
  """OpenAI's own code, traced: one head of width 64 in each tower, most weights zero."""
  model = randomize(clip.model.CLIP(JOINT, IMAGE, 1, 64, PATCH, CONTEXT, VOCAB, 64, 1, 1))
  for parameter in model.parameters():
    if parameter.dim() == 2 and parameter.numel() > 1000:
      kept = torch.arange(parameter.numel()).reshape(parameter.shape) % 31 == 0
      parameter.data *= kept * 31**0.5 if len(parameter) != VOCAB else 1
  with case(archive, "openai_state") as folder:
    torch.save(model.state_dict(), folder / "model.pt")
    record(folder, model.encode_image, model.encode_text)


def images(archive) -> None:
  """Images of all modes, and what OpenAI's preprocessing makes of them, in steps of 1 / 255."""
  rng = np.random.default_rng(3)
  found = {"palette": rng.integers(0, 256, 768, np.uint8)}
  for mode, channels in (("RGB", 3), ("L", 1), ("P", 1), ("1", 1), ("RGBA", 4), ("LA", 2),
                         ("CMYK", 4)):  # fmt: skip
    # A row of mode "1" has its 40 pixels in 5 bytes.
    shape = (30, 5) if mode == "1" else (30, 40 * channels)
    found[mode] = rng.integers(0, 256, shape, np.uint8)
    image = Image.frombytes(mode, (40, 30), found[mode].tobytes())
    if mode == "P":
      image.putpalette(found["palette"].tobytes())
    right = clip.clip._transform(IMAGE)(image).numpy()
    mean, std = (np.array(x)[:, None, None] for x in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    right = np.round(255 * (right * std + mean)).astype(np.uint8)
    found[f"{mode}_right"] = np.moveaxis(right, 0, -1)
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **found)
  archive.writestr(zipfile.ZipInfo("images.npz"), buffer.getvalue())


def main() -> None:
  with zipfile.ZipFile(TARGET, "w") as archive:
    inputs = io.BytesIO()
    np.savez_compressed(inputs, image=PIXELS.numpy(), tokens=TOKENS.numpy())
    archive.writestr(zipfile.ZipInfo("inputs.npz"), inputs.getvalue())
    images(archive)
    hf(archive, "hf")
    hf(archive, "hf_gelu", vision={"hidden_act": "gelu"}, text={"hidden_act": "gelu"})
    hf(
      archive, "hf_older", change=older, vision={"hidden_act": "gelu"}, text={"hidden_act": "gelu"}
    )
    hf(archive, "hf_eos_2", text={"eos_token_id": 2})
    hf(archive, "hf_wide_mlp", vision={"intermediate_size": 78})
    hf_preprocessor(archive)
    tanh = {"hidden_act": "gelu_pytorch_tanh"}
    hf(archive, "hf_tanh", True, vision=tanh, text=tanh)
    hf(archive, "hf_two_activations", True, vision={"hidden_act": "gelu"})
    hf(archive, "hf_epsilon", True, vision={"layer_norm_eps": 1e-6})
    hf(archive, "hf_eos", True, text={"eos_token_id": 320})
    hf(archive, "hf_vocabulary", True, text={"vocab_size": 49500})
    others(archive)

    openclip(archive, "openclip")
    openclip(archive, "openclip_custom", custom_text=True, quick_gelu=True)
    openclip(archive, "openclip_wide_mlp", vision={"mlp_ratio": 4.9231})
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
    openclip(archive, "openclip_half", preprocess=half)
    openclip(archive, "openclip_training", wrap=training_checkpoint)
    for key in ("model", "model_state_dict"):
      openclip(archive, f"openclip_{key}", wrap=lambda state, key=key: {key: state, "epoch": 1})
    for protocol in (4, 5):
      openclip(
        archive,
        f"openclip_protocol_{protocol}",
        save=lambda state, path, p=protocol: torch.save(state, path, pickle_protocol=p),
      )
    openclip(archive, "openclip_scale_of_one_axis", nonscalar_logit_scale=True)
    refused: dict[str, dict] = {
      "image_pool": {"vision": {"pool_type": "avg"}},
      "text_pool": {"text": {"pool_type": "last"}},
      "no_mask": {"text": {"no_causal_mask": True}},
      "tanh": {"vision": {"act_kwargs": {"approximate": "tanh"}}},
      "epsilon": {"text": {"norm_kwargs": {"eps": 1e-6}}},
      "not_square": {"vision": {"image_size": (32, 8)}},
      "logit_bias": {"init_logit_bias": -10.0},
      "tokenizer": {"text": {"hf_tokenizer_name": "bert-base-uncased"}},
    }
    for name, changes in refused.items():
      openclip(archive, f"openclip_{name}", True, **changes)
    torchscript(archive)
    openai(archive)
  print(f"{TARGET}: {TARGET.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
  main()
