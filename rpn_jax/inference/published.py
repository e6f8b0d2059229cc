"""Published scores to print next to one's own, in percent.

Sources: RPN, Li et al., "Relationship Prompt Learning is Enough for Open-Vocabulary Semantic
Segmentation", NeurIPS 2024 (zero-shot, transductive with the position of unseen pixels known,
fully supervised, open vocabulary). CAT-Seg, Cho et al., CVPR 2024. InfoCLIP, ERR-Seg and ESC-Net:
later papers that compare themselves with CAT-Seg.

Without training, with OpenAI's weights: MaskCLIP's own scores, SCLIP's, NACLIP's (with PAMR) and
CLIPtrase's are from the READMEs of their repositories; those of ResCLIP, and the others beside it,
from the tables in the repositories of ResCLIP and ClearCLIP, which reran them (ResCLIP lists for
Context60 what GEM's own paper calls Context). A row marked "from memory" was not looked up again.

Open-vocabulary and training-free papers report one "mIoU" without saying over which classes.
"""

from rpn_jax.config import BACKBONES
from rpn_jax.config.protocols import SETS
from rpn_jax.models.clip import CLIPConfig

# (vision width, patch size) -> title of the backbone
TITLES = {
  (b.architecture["vision_width"], b.architecture["patch_size"]): b.title
  for b in BACKBONES.values()
}

_ZERO_SHOT = ("pAcc", "miou_seen", "miou_unseen", "hiou")
_SPLIT_SETS = ("voc20", "coco_stuff171", "context60")
_OPEN_SETS = ("ade847", "context459", "ade150", "context59", "voc20")
_OPEN_SETS_B = (*_OPEN_SETS, "voc20b")


def _free(method: str, *values: float | None) -> tuple[str, tuple, tuple, tuple]:
  """A row of _TABLES: mIoU on protocols.SETS, None where it was not published."""
  known = [(name, (v,)) for name, v in zip(SETS, values, strict=True) if v is not None]
  sets, scores = zip(*known)
  return method, ("miou",), sets, scores


# (setting, backbone) -> [(method, metrics, sets, values of each set)]; a method with a backbone of
# its own names it.
_TABLES: dict[tuple[str, str], list[tuple[str, tuple, tuple, tuple]]] = {
  ("zero_shot", "ViT-B/16"): [
    ("RPN", _ZERO_SHOT, _SPLIT_SETS,
     ((95.8, 93.1, 84.6, 88.6), (64.4, 40.8, 42.8, 41.8), (76.4, 47.7, 58.7, 52.6))),
  ],
  ("transductive", "ViT-B/16"): [
    ("RPN", _ZERO_SHOT, _SPLIT_SETS,
     ((97.1, 93.1, 93.6, 93.3), (69.3, 40.6, 61.2, 48.8), (78.3, 48.1, 70.8, 57.3))),
  ],
  ("supervised", "ViT-B/16"): [
    ("RPN", _ZERO_SHOT, _SPLIT_SETS,
     ((97.2, 94.0, 94.6, 94.3), (70.8, 41.1, 64.1, 50.5), (78.7, 48.5, 80.1, 60.4))),
  ],
  ("open_vocabulary", "ViT-B/16"): [
    ("RPN", ("miou",), _OPEN_SETS, ((11.4,), (17.3,), (31.5,), (57.1,), (95.2,))),
    ("CAT-Seg", ("miou",), _OPEN_SETS_B,
     ((12.0,), (19.0,), (31.8,), (57.5,), (94.6,), (77.3,))),
    ("InfoCLIP", ("miou",), _OPEN_SETS, ((12.6,), (19.5,), (32.1,), (58.1,), (95.5,))),
    ("ERR-Seg on ConvNeXt-B", ("miou",), _OPEN_SETS, ((13.9,), (20.5,), (35.8,), (56.9,), (95.4,))),
    ("ESC-Net", ("miou",), _OPEN_SETS[2:], ((35.6,), (59.0,), (97.3,))),
  ],
  ("open_vocabulary", "ViT-L/14"): [
    ("RPN", ("miou",), _OPEN_SETS, ((14.9,), (22.1,), (36.4,), (61.9,), (96.6,))),
    ("CAT-Seg", ("miou",), _OPEN_SETS_B,
     ((16.0,), (23.8,), (37.9,), (63.3,), (97.0,), (82.5,))),
    ("ESC-Net", ("miou",), _OPEN_SETS, ((18.1,), (27.0,), (41.8,), (65.6,), (98.3,))),
  ],
  ("training_free", "ViT-B/16"): [
    _free("CLIP, ClearCLIP's protocol", 16.2, 7.7, 5.5, 41.8, 5.5, 9.2, 2.1, 4.4),
    _free("MaskCLIP", None, None, None, 49.5, None, 21.7, None, 12.5),
    _free("MaskCLIP, later reruns", 38.8, 23.6, 20.6, 74.9, 12.6, 26.4, 9.8, 16.4),
    _free("CLIPtrase at 224", 50.9, 29.9, 43.6, 81.0, None, 33.8, 16.4, 22.8),
    _free("CLIPtrase at 336", 53.0, 30.8, 44.8, 81.2, None, 34.9, 17.0, 24.1),
    _free("GEM", 46.2, 32.6, None, 79.9, 30.8, 35.9, 15.7, 23.7),
    _free("SCLIP, its repository", 59.63, 31.74, 33.52, 81.54, 32.34, 34.46, 16.45, 22.77),
    _free("SCLIP, its paper", 59.1, 30.4, 30.5, 80.4, 32.2, 34.2, 16.1, 22.4),
    _free("ClearCLIP", 51.8, 32.6, 33.0, 80.9, 30.0, 35.9, 16.7, 23.9),
    _free("NACLIP without PAMR", 58.9, 32.2, 33.2, 79.7, 35.5, 35.2, 17.4, 23.3),
    _free("NACLIP", 64.07, 34.99, 36.19, 83.03, 38.27, 38.35, 19.05, 25.69),
    _free("ResCLIP", 61.1, 33.5, 35.0, 86.0, 35.9, 36.8, 18.0, 24.7),
    _free("PEARL", 64.1, 35.1, 37.3, 86.9, 37.6, 38.6, 19.4, 26.3),
    _free("SC-CLIP, from memory", 64.6, 36.8, 37.7, 84.3, 41.0, 40.1, 20.1, 26.6),
  ],
  ("training_free", "ViT-L/14"): [
    _free("CLIP, ClearCLIP's protocol", None, None, None, 15.8, 2.9, 4.5, 1.2, 2.4),
    _free("MaskCLIP, later reruns", None, None, None, 30.1, 10.1, 12.6, 6.9, 8.9),
    _free("GEM", None, None, None, 80.3, 22.6, 26.4, 11.6, 17.6),
    _free("SCLIP", 44.4, 22.3, 24.9, 60.3, 17.0, 20.5, 7.1, 13.1),
    _free("ClearCLIP", 48.7, 28.3, 29.7, 80.0, 27.9, 29.6, 15.0, 19.9),
    _free("NACLIP without PAMR", 52.2, 28.7, 29.9, 78.7, 31.4, 32.1, 17.3, 21.4),
    _free("ResCLIP", 54.1, 30.9, 32.5, 85.5, 33.7, 34.5, 18.2, 23.4),
    _free("SC-CLIP, from memory", 65.0, 36.9, 40.5, 88.3, 41.3, 40.6, 21.7, 26.9),
  ],
}  # fmt: skip

# hIoU on VOC, zero-shot, ViT-B/16: the paper's Table 10.
TUNERS = {
  "full": 45.4, "lpm": 59.6, "bitfit": 62.2, "adapter": 62.6, "vpt": 64.0, "lst": 61.4, "ssf": 63.8,
  "lora": 64.5, "rpn": 88.6,
}  # fmt: skip


def rows(setting: str, name: str, clip_config: CLIPConfig) -> dict[str, dict[str, float]]:
  """Method -> metric -> percent, for a data set, a setting and a backbone; {} if none is known.

  Args:
    setting: "zero_shot", "transductive", "supervised", "open_vocabulary" or "training_free".
    name: name of the data set.
    clip_config: architecture of CLIP.
  """
  backbone = TITLES.get((clip_config.vision_width, clip_config.patch_size), "")
  return {
    f"{method if ' on ' in method else f'{method} {backbone}'}, published": dict(
      zip(metrics, values[sets.index(name)])
    )
    for method, metrics, sets, values in _TABLES.get((setting, backbone), ())
    if name in sets
  }
