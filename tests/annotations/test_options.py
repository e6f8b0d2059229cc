"""What is asked for in a wrong way is refused in one line."""

import pytest

from rpn_jax.annotations.options import FLAGS, FORMS, Options, parse_forms
from rpn_jax.base.errors import InputError


def test_forms():
  assert parse_forms("overlay, coco,overlay") == parse_forms(["overlay", "coco"])
  assert parse_forms(",".join(FORMS)) == FORMS
  for words, message in [
    (
      "overlay,cocco",
      r"^save='cocco' is not known; did you mean 'coco'\? Known: overlay, labels, ",
    ),
    ("", "save='' is not known"),
    ([], "expected at least one of overlay"),
  ]:
    with pytest.raises(InputError, match=message):
      parse_forms(words)


@pytest.mark.parametrize(
  ("options", "forms", "message"),
  [
    ({"instances": "class"}, FORMS, "instances='class' is not known; did you mean 'classes'"),
    ({"coco": "RLE"}, FORMS, "coco='RLE' is not known; .*Known: rle, polygons"),
    ({"simplify": -1}, FORMS, "simplify=-1: expected a number of pixels, at least 0"),
    ({"simplify": float("nan")}, FORMS, "simplify=nan: expected"),
    (
      {"min_area": 9},
      ["overlay", "voc"],
      "min_area=9 has no effect on overlay, voc: save coco or ",
    ),
    ({"simplify": 0}, ["coco"], "simplify=0 has no effect on coco: save labelme or yolo, too"),
    ({"coco": "polygons"}, ["yolo"], "coco=polygons has no effect on yolo: save coco, too"),
    ({"instances": "classes"}, ["yolo"], "instances=classes has no effect on yolo"),
  ],
)
def test_options_that_are_wrong_or_change_nothing(options, forms, message):
  with pytest.raises(InputError, match=message):
    Options(**options).check_used(forms)


def test_options_that_change_something():
  Options().check_used(["overlay"])
  Options(simplify=0, coco="polygons").check_used(["coco"])
  Options(simplify=2.0, min_area=9, min_hole=9).check_used(["yolo"])
  assert {*FLAGS} == {*vars(Options())}
