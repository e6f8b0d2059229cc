"""Files of weights as other people's programs write them, and as none of them would.

PyTorch's zip format is written opcode by opcode, so that tests can also write lies.
"""

import json
import pathlib
import pickle
import zipfile

import numpy as np
import safetensors.numpy

from rpn_jax.models.clip import CLIPConfig
from tests import FIXTURES, ROOT

GOLDEN = ROOT / "tests/golden"
TORCHSCRIPT = FIXTURES / "torchscript_clip.pt"
STATE_DICT = GOLDEN / "clip/tiny_clip_state_dict.pt"
OPENCLIP = GOLDEN / "clip/tiny_clip_openclip.safetensors"
HF = GOLDEN / "clip/tiny_clip_hf.safetensors"

TINY = CLIPConfig(
  embed_dim=4,
  image_size=4,
  patch_size=2,
  vision_width=8,
  vision_layers=1,
  vision_heads=4,
  text_width=6,
  text_layers=2,
  text_heads=3,
  context_length=5,
  vocab_size=7,
)
HEADS = {"vision_heads": 4, "text_heads": 3, "activation": "quick_gelu"}
# Of the recorded tiny CLIP.
QUICK = {"vision_heads": 2, "text_heads": 1, "activation": "quick_gelu"}

STORAGES = {"float32": b"FloatStorage", "float16": b"HalfStorage", "int64": b"LongStorage"}


# A writer of PyTorch's zip format, opcode by opcode, so that tests can also write what PyTorch
# never would.


def text(value: str) -> bytes:
  return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
  return pickle.LONG1 + b"\x08" + value.to_bytes(8, "little", signed=True)


def numbers(values) -> bytes:
  return b"(" + b"".join(map(number, values)) + b"t"


def tensor(key, array, count=None, offset=0, shape=None, strides=None) -> bytes:
  """The opcodes of one tensor; the optional arguments lie about it."""
  if strides is None:
    strides = [step // array.itemsize for step in array.strides]
  storage = b"(" + text("storage") + b"ctorch\n" + STORAGES[str(array.dtype)] + b"\n"
  storage += text(key) + text("cpu") + number(array.size if count is None else count) + b"tQ"
  arguments = storage + number(offset) + numbers(array.shape if shape is None else shape)
  arguments += numbers(strides) + b"\x89" + b"ccollections\nOrderedDict\n)R"
  return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def dictionary(entries: dict) -> bytes:
  return b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


def write(path, root: bytes, storages=None, compress=zipfile.ZIP_STORED, protocol=b"\x80\x02"):
  with zipfile.ZipFile(path, "w", compress) as archive:
    archive.writestr("model/data.pkl", protocol + root + b".")
    archive.writestr("model/byteorder", "little")
    for key, array in (storages or {}).items():
      archive.writestr(f"model/data/{key}", array.tobytes())
  return path


def write_state(path, state: dict, wrap=lambda root: root):
  """A state dict as `torch.save` writes it."""
  keys = {name: str(i) for i, name in enumerate(state)}
  root = dictionary({name: tensor(keys[name], array) for name, array in state.items()})
  return write(path, wrap(root), {keys[name]: array for name, array in state.items()})


def hf_names(state: dict, vision: int, text: int) -> dict:
  """A state by OpenAI's names as transformers would save it."""
  renamed = {
    "logit_scale": state["logit_scale"],
    "visual_projection.weight": state["visual.proj"].T.copy(),
    "text_projection.weight": state["text_projection"].T.copy(),
  }
  plain = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
  }
  parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
           "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
  for ours, theirs in plain.items():
    for end in (".weight", ".bias", ""):
      if end == "" and ours in state:
        renamed[theirs] = state[ours]
      elif end and f"{ours}{end}" in state:
        renamed[f"{theirs}{end}"] = state[f"{ours}{end}"]
  for tower, start, layers in (("vision", "visual.", vision), ("text", "", text)):
    for i in range(layers):
      here, there = f"{start}transformer.resblocks.{i}", f"{tower}_model.encoder.layers.{i}"
      for end in ("weight", "bias"):
        for ours, theirs in parts.items():
          renamed[f"{there}.{theirs}.{end}"] = state[f"{here}.{ours}.{end}"]
        for letter, part in zip("qkv", np.split(state[f"{here}.attn.in_proj_{end}"], 3)):
          renamed[f"{there}.self_attn.{letter}_proj.{end}"] = part.copy()
  return renamed


def hf_config(clip=TINY) -> dict:
  """The config.json of an architecture."""
  towers = {}
  for tower in ("vision", "text"):
    width = getattr(clip, f"{tower}_width")
    towers[f"{tower}_config"] = {
      "hidden_size": width,
      "intermediate_size": 4 * width,
      "num_hidden_layers": getattr(clip, f"{tower}_layers"),
      "num_attention_heads": getattr(clip, f"{tower}_heads"),
      "hidden_act": clip.activation,
    }
  towers["vision_config"] |= {"image_size": clip.image_size, "patch_size": clip.patch_size}
  towers["text_config"] |= {
    "vocab_size": clip.vocab_size,
    "max_position_embeddings": clip.context_length,
    "eos_token_id": clip.vocab_size - 1,
  }
  return {"model_type": "clip", "projection_dim": clip.embed_dim, **towers}


OPENCLIP_CONFIG = {
  "embed_dim": 4,
  "vision_cfg": {"width": 8, "layers": 1, "head_width": 2, "patch_size": 2, "image_size": 4},
  "text_cfg": {"width": 6, "layers": 2, "heads": 3, "context_length": 5, "vocab_size": 7},
}


def write_shards(folder, state, count=3) -> pathlib.Path:
  names = sorted(state)
  places = {}
  for i in range(count):
    part = {name: state[name] for name in names[i::count]}
    file = f"model-{i + 1:05}-of-{count:05}.safetensors"
    (folder / file).write_bytes(safetensors.numpy.save(part))
    places |= dict.fromkeys(part, file)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
  return index
