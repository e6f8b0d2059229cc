"""AdamW with learning-rate groups and the schedules of the official codes."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import optax

from rpn_jax.base.errors import InputError

# Share of the rate that is left when a share of the steps is.
DECAYS = {
  "poly": lambda left, power: left**power,
  "cosine": lambda left, power: jnp.sin(jnp.pi * left / 2) ** 2,  # (1 - cos(pi left)) / 2
}


def make_schedule(
  base: jax.typing.ArrayLike,
  steps: int,
  *,
  decay: str = "poly",
  power: float = 1.0,
  minimum: float = 0.0,
  warmup_steps: int = 0,
  warmup_ratio: float = 0.0,
) -> Callable:
  """Learning rate at step t: decay to `minimum`, times a linear warm-up.

  With "poly", (base - min)(1 - t/T)^power + min, multiplied during warm-up by
  1 - (1 - t/warmup_steps)(1 - warmup_ratio), as in mmcv's poly policy; with "cosine",
  (1 + cos(pi t/T)) / 2 in place of the power.
  """

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    t = jnp.asarray(step, jnp.float32)
    # Not 1 - t / T, of which rounding leaves three digits in the last steps.
    left = jnp.maximum(steps - t, 0.0) / steps
    rate = (base - minimum) * DECAYS[decay](left, power) + minimum
    # u + r(1 - u) is accurate in float32 for small r, where 1 - (1 - u)(1 - r) cancels.
    done = t / max(warmup_steps, 1)
    return jnp.where(t < warmup_steps, rate * (done + warmup_ratio * (1 - done)), rate)

  return schedule


def _matches(field: str, pattern: str, path: str) -> bool:
  try:
    return bool(re.fullmatch(pattern, path))
  except re.error as error:
    raise InputError(
      f"config.optimizer.{field}: expected a regular expression, got {pattern!r} ({error})"
    ) from None


def assign_groups(tree: dict, rules: Sequence[tuple[str, str, float]]) -> dict:
  """The optimizer group of every leaf, as a tree of the same structure.

  Args:
    tree: nested dict of parameters.
    rules: (group, regular expression, rate factor); the expression must match the whole
      '/'-joined path of a parameter.

  Raises:
    InputError: a parameter that does not match exactly one rule, or no regular expression.
  """
  flat = flax.traverse_util.flatten_dict(tree, sep="/")
  groups = {}
  for path in flat:
    hits = [name for name, pattern, _ in rules if _matches("groups", pattern, path)]
    if len(hits) != 1:
      raise InputError(
        f"config.optimizer.groups: expected one group for parameter {path!r}, "
        f"{' and '.join(hits) or 'none'} of {', '.join(name for name, *_ in rules)} matches its "
        "whole path: change their regular expressions"
      )
    groups[path] = hits[0]
  return flax.traverse_util.unflatten_dict(groups, sep="/")


def peak_rates(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Group name -> the rate that its schedule starts from."""
  return {name: config.base_lr * factor for name, _, factor in config.groups}


def schedules(
  config: ml_collections.ConfigDict, peaks: Mapping[str, Any] | None = None
) -> dict[str, Callable]:
  """Group name -> learning rate by step.

  Args:
    config: has schedule, base_lr, min_lr, power, warmup_steps, warmup_ratio, steps, groups.
    peaks: in place of `peak_rates(config)`; they may be traced.
  """
  return {
    name: make_schedule(
      peak,
      config.steps,
      decay=config.schedule,
      power=config.power,
      minimum=config.min_lr,
      warmup_steps=config.warmup_steps,
      warmup_ratio=config.warmup_ratio,
    )
    for name, peak in (peak_rates(config) if peaks is None else peaks).items()
  }


def make_optimizer(
  config: ml_collections.ConfigDict, prompts: dict, peaks: Mapping[str, Any] | None = None
) -> optax.GradientTransformation:
  """AdamW over the groups of `config.groups`.

  Args:
    config: as for `schedules`, and weight_decay, no_decay, a regular expression of whole paths
      that it leaves out, and clip_norm, the largest global norm of the gradients; 0 does not clip.
    prompts: the trained parameters, or their shapes.
    peaks: as for `schedules`.
  """
  groups = flax.traverse_util.flatten_dict(assign_groups(prompts, config.groups), sep="/")
  # Groups keep their names where everything decays: states of earlier versions have these.
  labels = {
    path: f"{group}, no decay" if _matches("no_decay", config.no_decay, path) else group
    for path, group in groups.items()
  }
  transforms = {}
  for name, schedule in schedules(config, peaks).items():
    adamw = functools.partial(optax.adamw, schedule, b1=0.9, b2=0.999)
    transforms[name] = adamw(weight_decay=config.weight_decay)
    if (undecayed := f"{name}, no decay") in labels.values():
      transforms[undecayed] = adamw(weight_decay=0.0)
  optimizer = optax.multi_transform(transforms, flax.traverse_util.unflatten_dict(labels, sep="/"))
  if config.clip_norm:
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
  return optimizer
