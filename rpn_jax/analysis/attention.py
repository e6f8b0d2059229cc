"""Looking inside: relationship attention maps (the paper's Fig. 1), attention distance (Fig. 7)."""

import csv
import io
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_text
from rpn_jax.drawing.plots import legend_beside, line_style, save
from rpn_jax.inference.predictor import Experiment
from rpn_jax.models import tuners
from rpn_jax.models.clip import CLIPConfig, VisionTransformer

# Classes in one picture: more would be too small to see.
MAX_CLASSES = 12


def read_image(path, config, patch: int) -> tuple[np.ndarray, np.ndarray]:
  """A picture and the network's input (1, h, w, 3), normalised.

  The short side becomes `config.data.short_side`, both are rounded to patches: the whole picture
  goes through the network at once, not window by window.
  """
  picture = pixels.read(path)
  scale = config.data.short_side / min(picture.shape[:2])
  height, width = (max(1, round(side * scale / patch)) * patch for side in picture.shape[:2])
  resized = np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
  return picture, pixels.normalized(resized, config.data.mean, config.data.std)[None]


def relationship_maps(experiment: Experiment, image, names: Sequence[str]) -> list[np.ndarray]:
  """m of every layer that makes relationship prompts, each (h, w, C); see `rpm.itp`.

  Args:
    experiment: of a trained run.
    image: (1, H, W, 3), normalised.
    names: of the classes.
  """
  model = experiment.model
  # What has no map in pixels: no relationship prompts, or none that look at them.
  if not experiment.trainable or "rpn" not in model.config.tuners or not model.prompting:
    raise InputError("no relationship prompts in this config: there are no maps to draw")
  if model.config.itp == "no_pixel":
    raise InputError('config.model.itp="no_pixel" has no map of the pixels to draw')
  _, prompts = experiment.restored_prompts()
  inside = _inside(
    model, tuners.variables(experiment.params, prompts), image, experiment.text(names)
  )
  grid = [side // experiment.clip_config.patch_size for side in image.shape[1:3]]
  return [np.asarray(m[0]).reshape(*grid, -1) for m in inside["m"]]


def _inside(model, variables, image, *text) -> dict:
  """What a network notes down of itself."""
  apply = jax.jit(lambda v, x: model.apply(v, x, *text, mutable=["intermediates"])[1])
  return apply(variables, jnp.asarray(image))["intermediates"]


def _qkv_of_layers(clip: CLIPConfig, inside: dict) -> list:
  """Projected tokens (B, N, 3 D) of every layer, from what `_inside` gives of a tower."""
  return [inside[f"block_{i}"]["attn"]["qkv"][0] for i in range(clip.vision_layers)]


def _queries_and_keys(qkv_BxNx3D, heads: int, patches: int) -> tuple:
  """Of the patches, which are the last tokens: (B, patches, heads, D / heads) each."""
  q, k, _ = jnp.split(qkv_BxNx3D[:, -patches:].astype(jnp.float32), 3, axis=-1)
  split = lambda x: x.reshape(*x.shape[:2], heads, -1)
  return split(q), split(k)


def mean_distance(qkv_BxNx3D, heads: int, grid: tuple[int, int], patch: int) -> np.ndarray:
  """How far each head looks, on average over the patches: (heads,) pixels.

  The distance of two patches weighted with the attention between them; what goes to other tokens
  is left out and the rest counts as all of it.

  Args:
    qkv_BxNx3D: projected tokens of a layer; the last h * w of them are patches.
    heads: of the layer.
    grid: (h, w).
    patch: size in pixels.
  """
  h, w = grid
  q, k = _queries_and_keys(qkv_BxNx3D, heads, h * w)
  place = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"), -1).reshape(-1, 2)
  distance = patch * jnp.linalg.norm(1.0 * place[:, None] - place[None], axis=-1)

  def one_head(i):
    scores = jnp.einsum("bnd,bmd->bnm", q[:, :, i], k[:, :, i])
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5)
    return (weights * distance).sum(-1).mean()

  return np.asarray(jax.lax.map(one_head, jnp.arange(heads)))


def attention_from(experiment: Experiment, image, place: tuple[float, float]) -> np.ndarray:
  """What one patch looks at in CLIP as it is, the mean over the heads: (layers, h, w).

  The weights over the patches, without the class token; a layer's sum is 1.

  Args:
    experiment: whose frozen tower it is.
    image: (1, H, W, 3), normalised, see `read_image`.
    place: of the patch in the picture, (down, right) as fractions of its sides, 0 to 1.
  """
  clip = experiment.clip_config
  h, w = (side // clip.patch_size for side in image.shape[1:3])
  down, right = (min(int(f * n), n - 1) for f, n in zip(place, (h, w)))
  inside = _inside(VisionTransformer(clip), {"params": experiment.params["visual"]}, image)
  maps = []
  for qkv in _qkv_of_layers(clip, inside):
    q, k = _queries_and_keys(qkv, clip.vision_heads, h * w)
    scores = jnp.einsum("nd,mnd->nm", q[0, down * w + right], k[0]) * q.shape[-1] ** -0.5
    maps.append(jax.nn.softmax(scores).mean(0).reshape(h, w))
  return np.stack(maps)


def distances(clip: CLIPConfig, visual: dict, image) -> np.ndarray:
  """Mean attention distance in CLIP as it is: (layers, heads) pixels."""
  return _distances(clip, _inside(VisionTransformer(clip), {"params": visual}, image), image)


def tuned_distances(experiment: Experiment, prompts, image, names) -> np.ndarray:
  """The same with what a run has trained: (layers, heads) pixels."""
  variables = tuners.variables(experiment.params, prompts)
  inside = _inside(experiment.model, variables, image, experiment.text(names))
  return _distances(experiment.clip_config, inside["visual"], image)


def _distances(clip: CLIPConfig, inside: dict, image) -> np.ndarray:
  grid = tuple(side // clip.patch_size for side in image.shape[1:3])
  layers = _qkv_of_layers(clip, inside)
  return np.stack([mean_distance(x, clip.vision_heads, grid, clip.patch_size) for x in layers])


def draw_maps(path, picture, maps: Sequence[np.ndarray], names, layers: Sequence[int]) -> None:
  """Writes a PNG: a row per class, the picture and then its map in every layer.

  Args:
    path: of the PNG.
    picture: (H, W, 3) uint8.
    maps: (h, w, C) per layer.
    names: of the classes.
    layers: numbers of the layers, counted from 1 as in the paper.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  # Layers differ in scale and offset; within one, classes are compared.
  standard = [(m - m.mean()) / max(m.std(), 1e-12) for m in maps]
  limit = max(np.abs(m).max() for m in standard)
  ratio = picture.shape[0] / picture.shape[1]
  wide = 1.5 if ratio <= 1 else 1.5 / ratio
  size = (wide * (1 + len(maps)) + 1.6, wide * ratio * len(names) + 0.9)
  figure = Figure(figsize=(max(size[0], 6), size[1]), dpi=110)
  FigureCanvasAgg(figure)
  figure.set_layout_engine("constrained")
  axes = figure.subplots(len(names), 1 + len(maps), squeeze=False)
  for row, name in zip(axes, names):
    row[0].imshow(picture)
    row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    for ax, m in zip(row[1:], standard):
      height, width = picture.shape[:2]
      drawn = ax.imshow(
        m[..., names.index(name)], cmap="RdBu_r", vmin=-limit, vmax=limit,
        extent=(0, width, height, 0), interpolation="nearest",
      )  # fmt: skip
  for ax, layer in zip(axes[0], ("image", *(f"layer {i}" for i in layers))):
    ax.set_title(layer, fontsize=9)
  for ax in axes.ravel():
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
  bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01)
  bar.set_label("relationship m, in standard\ndeviations of its layer", fontsize=8)
  bar.ax.tick_params(labelsize=8)
  save(figure, path)


def draw_distances(path, before: np.ndarray, after: np.ndarray, images: int) -> None:
  """Writes a PNG: mean attention distance of every head by layer, and the layers' means.

  Args:
    path: of the PNG.
    before, after: (layers, heads) pixels.
    images: how many they are means of.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 4.5), dpi=110)
  FigureCanvasAgg(figure)
  figure.set_layout_engine("constrained")
  ax = figure.subplots()
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
  ax.grid(True, color="0.9", linewidth=0.8)
  ax.set_axisbelow(True)
  ax.spines[["top", "right"]].set_visible(False)
  legend_beside(ax)
  save(figure, path)


def attention(experiment: Experiment, files: Sequence[pathlib.Path], names, out) -> list:
  """Draws the maps of each picture; the files written."""
  if len(names) > MAX_CLASSES:
    raise InputError(f"expected at most {MAX_CLASSES} classes for one picture, got {len(names)}")
  written = []
  for file in map(pathlib.Path, files):
    picture, image = read_image(file, experiment.config, experiment.clip_config.patch_size)
    maps = relationship_maps(experiment, image, names)
    layers = [i + 1 for i in experiment.model.prompting]
    path = pathlib.Path(out) / f"attention_{file.stem}.png"
    draw_maps(path, picture, maps, names, layers)
    written.append(path)
  return written


def distance(experiment: Experiment, files: Sequence[pathlib.Path], names, out) -> list:
  """Draws and lists the attention distance over the pictures; the files written."""
  if not experiment.trainable:
    raise InputError("a training-free config has no training to compare: give a trained one")
  _, prompts = experiment.restored_prompts()
  before, after = [], []
  for file in files:
    _, image = read_image(file, experiment.config, experiment.clip_config.patch_size)
    before.append(distances(experiment.clip_config, experiment.params["visual"], image))
    after.append(tuned_distances(experiment, prompts, image, names))
  before, after = np.mean(before, 0), np.mean(after, 0)
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["layer", "head", "before_pixels", "after_pixels"])
  for i, j in np.ndindex(before.shape):
    writer.writerow([i + 1, j + 1, f"{before[i, j]:.3f}", f"{after[i, j]:.3f}"])
  out = pathlib.Path(out)
  write_text(out / "distance.csv", text.getvalue())
  draw_distances(out / "distance.png", before, after, len(files))
  return [out / "distance.png", out / "distance.csv"]
