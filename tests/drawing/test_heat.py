"""Heat maps have the color map's colors where the scores are, under the names."""

import numpy as np

from rpn_jax.drawing import heat


def scores(classes):
  maps = np.zeros((6, 8, classes), np.float32)
  maps[:, :4] = np.linspace(0.1, 1, classes)  # the left half, the last class highest
  return maps


def count(page, value):
  """Pixels of the color of a score."""
  color = heat._colors()[round(255 * value)]
  return int((np.asarray(page).reshape(-1, 3) == color).all(1).sum())


def test_a_panel_for_the_image_and_each_class():
  image = np.full((60, 80, 3), (250, 10, 20), np.uint8)
  page = heat.score_grid(image, scores(3), ["cat, kitten", "Straße", "x" * 200])
  panel = 60 * 80 * 4**2  # whole factors: 320 x 240
  pixels = np.asarray(page).reshape(-1, 3)
  assert (pixels == (250, 10, 20)).all(1).sum() == panel
  for value in (0.1, 0.55, 1.0):
    assert count(page, value) > 0.4 * panel  # half of the panel, less where it fades
  assert count(page, 0) > 3 * 0.4 * panel
  assert page.width < 1400


def test_of_many_classes_the_highest_are_drawn():
  image = np.zeros((60, 80, 3), np.uint8)
  names = [f"class {i}" for i in range(150)]
  page = heat.score_grid(image, scores(150), names)
  assert count(page, 1.0) and page.width < 2000 and page.height < 2000
  lowest_drawn = np.linspace(0.1, 1, 150)[-heat.MAX_CLASSES]
  assert count(page, lowest_drawn) > 100
  fewer = heat.score_grid(image, scores(heat.MAX_CLASSES), names[: heat.MAX_CLASSES])
  assert page.height > fewer.height  # the line that counts the others


def test_one_class_and_tiny_images():
  for shape in ((1, 1), (5, 300), (300, 5)):
    page = heat.score_grid(np.zeros((*shape, 3), np.uint8), scores(1), ["猫"])
    assert page.width > 300 and page.height > 160  # the bar's
