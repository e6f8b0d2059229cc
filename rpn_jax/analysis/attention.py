"""What a trained network looks at: the relationship maps m of every layer (the paper's Fig. 1).

    python -m rpn_jax attention --workdir=… --image=… --classes="cat | kitten, grass"

Drawn for an image, or for each in a folder.
"""

import argparse
import pathlib
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax import devices
from rpn_jax.analysis.arguments import parse
from rpn_jax.base import paths, picture_files, pictures, pixels
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import parse_names
from rpn_jax.drawing.images import save_png
from rpn_jax.drawing.plots import figure
from rpn_jax.inference.predictor import Predictor, open_run
from rpn_jax.models.clip import CLIPConfig, VisionTransformer
from rpn_jax.models.trained import join

# Classes of one figure: more would be too small to see.
MAX_CLASSES = 12


def read_image(path, protocol, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
  """An image (H, W, 3) uint8, and the network's input (1, h, w, 3).

  Prepared as for evaluation, see `pixels.to_network`, but that both sides are rounded to patches:
  the whole image goes through the network at once, not window by window.

  Args:
    path: of an image file.
    protocol: how it is resized and normalized.
    patch_size: in pixels.

  Raises:
    InputError: see `pictures.load`.
  """
  image = pictures.read(path)
  height, width = image.shape[:2]
  sides = pixels.short_side_size(height, width, protocol.short_side, protocol.long_side)
  height, width = (max(1, round(side / patch_size)) * patch_size for side in sides)
  resized = pixels.resize(image, (height, width), protocol.resize)
  return image, pixels.normalize(resized, protocol.mean, protocol.std)[None]


def relationship_maps(
  predictor: Predictor, inputs_1xHxWx3, names: Sequence[str]
) -> list[np.ndarray]:
  """The map m of every layer that makes relationship prompts, each (h, w, C); see `rpm.itp`.

  Where synonyms compete ("max"), a class's map is at each pixel that of its best synonym, as its
  score is.

  Args:
    predictor: of a trained run.
    inputs_1xHxWx3: see `read_image`.
    names: of the classes; synonyms are joined by `words.SEPARATOR`.

  Raises:
    InputError: a network without relationship maps.
  """
  network: Any = predictor.network  # only RPN has what is asked for here
  clip = predictor.clip
  # What has no map in pixels: no relationship prompts, or none that look at them.
  if not getattr(network, "prompting", ()) or "rpn" not in network.tuner_names:
    raise InputError(
      f"no relationship prompts in this config ({network.title}): there are no maps to draw; give "
      "one with method=rpn and rpn in model.tuner"
    )
  if network.config.itp == "no_pixel":
    raise InputError('config.model.itp="no_pixel" has no map of the pixels to draw')
  inside, class_of_row = inside_trained(predictor, inputs_1xHxWx3, names)
  grid = [side // clip.patch_size for side in inputs_1xHxWx3.shape[1:3]]
  maps = [np.asarray(m[0]).reshape(*grid, -1) for m in inside["m"]]
  rows = [np.flatnonzero(class_of_row == i) for i in range(len(names))]
  return [np.stack([m[..., row].max(-1) for row in rows], -1) for m in maps]


def attention_from(predictor: Predictor, inputs_1xHxWx3, place: tuple[float, float]) -> np.ndarray:
  """What one patch attends to in frozen CLIP, averaged over the heads: (layers, h, w).

  The weights over the patches, without the class token; a layer's sum is 1.

  Args:
    predictor: whose frozen tower it is.
    inputs_1xHxWx3: see `read_image`.
    place: of the patch in the image, (down, right) as fractions of its sides, 0 to 1.
  """
  clip = predictor.clip
  h, w = (side // clip.patch_size for side in inputs_1xHxWx3.shape[1:3])
  down, right = (min(int(f * n), n - 1) for f, n in zip(place, (h, w)))
  maps = []
  for qkv in qkv_of_layers(clip, inside_frozen(predictor, inputs_1xHxWx3)):
    q, k = queries_and_keys(qkv, clip.vision_heads, h * w)
    scores = jnp.einsum("nd,mnd->nm", q[0, down * w + right], k[0]) * q.shape[-1] ** -0.5
    maps.append(jax.nn.softmax(scores).mean(0).reshape(h, w))
  return np.stack(maps)


def inside_frozen(predictor: Predictor, inputs_1xHxWx3) -> dict:
  """The intermediates of CLIP's frozen vision tower."""
  variables = {"params": predictor.params["visual"]}
  return _inside(VisionTransformer(predictor.clip), variables, inputs_1xHxWx3)


def inside_trained(
  predictor: Predictor, inputs_1xHxWx3, names: Sequence[str]
) -> tuple[dict, np.ndarray]:
  """The intermediates of the trained network, and which class each of its text rows stands for.

  Where synonyms compete ("max"), each of them is a row.
  """
  text, class_of_row = predictor.text_rows(names)
  variables = join(predictor.params, predictor.prompts)
  return _inside(predictor.network, variables, inputs_1xHxWx3, text), class_of_row


def _inside(model, variables, inputs, *text) -> dict:
  apply = jax.jit(lambda v, x: model.apply(v, x, *text, mutable=["intermediates"])[1])
  return apply(variables, jnp.asarray(inputs))["intermediates"]


def qkv_of_layers(clip: CLIPConfig, inside: dict) -> list:
  """Projected tokens (B, N, 3 D) of every layer, from the intermediates of a vision tower."""
  return [inside[f"block_{i}"]["attn"]["qkv"][0] for i in range(clip.vision_layers)]


def queries_and_keys(qkv_BxNx3D, heads: int, patches: int) -> tuple:
  """Of the patches, which are the last tokens: (B, patches, heads, D / heads) each."""
  q, k, _ = jnp.split(qkv_BxNx3D[:, -patches:].astype(jnp.float32), 3, axis=-1)
  split = lambda x: x.reshape(*x.shape[:2], heads, -1)
  return split(q), split(k)


def draw_maps(path, image, maps: Sequence[np.ndarray], names, layers: Sequence[int]) -> None:
  """Writes a PNG: a row per class, the image and then its map in every layer.

  Args:
    path: of the PNG.
    image: (H, W, 3) uint8.
    maps: (h, w, C) per layer.
    names: of the classes.
    layers: their numbers, counted from 1 as in the paper.
  """
  # Layers differ in scale and offset; within one, classes are compared.
  standard = [(m - m.mean()) / max(m.std(), 1e-12) for m in maps]
  limit = max(np.abs(m).max() for m in standard)
  height, width = image.shape[:2]
  wide = max(0.7, min(1.5, 1.5 * width / height))  # inches; less has no room for a title
  tall = min(3.0, wide * height / width)
  size = (wide * (1 + len(maps)) + 1.6, tall * len(names) + 0.9)
  fig, axes = figure((max(size[0], 6), size[1]), len(names), 1 + len(maps))
  # "compressed" knows that images keep their shape, and leaves room for the names beside them.
  fig.set_layout_engine("compressed", w_pad=1 / 24, h_pad=1 / 24, wspace=0.02, hspace=0.02)
  for i, name in enumerate(names):
    axes[i, 0].imshow(image)
    axes[i, 0].set_ylabel(textwrap.fill(name, 20), fontsize=9, rotation=0, ha="right", va="center")
    for ax, m in zip(axes[i, 1:], standard):
      drawn = ax.imshow(
        m[..., i], cmap="RdBu_r", vmin=-limit, vmax=limit,
        extent=(0, width, height, 0), interpolation="nearest",
      )  # fmt: skip
  for ax, head in zip(axes[0], ("image", *(f"layer {i}" for i in layers))):
    ax.set_title(head, fontsize=9)
  for ax in axes.flat:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
  bar = fig.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01)
  bar.set_label(
    "relationship m, in standard\ndeviations of its layer:\nred more than its mean, blue less",
    fontsize=8,
  )
  bar.ax.tick_params(labelsize=8)
  save_png(path, fig)


def attention(
  predictor: Predictor, files: Sequence[pathlib.Path], names, out
) -> list[pathlib.Path]:
  """Draws the relationship maps of each image file; returns the files written.

  They are called `attention_<stem>.png`, with a suffix or a number where several would be the same.

  Raises:
    InputError: too many classes, a network without maps, an unreadable image.
  """
  if len(names) > MAX_CLASSES:
    raise InputError(f"expected at most {MAX_CLASSES} classes for one figure, got {len(names)}")
  written = []
  files = [paths.expand(file) for file in files]
  # All figures are in one folder, wherever the images are.
  names_of_files = [file.relative_to(file.parent) for file in files]
  for file, stem in zip(files, picture_files.distinct_stems(names_of_files)):
    image, inputs = read_image(file, predictor.protocol, predictor.clip.patch_size)
    maps = relationship_maps(predictor, inputs, names)
    network: Any = predictor.network
    layers = [i + 1 for i in network.prompting]
    path = paths.expand(out) / f"attention_{stem}.png"
    draw_maps(path, image, maps, names, layers)
    written.append(path)
  return written


def run_drawing(command: Callable, description: str, arguments: list[str]) -> int:
  """Runs a command that draws something of a trained network: `attention`, or `distance`."""
  parser = argparse.ArgumentParser(prog=f"rpn {command.__name__}", description=description)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--image", required=True, help="an image file, or a folder of them")
  parser.add_argument(
    "--classes", required=True, help='class names, e.g. "cat | kitten, grass": | joins synonyms'
  )
  parser.add_argument("--out", help="folder to draw into (default: the workdir)")
  args, config = parse(parser, arguments, workdir=True)
  names, files = parse_names(args.classes), picture_files.find(args.image).files
  workdir = paths.expand(args.workdir)
  with devices.runtime(matmul_precision=config.matmul_precision):
    out = paths.expand(args.out or workdir)
    out.mkdir(parents=True, exist_ok=True)
    predictor, run = open_run(config, workdir)
    _, prompts = predictor.read_prompts(run)["last"]
    for path in command(predictor.with_prompts(prompts), files, names, out):
      print(path)
  return 0


def main(arguments: list[str]) -> int:
  return run_drawing(attention, __doc__, arguments)
