"""What becomes of an image before it reaches a network: transforms in the order of a recipe."""

from collections.abc import Sequence

from data_pipelines.transforms import (
  Compose,
  LabelMap,
  Normalize,
  Pad,
  PhotoMetricDistortion,
  RandomCrop,
  RandomFlip,
  RandomResize,
  Resize,
)
from rpn_jax.base import pixels
from rpn_jax.base.words import check_known

# By the library whose order and rules it has.
RECIPES = ("mmsegmentation", "detectron2")


def train_transform(
  label_map: LabelMap,
  *,
  recipe: str = "mmsegmentation",
  crop: int | tuple[int, int] = 512,
  scale: tuple[int, int] = (2048, 512),
  ratio: tuple[float, float] = (0.5, 2.0),
  label_resize: str = "floor_nearest",
  cat_max_ratio: float | None = None,
  photometric: bool = True,
  mean: Sequence[float] = pixels.CLIP_MEAN,
  std: Sequence[float] = pixels.CLIP_STD,
) -> Compose:
  """The training pipeline.

  Args:
    label_map: raw labels -> training ids; comes first, so that the crop rule sees ignored pixels.
    recipe: one of RECIPES. detectron2 resizes with antialias, flips after the colors, and pads with
      gray (128) before normalization, where mmsegmentation pads with 0 after it.
    crop: side or (height, width) of the output, pixels.
    scale: limits of the long and the short side at ratio 1, pixels.
    ratio: range of the uniform factor on `scale`.
    label_resize: see `transforms.resize_label`.
    cat_max_ratio: largest share of one label in a crop; 1 switches the rule off. None: 0.75 for
      mmsegmentation, 1 for detectron2.
    photometric: whether to distort colors.
    mean, std: per channel, of pixel values in [0, 1].

  Returns:
    (example, rng) -> {'image': float32 [crop,crop,3], 'label': int32 [crop,crop], …}.

  Raises:
    InputError: an unknown recipe.
  """
  check_known("recipe ", recipe, RECIPES)
  size = (crop, crop) if isinstance(crop, int) else tuple(crop)
  ignore = label_map.ignore
  first = [label_map, RandomResize(tuple(scale), tuple(ratio), recipe, label_resize)]
  flips, normalize = RandomFlip(), Normalize(mean, std)
  if recipe == "mmsegmentation":
    share = 0.75 if cat_max_ratio is None else cat_max_ratio
    colors = [PhotoMetricDistortion()] if photometric else []
    return Compose(
      *first, RandomCrop(size, share, ignore), flips, *colors, normalize, Pad(size, ignore)
    )
  share = 1.0 if cat_max_ratio is None else cat_max_ratio
  colors = [PhotoMetricDistortion(hue=(-18, 19))] if photometric else []
  return Compose(
    *first, RandomCrop(size, share, ignore), *colors, flips, Pad(size, ignore, 128), normalize
  )


def eval_transform(
  short_side: int = 512,
  label_map: LabelMap | None = None,
  *,
  recipe: str = "mmsegmentation",
  long_side: int = 0,
  mean: Sequence[float] = pixels.CLIP_MEAN,
  std: Sequence[float] = pixels.CLIP_STD,
) -> Compose:
  """The test pipeline: the aspect is kept.

  Args:
    short_side: pixels.
    label_map: raw labels -> class ids; None leaves labels as stored.
    recipe: one of RECIPES, how images are resized.
    long_side: limit in pixels, which then makes the short side shorter; 0 is none.
    mean, std: per channel, of pixel values in [0, 1].

  Returns:
    (example, rng=None) -> image float32 [h,w,3] resized; label int32 [H,W] at its own size.

  Raises:
    InputError: an unknown recipe.
  """
  check_known("recipe ", recipe, RECIPES)
  maps = [label_map] if label_map is not None else []
  return Compose(*maps, Resize(short_side, long_side, recipe), Normalize(mean, std))
