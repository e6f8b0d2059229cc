"""What training, evaluation and prediction share: the model of a config, ready to run."""

import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rpn_jax import checkpoint, convert, optim
from rpn_jax.errors import InputError
from rpn_jax.logging import write_json
from rpn_jax.models.maskclip import MaskCLIP
from rpn_jax.models.rpn import RPN, RPNConfig
from rpn_jax.sliding import SlidingWindow
from rpn_jax.step import TrainState, init_prompts
from rpn_jax.text_cache import class_embeddings

ASSETS = pathlib.Path(__file__).parent / "assets"

# The metric that ranks checkpoints; without unseen classes the plain mean stands in.
RANKING = "hiou"


def find_weights(name: str) -> pathlib.Path:
  """A weights file: a path, or the name of one shipped with the package."""
  path = pathlib.Path(name)
  if not path.exists() and (ASSETS / name).exists():
    return ASSETS / name
  return path


class Experiment:
  """The frozen tower, the network around it and the files of one config in one workdir.

  Attributes:
    config: the locked config.
    workdir: of the run.
    clip_config: architecture of the tower.
    clip: its parameters, both branches and the logit scale.
    params: the vision branch, as the network's `params` collection.
    model: an RPN or a MaskCLIP.
  """

  def __init__(self, config, workdir):
    self.config = config
    self.workdir = pathlib.Path(workdir)
    self.clip_config, self.clip = convert.load(find_weights(config.clip))
    for field in ("data.crop", "eval.crop"):
      section, name = field.split(".")
      side = config[section][name]
      if side % self.clip_config.patch_size:
        raise InputError(
          f"config.{field}={side} must be a multiple of the patch size "
          f"{self.clip_config.patch_size} of {config.clip}"
        )
    self.params = jax.device_put({"visual": self.clip["visual"]})
    if config.method == "training_free":
      self.model = MaskCLIP(self.clip_config, jnp.dtype(config.dtype))
    else:
      fields = RPNConfig(**config.model)
      self.model = RPN(self.clip_config, fields, jnp.dtype(config.dtype), config.remat)
    self.identity = checkpoint.identity(config, convert.fingerprint(self.clip))
    # One jitted function for the life of the experiment: evaluations do not compile again.
    self.forward = jax.jit(lambda variables, text, image: self.model.apply(variables, image, text))

  @property
  def trainable(self) -> bool:
    return isinstance(self.model, RPN)

  def text(self, names: Sequence[str]):
    """Embeddings (C, E) of class names with the config's templates."""
    return class_embeddings(self.clip_config, self.clip, names, self.config.templates)

  def initial_prompts(self, text_CxE) -> dict:
    key = jax.random.key(self.config.seed)
    return init_prompts(self.model, self.params, text_CxE, key, self.config.data.crop)

  def optimizer(self, prompts):
    return optim.make_optimizer(self.config.optimizer, prompts)

  def initial_state(self, text_CxE) -> TrainState:
    prompts = self.initial_prompts(text_CxE)
    return TrainState(jnp.int32(0), prompts, self.optimizer(prompts).init(prompts))

  def checkpoints(self) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(self.workdir, self.identity, RANKING)

  def claim_workdir(self) -> None:
    """Writes `config.json`, or checks that the one there is of this run.

    Raises:
      InputError: the workdir belongs to another run.
    """
    path = self.workdir / "config.json"
    if path.exists():
      changed = checkpoint.differences(json.loads(path.read_text()), self.identity)
      if changed:
        raise checkpoint.other_run(self.workdir, changed)
      return
    self.workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, self.identity)

  def restored_prompts(self) -> tuple[int, dict]:
    """Step and prompts of the workdir's newest checkpoint (0 and {} for a training-free method)."""
    if not self.trainable:
      return 0, {}
    if not (self.workdir / "checkpoints").is_dir():
      raise InputError(f"no checkpoints in {self.workdir}: train first, with the same --workdir")
    checkpoints = self.checkpoints()
    step = checkpoints.latest_step()
    if step is None:
      raise InputError(f"no complete checkpoint in {self.workdir}/checkpoints: train first")
    checkpoints.meta(step)
    # No shape depends on the number of classes.
    like = jax.eval_shape(self.initial_prompts, jnp.zeros((1, self.clip_config.embed_dim)))
    prompts = checkpoints.restore_prompts(step, like)
    checkpoints.close()
    return step, prompts

  def segmenter(self, prompts: dict, text_CxE, penalized: Sequence[int] = ()) -> SlidingWindow:
    """Sliding-window inference with these prompts and classes."""
    c = self.config.eval
    variables = {"params": self.params, "prompts": prompts}
    return SlidingWindow(
      functools.partial(self.forward, variables, jnp.asarray(text_CxE)),
      len(text_CxE),
      crop=c.crop,
      stride=c.stride,
      window_batch=c.window_batch,
      penalty=c.seen_penalty,
      penalized=penalized,
      activation=jax.nn.sigmoid if self.trainable else (lambda cosine: cosine),
    )
