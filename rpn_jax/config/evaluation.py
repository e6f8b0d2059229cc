"""The settings of evaluation and prediction: a section of the config."""

import dataclasses

from rpn_jax.base.fields import field


@dataclasses.dataclass(frozen=True)
class Eval:
  """Evaluation and prediction."""

  sets: tuple[str, ...] = field(
    (), "data sets of --mode=eval, every class prompted; (): the training set, in its setting"
  )
  protocol: str = field(
    "",
    "published protocol of a training-free method, which sets sizes, thresholds and names for each "
    "of these sets (rpn_jax/config/protocols.py); none: all alike, by the other fields",
  )
  naming: str = field(
    "dataset",
    "wording of the class names of these where a set has it: maskclip, spaced, catseg, sclip, "
    "clearclip, proxyclip or itaclip; else dataset, or data.naming for the training set",
    words=(
      "dataset",
      "maskclip",
      "spaced",
      "catseg",
      "sclip",
      "clearclip",
      "proxyclip",
      "itaclip",
    ),
  )
  layout: str = field(
    "windows",
    "how the network's square windows lie over an image: sliding windows; square: tiles of the "
    "image squashed to a square, and all of it in one more window; whole: all of it squashed to "
    "one window; image: all of it as it is, in one window of its shape, each compiled for",
    words=("windows", "square", "whole", "image"),
  )
  crop: int = field(512, "side of the windows, pixels", at_least=1)
  stride: int = field(
    426, "step of the windows, pixels; at most their side, so that no pixel is left out",
    at_least=1,
  )  # fmt: skip
  square: int = field(
    640, "layout square: side that images are squashed to, pixels; at least a window's", at_least=1
  )
  keep_padding: bool = field(
    True,
    "layout whole, which pads images to multiples of 32 pixels: stretch the scores of the padded "
    "image over the image, as the official code of CAT-Seg; or cut those of the padding off",
  )
  window_batch: int = field(4, "windows per call of the network", at_least=1)
  scales: tuple[float, ...] = field(
    (1.0,), "scores are averaged over these sizes, factors on data.short_side", above=0
  )
  flip: bool = field(False, "also average over mirrored images")
  refine: str = field(
    "none",
    "what is done with scores at the size of the labels: pamr makes them follow the image's edges",
    words=("none", "pamr"),
  )
  pamr_steps: int = field(10, "iterations of pamr", at_least=1)
  pamr_dilations: tuple[int, ...] = field(
    (8, 16), "distances of the neighbors of a pixel in pamr, pixels", at_least=1
  )
  threshold: float = field(
    0.0,
    "pixels whose highest probability is lower get class 0, the background (prob_thd); 0: off",
    at_least=0,
    at_most=1,
  )
  area_threshold: float = field(
    0.0,
    "classes but class 0 that cover at most this share of the pixels that all of these cover get "
    "none (area_thd); 0: off",
    at_least=0,
    at_most=1,
  )
  seen_penalty: float = field(
    0.1, "subtracted from the scores of seen classes in the zero-shot setting"
  )
  palette: str = field("default", "colors of predictions.png", words=("default", "colorblind"))
