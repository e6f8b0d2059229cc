"""Protocols of published training-free results: what their code sets for each data set.

Sizes are pixels. All resize images to a short side, of which the long one is at most 2048, and all
but MaskCLIP's average 80 sentences around a name. Thresholds and scales are tuned for each set,
which is a part of the published scores: name the protocol with a number.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known

# The eight usual sets, in the order of the papers' tables.
SETS = (
  "voc21", "context60", "coco_object", "voc20", "cityscapes", "context59", "ade150",
  "coco_stuff171",
)  # fmt: skip

Changes = Mapping[str, Any]


def _row(short_side: int, scale: float, threshold: float = 0.0, **more: Any) -> dict[str, Any]:
  """Changes of a config for one set: SCLIP's windows, and `more` with "__" for a dot."""
  return {
    "data.short_side": short_side,
    "data.long_side": 2048,
    "eval.layout": "windows",
    "eval.crop": 224,
    "eval.stride": 112,
    "eval.threshold": threshold,
    "eval.area_threshold": 0.0,
    "eval.refine": "none",
    "eval.naming": "sclip",
    "dense.logit_scale": scale,
    **{name.replace("__", "."): value for name, value in more.items()},
  }


def _with(rows: Mapping[str, Changes], **more: Any) -> dict[str, Changes]:
  """The same changes for all sets, and `more`."""
  added = {name.replace("__", "."): value for name, value in more.items()}
  return {name: {**row, **added} for name, row in rows.items()}


_SCLIP = {
  "voc21": _row(336, 65, 0.1, eval__area_threshold=0.1),
  "context60": _row(336, 50, 0.1),
  "coco_object": _row(336, 50, 0.1),
  "voc20": _row(336, 40),
  "cityscapes": _row(560, 40),
  "context59": _row(336, 40),
  "ade150": _row(336, 40),
  "coco_stuff171": _row(448, 40),
}
# Without its refinement.
_NACLIP = {
  "voc21": _row(336, 40, 0.1, eval__layout="image"),
  "context60": _row(336, 40, 0.1),
  "coco_object": _row(336, 40, 0.1),
  "voc20": _row(336, 40, eval__layout="image"),
  "cityscapes": _row(560, 40),
  "context59": _row(336, 40),
  "ade150": _row(336, 40),
  "coco_stuff171": _row(336, 40),
}
_SC_CLIP = {
  **_SCLIP,
  "voc21": _row(336, 50, 0.15, eval__area_threshold=0.1),
  "context60": _row(336, 40, 0.15),
  "coco_object": _row(336, 55, 0.35),
  "coco_stuff171": _row(336, 40),
}


def _clearclip(threshold: float = 0.0) -> dict[str, Any]:
  sizes = {"eval__crop": 448, "eval__stride": 224, "eval__naming": "clearclip"}
  return _row(448, 50, threshold, **sizes)


_CLEARCLIP = {
  "voc21": _clearclip(0.5),
  "context60": _clearclip(0.15),
  "coco_object": _clearclip(0.4),
  "voc20": _clearclip(),
  # Its windows here have 224 pixels, too, and do not overlap.
  "cityscapes": {**_clearclip(), "eval.crop": 224},
  "context59": _clearclip(),
  "ade150": _clearclip(),
  "coco_stuff171": _clearclip(),
}


def _resclip(
  name: str, threshold: float, rcs: tuple[float, float], sfr: tuple[float, float]
) -> dict[str, Any]:
  more = {
    "dense.res_clip_threshold": threshold,
    "dense.res_clip_rcs": rcs,
    "dense.res_clip_sfr": sfr,
  }
  return {**_NACLIP[name], **more}


_RES_CLIP = {
  "voc21": _resclip("voc21", 0.50, (2.0, 0.3), (2.2, 0.7)),
  "context60": _resclip("context60", 0.30, (2.0, 0.3), (1.8, 0.7)),
  "coco_object": _resclip("coco_object", 0.11, (2.0, 0.4), (1.8, 0.7)),
  "voc20": _resclip("voc20", 0.10, (2.0, 0.6), (2.1, 0.6)),
  "cityscapes": _resclip("cityscapes", 0.10, (2.0, 0.2), (2.1, 0.6)),
  "context59": _resclip("context59", 0.25, (2.0, 0.4), (1.8, 0.7)),
  "ade150": _resclip("ade150", 0.25, (2.0, 0.3), (2.1, 0.7)),
  "coco_stuff171": _resclip("coco_stuff171", 0.11, (2.0, 0.4), (1.8, 0.7)),
}
_PEARL = {
  name: {**row, "dense.pearl_alpha": 0.3 if name in ("ade150", "cityscapes") else 0.08}
  for name, row in _NACLIP.items()
}
_MASKCLIP = _with(
  {
    "voc20": _row(512, 100),
    # A limit of 520 pixels on both sides: the long one has as many.
    "context59": _row(520, 100, data__long_side=520),
    "cityscapes": _row(512, 100, data__long_side=1024),
    "coco_stuff171": _row(512, 100),
  },
  eval__layout="image",
  eval__naming="maskclip",
  data__mean=pixels.IMAGENET_MEAN,
  data__std=pixels.IMAGENET_STD,
  templates="maskclip85",
)

# Value of config.eval.protocol -> data set -> changes of a config.
PROTOCOLS: dict[str, Mapping[str, Changes]] = {
  "sclip": _SCLIP,
  "naclip": _with(_NACLIP, eval__refine="pamr"),
  "naclip_plain": _NACLIP,
  "clearclip": _CLEARCLIP,
  "sc_clip": _SC_CLIP,
  "res_clip": _RES_CLIP,
  "pearl": _PEARL,
  "maskclip": _MASKCLIP,
}


def apply(config: config_dict.ConfigDict, protocol: str, name: str) -> None:
  """Sets the fields of an unlocked config that a protocol fixes for a data set.

  Raises:
    InputError: an unknown protocol, or one that says nothing about the set.
  """
  check_known("config.eval.protocol=", protocol, PROTOCOLS)
  rows = PROTOCOLS[protocol]
  if name not in rows:
    raise InputError(
      f"config.eval.protocol={protocol!r} says nothing about {name}: expected one of "
      f"{', '.join(rows)}; or another protocol"
    )
  with config.ignore_type():  # the normalization may be left to the weights
    config.update_from_flattened_dict(rows[name])


def each(config: config_dict.ConfigDict) -> list[config_dict.ConfigDict]:
  """A config for each data set of `config.eval.sets`, as `config.eval.protocol` evaluates it.

  Without a protocol all sets are evaluated alike: the config itself.

  Raises:
    InputError: see `apply`; or a field that the protocol sets for each data set has another value
      than for the first.
  """
  protocol = config.get("eval", {}).get("protocol", "")
  if not protocol:
    return [config]
  if not config.eval.sets:
    raise InputError(
      f"config.eval.protocol={protocol!r} needs config.eval.sets, the data sets it is for; "
      "--config=configs/training_free.py:set=all names all of them"
    )
  configs = []
  for name in config.eval.sets:
    one = config.copy_and_resolve_references().unlock()
    apply(one, protocol, name)
    one.eval.sets = (name,)
    configs.append(one.lock())
  _check_unchanged(config, protocol)
  return configs


def _check_unchanged(config: config_dict.ConfigDict, protocol: str) -> None:
  """Refuses values that the protocol would replace in silence.

  The config has those of its own data set, which need not be evaluated, or of the first that is.
  """
  rows = PROTOCOLS[protocol]
  names = [name for name in (config.eval.sets[0], config.data.name) if name in rows]
  differing = {name: list(_differing(config, rows[name])) for name in names}
  name, found = min(differing.items(), key=lambda item: len(item[1]))
  if found:
    path, given, value = found[0]
    raise InputError(
      f"config.{path}={given!r} has no effect with config.eval.protocol={protocol!r}, which sets "
      f"it for each data set ({name}: {value!r}): leave it out, or evaluate one "
      "set, as in configs/training_free.py:set=voc21"
    )


def _differing(config: config_dict.ConfigDict, row: Changes) -> Iterator[tuple[str, Any, Any]]:
  """The path, value and value of the row, where these differ."""
  for path, value in row.items():
    section, _, name = path.rpartition(".")
    given = (config[section] if section else config)[name]
    if given != value:
      yield path, given, value
