"""What a run would take on TPUs, by their own compiler and without one.

    python -m rpn_jax compile --config=configs/voc.py --topology=v5e:16x16
    python main.py --mode=compile --config=configs/voc.py --topology=v5e:16x16

Compiles what a run would run: its train step, a call of the network on evaluation's windows, the
merging of one tile of a result, the text tower. For each: memory, operations, bytes and what is
sent between chips, and the time that the chip's published limits allow at best. With --find-batch
also the largest batch. No weights and no data are read. With `rpn compile` the classes are counted
by --classes; main.py takes those of the data set.
"""

import argparse
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax import chips
from rpn_jax.analysis import costs, largest_batch
from rpn_jax.analysis.arguments import parse
from rpn_jax.analysis.collectives import collectives
from rpn_jax.analysis.costs import BACKBONES, RandomEncoder, init_towers
from rpn_jax.base.console import table
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_json
from rpn_jax.config import check_whole_patches
from rpn_jax.inference import predictor, views
from rpn_jax.models import kernels
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.remat import REMAT_POLICIES
from rpn_jax.models.trained import in_compute_type, init_prompts, join, split
from rpn_jax.text import embeddings
from rpn_jax.training import annotation_free, optim, sharding
from rpn_jax.training.step import TrainState
from rpn_jax.weights import checkpoints, clip_file

TITLES = {
  "train": "train step",
  "windows": "windows",
  "tile": "merging a tile",
  "text": "text tower",
}
# A program whose loops do more than this share of its operations is one with loops.
LOOPS = 0.01


@dataclasses.dataclass(frozen=True)
class Classes:
  """The part of a data set that a program's shapes depend on; as in `SegmentationData`."""

  names: Sequence[str]
  trained: Sequence[int]
  unseen: Sequence[int] = ()
  unlabelled: int | None = None
  ignore: int = 255


@dataclasses.dataclass(frozen=True)
class Program:
  """A program before it is compiled.

  Attributes:
    function: jitted, or by `pmap`.
    arguments: of it, or their shapes.
    count: how many `unit`s one chip computes in a call.
    unit: what they are.
    chips: how many compute it together.
  """

  function: Any
  arguments: tuple
  count: int
  unit: str
  chips: int = 1

  def lower(self) -> jax.stages.Lowered:
    return self.function.lower(*self.arguments)

  def operations(self) -> tuple[float, float]:
    """Those of `costs.operations` that one chip does in a call, and without turns of loops."""
    if hasattr(self.function, "trace"):
      jaxpr = self.function.trace(*self.arguments).jaxpr.jaxpr
    else:  # of `pmap`
      jaxpr = jax.make_jaxpr(self.function)(*self.arguments).jaxpr
    return costs.operations(jaxpr), costs.operations(jaxpr, in_loops=False)


def programs(config: Any, clip: CLIPConfig, data: Any, pod: chips.Pod) -> dict[str, Program]:
  """What a run of a config compiles, by its key in TITLES.

  Args:
    config: of a segmentation run.
    clip: architecture of its weights.
    data: `Classes`, or a data set.
    pod: the chips.

  Raises:
    InputError: a crop that is no multiple of the patch size, a batch that the chips cannot share.
  """
  network = predictor.make_network(config, clip, "tpu")
  side = config.data.crop
  check_whole_patches("config.data.crop", side, config.clip, network.input_multiple)
  # Text costs the same whatever it says, but sentences of the real names have their lengths.
  encoder = RandomEncoder(clip, {}, config.templates, config.synonyms)
  names = [data.names[i] for i in data.trained]
  text = shapes(np.asarray(network.text_input(encoder, names)))
  towers = jax.eval_shape(lambda: init_towers(clip, jax.random.key(0), network.towers))
  prompts, frozen = jax.eval_shape(
    lambda towers, text: (
      init_prompts(network, towers, text, jax.random.key(0), side),
      in_compute_type(split(towers, network.trained)[1], config.dtype),
    ),
    towers,
    text,
  )
  result = {}
  if network.trainable:
    sharding.check_batch_size(config.data.batch_size, pod.mesh)
    labeler = None
    if config.data.setting == "annotation_free":
      teacher = annotation_free.make_teacher(config, network)
      labeler = annotation_free.make_labeler(teacher, config, network, encoder, data)
    optimizer = optim.make_optimizer(config.optimizer, prompts)
    if labeler:
      optimizer = annotation_free.with_snapshots(optimizer, labeler.refresh)
    zero: Any = jax.ShapeDtypeStruct((), jnp.int32)
    moments = jax.eval_shape(optimizer.init, prompts)
    state = TrainState(zero, prompts, moments, zero, zero)
    batch = config.data.batch_size
    image = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    label = jax.ShapeDtypeStruct((batch, side, side), jnp.int32)

    stepper = sharding.make_stepper(config, pod.mesh, state, optimizer, network, data, labeler)
    arguments = stepper.shapes(
      state,
      towers if labeler else frozen,
      text,
      batch={"image": image, "label": label},
      key=jax.eval_shape(jax.random.key, 0),
    )
    result["train"] = Program(
      stepper.step, arguments, batch // pod.mesh.size, "image", pod.mesh.size
    )
  return result | _inference(config, network, encoder, data.names, towers, prompts, pod)


def _inference(
  config: Any, network: Any, encoder: Any, names: Sequence[str], towers: Any, prompts: Any,
  pod: chips.Pod,
) -> dict[str, Program]:  # fmt: skip
  """The programs of evaluation, which every host computes on its own chips."""
  one = jax.sharding.SingleDeviceSharding(pod.mesh.devices.flat[0])
  on_one = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=one), tree
  )
  # Tuners are merged in NumPy, which takes arrays.
  zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
  model, *merged = network.merged(zeros(towers), zeros(prompts))
  joined = join(*merged)
  variables = shapes({**joined, "params": in_compute_type(joined["params"], network.dtype)})
  host, result = pod.host, {}
  text = shapes(np.asarray(network.text_input(encoder, names)))
  if "text" in network.towers:
    encode = predictor.encode_text(model, host, text.shape)
    result["text"] = Program(encode, (variables, text), len(names), "class")
  else:
    rows, length = embeddings.BATCH_SENTENCES[-1], encoder.config.context_length
    tower = embeddings.TextTransformer(encoder.config, kernels=kernels.for_platform("tpu"))
    params = on_one(
      jax.eval_shape(lambda: init_towers(encoder.config, jax.random.key(0), ("text",)))["text"]
    )
    tokens = on_one(jax.ShapeDtypeStruct((rows, length), jnp.int32))
    arguments = (tower, params, tokens)
    result["text"] = Program(embeddings._encode, arguments, rows, "sentence")
  encoded = jax.eval_shape(lambda v, t: model.apply(v, t, method="encode_text"), variables, text)
  if config.eval.layout == "image":
    return result  # images of their own shapes, which the data tells
  side = config.eval.crop
  count = -(-config.eval.window_batch // host.size)
  windows = jax.ShapeDtypeStruct((count * host.size, side, side, 3), jnp.float32)
  forward = predictor.forward(model, host, encoded.shape, windows.shape)
  result["windows"] = Program(forward, (variables, encoded, windows), count, "window", host.size)
  logits = jax.eval_shape(lambda v, i, t: model.apply(v, i, t), variables, windows, encoded)
  size = (side, side)
  view = views.View(*size, corners=((0, 0),), window=size)
  tile, sides = views.tile_sides(size, [view], len(names))
  part = view.tile(logits, (0, 0), tile, size, sides[0])
  merge_tile = views.tile_program(
    (tile, sides, len(names)), (sides[0][0],), (size,), model.scores, views.class_ids
  )
  penalty = np.zeros(len(names), np.float32)
  result["tile"] = Program(merge_tile, (on_one((part,)), on_one(penalty)), 1, "tile")
  return result


def shapes(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def measure(program: Program, chip: chips.Chip, what: str) -> dict[str, Any]:
  """What the compiler tells of a program, per chip and call; bytes, seconds, operations.

  `loops`: it has some, and `bytes` and `memory_seconds` count one turn of each.

  Raises:
    InputError: it does not fit into the chip's memory.
  """
  began = time.perf_counter()
  kept = jax.config.values["jax_enable_compilation_cache"]
  try:
    # A program for chips that are not there can be kept, and not be read again.
    jax.config.update("jax_enable_compilation_cache", False)
    compiled = program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise _too_large(str(error), what) from None
  finally:
    jax.config.update("jax_enable_compilation_cache", kept)
  seconds = time.perf_counter() - began
  memory: Any = compiled.memory_analysis()
  cost: Any = compiled.cost_analysis()
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  taken = arguments + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes
  # XLA knows what it computes twice, and not how often a loop turns; what was traced knows that.
  traced, once = program.operations()
  flops = max(cost["flops"], traced)
  arithmetic, traffic = flops / chip.flops, cost["bytes accessed"] / chip.bandwidth
  return {
    "seconds_to_compile": seconds,
    "argument_bytes": arguments,
    "temporary_bytes": temporary,
    "share_of_memory": taken / chip.memory,
    "flops": flops,
    "bytes": cost["bytes accessed"],
    "loops": traced - once > LOOPS * traced,
    "arithmetic_seconds": arithmetic,
    "memory_seconds": traffic,
    "count": program.count,
    "unit": program.unit,
    "per_second_per_chip": program.count / max(arithmetic, traffic),
    "per_second": program.chips * program.count / max(arithmetic, traffic),
    "collectives": collectives(compiled.as_text() or ""),
  }


class TooLarge(InputError):
  """A program that does not fit into a chip's memory.

  Attributes:
    share: of the memory, above 1, or None where the compiler does not tell it.
  """

  share: float | None = None


# How the compiler says what a program needs and what there is, when all that it would hold is too
# much, and when its temporaries alone are.
_NEEDS = (
  r"Used (?P<used>[\d.]+[KMG]) of (?P<limit>[\d.]+[KMG])",
  r"temporaries \((?P<used>[\d.]+[KMG])\) exceeds available HBM \((?P<limit>[\d.]+[KMG])\)",
)


def _too_large(error: str, what: str) -> TooLarge:
  told = next(filter(None, (re.search(pattern, error) for pattern in _NEEDS)), None)
  needs = (
    f"needs {told['used']} of {told['limit']}" if told else "does not fit into the chip's memory"
  )
  found = TooLarge(
    f"the {what} {needs}: lower config.data.batch_size or config.eval.window_batch, set "
    'config.remat="full", or let --find-batch look'
  )
  if told:
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    used, limit = (float(told[key][:-1]) * unit[told[key][-1]] for key in ("used", "limit"))
    found.share = max(used / limit, math.nextafter(1, 2))  # both are rounded
  return found


def find_batches(config: Any, clip: CLIPConfig, data: Any, pod: chips.Pod) -> Iterator[tuple]:
  """(remat, what `measure` tells of the largest batch, or None) for each of REMAT_POLICIES."""
  start = max(1, config.data.batch_size // pod.mesh.size)
  for remat in REMAT_POLICIES:
    measured: dict[int, dict] = {}

    def share(batch: int, remat: str = remat, measured: dict = measured) -> float:
      changed = config.copy_and_resolve_references()
      with changed.unlocked():
        changed.remat, changed.data.batch_size = remat, batch * pod.mesh.size
      program = programs(changed, clip, data, pod)["train"]
      try:
        measured[batch] = measure(program, pod.chip, TITLES["train"])
        found = measured[batch]["share_of_memory"]
      except TooLarge as error:
        found = error.share or math.inf
      said = f"{100 * found:.0f} % of the memory" if math.isfinite(found) else "too large"
      print(f"remat={remat}, {batch} a chip: {said}", flush=True)
      return found

    yield remat, measured.get(largest_batch.search(share, start))


def report(
  config: Any, topology: str, data: Any, *, find_batch: bool = False, json: str | None = None
) -> dict:
  """Compiles, prints and returns everything.

  Args:
    config: of a segmentation run.
    topology: see `chips.pod`.
    data: `Classes`, or a data set.
    find_batch: look for the largest batch, too.
    json: file that gets the numbers.

  Raises:
    InputError: see `chips.pod`, `programs` and `measure`.
  """
  pod = chips.pod(topology)
  clip = checkpoints.unfetched(config.clip) or clip_file.load_clip(config.clip)[0]
  result: dict[str, Any] = {"topology": topology, "chips": pod.mesh.size, "programs": {}}
  for name, program in programs(config, clip, data, pod).items():
    print(f"compiling for {topology}: {TITLES[name]} ...", flush=True)
    result["programs"][name] = measure(program, pod.chip, TITLES[name])
  if find_batch:
    result["largest_batch"] = dict(find_batches(config, clip, data, pod))
  result["versions"] = {"jax": jax.__version__}
  print(text_of(result))
  if json:
    write_json(expand(json), result)
  return result


def compile_run(
  config: Any, load: Callable, topology: str | None, find_batch: bool, json: str | None
) -> None:
  """`report` for the classes of a config's data set; `load` opens one, see `datasets.load`.

  Raises:
    InputError: no topology, not the config of a segmentation run, or as `report`.
  """
  if not topology or config.get("task") == "pretrain":
    raise InputError(
      "--mode=compile takes the config of a segmentation run and --topology, such as v5e:2x4"
    )
  jax.config.update("jax_platforms", "cpu")  # nothing is run, and chips that are there stay free
  given = config.copy_and_resolve_references()
  with given.unlocked():  # no number of the normalization changes a program
    given.data.mean = given.data.mean or (0.0, 0.0, 0.0)
    given.data.std = given.data.std or (1.0, 1.0, 1.0)
  report(config, topology, load(given, names_only=True), find_batch=find_batch, json=json)


def text_of(result: dict) -> str:
  """The numbers as a table, a column for each program."""
  parts = result["programs"]

  def row(title: str, cell: Callable[[dict], str]) -> list[str]:
    return [title, *map(cell, parts.values())]

  each = lambda p, key: p[key] / p["count"]
  more = lambda p: "> " if p["loops"] else ""
  number = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
  sent = lambda p: ", ".join(
    f"{c['count']} {kind}, {number(c['bytes'] / 1e6)} MB" for kind, c in p["collectives"].items()
  )
  rows = [
    row("a chip computes", lambda p: f"{p['count']} {p['unit']}{'s' * (p['count'] > 1)}"),
    row("arguments, GB", lambda p: number(p["argument_bytes"] / 1e9)),
    row("temporaries, GB", lambda p: number(p["temporary_bytes"] / 1e9)),
    row("of the chip's memory", lambda p: f"{100 * p['share_of_memory']:.0f} %"),
    row("GFLOP each", lambda p: number(each(p, "flops") / 1e9)),
    row("GB read and written each", lambda p: more(p) + number(each(p, "bytes") / 1e9)),
    row("arithmetic, ms each", lambda p: number(1e3 * each(p, "arithmetic_seconds"))),
    row("memory, ms each", lambda p: more(p) + number(1e3 * each(p, "memory_seconds"))),
    row("at most, chip and second", lambda p: number(p["per_second_per_chip"])),
    row("at most, all that share it", lambda p: number(p["per_second"])),
    row("between chips, a call", lambda p: sent(p) or "nothing"),
    row("compiled in, s", lambda p: f"{p['seconds_to_compile']:.0f}"),
  ]
  lines = [table(rows, [result["topology"], *(TITLES[name] for name in parts)])]
  if found := result.get("largest_batch"):
    cells = lambda p: [
      str(p["count"]),
      number(each(p, "flops") / 1e9),
      more(p) + number(each(p, "bytes") / 1e9),
      number(p["per_second_per_chip"]),
    ]
    rows = [[remat, *(cells(p) if p else ["none", "", "", ""])] for remat, p in found.items()]
    titles = ["largest batch a chip", "GFLOP each", "GB each", "at most, chip and second"]
    lines.append(table(rows, ["remat", *titles]))
  lines.append(
    f"{result['chips']} chips, JAX {result['versions']['jax']}: compiled, not run. Arithmetic and "
    "memory are operations and bytes, by XLA's count, over the published limits of the chip in "
    "bfloat16; a run takes at least the longer time. XLA does not know what a program really "
    "takes, and of the attention kernel only what that says of itself."
  )
  if any(p and p["loops"] for p in (*parts.values(), *result.get("largest_batch", {}).values())):
    lines.append(">: more than that, since of a loop XLA counts what one turn reads and writes")
  return "\n\n".join(lines)


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="rpn compile", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  add = parser.add_argument
  add("--topology", required=True, help=f"chips, such as {chips.EXAMPLES}")
  add("--classes", type=int, default=20, help="how many are trained and evaluated (%(default)s)")
  add("--backbone", choices=tuple(BACKBONES), help="architecture instead of that of config.clip")
  add("--find-batch", action="store_true", help="look for the largest batch a chip, per remat")
  add("--json", help="also write the numbers to this file")
  args, config = parse(parser, arguments)
  if args.classes < 1:
    raise InputError(f"--classes: expected at least 1, got {args.classes}")
  jax.config.update("jax_platforms", "cpu")  # nothing is run, and chips that are there stay free
  if args.backbone:
    with config.unlocked():
      config.clip = {"b16": "ViT-B/16", "l14": "ViT-L/14"}.get(args.backbone, config.clip)
  count = range(args.classes)
  data = Classes([f"class {i}" for i in count], count, count[-1:], 254)
  report(config, args.topology, data, find_batch=args.find_batch, json=args.json)
  return 0
