"""A network as one function of an image, to be stored and run without this package.

Normalization is part of it. What stays outside is what every language has: reading and resizing the
image, cutting it into windows, enlarging the logits, and an activation (docs/deploy.md).
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_names, split_synonyms, without_articles
from rpn_jax.inference.segmenter import Segmenter
from rpn_jax.models import heads, kernels
from rpn_jax.models.kernels import portable
from rpn_jax.models.trained import in_compute_type, join
from rpn_jax.text.templates import check_distinct

# Compute types, and the weights' types in the file.
DTYPES = ("float32", "bfloat16", "float16")
# What stands for an open size: any number of images, of classes, of patches along the sides.
IMAGES, CLASSES, ROWS, COLUMNS = "b", "c", "h", "w"
OPEN = "any"


@dataclasses.dataclass(frozen=True)
class Standalone:
  """A network as a function.

  Attributes:
    function: (image, and text if that is an input) -> logits (N, h, w, C) float32.
    inputs: name -> shape and type: `image` (N, H, W, 3) uint8, RGB; `text` (C, …) float32.
    text: the text of the words, as the input of that name takes it; None without words.
    metadata: what a program around the network must know; plain values for JSON.
  """

  function: Callable
  inputs: dict[str, jax.ShapeDtypeStruct]
  text: np.ndarray | None
  metadata: dict[str, Any]

  def example(self) -> list[np.ndarray]:
    """Inputs to compare programs with: noise, with the words or as many random texts."""
    random = np.random.default_rng(0)
    known = lambda shape, default: [s if isinstance(s, int) else default for s in shape]
    image = self.inputs["image"].shape
    side = 4 * self.metadata["patch"]
    sizes = [s if isinstance(s, int) else d for s, d in zip(image, (2, side, side, 3))]
    values = [random.integers(0, 256, sizes, dtype=np.uint8)]
    if "text" in self.inputs:
      text = self.text
      if text is None:
        text = random.normal(size=known(self.inputs["text"].shape, 3)).astype(np.float32)
        text /= np.linalg.norm(text, axis=-1, keepdims=True)
      values.append(text)
    return values


def standalone(
  segmenter: Segmenter,
  names: Sequence[str],
  *,
  size: tuple[int, int] | str | None = None,
  batch: int | str = 1,
  dtype: str = "float32",
  text_input: bool = False,
  several_platforms: bool = False,
) -> Standalone:
  """A segmenter's network as a function.

  Args:
    segmenter: the model.
    names: C class names, see `words.parse_names`; () only if the text is an input.
    size: (height, width) of the images, pixels; OPEN: any multiples of a patch; None: the windows
      of the model's protocol.
    batch: number of images; OPEN: any.
    dtype: one of DTYPES.
    text_input: whether the text is an input instead of being built in.
    several_platforms: whether the function is compiled for CPUs, GPUs and TPUs at once; if its
      sizes are known, each has its own attention.

  Raises:
    InputError: no names, two that CLIP cannot tell apart, names of several rows, a size the network
      cannot take.
  """
  predictor, protocol = segmenter.predictor, segmenter.predictor.protocol
  network: Any
  network, params, prompts = predictor.network.merged(predictor.params, predictor.prompts)
  fixed = OPEN not in (size, batch) and not text_input
  versions = kernels.TEXTBOOK
  if several_platforms:
    versions = portable.PORTABLE if fixed else kernels.LEAN
  network = network.clone(kernels=versions, dtype=jnp.dtype(dtype))
  variables = join(params, prompts)
  variables["params"] = in_compute_type(variables["params"], network.dtype)

  text = None
  encode = lambda text: network.apply(variables, text, method="encode_text")
  if names:
    check_names(names)
    check_distinct(names, predictor.encoder.synonyms)
    rows, class_of_row = predictor.text_rows([without_articles(name) for name in names])
    if len(class_of_row) != len(names):
      raise InputError('--synonyms=max: a file has one row a class, expected "first" or "mean"')
    text = np.asarray(encode(jnp.asarray(rows)))
  elif not text_input:
    raise InputError('expected --words="a dog, grass", or --text-input to give their text later')

  image = _image_spec(predictor.network, size or (protocol.crop, protocol.crop), batch)
  mean, std = (255 * np.asarray(values, np.float32) for values in (protocol.mean, protocol.std))
  scale = getattr(network, "logit_scale", 1.0)  # of cosines, which are no logits yet

  def function(image_NxHxWx3: jax.Array, text: Any = text) -> jax.Array:
    image = (image_NxHxWx3.astype(jnp.float32) - mean) / std
    return scale * network.apply(variables, image, text).astype(jnp.float32)

  inputs = {"image": image}
  if text_input:
    like = text
    if like is None:
      like = jax.eval_shape(encode, predictor.text_rows(["a"])[0])
    scope = next((side.scope for side in image.shape if not isinstance(side, int)), None)
    (classes,) = jax.export.symbolic_shape(CLASSES, scope=scope)
    inputs["text"] = jax.ShapeDtypeStruct((classes, *like.shape[1:]), np.float32)
  metadata = _metadata(segmenter, names, image.shape, dtype)
  return Standalone(function, inputs, text, metadata)


def _image_spec(
  network: Any, size: tuple[int, int] | str, batch: int | str
) -> jax.ShapeDtypeStruct:
  patch = network.clip.patch_size
  sides = f"{patch}*{ROWS}, {patch}*{COLUMNS}"
  constraints = [f"{ROWS}>=1", f"{COLUMNS}>=1"] if size == OPEN else []
  if isinstance(size, tuple):
    for side in size:
      if side < 1 or side % patch:
        nearest = max(patch, round(side / patch) * patch)
        raise InputError(
          f"--size={size[0]},{size[1]}: expected multiples of the patch size, {patch}; "
          f"{nearest} for {side}"
        )
    sides = f"{size[0]}, {size[1]}"
  images = IMAGES if batch == OPEN else batch
  shape = jax.export.symbolic_shape(f"{images}, {sides}, 3", constraints=constraints)
  return jax.ShapeDtypeStruct(shape, np.uint8)


def _metadata(
  segmenter: Segmenter, names: Sequence[str], shape: Sequence[Any], dtype: str
) -> dict[str, Any]:
  predictor, protocol = segmenter.predictor, segmenter.predictor.protocol
  network = predictor.network
  # Of trained networks scores are averaged over windows, of cosines the logits.
  known: dict[Any, str] = {heads.sigmoid: "sigmoid", heads.softmax: "softmax"}
  trained = known.get(network.scores)
  return {
    "model": segmenter.method,
    "names": [" | ".join(split_synonyms(name)) for name in names],
    "height": shape[1] if isinstance(shape[1], int) else OPEN,
    "width": shape[2] if isinstance(shape[2], int) else OPEN,
    "patch": network.clip.patch_size,
    "dtype": dtype,
    "activation": trained or "softmax",
    "average": "scores" if trained else "logits",
    "layout": protocol.layout,
    "short_side": protocol.short_side,
    "long_side": protocol.long_side,
    "resize": protocol.resize,
    "crop": protocol.crop,
    "stride": protocol.stride,
    "mean": list(protocol.mean),
    "std": list(protocol.std),
  }


def as_texts(metadata: dict[str, Any]) -> dict[str, str]:
  """Metadata for a format of texts: what is no text is JSON."""
  return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
