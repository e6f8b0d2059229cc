"""AdamW with learning-rate groups and the schedule of the official code."""

import re
from collections.abc import Callable, Sequence

import flax
import jax
import jax.numpy as jnp
import ml_collections
import optax


def poly_schedule(
  base: float, steps: int, *, power: float, minimum: float, warmup_steps: int, warmup_ratio: float
) -> Callable:
  """Learning rate at step t: polynomial decay to `minimum`, times a linear warm-up.

  (base - min)(1 - t/T)^power + min, multiplied during warm-up by
  1 - (1 - t/warmup_steps)(1 - warmup_ratio), as in mmcv's poly policy.
  """

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    t = jnp.asarray(step, jnp.float32)
    rate = (base - minimum) * jnp.maximum(1 - t / steps, 0.0) ** power + minimum
    # u + r(1 - u) is accurate in float32 for small r, where 1 - (1 - u)(1 - r) cancels.
    done = t / max(warmup_steps, 1)
    return jnp.where(t < warmup_steps, rate * (done + warmup_ratio * (1 - done)), rate)

  return schedule


def assign_groups(tree: dict, rules: Sequence[tuple[str, str, float]]) -> dict:
  """The optimizer group of every leaf, as a tree of the same structure.

  Args:
    tree: nested dict of parameters.
    rules: (group, regular expression, rate factor); the expression must match the whole
      '/'-joined path of a parameter.

  Raises:
    ValueError: a parameter that does not match exactly one rule.
  """
  flat = flax.traverse_util.flatten_dict(tree, sep="/")
  groups = {}
  for path in flat:
    hits = [name for name, pattern, _ in rules if re.fullmatch(pattern, path)]
    if len(hits) != 1:
      raise ValueError(f"parameter {path!r} must match one optimizer group, it matches {hits}")
    groups[path] = hits[0]
  return flax.traverse_util.unflatten_dict(groups, sep="/")


def schedules(config: ml_collections.ConfigDict) -> dict[str, Callable]:
  """Group name -> learning rate by step.

  Args:
    config: has base_lr, min_lr, power, warmup_steps, warmup_ratio, steps, groups.
  """
  return {
    name: poly_schedule(
      config.base_lr * factor,
      config.steps,
      power=config.power,
      minimum=config.min_lr,
      warmup_steps=config.warmup_steps,
      warmup_ratio=config.warmup_ratio,
    )
    for name, _, factor in config.groups
  }


def make_optimizer(
  config: ml_collections.ConfigDict, prompts: dict
) -> optax.GradientTransformation:
  """AdamW over the groups of `config.groups`.

  Args:
    config: as for `schedules`, and weight_decay and clip_norm, the largest global norm of the
      gradients; 0 does not clip.
    prompts: the trained parameters, or their shapes.
  """
  transforms = {
    name: optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=config.weight_decay)
    for name, schedule in schedules(config).items()
  }
  optimizer = optax.multi_transform(transforms, assign_groups(prompts, config.groups))
  if config.clip_norm:
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
  return optimizer
