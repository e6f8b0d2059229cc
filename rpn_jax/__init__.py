"""RPN: open-vocabulary semantic segmentation by relationship prompts.

What others build on (docs/extending.md); everything is imported when it is first used, since JAX
takes a second.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from rpn_jax.config import RPNConfig
  from rpn_jax.inference.segmenter import Segmenter
  from rpn_jax.models.clip import CLIPConfig
  from rpn_jax.models.rpn import RPN
  from rpn_jax.models.trained import init_prompts
  from rpn_jax.models.tuners import Tuner, merge
  from rpn_jax.text.embeddings import class_embeddings
  from rpn_jax.training.losses import sigmoid_loss, softmax_loss
  from rpn_jax.training.step import TrainState, train_step
  from rpn_jax.weights.clip_file import load_clip

__version__ = "0.3.0.dev0"

# Name -> module.
_PUBLIC = {
  "CLIPConfig": "models.clip",
  "RPN": "models.rpn",
  "RPNConfig": "config",
  "Segmenter": "inference.segmenter",
  "TrainState": "training.step",
  "Tuner": "models.tuners",
  "class_embeddings": "text.embeddings",
  "init_prompts": "models.trained",
  "load_clip": "weights.clip_file",
  "merge": "models.tuners",
  "sigmoid_loss": "training.losses",
  "softmax_loss": "training.losses",
  "train_step": "training.step",
}
__all__ = [
  "RPN",
  "CLIPConfig",
  "RPNConfig",
  "Segmenter",
  "TrainState",
  "Tuner",
  "__version__",
  "class_embeddings",
  "init_prompts",
  "load_clip",
  "merge",
  "sigmoid_loss",
  "softmax_loss",
  "train_step",
]  # fmt: skip


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f"module 'rpn_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"rpn_jax.{_PUBLIC[name]}"), name)
