"""Colors of classes: distinct, stable, and those of their names."""

import numpy as np
import pytest

from rpn_jax.drawing.palette import BLINDNESS, FIRST_COLORS, FULL_VISION, HATCH, _lab, class_colors


@pytest.mark.parametrize(("count", "least"), [(12, 25), (60, 20), (150, 14), (847, 6)])
def test_class_colors_are_far_apart(count, least):
  colors = class_colors([str(i) for i in range(count)])
  assert colors.shape == (count, 3)
  assert colors.dtype == np.uint8
  assert least_distance(colors) > least


def least_distance(colors, seen_through=FULL_VISION):
  lab = _lab(np.concatenate([colors, np.uint8(HATCH)]), seen_through)
  distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e9 * np.eye(len(lab))
  return distance.min()


@pytest.mark.parametrize(("count", "least"), [(7, 15), (20, 11), (60, 7)])
def test_colorblind_palette_stays_distinct_without_red_and_green(count, least):
  names = [f"c{i}" for i in range(count)]
  for view in (FULL_VISION, *BLINDNESS):
    safe = least_distance(class_colors(names, "colorblind"), view)
    assert safe > least
    if view != FULL_VISION:
      assert safe > 1.25 * least_distance(class_colors(names), view)
  grey = np.array([[128, 128, 128]])  # what the eye sees without it is seen with it
  np.testing.assert_allclose(_lab(grey, BLINDNESS[0]), _lab(grey), atol=0.5)
  with pytest.raises(ValueError, match="default, colorblind, got 'x'"):
    class_colors(names, "x")


def test_a_name_has_its_color_in_every_list():
  alone = {name: class_colors([name])[0].tolist() for name in map(str, range(200))}
  assert len({tuple(c) for c in alone.values()}) == len(FIRST_COLORS)
  differing = list({tuple(color): name for name, color in alone.items()}.values())
  for names in (differing[:3], differing[2::-1], differing):
    assert class_colors(names).tolist() == [alone[name] for name in names]


def test_lab_agrees_with_published_values():
  # sRGB primaries and white under D65.
  expected = [(53.24, 80.09, 67.20), (87.73, -86.18, 83.18), (32.30, 79.19, -107.86), (100, 0, 0)]
  got = _lab(np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]))
  np.testing.assert_allclose(got, expected, atol=0.1)


def test_class_colors_are_stable():
  names = [f"c{i}" for i in range(40)]
  colors = class_colors(names)
  np.testing.assert_array_equal(colors, class_colors(names))
  np.testing.assert_array_equal(colors[:15], class_colors(names[:15]))
  twice = class_colors(["a", "b", "a"])
  np.testing.assert_array_equal(twice[0], twice[2])
  colors[:] = 0  # a caller's change must not reach the next caller
  assert class_colors(names).any()
  assert class_colors([]).shape == (0, 3)
