"""What training, evaluation and prediction share: the model of a config, ready to run."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_json
from rpn_jax.devices import data_mesh, put_batch
from rpn_jax.inference.sliding import SlidingWindow
from rpn_jax.models import NETWORKS, kernels, trained
from rpn_jax.text.embeddings import class_embeddings
from rpn_jax.text.templates import expand
from rpn_jax.training import optim
from rpn_jax.training.step import TrainState, init_prompts
from rpn_jax.weights import arrays, clip_file, prompts_file

# The best scores so far, for an evaluation of the run while it goes on or after it.
BEST = "best.json"

# Least values of numbers in a config; less would fail far from the field's name, or never end.
LEAST = {
  "steps": 1, "log_every": 1, "eval_every": 1, "save_every": 0, "max_skipped": 1,
  "optimizer.clip_norm": 0, "data.batch_size": 1, "data.crop": 1, "data.short_side": 1,
  "data.threads": 0, "data.workers": 0, "data.eval_images": 0, "eval.crop": 1, "eval.stride": 1,
  "eval.window_batch": 1,
}  # fmt: skip
MOST = 1 << 40


def check_numbers(config) -> None:
  """Raises an InputError for a number that no run can have."""
  for field, least in LEAST.items():
    section, _, name = field.rpartition(".")
    value = (config.get(section, {}) if section else config).get(name)
    if value is None:  # weights alone are used without a recipe of training
      continue
    if not least <= value <= MOST:  # also NaN
      raise InputError(f"config.{field} must be at least {least}, got {value}")


class Experiment:
  """The frozen tower, the network around it and the files of one config in one workdir.

  Attributes:
    config: the locked config.
    workdir: of the run.
    clip_config: architecture of the tower.
    clip: its parameters, both branches and the logit scale.
    params: the vision branch, as the network's `params` collection.
    model: an RPN or a DenseCLIP.
    fingerprint: of the weights.

  Args:
    config: see there.
    workdir: see there.
    weights: what `clip_file.load` gave for config.clip, if that is known already.
  """

  def __init__(self, config, workdir, weights: tuple | None = None):
    check_numbers(config)
    self.config = config
    self.workdir = pathlib.Path(workdir)
    self.clip_config, self.clip = weights or clip_file.load_clip(config.clip)
    for field in ("data.crop", "eval.crop"):
      section, name = field.split(".")
      side = config[section][name]
      if side % self.clip_config.patch_size:
        raise InputError(
          f"config.{field}={side} must be a multiple of the patch size "
          f"{self.clip_config.patch_size} of {config.clip}"
        )
    self.params = jax.device_put({"visual": self.clip["visual"]})
    network = NETWORKS[config.method]
    try:
      self.model = network.create(
        self.clip_config,
        config[network.section],
        loss=config.loss.name if "loss" in config else "sigmoid",
        dtype=jnp.dtype(config.dtype),
        remat=config.get("remat", "none"),
        kernels=kernels.for_platform(jax.local_devices()[0].platform),
      )
    except ValueError as error:
      raise InputError(f"config.{network.section}: {error}") from None
    self.fingerprint = arrays.fingerprint(self.clip)
    # One jitted function for the life of the experiment: evaluations do not compile again.
    self.forward = jax.jit(
      lambda model, variables, text, image: model.apply(variables, image, text), static_argnums=0
    )

  @functools.cached_property
  def identity(self) -> dict:
    """What a checkpoint has to have in common with this experiment."""
    from rpn_jax.training import identity

    return identity.identity(self.config, self.fingerprint)

  @property
  def trainable(self) -> bool:
    return self.model.trainable

  def text(self, names: Sequence[str]):
    """Embeddings (C, E) of class names with the config's templates, kept on disk."""
    c = self.config
    return class_embeddings(
      self.clip_config,
      self.clip,
      names,
      c.templates,
      synonyms=c.synonyms,
      fingerprint=self.fingerprint,
    )

  def initial_prompts(self, text_CxE) -> dict:
    key = jax.random.key(self.config.seed)
    return init_prompts(self.model, self.params, text_CxE, key, self.config.data.crop)

  def optimizer(self, prompts):
    return optim.make_optimizer(self.config.optimizer, prompts)

  def initial_state(self, text_CxE) -> TrainState:
    prompts = self.initial_prompts(text_CxE)
    return TrainState(jnp.int32(0), prompts, self.optimizer(prompts).init(prompts))

  def checkpoints(self, *, read_only: bool = False):
    """The `checkpoint.Checkpoints` of the workdir."""
    from rpn_jax.training import checkpoint

    return checkpoint.Checkpoints(self.workdir, self.identity, read_only=read_only)

  def claim_workdir(self) -> None:
    """Writes `config.json`, or checks that the one there is of this run.

    Raises:
      InputError: the workdir belongs to another run.
    """
    from rpn_jax.training import identity

    path = self.workdir / "config.json"
    if path.exists():
      try:
        stored = json.loads(path.read_text())
        config = ml_collections.ConfigDict(dict(stored["config"].items()))
        stored = identity.identity(config, stored["clip"])
      except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
          f"expected the settings of a run in {path}, got something else: delete that file if the "
          "workdir is of this run"
        ) from None
      identity.check_identity(self.workdir, stored, self.identity)
      return
    self.workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, {"clip": self.fingerprint, "config": self.config.to_dict()})

  def restored(self) -> dict[str, tuple[int, dict]]:
    """Step and prompts of the workdir's newest checkpoint, "last", and of the "best" one.

    There is no "best" where it is the newest, nor in a file of prompts. A training-free method
    has step 0 and no prompts.
    """
    if not self.trainable:
      return {"last": (0, {})}
    # No shape depends on the number of classes.
    like = jax.eval_shape(self.initial_prompts, jnp.zeros((1, self.clip_config.embed_dim)))
    if path := self.config.get("prompts"):
      content = prompts_file.load(path)
      prompts_file.check(content, path, self.config.to_dict(), self.identity["clip"], like)
      return {"last": (content.step, content.prompts)}
    if not (self.workdir / "checkpoints").is_dir():
      raise InputError(f"no checkpoints in {self.workdir}: train first, with the same --workdir")
    with contextlib.closing(self.checkpoints(read_only=True)) as checkpoints:
      return checkpoints.read(like, self._best_step())

  def _best_step(self) -> int | None:
    """Of the best evaluation that training has written down."""
    try:
      return json.loads((self.workdir / BEST).read_text())["best"]["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
      return None

  def restored_prompts(self) -> tuple[int, dict]:
    """Step and prompts of the workdir's newest checkpoint (0 and {} for a training-free method)."""
    return self.restored()["last"]

  def evaluator(self, prompts: dict, data) -> SlidingWindow:
    """Inference with the class names of `data`, as everything that is scored is made.

    Where config.synonyms is "max", every synonym competes by itself. The scores of
    `data.penalized` are lowered, except by a training-free method, to which no class is seen.
    """
    rows, class_of_row = expand(data.names, range(len(data.names)), self.config.synonyms)
    penalized = set(data.penalized) if self.trainable else set()
    return self.segmenter(
      prompts,
      self.text(rows),
      [row for row, name in enumerate(class_of_row) if name in penalized],
      class_of_row,
    )

  def segmenter(
    self,
    prompts: dict,
    text_CxE,
    penalized: Sequence[int] = (),
    class_of_row: Sequence[int] | None = None,
  ) -> SlidingWindow:
    """Sliding-window inference with these prompts and classes, on all local devices."""
    c = self.config.eval
    mesh = data_mesh()
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # Tuners that can be are merged into the tower for everything but training.
    model, params, prompts = self.model.merged(**trained.join(self.params, prompts))
    variables = {"params": params, "prompts": prompts}
    variables, text = jax.device_put((variables, jnp.asarray(text_CxE)), whole)

    def logits(windows):
      # Merged on one device: that takes a small part of the network's time.
      return jax.device_put(
        self.forward(model, variables, text, put_batch(windows, mesh)), mesh.devices[0]
      )

    return SlidingWindow(
      logits,
      len(text_CxE),
      crop=c.crop,
      stride=c.stride,
      window_batch=-(-c.window_batch // mesh.size) * mesh.size,
      penalty=c.seen_penalty,
      penalized=penalized,
      activation=model.scores,
      scales=c.scales,
      flip=c.flip,
      class_of_row=class_of_row,
    )
