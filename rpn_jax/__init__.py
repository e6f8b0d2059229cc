"""RPN: open-vocabulary semantic segmentation by relationship prompts.

What others build on (docs/extending.md); everything is imported when it is first used, since JAX
takes a second.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from rpn_jax.experiment import load_clip
  from rpn_jax.losses import sigmoid_loss, softmax_loss
  from rpn_jax.models.clip import CLIPConfig
  from rpn_jax.models.peft import Tuner, merge
  from rpn_jax.models.rpn import RPN, RPNConfig
  from rpn_jax.segmenter import Segmenter
  from rpn_jax.step import TrainState, init_prompts, train_step
  from rpn_jax.text_cache import class_embeddings

__version__ = "0.2.0"

# Name -> module.
_PUBLIC = {
  "CLIPConfig": "models.clip",
  "RPN": "models.rpn",
  "RPNConfig": "models.rpn",
  "Segmenter": "segmenter",
  "TrainState": "step",
  "Tuner": "models.peft",
  "class_embeddings": "text_cache",
  "init_prompts": "step",
  "load_clip": "experiment",
  "merge": "models.peft",
  "sigmoid_loss": "losses",
  "softmax_loss": "losses",
  "train_step": "step",
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
