"""RPN: open-vocabulary semantic segmentation by relationship prompts."""

__version__ = "0.2.0"
__all__ = ["Segmenter", "__version__"]


def __getattr__(name: str):
  # On first use: JAX takes a second to import.
  if name == "Segmenter":
    from rpn_jax.segmenter import Segmenter

    return Segmenter
  raise AttributeError(f"module 'rpn_jax' has no attribute {name!r}")
