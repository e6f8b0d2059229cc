"""Evaluation at label resolution, and the files that tell about it."""

import importlib.metadata
import pathlib
import platform
from collections.abc import Iterable, Sequence

import numpy as np

from rpn_jax import metrics, visualize
from rpn_jax.experiment import Experiment
from rpn_jax.logging import progress, table, write_json
from rpn_jax.sliding import SlidingWindow

# Examples shown in predictions.png.
PICTURES = 6

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def evaluate(
  segmenter: SlidingWindow,
  examples: Iterable[dict],
  names: Sequence[str],
  seen: Sequence[int] = (),
  unseen: Sequence[int] = (),
  *,
  keep: int = 0,
) -> tuple[dict, list[dict]]:
  """Scores of one pass over `examples`.

  Args:
    segmenter: image -> class ids.
    examples: sized iterable of {image: (h, w, 3) float32, label: (H, W) int, id: str}.
    names: C class names.
    seen: ids of classes trained on.
    unseen: ids of the others.
    keep: how many examples to return with their `prediction`, for pictures.

  Returns:
    The metrics of `metrics.scores` with `per_class` {name: IoU}, and the kept examples.
  """
  confusion = np.zeros((len(names), len(names)), np.int64)
  kept = []
  for example in progress(examples, "evaluate", "image"):
    prediction = segmenter(example["image"], example["label"].shape)
    confusion += metrics.confusion_matrix(example["label"], prediction, len(names))
    if len(kept) < keep:
      kept.append({**example, "prediction": prediction})
  result = metrics.scores(confusion, seen, unseen)
  result["per_class"] = dict(zip(names, result.pop("iou")))
  return result, kept


def write_metrics(path: pathlib.Path, last: dict, best: dict | None, config) -> None:
  """`metrics.json`: the last and the best evaluation, the config and the versions."""
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  versions["python"] = platform.python_version()
  content = {"last": last, "best": best or last, "config": config.to_dict(), "versions": versions}
  content["best"] = {**content["best"], "selected_on": "the evaluation classes"}
  write_json(path, content)


def picture(path: pathlib.Path, kept: list[dict], names, unseen, config) -> None:
  """Grid of image, truth and prediction."""
  mean, std = np.float32(config.data.mean), np.float32(config.data.std)
  images = [np.uint8(np.clip((e["image"] * std + mean) * 255, 0, 255)) for e in kept]
  visualize.prediction_grid(
    path,
    images,
    [e["label"] for e in kept],
    [e["prediction"] for e in kept],
    names,
    unseen=unseen,
  )


def score_table(rows: dict[str, dict]) -> str:
  """Plain-text table of metrics in percent, one row per entry."""
  columns = ("pAcc", "miou_gt", "miou_union", "miou_seen", "miou_unseen", "hiou")
  cells = [
    [name, *("-" if m[c] is None else f"{100 * m[c]:.1f}" for c in columns)]
    for name, m in rows.items()
  ]
  return table(cells, ["%", *columns])


def run(config, workdir, data) -> dict:
  """`--mode=eval`: scores of the workdir's newest checkpoint, or of a training-free method.

  Writes `predictions.png` and `eval.json`; for a training-free method, which has no training to
  write it, `metrics.json`.
  """
  experiment = Experiment(config, workdir)
  experiment.claim_workdir()
  step, prompts = experiment.restored_prompts()
  trained = experiment.trainable
  segmenter = experiment.segmenter(
    prompts, experiment.text(data.names), data.seen if data.unseen and trained else ()
  )
  result, kept = evaluate(
    segmenter, data.eval_examples(), data.names, data.seen, data.unseen, keep=PICTURES
  )
  result = {"step": step, **result}
  path = experiment.workdir / ("eval.json" if trained else "metrics.json")
  write_metrics(path, result, None, config)
  picture(experiment.workdir / "predictions.png", kept, data.names, data.unseen, config)
  print(f"\nScores of {config.method}, step {step}:")
  print(score_table({config.method: result}))
  print(f"Look at {workdir}/predictions.png. Every number is in {path}.")
  return result
