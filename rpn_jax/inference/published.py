"""Published scores to print next to one's own, in percent.

Sources: RPN, Li et al., "Relationship Prompt Learning is Enough for Open-Vocabulary Semantic
Segmentation", NeurIPS 2024 (zero-shot, transductive with the position of unseen pixels known,
fully supervised, open vocabulary). CAT-Seg, Cho et al., CVPR 2024. InfoCLIP, ERR-Seg and ESC-Net:
later papers that compare themselves with CAT-Seg. MaskCLIP, Zhou et al., ECCV 2022, and reruns of
it by later papers with their own protocols. SCLIP, Wang et al., 2023, as listed in its repository.
ClearCLIP, Lan et al., ECCV 2024.

Open-vocabulary and training-free papers report one "mIoU" without saying over which classes.
"""

from rpn_jax.config import BACKBONES
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
_FREE_SETS = ("voc20", "context59", "coco_stuff171")

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
    ("MaskCLIP", ("miou",), _FREE_SETS, ((49.5,), (21.7,), (12.5,))),
    ("MaskCLIP, later reruns", ("miou",), _FREE_SETS, ((74.9,), (26.4,), (16.7,))),
    ("SCLIP", ("miou",), _FREE_SETS, ((81.5,), (34.5,), (22.8,))),
    ("ClearCLIP", ("miou",), _FREE_SETS, ((80.9,), (35.9,), (23.9,))),
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
