"""Runs the training step in the given modes and writes what it did; see test_sharding.py."""

import functools
import json
import pathlib
import re
import sys
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))

from rpn_jax import config
from rpn_jax.config import RPNConfig
from rpn_jax.devices import data_mesh
from rpn_jax.models.clip import CLIPConfig, VisionTransformer
from rpn_jax.models.prompts import count
from rpn_jax.models.rpn import RPN
from rpn_jax.models.trained import init_prompts
from rpn_jax.models.training_free import DenseCLIP
from rpn_jax.training import annotation_free, losses, optim, sharding
from rpn_jax.training.side_by_side import SideBySide, states_of
from rpn_jax.training.step import TrainState, train_step

TINY = CLIPConfig(
  embed_dim=16, image_size=32, patch_size=8, vision_width=16, vision_layers=2, vision_heads=2
)
BATCH, CLASSES, STEPS = 8, 5, 3
TAUGHT = "taught_"
SCLIP = {"method": "sclip", "denoise": 0.0, "key_smoothing": False}


def batches():
  """Images whose numbers of masks differ: the last two have none at all."""
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    label = np.repeat(np.repeat(rng.integers(0, CLASSES, (BATCH, 4, 4)), 8, 1), 8, 2)
    label[1], label[2, :16], label[6:] = 3, 255, 255
    yield {
      "image": rng.normal(size=(BATCH, 32, 32, 3)).astype(np.float32),
      "label": label.astype(np.int32),
    }


def main(out: pathlib.Path, cases: list[str]) -> None:
  """Cases are modes with a number of devices, such as "pmap_2".

  In those that begin with TAUGHT, such as "taught_pmap_2", the labels are those of an
  annotation-free run: of the teacher in the first two steps, then of the network.
  """
  model = RPN(TINY, RPNConfig(tuner="rpn+vpt", deep_tokens=3, m2oe_experts=2, m2oe_top_k=1))
  init = jax.jit(VisionTransformer(TINY).init)
  params = {"visual": init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]}
  text = jax.random.normal(jax.random.key(1), (CLASSES, TINY.embed_dim))
  text = np.asarray(text / jnp.linalg.norm(text, axis=-1, keepdims=True))
  prompts = jax.device_get(init_prompts(model, params, text, jax.random.key(2), 32))
  settings = config.Optimizer(steps=100, warmup_steps=0, base_lr=2e-5)
  labelers = {"": None}
  if any(case.startswith(TAUGHT) for case in cases):
    labelers[TAUGHT] = annotation_free.Labeler(
      DenseCLIP.create(TINY, SCLIP), text, model, refresh=2
    )

  def setup(labeler):
    """The state before training, and what is fixed."""
    optimizer = optim.make_optimizer(settings, prompts)
    optimizer = annotation_free.with_snapshots(optimizer, labeler.refresh if labeler else 0)
    start = jax.device_get(TrainState(jnp.int32(0), prompts, optimizer.init(prompts)))
    static = {"model": model, "loss_fn": losses.sigmoid_loss, "labeler": labeler}
    return start, {"optimizer": optimizer, **static}

  facts, arrays = {"prompts": count(prompts), "tower": count(params)}, {}

  def record(name, states, metrics):
    facts[name] = {k: [float(m[k]) for m in metrics] for k in ("loss", "grad_norm")}
    for path, value in flax.traverse_util.flatten_dict(states.prompts, sep="/").items():
      arrays[f"{name}|{path}"] = np.asarray(value)

  for prefix, labeler in labelers.items():
    start, static = setup(labeler)
    step = jax.jit(functools.partial(train_step, **static))
    for name, key in (("plain", 3), ("other_key", 4)):
      state, metrics = start, []
      for batch in batches():
        state, values = step(state, params, text, batch, jax.random.key(key))
        metrics.append(values)
      record(prefix + name, state, metrics)

  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
  )
  for case in cases:
    mode, _, number = case.removeprefix(TAUGHT).rpartition("_")
    used = int(number)
    start, static = setup(labelers[TAUGHT if case.startswith(TAUGHT) else ""])
    mesh = data_mesh(jax.devices()[:used])
    maker = sharding.MODES["pmap" if mode == "pmap" else "shard_map"]
    run = maker(mesh, start, shard_state=mode == "sharded", **static)
    state = run.place_state(start)
    fixed = run.place_constant((params, text, jax.random.key(3)))
    metrics, compilations = [], []
    for batch in batches():
      arguments = (*fixed[:2], run.place_batch(batch), fixed[2])
      if mode != "pmap" and used == 8:
        size = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        facts["sharded_bytes" if mode == "sharded" else "replicated_bytes"] = size
      if case == "shard_map_8" and not metrics:
        program = run.step.lower(state, *arguments).compile().as_text()
        found = re.findall(r"= (.*) (all-reduce|all-gather|all-to-all|reduce-scatter|"
                           r"collective-permute)(?:-start)?\(", program)  # fmt: skip
        facts["collectives"] = [(kind, elements(shape)) for shape, kind in found]
      compiled.clear()
      state, values = run.step(state, *arguments)
      compilations.append(len(compiled))
      metrics.append(run.fetch_metrics(values))
    facts.setdefault("compiled_later", []).append(sum(compilations[1:]))
    before = run.fetch_state(state)
    record(case, before, metrics)
    # A NaN that only one device sees, twice, and then a step that is good again.
    poisoned = [next(batches()), next(batches())]
    poisoned[0]["image"][5] = np.nan
    told = []
    for batch in (poisoned[0], poisoned[0], poisoned[1]):
      state, values = run.step(state, *fixed[:2], run.place_batch(batch), fixed[2])
      values = run.fetch_metrics(values)
      after = run.fetch_state(state)
      leaves = list(zip(*map(jax.tree.leaves, [(s.prompts, s.opt_state) for s in (before, after)])))
      told.append({
        "unchanged": all(np.array_equal(a, b) for a, b in leaves),
        "finite": all(
          np.isfinite(shard.data).all()
          for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards
        ),
        "skipped": [values["skipped"], values["consecutive_skips"]],
        "step": int(after.step),
      })  # fmt: skip
    facts.setdefault("poisoned", {})[case] = told
  facts["side_by_side"] = side_by_side(model, settings, prompts, (params, text), record)
  (out / "facts.json").write_text(json.dumps(facts))
  np.savez(out / "prompts.npz", **arrays)


def side_by_side(model, settings, prompts, constants, record) -> list[str]:
  """Trains four runs at once on four of the devices: "side_0" and "side_2" as "plain", "side_1"
  with another key, "side_3" at a tenth of the rate. Returns the collectives of the program."""
  optimizer = optim.make_optimizer(settings, prompts)
  start = jax.device_get(TrainState(jnp.int32(0), prompts, optimizer.init(prompts)))
  peaks = optim.peak_rates(settings)
  lower = {name: peak / 10 for name, peak in peaks.items()}
  shared = ConfigDict({"loss": config.defaults().loss, "data": {"setting": ""}})
  shared.optimizer = settings
  record("initial", start, [])
  step = SideBySide(
    shared, model, types.SimpleNamespace(ignore=255), [peaks, peaks, peaks, lower], [0, 0, 1, 1]
  )
  state = step.place_states([start] * 4)
  keys = step.place_keys([jax.random.key(key) for key in (3, 4, 3, 3)])
  fixed, metrics = step.place_constant(constants), []
  for batch in batches():
    arguments = (*fixed, step.place_batches([batch, batch]), keys)
    if not metrics:
      program = step.lower(state, *arguments).compile().as_text()
    state, values = step.step(state, *arguments)
    metrics.append(jax.device_get(values))
  for i, of_run in enumerate(states_of(state, 4)):
    record(f"side_{i}", of_run, [{k: v[i] for k, v in values.items()} for values in metrics])
  assert len(jax.tree.leaves(state)[0].sharding.device_set) == 4
  return re.findall(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute", program)


def elements(shape: str) -> int:
  """Numbers in an HLO shape, tuples summed: `(f32[2,3]{1,0}, f32[])` has 7."""
  sizes = re.findall(r"[a-z0-9]+\[([\d,]*)\]", shape)
  return sum(int(np.prod([int(n) for n in size.split(",") if n])) for size in sizes)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), sys.argv[2:])
