"""The card of an exported model: what it is, its scores, how to use it, licenses. Markdown."""

import json
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from rpn_jax.base.console import table
from rpn_jax.base.words import split_synonyms
from rpn_jax.config import OWN_DATA
from rpn_jax.config.stored import scored_set
from rpn_jax.inference.predictor import Predictor
from rpn_jax.tasks.evaluate import COLUMNS, cells, columns_note, without_empty
from rpn_jax.weights import checkpoints
from rpn_jax.weights.exported import ADDRESS, PICTURE
from rpn_jax.weights.prompts_file import Prompts

# Files with scores in a workdir: of training, of --mode=eval.
SCORES = ("metrics.json", "eval.json")
# Words in the examples of the card.
WORDS = 3


class Row(NamedTuple):
  """Scores of a checkpoint on a data set, by a protocol."""

  set: str
  which: str
  step: int
  protocol: str
  scores: dict[str, Any]


def render(
  content: Prompts,
  predictor: Predictor,
  trained: Sequence[str],
  workdir: pathlib.Path,
  caption: str,
  license: str,
) -> str:
  """The card.

  Args:
    content: of the exported file; its config names CLIP as others find it.
    predictor: its network with its prompts.
    trained: class names that were prompted in training.
    workdir: of the run; scores of its last checkpoint, if that is the exported one, are listed.
    caption: what the picture shows.
    license: of the data set, "" if none is known.
  """
  config, clip = content.config, checkpoints.find(content.config["clip"])
  title = f"{network_name(config)} on {data_name(config)}"
  rows = read_scores(workdir, content.step)
  sections = [
    f"---\n{_front_matter(title, clip, rows, config)}\n---",
    f"# {title}",
    *([f"> **Note: {predictor.note}.**"] if predictor.note else []),
    "Open-vocabulary semantic segmentation: an image and any words in, a word for each pixel out. "
    "Made with rpn_jax, which loads it by its name.",
    f"![{caption}]({PICTURE})",
    caption,
    *_use(content, trained, "photo.jpg" if not predictor.note else "picture.png"),
    *_what(content, predictor, clip),
    *_classes(content.names, trained),
    *_scores(rows, content.step),
    *_licenses(data_name(config), clip, predictor.note, license),
  ]
  return "\n\n".join(sections) + "\n"


def network_name(config: Mapping[str, Any]) -> str:
  """What was trained: a network, or a tuner that is compared with RPN."""
  if config["method"] != "rpn":
    return {"cat_seg": "CAT-Seg"}.get(config["method"], config["method"])
  tuner = config["model"]["tuner"]
  return "RPN" if tuner == "rpn" else f"CLIP adapted by {tuner}, with RPN's head,"


def data_name(config: Mapping[str, Any]) -> str:
  """What the training set is called; one's own data by the name that they were prepared under."""
  d = config["data"]
  return d["variant"] if d["name"] in OWN_DATA else d["name"]


def read_scores(workdir: pathlib.Path, step: int) -> list[Row]:
  """Scores in the files of a workdir whose last checkpoint is that of a step, each once."""
  rows: list[Row] = []
  for name in SCORES:
    try:
      stored = json.loads((workdir / name).read_text(encoding="utf-8"))
      config = stored["config"]
      sets = stored.get("sets") or {scored_set(config, name): stored}
      for data_set, result in sets.items():
        if result["last"]["step"] != step:
          print(f"{workdir / name} has scores of step {result['last']['step']}, not {step}: the "
                "card leaves them out; --mode=eval makes those", flush=True)  # fmt: skip
          break
        protocol = protocol_text(config, data_set)
        for which in ("last", "best"):
          scores = result[which]
          cells(scores)  # an earlier version may not have them all
          rows.append(Row(data_set, which, scores["step"], protocol, scores))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
      continue
  return list({row[:4]: row for row in rows}.values())


def protocol_text(config: Mapping[str, Any], data_set: str) -> str:
  """How a set was scored, in words.

  Args:
    config: of the evaluation, as nested dictionaries.
    data_set: its name.
  """
  e, d = config["eval"], config["data"]
  parts = [f"protocol of {e['protocol']}"] if e.get("protocol") else []
  if e.get("sets") and data_set in e["sets"]:
    parts.append("every class prompted")
  else:
    parts.append(d["setting"].replace("_", "-"))
    if own := d.get("unseen"):
      parts.append(f"of its own split, with {', '.join(own)} unseen")
    if held_out := d.get("held_out"):
      parts.append(f"on the {held_out:.0%} of the training images that were held out")
      parts.append("of trained classes alone")
    elif d["setting"] == "zero_shot" and e.get("seen_penalty"):
      parts.append(f"scores of seen classes lowered by {e['seen_penalty']:g}")
  layout = e.get("layout", "windows")
  windows = f"windows of {e['crop']} every {e['stride']}" if layout == "windows" else layout
  parts += [f"short side {d['short_side']}", windows]
  if tuple(e.get("scales", (1.0,))) != (1.0,):
    parts.append("scales " + ", ".join(f"{scale:g}" for scale in e["scales"]))
  parts += ["flipped too"] * bool(e.get("flip"))
  if e.get("refine", "none") != "none":
    parts.append(e["refine"])
  if d.get("eval_images") and not d.get("held_out"):
    parts.append(f"first {d['eval_images']} images")
  return ", ".join(parts)


def _front_matter(
  title: str, clip: checkpoints.Checkpoint | None, rows: Sequence[Row], config: Mapping[str, Any]
) -> str:
  from huggingface_hub import EvalResult, ModelCardData

  measured = [
    EvalResult(
      task_type="image-segmentation", dataset_type=row.set, dataset_name=row.set,
      metric_type="mean_iou", metric_name=f"mIoU, last checkpoint; {row.protocol}",
      metric_value=round(100 * row.scores["miou_gt"], 2),
    )
    for row in rows
    if row.which == "last" and row.scores.get("miou_gt") is not None
  ]  # fmt: skip
  data = ModelCardData(
    license="other",
    license_name="stated-below",
    library_name="rpn_jax",
    pipeline_tag="image-segmentation",
    base_model=clip.repository if clip else None,
    tags=["semantic-segmentation", "open-vocabulary", "clip", "jax", "flax", config["method"]],
    model_name=title if measured else None,
    eval_results=measured or None,
  )
  return data.to_yaml()


def _use(content: Prompts, trained: Sequence[str], image: str) -> list[str]:
  words = [split_synonyms(name)[0] for name in [*trained, *content.names]]
  words = list(dict.fromkeys(words))[:WORDS]
  typed = shlex.quote(", ".join(words))
  return [
    "## Use",
    f'```python\nfrom rpn_jax import Segmenter\nmodel = Segmenter.load("{ADDRESS}")\n'
    f'model("{image}", {json.dumps(words, ensure_ascii=False)}).save("predictions")\n```',
    f"```sh\nrpn segment {image} {typed} --model={ADDRESS}\n```",
    "The words are free: any that CLIP knows, trained on or not. Both fetch this model and its "
    "CLIP once, and need no network afterwards.",
  ]


def _what(content: Prompts, predictor: Predictor, clip: checkpoints.Checkpoint | None) -> list[str]:
  c, d = content.config, content.config["data"]
  count = sum(x.size for x in jax.tree.leaves(content.prompts))
  if clip:
    source = f"[{clip.repository}]({clip.page}), fetched by that name"
  elif predictor.note:
    source = "which comes with rpn_jax"
  else:
    source = "which is not public: `--clip=FILE` names it"
  facts = [
    f"Network: {network_name(c).strip(',')} (`method={c['method']}`), {count:,} trained parameters "
    f"of step {content.step} of {c['steps']}.",
    f"Around CLIP `{c['clip']}`, {source}. It is not in here; its fingerprint must be "
    f"`{content.clip}`.",
    f"Trained on {data_name(c)}, {d['setting'].replace('_', '-')}: {d['batch_size']} images a "
    f"step, crops of {d['crop']} pixels, templates `{c['templates']}`.",
  ]
  return [
    "## What it is",
    "\n".join(f"- {fact}" for fact in facts),
    "Every setting of the run is in the header of `prompts.safetensors`, under `config`.",
  ]


def _classes(names: Sequence[str], trained: Sequence[str]) -> list[str]:
  unseen = [name for name in names if name not in trained]
  lines = [f"Trained on {len(trained)} classes: {_listed(trained)}."]
  if unseen:
    lines.append(f"In the data set, but not trained on ({len(unseen)}): {_listed(unseen)}.")
  return ["## Classes", *lines]


def _listed(names: Sequence[str]) -> str:
  return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", "; ".join(names))


def _scores(rows: Sequence[Row], step: int) -> list[str]:
  if not rows:
    return ["## Scores", f"None were stored for step {step}, which this is."]
  protocols = list(dict.fromkeys(row.protocol for row in rows))
  lines = [
    [row.set, row.which + ("\\*" if row.which == "best" else ""), str(row.step),
     f"({protocols.index(row.protocol) + 1})", *cells(row.scores)]
    for row in rows
  ]  # fmt: skip
  heads = ["set", "checkpoint", "step", "protocol", *COLUMNS]
  told = "\n".join(f"{i}. {protocol}" for i, protocol in enumerate(protocols, 1))
  best = "\\* chosen by its scores on the evaluation classes. "
  if any(row.which == "best" and row.step != step for row in rows):
    best += f"This model is the last checkpoint, of step {step}: compare that with others."
  else:
    best += "It is the same checkpoint as the last."
  kept, named = without_empty(lines, heads)
  return [
    "## Scores",
    "In %, and how each was scored:",
    told,
    table(kept, named, markdown=True),
    " ".join(columns_note(named).split()),
    best,
  ]


def _licenses(
  data_set: str, clip: checkpoints.Checkpoint | None, note: str, license: str
) -> list[str]:
  if clip:
    clip_terms = clip.license or "see its page"
  else:
    clip_terms = "MIT, as rpn_jax" if note else "ask whoever shares this"
  license = "of its owner" if license == "yours" else license
  return [
    "## Licenses",
    f"- Code, rpn_jax: MIT.\n- CLIP, which is not in here: {clip_terms}.\n"
    f"- Data, {data_set}: {license or 'no license is known to rpn_jax'}. The picture may show "
    "images of it; nothing else of it is in here.\n"
    "- These trained weights: whoever shares them states a license here and in the first lines of "
    "this file, in place of `other`. Until then none is granted.",
  ]
