"""Pseudo-labels: their fields, and which settings read them."""

import dataclasses

from rpn_jax.base.errors import InputError
from rpn_jax.base.fields import Config, field


@dataclasses.dataclass(frozen=True)
class SelfTraining:
  """Pseudo-labels: of unseen classes (transductive), or of all pixels (annotation_free)."""

  start: float = field(
    0.5,
    "transductive: share of the steps after which unseen classes get pseudo-labels",
    at_least=0,
    at_most=1,
  )
  pixels: str = field(
    "unseen",
    "transductive: pixels that may get them: those that the ground truth gives to some unseen "
    "class (the paper's dagger rows), or also those without a label (unlabelled), which reveals no "
    "positions",
    words=("unseen", "unlabelled"),
  )
  teacher: str = field(
    "sclip",
    "annotation_free: training-free method that labels the training crops; its other settings are "
    "those of config.dense",
  )
  refresh: int = field(
    0,
    "annotation_free: every so many steps the network, as it is then, takes over from the teacher; "
    "0: never",
    at_least=0,
  )
  confidence: float = field(
    0.0,
    "annotation_free: pixels whose best class has a lower probability are ignored; 0: none",
    at_least=0,
    at_most=1,
  )


# Setting -> the fields that it reads.
READ = {
  "transductive": ("start", "pixels"),
  "annotation_free": ("teacher", "refresh", "confidence"),
}


def check_self_training(config: Config) -> None:
  """Refuses fields that `data.setting` leaves unread, as far as annotation_free is concerned.

  Earlier versions accepted those of the transductive setting in all of theirs.

  Raises:
    InputError: such a field, or a teacher that is not replaced before the last step.
  """
  setting, given = config.get("data", {}).get("setting"), config.get("self_training", {})
  for f in dataclasses.fields(SelfTraining):
    (reader,) = (name for name, names in READ.items() if f.name in names)
    value = given.get(f.name, f.default)
    if value != f.default and setting != reader and "annotation_free" in (setting, reader):
      raise InputError(
        f"config.self_training.{f.name}={value!r}: expected {f.default!r} with config.data.setting="
        f"{setting!r}, since only {reader} reads it: leave it out"
      )
  refresh, steps = given.get("refresh", 0), config.get("steps", 0)
  if refresh and refresh >= steps:
    raise InputError(
      f"config.self_training.refresh={refresh}: expected less than config.steps={steps}, since the "
      "teacher's labels would last to the end: lower it, or leave it out to have them so"
    )
