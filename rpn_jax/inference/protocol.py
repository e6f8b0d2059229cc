"""What is done with an image before and after the network."""

import dataclasses

import ml_collections

from rpn_jax.base import pixels


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Inference protocol: how images are prepared, cut into windows and merged.

  Attributes:
    short_side: short side that images are resized to, pixels.
    crop: side of the square windows, pixels.
    stride: step between windows, pixels.
    long_side: limit of the long side of resized images, pixels; 0 is none.
    resize: how they are resized, one of `pixels.RESIZES`.
    layout: how windows are laid over an image, one of `layouts.LAYOUTS`.
    square, keep_padding: see `layouts.Layout`.
    refine, pamr_steps, pamr_dilations: see `refinement.Refinement`.
    threshold, area_threshold: see `decision.Decision`.
    mean, std: normalization per channel, for values in [0, 1].
    window_batch: windows per call of the network.
    scales: image sizes that scores are averaged over, as factors of `short_side`.
    flip: also average over mirrored images.
    seen_penalty: subtracted from the scores of penalized classes.
  """

  short_side: int
  crop: int
  stride: int
  long_side: int = 0
  resize: str = "mmsegmentation"
  layout: str = "windows"
  square: int = 0
  keep_padding: bool = True
  refine: str = "none"
  pamr_steps: int = 10
  pamr_dilations: tuple[int, ...] = (8, 16)
  threshold: float = 0.0
  area_threshold: float = 0.0
  mean: tuple[float, ...] = pixels.CLIP_MEAN
  std: tuple[float, ...] = pixels.CLIP_STD
  window_batch: int = 4
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False
  seen_penalty: float = 0.0


# Fields of config.eval that are those of a Protocol.
PROTOCOL_FIELDS = (
  "crop", "stride", "layout", "square", "keep_padding", "window_batch", "flip", "seen_penalty",
  "refine", "pamr_steps", "pamr_dilations", "threshold", "area_threshold",
)  # fmt: skip


def protocol_of(config: ml_collections.ConfigDict) -> Protocol:
  """The inference protocol of a config with a normalization."""
  return Protocol(
    short_side=config.data.short_side,
    long_side=config.data.long_side,
    resize=config.data.recipe,
    mean=tuple(config.data.mean),
    std=tuple(config.data.std),
    **{name: config.eval[name] for name in PROTOCOL_FIELDS},
    scales=tuple(config.eval.scales),
  )
