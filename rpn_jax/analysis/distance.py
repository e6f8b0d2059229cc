"""How far each attention head looks, before and after training (the paper's Fig. 7).

    python -m rpn_jax distance --workdir=… --image=… --classes="cat, grass"

Drawn, and listed as CSV.
"""

import csv
import io
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.analysis.attention import (
  inside_frozen,
  inside_trained,
  qkv_of_layers,
  queries_and_keys,
  read_image,
  run_drawing,
)
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_text
from rpn_jax.drawing.images import save_png
from rpn_jax.drawing.plots import figure, legend_beside, line_style


def distances(predictor, inputs_1xHxWx3, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Mean attention distance in frozen CLIP and in the trained network: pixels (layers, heads).

  Args:
    predictor: of a trained run.
    inputs_1xHxWx3: see `read_image`.
    names: of the classes, which prompt the trained network.
  """
  clip = predictor.clip
  grid = tuple(side // clip.patch_size for side in inputs_1xHxWx3.shape[1:3])

  def of_tower(inside):
    layers = qkv_of_layers(clip, inside)
    return np.stack([mean_distance(x, clip.vision_heads, grid, clip.patch_size) for x in layers])

  trained, _ = inside_trained(predictor, inputs_1xHxWx3, names)
  return of_tower(inside_frozen(predictor, inputs_1xHxWx3)), of_tower(trained["visual"])


def mean_distance(qkv_BxNx3D, heads: int, grid: tuple[int, int], patch_size: int) -> np.ndarray:
  """How far each head looks, on average over the patches: (heads,) pixels.

  The distance between two patches weighted with the attention between them; attention to other
  tokens is left out and the rest counts as all of it.

  Args:
    qkv_BxNx3D: projected tokens of a layer; the last h * w of them are patches.
    heads: of the layer.
    grid: (h, w).
    patch_size: in pixels.
  """
  h, w = grid
  q, k = queries_and_keys(qkv_BxNx3D, heads, h * w)
  place = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"), -1).reshape(-1, 2)
  distance = patch_size * jnp.linalg.norm(1.0 * place[:, None] - place[None], axis=-1)

  def one_head(i):
    scores = jnp.einsum("bnd,bmd->bnm", q[:, :, i], k[:, :, i])
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5)
    return (weights * distance).sum(-1).mean()

  return np.asarray(jax.lax.map(one_head, jnp.arange(heads)))


def draw_distances(path, before: np.ndarray, after: np.ndarray, images: int) -> None:
  """Writes a PNG: mean attention distance of every head by layer, and the layers' means.

  Args:
    path: of the PNG.
    before, after: (layers, heads) pixels.
    images: how many images were averaged.
  """
  fig, ((ax,),) = figure((8, 4.5))
  layers = np.arange(1, len(before) + 1)
  for values, label, shift, i in ((before, "CLIP, frozen", -0.1, 0), (after, "trained", 0.1, 1)):
    style = line_style(i)
    ax.plot(layers + shift, values.mean(1), label=f"{label}, mean of heads", **style)
    points = np.repeat(layers + shift, values.shape[1])
    heads = {"s": 14, "alpha": 0.6, "color": style["color"], "label": f"{label}, each head"}
    ax.scatter(points, values.ravel(), **heads)
  ax.set_xticks(layers)
  ax.set_xlabel("layer")
  ax.set_ylabel("mean attention distance (pixels)")
  ax.set_title(f"How far patches look, {images} image{'s' * (images > 1)}", loc="left", fontsize=12)
  legend_beside(ax)
  save_png(path, fig)


def distance(predictor, files: Sequence[pathlib.Path], names, out) -> list[pathlib.Path]:
  """Draws and lists the attention distance, the mean over image files; returns the files written.

  Raises:
    InputError: nothing was trained, a network that resizes its images, or an unreadable image.
  """
  if not predictor.prompts:
    raise InputError("a training-free config has no training to compare: give a trained one")
  network = predictor.network
  if network.input_multiple != predictor.clip.patch_size:
    raise InputError(
      f"expected a network that sees images as they are, {network.title} resizes each to a square: "
      "distances there are not those in the image; give a run of another method"
    )
  found = []
  for file in files:
    _, inputs = read_image(file, predictor.protocol, predictor.clip.patch_size)
    found.append(distances(predictor, inputs, names))
  before, after = np.mean(found, 0)
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["layer", "head", "before_pixels", "after_pixels"])
  for i, j in np.ndindex(before.shape):
    writer.writerow([i + 1, j + 1, f"{before[i, j]:.3f}", f"{after[i, j]:.3f}"])
  out = expand(out)
  draw_distances(out / "distance.png", before, after, len(files))
  write_text(out / "distance.csv", text.getvalue())
  return [out / "distance.png", out / "distance.csv"]


def main(arguments: list[str]) -> int:
  return run_drawing(distance, __doc__, arguments)
