"""Protocols of published results: what is set for which data set, and what is refused."""

import pytest

from configs import training_free
from rpn_jax.base.errors import InputError
from rpn_jax.config import check, protocols


def test_every_row_is_a_valid_config():
  for method, default in training_free.METHODS.items():
    for protocol in {default, "sclip"}:
      for name in protocols.PROTOCOLS[protocol]:
        c = training_free.get_config(f"method={method},protocol={protocol},set={name}")
        check(c)
        assert c.dense.method == method and c.eval.sets == (name,) and not c.eval.protocol
        assert c.synonyms == "max"


@pytest.mark.parametrize(
  "words, fields",
  [
    (
      "sclip,set=voc21",
      {"data.short_side": 336, "eval.crop": 224, "eval.stride": 112, "dense.logit_scale": 65,
       "eval.threshold": 0.1, "eval.area_threshold": 0.1, "eval.refine": "none"},
    ),
    ("sclip,set=coco_stuff171", {"data.short_side": 448, "dense.logit_scale": 40}),
    ("sclip,set=cityscapes", {"data.short_side": 560, "data.long_side": 2048}),
    ("naclip,set=voc20", {"eval.layout": "image", "eval.refine": "pamr", "eval.threshold": 0}),
    ("naclip,protocol=naclip_plain,set=context60", {"eval.layout": "windows", "eval.refine": "none",
                                              "eval.threshold": 0.1}),
    ("clearclip,set=cityscapes", {"data.short_side": 448, "eval.crop": 224, "eval.stride": 224}),
    ("clearclip,set=voc21", {"eval.crop": 448, "eval.stride": 224, "eval.threshold": 0.5,
                             "eval.naming": "clearclip"}),
    ("sc_clip,set=coco_object", {"eval.threshold": 0.35, "dense.logit_scale": 55}),
    ("maskclip_released,set=context59", {"data.short_side": 520, "data.long_side": 520,
                                "templates": "maskclip85", "data.mean": (0.485, 0.456, 0.406)}),
    # The protocol does not know the set: as context59.
    ("clearclip,set=ade847", {"eval.crop": 448, "eval.threshold": 0}),
  ],
)  # fmt: skip
def test_values_of_a_protocol(words, fields):
  c = training_free.get_config(f"method={words}")
  for path, value in fields.items():
    found = c
    for part in path.split("."):
      found = found[part]
    assert found == value or pytest.approx(value) == found, path


def test_each_set_gets_its_own_values():
  c = training_free.get_config("method=sclip,set=all")
  assert c.eval.sets == protocols.SETS and c.eval.protocol == "sclip"
  each = protocols.each(c)
  assert [one.eval.sets for one in each] == [(name,) for name in protocols.SETS]
  assert [one.data.short_side for one in each] == [336, 336, 336, 336, 560, 336, 336, 448]
  assert [one.eval.threshold for one in each] == [0.1, 0.1, 0.1, 0, 0, 0, 0, 0]
  assert protocols.each(training_free.get_config("method=sclip,set=voc21"))[0].data.crop


def test_nothing_is_replaced_in_silence():
  c = training_free.get_config("method=sclip,set=all").unlock()
  c.eval.stride = 56
  with pytest.raises(InputError, match=r"config.eval.stride=56 has no effect with .*'sclip'"):
    protocols.each(c)


def test_refusals():
  c = training_free.get_config("method=sclip,set=all").unlock()
  c.eval.sets = ("ade847",)
  with pytest.raises(InputError, match="'sclip' says nothing about ade847: expected one of voc21"):
    protocols.each(c)
  c.eval.sets = ()
  with pytest.raises(InputError, match=r"needs config\.eval\.sets"):
    protocols.each(c)
  c.eval.protocol = "sclipp"
  c.eval.sets = ("voc21",)
  with pytest.raises(InputError, match="did you mean 'sclip'"):
    protocols.each(c)
