"""Zero-shot classification of whole images with CLIP (Radford et al., 2021, section 3.1)."""

from collections.abc import Callable, Sequence
from typing import cast

import jax
import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.inference.predictor import Predictor
from rpn_jax.inference.process import check_process
from rpn_jax.models.clip import VisionTransformer, l2_normalize
from rpn_jax.text.templates import check_distinct, expand


def class_probabilities(predictor: Predictor, names: Sequence[str]) -> Callable:
  """A function from images to class probabilities that uses only the frozen CLIP.

  Args:
    predictor: provides the CLIP; its prompts are not used.
    names: C class names. If the encoder's synonyms are "max", the best synonym counts.

  Returns:
    (B, side, side, 3) normalized images -> softmax(scale * cosine) (B, C), as numpy. It raises an
    InputError if they are NaN.

  Raises:
    InputError: a vision tower that is not CLIP's own; see also `check_distinct`.
  """
  check_process()
  if predictor.clip.vision != "clip":
    raise InputError(
      "expected weights whose vision tower is CLIP's own, got a plain vision transformer, whose "
      "tokens are compared with words by trained prompts alone: use --mode=predict with these, or "
      "other weights"
    )
  encoder, network = predictor.encoder, predictor.network
  check_distinct(names, encoder.synonyms)
  prompted, class_of_row = expand(names, range(len(names)), encoder.synonyms)
  text, ids = encoder.embed(prompted), np.asarray(class_of_row)
  scale = np.exp(encoder.params["logit_scale"])
  tower = VisionTransformer(predictor.clip, network.dtype, kernels=network.kernels)

  @jax.jit
  def apply(params: dict, image: jax.Array) -> jax.Array:
    image_BxE = l2_normalize(cast(jax.Array, tower.apply({"params": params}, image)))
    return jax.nn.softmax(scale * image_BxE @ text.T)

  def probabilities(image: np.ndarray) -> np.ndarray:
    by_row = np.asarray(apply(predictor.params["visual"], image))
    if not np.isfinite(by_row).all():
      raise InputError(
        "expected finite scores of CLIP, some are NaN: use config.dtype=float32, or get the "
        "weights again"
      )
    return np.stack([by_row[:, ids == i].max(1) for i in range(len(names))], 1)

  return probabilities
