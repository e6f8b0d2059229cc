"""The trained prompts of a run, for this machine and to pass on: main.py --mode=export."""

import pathlib
from typing import Any

import jax

from rpn_jax.base.buckets import is_bucket
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_text
from rpn_jax.drawing.images import save_png
from rpn_jax.inference.evaluation import evaluate
from rpn_jax.inference.predictor import Predictor, open_run
from rpn_jax.inference.segmenter import Segmenter
from rpn_jax.tasks import model_card
from rpn_jax.tasks.demo import SCENE, SCENE_WORDS
from rpn_jax.tasks.evaluate import draw_examples
from rpn_jax.training.run import Run
from rpn_jax.weights import exported, prompts_file

FOLDER = "export"
# Rows of the picture: the first images of the evaluation set.
EXAMPLES = 3


def export(config, workdir, data, license: str = "") -> pathlib.Path:
  """Writes the prompts of the newest checkpoint to a workdir, twice.

  `prompts.safetensors` is for this machine, with the run's config as it is. The folder `export` is
  to be passed on: the same prompts with a config that names no path of this machine, a card with
  scores and how to use it, a picture.

  Args:
    config: config of the run.
    workdir: directory of the run.
    data: the training set: its `names`, those that are `trained`, and its evaluation examples, if
      they are here.
    license: of the data set.

  Returns:
    The path of the folder.

  Raises:
    InputError: the method has no prompts, there is no checkpoint, it was trained on other classes,
      or a file cannot be written.
  """
  predictor, run = open_run(config, workdir)
  if not predictor.network.trainable:
    raise InputError(f"method {config.method!r} has no prompts to export")
  run.check_classes({"names": [*data.names]})
  step, prompts = predictor.read_prompts(run)["last"]
  predictor = predictor.with_prompts(prompts)
  local = run.config.to_dict()
  content = prompts_file.Prompts(prompts, run.fingerprint, local, tuple(data.names), step)
  path, folder = run.workdir / exported.PROMPTS, run.workdir / FOLDER
  prompts_file.save(path, content)

  folder.mkdir(parents=True, exist_ok=True)
  clip = exported.portable_clip(config.clip, predictor.clip)
  content = content._replace(config=exported.portable(local, clip))
  prompts_file.save(folder / exported.PROMPTS, content)
  caption = _draw(predictor, run, data, step, folder / exported.PICTURE)
  trained = [data.names[i] for i in data.trained]
  text = model_card.render(content, predictor, trained, run.workdir, caption, license)
  _write_card(folder / exported.CARD, text)

  count = sum(x.size for x in jax.tree.leaves(prompts))
  print(f"{count:,} parameters of step {step} in {path} ({path.stat().st_size / 1e6:.1f} MB)")
  print(f"To pass on: {folder}, with the CLIP named {clip}, a card and a picture. Read the card, "
        f"state a license in it, then: rpn share {folder} hf://OWNER/NAME")  # fmt: skip
  return folder


def _draw(predictor: Predictor, run: Run, data: Any, step: int, path: pathlib.Path) -> str:
  """Draws the picture; returns what it shows."""
  config = run.config
  try:
    if is_bucket(config.data.data_dir):  # whose records are copied to a disk before they are read
      raise InputError(f"{config.data.data_dir} is in a bucket")
    examples = data.eval_examples()[:EXAMPLES]
  except InputError as error:
    print(f"The picture shows the drawn scene of the package, not {data.name}: {error}", flush=True)
    segmenter = Segmenter(predictor, predictor.network.title, step)
    save_png(path, segmenter(SCENE, SCENE_WORDS).overlay(palette=config.eval.palette))
    return f"A scene drawn by a program, which is not of {data.name}, and the classes found in it."
  evaluation = evaluate(predictor.for_data(data), examples, data, keep=EXAMPLES)
  draw_examples(path, evaluation, config)
  of = "training images held out" if config.data.held_out else "images of the evaluation set"
  return f"The first {len(evaluation.kept)} {of} of {data.name}."


def _write_card(path: pathlib.Path, text: str) -> None:
  """Writes the card; what somebody has written into an earlier one is kept beside the folder."""
  if path.exists() and (old := path.read_text(encoding="utf-8")) != text:
    kept = path.parent.parent / f"replaced-{exported.CARD}"
    write_text(kept, old)
    print(f"{path} is written anew; the old one is {kept}", flush=True)
  write_text(path, text)
