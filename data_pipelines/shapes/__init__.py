"""The synthetic data sets `shapes` and `crowds`: scenes to segment, images with captions."""

from data_pipelines.shapes.builder import ShapesConfig, open_crowds, open_shapes, prepare, source
from data_pipelines.shapes.captions import CaptionedShapes, single_object_images, visible_classes
from data_pipelines.shapes.world import (
  CLASSES,
  COLOR_CLASSES,
  COLOR_OF_CLASS,
  COLORS,
  CROWDS_VOCABULARY,
  GROUNDS,
  OBJECTS,
  PATTERNS,
  UNSEEN,
  VOCABULARY,
  draw_scene,
)

__all__ = [
  "CLASSES",
  "COLORS",
  "COLOR_CLASSES",
  "COLOR_OF_CLASS",
  "CROWDS_VOCABULARY",
  "GROUNDS",
  "OBJECTS",
  "PATTERNS",
  "UNSEEN",
  "VOCABULARY",
  "CaptionedShapes",
  "ShapesConfig",
  "draw_scene",
  "open_crowds",
  "open_shapes",
  "prepare",
  "single_object_images",
  "source",
  "visible_classes",
]
